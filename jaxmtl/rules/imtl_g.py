"""Impartial multi-task learning: equal projections on every gradient."""

import jax
import jax.numpy as jnp

from jaxmtl import base
from jaxmtl.registry import method
from jaxmtl.solvers import pseudo_inverse, row_normalized
from jaxmtl.types import Aggregator


def equal_projections(gramian: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Computes the weights of `imtl_g` from a Gramian (m, m)."""
    m = gramian.shape[0]
    unit, norms, zero = row_normalized(gramian)
    present = (task_mask & ~zero).astype(gramian.dtype)
    unit_inverse, rank, unit_rounding = pseudo_inverse(unit)
    inverse, _, rounding = pseudo_inverse(gramian)
    full = rank == m
    v = jnp.where(full, unit_inverse @ present / norms, inverse @ (norms * present)) * present
    total = jnp.sum(v)
    # The sum of nearly parallel gradients' v does not cancel, however ill-conditioned they are.
    rounding = jnp.minimum(jnp.where(full, unit_rounding, rounding), 0.5)
    vanishes = jnp.abs(total) <= rounding * jnp.sum(jnp.abs(v))
    return jnp.where(vanishes, 0, v / jnp.where(vanishes, 1, total))


@method("equal projections on every gradient", "Liu 2021b", "scale-free")
def imtl_g(*, num_tasks: int | None = None) -> Aggregator:
    """Makes the update's projection on every gradient equal.

    ``v = pinv(G) d`` with d the norms of the gradients; ``w = v / sum(v)``, and 0 where the sum
    vanishes.

    Use it where every task should make equal progress per length of its gradient.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state.

    **Properties**: weighted, permutation-equivariant, of degree 1; not linear under scaling,
    conflicting if the gradients are linearly dependent. The weights sum to 1 or are all 0; a
    sum within rounding of 0, relative to the sum of magnitudes (half of it at most), counts as 0.
    Zero rows have weight 0. Discontinuous where the rank falls: two gradients near to opposite
    have weights ``(|g2|, |g1|) / (|g1| + |g2|)``, whose update is close to 0; once they are
    opposite within rounding, ``(|g1|, -|g2|) / (|g1| - |g2|)``, along the Pareto front.

    **Reference**: Liu et al. 2021 ("Towards impartial multi-task learning"), section 3.1, in
    the form for every rank of Quinton and Rey 2024, eq. 28-30.

    **Differs from** TorchJD in how the numerical rank is found: Gramians of full rank after
    normalising the rows are solved in that form, which does not lose tasks of small gradient.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.imtl_g()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.75 0.75]
    """

    def weigh(gramian: jax.Array, task_mask: jax.Array) -> jax.Array:
        return equal_projections(gramian, task_mask)

    return base.from_weighting(weigh, num_tasks=num_tasks)
