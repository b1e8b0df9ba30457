"""Non-negative quadratic programs with one matrix and many right-hand sides.

Accelerated projected gradient finds which variables are free; a primal active-set
method started there ends at the exact solution. Every solver of this package but
the bargaining equations comes down to this one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Solution(NamedTuple):
    """What a solver returns.

    Attributes:
      value: The solution.
      residual: KKT residual relative to the size of the problem; a small multiple of the
        machine epsilon when the solver succeeded. One per right-hand side where there
        are many, else a scalar.
    """

    value: jax.Array
    residual: jax.Array


def kkt_residual(matrix: jax.Array, linear: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``max |min(x, Q x - b)|`` per row of ``x``, relative to the entries of b and x."""
    size = jnp.maximum(jnp.max(jnp.abs(linear), -1), jnp.max(jnp.abs(x), -1))
    gap = jnp.max(jnp.abs(jnp.minimum(x, x @ matrix - linear)), -1)
    return jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), 0)


def projected_gradient(
    matrix: jax.Array, linear: jax.Array, allowed: jax.Array, start: jax.Array, steps: int
) -> jax.Array:
    """Runs accelerated projected gradient with restarts (O'Donoghue and Candes 2015)."""
    # The largest absolute row sum bounds the largest eigenvalue.
    step = 1 / jnp.max(jnp.sum(jnp.abs(matrix), 1))

    def body(
        _: int, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, y, t = carry
        x_new = jnp.where(allowed, jnp.maximum(y + step * (linear - y @ matrix), 0), 0)
        uphill = jnp.sum((y - x_new) * (x_new - x), -1, keepdims=True) > 0
        t_new = jnp.where(uphill, 1, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
        momentum = jnp.where(uphill, 0, (t - 1) / t_new)
        return x_new, x_new + momentum * (x_new - x), t_new

    ones = jnp.ones((linear.shape[0], 1), linear.dtype)
    return lax.fori_loop(0, steps, body, (start, start, ones))[0]


def nonneg_qp(
    matrix: jax.Array,
    linear: jax.Array,
    *,
    allowed: jax.Array | None = None,
    start: jax.Array | None = None,
    steps: int | None = None,
) -> Solution:
    """Solves ``argmin_{x >= 0} x^T Q x / 2 - b^T x`` for every row b of ``linear``.

    ``Q`` may be singular as long as the problem is bounded (b in its range, as in every
    problem of this package); any minimiser may then be returned. It should be scaled to
    a diagonal near 1: then the accuracy does not depend on the scale of the tasks.

    The active-set phase keeps ``x`` feasible. Each round solves for the minimiser on the
    free variables, moves towards it as far as signs allow and fixes the variables that
    block; a minimiser that is reached frees the variable with the most negative
    multiplier. The objective falls whenever the free set changes at a minimiser, so no
    set returns; a bound of ``4 m + 20`` rounds makes this certain under rounding as well,
    and the best iterate seen is returned.

    Args:
      matrix: Q, (m, m), symmetric positive semi-definite, of floating point.
      linear: (k, m), one right-hand side per row.
      allowed: Bool, broadcastable to (k, m); False fixes a variable at zero.
      start: (k, m) feasible starting points; zero if None.
      steps: Number of projected-gradient steps, by default about m.

    Returns:
      `Solution` with value (k, m) and residual (k,).

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import nonneg_qp
    >>> print(*nonneg_qp(jnp.eye(2), jnp.array([[2.0, -1.0]])).value[0])
    2.0 0.0
    """
    m, dtype = matrix.shape[0], matrix.dtype
    eps = jnp.finfo(dtype).eps
    allowed = jnp.broadcast_to(True if allowed is None else allowed, linear.shape)
    linear = jnp.where(allowed, linear, 0)
    start = jnp.zeros_like(linear) if start is None else start
    x = projected_gradient(matrix, linear, allowed, start, 8 + m if steps is None else steps)
    # Makes faces of dependent rows solvable; the refinement steps take its effect out.
    ridge = 10 * m * eps
    tolerance = 10 * m * eps
    identity = jnp.eye(m, dtype=dtype)

    def minimise_on(free: jax.Array, gradient: jax.Array) -> jax.Array:
        pair = free[:, :, None] & free[:, None, :]
        diagonal = jnp.where(free, ridge, 1)[:, :, None] * identity
        face = jnp.where(pair, matrix, 0) + diagonal
        factor = lax.linalg.cholesky(face, symmetrize_input=False)

        def solve(rhs: jax.Array) -> jax.Array:
            return jax.scipy.linalg.cho_solve((factor, True), rhs[..., None])[..., 0]

        # Triangular solves cost as much as the factor: refine only where the ridge shows.
        def left(step: jax.Array) -> jax.Array:
            return jnp.where(free, gradient - step @ matrix, 0)

        def imprecise(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            step, rest, count = carry
            size = jnp.max(jnp.abs(linear), -1, keepdims=True)
            size += jnp.max(jnp.abs(step), -1, keepdims=True)
            return jnp.any(jnp.abs(rest) > eps * size) & (count < 3)

        def refine(
            carry: tuple[jax.Array, jax.Array, jax.Array],
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            step, rest, count = carry
            step = jnp.where(free, step + solve(rest), 0)
            return step, left(step), count + 1

        start = (jnp.zeros_like(gradient), left(jnp.zeros_like(gradient)), jnp.zeros((), jnp.int32))
        return lax.while_loop(imprecise, refine, start)[0]

    class Carry(NamedTuple):
        x: jax.Array  # (k, m)
        free: jax.Array  # (k, m) bool
        done: jax.Array  # (k,) bool
        best: jax.Array  # (k, m)
        residual: jax.Array  # (k,)
        rounds: jax.Array  # ()

    def unfinished(c: Carry) -> jax.Array:
        return jnp.any(~c.done) & (c.rounds < 4 * m + 20)

    def improve(c: Carry) -> Carry:
        step = minimise_on(c.free, linear - c.x @ matrix)
        falling = c.free & (step < 0)
        reach = jnp.where(falling, -c.x / jnp.where(falling, step, -1), jnp.inf)
        length = jnp.minimum(jnp.min(reach, -1, keepdims=True), 1)
        blocked = length < 1
        hit = falling & (reach <= length) & blocked
        x = jnp.where(hit, 0, jnp.maximum(c.x + length * step, 0))
        free = c.free & ~hit
        downhill = jnp.where(allowed & ~free, linear - x @ matrix, -jnp.inf)
        steepest = jnp.max(downhill, -1, keepdims=True)
        size = jnp.max(jnp.abs(linear), -1, keepdims=True) + jnp.max(x, -1, keepdims=True)
        optimal = steepest <= tolerance * size
        free = free | (~blocked & ~optimal & (downhill == steepest))
        residual = kkt_residual(matrix, jnp.where(allowed, linear, x @ matrix), x)
        better = ~c.done & (residual < c.residual)
        # A face whose equations are not yet solved to rounding gets another round.
        settled = (residual <= tolerance) | (residual >= c.residual)
        go_on = ~c.done[:, None]
        return Carry(
            x=jnp.where(go_on, x, c.x),
            free=jnp.where(go_on, free, c.free),
            done=c.done | ((~blocked & optimal)[:, 0] & settled),
            best=jnp.where(better[:, None], x, c.best),
            residual=jnp.where(better, residual, c.residual),
            rounds=c.rounds + 1,
        )

    k = linear.shape[0]
    first = Carry(
        x=x,
        free=x > 0,
        done=jnp.zeros((k,), bool),
        best=x,
        residual=jnp.full((k,), jnp.inf, dtype),
        rounds=jnp.zeros((), jnp.int32),
    )
    last = lax.while_loop(unfinished, improve, first)
    return Solution(last.best, last.residual)
