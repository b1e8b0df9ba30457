"""Scale-invariant weighting and geometric loss strategy: sum and mean of logarithms."""

import jax
import jax.numpy as jnp

from jaxmtl import base, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("1 / l", "Navon 2022 (baseline)", "linear under scaling", "scale-free")
def scale_invariant(*, num_tasks: int | None = None) -> Aggregator:
    """Descends the sum of the logarithms of the losses.

    ``sum_i log l_i``, so ``w_i = 1 / l_i``; with ``max(l_i, tiny)`` for ``l_i``, tiny the least
    normal number: a task whose loss is zero or negative is constant and has weight 0.

    Use it at the budget of one gradient where losses are positive and differ in scale.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients,
    conflicting. Multiplying a loss by a positive number does not change the update. Absent tasks
    leave the sum.

    **Reference**: the baseline SI of Navon et al. 2022 and Xiao et al. 2025.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.scale_invariant().weighting
    >>> losses = jnp.array([0.5, 4.0])
    >>> print(weighting.update(None, weighting.init(), losses=losses)[0])
    [2.   0.25]
    """

    def weigh(losses: jax.Array, task_mask: jax.Array) -> jax.Array:
        clamped, active = tasks.positive_part(losses)
        return jnp.where(active & task_mask, 1 / clamped, 0)

    return base.from_weighting(weigh, num_tasks=num_tasks)


@method("geometric mean", "Chennupati 2019", "linear under scaling", "scale-free")
def gls(*, num_tasks: int | None = None) -> Aggregator:
    """Descends the geometric mean of the losses.

    ``(prod_i l_i)^(1/m)``, so ``w_i = (prod_j l_j)^(1/m) / (m l_i)``. A task whose loss is at or
    below the least normal number, zero or negative, leaves the product like an absent one and has
    weight 0: in the plain formula it has an infinite weight, and all others weight 0.

    Use it at the budget of one gradient where losses are positive and of different units.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients,
    conflicting. The direction does not depend on the scale of any loss. Absent tasks leave
    the product, m is the number of those present.

    **Reference**: Chennupati et al. 2019 (MultiNet++), eq. 3.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.gls().weighting
    >>> losses = jnp.array([1.0, 4.0])
    >>> print(weighting.update(None, weighting.init(), losses=losses)[0])
    [1.   0.25]
    """

    def weigh(losses: jax.Array, task_mask: jax.Array) -> jax.Array:
        clamped, active = tasks.positive_part(losses)
        logs, active = jnp.log(clamped), active & task_mask
        count = jnp.maximum(jnp.sum(active), 1)
        mean = jnp.sum(logs, where=active) / count
        return jnp.where(active, jnp.exp(mean - logs) / count, 0)

    return base.from_weighting(weigh, num_tasks=num_tasks)
