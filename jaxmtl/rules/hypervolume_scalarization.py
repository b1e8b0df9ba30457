"""Hypervolume scalarization: the volume that a loss vector dominates, seen along one direction."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method(
    "smallest weighted gap to a reference point, to the power m",
    "Zhang and Golovin 2020",
    "linear under scaling",
    "scale-free",
    example=lambda: {"reference": 2.0},
)
def hypervolume_scalarization(
    reference: float | jax.Array,
    *,
    preference: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Ascends the hypervolume scalarization of the gaps to a reference point.

    ``s(l) = (min_i (b_i - l_i) / u_i)^m`` with ``u = p / |p|``: the objective is ``-s``, and
    ``w_i = m t^(m - 1) / u_i`` for the task of the smallest gap t, 0 for the others; tasks that
    tie share evenly.

    For directions u drawn uniformly from the positive part of the sphere, the mean of
    ``max(s, 0)`` times ``pi^(m/2) / (2^m Gamma(m/2 + 1))`` is the hypervolume between l and b; of
    several points, with the largest s in each direction, that of the set. Drawing
    ``preference`` anew for each member or step therefore ascends the hypervolume. One backward
    pass.

    Use it to cover a front by many runs, or members of a population, with directions drawn anew.

    Args:
      reference: b, upper bounds of the losses; a number for all or (m,).
      preference: (m,) p, equal entries if None; ``update(..., preference=)`` overrides it. A task
        of preference 0 has no part in the minimum.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    Raises:
      ValueError: A vector has another length or ``preference`` a wrong sign.

    **Properties**: weighted, permutation-equivariant (with the vectors permuted alike), linear
    under scaling of the gradients, conflicting. Absent tasks leave the minimum and the power.

    **Reference**: Zhang and Golovin 2020, definition and lemma of section 4; known here from later
    work that states it, not read in the paper.

    **Differs from** the paper, where s is 0 and flat if a loss exceeds its bound: here it goes on
    as ``-|t|^m``, so that such losses are brought down. At t = 0 exactly the slope is 0. A step at
    which ``|t|^(m - 1)`` leaves the format is skipped.

    >>> import jax.numpy as jnp, jaxmtl
    >>> r = jnp.array([3.0, 4.0])
    >>> weighting = jaxmtl.hypervolume_scalarization(2.0, preference=r).weighting
    >>> print(weighting.update(None, weighting.init(), losses=jnp.array([0.5, 1.2]))[0])
    [0.  2.5]
    """
    count = jnp.size(reference) if jnp.ndim(reference) else None
    if count is not None:
        checks.check_vector("reference", reference, num_tasks, sign="any")
    else:
        checks.check_range("reference", reference, -jnp.inf, closed="neither")

    def weigh(
        losses: jax.Array, preference: jax.Array | None, task_mask: jax.Array, m: int
    ) -> jax.Array:
        checks.check_tasks(m, count, "reference")
        bounds = jnp.asarray(reference, losses.dtype)
        shares = tasks.shares(preference, task_mask, losses.dtype)
        norm = jnp.linalg.norm(shares)
        direction = shares / jnp.where(norm > 0, norm, 1)
        counts = task_mask & (direction > 0)
        power = jnp.sum(task_mask)

        def objective(values: jax.Array) -> jax.Array:
            gaps = (bounds - values) / jnp.where(counts, direction, 1)
            smallest = jnp.min(jnp.where(counts, gaps, jnp.inf))
            smallest = jnp.where(jnp.any(counts), smallest, 0)
            return -smallest * jnp.abs(smallest) ** (power - 1)

        return jax.grad(objective)(losses)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
