"""Jacobian descent without the Jacobian: the Gramian of any JAX function."""

from jaxmtl.engine.api import cross_gramian, explain, value_and_grad, value_and_gramian

__all__ = ["cross_gramian", "explain", "value_and_grad", "value_and_gramian"]
