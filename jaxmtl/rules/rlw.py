"""Random loss weighting."""

import jax
import jax.numpy as jnp

from jaxmtl import base, tasks
from jaxmtl.registry import method
from jaxmtl.rules.fixed import rgw
from jaxmtl.types import Aggregator, RandomState


@method("softmax of Gaussian noise", "Lin 2021", "linear under scaling", "scale-free")
def rlw(*, num_tasks: int | None = None, seed: int = 0) -> Aggregator:
    """Weighs the losses at random.

    ``sum_i w_i l_i`` with ``w = softmax(z)``, ``z ~ N(0, I_m)`` drawn anew at every step.

    Use it as a baseline: what random weights reach is no merit of a method.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.
      seed: Seed of the draws; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` that reads ``losses`` (only for finite values), whose inner state is
      `jaxmtl.types.RandomState`.

    **Properties**: linear under scaling, weighted, of degree 1; conflicting. Permutation-
    equivariant in distribution. Absent tasks are left out of the softmax.

    **Reference**: Lin et al. 2021, algorithm 1. The same draw for gradients is `rgw`.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.rlw().weighting
    >>> weights, _ = weighting.update(None, weighting.init(), losses=jnp.ones(3))
    >>> print(weights.sum().round(3))
    1.0
    """
    drawn = base.inner_rule(rgw(seed=seed), "rlw")

    def weigh(
        losses: jax.Array,
        state: RandomState,
        task_mask: jax.Array,
        m: int,
        dtype: jnp.dtype,
        key: jax.Array | None,
    ) -> tuple[jax.Array, RandomState]:
        inputs = {"task_mask": task_mask, "m": m, "dtype": dtype, "key": key}
        return drawn.weigh(inputs, state)[:2]

    return base.from_weighting(weigh, init=tasks.init_random, num_tasks=num_tasks)
