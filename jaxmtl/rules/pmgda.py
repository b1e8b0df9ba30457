"""PMGDA: multiple-gradient descent that keeps to the ray of a preference."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


def _distance_to_ray(
    losses: jax.Array, direction: jax.Array, task_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # h = |l - (l . u) u| and its slope in l, 0 where h is nothing but rounding.
    losses = jnp.where(task_mask, losses, 0)
    across = losses - (losses @ direction) * direction
    size = jnp.max(jnp.abs(losses))
    scaled = across / jnp.where(size > 0, size, 1)
    length = jnp.linalg.norm(scaled)
    off = length > 8 * jnp.finfo(losses.dtype).eps
    return length * size, jnp.where(off, scaled / jnp.where(off, length, 1), 0)


def _best_worst(
    products: jax.Array, least: jax.Array, present: jax.Array, allowed: jax.Array
) -> solvers.LinearSolution:
    """Solves ``max_mu min_i (A mu)_i`` over the simplex, the last row at least ``least``.

    The level t is free: in [-T, T], T the largest entry of A, it is ``T (4 s - 1)`` with s in
    [0, 1/2], and the simplex of `linear_program` is shared by mu / 2, s and the rest of s.
    """
    k = products.shape[0]
    largest = jnp.max(jnp.abs(products))
    scaled = 2 * products / jnp.where(largest > 0, largest, 1)
    level = jnp.where(jnp.arange(k) < k - 1, -4.0, 0.0).astype(products.dtype)
    rows = jnp.concatenate([scaled, level[:, None], jnp.zeros_like(level)[:, None]], 1)
    total = jnp.where(jnp.arange(k + 2) < k, 1.0, 0.0).astype(products.dtype)[None]
    last = least / jnp.where(largest > 0, largest, 1)
    bounds = jnp.where(present, -1, -jnp.inf).astype(products.dtype)
    found = solvers.linear_program(
        jnp.where(jnp.arange(k + 2) == k, 1.0, 0.0).astype(products.dtype),
        jnp.concatenate([rows, total, -total]),
        jnp.concatenate([bounds, last[None], jnp.array([0.5, -0.5], products.dtype)]),
        allowed=jnp.concatenate([allowed, jnp.ones(2, bool)]),
    )
    return found._replace(value=2 * found.value[:k])


@method("least norm in the hull along the preference's ray; off it, back to it", "Zhang 2024")
def pmgda(
    sigma: float = 0.1,
    *,
    tolerance: float = 1e-2,
    preference: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Predicts along the ray of the preference and corrects where it is left.

    With ``u = p / |p|``, ``h = |l - (l . u) u|`` is the distance of the losses to the ray and
    ``g_h = J^T dh/dl`` its gradient.

    * Prediction, if ``h < tolerance``: ``argmin |g_w + nu g_h|`` over w in the simplex and any nu,
      so that h stays as it is to first order.
    * Correction, otherwise: the point d in the hull of the unit vectors along ``g_1 .. g_m`` and
      ``g_h`` that maximizes ``min_i g_i . d`` subject to ``g_h . d >= sigma |g_h|``.

    Use it for one trade-off in which the losses are proportional to p. It costs a least-norm
    problem and a linear program.

    Args:
      sigma: Share of the steepest descent of h that a correction must have, in (0, 1].
      tolerance: Of h, in the unit of the losses; positive.
      preference: (m,) p, equal entries if None; ``update(..., preference=)`` overrides it.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    Raises:
      ValueError: A number is out of range or ``preference`` has a wrong shape or sign; when
        tracing, ``losses`` are missing.

    **Properties**: weighted (weights can be negative), permutation-equivariant where the program
    has one solution; conflicting, not linear under scaling. Predictions are of degree 1,
    corrections, of norm at most 1, of degree 0. Where ``g_h`` is 0 up to rounding it is `mgda`.
    Absent tasks leave both problems; zero rows have no unit vector.

    **Reference**: Zhang et al. 2024 (arXiv:2402.09492), eq. 8 and 11 (prediction) and 18 and 20
    (correction): the first as a review of the paper prints them, the second and the defaults as in
    the authors' library LibMOON.

    **Differs from** LibMOON, which predicts with plain `mgda` and adds 1e-4 to norms.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.pmgda()
    >>> state = aggregator.init(params)
    >>> print(aggregator.update(jacobian, state, params, losses=jnp.array([1.0, 1.0]))[0])
    [1. 1.]
    >>> print(aggregator.update(jacobian, state, params, losses=jnp.array([3.0, 1.0]))[0].round(2))
    [0.57 0.43]
    """
    checks.check_range("sigma", sigma, 0, 1, closed="right")
    checks.check_range("tolerance", tolerance, 0, closed="right")

    def weigh(
        gramian: jax.Array,
        losses: jax.Array,
        preference: jax.Array | None,
        task_mask: jax.Array,
        log2_scale: jax.Array,
    ) -> solvers.Solution:
        m, dtype = gramian.shape[0], gramian.dtype
        shares = tasks.shares(preference, task_mask, dtype)
        norm = jnp.linalg.norm(shares)
        direction = shares / jnp.where(norm > 0, norm, 1)
        distance, slope = _distance_to_ray(losses.astype(dtype), direction, task_mask)
        products = gramian @ slope  # g_i . g_h
        square = slope @ products
        noise = (
            100 * m * jnp.finfo(dtype).eps * (jnp.abs(slope) @ jnp.abs(gramian) @ jnp.abs(slope))
        )
        moves = square > noise
        square = jnp.where(moves, square, 1)

        # Along the ray: the rows less their parts along g_h.
        along = jnp.where(moves, products, 0)
        projected = gramian - along[:, None] * along[None, :] / square
        predicted = solvers.min_norm(projected, task_mask)
        ahead = predicted.value - (along @ predicted.value) / square * slope

        _, norms, zero = solvers.row_normalized(gramian)
        size = jnp.sqrt(square)
        units = jnp.append(1 / norms, 1 / size)
        extended = jnp.concatenate([gramian, products[None]])
        extended = (
            jnp.concatenate([extended, jnp.append(products, square)[:, None]], 1) * units[None, :]
        )
        allowed = jnp.append(task_mask & ~zero, moves)
        extended = jnp.where(allowed[None, :], extended, 0)
        found = _best_worst(extended, sigma * size, task_mask, allowed)
        parts = found.value * units
        back = linalg.ldexp(parts[:m] + parts[m] * slope, -log2_scale)

        predict = (distance < tolerance) | ~moves
        residual = jnp.where(predict, predicted.residual, found.residual)
        return solvers.Solution(jnp.where(predict, ahead, back), residual)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)
