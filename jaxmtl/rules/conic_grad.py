"""ConicGrad: the best worst improvement in a cone around the mean gradient."""

from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, solvers, tasks
from jaxmtl.compiled import compiled
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class _Point(NamedTuple):
    """The point x of least norm in the hull of ``g_i + level g_0``.

    Attributes:
      level: lambda.
      weights: (m,) of x.
      along: ``g_0 . x``.
      square: ``|x|^2``.
      residual: Of the least-norm problem.
    """

    level: jax.Array
    weights: jax.Array
    along: jax.Array
    square: jax.Array
    residual: jax.Array


def _choose(condition: jax.Array, first: _Point, second: _Point) -> _Point:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), first, second)


@compiled()
def enter_cone(
    gramian: jax.Array, cosine: jax.Array, reference: jax.Array, mask: jax.Array
) -> solvers.Solution:
    """Solves ``max_d min_i g_i . d`` with ``g_0 . d >= c |g_0| |d|`` and ``|d| = |g_0|``.

    The dual is ``min |g_w + lambda g_0| - lambda c |g_0|`` over w in the simplex and
    ``lambda >= 0``. For a fixed lambda it asks for the point x of least norm in the hull of
    ``g_i + lambda g_0``; its cosine with ``g_0`` grows with lambda, and d is x, scaled, at the
    least lambda where the cosine is c. While the set of active tasks stays the same, ``g_0 . x``
    is linear and ``|x|^2`` quadratic in lambda, so that two points in one set give the root of the
    third. The root is kept in a bracket, which is halved in every third round.

    Args:
      gramian: (m, m).
      cosine: c, a scalar in [0, 1).
      reference: (m,), the weights of ``g_0``.
      mask: (m,) bool, the tasks that take part.

    Returns:
      `jaxmtl.solvers.Solution` with the weights (m,) of d; zero where ``g_0`` is.
    """
    m, dtype = gramian.shape[0], gramian.dtype
    eps = jnp.finfo(dtype).eps
    slopes = gramian @ reference
    size = jnp.sqrt(jnp.maximum(reference @ slopes, 0))  # |g_0|
    noise = jnp.sqrt(eps * (jnp.abs(reference) @ jnp.abs(gramian) @ jnp.abs(reference)))
    defined = size > jnp.sqrt(10.0 * m) * noise
    size = jnp.where(defined, size, 1)
    slopes = jnp.where(defined, slopes, 0) / size  # of the unit vector along g_0

    def least(level: jax.Array, digits: jax.Array | float = 1e2) -> _Point:
        shifted = gramian + level * (slopes[:, None] + slopes[None, :]) + level**2
        shifted = jnp.where(tasks.pairs(mask), shifted, 0)
        found = solvers.min_norm(shifted, mask)
        square = found.value @ shifted @ found.value
        # Below this, x has too few digits left to tell its direction and its length.
        terms = jnp.abs(gramian) + level * jnp.abs(slopes[:, None] + slopes[None, :]) + level**2
        cancelled = found.value @ terms @ found.value
        vanishes = square <= digits * m * eps * cancelled
        square = jnp.where(vanishes, 0, square)
        along = jnp.where(vanishes, 0, slopes @ found.value + level)
        return _Point(level, found.value, along, square, found.residual)

    def excess(p: _Point) -> jax.Array:
        return p.along - cosine * jnp.sqrt(p.square)

    def inside(p: _Point) -> jax.Array:
        return (p.square > 0) & (excess(p) >= 0)

    class Carry(NamedTuple):
        low: _Point
        high: _Point
        done: jax.Array
        rounds: jax.Array

    def root(low: _Point, high: _Point) -> jax.Array:
        # along = q + b t and square = n + 2 q t + b t^2 at the level high + t.
        b = (high.along - low.along) / (high.level - low.level)
        q, n = high.along, high.square
        # (q + b t)^2 = c^2 (n + 2 q t + b t^2), where the left side is positive.
        second, first = b * (b - cosine**2), 2 * q * (b - cosine**2)
        zeroth = q**2 - cosine**2 * n
        square = jnp.maximum(first**2 - 4 * second * zeroth, 0)
        return high.level - 2 * zeroth / (first + jnp.sqrt(square))

    def narrow(c: Carry) -> Carry:
        middle = (c.low.level + c.high.level) / 2
        guess = root(c.low, c.high)
        safe = (guess > c.low.level) & (guess < c.high.level) & (c.rounds % 3 != 2)
        new = least(jnp.where(safe, guess, middle), digits)
        reached = inside(new)
        low, high = _choose(reached, c.low, new), _choose(reached, new, c.high)
        done = reached & (excess(new) <= 16 * eps * jnp.sqrt(new.square))
        done |= high.level - low.level <= 4 * eps * high.level
        return Carry(low, high, done, c.rounds + 1)

    longest = jnp.sqrt(jnp.max(jnp.where(mask, jnp.diagonal(gramian), 0)))
    # One after the other in a loop, so that the program holds the solver once for both.
    ends = jnp.stack([jnp.zeros((), dtype), 2 * longest / jnp.sqrt(1 - cosine**2)])
    points = lax.map(least, ends)
    start, top = (jax.tree.map(itemgetter(i), points) for i in range(2))
    # At a stationary point x grows from 0 along a straight line: any of its points will do.
    digits = jnp.where(start.square > 0, 1e2, 1e4).astype(dtype)
    first = Carry(
        start, _choose(inside(start), start, top), inside(start), jnp.zeros((), jnp.int32)
    )
    last = lax.while_loop(lambda c: ~c.done & (c.rounds < 200), narrow, first).high
    length = jnp.sqrt(jnp.where(last.square > 0, last.square, 1))
    weights = (last.weights + last.level * reference / size) * size / length
    return solvers.Solution(jnp.where(defined & mask, weights, 0), last.residual)


@method("best worst improvement in a cone around the mean", "Hassanpour 2025", "scale-free")
def conic_grad(
    c: float = 0.5,
    *,
    preference: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Maximises the worst improvement over directions near the mean gradient.

    ``d = argmax min_i g_i . d`` over ``g_0 . d >= c |g_0| |d|`` and ``|d| = |g_0|``, with ``g_0``
    the mean: the direction ``g_w + lambda g_0``, between that of `mgda` (lambda = 0, where it lies
    in the cone) and the mean. Where `cagrad` bounds the distance to ``g_0``, this bounds the angle
    and keeps the length. It costs some ten least-norm problems of m variables.

    Use it for a compromise as `cagrad` makes it, where the length of the step should stay the
    mean's.

    Args:
      c: Cosine of the widest angle to ``g_0``, in [0, 1). Its default, 60 degrees, is a choice of
        this library.
      preference: (m,) non-negative weights of ``g_0`` in place of 1/m, or None.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``c`` lies outside [0, 1) or ``preference`` has a wrong shape or sign.

    **Properties**: weighted, permutation-equivariant, of degree 1, of the length of ``g_0``;
    conflicting, not linear under scaling. The update is 0 where ``g_0`` is 0 up to rounding. Where
    a point of the hull is opposite to ``g_0`` or 0 (Pareto-stationary points), the direction is the
    limit from larger lambda.

    **Reference**: Hassanpour et al. 2025 (arXiv:2502.00217). Its abstract was read; the problem is
    solved exactly as stated above, without the paper's closed form.

    **Differs from** the paper, which takes steps on w from one update to the next; here the problem
    is solved at every step and there is no state.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[6.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.conic_grad(0.5)
    >>> update = aggregator.update(jacobian, aggregator.init(params), params)[0]
    >>> print(update / update[0])  # the direction of mgda
    [1. 3.]
    """
    checks.check_range("c", c, 0, 1, closed="left")

    def weigh(
        gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        reference = tasks.shares(preference, task_mask, gramian.dtype)
        return enter_cone(gramian, jnp.asarray(c, gramian.dtype), reference, task_mask)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)
