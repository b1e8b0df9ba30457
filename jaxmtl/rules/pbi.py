"""PBI: distance along the preference's ray, and a penalty on the distance from it."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method(
    "distance along the preference plus a multiple of the distance from it",
    "Zhang and Li 2007",
    "linear under scaling",
    "scale-free",
)
def pbi(
    theta: float = 5.0,
    *,
    preference: jax.Array | None = None,
    ideal: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Descends along a ray in the space of losses, with a penalty on leaving it.

    ``d_1 + theta d_2`` with ``d_1 = (l - z) . u`` and ``d_2 = |(l - z) - d_1 u|``, ``u = p / |p|``,
    so ``w = u + theta ((l - z) - d_1 u) / d_2``.

    The minimum lies near where the ray from z in direction p meets the front: p is proportional
    to the losses asked for, where in `tchebycheff` it is proportional to their inverses. One
    backward pass.

    Use it to reach the point of a front in proportion to given losses, on fronts that are not
    convex too.

    Args:
      theta: At least 0; the paper uses 5.
      preference: (m,) p, equal entries if None; ``update(..., preference=)`` overrides it.
      ideal: (m,) z, lower bounds of the losses, 0 if None.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    Raises:
      ValueError: ``theta`` is negative, a vector has another length, or ``preference`` a wrong
        sign.

    **Properties**: weighted (weights can be negative), permutation-equivariant (with the vectors
    permuted alike), linear under scaling of the gradients, conflicting. On the ray, up to rounding,
    ``d_2`` has no slope and ``w = u``. Absent tasks leave both distances.

    **Reference**: Zhang and Li 2007 (MOEA/D), section III-A. The formula was read in TorchJD 0.18,
    not in the paper.

    **Differs from** TorchJD, which adds 1e-12 under the root of ``d_2``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.pbi(1.0).weighting
    >>> print(weighting.update(None, weighting.init(), losses=jnp.array([2.0, 0.0]))[0].round(3))
    [1.414 0.   ]
    """
    checks.check_range("theta", theta, 0)
    z = checks.check_vector("ideal", ideal, num_tasks, sign="any")

    def weigh(
        losses: jax.Array, preference: jax.Array | None, task_mask: jax.Array, m: int
    ) -> jax.Array:
        checks.check_tasks(m, None if z is None else z.size, "ideal")
        shares = tasks.shares(preference, task_mask, losses.dtype)
        norm = jnp.linalg.norm(shares)
        direction = shares / jnp.where(norm > 0, norm, 1)
        lowest = 0 if z is None else z.astype(losses.dtype)
        size = jnp.max(jnp.abs(losses - lowest), initial=0, where=task_mask)
        size = jnp.where(size > 0, size, 1)

        def objective(values: jax.Array) -> jax.Array:
            gaps = jnp.where(task_mask, values - lowest, 0) / size
            along = gaps @ direction
            across = gaps - along * direction
            square = across @ across
            off = square > (8 * jnp.finfo(losses.dtype).eps) ** 2 * (gaps @ gaps)
            distance = jnp.where(off, jnp.sqrt(jnp.where(off, square, 1)), 0)
            return size * (along + theta * distance)

        return jax.grad(objective)(losses)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
