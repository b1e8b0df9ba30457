"""Wrong input in one sentence: expected, got, how to fix. Every check of the package."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmtl import linalg
from jaxmtl.types import (
    INPUTS,
    STATES,
    AggregatorState,
    Jacobian,
    PyTree,
    Rule,
    SolverState,
    WeightsState,
)

# --- at construction --------------------------------------------------------------------------


def check_int(name: str, value: Any, low: int = 1, fix: str = "") -> int:
    """Returns ``value`` after checking that it is an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        kind = "a positive int" if low == 1 else f"an int of at least {low}"
        raise ValueError(f"expected {name} to be {kind}, got {value!r}{fix and '; ' + fix}")
    return value


def check_num_tasks(num_tasks: int | None) -> None:
    """Raises a ValueError unless ``num_tasks`` is a positive int or None."""
    if num_tasks is not None:
        fix = 'under inject_hyperparams pass static_args=("num_tasks",)'
        check_int("num_tasks", num_tasks, fix=fix)


def require_num_tasks(num_tasks: int | None, name: str) -> int:
    """Returns ``num_tasks`` after checking that it is there."""
    if num_tasks is None:
        raise ValueError(
            f"{name} keeps a state of the size of the tasks: expected num_tasks=m, got None; pass "
            "the number of tasks at construction"
        )
    check_num_tasks(num_tasks)
    return num_tasks


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
    if not any(value is choice or value == choice for choice in choices):
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
    if isinstance(value, Mapping):
        value = [value[task] for task in task_names(name, value)]
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


def refuse_old(function: str, old: Mapping[str, Any], instead: str) -> None:
    """Raises a ValueError for keywords that an earlier version took."""
    for name in old:
        raise ValueError(f"{function} takes no {name}=: expected {instead}, got {name}=; drop it")


def check_weighting(aggregator: Any) -> Any:
    """Returns the weighting of an aggregator.

    Raises:
      ValueError: It has none, or is no aggregator.
    """
    weighting = getattr(aggregator, "weighting", None)
    if weighting is not None:
        return weighting
    if callable(aggregator) and not hasattr(aggregator, "update"):
        name = getattr(aggregator, "__name__", type(aggregator).__name__)
        raise ValueError(
            f"expected an aggregator, got the function {name}; call it, as in {name}(), with its "
            "options if it has any"
        )
    if not hasattr(aggregator, "update"):
        raise ValueError(
            f"expected an aggregator, got {type(aggregator).__name__}; pass for instance "
            "jaxmtl.upgrad()"
        )
    raise ValueError(
        "expected an aggregator with a weighting, got one that needs the Jacobian itself (a "
        "coordinate rule, a chain or an inject_hyperparams result); use the Jacobian route: "
        "jaxmtl.value_and_jacobian, then aggregator.update(jacobian, state, params, "
        "losses=losses)"
    )


# --- while tracing ----------------------------------------------------------------------------


def check_tasks(m: int, num_tasks: int | None, by: str = "num_tasks") -> None:
    """Raises a ValueError if the number of tasks differs from the one at construction."""
    if num_tasks is not None and m != num_tasks:
        by = by if by == "num_tasks" else f"{by} (a vector over tasks, like num_tasks)"
        raise ValueError(
            f"expected {num_tasks} tasks, as given by {by} at construction, got {m}; "
            "make both agree"
        )


def check_gramian(gramian: Any) -> int:
    """Returns m of a Gramian of shape (m, m) and floating point."""
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


def check_per_task(name: str, value: Any, m: int) -> jax.Array:
    """Returns an input of a rule after checking its task axes against m."""
    axes = INPUTS[name].task_axes if name in INPUTS else 1
    array, expected = jnp.asarray(value), (m,) * axes
    if array.shape != expected:
        what = "one per task" if axes == 1 else "tasks by tasks"
        if axes == 1 and array.ndim == 2 and array.shape[1] == m:
            raise ValueError(
                f"expected {name} of shape ({m},), one per task, got {array.shape}, one per "
                f"example and task; average over the examples, {name}.mean(0)"
            )
        raise ValueError(
            f"expected {name} of shape {expected}, {what}, got {array.shape}; pass "
            + ("the vector of all m tasks" if axes == 1 else INPUTS[name].remedy)
        )
    return array


def check_mask(task_mask: Any, m: int) -> jax.Array:
    """Returns the mask as a bool array (m,), all True for None."""
    if task_mask is None:
        return jnp.ones((m,), bool)
    mask = check_per_task("task_mask", task_mask, m)
    if mask.dtype != bool:
        raise ValueError(f"expected a bool task_mask, got {mask.dtype}; pass mask.astype(bool)")
    return mask


def check_shapes_stay(before: PyTree, after: PyTree) -> None:
    """Raises a ValueError if an optimizer's state changed its structure or shapes in a step."""
    fix = (
        "put the aggregator first in the chain: a transformation before it, such as Adam, sees m "
        "rows in place of one gradient (track_gradients and clip_rows are made for that place)"
    )
    same: Any = jax.tree.structure(before)
    got: Any = jax.tree.structure(after)
    if got != same:
        raise ValueError(
            f"expected the optimizer's state to keep its structure, {same}, got {got}; {fix}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        if jnp.shape(old) != jnp.shape(new):
            raise ValueError(
                f"expected the optimizer's state to keep its shapes, {jnp.shape(old)} at "
                f"{jax.tree_util.keystr(path)}, got {jnp.shape(new)} after a step; {fix}"
            )


def check_state(rule: Rule | None, state: Any) -> None:
    """Raises a ValueError unless ``state`` is one of an aggregator with this rule."""
    if rule is None:  # a weighting from elsewhere, with a state of its own
        return
    expected: Any = AggregatorState
    if not rule.keeps_state:
        expected = optax.EmptyState
    elif rule.num_tasks is not None:
        expected = SolverState if rule.residual else WeightsState
    if isinstance(state, expected):
        return
    got, fix = type(state).__name__, "pass aggregator.init(params)"
    if state is None:
        got, fix = "none", "call it as f(params, aggregator.init(params), *args)"
    elif isinstance(state, STATES):
        fix = "construct both with the same options, num_tasks among them"
    elif isinstance(state, tuple) and any(isinstance(x, expected) for x in state):
        got = "that of a chain"
        fix = "keep the aggregator's own state, aggregator.init(params), beside the optimizer's"
    elif not isinstance(state, tuple):
        fix = "the state comes second, before the arguments of the losses function"
    raise ValueError(
        f"expected the state of {rule.name}, {expected.__name__}, as the second argument, got "
        f"{got}; {fix}"
    )


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
                "passes the rows of the leaves that it leaves out on, optax.partition does not; a "
                "group of partition that does not train takes jaxmtl.frozen(), not set_to_zero"
            )


def stack_named(
    given: dict[str, Any], names: tuple[str, ...] | None = None, of: str = "the losses"
) -> dict[str, Any]:
    """Returns the inputs with dicts over task names as vectors, in the sorted order of the names.

    Args:
      given: Inputs by name.
      names: Those of the tasks, where they are known.
      of: Whose these names are.

    Raises:
      ValueError: A name is not a string, two dicts do not have the same names, or an entry is not
        one number.
    """
    of_tasks = ("task_mask", *(name for name, known in INPUTS.items() if known.task_axes == 1))
    named = {n: v for n, v in given.items() if n in of_tasks and isinstance(v, Mapping)}
    found = {name: task_names(name, value) for name, value in named.items()}
    reference = of if names is not None else next(iter(found), "")
    stacked = {}
    for name, of_name in found.items():
        expected = found[reference] if names is None else names
        if of_name != expected:
            raise ValueError(
                f"expected {name} to have the task names of {reference}, {list(expected)}, got "
                f"{list(of_name)}; give every dict the same names"
            )
        stacked[name] = _stack(name, named[name], of_name)
    return given | stacked


def _stack(name: str, named: Mapping[str, Any], names: tuple[str, ...]) -> jax.Array:
    try:
        values = [jnp.asarray(named[task]) for task in names]
    except (TypeError, ValueError):
        values = []
    shapes = {value.shape for value in values}
    # An entry over examples, each of which has a loss of every name, is as good as a number.
    if len(shapes) != 1 or len(next(iter(shapes))) > 1:
        got = [getattr(named[task], "shape", type(named[task]).__name__) for task in names]
        raise ValueError(
            f"expected one number per task name in {name}, got {dict(zip(names, got, strict=True))}"
            "; average over the batch"
        )
    return jnp.stack(values, axis=-1).reshape(-1)


def names_of(what: str, value: Any) -> tuple[str, ...] | None:
    """Returns the names of the tasks in their order, None of a vector without names."""
    return task_names(what, value) if isinstance(value, Mapping) else None


def check_names(rule: Rule | None, names: tuple[str, ...] | None) -> None:
    """Raises a ValueError if the losses have other names than the preference of the rule."""
    expected = getattr(rule, "names", None)
    if expected is not None and names is not None and names != expected:
        raise ValueError(
            f"expected losses with the task names of the preference of {rule and rule.name}, "
            f"{list(expected)}, got {list(names)}; give both the same names"
        )


def task_names(what: str, named: Mapping[Any, Any]) -> tuple[str, ...]:
    """Returns the names of the tasks in their order, which is sorted.

    Raises:
      ValueError: There are none, or one is not a string.
    """
    if not named or not all(isinstance(name, str) for name in named):
        raise ValueError(
            f"expected {what} to be a dict from task names, strings, to numbers, got the keys "
            f"{list(named)}; name every task by a string"
        )
    return tuple(sorted(named))


# --- the author's function --------------------------------------------------------------------


def missing_input(name: str, rule: str) -> ValueError:
    """Returns the error of a rule that lacks an input."""
    if name == "gramian":
        return ValueError(
            f"{rule} reads the Gramian: expected one of shape (m, m), got None; take it from "
            "value_and_gramian or jaxmtl.gramian(jacobian)"
        )
    if name == "jacobian":
        return ValueError(
            f"{rule} reads the rows themselves: expected from_rows for a function with jacobian "
            "among its required parameters, got from_weighting; use from_rows, or give it a "
            "default: jacobian=None"
        )
    remedy = f", {INPUTS[name].remedy}" if name in INPUTS and INPUTS[name].remedy else ""
    near = difflib.get_close_matches(name, ("gramian", *INPUTS), 1, 0.75)
    if name not in INPUTS and near:
        remedy = f", or rename the parameter, if it is to be the input {near[0]}"
    return ValueError(
        f"{rule} reads {name}: expected update(..., {name}=...), got none; pass {name} as a "
        f"keyword{remedy}"
    )


def check_weights(weights: Any, m: int, rule: str, stateful: bool) -> None:
    """Raises a ValueError unless a rule returned (m,) weights."""
    if isinstance(weights, tuple) and not stateful:
        raise ValueError(
            f"expected {rule} to return the (m,) weights alone, got a tuple of {len(weights)}; a "
            "function with state gives from_weighting its init="
        )
    if not hasattr(weights, "shape") or jnp.shape(weights) != (m,):
        got = jnp.shape(weights) if hasattr(weights, "shape") else type(weights).__name__
        raise ValueError(
            f"expected {rule} to return weights of shape ({m},), one per task, got {got}; correct "
            "the function given to from_weighting"
        )
