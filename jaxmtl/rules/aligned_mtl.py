"""Independent component alignment: the gradient system with all singular values equal."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
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

    With ``G = V diag(lambda) V^T``: ``w = sqrt(s) V diag(lambda)^(-1/2) V^T p`` over the non-zero
    eigenvalues, where s is the smallest of them.

    Args:
      preference: (m,) non-negative task weights p, or None for 1/m.
      scale: What s is: ``"min"`` (the paper), ``"median"`` (the lower one) or ``"rmse"`` (the
        mean) of the non-zero eigenvalues.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``scale`` is unknown or ``preference`` has a wrong shape or sign.

    **Properties**: weighted, permutation-equivariant, of degree 1; conflicting, not linear
    under scaling. Eigenvalues up to m machine epsilons times the largest count as zero; if
    all do, the weights are 0.

    **Reference**: Senushkin et al. 2023, algorithm 1; Quinton and Rey 2024, eq. 35-36.

    **Differs from** LibMTL, where p is 1 for each task: the update is m times this one.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.aligned_mtl()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 0.5]
    """
    checks.check_choice("scale", scale, ("min", "median", "rmse"))

    def weigh(gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array) -> jax.Array:
        m = gramian.shape[0]
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        values, vectors = jnp.linalg.eigh(gramian)  # ascending
        kept = values > m * jnp.finfo(values.dtype).eps * values[-1]
        rank = jnp.sum(kept)
        first = jnp.minimum(m - rank, m - 1)
        if scale == "min":
            size = values[first]
        elif scale == "median":
            size = values[jnp.minimum(first + jnp.maximum(rank - 1, 0) // 2, m - 1)]
        else:
            size = jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1)
        stretch = jnp.where(kept, jnp.sqrt(jnp.abs(size) / jnp.where(kept, values, 1)), 0)
        return (vectors * stretch) @ (vectors.T @ shares)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
