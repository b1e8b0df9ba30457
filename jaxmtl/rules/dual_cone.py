"""Projections onto the dual cone of the gradients: UPGrad and DualProj."""

import jax
import jax.numpy as jnp

from jaxmtl import base, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method(
    "mean of the gradients projected onto their dual cone",
    "Quinton and Rey 2024",
    "non-conflicting",
    "linear under scaling",
    "scale-free",
)
def upgrad(*, preference: jax.Array | None = None, num_tasks: int | None = None) -> Aggregator:
    """Projects each gradient onto the dual cone of all, then averages.

    ``w = sum_i p_i w_i`` with ``w_i = argmin_{v >= e_i} v^T G v`` and p = ``preference`` or
    1/m. The m problems share one matrix and are solved together.

    Args:
      preference: (m,) non-negative weights p of the projected gradients, or None.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``preference`` has a wrong shape or sign.

    **Properties**: non-conflicting, linear under scaling, weighted, permutation-equivariant,
    of degree 1. Zero rows keep the weight p_i and change nothing. The update is 0 if and only
    if the point is strongly stationary (or every ``p_i g_i`` projects to 0).

    **Reference**: Quinton and Rey 2024, eq. 4-6 and proposition 1.

    **Differs from** TorchJD, whose absolute ``norm_eps`` makes this the mean for gradients of
    norm below 0.01 and whose ``reg_eps`` ignores tasks of small gradient: here neither
    exists, and the problem is solved on unit rows.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> aggregator = jaxmtl.upgrad()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0].round(3))
    [0.25 0.75]
    """

    def weigh(
        gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        m = gramian.shape[0]
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        each = solvers.project_dual_cone(gramian, jnp.eye(m, dtype=gramian.dtype), task_mask)
        return solvers.Solution(shares @ each.value, jnp.max(each.residual))

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)


@method(
    "mean gradient projected onto the dual cone", "Lopez-Paz 2017", "non-conflicting", "scale-free"
)
def dual_proj(*, preference: jax.Array | None = None, num_tasks: int | None = None) -> Aggregator:
    """Projects the mean gradient onto the dual cone of all gradients.

    ``w = argmin_{v >= p} v^T G v`` with p = ``preference`` or 1/m.

    Args:
      preference: (m,) non-negative weights p of the projected sum, or None.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``preference`` has a wrong shape or sign.

    **Properties**: non-conflicting, weighted, permutation-equivariant, of degree 1; not linear
    under scaling. Zero rows keep the weight p_i and change nothing.

    **Reference**: Lopez-Paz and Ranzato 2017; Quinton and Rey 2024, eq. 22.

    **Differs from** TorchJD in the same ways as `upgrad`.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [-2.0, 2.0]])
    >>> aggregator = jaxmtl.dual_proj()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0. 1.]
    """

    def weigh(
        gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        return solvers.project_dual_cone(gramian, shares, task_mask)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)
