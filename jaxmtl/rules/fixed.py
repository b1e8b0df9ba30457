"""Fixed and random weights: linear scalarization and random gradient weighting."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator, RandomState


@method("fixed weights, 1/m by default", "any", "linear under scaling", "scale-free")
def linear_scalarization(
    weights: jax.Array | None = None, *, num_tasks: int | None = None
) -> Aggregator:
    """Sums the gradients with fixed weights, by default their mean.

    ``w`` is given; mean (None), sum (``jnp.ones(m)``) and any constant weighting are cases.

    Use it first: with tuned weights it is often as good as any other, and it is what others must be
    compared with.

    Args:
      weights: (m,) finite weights of any sign, which stay; or None for those that
        ``update(..., preference=)`` brings, 1/m each without.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state. Without ``num_tasks`` it has no state at all but the
      empty one of optax, so that skipped steps are not counted; their update is zero all the same.

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
    >>> preference = jnp.array([3.0, 1.0])
    >>> print(mean.update(jacobian, mean.init(params), params, preference=preference)[0])
    [3. 2.]
    """
    vector = checks.check_vector("weights", weights, num_tasks, sign="any")

    def weigh(
        preference: jax.Array | None, task_mask: jax.Array, m: int, dtype: jnp.dtype
    ) -> jax.Array:
        if vector is None:
            return tasks.shares(preference, task_mask, dtype)
        # Fixed: the heads of a partition keep theirs while its trunk follows a preference.
        checks.check_tasks(m, vector.size, "weights")
        return tasks.shares(vector, task_mask, dtype)

    aggregator = base.from_weighting(weigh, num_tasks=num_tasks)
    rule = base.inner_rule(aggregator, "linear_scalarization")
    return base.from_rule(rule._replace(keeps_state=num_tasks is not None))


@method("softmax of Gaussian noise", "Lin 2021", "linear under scaling", "scale-free")
def rgw(*, num_tasks: int | None = None, seed: int = 0) -> Aggregator:
    """Weighs the gradients at random, ``w = softmax(z)`` with ``z ~ N(0, I_m)``.

    Use it as a baseline: what random weights reach is no merit of a method.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.
      seed: Seed of the draws; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is `jaxmtl.types.RandomState`.

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
        state: RandomState, task_mask: jax.Array, m: int, dtype: jnp.dtype, key: jax.Array | None
    ) -> tuple[jax.Array, RandomState]:
        normal = jax.random.normal(tasks.draw_key(seed, state.mtl_step, key), (m,), dtype)
        weights = jax.nn.softmax(normal, where=task_mask)
        return weights, RandomState(state.mtl_step + 1)

    return base.from_weighting(weigh, init=tasks.init_random, num_tasks=num_tasks)
