"""EPO search: descent to the point of the Pareto front on the ray of the preference."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


def non_uniformity(
    losses: jax.Array, preference: jax.Array, task_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes how far the weighted losses are from equal, and the direction that makes them so.

    Args:
      losses: (m,), positive.
      preference: r, (m,), non-negative.
      task_mask: (m,) bool.

    Returns:
      The scalar ``mu = sum_i h_i log(m h_i)`` with ``h = r l / sum r l``, 0 where all ``r_i l_i``
      are equal, and the (m,) adjustments ``a_i = r_i (log(m h_i) - mu)``.
    """
    weighted = jnp.where(task_mask, preference * tasks.positive_part(losses)[0], 0)
    total = jnp.sum(weighted)
    shares = weighted / jnp.where(total > 0, total, 1)
    positive = shares > 0
    logs = jnp.log(jnp.where(positive, shares * jnp.sum(task_mask), 1))
    mu = shares @ logs
    return mu, jnp.where(positive, preference * (logs - mu), 0)


@method("controlled ascent to the preference's ray, then descent along it", "Mahapatra 2020")
def epo(
    tolerance: float = 1e-4,
    *,
    preference: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Searches for the Pareto optimum at which all ``r_i l_i`` are equal.

    With ``h = r l / sum r l``, ``mu = sum h log(m h)`` and ``a = r (log(m h) - mu)``, the weights w
    in the simplex solve a linear program in ``G w``, the slopes of the losses along the step:

    * Balance, if ``mu > tolerance``: maximise ``a^T G w``. Where some ``(G a)_j > 0``, subject to
      ``(G w)_j >= (G a)_j`` for the j with ``(G a)_j <= 0`` and ``(G w)_j >= 0`` for those of the
      largest ``r_j l_j``; else subject to ``G w >= 0``.
    * Descent, otherwise: maximise ``sum_j (G w)_j`` subject to ``G w >= 0`` and
      ``a^T G w >= min(0, max_j (G a)_j)``.

    Use it for one exact trade-off, on fronts of any shape: losses may rise on the way to the ray.
    It costs one small linear program (`jaxmtl.solvers.linear_program`).

    Args:
      tolerance: Of mu, positive.
      preference: (m,) r, 1/m if None; ``update(..., preference=)`` overrides it. A loss is asked
        to be proportional to ``1 / r_i``.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` that reads ``losses``, which must be positive, without inner state.

    Raises:
      ValueError: ``tolerance`` is not positive or ``preference`` has a wrong shape or sign; when
        tracing, ``losses`` are missing.

    **Properties**: weighted, permutation-equivariant where the program has one solution, of degree
    1; conflicting (controlled ascent), not linear under scaling. Multiplying all losses by one
    number changes nothing. A task with ``r_i l_i = 0`` has no adjustment; losses at or below 0
    count as the least normal number. Absent tasks leave the program. Where the program of descent
    has no solution (m >= 3) the weights are ``r / sum r``.

    **Reference**: Mahapatra and Rajan 2020. The programs were read in the authors' code
    (EPOSearch, ``epo_lp.py``).

    **Differs from** the authors' training scripts, which multiply the weights by m, and from
    their search on toy problems, which multiplies the step by ``max(mu, 0.1)``. Where several
    vertices are optimal, another one than their solver's may be returned.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.epo(preference=jnp.array([0.5, 0.5]))
    >>> state = aggregator.init(params)
    >>> print(aggregator.update(jacobian, state, params, losses=jnp.array([1.0, 3.0]))[0])
    [0. 1.]
    >>> print(aggregator.update(jacobian, state, params, losses=jnp.array([3.0, 1.0]))[0])
    [2. 0.]
    """
    checks.check_range("tolerance", tolerance, 0, closed="right")

    def weigh(
        gramian: jax.Array, losses: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        r = tasks.shares(preference, task_mask, gramian.dtype)
        mu, adjustments = non_uniformity(losses.astype(gramian.dtype), r, task_mask)
        slopes = gramian @ adjustments  # along the step J^T a
        balance = mu > tolerance
        falling = slopes > 0
        weighted = jnp.where(task_mask, r * losses, -jnp.inf)
        worst = weighted == jnp.max(weighted)
        some = jnp.any(falling & task_mask)
        rising = jnp.where(falling, -jnp.inf, slopes)
        lower = jnp.where(balance & some, jnp.where(worst, 0, rising), 0)
        highest = jnp.max(jnp.where(task_mask, slopes, -jnp.inf))
        last = jnp.where(balance, -jnp.inf, jnp.minimum(0, highest))
        found = solvers.linear_program(
            jnp.where(balance, slopes, jnp.sum(gramian, 0)),
            jnp.concatenate([gramian, slopes[None]]),
            jnp.append(jnp.where(task_mask, lower, -jnp.inf), last),
            allowed=task_mask,
        )
        total = jnp.sum(r)
        weights = jnp.where(found.feasible, found.value, r / jnp.where(total > 0, total, 1))
        return solvers.Solution(weights, jnp.where(found.feasible, found.residual, 0))

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)
