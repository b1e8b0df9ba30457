"""Dynamic weight average: tasks whose loss falls slowly get more weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.learned import EpochMean, add_losses, init_epoch_mean
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class DWAState(NamedTuple):
    """State of `dwa`.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far.
      epoch: The mean of the current epoch.
      last: (m,) mean losses of the last epoch in which the task was present, L(t - 1).
      before: (m,) those of the one before, L(t - 2).
      epochs: (m,) int32, in how many finished epochs the task was present.
    """

    mtl_step: jax.Array
    epoch: EpochMean
    last: jax.Array
    before: jax.Array
    epochs: jax.Array


class DWAWindowState(NamedTuple):
    """State of `dwa` with a window of n steps.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far.
      losses: (2 n, m) of the last 2 n steps, in a ring.
      present: (2 n, m) bool, where the task was present.
    """

    mtl_step: jax.Array
    losses: jax.Array
    present: jax.Array


@method("softmax of the losses' rates of change", "Liu 2019", "linear under scaling", "scale-free")
def dwa(
    temperature: float = 2.0,
    *,
    steps_per_epoch: int = 1,
    window: int | None = None,
    num_tasks: int,
) -> Aggregator:
    """Gives more weight to the tasks whose loss falls slowly.

    ``sum_i w_i l_i`` with ``w = m softmax(r / T)``, ``r_i = L_i(t-1) / L_i(t-2)`` the ratio of
    the mean losses of the last two epochs; ones in the first two epochs.

    Use it as a cheap baseline where losses fall at different speeds: one backward pass.

    Args:
      temperature: T, positive.
      steps_per_epoch: How many steps are averaged; 1 compares single steps.
      window: n, to compare at every step the mean of the last n steps with that of the n before
        them, in place of epochs: for data without epochs. Ones in the first 2 n steps.
      num_tasks: m, required; the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, whose inner state is a `DWAState`, or a
      `DWAWindowState` with ``window``.

    Raises:
      ValueError: ``num_tasks`` is missing, ``temperature`` is not positive, ``steps_per_epoch`` or
        ``window`` not a positive int, or both are given.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients,
    conflicting; the weights sum to m, the number of tasks present. A ratio to a mean loss of 0, and
    that of a task seen in fewer than two epochs, counts as 1. Absent tasks leave the softmax;
    epochs in which a task was absent are ignored for that task. Skipped steps do not
    count towards an epoch.

    **Reference**: Liu et al. 2019 (MTAN), eq. 7.

    **Differs from** TorchJD in nothing with ``steps_per_epoch=1`` and its ``step()`` called
    after each batch.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.dwa(num_tasks=2).weighting
    >>> state = weighting.init()
    >>> for losses in (jnp.array([2.0, 2.0]), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])):
    ...     weights, state = weighting.update(None, state, losses=losses)
    >>> print([f"{w:.3f}" for w in weights])
    ['0.876', '1.124']
    """
    checks.check_range("temperature", temperature, 0, closed="right")
    checks.check_int("steps_per_epoch", steps_per_epoch)
    if window is not None:
        checks.check_int("window", window)
        if steps_per_epoch != 1:
            raise ValueError(
                f"expected steps_per_epoch= or window=, got {steps_per_epoch} and {window}; drop "
                "the one that does not hold"
            )

    def init() -> DWAState:
        zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(num_tasks)
        epochs = jnp.zeros(num_tasks, jnp.int32)
        return DWAState(zero, init_epoch_mean(num_tasks), zeros, zeros, epochs)

    def init_window() -> DWAWindowState:
        shape = (2 * (window or 1), num_tasks)
        return DWAWindowState(jnp.zeros((), jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool))

    def weights_of(
        last: jax.Array, before: jax.Array, known: jax.Array, task_mask: jax.Array
    ) -> jax.Array:
        known = known & (before != 0)
        ratio = jnp.where(known, last / jnp.where(known, before, 1), 1)
        largest = jnp.finfo(ratio.dtype).max / 2
        ratio = jnp.clip(ratio, -largest, largest)
        return jax.nn.softmax(ratio / temperature, where=task_mask) * jnp.sum(task_mask)

    def close_epoch(state: DWAState) -> DWAState:
        seen = state.epoch.number > 0
        mean = state.epoch.total / jnp.maximum(state.epoch.number, 1)
        last, before = tasks.keep_absent((mean, state.last), (state.last, state.before), seen)
        epoch = jax.tree.map(jnp.zeros_like, state.epoch)
        return DWAState(state.mtl_step, epoch, last, before, state.epochs + seen)

    def weigh(
        losses: jax.Array, state: DWAState, task_mask: jax.Array
    ) -> tuple[jax.Array, DWAState]:
        over = (state.mtl_step > 0) & (state.mtl_step % steps_per_epoch == 0)
        state = jax.tree.map(lambda x, y: jnp.where(over, x, y), close_epoch(state), state)
        weights = weights_of(state.last, state.before, state.epochs > 1, task_mask)
        epoch = add_losses(state.epoch, losses, task_mask)
        return weights, state._replace(mtl_step=state.mtl_step + 1, epoch=epoch)

    def weigh_window(
        losses: jax.Array, state: DWAWindowState, task_mask: jax.Array
    ) -> tuple[jax.Array, DWAWindowState]:
        size = state.losses.shape[0]
        here = state.mtl_step % size
        age = (here - 1 - jnp.arange(size)) % size  # 0 is the step before this one
        means, counts = [], []
        for half in (age < size // 2, age >= size // 2):
            there = state.present & half[:, None]
            counts.append(jnp.sum(there, axis=0))
            # Divided first: a sum of large losses could leave the format.
            shares = there / jnp.maximum(counts[-1], 1).astype(state.losses.dtype)[None, :]
            means.append(jnp.sum(state.losses * shares, axis=0))
        known = (counts[0] > 0) & (counts[1] > 0) & (state.mtl_step >= size)
        weights = weights_of(means[0], means[1], known, task_mask)
        row = jnp.where(task_mask, losses, 0).astype(state.losses.dtype)
        return weights, DWAWindowState(
            state.mtl_step + 1,
            state.losses.at[here].set(row),
            state.present.at[here].set(task_mask),
        )

    if window is not None:
        return base.from_weighting(weigh_window, init=init_window, num_tasks=num_tasks)
    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)
