"""The quadratic programs of MGDA and of projections onto the dual cone."""

import jax
import jax.numpy as jnp

from jaxmtl.compiled import compiled
from jaxmtl.solvers.nonneg_qp import Solution, nonneg_qp


def row_normalized(gramian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divides a Gramian by the norms of its rows, ``Q = D^-1 G D^-1``.

    Args:
      gramian: (m, m).

    Returns:
      A triple of Q (m, m) with unit diagonal (zero rows become orthogonal unit rows),
      the norms (m,), 1 for zero rows, and a bool (m,) that marks the zero rows.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import row_normalized
    >>> print(row_normalized(jnp.array([[4.0, -1.0], [-1.0, 1.0]]))[0])
    [[ 1.  -0.5]
     [-0.5  1. ]]
    """
    diagonal = jnp.diagonal(gramian)
    zero = diagonal <= 0
    norms = jnp.sqrt(jnp.where(zero, 1, diagonal))
    unit = gramian / norms[:, None] / norms[None, :]
    unit = jnp.where(zero[:, None] | zero[None, :], 0, unit)
    # The diagonal is 1 by definition; the quotient can miss it by one unit of rounding.
    unit = jnp.where(jnp.eye(gramian.shape[0], dtype=bool), 1, unit)
    return unit, norms, zero


@compiled()
def min_norm(gramian: jax.Array, mask: jax.Array | None = None) -> Solution:
    """Solves ``argmin_{w in simplex} w^T G w``, the point of least norm in a convex hull.

    With Q the row-normalised Gramian and h the reciprocal norms, the solution is the
    normalised one of the non-negative problem ``min x^T (Q + h h^T) x / 2 - h^T x``.

    Args:
      gramian: (m, m).
      mask: (m,) bool, False for tasks that do not take part; all do if None.

    Returns:
      `Solution` with value (m,), non-negative and of sum 1; uniform over the zero rows if
      there are any (the norm is then 0), and zero if ``mask`` is all False.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import min_norm
    >>> print(*min_norm(jnp.diag(jnp.array([1.0, 3.0]))).value)
    0.75 0.25
    """
    m = gramian.shape[0]
    mask = jnp.ones((m,), bool) if mask is None else mask
    unit, norms, zero = row_normalized(gramian)
    usable = mask & ~zero
    smallest = jnp.min(jnp.where(usable, norms, jnp.inf))
    h = jnp.where(usable, smallest / norms, 0)
    x, residual = nonneg_qp(unit + h[:, None] * h[None, :], h[None], allowed=usable[None])
    raw = jnp.where(usable, x[0] / norms, 0)
    total = jnp.sum(raw)
    weights = raw / jnp.where(total > 0, total, 1)
    zeros = (mask & zero).astype(gramian.dtype)
    count = jnp.sum(zeros)
    weights = jnp.where(count > 0, zeros / jnp.where(count > 0, count, 1), weights)
    return Solution(weights, jnp.where(count > 0, 0, residual[0]))


@compiled()
def project_dual_cone(
    gramian: jax.Array, lower: jax.Array, mask: jax.Array | None = None
) -> Solution:
    """Solves ``argmin_{v >= u} v^T G v`` for every row u of ``lower``.

    ``J^T v`` is the projection of ``J^T u`` onto the dual cone of the rows of J (Quinton
    and Rey 2024, proposition 1). Solved on the row-normalised Gramian, so that a task of
    small gradient binds like any other.

    Args:
      gramian: (m, m).
      lower: (k, m) or (m,), non-negative.
      mask: (m,) bool, False for tasks that do not take part; all do if None.

    Returns:
      `Solution` with value of the shape of ``lower`` and one residual per row.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import project_dual_cone
    >>> jacobian = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> v = project_dual_cone(jacobian @ jacobian.T, jnp.array([1.0, 0.0])).value
    >>> print(v @ jacobian)
    [0.5 0.5]
    """
    unit, norms, zero = row_normalized(gramian)
    usable = ~zero if mask is None else mask & ~zero
    lower = jnp.asarray(lower)
    bounds = jnp.where(usable[None], jnp.atleast_2d(lower) * norms[None], 0)  # of x = D v
    largest = jnp.max(bounds, -1, keepdims=True)
    bounds = bounds / jnp.where(largest > 0, largest, 1)
    # Where the gradients cancel, the slopes -bounds @ unit are rounding of size eps.
    scale = jnp.ones_like(largest[:, 0])
    y, residual = nonneg_qp(unit, -bounds @ unit, allowed=usable[None], scale=scale)
    value = lower + jnp.where(usable[None], y * largest / norms[None], 0).reshape(lower.shape)
    return Solution(value, residual if lower.ndim == 2 else residual[0])


def project_simplex(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Projects ``x`` (m,) onto the probability simplex of the tasks in ``mask``.

    Exact, by sorting (Held, Wolfe and Crowder 1974).

    Args:
      x: (m,), of floating point.
      mask: (m,) bool, False for tasks that do not take part; all do if None.

    Returns:
      (m,) of sum 1, non-negative, zero where ``mask`` is False.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import project_simplex
    >>> print(project_simplex(jnp.array([0.5, 1.5, -2.0])))
    [0. 1. 0.]
    """
    mask = jnp.ones(x.shape, bool) if mask is None else mask
    descending = -jnp.sort(jnp.where(mask, -x, jnp.inf))
    count = jnp.arange(1, x.size + 1, dtype=x.dtype)
    cumulative = jnp.cumsum(jnp.where(jnp.isfinite(descending), descending, 0))
    inside = descending - (cumulative - 1) / count > 0
    size = jnp.maximum(jnp.sum(inside), 1)
    threshold = (cumulative[size - 1] - 1) / size
    return jnp.where(mask, jnp.maximum(x - threshold, 0), 0)
