"""What loss rules share: their wrapper, the clamp of logarithms, parameters that are learned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmtl import base, linalg

PyTree = Any


def from_losses(
    weigh: Callable[..., tuple[jax.Array, PyTree]],
    *,
    init: Callable[[], PyTree] = tuple,
    num_tasks: int | None = None,
    reads: tuple[str, ...] = (),
) -> base.Aggregator:
    """Makes an aggregator of a function from the losses to weights.

    Args:
      weigh: ``weigh(losses, state, task_mask, **inputs) -> (weights, state)``, with losses (m,)
        in at least float32 and 1 for absent tasks, and task_mask (m,) bool.
      init: ``init() -> state``.
      num_tasks: m; if given the state logs ``mtl_weights``.
      reads: Names of the inputs besides ``losses`` that the rule cannot do without.

    Returns:
      An `Aggregator` that reads ``losses`` and never the Gramian: one backward pass.
    """

    def apply(
        gramian: jax.Array | None,
        state: PyTree,
        *,
        losses: jax.Array,
        task_mask: jax.Array,
        **inputs: Any,
    ) -> tuple[jax.Array, PyTree, None]:
        losses = losses.astype(linalg.accumulation_dtype(gramian, losses))
        weights, state = weigh(losses, state, task_mask, **inputs)
        return weights, state, None

    return base.from_rule(base.Rule(init, apply, ("losses", *reads), num_tasks))


def positive_part(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``max(l, tiny)``, whose logarithm is finite, and where that is l itself.

    ``tiny`` is the least normal number of the dtype. A task at or below it is constant to a
    rule that takes logarithms: its weight is 0.
    """
    least = jnp.finfo(losses.dtype).tiny
    return jnp.maximum(losses, least), losses > least


def keep_absent(new: PyTree, old: PyTree, task_mask: jax.Array) -> PyTree:
    """Returns the new tree with the old entries of absent tasks in its (m,) leaves."""
    return jax.tree.map(
        lambda x, y: jnp.where(task_mask, x, y) if jnp.shape(x) == task_mask.shape else x, new, old
    )


class LearnedState(NamedTuple):
    """State of a rule with one learned parameter per task.

    Attributes:
      values: (m,) the parameters.
      optimizer: Tuple of the leaves of the inner optimizer's state. (As leaves, for its fields
        would otherwise hide those of the user's optimizer from ``optax.tree.get``.)
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


class ExtendedWeighting(base.Weighting):
    """A weighting with further functions of its state as attributes."""


def extend(aggregator: base.Aggregator, **functions: Callable[..., Any]) -> base.Aggregator:
    """Returns the aggregator with named functions on its ``weighting``.

    ``head_weights(state, task_mask=None) -> (m,)`` is the one that `value_and_grad` looks for: the
    weights, at the state before the step, of the parameters that ``shared=`` leaves out.
    """
    weighting = ExtendedWeighting(*aggregator.weighting)
    for name, function in functions.items():
        setattr(weighting, name, function)
    return base.Aggregator(aggregator.init, aggregator.update, weighting)
