"""Smooth Tchebycheff scalarization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.learned import EpochMean, add_losses, init_epoch_mean
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class NadirState(NamedTuple):
    """State of `stch` in the form of the authors' code, while the nadir is not given.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far.
      warmup: The mean losses of the last epoch of the warm-up: the nadir.
    """

    mtl_step: jax.Array
    warmup: EpochMean


@method("smooth maximum of the losses", "Lin 2024", "linear under scaling", "scale-free")
def stch(
    mu: float = 1.0,
    *,
    preference: jax.Array | None = None,
    ideal: jax.Array | None = None,
    form: str = "paper",
    nadir: jax.Array | None = None,
    warmup_epochs: int = 4,
    steps_per_epoch: int = 1,
    num_tasks: int | None = None,
) -> Aggregator:
    """Descends a smooth maximum of the losses.

    ``form="paper"``: ``mu log sum_i exp(p_i (l_i - z_i) / mu)``, so ``w_i = p_i q_i`` with
    ``q = softmax(p (l - z) / mu)``.

    ``form="code"``: ``m mu log sum_i exp(log(l_i / n_i) / mu)``, so ``w_i = m q_i / l_i`` with
    ``q = softmax(log(l / n) / mu)``, n the nadir: the mean losses of epoch ``warmup_epochs``
    (from 0). Up to and in that epoch the objective is ``sum_i log l_i``. ``max(l_i, tiny)``
    stands for ``l_i``, tiny the least normal number: a task whose loss is zero or negative has
    weight 0.

    Use it at the budget of one gradient where the worst of the weighted losses counts, on fronts of
    any shape.

    Args:
      mu: Positive; the smaller, the closer to the maximum.
      preference: (m,) p of the paper's form, 1/m if None.
      ideal: (m,) z of the paper's form, 0 if None.
      form: ``"paper"`` or ``"code"``.
      nadir: (m,) n of the code's form, positive; with it there is no warm-up and no state.
      warmup_epochs: Epochs of the code's form before the one that is averaged, at least 0.
      steps_per_epoch: Steps of an epoch.
      num_tasks: m, required for ``form="code"`` without ``nadir``; if given the state logs
        ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state or, for the code's form without
      ``nadir``, with a `NadirState`.

    Raises:
      ValueError: A number is out of range, a vector of another length, or ``num_tasks`` missing.

    **Properties**: weighted, permutation-equivariant (with the vectors permuted alike), linear
    under scaling of the gradients, conflicting. Absent tasks leave the sum; the preference of the
    others is scaled to its total, m is the number of tasks present. A task never present in the
    averaged epoch has nadir 1.

    **Reference**: Lin et al. 2024, eq. 9 (paper), and its code STCH_MTL (code).

    **Differs from** LibMTL, which is ``form="code"``, in the clamp (LibMTL adds 1e-20).

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.stch(0.5).weighting
    >>> print(weighting.update(None, weighting.init(), losses=jnp.array([1.0, 1.0]))[0])
    [0.25 0.25]
    """
    checks.check_range("mu", mu, 0, closed="right")
    checks.check_choice("form", form, ("paper", "code"))
    checks.check_range("warmup_epochs", warmup_epochs, 0)
    checks.check_int("steps_per_epoch", steps_per_epoch)
    z = checks.check_vector("ideal", ideal, num_tasks, sign="any")
    worst = checks.check_vector("nadir", nadir, num_tasks, sign="positive")

    def smooth_maximum(scores: jax.Array, task_mask: jax.Array) -> jax.Array:
        largest = jnp.finfo(scores.dtype).max / 2
        return jax.nn.softmax(jnp.clip(scores / mu, -largest, largest), where=task_mask)

    def weigh(
        losses: jax.Array, preference: jax.Array | None, task_mask: jax.Array, m: int
    ) -> jax.Array:
        checks.check_tasks(m, None if z is None else z.size, "ideal")
        preferences = tasks.shares(preference, task_mask, losses.dtype)
        gaps = losses if z is None else losses - z.astype(losses.dtype)
        return preferences * smooth_maximum(preferences * gaps, task_mask)

    if form == "paper":
        return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)

    def weigh_log(losses: jax.Array, scale: jax.Array, task_mask: jax.Array) -> jax.Array:
        clamped, active = tasks.positive_part(losses)
        scores = jnp.log(clamped) - jnp.log(tasks.positive_part(scale)[0])
        share = smooth_maximum(scores, task_mask) * jnp.sum(task_mask)
        return jnp.where(active, share / clamped, 0)

    def weigh_known(losses: jax.Array, task_mask: jax.Array, m: int) -> jax.Array:
        assert worst is not None  # for the type checker
        checks.check_tasks(m, worst.size, "nadir")
        return weigh_log(losses, worst.astype(losses.dtype), task_mask)

    if worst is not None:
        return base.from_weighting(weigh_known, num_tasks=num_tasks)
    if num_tasks is None:
        raise ValueError(
            'stch(form="code") keeps a state of the size of the tasks: expected num_tasks=m, got '
            "None; pass the number of tasks at construction, or nadir="
        )

    def init() -> NadirState:
        return NadirState(jnp.zeros((), jnp.int32), init_epoch_mean(num_tasks))

    def weigh_warm(
        losses: jax.Array, state: NadirState, task_mask: jax.Array
    ) -> tuple[jax.Array, NadirState]:
        epoch = state.mtl_step // steps_per_epoch
        total, number = state.warmup
        scale = jnp.where(number > 0, total / jnp.maximum(number, 1), 1).astype(losses.dtype)
        clamped, active = tasks.positive_part(losses)
        warm = jnp.where(active, 1 / clamped, 0)
        weights = jnp.where(epoch <= warmup_epochs, warm, weigh_log(losses, scale, task_mask))
        warmup = add_losses(state.warmup, losses, task_mask & (epoch == warmup_epochs))
        return weights, NadirState(state.mtl_step + 1, warmup)

    return base.from_weighting(weigh_warm, init=init, num_tasks=num_tasks)
