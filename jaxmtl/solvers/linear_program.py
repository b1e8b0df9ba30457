"""Linear programs over the probability simplex."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.compiled import compiled


class LinearSolution(NamedTuple):
    """What `linear_program` returns.

    Attributes:
      value: (n,) a vertex that solves the program; one of no meaning if there is none.
      residual: Scalar, the largest violation of a condition or of optimality, relative to the
        entries of its row.
      feasible: Bool scalar, whether any point meets all conditions.
    """

    value: jax.Array
    residual: jax.Array
    feasible: jax.Array


def _row_scales(rows: jax.Array, bounds: jax.Array) -> jax.Array:
    largest = jnp.maximum(jnp.max(jnp.abs(rows), 1), jnp.abs(bounds))
    return jnp.where(largest > 0, largest, 1)


@compiled()
def linear_program(
    cost: jax.Array, rows: jax.Array, bounds: jax.Array, *, allowed: jax.Array | None = None
) -> LinearSolution:
    """Solves ``max c^T x`` over the simplex ``x >= 0, sum x = 1`` with ``A x >= b``.

    The dual simplex method: the vertex of the largest cost is optimal but for the conditions
    ``A x >= b``, and each round trades one that is violated for one that holds with equality. The
    basis is inverted anew in every round, so that rounding does not add up: meant for n and k up
    to about 50, of which a round costs ``O((k + 1)^3)``. It takes the worst violation first, and
    Bland's rule, under which no basis returns, after ``4 (n + k)`` rounds.

    Args:
      cost: c, (n,), of floating point.
      rows: A, (k, n).
      bounds: b, (k,); minus infinity takes a condition out.
      allowed: (n,) bool; False fixes a variable at zero. All may move if None.

    Returns:
      A `LinearSolution`. Where several vertices are optimal it holds one of them.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import linear_program
    >>> cost, rows = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0]])
    >>> print(linear_program(cost, rows, jnp.array([0.25])).value)
    [0.25 0.75]
    """
    (k, n), dtype = rows.shape, cost.dtype
    q = k + 1
    tolerance = 10 * (n + q) * jnp.finfo(dtype).eps
    allowed = jnp.ones((n,), bool) if allowed is None else allowed
    binds = jnp.isfinite(bounds)
    cost = jnp.where(allowed, cost, 0)
    size = jnp.max(jnp.abs(cost))
    cost = cost / jnp.where(size > 0, size, 1)
    matrix = jnp.where(binds[:, None] & allowed[None, :], rows, 0)
    lower = jnp.where(binds, bounds, -1)  # 0 >= -1 binds nothing
    scales = _row_scales(matrix, lower)
    matrix, lower = matrix / scales[:, None], lower / scales
    # Equations in (x, s) >= 0: sum x = 1 and A x - s = b.
    top = jnp.concatenate([allowed.astype(dtype), jnp.zeros(k, dtype)])[None]
    equations = jnp.concatenate([top, jnp.concatenate([matrix, -jnp.eye(k, dtype=dtype)], 1)])
    right = jnp.concatenate([jnp.ones(1, dtype), lower])
    prices = jnp.concatenate([cost, jnp.zeros(k, dtype)])
    enterable = jnp.concatenate([allowed, jnp.ones(k, bool)])

    class Carry(NamedTuple):
        basis: jax.Array  # (q,) int32, columns in the basis
        done: jax.Array
        feasible: jax.Array
        rounds: jax.Array

    def invert(basis: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = jnp.linalg.inv(equations[:, basis])
        x = inverse @ right
        return inverse, x + inverse @ (right - equations[:, basis] @ x)

    def reduced(basis: jax.Array, inverse: jax.Array) -> jax.Array:
        return prices - (prices[basis] @ inverse) @ equations

    def exchange(c: Carry) -> Carry:
        inverse, x = invert(c.basis)
        bland = c.rounds >= 4 * (n + k)
        violated = x < -tolerance
        # The worst violation, or the first in the order of the variables.
        rank = jnp.where(bland, c.basis.astype(dtype), x)
        leaving = jnp.argmin(jnp.where(violated, rank, jnp.inf))
        slopes = inverse[leaving] @ equations
        basic = jnp.zeros(n + k, bool).at[c.basis].set(True)
        candidate = enterable & ~basic & (slopes < -tolerance)
        gaps = jnp.maximum(-reduced(c.basis, inverse), 0)
        ratios = jnp.where(candidate, gaps / jnp.where(candidate, -slopes, 1), jnp.inf)
        tied = candidate & (ratios <= jnp.min(ratios) + tolerance)
        # Of those that tie the largest pivot, or the first.
        entering = jnp.where(
            bland, jnp.argmax(tied), jnp.argmin(jnp.where(tied, slopes, jnp.inf))
        ).astype(c.basis.dtype)
        go_on, possible = jnp.any(violated), jnp.any(candidate)
        basis = jnp.where(go_on & possible, c.basis.at[leaving].set(entering), c.basis)
        return Carry(basis, ~(go_on & possible), ~go_on | possible, c.rounds + 1)

    best = jnp.argmax(jnp.where(allowed, cost, -jnp.inf))
    first = Carry(
        basis=jnp.concatenate([best[None], n + jnp.arange(k)]).astype(jnp.int32),
        done=jnp.zeros((), bool),
        feasible=jnp.ones((), bool),
        rounds=jnp.zeros((), jnp.int32),
    )
    last = lax.while_loop(lambda c: ~c.done & (c.rounds < 20 * (n + k)), exchange, first)
    inverse, x = invert(last.basis)
    value = jnp.zeros(n + k, dtype).at[last.basis].set(x)
    short = jnp.maximum(jnp.max(-value), 0)
    gaps = jnp.where(enterable, reduced(last.basis, inverse), 0)
    value = jnp.where(allowed, jnp.maximum(value[:n], 0), 0)
    residual = jnp.maximum(short, jnp.max(gaps))
    return LinearSolution(value, residual, last.feasible & last.done)
