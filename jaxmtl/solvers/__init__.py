"""Solvers on small dense arrays: compiled, batched under vmap, without host callbacks.

Each returns a `Solution`: the value and its relative KKT residual.
"""

from jaxmtl.solvers.bargaining import bargaining
from jaxmtl.solvers.cagrad import worst_improvement
from jaxmtl.solvers.nonneg_qp import Solution, nonneg_qp
from jaxmtl.solvers.quadratic import (
    min_norm,
    project_dual_cone,
    project_simplex,
    row_normalised,
)

__all__ = [
    "Solution",
    "bargaining",
    "min_norm",
    "nonneg_qp",
    "project_dual_cone",
    "project_simplex",
    "row_normalised",
    "worst_improvement",
]
