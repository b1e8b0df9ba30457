"""Krum: the gradients that agree best with their neighbors."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("the gradient nearest to its neighbors", "Blanchard 2017", "scale-free")
def krum(
    num_byzantine: int = 1,
    *,
    num_selected: int = 1,
    distance: str = "squared",
    num_tasks: int | None = None,
) -> Aggregator:
    """Averages the gradients that lie nearest to their neighbors.

    The score of a row is the sum of its distances to its ``m - f - 2`` nearest others; the
    rows of lowest score are selected (the first ones, on ties).

    Use it where some of many gradients may be wrong altogether; it follows one and ignores the
    rest.

    Args:
      num_byzantine: f, the number of rows that may be arbitrary, at least 0.
      num_selected: How many rows are averaged, at least 1.
      distance: ``"squared"`` distances (the paper) or ``"euclidean"`` ones.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state. Needs ``m >= f + 3`` rows; if masking leaves fewer,
      each row counts its nearest neighbor.

    Raises:
      ValueError: A count is out of range; when tracing, if ``m < f + 3`` or
        ``m < num_selected``.

    **Properties**: weighted, permutation-equivariant without ties, of degree 1; conflicting.

    **Reference**: Blanchard et al. 2017, section 4; ``num_selected > 1`` is their Multi-Krum.

    **Differs from** TorchJD, which sums Euclidean distances and then selects another row in
    about one of eight random cases: ``distance="euclidean"``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(1), jnp.array([[1.0], [1.1], [0.9], [-50.0]])
    >>> aggregator = jaxmtl.krum(1)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [1.]
    """
    checks.check_int("num_byzantine", num_byzantine, 0)
    checks.check_int("num_selected", num_selected)
    checks.check_choice("distance", distance, ("squared", "euclidean"))

    def weigh(gramian: jax.Array, task_mask: jax.Array) -> jax.Array:
        m = gramian.shape[0]
        if m < max(num_byzantine + 3, num_selected):
            raise ValueError(
                f"krum needs m >= num_byzantine + 3 and m >= num_selected tasks: expected at "
                f"least {max(num_byzantine + 3, num_selected)}, got {m}; lower them"
            )
        squares = jnp.diagonal(gramian)
        apart = jnp.maximum(squares[:, None] + squares[None, :] - 2 * gramian, 0)
        apart = apart if distance == "squared" else jnp.sqrt(apart)
        other = ~jnp.eye(m, dtype=bool) & task_mask[None, :]
        near = jnp.sort(jnp.where(other, apart, jnp.inf), axis=1)
        present = jnp.sum(task_mask)
        neighbors = jnp.maximum(present - num_byzantine - 2, 1)
        counted = (jnp.arange(m) < neighbors)[None, :] & jnp.isfinite(near)
        score = jnp.where(task_mask, jnp.sum(jnp.where(counted, near, 0), axis=1), jnp.inf)
        rank = jnp.argsort(jnp.argsort(score))  # stable: ties go to the first
        selected = jnp.minimum(num_selected, present)
        return (rank < selected) / jnp.maximum(selected, 1).astype(gramian.dtype)

    return base.from_weighting(weigh, num_tasks=num_tasks)
