"""Fixed and random weights: linear scalarization and random gradient weighting."""

from typing import Any

import jax
import optax

from jaxmtl import base


def linear_scalarization(
    weights: jax.Array | None = None, *, num_tasks: int | None = None
) -> base.Aggregator:
    """Sums the gradients with fixed weights, by default their mean.

    ``w`` is given; mean (None), sum (``jnp.ones(m)``) and any constant weighting are cases.

    Args:
      weights: (m,) finite weights of any sign, or None for 1/m each.
      num_tasks: m, only to check against.

    Returns:
      An `Aggregator` with the empty state of optax. For want of a state, a step skipped for
      a non-finite update (the update is then zero) is not counted.

    Raises:
      ValueError: ``weights`` is not a finite vector, or disagrees with the number of tasks.

    **Properties**: linear under scaling, weighted, permutation-equivariant (with the weights
    permuted alike), of degree 1; conflicting. Masked tasks lose their share to the others in
    proportion, so that the sum of the weights stays.

    **Reference**: Quinton and Rey 2024, eq. 18 (the mean).

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> mean = jaxmtl.linear_scalarization()
    >>> print(mean.update(jacobian, mean.init(params), params)[0])
    [0.5 1. ]
    """
    vector = base.check_vector("weights", weights, num_tasks, sign="any")
    base.check_num_tasks(num_tasks)
    m = num_tasks if vector is None else vector.size

    def weigh(gramian: jax.Array, task_mask: jax.Array) -> jax.Array:
        base.check_tasks(gramian.shape[0], m)
        return base.preference_weights(vector, task_mask, gramian.dtype)

    guarded = base.from_weighting(weigh, reads=())
    fresh = guarded.weighting.init

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return guarded.update(updates, fresh(), params, **extra)[0], state

    def update_weights(gramian: Any, state: Any, **extra: Any) -> tuple[jax.Array, Any]:
        return guarded.weighting.update(gramian, fresh(), **extra)[0], state

    weighting = base.Weighting(optax.EmptyState, update_weights, guarded.weighting.rule)
    return base.Aggregator(optax.init_empty_state, update, weighting)


def rgw(*, num_tasks: int | None = None, seed: int = 0) -> base.Aggregator:
    """Weighs the gradients at random, ``w = softmax(z)`` with ``z ~ N(0, I_m)``.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.
      seed: Seed of the draws; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is `jaxmtl.base.RandomState`.

    **Properties**: linear under scaling, weighted, of degree 1; conflicting. Permutation-
    equivariant in distribution. Absent tasks are left out of the softmax.

    **Reference**: Lin et al. 2021; Quinton and Rey 2024, eq. 32-33. The same draw on losses
    is `rlw`.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.rgw().weighting
    >>> weights, _ = weighting.update(jnp.eye(3), weighting.init())
    >>> print(weights.sum())
    1.0
    """

    def weigh(
        gramian: jax.Array,
        state: base.RandomState,
        task_mask: jax.Array,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, base.RandomState]:
        key = base.draw_key(seed, state.mtl_step, key)
        normal = jax.random.normal(key, gramian.shape[:1], gramian.dtype)
        weights = jax.nn.softmax(normal, where=task_mask)
        return weights, base.RandomState(state.mtl_step + 1)

    return base.from_weighting(weigh, init=base.init_random, num_tasks=num_tasks, reads=())
