"""Non-negative quadratic programs with one matrix and many right-hand sides.

Two methods in turn. Conjugate gradients on the free variables of each problem multiply
all problems by the matrix at once, and their answers are verified. Problems that they
leave unsolved, ill-conditioned ones, go to a primal active-set method with a factor per
problem, a chunk at a time. Every solver of this package but the bargaining equations
comes down to this one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Bytes of one array of faces in the active-set method; about four of them are alive.
_CHUNK_BYTES = 2**25


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


def kkt_residual(matrix: jax.Array, linear: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns ``max |min(x, Q x - b)|`` per row of ``x``, relative to ``scale`` and to x."""
    size = jnp.maximum(scale, jnp.max(jnp.abs(x), -1))
    gap = jnp.max(jnp.abs(jnp.minimum(x, x @ matrix - linear)), -1)
    return jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), 0)


def conjugate_gradients(
    matrix: jax.Array,
    linear: jax.Array,
    allowed: jax.Array,
    scale: jax.Array,
    start: jax.Array | None,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Runs projected conjugate gradients on every column of ``linear`` at once.

    After Dostal's modified proportioning: conjugate steps on the free variables while their
    gradient outweighs that of the fixed ones, else a step that frees all fixed variables
    along which the objective falls. A step that leaves the orthant ends at its boundary, and
    the next goes along the projection of a gradient step, no further than its end. All step
    lengths are exact, so the objective never rises, and each step costs one product with
    the matrix. An answer counts once its gradient, computed anew, agrees.

    Args:
      matrix: Q, (m, m).
      linear: (m, k), one right-hand side per column, with entries near 1.
      allowed: (m, k) bool, False fixes a variable at zero.
      scale: (1, k), what the accuracy is relative to, beside x.
      start: (m, k) feasible starting points; zero if None.
      steps: The largest number of steps.

    Returns:
      A pair of x, (m, k), and a bool (1, k) that marks the solved problems.
    """
    m, k = linear.shape
    dtype = linear.dtype
    eps = float(jnp.finfo(dtype).eps)
    tolerance = 4 * eps * m**0.5
    # Beyond these, x may be on its way to infinity: left to the other method, which can tell.
    longest, largest = 1 / (4 * m * eps), eps**-0.25

    class Carry(NamedTuple):
        x: jax.Array  # (m, k)
        gradient: jax.Array  # (m, k) Q x - b
        direction: jax.Array  # (m, k); x itself where the gradient is computed anew
        conjugate: jax.Array  # (1, k) bool: the direction is one of free variables
        bent: jax.Array  # (1, k) bool: the direction leads to a projected point
        verifying: jax.Array  # (1, k) bool
        solved: jax.Array  # (1, k) bool
        stuck: jax.Array  # (1, k) bool
        length: jax.Array  # (1, k) of the last step
        steps: jax.Array  # ()

    def total(products: jax.Array) -> jax.Array:
        return jnp.sum(products, 0, keepdims=True)

    def step(c: Carry) -> Carry:
        image = matrix @ c.direction
        slope = total(c.gradient * c.direction)
        curvature = jnp.maximum(total(c.direction * image), -eps * slope)
        moving = ~(c.verifying | c.stuck) & (curvature > 0)
        curvature = jnp.where(curvature > 0, curvature, 1)
        length = jnp.where(moving, jnp.maximum(-slope / curvature, 0), 0)
        falling = c.direction < 0
        ratio = jnp.where(falling, -c.x / jnp.where(falling, c.direction, -1), jnp.inf)
        reach = jnp.where(c.bent, 1, jnp.min(ratio, 0, keepdims=True))
        blocked = length > reach
        taken = jnp.minimum(length, reach)
        stuck = c.stuck | (taken > longest) | (jnp.max(c.x, 0, keepdims=True) > largest * scale)
        moving &= ~stuck
        taken = jnp.where(moving, taken, 0)
        x = jnp.where(moving & (ratio <= taken), 0, jnp.maximum(c.x + taken * c.direction, 0))
        x = jnp.where(moving, x, c.x)
        gradient = jnp.where(c.verifying, image - linear, c.gradient + taken * image)

        last = jnp.where(moving & (length > 0), length, c.length)
        inner = jnp.where(x > 0, gradient, 0)
        outer = jnp.where((x > 0) | ~allowed, 0, jnp.minimum(gradient, 0))
        # What a step of this length can use of the free variables' gradient.
        free = total(inner * jnp.minimum(inner, x / last))
        fixed = total(outer * outer)
        size = scale + jnp.max(x, 0, keepdims=True)
        optimal = free + fixed <= (tolerance * size) ** 2
        solved = c.solved | (optimal & c.verifying)
        closed = solved | stuck
        verifying = optimal & ~closed
        bent = blocked & c.conjugate & moving & ~optimal
        proportional = fixed <= free
        keep = c.conjugate & ~blocked & moving & (slope < 0)
        turn = jnp.where(keep, total(inner * image) / curvature, 0)
        direction = jnp.where(proportional, turn * c.direction - inner, -outer)
        direction = jnp.where(bent, jnp.maximum(x - last * inner, 0) - x, direction)
        direction = jnp.where(verifying, x, jnp.where(closed, 0, direction))
        return Carry(
            x=x,
            gradient=gradient,
            direction=direction,
            conjugate=proportional & ~bent & ~optimal,
            bent=bent,
            verifying=verifying,
            solved=solved,
            stuck=stuck,
            length=last,
            steps=c.steps + 1,
        )

    no = jnp.zeros((1, k), bool)
    x = jnp.zeros((m, k), dtype) if start is None else start
    first = Carry(
        x=x,
        gradient=-linear,
        direction=jnp.where(allowed, jnp.maximum(linear, 0), 0) if start is None else x,
        conjugate=no,
        bent=no,
        verifying=no if start is None else ~no,
        solved=no,
        stuck=no,
        length=jnp.ones((1, k), dtype),
        steps=jnp.zeros((), jnp.int32),
    )
    last = lax.while_loop(lambda c: jnp.any(~(c.solved | c.stuck)) & (c.steps < steps), step, first)
    return last.x, last.solved


def active_set(
    matrix: jax.Array,
    linear: jax.Array,
    allowed: jax.Array,
    scale: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs a primal active-set method on every row of ``linear``, (k, m).

    Keeps ``x`` feasible. Each round solves for the minimiser on the free variables, moves
    towards it as far as signs allow and fixes the variables that block; a minimiser that
    is reached frees the variable with the most negative multiplier. The objective falls
    whenever the free set changes at a minimiser, so no set returns; a bound of ``4 m + 20``
    rounds makes this certain under rounding as well, and the best iterate seen is returned.

    Equations of a face that refinement does not bring nearer to their solution have none:
    along a null vector of the face the objective falls. Where no sign blocks that way, the
    problem is unbounded, and a far point on it is returned.

    Returns:
      A pair of x, (k, m), and a bool (k,) that marks unbounded problems.
    """
    k, m = linear.shape
    dtype = matrix.dtype
    eps = float(jnp.finfo(dtype).eps)
    # Makes faces of dependent rows solvable; the refinement steps take its effect out.
    ridge = 10 * m * eps
    tolerance = 10 * m * eps
    identity = jnp.eye(m, dtype=dtype)

    def minimise_on(free: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        pair = free[:, :, None] & free[:, None, :]
        diagonal = jnp.where(free, ridge, 1)[:, :, None] * identity[None]
        face = jnp.where(pair, matrix[None], 0) + diagonal
        factor = lax.linalg.cholesky(face, symmetrize_input=False)

        def solve(rhs: jax.Array) -> jax.Array:
            return jax.scipy.linalg.cho_solve((factor, True), rhs[..., None])[..., 0]

        class Refined(NamedTuple):
            step: jax.Array  # (k, m)
            rest: jax.Array  # (k, m) what the equations lack
            lacking: jax.Array  # (k,) its size
            idle: jax.Array  # (k,) bool: the last refinement did not help
            times: jax.Array  # ()

        # Triangular solves cost as much as the factor: refine only where the ridge shows.
        def imprecise(c: Refined) -> jax.Array:
            size = scale + jnp.max(jnp.abs(c.step), -1)
            return jnp.any(c.lacking > eps * size) & (c.times < 3)

        def refine(c: Refined) -> Refined:
            step = jnp.where(free, c.step + solve(c.rest), 0)
            rest = jnp.where(free, gradient - step @ matrix, 0)
            lacking = jnp.max(jnp.abs(rest), -1)
            return Refined(step, rest, lacking, lacking > 0.9 * c.lacking, c.times + 1)

        rest = jnp.where(free, gradient, 0)
        lacking = jnp.max(jnp.abs(rest), -1)
        no = jnp.zeros((k,), bool)
        first = Refined(jnp.zeros_like(rest), rest, lacking, no, jnp.zeros((), jnp.int32))
        last = lax.while_loop(imprecise, refine, first)
        size = scale + jnp.max(jnp.abs(last.step), -1)
        return last.step, last.idle & (last.lacking > 2 * m * eps * size)

    def residual_of(x: jax.Array) -> jax.Array:
        return kkt_residual(matrix, jnp.where(allowed, linear, x @ matrix), x, scale)

    class Carry(NamedTuple):
        x: jax.Array  # (k, m)
        free: jax.Array  # (k, m) bool
        done: jax.Array  # (k,) bool
        best: jax.Array  # (k, m)
        residual: jax.Array  # (k,)
        unbounded: jax.Array  # (k,) bool
        rounds: jax.Array  # ()

    def unfinished(c: Carry) -> jax.Array:
        return jnp.any(~c.done) & (c.rounds < 4 * m + 20)

    def improve(c: Carry) -> Carry:
        step, inconsistent = minimise_on(c.free, linear - c.x @ matrix)
        falling = c.free & (step < 0)
        reach = jnp.where(falling, -c.x / jnp.where(falling, step, -1), jnp.inf)
        length = jnp.minimum(jnp.min(reach, -1, keepdims=True), 1)
        blocked = length < 1
        hit = falling & (reach <= length) & blocked
        x = jnp.where(hit, 0, jnp.maximum(c.x + length * step, 0))
        free = c.free & ~hit
        downhill = jnp.where(allowed & ~free, linear - x @ matrix, -jnp.inf)
        steepest = jnp.max(downhill, -1, keepdims=True)
        size = scale[:, None] + jnp.max(x, -1, keepdims=True)
        optimal = steepest <= tolerance * size
        free = free | (~blocked & ~optimal & (downhill == steepest))
        residual = residual_of(x)
        unbounded = ~c.done & inconsistent & ~blocked[:, 0]
        better = ~c.done & (residual < c.residual) | unbounded
        # A face whose equations are not yet solved to rounding gets another round.
        settled = (residual <= tolerance) | (residual >= c.residual)
        go_on = ~c.done[:, None]
        return Carry(
            x=jnp.where(go_on, x, c.x),
            free=jnp.where(go_on, free, c.free),
            done=c.done | ((~blocked & optimal)[:, 0] & settled) | unbounded,
            best=jnp.where(better[:, None], x, c.best),
            residual=jnp.where(better, residual, c.residual),
            unbounded=c.unbounded | unbounded,
            rounds=c.rounds + 1,
        )

    first = Carry(
        x=start,
        free=start > 0,
        done=jnp.zeros((k,), bool),
        best=start,
        residual=residual_of(start),
        unbounded=jnp.zeros((k,), bool),
        rounds=jnp.zeros((), jnp.int32),
    )
    last = lax.while_loop(unfinished, improve, first)
    return last.best, last.unbounded


def nonneg_qp(
    matrix: jax.Array,
    linear: jax.Array,
    *,
    allowed: jax.Array | None = None,
    scale: jax.Array | None = None,
    start: jax.Array | None = None,
    steps: int | None = None,
    chunk_size: int | None = None,
) -> Solution:
    """Solves ``argmin_{x >= 0} x^T Q x / 2 - b^T x`` for every row b of ``linear``.

    ``Q`` may be singular as long as the problem is bounded (b in its range, as in every
    problem of this package); any minimiser may then be returned. It should be scaled to
    a diagonal near 1: then the accuracy does not depend on the scale of the tasks. The
    scale of b has no effect on the accuracy.

    Conjugate gradients on all problems at once, then the active-set method on those that
    are not solved to rounding. A problem found to be unbounded has an infinite residual; its
    value is a far point on a ray along which the objective falls.

    Args:
      matrix: Q, (m, m), symmetric positive semi-definite, of floating point.
      linear: (k, m), one right-hand side per row.
      allowed: Bool, broadcastable to (k, m); False fixes a variable at zero.
      scale: (k,), positive, what the accuracy is relative to, beside the entries of x; the
        largest entry of b if None. Where b is a difference that cancels, the size of what
        was subtracted says how much of b is rounding.
      start: (k, m) feasible starting points; zero if None.
      steps: Largest number of conjugate-gradient steps, by default ``2 m + 50``.
      chunk_size: How many problems the active-set method factors at a time; by default as
        many as keep its arrays below 150 MB. The results do not depend on it.

    Returns:
      `Solution` with value (k, m) and residual (k,).

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import nonneg_qp
    >>> print(*nonneg_qp(jnp.eye(2), jnp.array([[2.0, -1.0]])).value[0])
    2.0 0.0
    """
    (k, m), dtype = linear.shape, matrix.dtype
    if chunk_size is None:
        chunk_size = _CHUNK_BYTES // (m * m * dtype.itemsize)
    size = max(min(chunk_size, k), 1)
    allowed = jnp.ones((k, m), bool) if allowed is None else jnp.broadcast_to(allowed, (k, m))
    if scale is None:
        scale = jnp.max(jnp.abs(jnp.where(allowed, linear, 0)), -1)
    # A power of two brings the problem near 1 and changes no digit.
    exponent = jnp.where(scale > 0, jnp.frexp(scale)[1], 0)[:, None]
    scale = jnp.ldexp(scale, -exponent[:, 0])
    scaled = jnp.where(allowed, jnp.ldexp(linear, -exponent), 0)
    start = None if start is None else jnp.ldexp(start, -exponent)
    found, solved = conjugate_gradients(
        matrix,
        scaled.T,
        allowed.T,
        scale[None],
        None if start is None else start.T,
        2 * m + 50 if steps is None else steps,
    )

    # A loop of no rounds, unlike a branch, costs nothing under vmap when all are solved.
    class Carry(NamedTuple):
        x: jax.Array  # (k, m)
        open: jax.Array  # (k,) bool: not yet solved
        unbounded: jax.Array  # (k,) bool

    def take_on(c: Carry) -> Carry:
        chosen = lax.top_k(c.open.astype(jnp.int32), size)[1]
        x, unbounded = active_set(
            matrix, scaled[chosen], allowed[chosen], scale[chosen], c.x[chosen]
        )
        x = jnp.where(c.open[chosen][:, None], x, c.x[chosen])
        return Carry(
            c.x.at[chosen].set(x),
            c.open.at[chosen].set(False),
            c.unbounded.at[chosen].set(c.open[chosen] & unbounded | c.unbounded[chosen]),
        )

    first = Carry(found.T, ~solved[0], jnp.zeros((k,), bool))
    last = lax.while_loop(lambda c: jnp.any(c.open), take_on, first)
    x = last.x
    residual = kkt_residual(matrix, jnp.where(allowed, scaled, x @ matrix), x, scale)
    return Solution(jnp.ldexp(x, exponent), jnp.where(last.unbounded, jnp.inf, residual))
