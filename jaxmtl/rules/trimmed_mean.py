"""Coordinate-wise trimmed mean."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("per coordinate, mean without the extremes", "Yin 2018", "scale-free")
def trimmed_mean(trim: int = 1, *, num_tasks: int | None = None) -> Aggregator:
    """Averages, per coordinate, what is left after dropping the extremes.

    Use it where single gradients may be outliers, coordinate by coordinate.

    Args:
      trim: k, how many of the largest and how many of the smallest entries are dropped, at
        least 0.
      num_tasks: m, only to check against.

    Returns:
      An `Aggregator` without inner state; ``weighting`` is None. Needs ``m > 2 k``; if masking
      leaves fewer rows, as many are dropped on both sides as leave at least one.

    Raises:
      ValueError: ``trim`` is negative or not an int; when tracing, if ``m <= 2 k``.

    **Properties**: of degree 1, permutation-equivariant; conflicting, neither weighted nor
    linear under scaling.

    **Reference**: Yin et al. 2018, definition 2.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(1), jnp.array([[1.0], [2.0], [3.0], [100.0]])
    >>> aggregator = jaxmtl.trimmed_mean(1)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [2.5]
    """
    checks.check_int("trim", trim, 0)

    def aggregate(jacobian: Any, task_mask: jax.Array) -> Any:
        m = linalg.num_rows(jacobian)
        if m <= 2 * trim:
            raise ValueError(
                f"trimmed_mean drops trim rows on each side: expected more than {2 * trim} "
                f"tasks, got {m}; lower trim"
            )
        dtype = linalg.accumulation_dtype(jacobian)
        present = jnp.sum(task_mask)
        dropped = jnp.minimum(trim, (present - 1) // 2)
        place = jnp.arange(m)
        kept = (place >= dropped) & (place < present - dropped)

        def leaf(rows: jax.Array) -> jax.Array:
            present_rows = jnp.where(linalg.column(task_mask, rows), rows, jnp.inf)
            ordered = jnp.sort(present_rows, axis=0)
            total = jnp.sum(jnp.where(linalg.column(kept, rows), ordered, 0).astype(dtype), 0)
            return (total / jnp.maximum(jnp.sum(kept), 1)).astype(rows.dtype)

        return jax.tree.map(leaf, jacobian)

    return base.from_rows(aggregate, num_tasks=num_tasks)
