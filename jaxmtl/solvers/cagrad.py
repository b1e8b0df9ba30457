"""The trust-region problem of CAGrad."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.compiled import compiled
from jaxmtl.solvers.nonneg_qp import Solution, nonneg_qp
from jaxmtl.solvers.quadratic import min_norm, row_normalized


@compiled()
def worst_improvement(
    gramian: jax.Array,
    radius: jax.Array | float,
    reference: jax.Array,
    mask: jax.Array | None = None,
) -> Solution:
    """Solves ``max_d min_i g_i . d`` in the ball ``|d - g_0| <= c |g_0|``, with ``g_0 = J^T u``.

    For a level mu, the point of ``{d : J d >= mu}`` nearest to g_0 is a non-negative
    quadratic program in its multipliers, and its distance to g_0 is convex and increasing
    in mu. Newton's method from above finds the level at which the distance is the radius;
    it converges monotonically, and in one step where the set of active tasks is settled.
    At Pareto-stationary points no level above 0 is feasible: where the ball reaches the
    dual cone, the maximiser nearest to g_0 is returned, its projection.

    Args:
      gramian: (m, m).
      radius: c, a scalar, at least 0.
      reference: u, (m,), the weights of g_0.
      mask: (m,) bool, False for tasks that do not take part; all do if None.

    Returns:
      `Solution` with the weights (m,) of d, ``d = J^T value``; the residual is the larger
      of the inner KKT residual and the relative error of the radius.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import worst_improvement
    >>> print(*worst_improvement(4 * jnp.eye(2), 0.5, jnp.array([0.5, 0.5])).value)
    0.75 0.75
    """
    m, dtype = gramian.shape[0], gramian.dtype
    eps = jnp.finfo(dtype).eps
    mask = jnp.ones((m,), bool) if mask is None else mask
    unit, norms, zero = row_normalized(gramian)
    usable = mask & ~zero
    shares = jnp.where(usable, norms * reference, 0)
    slopes = unit @ shares  # (g_i / |g_i|) . g_0
    reference_norm = jnp.sqrt(jnp.maximum(slopes @ shares, 0))
    distance = radius * reference_norm
    h = jnp.where(usable, 1 / norms, 0)

    # No feasible d improves every task by more than its norm times the least norm in the hull.
    weights = min_norm(gramian, mask).value
    least = jnp.maximum(weights @ gramian @ weights, 0)
    cancelled = weights @ jnp.abs(gramian) @ weights
    stationary = least <= 4 * m * eps * cancelled
    top = jnp.where(stationary, 0, (1 + radius) * reference_norm * jnp.sqrt(least))

    class Carry(NamedTuple):
        level: jax.Array  # mu
        x: jax.Array  # (1, m) multipliers of the unit rows
        reached: jax.Array  # |d - g_0|
        residual: jax.Array
        done: jax.Array
        rounds: jax.Array

    def solve(level: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gains = level * h
        # Where the gradients cancel, the slopes are rounding.
        scale = jnp.maximum(jnp.max(jnp.abs(shares)), jnp.max(gains))
        x, residual = nonneg_qp(
            unit, (gains - slopes)[None], allowed=usable[None], scale=scale[None], start=start
        )
        return x, jnp.sqrt(jnp.maximum(x[0] @ unit @ x[0], 0)), residual[0]

    def newton(c: Carry) -> Carry:
        x, reached, residual = solve(c.level, c.x)
        excess = reached - distance
        slope = h @ x[0]  # d(reached^2 / 2) / d(level)
        level = c.level - excess * reached / jnp.where(slope > 0, slope, 1)
        settled = (excess <= 4 * eps * distance) | (slope <= 0)
        settled |= jnp.abs(level - c.level) <= eps * jnp.abs(level)
        return Carry(
            jnp.where(settled, c.level, level), x, reached, residual, settled, c.rounds + 1
        )

    zero_scalar = jnp.zeros((), dtype)
    first = Carry(
        level=top,
        x=jnp.zeros((1, m), dtype),
        reached=zero_scalar,
        residual=zero_scalar,
        done=jnp.zeros((), bool),
        rounds=jnp.zeros((), jnp.int32),
    )
    last = lax.while_loop(lambda c: ~c.done & (c.rounds < 50), newton, first)
    move = last.x[0]
    # The last step may stop a few units of rounding outside the ball.
    outside = last.reached > distance
    shrink = jnp.where(outside, distance / jnp.where(outside, last.reached, 1), 1)
    error = jnp.maximum(last.reached - distance, 0) / jnp.where(distance > 0, distance, 1)
    value = jnp.where(mask, reference, 0) + jnp.where(usable, shrink * move / norms, 0)
    return Solution(value, jnp.maximum(last.residual, jnp.where(distance > 0, error, 0)))
