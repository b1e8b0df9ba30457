"""FAMO: fast adaptive multitask optimization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmtl import base, checks, tasks
from jaxmtl.learned import LearnedState, init_learned, learn
from jaxmtl.registry import method
from jaxmtl.types import Aggregator

SHIFT = 1e-8  # added to losses before the logarithm, as the authors do


class FAMOState(NamedTuple):
    """State of `famo`.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far.
      logits: xi (m,) and the leaves of its optimizer's state.
      losses: (m,) losses of the previous step, before it.
      present: (m,) bool, the tasks of the previous step.
    """

    mtl_step: jax.Array
    logits: LearnedState
    losses: jax.Array
    present: jax.Array


@method("equal rates of improvement, amortized", "Liu 2023", "linear under scaling", "scale-free")
def famo(
    *,
    num_tasks: int,
    min_losses: jax.Array | None = None,
    learning_rate: float = 0.025,
    weight_decay: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Balances the rates at which the logarithms of the losses fall.

    ``c sum_i z_i log(d_i)`` with ``z = softmax(xi)``, ``d_i = l_i - b_i + 1e-8`` and
    ``c = sg(1 / sum_i z_i / d_i)``: ``w_i = c z_i / d_i``, which sum to 1. After the step, with
    the losses l+ on the *same* batch, xi descends along
    ``J_softmax(xi)^T (log(l - b + 1e-8) - log(l+ - b + 1e-8))``.

    The new losses arrive at the next call, as ``previous_batch_losses`` (m,): evaluate the
    previous batch at the current parameters before the step. xi is updated before z is formed,
    which is the authors' order; the first call ignores the value (any array, such as zeros).

    Use it at the budget of one gradient where losses should fall at equal rates; it needs the
    losses of the previous batch, a forward pass more.

    Args:
      num_tasks: m, required; the state logs ``mtl_weights``.
      min_losses: (m,) b, lower bounds of the losses; 0 if None.
      learning_rate: Of xi.
      weight_decay: L2 decay of xi, coupled: added to the gradient before Adam, as in torch.
      optimizer: Steps xi in place of Adam with the two numbers above.

    Returns:
      An `Aggregator` that reads ``losses`` and ``previous_batch_losses``, whose inner state is
      a `FAMOState`.

    Raises:
      ValueError: ``num_tasks`` is missing, ``min_losses`` of another length; when tracing,
        ``previous_batch_losses`` is missing.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients,
    conflicting. A task with ``d_i`` at or below the least normal number is constant: weight 0,
    out of c. Absent tasks leave z and keep xi; the update of xi concerns the tasks of its batch.
    A step skipped for a non-finite loss keeps everything, so that the next update of xi compares
    two batches.

    **Reference**: Liu et al. 2023, algorithm 1 and eq. 10; the decay is gamma of section 3.3.

    **Differs from** TorchJD in the clamp only.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.famo(num_tasks=2).weighting
    >>> state, after = weighting.init(), jnp.zeros(2)
    >>> weights, state = weighting.update(
    ...     None, state, losses=jnp.array([1.0, 3.0]), previous_batch_losses=after
    ... )
    >>> print(weights)
    [0.75 0.25]
    """
    bounds = checks.check_vector("min_losses", min_losses, num_tasks, sign="any")
    checks.check_range("learning_rate", learning_rate, 0)
    checks.check_range("weight_decay", weight_decay, 0)
    stepper = optimizer
    if stepper is None:
        stepper = optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))

    def gaps(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
        lower = 0 if bounds is None else bounds.astype(losses.dtype)
        return tasks.positive_part(losses - lower + SHIFT)

    def init() -> FAMOState:
        logits = init_learned(stepper, jnp.zeros((num_tasks,)))
        losses, present = jnp.ones((num_tasks,)), jnp.zeros((num_tasks,), bool)
        return FAMOState(jnp.zeros((), jnp.int32), logits, losses, present)

    def balance(state: FAMOState, after: jax.Array) -> LearnedState:
        present = state.present
        after = jnp.where(present, after, 1)
        fallen = jnp.log(gaps(state.losses)[0]) - jnp.log(gaps(after)[0])
        fallen = jnp.where(jnp.isfinite(after), jnp.where(present, fallen, 0), jnp.nan)

        def softmax(logits: jax.Array) -> jax.Array:
            return jax.nn.softmax(logits, where=present)

        _, pull = jax.vjp(softmax, state.logits.values)
        (gradient,) = pull(fallen.astype(state.logits.values.dtype))
        moved = learn(stepper, gradient, state.logits, present)
        first = state.mtl_step == 0
        return jax.tree.map(lambda x, y: jnp.where(first, y, x), moved, state.logits)

    def weigh(
        losses: jax.Array,
        state: FAMOState,
        task_mask: jax.Array,
        previous_batch_losses: jax.Array,
    ) -> tuple[jax.Array, FAMOState]:
        logits = balance(state, previous_batch_losses.astype(losses.dtype))
        shares = jax.nn.softmax(logits.values, where=task_mask)
        clamped, active = gaps(losses)
        ratios = jnp.where(active & task_mask, shares / clamped, 0)
        total = jnp.sum(ratios)
        weights = ratios / jnp.where(total > 0, total, 1)
        return weights, FAMOState(state.mtl_step + 1, logits, losses, task_mask)

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)
