"""What rules carry from step to step: parameters that they learn, and means over an epoch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmtl.tasks import keep_absent
from jaxmtl.types import PyTree


class LearnedState(NamedTuple):
    """State of a rule with one learned parameter per task.

    Attributes:
      values: (m,) the parameters.
      optimizer: Tuple of the leaves of the inner optimizer's state. Kept as bare leaves: as a
        named state its fields would collide with the user's optimizer in ``optax.tree.get``.
    """

    values: jax.Array
    optimizer: tuple[jax.Array, ...]


def init_learned(optimizer: optax.GradientTransformation, values: PyTree) -> LearnedState:
    """Returns the state that starts at ``values``."""
    return LearnedState(values, tuple(jax.tree.leaves(optimizer.init(values))))


def learn(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    state: LearnedState,
    task_mask: jax.Array,
    keep: Callable[[PyTree, PyTree, jax.Array], PyTree] = keep_absent,
) -> LearnedState:
    """Takes one step of the inner optimizer; absent tasks keep their part of the state."""
    structure = jax.tree.structure(jax.eval_shape(optimizer.init, state.values))
    inner = jax.tree.unflatten(structure, state.optimizer)
    gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, state.values)
    updates, new = optimizer.update(gradient, inner, state.values)
    values = optax.apply_updates(state.values, updates)
    values, new = keep((values, new), (state.values, inner), task_mask)
    return LearnedState(values, tuple(jax.tree.leaves(new)))


class EpochMean(NamedTuple):
    """Running mean of the losses over an epoch.

    Attributes:
      total: (m,) sum of the losses in the current epoch.
      number: (m,) int32, in how many of its steps the task was present.
    """

    total: jax.Array
    number: jax.Array


def init_epoch_mean(num_tasks: int) -> EpochMean:
    """Returns the mean of nothing."""
    return EpochMean(jnp.zeros(num_tasks), jnp.zeros(num_tasks, jnp.int32))


def add_losses(mean: EpochMean, losses: jax.Array, task_mask: jax.Array) -> EpochMean:
    """Returns the mean with one more step."""
    return EpochMean(mean.total + jnp.where(task_mask, losses, 0), mean.number + task_mask)
