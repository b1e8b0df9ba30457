"""Non-negative quadratic programs with one matrix and many right-hand sides.

Three methods in turn. Where there are about as many problems as variables, an operator
splitting whose factor they share tells most variables that are zero from the others.
Conjugate gradients on the free variables of each problem go on from there, multiply all
problems by the matrix at once, and their answers are verified. Problems that they leave
unsolved, ill-conditioned ones, go to a primal active-set method with a factor per
problem, a chunk at a time. Every solver of this package but the bargaining equations
comes down to this one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.compiled import compiled

# Bytes of one array of faces in the active-set method; about three of them are alive. More would
# save no time, and even unused they would make the working memory of a step so large that
# allocators return it to the system after every call, to be cleared at the next.
_CHUNK_BYTES = 2**22
# Matrices larger than _SMALL meet some right-hand sides at a time: _BLOCK, whose arrays fit the
# caches, or _WIDE from _LARGE on, where a product is large enough for XLA to share it among cores.
_SMALL, _BLOCK = 64, 32
_LARGE, _WIDE = 256, 128
# Of the splitting: for fewer variables or problems the factor costs more than it saves.
_FEWEST_VARIABLES, _SPLITTING_STEPS, _RELAXATION = 32, 24, 1.6
_PIVOT = 16


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


def inverse_of(matrix: jax.Array) -> jax.Array:
    """Returns the inverse of a positive definite, well-conditioned matrix, (m, m).

    By Gauss-Jordan elimination, some columns at a time. LAPACK would take threads for the
    whole matrix, which afterwards wait for work on the cores that the products to come need:
    on two cores a program of 75 ms took 115.
    """
    m, dtype = len(matrix), matrix.dtype
    b = min(m, _PIVOT)
    size = -(-m // b) * b
    identity = jnp.eye(b, dtype=dtype)

    def eliminate(i: jax.Array, a: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(a, i * b, b, 0)
        columns = lax.dynamic_slice_in_dim(a, i * b, b, 1)
        pivot = lax.dynamic_slice_in_dim(rows, i * b, b, 1)
        factor = lax.linalg.cholesky(pivot, symmetrize_input=False)
        half = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
        rows = lax.dynamic_update_slice_in_dim(rows, identity, i * b, 1)
        columns = lax.dynamic_update_slice_in_dim(columns, -identity, i * b, 0)
        chosen = jnp.arange(size) // b == i
        rest = jnp.where(chosen[:, None] | chosen[None], 0, a)
        return rest - (columns @ half.T) @ (half @ rows)

    padded = jnp.pad(matrix, (0, size - m)) + jnp.diag((jnp.arange(size) >= m).astype(dtype))
    return lax.fori_loop(0, size // b, eliminate, padded)[:m, :m]


def split(matrix: jax.Array, linear: jax.Array, allowed: jax.Array) -> jax.Array:
    """Returns feasible points near the solutions, by some steps of Douglas-Rachford splitting.

    In turn each step minimizes the objective plus a distance, by the inverse of ``Q + r I``
    that all problems share, and projects on the orthant. With r the size of the diagonal few
    steps find most of the variables that are zero, where conjugate gradients have to find
    them one bend after the other; it says nothing about accuracy.

    Args:
      matrix: Q, (m, m).
      linear: (m, k), one right-hand side per column.
      allowed: Bool, broadcastable to (m, k); False fixes a variable at zero.

    Returns:
      Array (m, k).
    """
    m = len(matrix)
    largest = jnp.max(jnp.diagonal(matrix))
    r = jnp.where(largest > 0, largest, 1)
    inverse = inverse_of(matrix + r * jnp.eye(m, dtype=matrix.dtype))

    def project(v: jax.Array) -> jax.Array:
        return jnp.where(allowed & (v > 0), v, 0)

    def step(_: int, v: jax.Array) -> jax.Array:
        x = project(v)
        return v + _RELAXATION * (inverse @ (linear + r * (2 * x - v)) - x)

    return project(lax.fori_loop(0, _SPLITTING_STEPS, step, inverse @ linear))


def conjugate_gradients(
    matrix: jax.Array,
    linear: jax.Array,
    scale: jax.Array,
    start: jax.Array | None,
    *,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Runs projected conjugate gradients on every column of ``linear`` at once.

    After Dostal's modified proportioning. While the gradient of the free variables outweighs
    that of the fixed ones, steps are conjugate; else a step frees all fixed variables along
    which the objective falls. A conjugate step that would leave the orthant ends at its
    boundary, and the next goes towards the projection of a gradient step. Lengths are exact
    unless a sign blocks, so the objective never rises, and each step costs one product with
    the matrix. An answer counts once its gradient, computed anew, agrees.

    Args:
      matrix: Q, (m, m).
      linear: (m, k), one right-hand side per column, with entries near 1. A large negative
        entry fixes a variable at zero.
      scale: (1, k), what the accuracy is relative to, beside x.
      start: (m, k) feasible starting points; zero if None.
      steps: The largest number of steps.

    Returns:
      A pair of x, (m, k), and a bool (1, k) that marks the solved problems.
    """
    m, k = linear.shape
    dtype = linear.dtype
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    tolerance = 4 * eps * m**0.5
    # Beyond these, x may be on its way to infinity: left to the other method, which can tell.
    longest, largest = 1 / (4 * m * eps), eps**-0.25

    class Carry(NamedTuple):
        linear: jax.Array  # (m, k)
        scale: jax.Array  # (1, k)
        x: jax.Array  # (m, k)
        gradient: jax.Array  # (m, k) Q x - b
        direction: jax.Array  # (m, k); 0 where a problem is not worked on
        descent: jax.Array  # (1, k) by which the direction lowers the objective at first
        length: jax.Array  # (1, k) of the last exact step
        conjugate: jax.Array  # (1, k) bool: the direction may be followed by a conjugate one
        stuck: jax.Array  # (1, k) bool
        solved: jax.Array  # (1, k) bool
        steps: jax.Array  # (1, k)
        cycles: jax.Array  # (1, k) how often the gradient was computed anew

    def total(products: jax.Array) -> jax.Array:
        return jnp.sum(products, 0, keepdims=True)

    def moving(c: Carry) -> jax.Array:
        return (c.descent > (tolerance * c.scale) ** 2) & (c.steps < steps)

    # Few passes over (m, k) arrays: beside the product they are the cost.
    def step(c: Carry) -> Carry:
        live = c.descent > (tolerance * c.scale) ** 2
        image = matrix @ c.direction
        curvature = jnp.maximum(total(c.direction * image), eps * c.descent)
        curvature = jnp.where(live, curvature, 1)
        exact = jnp.where(live, c.descent / curvature, 0)
        falling = c.direction < 0
        steepest = jnp.where(falling, -c.direction / (c.x + tiny), 0)
        steepest = jnp.max(steepest, 0, keepdims=True)
        blocked = exact * steepest > 1
        length = jnp.where(blocked, 1 / jnp.where(blocked, steepest, 1), exact)
        stuck = length > longest
        length = jnp.where(stuck, 0, length)
        x = c.x + length * c.direction
        x = jnp.where(x <= 4 * eps * c.x, 0, x)  # exactly, for what blocks
        gradient = c.gradient + length * image

        last = jnp.where(live & (exact > 0), exact, c.length)
        bent = blocked & c.conjugate
        # Bent directions reach the boundary no sooner than after a step of the last length.
        bound = jnp.where(bent, 1 / last, eps**-2)
        inside = x > 0
        fixed = total(jnp.where(inside, 0, jnp.minimum(gradient, 0)) ** 2)
        free = total(jnp.where(inside, gradient * jnp.minimum(x * bound, gradient), 0))
        inner = bent | (fixed <= free)
        turn = total(jnp.where(inside, gradient * image, 0)) / curvature
        turn = jnp.where(inner & c.conjugate & ~blocked, turn, 0)
        slope = jnp.where(inside, jnp.minimum(x * bound, gradient), jnp.minimum(gradient, 0))
        direction = turn * c.direction - jnp.where(inside == inner, slope, 0)
        live &= ~stuck
        descent = jnp.where(inner, free, fixed)
        return c._replace(
            x=x,
            gradient=gradient,
            direction=jnp.where(live, direction, 0),
            descent=jnp.where(live, descent, 0),
            length=last,
            conjugate=inner & ~bent,
            stuck=c.stuck | stuck,
            steps=c.steps + 1,
        )

    def begin(c: Carry, within: float = 2 * tolerance) -> Carry:
        """Starts from x and its gradient."""
        size = c.scale + jnp.max(c.x, 0, keepdims=True)
        gap = jnp.max(jnp.abs(jnp.minimum(c.x, c.gradient)), 0, keepdims=True)
        stuck = c.stuck | (size > largest * c.scale)
        solved = (gap <= within * size) & ~stuck
        slope = jnp.where(solved | stuck, 0, jnp.minimum(c.x / c.length, c.gradient))
        descent = total(c.gradient * slope)
        no = jnp.zeros_like(stuck)
        return c._replace(
            direction=-slope, descent=descent, conjugate=no, stuck=stuck, solved=solved
        )

    def advance(c: Carry, patience: int | jax.Array) -> Carry:
        """Takes steps until no more problems than ``patience`` move, and verifies the others."""
        c = lax.while_loop(lambda c: jnp.sum(moving(c)) > patience, step, c)
        gradient = matrix @ c.x - c.linear
        anew = begin(c._replace(gradient=gradient, steps=c.steps + 1, cycles=c.cycles + 1))
        return jax.tree.map(partial(jnp.where, moving(c)), c, anew)

    def unfinished(c: Carry) -> jax.Array:
        return ~(c.solved | c.stuck) & (c.steps < steps) & (c.cycles < 4)

    def in_one(c: Carry) -> Carry:
        return lax.while_loop(lambda c: jnp.any(unfinished(c)), lambda c: advance(c, 0), c)

    def in_blocks(c: Carry) -> Carry:
        """Takes ``width`` columns at a time.

        Problems differ in how many steps they take. A block stops when half of its problems rest,
        and in the next round those that do not share fewer blocks.
        """

        class Round(NamedTuple):
            columns: Carry
            place: jax.Array  # (k,) of a column in the order of the problems
            left: jax.Array  # () how many come first that are not finished

        def sort(columns: Carry, place: jax.Array) -> Round:
            left = unfinished(columns)[0]
            order = jnp.argsort(~left)
            columns = jax.tree.map(lambda x: x[:, order], columns)
            return Round(columns, place[order], jnp.sum(left))

        def one_round(r: Round) -> Round:
            patience = jnp.where(r.left > width, width // 2, 0)

            def block(i: jax.Array, columns: Carry) -> Carry:
                some = jax.tree.map(
                    lambda x: lax.dynamic_slice_in_dim(x, i * width, width, 1), columns
                )
                some = advance(some, patience)
                return jax.tree.map(
                    lambda x, new: lax.dynamic_update_slice_in_dim(x, new, i * width, 1),
                    columns,
                    some,
                )

            blocks = (r.left + width - 1) // width
            return sort(lax.fori_loop(0, blocks, block, r.columns), r.place)

        size = c.linear.shape[1]
        last = lax.while_loop(lambda r: r.left > 0, one_round, sort(c, jnp.arange(size)))
        return jax.tree.map(lambda x: x[:, jnp.argsort(last.place)], last.columns)

    width = _WIDE if m >= _LARGE else _BLOCK
    blocks = 1 if m <= _SMALL or k <= width else -(-k // width)
    extra = ((0, 0), (0, (blocks * width - k) if blocks > 1 else 0))  # solved from the start
    linear, scale = jnp.pad(linear, extra), jnp.pad(scale, extra, constant_values=1)
    x = jnp.zeros_like(linear) if start is None else jnp.pad(start, extra)
    gradient = -linear if start is None else matrix @ x - linear
    zero, no = jnp.zeros(scale.shape, jnp.int32), jnp.zeros(scale.shape, bool)
    one = jnp.ones_like(scale)
    # Points that are given count if they are exact: others can be more accurate a step later.
    first = begin(Carry(linear, scale, x, gradient, x, one, one, no, no, no, zero, zero), 0.0)
    c = in_one(first) if blocks == 1 else in_blocks(first)
    return c.x[:, :k], c.solved[:, :k]


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

    def minimize_on(free: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
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

        gradient = linear - x @ matrix
        rest = jnp.where(free, gradient, 0)
        lacking = jnp.max(jnp.abs(rest), -1)
        no = jnp.zeros((k,), bool)
        first = Refined(jnp.zeros_like(rest), rest, lacking, no, jnp.zeros((), jnp.int32))
        last = lax.while_loop(imprecise, refine, first)
        # Rounding of Q x lacks no more than this.
        size = scale + jnp.max(x, -1) + jnp.max(jnp.abs(last.step), -1)
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
        step, inconsistent = minimize_on(c.free, c.x)
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


@compiled("steps", "chunk_size")
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

    Conjugate gradients on all problems at once, from points that operator splitting finds,
    then the active-set method on those that are not solved to rounding. A problem found to
    be unbounded has an infinite residual; its value is a far point on a ray along which the
    objective falls.

    Args:
      matrix: Q, (m, m), symmetric positive semi-definite, of floating point.
      linear: (k, m), one right-hand side per row.
      allowed: Bool, broadcastable to (k, m); False fixes a variable at zero.
      scale: (k,), positive, what the accuracy is relative to, beside the entries of x; the
        largest entry of b if None. Where b is a difference that cancels, the size of what
        was subtracted says how much of b is rounding.
      start: (k, m) feasible starting points; if None those of operator splitting where
        there are at least half as many problems as variables, else zero.
      steps: Largest number of conjugate-gradient steps, by default ``2 m + 50``.
      chunk_size: How many problems the active-set method factors at a time; by default as
        many as fit into 4 MB. The results do not depend on it.

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
    scale = linalg.ldexp(scale, -exponent[:, 0])
    scaled = jnp.where(allowed, linalg.ldexp(linear, -exponent), 0)
    if start is not None:
        first = linalg.ldexp(start, -exponent).T
    elif m >= _FEWEST_VARIABLES and 2 * k >= m:
        first = split(matrix, scaled.T, allowed.T)
    else:
        first = None
    found, solved = conjugate_gradients(
        matrix,
        jnp.where(allowed, scaled, -1 / float(jnp.finfo(dtype).eps)).T,
        scale[None],
        first,
        steps=2 * m + 50 if steps is None else steps,
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

    last = lax.while_loop(
        lambda c: jnp.any(c.open), take_on, Carry(found.T, ~solved[0], jnp.zeros((k,), bool))
    )
    x = last.x
    residual = kkt_residual(matrix, jnp.where(allowed, scaled, x @ matrix), x, scale)
    return Solution(linalg.ldexp(x, exponent), jnp.where(last.unbounded, jnp.inf, residual))
