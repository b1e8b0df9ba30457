"""Uncertainty weighting and IMTL-L: one learned log-scale per task."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxmtl import base, checks
from jaxmtl.learned import LearnedState, init_learned, learn
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


def default_optimizer() -> optax.GradientTransformation:
    """Returns the stepper of the log-scales if none is given.

    Adam, whose bounded steps survive a first loss of any size; plain descent does not.
    """
    return optax.adam(0.01)


@method("learned variances", "Kendall 2018", "linear under scaling", "scale-free")
def uncertainty_weighting(
    kind: str | Sequence[str] = "regression",
    *,
    num_tasks: int,
    initial: float = 0.0,
    max_weight: float | None = 1e6,
    optimizer: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Weighs the losses by learned homoscedastic uncertainties.

    ``sum_i a_i exp(-s_i) l_i + s_i / 2``, with ``a_i = 1/2`` for a regression and 1 for a
    classification, descended in the parameters and in the log-variances s:
    ``w_i = a_i exp(-s_i)``, ``ds_i = 1/2 - w_i l_i``.

    Use it at the budget of one gradient where losses are likelihoods of different noise: the common
    first choice.

    Args:
      kind: ``"regression"`` or ``"classification"``, or m of these, one per task.
      num_tasks: m, required; the state logs ``mtl_weights``.
      initial: s at the start (LibMTL: -0.5).
      max_weight: Bound on ``exp(-s)``, kept after each step of s; None for none, as in the paper.
        Losses from 1e-6 on are weighted as without it.
      optimizer: Steps s, after its use; Adam with rate 0.01 by default. The papers train s with
        the network's own optimizer: pass that.

    Returns:
      An `Aggregator` that reads ``losses``, whose inner state is a
      `jaxmtl.learned.LearnedState` with s.

    Raises:
      ValueError: ``num_tasks`` is missing, ``max_weight`` is not positive, or ``kind`` is unknown
        or of another length.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients,
    conflicting. Meant for positive losses: s follows ``log(2 a_i l_i)``, so that a task whose loss
    stays zero or negative gains weight up to ``max_weight`` (without a bound: until the weight
    overflows and every step is skipped). Absent tasks keep their s.

    **Reference**: Kendall, Gal and Cipolla 2018, eq. 7 and 10, with ``s = log sigma^2``.

    **Differs from** LibMTL and TorchJD, where every task is a regression (the default here).

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.uncertainty_weighting(num_tasks=2).weighting
    >>> state = weighting.init()
    >>> for _ in range(2):
    ...     weights, state = weighting.update(None, state, losses=jnp.array([1.0, 3.0]))
    >>> print([f"{w:.3f}" for w in weights])
    ['0.500', '0.495']
    """
    kinds = [kind] * num_tasks if isinstance(kind, str) else list(kind)
    for name in kinds:
        checks.check_choice("kind", name, ("regression", "classification"))
    checks.check_tasks(len(kinds), num_tasks)
    factors = [0.5 if name == "regression" else 1.0 for name in kinds]
    stepper = default_optimizer() if optimizer is None else optimizer
    check_bound(max_weight)

    def init() -> LearnedState:
        return init_learned(stepper, jnp.full((num_tasks,), initial, jnp.result_type(float)))

    def weigh(
        losses: jax.Array, state: LearnedState, task_mask: jax.Array
    ) -> tuple[jax.Array, LearnedState]:
        weights = jnp.asarray(factors, losses.dtype) * jnp.exp(-state.values)
        gradient = jnp.where(task_mask, 0.5 - weights * losses, 0)
        new = learn(stepper, gradient, state, task_mask)
        lowest = None if max_weight is None else -log_bound(max_weight)
        return weights, bounded(new, low=lowest)

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)


def check_bound(max_weight: float | jax.Array | None) -> None:
    """Raises a ValueError unless a bound on a weight is positive."""
    if max_weight is not None:
        checks.check_range("max_weight", max_weight, 0, closed="right")


def log_bound(max_weight: float | jax.Array) -> jax.Array:
    """Returns the logarithm of a bound on a weight."""
    return jnp.log(jnp.asarray(max_weight, jnp.result_type(float)))


def bounded(
    state: LearnedState, low: jax.Array | None = None, high: jax.Array | None = None
) -> LearnedState:
    """Returns the state with its learned logarithms within their bounds."""
    return state._replace(values=jnp.clip(state.values, low, high).astype(state.values.dtype))


def step_log_scales(
    optimizer: optax.GradientTransformation,
    losses: jax.Array,
    state: LearnedState,
    task_mask: jax.Array,
    max_weight: float | jax.Array | None,
) -> tuple[jax.Array, LearnedState]:
    """Returns IMTL-L's weights ``exp(s)`` and the state after the step on ``exp(s) l - s``."""
    weights = jnp.exp(state.values)
    gradient = jnp.where(task_mask, weights * losses - 1, 0)
    highest = None if max_weight is None else log_bound(max_weight)
    return weights, bounded(learn(optimizer, gradient, state, task_mask), high=highest)


@method("learned scales, e^s l - s", "Liu 2021b", "linear under scaling", "scale-free")
def imtl_l(
    *,
    num_tasks: int,
    max_weight: float | None = 1e6,
    optimizer: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Scales the losses until all are equally large.

    ``sum_i exp(s_i) l_i - s_i``, descended in the parameters and in s: ``w_i = exp(s_i)``,
    ``ds_i = w_i l_i - 1``, so that ``exp(s_i) l_i`` goes to 1.

    Use it at the budget of one gradient where losses have different scales that change.

    Args:
      num_tasks: m, required; the state logs ``mtl_weights``.
      max_weight: Bound on ``exp(s)``, kept after each step of s; None for none, as in the paper.
        Losses from 1e-6 on are weighted as without it.
      optimizer: Steps s (0 at the start), after its use; Adam with rate 0.01 by default. The papers
        train s with the network's own optimizer: pass that.

    Returns:
      An `Aggregator` that reads ``losses``, whose inner state is a
      `jaxmtl.learned.LearnedState` with s.

    Raises:
      ValueError: ``num_tasks`` is missing, or ``max_weight`` is not positive.

    **Properties**: weighted, permutation-equivariant, linear under scaling of the gradients,
    conflicting. Meant for positive losses: at a loss that stays zero or negative the scale grows
    up to ``max_weight`` (without a bound: until it overflows and every step is skipped). Absent
    tasks keep their s.

    **Reference**: Liu et al. 2021 ("Towards impartial multi-task learning"), section 3.2.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.imtl_l(num_tasks=2).weighting
    >>> state = weighting.init()
    >>> for _ in range(2):
    ...     weights, state = weighting.update(None, state, losses=jnp.array([1.0, 3.0]))
    >>> print([f"{w:.3f}" for w in weights])
    ['1.000', '0.990']
    """
    stepper = default_optimizer() if optimizer is None else optimizer
    check_bound(max_weight)

    def weigh(
        losses: jax.Array, state: LearnedState, task_mask: jax.Array
    ) -> tuple[jax.Array, LearnedState]:
        return step_log_scales(stepper, losses, state, task_mask, max_weight)

    def init() -> LearnedState:
        return init_learned(stepper, jnp.zeros((num_tasks,)))

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)
