"""Losses that are stacked early and then scaled, masked or averaged, one by one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.pieces import (
    CALLS,
    inputs_of,
    opened,
    outputs_of,
    pieces_of,
    reads,
    value_of,
)
from jaxmtl.linalg import explicit_sharding

STACKED = ("stack", "concatenate")
_MOVED = ("broadcast_in_dim", "transpose")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
# fmt: off
_ENTRYWISE = frozenset((
    "abs", "add", "add_any", "clamp", "convert_element_type", "copy", "cos", "cosh", "div", "erf",
    "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg",
    "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tan", "tanh",
))
# fmt: on


def stacked_last(closed: Any, leaves: Sequence[jax.Array]) -> Any:
    """Returns a traced function whose losses are stacked by its last step, where that is possible.

    ``jnp.mean(jnp.stack(per_example, -1), 0) * weights`` becomes the stack of what each task has of
    it, so that it can be seen which layers one task alone depends on.

    Args:
      closed: ``leaves -> ((m,) losses, *others)``, traced.
      leaves: Its inputs.
    """
    if closed.out_avals[0].shape == (1,):
        return closed
    while not closed.jaxpr.effects:
        axes, calls = _stacked_along(closed.jaxpr)
        if not calls:
            break
        closed = opened(closed, leaves, calls)
    else:
        return closed
    losses = closed.jaxpr.outvars[0]
    made = next((eqn for eqn in closed.jaxpr.eqns if losses in eqn.outvars), None)
    if made is None or axes.get(losses) != 0 or made.primitive.name in STACKED:
        return closed
    found = _one_by_one(closed, leaves, axes)
    same = zip(found.out_avals, closed.out_avals, strict=True)
    return found if all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in same) else closed


def _stacked_along(jaxpr: Any) -> tuple[dict[Any, int], list[Any]]:
    """Returns the axes along which variables are stacked, and compiled calls to look into.

    These lie between a stack and the losses, or may hold the stack.
    """
    m = jaxpr.outvars[0].aval.shape[0]
    axes: dict[Any, int] = {}
    behind = set() if isinstance(jaxpr.outvars[0], jex.Literal) else {jaxpr.outvars[0]}
    names = (*STACKED, *_MOVED, *_REDUCTIONS, *_ENTRYWISE, *CALLS)
    for eqn in reversed(jaxpr.eqns):
        if eqn.primitive.name in names and not behind.isdisjoint(eqn.outvars):
            behind.update(reads(eqn))
    calls = []
    for eqn in jaxpr.eqns:
        axis = _axis_of(eqn, axes)
        if axis is not None and eqn.outvars[0].aval.shape[axis] == m:
            axes[eqn.outvars[0]] = axis
        is_between = eqn.primitive.name in CALLS and not behind.isdisjoint(eqn.outvars)
        if is_between and (any(v in axes for v in reads(eqn)) or _has_stack(eqn)):
            calls.append(eqn)
    return axes, calls


def _has_stack(call: Any) -> bool:
    eqns = call.params["jaxpr"].jaxpr.eqns
    if any(eqn.primitive.name in STACKED for eqn in eqns):
        return True
    return any(_has_stack(eqn) for eqn in eqns if eqn.primitive.name in CALLS)


def _axis_of(eqn: Any, axes: dict[Any, int]) -> int | None:
    """Returns the axis along which the result of an equation is stacked."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stack":
        return int(params["axis"])
    if name == "concatenate":
        axis = int(params["dimension"])
        return axis if all(v.aval.shape[axis] == 1 for v in eqn.invars) else None
    if params.get("out_sharding") is not None or params.get("sharding") is not None:
        return None
    if any(v in axes and explicit_sharding(v.aval) for v in reads(eqn)):
        return None
    known = {axes[v] for v in reads(eqn) if v in axes}
    if len(known) != 1:
        return None
    (axis,) = known
    if name in _REDUCTIONS:
        return None if axis in params["axes"] else axis - sum(a < axis for a in params["axes"])
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][axis]) if len(eqn.invars) == 1 else None
    if name == "transpose":
        return int(params["permutation"].index(axis))
    ndim = eqn.outvars[0].aval.ndim
    if name not in _ENTRYWISE or any(v.aval.ndim not in (0, ndim) for v in eqn.invars):
        return None
    return None if any(explicit_sharding(v.aval) for v in eqn.invars) else axis


def _one_by_one(closed: Any, leaves: Sequence[jax.Array], axes: dict[Any, int]) -> Any:
    """Returns the function with the losses made one by one and stacked at the end."""
    jaxpr = closed.jaxpr
    wanted, last = {jaxpr.outvars[0]}, []
    for eqn in reversed(jaxpr.eqns):
        v = eqn.outvars[0] if eqn.outvars else None
        if v in wanted and v in axes:
            last.append(eqn)
            wanted.update(x for x in reads(eqn) if eqn.primitive.name not in STACKED)
    last.reverse()
    read = {x for eqn in last for x in reads(eqn)}
    (whole,) = pieces_of(jaxpr, [jaxpr.eqns], read)

    def one_by_one(*leaves: jax.Array) -> list[jax.Array]:
        values = inputs_of(closed, leaves)
        whole.add_to(values)
        losses = []
        for i in range(jaxpr.outvars[0].aval.shape[0]):
            found: dict[Any, jax.Array] = {}  # of task i
            for eqn in last:
                axis = axes[eqn.outvars[0]]
                if eqn.primitive.name in STACKED:
                    x = jnp.asarray(value_of(eqn.invars[i], values))
                    found[eqn.outvars[0]] = x if eqn.primitive.name == "stack" else x.squeeze(axis)
                    continue
                given = [
                    found[x]
                    if not isinstance(x, jex.Literal) and x in found
                    else _slice(value_of(x, values), axis, i)
                    for x in eqn.invars
                ]
                found[eqn.outvars[0]] = eqn.primitive.bind(*given, **_without(eqn, axes))
            losses.append(found[jaxpr.outvars[0]])
        return [jnp.stack(losses), *outputs_of(jaxpr, values)[1:]]

    return jax.make_jaxpr(one_by_one)(*leaves)


def _without(eqn: Any, axes: dict[Any, int]) -> dict[str, Any]:
    """Returns the parameters of an equation for operands and a result without the stacked axis."""
    name, params, axis = eqn.primitive.name, eqn.params, axes[eqn.outvars[0]]

    def fewer(numbers: Sequence[int], gone: int) -> tuple[int, ...]:
        return tuple(a - (a > gone) for a in numbers if a != gone)

    if name in _REDUCTIONS:
        return params | {"axes": fewer(params["axes"], axes[eqn.invars[0]])}
    if name == "transpose":
        return params | {"permutation": fewer(params["permutation"], axes[eqn.invars[0]])}
    if name == "broadcast_in_dim":
        shape = params["shape"][:axis] + params["shape"][axis + 1 :]
        dimensions = fewer(params["broadcast_dimensions"], axis)
        return params | {"shape": shape, "broadcast_dimensions": dimensions}
    return params


def _slice(x: Any, axis: int, i: int) -> Any:
    """Returns what task i reads of an operand: scalars and axes of length one are for all."""
    if not jnp.ndim(x):
        return x
    return lax.index_in_dim(x, 0 if jnp.shape(x)[axis] == 1 else i, axis, keepdims=False)
