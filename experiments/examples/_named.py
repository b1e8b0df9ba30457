"""Losses by name in the model, by position in the library.

The order of the tasks is written down once, as a tuple of names. To stack the
values of a dictionary would not do: while tracing it keeps the order in which it was filled, and
``jit`` returns it sorted.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def stack_losses(losses: Mapping[str, jax.Array], tasks: Sequence[str]) -> jax.Array:
    """Returns the vector (m,) of scalar losses in the order of ``tasks``.

    Args:
      losses: One scalar for each task.
      tasks: The names of the m tasks.

    Raises:
      ValueError: The names differ from ``tasks``.
    """
    if set(losses) != set(tasks):
        raise ValueError(
            f"expected one loss for each of {', '.join(tasks)}, got {', '.join(losses)}; "
            "return a scalar under every name, or correct the names"
        )
    return jnp.stack([losses[task] for task in tasks])


def by_task(values: jax.Array, tasks: Sequence[str]) -> dict[str, jax.Array]:
    """Returns what belongs to each task, by name.

    Args:
      values: ``(..., m)``: losses or weights, with any leading axes.
      tasks: The names of the m tasks.

    Raises:
      ValueError: The last axis does not hold one number for each task.
    """
    if values.shape[-1:] != (len(tasks),):
        raise ValueError(
            f"expected shape (..., {len(tasks)}), one number for each of {', '.join(tasks)}, got "
            f"{values.shape}; put the task axis last"
        )
    return {task: values[..., i] for i, task in enumerate(tasks)}
