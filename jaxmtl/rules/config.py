"""ConFIG: an update with equal cosines to every gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.solvers import pseudo_inverse, row_normalized
from jaxmtl.types import Aggregator, PyTree


class ConFIGState(NamedTuple):
    """State of `config` with momentum.

    Attributes:
      mtl_step: int32 scalar, the number of steps since every task has been seen.
      steps: (m,) int32, the number of steps of each task.
      means: Leaves (m, *leaf.shape), the running means of the gradients, not yet divided.
      last: Leaves like the parameters, the first moment of the update; () without ``beta2``.
      squares: Leaves like the parameters, its second moment; () without ``beta2``.
    """

    mtl_step: jax.Array
    steps: jax.Array
    means: PyTree
    last: PyTree
    squares: PyTree


@method("equal cosines with every gradient", "Liu 2024", "scale-free")
def config(
    *,
    preference: jax.Array | None = None,
    beta1: float | None = None,
    beta2: float | None = 0.999,
    eps: float = 1e-8,
    num_tasks: int | None = None,
) -> Aggregator:
    """Takes the direction with equal cosines to all gradients.

    Its length is the sum of the gradients' projections on it.

    With U the unit gradients: ``x = pinv(U) p``, ``u = x / |x|``, update ``(sum_i g_i . u) u``.

    Use it where all losses must fall at a like rate, as the terms of a physics-informed loss:
    lengths of gradients do not matter to its direction.

    Args:
      preference: (m,) non-negative cosines p that are asked for, up to scale, or None for
        equal ones.
      beta1: Rate of M-ConFIG's momentum, in [0, 1), or None for none: each gradient has a running
        mean, divided by ``1 - beta1^t`` with t its steps, and ConFIG acts on the means. Of tasks
        that a ``task_mask`` leaves out the old means count: one task a step, in turn, is enough.
        The update is 0 until each has been seen.
      beta2: Rate of the second moment of the update, by whose root it is divided, in [0, 1); None
        leaves that to the optimizer. Read with ``beta1`` only, as is ``eps``.
      eps: Added to the root of the second moment.
      num_tasks: m; if given the state logs ``mtl_weights``. Required with ``beta1``, which logs
        nothing.

    Returns:
      An `Aggregator` without inner state; with ``beta1`` one with a `ConFIGState`, whose
      ``weighting`` is None. With the Jacobian at hand the problem is solved in coordinates, by
      two products and two sums of m rows; with a Gramian alone by the normal equations, where the
      condition of U counts squared.

    Raises:
      ValueError: ``preference`` has a wrong shape or sign, a number lies outside its range, or
        ``num_tasks`` is missing with ``beta1``.

    **Properties**: weighted, permutation-equivariant, of degree 1; non-conflicting if the
    gradients are linearly independent, not linear under scaling. Zero rows have weight 0; where
    x vanishes the update is 0.

    **Reference**: Liu, Chu and Thuerey 2024, eq. 4-7; M-ConFIG: their algorithm 1, whose second
    moment is that of the gradient which would have moved the update's first moment as it moved.

    **Differs from** TorchJD in the last digits of ill-conditioned cases only.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.config()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [2. 2.]
    """

    def weigh(
        gramian: jax.Array,
        preference: jax.Array | None,
        task_mask: jax.Array,
        log2_scale: jax.Array,
        jacobian: Any = None,
    ) -> jax.Array:
        unit, norms, zero = row_normalized(gramian)
        usable = task_mask & ~zero
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        cosines = jnp.where(usable, shares / jnp.max(shares), 0)
        unit = jnp.where(tasks.pairs(usable), unit, 0)
        lengths = jnp.where(usable, norms, 0)
        if jacobian is None:
            v, reached, rounding = _normal_equations(unit, cosines)
            square, total = v @ reached, lengths @ reached  # |x|^2 and sum_i g_i . x
        else:
            rows = _unit_rows(jacobian, jnp.where(usable, norms, 1), log2_scale, gramian.dtype)
            v, reached, square = _least_norm(rows, unit, cosines)
            rounding = jnp.asarray(64 * unit.shape[0] * jnp.finfo(unit.dtype).eps)
            # Dependent gradients may cancel: then their sum is known better than their products.
            sums = linalg.gramian(linalg.combine_rows(rows, jnp.stack([v, lengths])))
            total = jnp.where(jnp.all(reached == cosines), lengths @ cosines, sums[0, 1])
        # U x is the projection of p onto the range of U.
        vanishes = jnp.linalg.norm(reached) <= rounding * jnp.linalg.norm(cosines)
        vanishes |= square <= 0
        length = jnp.where(vanishes, 0, total / jnp.where(vanishes, 1, square))
        return jnp.where(usable, length * v / norms, 0)

    if beta1 is None:
        return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
    m = checks.require_num_tasks(num_tasks, "config(beta1=...)")
    checks.check_range("beta1", beta1, 0, 1, closed="left")
    if beta2 is not None:
        checks.check_range("beta2", beta2, 0, 1, closed="left")
    checks.check_range("eps", eps, 0)

    def init(params: Any) -> ConFIGState:
        steps = jnp.zeros((), jnp.int32), jnp.zeros((m,), jnp.int32)
        zeros = jax.tree.map(lambda x: x[0], linalg.zero_rows(params, 1))
        last, squares = ((), ()) if beta2 is None else (zeros, zeros)
        return ConFIGState(*steps, linalg.zero_rows(params, m), last, squares)

    def aggregate(
        jacobian: Any, state: ConFIGState, task_mask: jax.Array, preference: jax.Array | None
    ) -> tuple[Any, ConFIGState]:
        steps = state.steps + task_mask

        def mean(old: jax.Array, g: jax.Array) -> jax.Array:
            new = beta1 * old + (1 - beta1) * g.astype(old.dtype)
            return jnp.where(linalg.column(task_mask, old), new, old)

        means = jax.tree.map(mean, state.means, jacobian)
        seen = steps > 0
        rows = linalg.times_rows(jnp.where(seen, 1 / _share(beta1, steps), 0), means)
        gramian, log2_scale = linalg.balanced_gramian(rows)
        weights = weigh(gramian, preference, seen, log2_scale, rows)
        update = linalg.without_rounding(linalg.combine(rows, weights), rows, weights)
        started = jnp.all(seen)
        step = state.mtl_step + started
        update = jax.tree.map(lambda x: jnp.where(started, x, 0), update)
        if beta2 is None:
            return update, ConFIGState(step, steps, means, (), ())
        last = jax.tree.map(lambda x: x * _share(beta1, step).astype(x.dtype), update)
        squares = jax.tree.map(
            lambda s, new, old: beta2 * s + (1 - beta2) * ((new - beta1 * old) / (1 - beta1)) ** 2,
            state.squares,
            last,
            state.last,
        )
        squares = jax.tree.map(lambda x, old: jnp.where(started, x, old), squares, state.squares)
        share = _share(beta2, step)
        update = jax.tree.map(
            lambda x, s: x / (jnp.sqrt(s / share.astype(s.dtype)) + eps), update, squares
        )
        return update, ConFIGState(step, steps, means, last, squares)

    return base.from_rows(aggregate, init=init, num_tasks=m, preference=preference)


def _share(beta: float | jax.Array, steps: jax.Array) -> jax.Array:
    """Returns ``1 - beta^t``, the total weight of t steps in a running mean from 0; 1 at t = 0."""
    return jnp.where(steps > 0, 1 - jnp.power(jnp.asarray(beta, jnp.result_type(float)), steps), 1)


def _normal_equations(
    unit: jax.Array, cosines: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns v with ``U^T v = pinv(U) p``, U x, and the relative size of rounding in them."""
    inverse, _, rounding = pseudo_inverse(unit)
    v = inverse @ cosines
    return v, unit @ v, rounding


def _least_norm(
    rows: Any, unit: jax.Array, cosines: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solves as `_normal_equations`, from coordinates: the errors grow with the condition of U.

    Shifted Cholesky QR (Fukaya et al. 2020): the rows are combined into nearly orthonormal ones,
    ``U = L Q``, whose own Gramian is well conditioned. In the Gramian of U the square of its
    condition would count.

    Returns:
      v (m,), U x (m,) and ``|x|^2``.
    """
    m, eps = unit.shape[0], jnp.finfo(unit.dtype).eps
    shift = 2 * m * eps * jnp.trace(unit)
    lower = jnp.linalg.cholesky(unit + jnp.maximum(shift, eps) * jnp.eye(m, dtype=unit.dtype))
    inverse = solve_triangular(lower, jnp.eye(m, dtype=unit.dtype), lower=True)
    second = linalg.gramian(linalg.combine_rows(rows, inverse))
    values, vectors = jnp.linalg.eigh(second)
    kept = values > 8 * m * eps * values[-1]
    # Left vectors that U^T annuls: their part of p cannot be reached.
    null = _matmul(inverse.T, jnp.where(kept, 0, vectors))
    sizes, directions = jnp.linalg.eigh(_matmul(null, null.T))
    directions = jnp.where((sizes > eps**0.5 * sizes[-1]) & ~jnp.all(kept), directions, 0)
    reached = cosines - _matmul(directions, _matmul(directions.T, cosines))
    along = _matmul(vectors.T, _matmul(inverse, reached))
    scaled = jnp.where(kept, along / jnp.where(kept, values, 1), 0)
    v = _matmul(inverse.T, _matmul(vectors, scaled))
    return v, reached, jnp.sum(along * scaled)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _unit_rows(jacobian: Any, norms: jax.Array, log2_scale: jax.Array, dtype: jnp.dtype) -> Any:
    def leaf(x: jax.Array) -> jax.Array:
        return linalg.ldexp(x.astype(dtype), -log2_scale) / linalg.column(norms, x)

    return jax.tree.map(leaf, jacobian)
