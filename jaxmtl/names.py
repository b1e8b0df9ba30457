"""Tasks with names: a dict from names to numbers stands for a vector in the sorted order of names.

Everything inside works on vectors; names are put back where a user sees the result.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import checks

PyTree = Any


def named(names_or_losses: Mapping[str, Any] | Iterable[str], values: Any) -> dict[str, jax.Array]:
    """Returns values over tasks by the tasks' names, for a logger.

    Args:
      names_or_losses: The names of the m tasks, or a mapping whose keys are the names, such as the
        losses. Their order does not matter: that of the tasks is sorted, so that "task10" comes
        before "task2".
      values: Array ``(..., m)``, such as weights ``(m,)`` or their history ``(steps, m)``.

    Returns:
      A dict from each name to its array ``(...)``, in the sorted order of the names.

    Raises:
      ValueError: The names are not strings, are repeated, or are not as many as the tasks.

    **When to use it**: losses that are named, by a dict of losses or of loss functions. Losses in
    one vector have an order of their own: write ``dict(zip(names, weights))``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> losses = {"task2": 0.5, "task10": 3.0}
    >>> for name, weight in jaxmtl.named(losses, jnp.array([0.25, 0.75])).items():
    ...     print(name, weight)
    task10 0.25
    task2 0.75
    """
    if isinstance(names_or_losses, str):
        raise ValueError(
            f"expected the names of the tasks, got the single string {names_or_losses!r}; pass a "
            "list of names, or the dict of the losses"
        )
    found = list(names_or_losses)
    names = checks.task_names("names_or_losses", dict.fromkeys(found))
    if len(names) != len(found):
        raise ValueError(f"expected every name once, got {found}; give every task its own name")
    values = jnp.asarray(values)
    if not values.ndim or values.shape[-1] != len(names):
        raise ValueError(
            f"expected values of shape (..., {len(names)}), one per name, got {values.shape}; pass "
            f"those of all tasks, {list(names)}"
        )
    return {name: values[..., i] for i, name in enumerate(names)}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["names"])
@dataclasses.dataclass(frozen=True)
class Aux:
    """The auxiliary output of a losses function, with the names of its losses.

    Names are part of the structure, so that they pass through any transformation of JAX.

    Attributes:
      value: The auxiliary output, None if there is none.
      names: Those of the tasks, in their order, or None.
    """

    value: PyTree
    names: tuple[str, ...] | None = None

    def returned(self, losses: jax.Array, has_aux: bool, per_example: bool = False) -> Any:
        """Returns what a user gets for (m,) losses: named if they have names, aux if asked for.

        Args:
          losses: ``(m,)``.
          has_aux: Whether aux was asked for.
          per_example: Whether each of several examples has a loss of every name.
        """
        result: Any = losses
        if self.names is not None:
            table = losses.reshape(-1, len(self.names)) if per_example else losses
            result = named(self.names, table)
        return (result, self.value) if has_aux else result


def stack_losses(losses: Mapping[str, Any]) -> tuple[jax.Array, tuple[str, ...]]:
    """Returns named scalar losses as a vector, and the names in their order.

    Raises:
      ValueError: A name is not a string, or a loss is not a scalar of floating point.
    """
    names = checks.task_names("the losses", losses)
    for name in names:
        loss = losses[name]
        if not jax.tree_util.all_leaves([loss]):
            raise ValueError(
                f"expected a scalar loss at {name!r}, got {type(loss).__name__}; return one number "
                "per task, and other outputs with has_aux=True"
            )
        shape, dtype = jnp.shape(loss), jnp.result_type(loss)
        if shape:
            raise ValueError(
                f"expected a scalar loss at {name!r}, got shape {shape}; average over the batch, "
                "or pass in_axes= if the function takes one example"
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"expected a floating point loss at {name!r}, got {dtype}; return real numbers"
            )
    return jnp.stack([jnp.asarray(losses[name]) for name in names]), names
