"""Solvers on small dense arrays: compiled, batched under vmap, without host callbacks.

Each returns a `Solution`: the value and its relative KKT residual.
"""

from jaxmtl.solvers.bargaining import bargaining
from jaxmtl.solvers.cagrad import worst_improvement
from jaxmtl.solvers.jacobi_svd import SingularSystem, singular_system
from jaxmtl.solvers.linear_program import LinearSolution, linear_program
from jaxmtl.solvers.nonneg_qp import Solution, nonneg_qp
from jaxmtl.solvers.pseudo_inverse import pseudo_inverse
from jaxmtl.solvers.quadratic import (
    min_norm,
    project_dual_cone,
    project_simplex,
    row_normalized,
)

__all__ = [
    "LinearSolution",
    "SingularSystem",
    "Solution",
    "bargaining",
    "linear_program",
    "min_norm",
    "nonneg_qp",
    "project_dual_cone",
    "project_simplex",
    "pseudo_inverse",
    "row_normalized",
    "singular_system",
    "worst_improvement",
]
