"""The one abstraction: an aggregator is an optax transformation with a weighting.

A *weighting* maps the ``(m, m)`` Gramian of the per-task gradients to ``(m,)``
weights; an *aggregator* maps the Jacobian itself to an update. Authors write one
function and wrap it once, with `from_weighting` or `from_rows`; checks, scaling,
masking, the guard against non-finite values and logging are added here.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.experimental import aggregating

from jaxmtl import linalg

PyTree = Any
Jacobian = PyTree


class Rule(NamedTuple):
    """What the author of a weighting wrote, in one form.

    Attributes:
      init: ``init() -> state``; ``()`` for a rule without state of its own.
      apply: ``apply(gramian, state, **inputs) -> (weights, state, residual)``.
      reads: Names of the inputs that the rule needs; the guard tests these alone.
      num_tasks: m if it was given at construction.
      residual: Whether a solver ran, so that there is a residual to log.
      extras: Names of the inputs that the rule understands; None for any.
    """

    init: Callable[[], PyTree]
    apply: Callable[..., tuple[jax.Array, PyTree, jax.Array | None]]
    reads: tuple[str, ...] = ("gramian",)
    num_tasks: int | None = None
    residual: bool = False
    extras: frozenset[str] | None = None


class Weighting(NamedTuple):
    """A map from the Gramian (or the losses) to weights.

    Attributes:
      init: ``init() -> state``.
      update: ``update(gramian, state, *, losses=None, **extra) -> (weights, state)``
        with ``gramian`` of shape ``(m, m)`` (None for rules that do not read it) and
        ``weights`` of shape ``(m,)``.
      rule: The bare rule, which combinators wrap again.
    """

    init: Callable[[], PyTree]
    update: Callable[..., tuple[jax.Array, PyTree]]
    rule: Rule | None = None


class Aggregator(aggregating.Aggregator):
    """An optax transformation from stacked per-task gradients to one update.

    ``init(params) -> state`` and ``update(jacobian, state, params, **extra) ->
    (update, state)``, where each leaf of ``jacobian`` has shape ``(m, *leaf.shape)``.

    Attributes:
      weighting: The same method as a map from the Gramian to weights, or None where
        the method needs the coordinates of the gradients.
    """

    weighting: Weighting

    def __new__(
        cls,
        init: Callable[..., PyTree],
        update: Callable[..., tuple[PyTree, PyTree]],
        weighting: Weighting | None = None,
    ) -> "Aggregator":
        """Makes an aggregator of its two functions and, where there is one, its weighting."""
        self = super().__new__(cls, init, update)
        # Declared without None: a rule with a weighting can then be used without a check.
        self.weighting = weighting
        return self


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


class RandomState(NamedTuple):
    """State of a rule that draws random numbers.

    Attributes:
      mtl_step: int32 scalar, the number of draws so far.
    """

    mtl_step: jax.Array


def init_random() -> RandomState:
    """Returns the state of a rule that has drawn nothing yet."""
    return RandomState(jnp.zeros((), jnp.int32))


def draw_key(seed: int, step: jax.Array, key: jax.Array | None) -> jax.Array:
    """Returns the key of this step: ``key`` if given, else one made of seed and step."""
    return jax.random.fold_in(jax.random.key(seed), step) if key is None else key


def uniform_weights(task_mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns 1/m over the present tasks, with m their number; 0 elsewhere."""
    present = task_mask.astype(dtype)
    return present / jnp.maximum(jnp.sum(present), 1)


def preference_weights(
    preference: jax.Array | None, task_mask: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns the preference restricted to the present tasks, their total kept; 1/m if None."""
    if preference is None:
        return uniform_weights(task_mask, dtype)
    total = jnp.asarray(preference, dtype)
    kept = jnp.where(task_mask, total, 0)
    share = jnp.sum(kept)
    scale = jnp.where(share > 0, jnp.sum(total) / jnp.where(share > 0, share, 1), 0)
    return jnp.where(jnp.all(task_mask), total, kept * scale)


# --- checks at construction -------------------------------------------------------------------


def check_num_tasks(num_tasks: int | None, *, required_by: str | None = None) -> None:
    """Raises a ValueError unless ``num_tasks`` is a positive int, or None where allowed."""
    if num_tasks is None:
        if required_by:
            raise ValueError(
                f"{required_by} keeps a state of the size of the tasks: expected num_tasks=m, "
                "got None; pass the number of tasks at construction"
            )
        return
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(
            f"expected num_tasks to be a positive int, got {num_tasks!r}; under "
            'inject_hyperparams pass static_args=("num_tasks",)'
        )


def check_range(
    name: str, value: Any, low: float, high: float = float("inf"), *, closed: str = "both"
) -> None:
    """Raises a ValueError if a hyperparameter that is known lies outside its range.

    Values that are only known at run time (under ``inject_hyperparams``) pass.
    ``closed`` says which ends belong to the range: both, left, right or neither.
    """
    try:
        number = float(value)
    except jax.errors.ConcretizationTypeError:
        return
    except (TypeError, ValueError):
        raise ValueError(f"expected {name} to be a number, got {value!r}") from None
    left = number >= low if closed in ("both", "left") else number > low
    right = number <= high if closed in ("both", "right") else number < high
    if not (left and right):
        opening = "[" if closed in ("both", "left") else "("
        closing = "]" if closed in ("both", "right") and high != float("inf") else ")"
        raise ValueError(
            f"expected {name} in {opening}{low:g}, {high:g}{closing}, got {number:g}; "
            "choose a value inside the range"
        )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {choices}, got {value!r}")


def check_vector(
    name: str, value: Any, num_tasks: int | None, *, sign: str = "nonnegative"
) -> jax.Array | None:
    """Returns ``value`` as a floating point vector over tasks, or None.

    Raises:
      ValueError: It is not one-dimensional, disagrees with ``num_tasks``, is not
        finite, is all zero, or (``sign``: any, nonnegative, positive) has a wrong sign.
    """
    if value is None:
        return None
    vector = jnp.asarray(value)
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        vector = vector.astype(jnp.result_type(float))
    if vector.ndim != 1 or not vector.size:
        raise ValueError(
            f"expected {name} of shape (m,), one entry per task, got shape {vector.shape}"
        )
    if num_tasks is not None and vector.shape != (num_tasks,):
        raise ValueError(
            f"expected {name} of shape ({num_tasks},) to agree with num_tasks, got {vector.shape}"
        )
    try:
        low, finite = float(jnp.min(vector)), bool(jnp.all(jnp.isfinite(vector)))
        total = float(jnp.sum(jnp.abs(vector)))
    except jax.errors.ConcretizationTypeError:
        return vector
    if not finite:
        raise ValueError(f"expected finite entries in {name}, got {value!r}")
    if sign != "any" and (low < 0 or total == 0 or (sign == "positive" and low <= 0)):
        raise ValueError(
            f"expected {name} to have {sign} entries, not all zero, got {value!r}; "
            "it says how much each task matters"
        )
    return vector


# --- checks while tracing ---------------------------------------------------------------------


def check_tasks(m: int, num_tasks: int | None) -> None:
    """Raises a ValueError if the number of tasks differs from the one at construction."""
    if num_tasks is not None and m != num_tasks:
        raise ValueError(
            f"expected {num_tasks} tasks, as given by num_tasks (or a vector over tasks) at "
            f"construction, got {m}; make both agree"
        )


def check_jacobian(jacobian: Jacobian, params: PyTree, num_tasks: int | None) -> int:
    """Checks a Jacobian against the parameters and returns the number of tasks."""
    if params is None:
        raise ValueError(
            "expected update(jacobian, state, params), got params=None; aggregators check the "
            "task axis against the parameters, so pass them"
        )
    got: Any = jax.tree.structure(jacobian)
    expected: Any = jax.tree.structure(params)
    if got != expected:
        raise ValueError(
            f"expected a Jacobian with the structure of params, {expected}, got {got}; "
            "differentiate with respect to the same parameters"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(jacobian), jax.tree.leaves(params), strict=True)
    for (path, row), param in pairs:
        name = jax.tree_util.keystr(path) or "the Jacobian"
        if jnp.shape(row) == jnp.shape(param):
            raise ValueError(
                f"expected shape (m, *{jnp.shape(param)}) at {name}, got "
                f"{jnp.shape(row)}, the shape of the parameter itself, without a task axis; pass "
                "the stacked per-task gradients (value_and_jacobian), put the aggregator first "
                "in the chain, and use jaxmtl.multi_steps for optax.MultiSteps"
            )
        if jnp.shape(row)[1:] != jnp.shape(param):
            raise ValueError(
                f"expected shape (m, *{jnp.shape(param)}) at {name}, got {jnp.shape(row)}; put "
                "the task axis first, and optax.flatten after the aggregator"
            )
    m = linalg.num_rows(jacobian)
    check_tasks(m, num_tasks)
    return m


def _check_per_task(name: str, value: Any, m: int) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape != (m,):
        raise ValueError(
            f"expected {name} of shape ({m},), one per task, got {array.shape}; pass the vector "
            "of all m tasks"
        )
    return array


def _check_mask(task_mask: Any, m: int) -> jax.Array:
    if task_mask is None:
        return jnp.ones((m,), bool)
    mask = _check_per_task("task_mask", task_mask, m)
    if mask.dtype != bool:
        raise ValueError(f"expected a bool task_mask, got {mask.dtype}; pass mask.astype(bool)")
    return mask


# --- the guard --------------------------------------------------------------------------------


def skip_unless(ok: jax.Array, new_state: PyTree, state: PyTree) -> PyTree:
    """Returns the new state if ``ok``, else the old one with one more step in ``mtl_skipped``."""
    skipped = state
    if isinstance(state, AggregatorState | WeightsState | SolverState):
        skipped = state._replace(mtl_skipped=state.mtl_skipped + 1)
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new_state, skipped)


def guard_update(update: PyTree, new_state: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    """Replaces a non-finite update by zero; the state is then kept and the skip counted."""
    ok = linalg.all_finite(update)
    zeroed = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), update)
    return zeroed, skip_unless(ok, new_state, state)


# --- wrapping a rule --------------------------------------------------------------------------


def _named_inputs(function: Callable[..., Any], skip: int) -> frozenset[str] | None:
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters[skip:])


def from_weighting(
    weigh: Callable[..., Any] | Weighting,
    *,
    init: Callable[[], PyTree] | None = None,
    num_tasks: int | None = None,
    reads: tuple[str, ...] = ("gramian",),
    residual: bool = False,
) -> Aggregator:
    """Makes an aggregator of a function from the Gramian to weights.

    Args:
      weigh: ``weigh(gramian, **inputs) -> weights``, with ``gramian`` of shape ``(m, m)``,
        scaled by a power of four so that its largest diagonal entry is near 1, and weights
        of shape ``(m,)``. With ``init``: ``weigh(gramian, state, **inputs) -> (weights,
        state)``; a `Weighting` gives both at once. It receives those of the keyword inputs
        that it names: ``losses`` (m,), ``task_mask`` (m,) bool (always an array; rows and
        columns of absent tasks are zero), ``log2_scale`` (int32; the true Gramian is
        ``gramian * 4**log2_scale``), ``jacobian`` (the rows, on the Jacobian route
        only), ``key`` and whatever the user passes to ``update``.
        A rule that does not name ``task_mask`` refuses one.
      init: ``init() -> state`` of a rule with state; shapes and dtypes never change.
      num_tasks: m. If given, the state logs ``mtl_weights`` and, with ``residual``,
        ``mtl_residual``, and other numbers of tasks are refused.
      reads: Names of the inputs that the rule cannot do without. The guard tests these
        for finite values. Without ``"gramian"`` none is computed.
      residual: Whether ``weigh`` returns a `jaxmtl.solvers.Solution` in place of weights.

    Returns:
      An `Aggregator`. Its state is an `AggregatorState`, `WeightsState` or `SolverState`.

    Raises:
      ValueError: When tracing, if the Jacobian does not fit ``params``, or an input that
        the rule reads is missing.

    >>> import jax.numpy as jnp, jaxmtl
    >>> inverse_norms = jaxmtl.from_weighting(lambda gramian: 1 / jnp.sqrt(jnp.diagonal(gramian)))
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 5.0]])
    >>> update, _ = inverse_norms.update(jacobian, inverse_norms.init(params), params)
    >>> print((update / jnp.linalg.norm(update)).round(3))
    [0.316 0.949]
    """
    if isinstance(weigh, Weighting):
        if weigh.rule is not None:
            return from_rule(weigh.rule._replace(num_tasks=num_tasks or weigh.rule.num_tasks))
        init, weigh = weigh.init, weigh.update
    stateful = init is not None
    function: Callable[..., Any] = weigh
    extras = _named_inputs(function, 2 if stateful else 1)

    def apply(
        gramian: jax.Array, state: PyTree, **inputs: Any
    ) -> tuple[jax.Array, PyTree, jax.Array | None]:
        if extras is not None:
            inputs = {name: value for name, value in inputs.items() if name in extras}
        if stateful:
            weights, state = function(gramian, state, **inputs)
        else:
            weights = function(gramian, **inputs)
        return (weights.value, state, weights.residual) if residual else (weights, state, None)

    return from_rule(Rule(init or tuple, apply, reads, num_tasks, residual, extras))


def from_rule(rule: Rule) -> Aggregator:
    """Makes an aggregator of a bare rule: the guard, logging and both routes."""
    check_num_tasks(rule.num_tasks)
    m_logged = rule.num_tasks

    def init() -> PyTree:
        skipped, inner = jnp.zeros((), jnp.int32), rule.init()
        if m_logged is None:
            return AggregatorState(skipped, inner)
        weights = jnp.zeros((m_logged,), jnp.result_type(float))
        if not rule.residual:
            return WeightsState(skipped, inner, weights)
        return SolverState(skipped, inner, weights, jnp.zeros((), weights.dtype))

    def update(
        gramian: jax.Array | None,
        state: PyTree,
        *,
        losses: jax.Array | None = None,
        task_mask: jax.Array | None = None,
        log2_scale: jax.Array | int = 0,
        **extra: Any,
    ) -> tuple[jax.Array, PyTree]:
        inputs = dict(extra, losses=losses)
        for name in rule.reads:
            if name != "gramian" and inputs.get(name) is None:
                raise ValueError(
                    f"this method reads {name}: expected update(..., {name}=...), got none; "
                    f"pass {name} as a keyword"
                )
        m = _check_gramian(gramian, losses, rule)
        check_tasks(m, m_logged)
        if task_mask is not None and rule.extras is not None and "task_mask" not in rule.extras:
            raise ValueError(
                "this weighting does not take a task_mask: expected a function that names "
                "task_mask among its inputs; add the argument, or drop the mask"
            )
        mask = _check_mask(task_mask, m)
        if losses is not None:
            losses = _check_per_task("losses", losses, m)
            inputs["losses"] = jnp.where(mask, losses, jnp.ones_like(losses))
        # Weights carry no gradient, and solvers are loops without a reverse mode.
        inputs = jax.tree.map(lambda x: x if callable(x) else lax.stop_gradient(x), inputs)
        dtype = linalg.accumulation_dtype(gramian, inputs["losses"])
        if gramian is None:  # of a rule that takes no more than m and the dtype from it
            gramian = jnp.zeros((m, m), dtype)
        elif "gramian" in rule.reads:
            gramian = lax.stop_gradient(gramian)
            gramian = jnp.where(mask[:, None] & mask[None, :], gramian, 0)
            gramian, shift = linalg.normalise_gramian(gramian)
            log2_scale = jnp.asarray(log2_scale, jnp.int32) + shift
        read = [gramian if name == "gramian" else inputs[name] for name in rule.reads]
        ok = linalg.all_finite(read)
        if "gramian" in rule.reads:
            gramian = jnp.where(ok, gramian, jnp.eye(m, dtype=dtype))  # keeps loops short
        weights, inner, residual = rule.apply(
            gramian, state.inner, task_mask=mask, log2_scale=log2_scale, **inputs
        )
        if jnp.shape(weights) != (m,):
            raise ValueError(
                f"expected the weighting to return weights of shape ({m},), one per task, got "
                f"{jnp.shape(weights)}; correct the function given to from_weighting"
            )
        weights = jnp.where(mask, weights, 0).astype(dtype)
        ok &= linalg.all_finite((weights, inner))
        new = state._replace(
            inner=jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), inner, state.inner)
        )
        if m_logged is not None:
            new = new._replace(mtl_weights=weights.astype(state.mtl_weights.dtype))
            if rule.residual:
                new = new._replace(mtl_residual=jnp.asarray(residual, state.mtl_residual.dtype))
        return jnp.where(ok, weights, 0), skip_unless(ok, new, state)

    weighting = Weighting(init, update, rule)

    def update_from_rows(
        jacobian: Jacobian, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        if not jax.tree.leaves(jacobian) and params is not None:
            return jacobian, state  # the empty group of a partition
        m = check_jacobian(jacobian, params, m_logged)
        jacobian = remove_absent(widen(jacobian, params), extra.get("task_mask"), m)
        # A rule that does not read the Gramian takes the number of tasks and the dtype from it.
        gramian = jnp.zeros((m, m), linalg.accumulation_dtype(jacobian))
        log2_scale: jax.Array | int = 0
        if "gramian" in rule.reads:
            gramian, log2_scale = linalg.balanced_gramian(lax.stop_gradient(jacobian))
        if rule.extras is not None and "jacobian" in rule.extras:
            extra["jacobian"] = jacobian
        weights, new = update(gramian, state, log2_scale=log2_scale, **extra)
        combined = linalg.combine(jacobian, weights)
        if "gramian" in rule.reads:
            combined = linalg.without_rounding(combined, jacobian, weights)
        return guard_update(in_dtypes_of(params, combined), new, state)

    return Aggregator(lambda params: init(), update_from_rows, weighting)


def _check_gramian(gramian: jax.Array | None, losses: Any, rule: Rule) -> int:
    if gramian is None:
        if "gramian" in rule.reads or losses is None:
            raise ValueError(
                "expected a Gramian of shape (m, m), got None; take it from value_and_gramian or "
                "jaxmtl.gramian(jacobian)"
            )
        return jnp.shape(losses)[0] if jnp.ndim(losses) else 1
    shape = jnp.shape(gramian)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(
            f"expected a Gramian of shape (m, m), got {shape}; take it from value_and_gramian or "
            "jaxmtl.gramian(jacobian)"
        )
    if not jnp.issubdtype(jnp.result_type(gramian), jnp.floating):
        raise ValueError(
            f"expected a floating point Gramian, got {jnp.result_type(gramian)}; cast it"
        )
    return shape[0]


def remove_absent(jacobian: Jacobian, task_mask: Any, m: int) -> Jacobian:
    """Puts zeros in the rows of absent tasks, whatever they hold."""
    if task_mask is None:
        return jacobian
    mask = _check_mask(task_mask, m)
    return jax.tree.map(lambda x: jnp.where(linalg.column(mask, x), x, jnp.zeros_like(x)), jacobian)


def widen(jacobian: Jacobian, params: PyTree) -> Jacobian:
    """Returns the rows in dtypes no narrower than the parameters', so that updates are not."""

    def leaf(x: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.result_type(p)))

    return jax.tree.map(leaf, jacobian, params)


def in_dtypes_of(params: PyTree, update: PyTree) -> PyTree:
    """Returns the update in the dtypes of the parameters, lest an optimizer's state change its."""
    return jax.tree.map(lambda p, x: x.astype(jnp.result_type(p)), params, update)


def from_rows(
    aggregate: Callable[..., tuple[PyTree, PyTree]],
    *,
    init: Callable[[PyTree], PyTree] | None = None,
    num_tasks: int | None = None,
    reads: tuple[str, ...] = (),
) -> Aggregator:
    """Makes an aggregator of a function that needs the coordinates of the gradients.

    Args:
      aggregate: ``aggregate(jacobian, state, *, task_mask, **extra) -> (update, state)``, with
        leaves ``(m, *leaf.shape)`` in, ``leaf.shape`` out. ``task_mask`` is always an array;
        rows of absent tasks are zero.
      init: ``init(params) -> state`` of a rule with state.
      num_tasks: m, if known; other numbers of tasks are refused.
      reads: Names of the keyword inputs that the rule cannot do without.

    Returns:
      An `Aggregator` whose ``weighting`` is None and whose state is an `AggregatorState`.
    """
    check_num_tasks(num_tasks)

    def init_fn(params: PyTree) -> AggregatorState:
        return AggregatorState(jnp.zeros((), jnp.int32), init(params) if init else ())

    def update(
        jacobian: Jacobian,
        state: AggregatorState,
        params: PyTree = None,
        *,
        task_mask: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, AggregatorState]:
        if not jax.tree.leaves(jacobian) and params is not None:
            return jacobian, state
        m = check_jacobian(jacobian, params, num_tasks)
        for name in reads:
            if extra.get(name) is None:
                raise ValueError(
                    f"this method reads {name}: expected update(..., {name}=...), got none; "
                    f"pass {name} as a keyword"
                )
        mask = _check_mask(task_mask, m)
        jacobian = remove_absent(widen(jacobian, params), task_mask, m)
        if extra.get("losses") is not None:
            losses = _check_per_task("losses", extra["losses"], m)
            extra["losses"] = jnp.where(mask, losses, jnp.ones_like(losses))
        ok = linalg.all_finite([jacobian, [extra[name] for name in reads]])
        result, inner = aggregate(jacobian, state.inner, task_mask=mask, **extra)
        ok &= linalg.all_finite(inner)
        inner = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), inner, state.inner)
        result = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), result)
        new = skip_unless(ok, state._replace(inner=inner), state)
        return guard_update(in_dtypes_of(params, result), new, state)

    return Aggregator(init_fn, update, None)


def inner_rule(aggregator: Any, combinator: str) -> Rule:
    """Returns the bare rule of an aggregator that a combinator is to wrap."""
    weighting = getattr(aggregator, "weighting", None)
    if weighting is None or weighting.rule is None:
        raise ValueError(
            f"{combinator} wraps the weights of another rule: expected an aggregator with a "
            ".weighting, got one without (a coordinate rule, a chain or an inject_hyperparams "
            f"result); use that one on the Jacobian route, from value_and_jacobian, without "
            f"{combinator}, or wrap the rule before chaining"
        )
    return weighting.rule


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters, as `optax.apply_updates`, after checking shapes.

    Args:
      params: Pytree of arrays.
      updates: Pytree of the same structure and shapes.

    Returns:
      Pytree like ``params``, in its dtypes.

    Raises:
      ValueError: A shape differs, as when no aggregator is in the chain: plain optax
        would broadcast the parameters to ``(m, *shape)``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> print(jaxmtl.apply_updates(jnp.ones(2), jnp.array([0.5, -1.0])))
    [1.5 0. ]
    """
    check_updates(params, updates)
    return optax.apply_updates(params, updates)


def check_updates(params: PyTree, updates: PyTree) -> None:
    """Raises a ValueError unless updates have the structure and the shapes of params."""
    got: Any = jax.tree.structure(updates, is_leaf=lambda x: x is None)
    expected: Any = jax.tree.structure(params, is_leaf=lambda x: x is None)
    if got != expected:
        raise ValueError(
            f"expected updates with the structure of params, {expected}, got {got}; "
            "pass the updates of the optimizer that was initialised with these params"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=False)
    for (path, param), update in pairs:
        if jnp.shape(update) != jnp.shape(param):
            name = jax.tree_util.keystr(path) or "the parameters"
            raise ValueError(
                f"expected an update of shape {jnp.shape(param)} at {name}, got "
                f"{jnp.shape(update)}; put an aggregator, such as jaxmtl.upgrad(), first in the "
                "chain, so that the task axis is gone, and give every leaf one: optax.masked "
                "passes the rows of the leaves that it leaves out on, optax.partition does not"
            )
