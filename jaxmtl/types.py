"""The words of the library: aggregator, weighting, rule, their states, and the inputs of a rule."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from optax.experimental import aggregating

PyTree = Any
Jacobian = PyTree
# A function of the state, such as ``head_weights(state, task_mask)``.
Ask = Callable[..., Any]


class Input(NamedTuple):
    """What the library knows of an input of a rule.

    Attributes:
      task_axes: How many leading axes run over the tasks: 1 for (m,), 2 for (m, m).
      absent: What stands in the entries of absent tasks; None leaves them as they are.
      guarded: Whether a non-finite entry skips the step of a rule that cannot do without it.
      remedy: Where a user takes it from.
    """

    task_axes: int = 0
    absent: float | None = None
    guarded: bool = True
    remedy: str = ""


# The inputs that users pass to ``update`` and several rules share. A rule may name others.
INPUTS: Mapping[str, Input] = {
    "losses": Input(1, 1.0, remedy="the (m,) losses of the step"),
    # Absent in the previous batch is not absent in this one: the rule removes these itself.
    "previous_batch_losses": Input(
        1,
        guarded=False,
        remedy="the (m,) losses of the previous batch at the current parameters, zeros at first",
    ),
    "lower_losses": Input(1, 1.0, remedy="the (m,) losses at z_N, from jaxmtl.descend_lower"),
    "cross_gramian": Input(
        2,
        0.0,
        remedy="J_1 J_2^T of two independent batches, from "
        "jaxmtl.cross_gramian(losses_fn)(params, args1, args2)",
    ),
    "features": Input(remedy="the shared features (..., d), or use encoder="),
    "preference": Input(1, guarded=False),
    "key": Input(guarded=False),
}
# Always there, whatever the user passes.
SUPPLIED = ("state", "task_mask", "m", "dtype", "log2_scale")


class Rule(NamedTuple):
    """What the author of a method wrote, in one form. Combinators change some fields and keep all.

    Attributes:
      init: ``init() -> state`` (``init(params)`` of a coordinate rule); ``()`` without state.
      weigh: ``weigh(inputs, state) -> (weights, state, residual)``, with the inputs in a mapping
        by name. Of a coordinate rule: ``(update, state, None)``.
      needs: Names of the inputs that the rule cannot do without, found in its signature.
      accepts: Names of those that it takes where they are given.
      open_ended: Whether it takes any other name too, by ``**inputs``.
      num_tasks: m if it was given at construction.
      preference: (m,) the preference given at construction, or None.
      names: Those of the tasks, where the preference was given by name.
      residual: Whether a solver ran, so that there is a residual to log.
      keeps_state: False for fixed weights, whose state is the empty state of optax.
      finish: ``finish(weights, inputs) -> weights``: what is done with the weights at every step,
        those that `every_k` keeps included; None for nothing.
      name: What errors call it.
      head_weights: ``head_weights(state, task_mask) -> (m,)``: the weights, before the step, of
        the parameters that ``shared=`` leaves out; None for the default of `value_and_grad`.
      lower_objective: See `jaxmtl.ldc_mtl`.
      feature_gradient: See `jaxmtl.ldc_mtl`.
    """

    init: Callable[..., PyTree]
    weigh: Callable[[Mapping[str, Any], PyTree], tuple[Any, PyTree, jax.Array | None]]
    needs: frozenset[str] = frozenset()
    accepts: frozenset[str] = frozenset()
    num_tasks: int | None = None
    preference: jax.Array | None = None
    residual: bool = False
    keeps_state: bool = True
    finish: Callable[[jax.Array, Mapping[str, Any]], jax.Array] | None = None
    name: str = "this method"
    head_weights: Ask | None = None
    lower_objective: Ask | None = None
    feature_gradient: Ask | None = None
    open_ended: bool = False
    names: tuple[str, ...] | None = None


# The fields of a rule that are functions of its own state.
ASKS = ("head_weights", "lower_objective", "feature_gradient")


class Weighting(NamedTuple):
    """A map from the Gramian (or the losses) to weights.

    Attributes:
      init: ``init() -> state``.
      update: ``update(gramian, state, *, losses=None, **extra) -> (weights, state)`` with
        ``gramian`` of shape ``(m, m)`` (None for rules that do not read it) and ``weights`` of
        shape ``(m,)``.
      rule: The bare rule, which combinators wrap again.
      head_weights: ``head_weights(state, task_mask=None) -> (m,)``, or None; see `Rule`.
      lower_objective: See `jaxmtl.ldc_mtl`.
      feature_gradient: See `jaxmtl.ldc_mtl`.
    """

    init: Callable[[], PyTree]
    update: Callable[..., tuple[jax.Array, PyTree]]
    rule: Rule | None = None
    head_weights: Ask | None = None
    lower_objective: Ask | None = None
    feature_gradient: Ask | None = None


class Aggregator(aggregating.Aggregator):
    """An optax transformation from stacked per-task gradients to one update.

    ``init(params) -> state`` and ``update(jacobian, state, params, **extra) ->
    (update, state)``, where each leaf of ``jacobian`` has shape ``(m, *leaf.shape)``.

    Attributes:
      weighting: The same method as a map from the Gramian to weights, or None where
        the method needs the coordinates of the gradients.
      rule: What its author wrote, or None for a wrapper such as `jaxmtl.multi_steps`.
    """

    weighting: Weighting
    rule: Rule | None

    def __new__(
        cls,
        init: Callable[..., PyTree],
        update: Callable[..., tuple[PyTree, PyTree]],
        weighting: Weighting | None = None,
        rule: Rule | None = None,
    ) -> "Aggregator":
        """Makes an aggregator of its two functions and, where there is one, its weighting."""
        self = super().__new__(cls, init, update)
        # Declared without None: a rule with a weighting can then be used without a check.
        self.weighting = weighting
        self.rule = rule if weighting is None else weighting.rule
        return self

    def _replace(self, **fields: Any) -> "Aggregator":
        """Returns a copy with some fields changed; the weighting stays unless it is named."""
        old = {"init": self.init, "update": self.update}
        old |= {"weighting": self.weighting, "rule": self.rule}
        return type(self)(**(old | fields))


# Where users find them, so that signatures say ``jaxmtl.Aggregator``.
Aggregator.__module__ = Weighting.__module__ = "jaxmtl"


class AggregatorState(NamedTuple):
    """State of an aggregator that logs nothing.

    Attributes:
      mtl_skipped: int32 scalar, the number of steps skipped for a non-finite value.
      inner: The rule's own state.
    """

    mtl_skipped: jax.Array
    inner: PyTree


class WeightsState(NamedTuple):
    """State of an aggregator constructed with ``num_tasks``.

    Attributes:
      mtl_skipped: int32 scalar, the number of steps skipped for a non-finite value.
      inner: The rule's own state.
      mtl_weights: (m,) weights of the last step that was not skipped.
    """

    mtl_skipped: jax.Array
    inner: PyTree
    mtl_weights: jax.Array


class SolverState(NamedTuple):
    """State of an aggregator constructed with ``num_tasks`` whose rule runs a solver.

    Attributes:
      mtl_skipped: int32 scalar, the number of steps skipped for a non-finite value.
      inner: The rule's own state.
      mtl_weights: (m,) weights of the last step that was not skipped.
      mtl_residual: Scalar, the relative KKT residual of the solver at that step.
    """

    mtl_skipped: jax.Array
    inner: PyTree
    mtl_weights: jax.Array
    mtl_residual: jax.Array


STATES = (AggregatorState, WeightsState, SolverState)


class RandomState(NamedTuple):
    """State of a rule that draws random numbers.

    Attributes:
      mtl_step: int32 scalar, the number of draws so far.
    """

    mtl_step: jax.Array
