"""Independent component alignment: the gradient system with all singular values equal."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("equal singular values (min, median, rmse)", "Senushkin 2023", "scale-free")
def aligned_mtl(
    *,
    preference: jax.Array | None = None,
    scale: str = "min",
    num_tasks: int | None = None,
) -> Aggregator:
    """Replaces the gradients by the nearest orthogonal system and combines that.

    With ``J = U diag(sigma) V^T``: ``w = s U diag(1 / sigma) U^T p`` over the non-zero singular
    values, where s is the smallest of them; they are found from the Gramian by
    `jaxmtl.solvers.singular_system`, those of short gradients as accurately as the largest.

    Use it where every task should count alike whatever the length of its gradient, with a
    preference where one matters more: it tends to the optimum of the preferred sum of losses.

    Args:
      preference: (m,) non-negative task weights p, or None for 1/m.
      scale: What s is of the non-zero singular values: ``"min"`` (the paper), ``"median"`` (the
        lower one) or ``"rmse"`` (the root of their mean square).
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``scale`` is unknown or ``preference`` has a wrong shape or sign.

    **Properties**: weighted, permutation-equivariant, of degree 1; conflicting, not linear
    under scaling. A gradient counts as dependent on others when less than ``sqrt(8 m eps)`` of
    its norm is orthogonal to them, however short it is; if all are zero, so are the weights.

    **Reference**: Senushkin et al. 2023, algorithm 1; Quinton and Rey 2024, eq. 35-36.

    **Differs from** LibMTL, where p is 1 for each task: the update is m times this one; and from
    it, TorchJD and the official code in that those drop gradients whose norm is below the root of
    the machine epsilon times the largest.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.aligned_mtl()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 0.5]
    """
    checks.check_choice("scale", scale, ("min", "median", "rmse"))

    def weigh(gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array) -> jax.Array:
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        values, vectors, _ = solvers.singular_system(gramian, task_mask)
        kept = values > 0
        last = jnp.maximum(jnp.sum(kept) - 1, 0)  # of the descending values
        if scale == "min":
            size = values[last]
        elif scale == "median":
            size = values[last - last // 2]
        else:
            size = jnp.sqrt(jnp.sum(values**2) / (last + 1))
        stretch = jnp.where(kept, size / jnp.where(kept, values, 1), 0)
        along = jnp.sum(vectors * shares[:, None], axis=0)
        return jnp.sum(vectors * (stretch * along)[None, :], axis=1)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
