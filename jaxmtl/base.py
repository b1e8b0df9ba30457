"""The one abstraction: a rule is a function that gets the inputs it names.

A *weighting* maps the ``(m, m)`` Gramian of the per-task gradients, or the losses, to ``(m,)``
weights; an *aggregator* maps the Jacobian itself to an update. Authors write one function and wrap
it once, with `from_weighting` or, where it needs the coordinates of the gradients, `from_rows`.
Checks, scaling, masking, the guard against non-finite values and logging are added here.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxmtl import checks, linalg, tasks
from jaxmtl.types import (
    ASKS,
    INPUTS,
    STATES,
    SUPPLIED,
    Aggregator,
    AggregatorState,
    Jacobian,
    PyTree,
    Rule,
    SolverState,
    Weighting,
    WeightsState,
)

# Supplied as None where nobody gives them.
_OR_NONE = ("key", "preference")
_KNOWN = ("gramian", "jacobian", *INPUTS, *SUPPLIED)


# --- the guard --------------------------------------------------------------------------------


def skip_unless(ok: jax.Array, new_state: PyTree, state: PyTree) -> PyTree:
    """Returns the new state if ``ok``, else the old one with one more step in ``mtl_skipped``."""
    skipped = state
    if isinstance(state, STATES):
        skipped = state._replace(mtl_skipped=state.mtl_skipped + 1)
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), new_state, skipped)


def guard_update(update: PyTree, new_state: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    """Replaces a non-finite update by zero; the state is then kept and the skip counted."""
    ok = linalg.all_finite(update)
    zeroed = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), update)
    return zeroed, skip_unless(ok, new_state, state)


# --- the function of an author ----------------------------------------------------------------


def _name_of(function: Callable[..., Any]) -> str:
    path = getattr(getattr(function, "func", function), "__qualname__", "").split(".<locals>.")
    # Within the library, and by its custom, the method is what encloses its rule.
    name = path[0] if path[-1] in ("weigh", "aggregate", "<lambda>") else path[-1]
    return name if name.isidentifier() else "this method"


def requiring(function: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Returns the function with some of its optional inputs required.

    For a rule whose needs depend on its options: ``requiring(weigh, "features")``.
    """
    signature = inspect.signature(function)
    changed = [
        p.replace(default=p.empty, kind=p.KEYWORD_ONLY) if p.name in names else p
        for p in signature.parameters.values()
    ]
    changed.sort(key=lambda p: p.kind)

    @functools.wraps(function)
    def same(*args: Any, **inputs: Any) -> Any:
        return function(*args, **inputs)

    same.__signature__ = signature.replace(parameters=changed)  # type: ignore[attr-defined]
    return same


def _read_signature(function: Callable[..., Any]) -> tuple[frozenset[str], frozenset[str], bool]:
    # The names that the function needs, those that it accepts, and whether it takes any other.
    name = _name_of(function)
    bound = getattr(function, "keywords", {})
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.name not in bound and p.kind is not p.VAR_KEYWORD]
    for p in named:
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL):
            raise ValueError(
                f"a rule receives its inputs by name: expected plain parameters of {name}, got "
                f"{p}; name those of {', '.join(_KNOWN)} that it reads"
            )
    if named and not any(p.name in _KNOWN for p in named):
        raise ValueError(
            f"a rule receives the inputs that it names: expected parameters of {name} among "
            f"{', '.join(_KNOWN)} (and names of your own, passed to update), got "
            f"({', '.join(p.name for p in named)}); write for instance lambda gramian: ..."
        )
    required = {p.name for p in named if p.default is p.empty}
    needs = frozenset(required.difference(SUPPLIED, _OR_NONE))
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepts = {p.name for p in named} - needs | ({"task_mask"} if open_ended else set())
    return needs, frozenset(accepts), open_ended


def _caller(
    function: Callable[..., Any],
) -> tuple[Callable[..., Any], frozenset[str], frozenset[str], bool]:
    needs, accepts, open_ended = _read_signature(function)
    named = (needs | accepts) & set(inspect.signature(function).parameters)

    def call(inputs: Mapping[str, Any], state: PyTree) -> Any:
        given = {name: value for name, value in inputs.items() if name in named}
        if open_ended:
            others = set(inputs).difference(named, SUPPLIED, ("gramian", "jacobian"))
            given |= {name: inputs[name] for name in others if inputs[name] is not None}
        if "state" in named:
            given["state"] = state
        return function(**given)

    return call, needs, accepts, open_ended


def from_weighting(
    weigh: Callable[..., Any] | Weighting,
    *,
    init: Callable[[], PyTree] | None = None,
    num_tasks: int | None = None,
    preference: Any = None,
    residual: bool = False,
    head_weights: Callable[[PyTree, jax.Array], jax.Array] | None = None,
    **old: Any,
) -> Aggregator:
    """Makes an aggregator of a function from the Gramian, or the losses, to weights.

    The function receives the inputs that it names. A parameter without a default is what it cannot
    do without: the Gramian is computed only for a function that names it, and a missing input is
    an error that says so.

    Args:
      weigh: A function of any of these, by name, that returns weights (m,); with ``init`` the pair
        ``(weights, state)``. A `Weighting` is taken as it is.

        * ``gramian``: (m, m), scaled by a power of four so that its largest diagonal entry is
          near 1; rows and columns of absent tasks are zero.
        * ``losses`` (m,), 1 for absent tasks; ``cross_gramian`` (m, m), 0 beside them;
          ``previous_batch_losses``, ``lower_losses`` (m,); ``features``.
        * ``jacobian``: the rows, leaves (m, *leaf.shape), on the Jacobian route only, so give it
          the default None (or use `from_rows`).
        * ``preference`` (m,) or None: the one passed to ``update``, else the one given here.
        * ``key``: the one passed to ``update``, or None.
        * ``state``, ``task_mask`` (m,) bool, ``m``, ``dtype`` (of the weights) and ``log2_scale``
          (int32; the true Gramian is ``gramian * 4**log2_scale``): always there. A rule that does
          not name ``task_mask`` refuses one.
        * any other name: whatever the user passes to ``update`` under it. Keywords that
          `functools.partial` has bound are not inputs.
      init: ``init() -> state`` of a rule with state; shapes and dtypes never change.
      num_tasks: m. If given, the state logs ``mtl_weights`` and, with ``residual``,
        ``mtl_residual``, and other numbers of tasks are refused.
      preference: (m,) non-negative weights of the tasks, or None; ``update(..., preference=)``
        overrides it.
      residual: Whether ``weigh`` returns a `jaxmtl.solvers.Solution` in place of weights.
      head_weights: ``head_weights(state, task_mask) -> (m,)``: the weights, at the state before
        the step, of the parameters that ``shared=`` leaves out of the Gramian.
      **old: Refused: ``reads=`` of earlier versions is now what the function names.

    Returns:
      An `Aggregator`. Its state is an `AggregatorState`, `WeightsState` or `SolverState`.

    Raises:
      ValueError: The function names no input, or ``preference`` has a wrong shape or sign. When
        tracing, if the Jacobian does not fit ``params``, or an input that the rule needs is
        missing.

    >>> import jax.numpy as jnp, jaxmtl
    >>> inverse_norms = jaxmtl.from_weighting(lambda gramian: 1 / jnp.sqrt(jnp.diagonal(gramian)))
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 5.0]])
    >>> update, _ = inverse_norms.update(jacobian, inverse_norms.init(params), params)
    >>> print((update / jnp.linalg.norm(update)).round(3))
    [0.316 0.949]
    """
    checks.refuse_old("from_weighting", old, "inputs to be named by the function itself")
    if isinstance(weigh, Weighting):
        if weigh.rule is not None:
            return from_rule(weigh.rule._replace(num_tasks=num_tasks or weigh.rule.num_tasks))
        init, weigh = weigh.init, _by_position(weigh.update)
    call, needs, accepts, open_ended = _caller(weigh)
    name = _name_of(weigh)
    if "jacobian" in needs:
        raise checks.missing_input("jacobian", name)
    stateful = init is not None

    def apply(
        inputs: Mapping[str, Any], state: PyTree
    ) -> tuple[jax.Array, PyTree, jax.Array | None]:
        result = call(inputs, state)
        weights, state = result if stateful else (result, state)
        found = (weights.value, weights.residual) if residual else (weights, None)
        checks.check_weights(found[0], inputs["m"], name, stateful)
        return found[0], state, found[1]

    rule = Rule(init or tuple, apply, needs, accepts, num_tasks, residual=residual, name=name)
    vector = checks.check_vector("preference", preference, num_tasks)
    names = checks.names_of("preference", preference)
    rule = rule._replace(preference=vector, open_ended=open_ended, names=names)
    return from_rule(rule._replace(head_weights=head_weights))


def _by_position(update: Callable[..., Any]) -> Callable[..., Any]:
    # A weighting from elsewhere takes the Gramian and its state first, then keywords.
    def weigh(gramian: jax.Array, state: PyTree, task_mask: jax.Array, **inputs: Any) -> Any:
        return update(gramian, state, task_mask=task_mask, **inputs)

    return weigh


# --- the inputs of one step -------------------------------------------------------------------


def _collect(rule: Rule, given: dict[str, Any]) -> dict[str, Any]:
    """Drops what is None, adds the preference of the construction, and reports what is missing."""
    # None stands for nothing, but under a name of the author's own.
    given = {n: x for n, x in given.items() if x is not None or n not in _KNOWN}
    if rule.preference is not None:
        given.setdefault("preference", rule.preference)
    for name in sorted(rule.needs):
        if name not in given:
            raise checks.missing_input(name, rule.name)
    return checks.stack_named(given, rule.names, "the preference at construction")


def _count_tasks(rule: Rule, given: dict[str, Any], m: int | None) -> int:
    if m is None:
        of_tasks = [n for n in ("losses", "cross_gramian") if jnp.ndim(given.get(n, 0))]
        m = jnp.shape(given[of_tasks[0]])[0] if of_tasks else rule.num_tasks
    if m is None:
        raise ValueError(
            f"{rule.name} does not know the number of tasks: expected a Gramian, losses or "
            "num_tasks, got none; pass num_tasks=m at construction"
        )
    checks.check_tasks(m, rule.num_tasks)
    if rule.preference is not None:
        checks.check_tasks(m, rule.preference.size, "preference")
    return m


def _prepare(
    rule: Rule, given: dict[str, Any], task_mask: Any, m: int, dtype: Any
) -> tuple[dict[str, Any], jax.Array]:
    """Returns the checked inputs by name, without the entries of absent tasks, and the mask."""
    if task_mask is not None and "task_mask" not in rule.accepts:
        raise ValueError(
            f"{rule.name} does not take a task_mask: expected a function that names task_mask "
            "among its inputs; add the argument, or drop the mask"
        )
    mask = checks.check_mask(task_mask, m)
    inputs: dict[str, Any] = {"key": None, "preference": None}
    for name, value in given.items():
        known = INPUTS.get(name)
        if known is not None and known.task_axes:
            value = checks.check_per_task(name, value, m)
            if name != "preference":
                value = value.astype(jnp.promote_types(dtype, linalg.accumulation_dtype(value)))
            if known.absent is not None:
                here = mask if known.task_axes == 1 else tasks.pairs(mask)
                value = jnp.where(here, value, known.absent)
        inputs[name] = value
    # Weights carry no gradient, and solvers are loops without a reverse mode.
    inputs = jax.tree.map(lambda x: x if callable(x) else lax.stop_gradient(x), inputs)
    return inputs | {"task_mask": mask, "m": m, "dtype": dtype}, mask


def _guarded(rule: Rule, inputs: Mapping[str, Any]) -> jax.Array:
    """Tells whether everything that the rule cannot do without is finite."""
    names = [n for n in rule.needs if n not in INPUTS or INPUTS[n].guarded]
    return linalg.all_finite([inputs[name] for name in sorted(names)])


def _in_dtypes_of(old: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), new, old)


def finished(rule: Rule, weights: jax.Array, inputs: Mapping[str, Any]) -> jax.Array:
    """Returns the weights after what the rule does with them at every step."""
    return weights if rule.finish is None else rule.finish(weights, inputs)


# --- wrapping a rule --------------------------------------------------------------------------


def from_rule(rule: Rule) -> Aggregator:
    """Makes an aggregator of a bare rule on weights: the guard, logging and both routes."""
    checks.check_num_tasks(rule.num_tasks)
    num_tasks = rule.num_tasks

    def init() -> PyTree:
        if not rule.keeps_state:
            return optax.EmptyState()
        skipped, inner = jnp.zeros((), jnp.int32), tasks.own_buffers(rule.init())
        if num_tasks is None:
            return AggregatorState(skipped, inner)
        weights = jnp.zeros((num_tasks,), jnp.result_type(float))
        if not rule.residual:
            return WeightsState(skipped, inner, weights)
        return SolverState(skipped, inner, weights, jnp.zeros((), weights.dtype))

    def own(state: PyTree) -> PyTree:
        return state.inner if isinstance(state, STATES) else ()

    def record(state: PyTree, weights: jax.Array, inner: PyTree, residual: Any) -> PyTree:
        if not rule.keeps_state:
            return state
        new = state._replace(inner=_in_dtypes_of(state.inner, inner))
        if num_tasks is not None:
            new = new._replace(mtl_weights=weights.astype(state.mtl_weights.dtype))
            if rule.residual:
                new = new._replace(mtl_residual=jnp.asarray(residual, state.mtl_residual.dtype))
        return new

    def update(
        gramian: jax.Array | None,
        state: PyTree,
        *,
        task_mask: jax.Array | None = None,
        m: int | None = None,
        dtype: Any = None,
        log2_scale: jax.Array | int = 0,
        **extra: Any,
    ) -> tuple[jax.Array, PyTree]:
        if gramian is not None:
            m = checks.check_gramian(gramian)
        given = _collect(rule, dict(extra, gramian=gramian, task_mask=task_mask))
        task_mask = given.pop("task_mask", None)
        m = _count_tasks(rule, given, m)
        wide = [given[n] for n in ("gramian", "losses", "cross_gramian") if n in given]
        if dtype is None and not wide:
            dtype = jnp.result_type(float)
        kind = linalg.accumulation_dtype(wide)
        kind = kind if dtype is None else jnp.promote_types(kind, dtype)
        inputs, mask = _prepare(rule, given, task_mask, m, kind)
        log2_scale = jnp.asarray(log2_scale, jnp.int32)
        if "gramian" in given and "gramian" in rule.needs | rule.accepts:
            gramian = jnp.where(tasks.pairs(mask), inputs["gramian"], 0)
            inputs["gramian"], shift = linalg.normalize_gramian(gramian)
            log2_scale = log2_scale + shift
        ok = _guarded(rule, inputs)
        if "gramian" in rule.needs:  # keeps the loops of solvers short
            inputs["gramian"] = jnp.where(ok, inputs["gramian"], jnp.eye(m, dtype=kind))
        inputs |= {"log2_scale": log2_scale}
        weights, inner, residual = rule.weigh(inputs, own(state))
        weights = finished(rule, jnp.where(mask, weights, 0).astype(kind), inputs)
        ok &= linalg.all_finite((weights, inner))
        new = record(state, weights, inner, residual)
        return jnp.where(ok, weights, 0), skip_unless(ok, new, state)

    def asked(ask: Callable[..., Any]) -> Callable[..., Any]:
        def answer(state: PyTree, *args: Any, task_mask: Any = None, **kwargs: Any) -> Any:
            return ask(own(state), *args, task_mask=task_mask, **kwargs)

        return answer

    asks = {name: getattr(rule, name) for name in ASKS}
    asks = {name: ask and asked(ask) for name, ask in asks.items()}
    weighting = Weighting(init, update, rule, **asks)

    def update_from_rows(
        jacobian: Jacobian, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        if not jax.tree.leaves(jacobian) and params is not None:
            return jacobian, state  # the empty group of a partition
        m = checks.check_jacobian(jacobian, params, num_tasks)
        jacobian = _rows(jacobian, params, extra, m)
        extra |= {"m": m, "dtype": linalg.accumulation_dtype(jacobian)}
        gramian = None
        if "gramian" in rule.needs:
            gramian, extra["log2_scale"] = linalg.balanced_gramian(lax.stop_gradient(jacobian))
        if "jacobian" in rule.accepts:
            extra["jacobian"] = jacobian
        weights, new = update(gramian, state, **extra)
        combined = linalg.combine(jacobian, weights)
        if "gramian" in rule.needs:
            combined = linalg.without_rounding(combined, jacobian, weights)
        return guard_update(in_dtypes_of(params, combined), new, state)

    return Aggregator(lambda params: init(), update_from_rows, weighting)


def _rows(jacobian: Jacobian, params: PyTree, extra: Mapping[str, Any], m: int) -> Jacobian:
    mask = checks.stack_named(dict(extra)).get("task_mask")
    mask = None if mask is None else checks.check_mask(mask, m)
    return linalg.written(tasks.zero_absent_rows(widen(jacobian, params), mask))


def widen(jacobian: Jacobian, params: PyTree) -> Jacobian:
    """Returns the rows in dtypes no narrower than the parameters', so that updates are not."""

    def leaf(x: jax.Array, p: jax.Array) -> jax.Array:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.result_type(p)))

    return jax.tree.map(leaf, jacobian, params)


def in_dtypes_of(params: PyTree, update: PyTree) -> PyTree:
    """Casts the update to the parameters' dtypes, so that an optimizer's state keeps its dtype."""
    return jax.tree.map(lambda p, x: x.astype(jnp.result_type(p)), params, update)


def from_rows(
    aggregate: Callable[..., Any],
    *,
    init: Callable[[PyTree], PyTree] | None = None,
    num_tasks: int | None = None,
    preference: Any = None,
) -> Aggregator:
    """Makes an aggregator of a function that needs the coordinates of the gradients.

    Args:
      aggregate: A function of the inputs of `from_weighting`, by name; ``jacobian``, leaves
        (m, *leaf.shape) in which rows of absent tasks are zero, is always there, and
        ``log2_scale`` belongs to a ``gramian`` that it names. It returns the update, leaves
        ``leaf.shape``, or with ``init`` the pair ``(update, state)``.
      init: ``init(params) -> state`` of a rule with state.
      num_tasks: m, if known; other numbers of tasks are refused.
      preference: (m,) non-negative weights of the tasks, or None; ``update(..., preference=)``
        overrides it.

    Returns:
      An `Aggregator` whose ``weighting`` is None and whose state is an `AggregatorState`.

    Raises:
      ValueError: The function names no input. When tracing, if the Jacobian does not fit
        ``params``, or an input that the rule needs is missing.

    >>> import jax, jax.numpy as jnp, jaxmtl
    >>> def largest(jacobian):
    ...     return jax.tree.map(lambda g: g[jnp.abs(g).argmax(0), jnp.arange(g.shape[1])], jacobian)
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, -4.0], [0.0, 5.0]])
    >>> aggregator = jaxmtl.from_rows(largest)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [3. 5.]
    """
    call, needs, accepts, _ = _caller(aggregate)
    checks.check_num_tasks(num_tasks)
    vector = checks.check_vector("preference", preference, num_tasks)
    stateful = init is not None

    def apply(inputs: Mapping[str, Any], state: PyTree) -> tuple[PyTree, PyTree, None]:
        result = call(inputs, state)
        update, state = result if stateful else (result, state)
        return update, state, None

    rule = Rule(init or (lambda params: ()), apply, needs, accepts, num_tasks, vector)
    names = checks.names_of("preference", preference)
    rule = rule._replace(name=_name_of(aggregate), names=names)

    def init_fn(params: PyTree) -> AggregatorState:
        return AggregatorState(jnp.zeros((), jnp.int32), tasks.own_buffers(rule.init(params)))

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
        m = checks.check_jacobian(jacobian, params, num_tasks)
        jacobian = _rows(jacobian, params, {"task_mask": task_mask}, m)
        log2_scale = jnp.zeros((), jnp.int32)
        given = dict(extra, jacobian=jacobian, task_mask=task_mask)
        if "gramian" in needs:
            given["gramian"], log2_scale = linalg.balanced_gramian(lax.stop_gradient(jacobian))
        given = _collect(rule, given)
        mask = given.pop("task_mask", None)
        m = _count_tasks(rule, given, m)
        dtype = linalg.accumulation_dtype(jacobian, given.get("losses", ()))
        inputs, _ = _prepare(rule, given, mask, m, dtype)
        inputs["jacobian"] = jacobian  # with its gradient
        ok = _guarded(rule, inputs) & linalg.all_finite(jacobian)
        result, inner, _ = rule.weigh(inputs | {"log2_scale": log2_scale}, state.inner)
        ok &= linalg.all_finite(inner)
        result = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), result)
        inner = _in_dtypes_of(state.inner, inner)
        new = skip_unless(ok, state._replace(inner=inner), state)
        return guard_update(in_dtypes_of(params, result), new, state)

    return Aggregator(init_fn, update, None, rule)


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
