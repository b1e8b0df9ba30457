"""Whether a backward pass is linear in its cotangents, read off its jaxpr.

JAX's own backward passes are; one that a user wrote (`jax.custom_vjp`) may clip, normalize or round
its cotangents. Then a weighted sum of gradients is not the gradient for a weighted cotangent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

# What a value is, as a function of the cotangents; the larger wins where two branches meet.
_ZERO, _LINEAR, _CONSTANT = 0, 1, 2

_UNARY = frozenset(
    (
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "cumsum",
        "device_put",
        "expand_dims",
        "fft",
        "imag",
        "name",
        "neg",
        "optimization_barrier",
        "pvary",
        "real",
        "reduce_sum",
        "reduce_window_sum",
        "reshape",
        "reshard",
        "rev",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "transpose",
    )
)
_SUMS = frozenset(
    (
        "add",
        "add_any",
        "complex",
        "concatenate",
        "dynamic_update_slice",
        "pad",
        "sub",
    )
)
_PRODUCTS = frozenset(("mul", "dot_general", "conv_general_dilated"))
_CALLS = ("jaxpr", "call_jaxpr")


class _NotLinearError(Exception):
    pass


def is_linear(closed: Any, num_constants: int = 0) -> bool:
    """Tells whether the outputs of a jaxpr are linear in its inputs after the first ones."""
    count = len(closed.jaxpr.invars)
    kinds = [_CONSTANT] * num_constants + [_LINEAR] * (count - num_constants)
    try:
        outs = _call(closed, kinds)
    except _NotLinearError:
        return False
    return _CONSTANT not in outs


def pull_is_linear(
    fun: Callable[..., Sequence[jax.Array]], avals: Sequence[Any], wanted: Sequence[bool]
) -> bool:
    """Tells whether the backward pass of a function is linear in the cotangents.

    Args:
      fun: A function of arrays that returns a list.
      avals: The types of its arguments.
      wanted: For each, whether it may be differentiated.
    """
    like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    flags = [
        flag and jnp.issubdtype(x.dtype, jnp.inexact) for flag, x in zip(wanted, like, strict=True)
    ]
    inside = [x for x, flag in zip(like, flags, strict=True) if flag]
    others = [x for x, flag in zip(like, flags, strict=True) if not flag]

    def of_inside(others: list[jax.Array], inside: list[jax.Array]) -> list[jax.Array]:
        sides = iter(others), iter(inside)
        outs = fun(*(next(sides[flag]) for flag in flags))
        return [x for x in outs if jnp.issubdtype(x.dtype, jnp.inexact)]

    def pull(others: list[jax.Array], inside: list[jax.Array], cotangents: list[jax.Array]) -> Any:
        return jax.vjp(lambda inside: of_inside(others, inside), inside)[1](cotangents)

    cotangents = jax.eval_shape(of_inside, others, inside)
    try:
        closed = jax.make_jaxpr(pull)(others, inside, cotangents)
    except Exception:  # A rule may refuse more inputs than are differentiated in the end.
        return False
    return is_linear(closed, len(like))


def _require(condition: bool) -> None:
    if not condition:
        raise _NotLinearError


def _call(body: Any, ins: Sequence[int]) -> list[int]:
    """Returns what the outputs of a jaxpr are, closed or open."""
    if isinstance(body, jex.ClosedJaxpr):
        return _outputs(body.jaxpr, [*[_CONSTANT] * len(body.consts), *ins])
    return _outputs(body, ins)


def _outputs(jaxpr: Any, kinds: Sequence[int]) -> list[int]:
    """Returns what the outputs of an open jaxpr are, given its constants and inputs."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], kinds, strict=True))

    def read(atom: Any) -> int:
        if isinstance(atom, jex.Literal):
            return _ZERO if np.all(np.asarray(atom.val) == 0) else _CONSTANT
        return env[atom]

    for eqn in jaxpr.eqns:
        found = _equation(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, ins: list[int]) -> list[int]:
    name, params, num_outs = eqn.primitive.name, eqn.params, len(eqn.outvars)
    body = next((params[key] for key in _CALLS if key in params), None)
    if name == "scan":
        return _scan(params, ins)
    if name == "while":
        return _while(params, ins)
    if name == "cond":
        _require(ins[0] != _LINEAR)
        branches = [_call(branch, ins[1:]) for branch in params["branches"]]
        return [_meet(found) for found in zip(*branches, strict=True)]
    if body is not None and len(getattr(body, "jaxpr", body).invars) == len(ins):
        return _call(body, ins)
    if name in _UNARY:
        return [max(ins)] * num_outs if len(ins) == 1 else ins
    if name in _SUMS:
        return [_meet(ins[:2] if name == "dynamic_update_slice" else ins)]
    if name == "select_n":
        _require(ins[0] != _LINEAR)
        return [_meet(ins[1:])]
    if name in ("gather", "dynamic_slice", "select_and_scatter_add"):
        _require(_LINEAR not in ins[1:])
        return [ins[0]]
    if name == "scatter-add":
        _require(ins[1] != _LINEAR)
        return [_meet([ins[0], ins[2]])]
    if name in _PRODUCTS:
        _require(ins.count(_LINEAR) < 2)
        return [_ZERO if _ZERO in ins else min(ins)]
    if name == "triangular_solve":
        ins = ins[::-1]
    if name in ("div", "triangular_solve"):
        _require(ins[1] != _LINEAR)
        return [ins[0]]
    _require(_LINEAR not in ins)
    return [_CONSTANT] * num_outs


def _meet(kinds: Sequence[int]) -> int:
    """Returns what a sum of values is, or one of several: linear beside constants is neither."""
    _require(not (_LINEAR in kinds and _CONSTANT in kinds))
    return max(kinds, default=_ZERO)


def _repeat(body: Callable[[list[int]], list[int]], carry: list[int]) -> list[int]:
    """Returns what a carry is after any number of steps."""
    while True:
        after = [_meet(pair) for pair in zip(carry, body(carry), strict=True)]
        if after == carry:
            return carry
        carry = after


def _scan(params: Any, ins: list[int]) -> list[int]:
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, start = ins[:num_consts], ins[num_consts : num_consts + num_carry]

    def step(carry: list[int]) -> list[int]:
        return _call(params["jaxpr"], [*consts, *carry, *ins[num_consts + num_carry :]])

    carry = _repeat(lambda carry: step(carry)[:num_carry], start)
    return [*carry, *step(carry)[num_carry:]]


def _while(params: Any, ins: list[int]) -> list[int]:
    of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
    consts, start = ins[of_cond : of_cond + of_body], ins[of_cond + of_body :]
    carry = _repeat(lambda c: _call(params["body_jaxpr"], [*consts, *c]), start)
    # A condition that depends on a cotangent is computed by a comparison, which is not linear.
    found = _call(params["cond_jaxpr"], [*ins[:of_cond], *carry])
    _require(_LINEAR not in found)
    return carry
