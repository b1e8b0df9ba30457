"""Losses of separate data: one function and one batch per task, differentiated one by one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxmtl import checks, keywords
from jaxmtl.names import Aux

PyTree = Any
# One function of all losses, or one function per task.
Losses = (
    Callable[..., Any]
    | Mapping[str, Callable[..., Any]]
    | tuple[Callable[..., Any], ...]
    | list[Callable[..., Any]]
)


def is_several(losses_fn: Any) -> bool:
    """Tells whether these are several loss functions: a mapping, a tuple or a list."""
    return isinstance(losses_fn, Mapping | tuple | list)


def check_functions(losses_fn: Any, in_axes: Any = None, encoder: Any = None) -> None:
    """Raises a ValueError unless these are loss functions, without options that exclude them."""
    for name, value in (("in_axes", in_axes), ("encoder", encoder)):
        if value is not None:
            raise ValueError(
                f"expected no {name}= with several loss functions, got {name}={value!r}; each has "
                f"its own batch, of any shape: drop {name}, or pass one function"
            )
    if not losses_fn:
        raise ValueError(
            f"expected at least one loss function, got {losses_fn!r} (m = 0); pass one per task"
        )
    if isinstance(losses_fn, Mapping):
        checks.task_names("the loss functions", losses_fn)
    for key, function in _items(losses_fn):
        if not callable(function):
            raise ValueError(
                f"expected a loss function at {key!r}, got {type(function).__name__}; pass the "
                "function loss(params, batch) -> () itself"
            )


def _items(of_tasks: Any) -> list[tuple[Any, Any]]:
    """Returns keys and values of what has one entry per task, in the order of the tasks."""
    if isinstance(of_tasks, Mapping):
        return [(name, of_tasks[name]) for name in sorted(of_tasks)]
    return list(enumerate(of_tasks))


def _batches(losses_fn: Any, args: tuple[Any, ...]) -> list[Any]:
    """Returns the batch of each task.

    Raises:
      ValueError: There is not exactly one argument, or its keys are not those of the functions.
    """
    is_mapping = isinstance(losses_fn, Mapping)
    kind = "a dict" if is_mapping else "a tuple"
    if len(args) != 1:
        raise ValueError(
            f"expected one argument after the parameters with several loss functions, {kind} of "
            f"one batch per task, got {len(args)}; put what a loss reads into its batch"
        )
    (batches,) = args
    if is_mapping:
        if not isinstance(batches, Mapping):
            raise ValueError(
                f"expected a dict of batches with the keys of the loss functions, "
                f"{sorted(losses_fn)}, got {type(batches).__name__}; name every batch after its "
                "loss"
            )
        if set(batches) != set(losses_fn):
            raise ValueError(
                f"expected a batch for each of the loss functions, {sorted(losses_fn)}, got "
                f"{sorted(batches, key=str)}; give both the same keys"
            )
    elif not isinstance(batches, tuple | list) or len(batches) != len(losses_fn):
        got = f"{len(batches)}" if isinstance(batches, tuple | list) else type(batches).__name__
        raise ValueError(
            f"expected a tuple of {len(losses_fn)} batches, one per loss function, got {got}; a "
            "batch that is a tuple is one entry of it"
        )
    return [batch for _, batch in _items(batches)]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["loss", "vjp"], meta_fields=["leaves"]
)
@dataclasses.dataclass
class Task:
    """One loss on its batch, and its gradient.

    Attributes:
      loss: Scalar.
      vjp: ``cotangent -> ([gradient, ...],)``, for the leaves that the loss depends on.
      leaves: Positions of these leaves among the parameters.
    """

    loss: jax.Array
    vjp: Callable[..., Any]
    leaves: tuple[int, ...]

    def pull(self, cotangent: jax.Array) -> dict[int, jax.Array]:
        """Returns the cotangent times the gradient, by leaf."""
        (grads,) = self.vjp(cotangent.astype(self.loss.dtype))
        return dict(zip(self.leaves, grads, strict=True))

    def gradient(self) -> dict[int, jax.Array]:
        """Returns the gradient, by leaf."""
        return self.pull(jnp.ones_like(self.loss))


def evaluate(
    losses_fn: Any,
    has_aux: bool,
    leaves: Sequence[jax.Array],
    treedef: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[list[Task], Aux]:
    """Evaluates each loss once on its own batch.

    Args:
      losses_fn: Mapping or tuple of ``loss(params, batch, **kwargs) -> ()``, or ``-> ((), aux)``.
      has_aux: Whether they return aux.
      leaves: The parameters' leaves.
      treedef: The parameters' structure.
      args: The one argument after them, the batches.
      kwargs: Keywords, each for the losses that name it.

    Returns:
      One `Task` per loss, and the aux of all, in the container of the functions.

    Raises:
      ValueError: Batches do not match the functions, or a loss is not a scalar.
    """
    functions = _items(losses_fn)
    tasks, aux = [], {}
    for (key, function), batch in zip(functions, _batches(losses_fn, args), strict=True):
        taken = keywords.of_function(function, 2)
        given = {name: value for name, value in kwargs.items() if taken.takes(name)}

        def loss_of(
            leaves: list[jax.Array],
            key: Any = key,
            function: Any = function,
            batch: Any = batch,
            given: Any = given,
        ) -> tuple[jax.Array, Any]:
            result = function(jax.tree.unflatten(treedef, leaves), batch, **given)
            return _scalar(key, result, has_aux)

        task, aux[key] = _evaluate_one(loss_of, list(leaves))
        tasks.append(task)
    if isinstance(losses_fn, Mapping):
        return tasks, Aux(aux if has_aux else None, tuple(sorted(losses_fn)))
    return tasks, Aux(tuple(aux.values()) if has_aux else None)


def _scalar(key: Any, result: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    loss, aux = result, None
    if has_aux:
        if not isinstance(loss, tuple) or len(loss) != 2:
            raise ValueError(
                f"expected (loss, aux) of the loss {key!r} with has_aux=True, got "
                f"{type(loss).__name__}; return a pair from every loss, or drop has_aux"
            )
        loss, aux = loss
    if not jax.tree_util.all_leaves([loss]):
        raise ValueError(
            f"expected the loss {key!r} to return a scalar, got {type(loss).__name__}; return one "
            "number, and other outputs with has_aux=True"
        )
    if jnp.shape(loss):
        raise ValueError(
            f"expected the loss {key!r} to return a scalar, got shape {jnp.shape(loss)}; average "
            "over its batch"
        )
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"expected a floating point loss of {key!r}, got {loss.dtype}; return a real number"
        )
    return loss, aux


def _evaluate_one(
    loss_of: Callable[..., tuple[jax.Array, Any]], leaves: list[jax.Array]
) -> tuple[Task, Any]:
    closed, (_, aux) = jax.make_jaxpr(loss_of, return_shape=True)(leaves)
    flat = jex.jaxpr_as_fun(closed)
    touched = tuple(i for i, used in enumerate(_used_by_loss(closed.jaxpr)) if used)

    def loss(inputs: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        full = list(leaves)
        for i, x in zip(touched, inputs, strict=True):
            full[i] = x
        first, *rest = flat(*full)
        return first, rest

    value, vjp, rest = jax.vjp(loss, [leaves[i] for i in touched], has_aux=True)
    return Task(value, vjp, touched), jax.tree.unflatten(jax.tree.structure(aux), rest)


# --- what a loss depends on -------------------------------------------------------------------

# Calls whose body is run as it is, with the name of the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}


def _used_by_loss(jaxpr: Any) -> list[bool]:
    """Tells which inputs have a derivative that reaches the first output."""
    wanted = [i == 0 for i in range(len(jaxpr.outvars))]
    return _used(jaxpr, wanted)


def _is_smooth(atom: Any) -> bool:
    """Tells whether derivatives pass through a variable."""
    return not isinstance(atom, jex.Literal) and jnp.issubdtype(
        getattr(atom.aval, "dtype", bool), jnp.inexact
    )


def _used(jaxpr: Any, wanted: Sequence[bool]) -> list[bool]:
    """Tells which inputs of an open jaxpr have a derivative that reaches a wanted output."""
    variables = [v for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars)]
    if any(hasattr(v.aval, "inner_aval") for v in variables):
        # What is written to a reference is read elsewhere.
        return [_is_smooth(v) for v in jaxpr.invars]
    live = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and _is_smooth(v)}
    for eqn in reversed(jaxpr.eqns):
        out = [v in live for v in eqn.outvars]
        if any(out):
            used = _used_by_equation(eqn, out)
            live.update(v for v, u in zip(eqn.invars, used, strict=True) if u and _is_smooth(v))
    return [v in live for v in jaxpr.invars]


def _used_by_equation(eqn: Any, out: list[bool]) -> list[bool]:
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient":
        return [False]
    if name in _CALLS:
        return _used(_open(params[_CALLS[name]]), out)
    if name == "cond":
        branches = [_used(_open(branch), out) for branch in params["branches"]]
        return [False, *(any(found) for found in zip(*branches, strict=True))]
    if name == "while":
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        found = _used_by_loop(_open(params["body_jaxpr"]), num_body, len(out), out)
        return [*(False,) * num_cond, *found]
    if name == "scan":
        return _used_by_loop(_open(params["jaxpr"]), params["num_consts"], params["num_carry"], out)
    # All others, of which a custom_vjp may give a gradient to any of its inputs.
    return [True] * len(eqn.invars)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _used_by_loop(body: Any, num_consts: int, num_carry: int, out: list[bool]) -> list[bool]:
    """The same of a loop, from (constants, carry, slices) to (carry, rows)."""
    wanted = list(out)
    while True:  # What is used of a carry is so at the end of the step before.
        used = _used(body, wanted)
        carry = used[num_consts : num_consts + num_carry]
        grown = [w or u for w, u in zip(wanted[:num_carry], carry, strict=True)]
        if grown == wanted[:num_carry]:  # Without steps the carry is the result.
            return [*used[:num_consts], *grown, *used[num_consts + num_carry :]]
        wanted[:num_carry] = grown


# --- rows -------------------------------------------------------------------------------------

# Of each leaf: which tasks depend on it, and their gradients (k, *leaf.shape).
Rows = list[tuple[tuple[int, ...], jax.Array | None]]


def stack(grads: Mapping[int, Mapping[int, jax.Array]], num_leaves: int) -> Rows:
    """Stacks gradients, by task and then by leaf, into rows of each leaf without zero rows."""
    rows: Rows = []
    for leaf in range(num_leaves):
        tasks = tuple(i for i in sorted(grads) if leaf in grads[i])
        rows.append((tasks, jnp.stack([grads[i][leaf] for i in tasks]) if tasks else None))
    return rows


def jacobian(tasks: Sequence[Task], leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns all rows of each leaf, ``(m, *leaf.shape)``; those known to be zero cost nothing."""
    grads = [task.gradient() for task in tasks]
    return [
        jnp.stack([grad[i] if i in grad else jnp.zeros_like(leaf) for grad in grads])
        for i, leaf in enumerate(leaves)
    ]
