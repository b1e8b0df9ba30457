"""Random loss weighting."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import base
from jaxmtl.balancing.losses import from_losses
from jaxmtl.weightings.fixed import rgw


def rlw(*, num_tasks: int | None = None, seed: int = 0) -> base.Aggregator:
    """Weighs the losses at random.

    ``sum_i w_i l_i`` with ``w = softmax(z)``, ``z ~ N(0, I_m)`` drawn anew at every step.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.
      seed: Seed of the draws; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` that reads ``losses`` (only for finite values), whose inner state is
      `jaxmtl.base.RandomState`.

    **Properties**: linear under scaling, weighted, of degree 1; conflicting. Permutation-
    equivariant in distribution. Absent tasks are left out of the softmax.

    **Reference**: Lin et al. 2021, algorithm 1. The same draw for gradients is `rgw`.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.rlw().weighting
    >>> weights, _ = weighting.update(None, weighting.init(), losses=jnp.ones(3))
    >>> print(weights.sum().round(3))
    1.0
    """
    drawn = rgw(seed=seed).weighting.rule
    assert drawn is not None  # for the type checker

    def weigh(
        losses: jax.Array,
        state: base.RandomState,
        task_mask: jax.Array,
        key: jax.Array | None = None,
        **inputs: Any,
    ) -> tuple[jax.Array, base.RandomState]:
        like_gramian = jnp.zeros((losses.size,) * 2, losses.dtype)  # for m and the dtype
        return drawn.apply(like_gramian, state, task_mask=task_mask, key=key)[:2]

    return from_losses(weigh, init=base.init_random, num_tasks=num_tasks)
