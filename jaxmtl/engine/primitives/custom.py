"""Derivatives that a user wrote: the factors are read off the backward pass.

Where the gradient of the parameter is a matrix product, or an outer product written out, its two
operands are the factors, whatever they are made of.
"""

import math
from typing import Any

import jax
import jax.extend.core as jex

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import PARAM, Use, as_function

# For each axis of a gradient, the axis of what it was made from; none for axes of length one.
Axes = dict[int, int]


def _backward(use: Use) -> Any:
    """Returns the jaxpr of the gradient of the one PARAM operand, for one example."""
    position = [v.kind for v in use.ins].index(PARAM)

    def pull(ins: list[jax.Array], cotangents: list[jax.Array]) -> jax.Array:
        def of_param(param: jax.Array) -> list[jax.Array]:
            outs = use.fun(*ins[:position], param, *ins[position + 1 :])
            return [outs[k] for k in use.tapped]

        return jax.vjp(of_param, ins[position])[1](cotangents)[0]

    ins, cotangents = (
        [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        for avals in ([v.aval for v in use.ins], use.taps)
    )
    return jax.make_jaxpr(pull)(ins, cotangents)


def _factors(use: Use) -> Factors | None:
    """Returns the factors of a use outside loops, with the function that computes them."""
    if len(use.params) != 1 or use.loops or use.params[0].loops:
        return None
    closed = _backward(use)
    made = {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.outvars}
    gradient = closed.jaxpr.outvars[0]
    shape = use.params[0].aval.shape
    root, axes = _source(made, gradient, {i: i for i, n in enumerate(shape) if n != 1}, False)
    eqn = made.get(root)
    if eqn is None or any(isinstance(v, jex.Literal) for v in eqn.invars):
        return None
    if eqn.primitive.name == "dot_general":
        found = _of_product(eqn, axes)
    elif eqn.primitive.name == "mul":
        found = _of_outer(made, eqn, axes)
    else:
        found = None
    if found is None:
        return None
    (x, y), (shared, left, right), positions = found
    jaxpr = jex.ClosedJaxpr(closed.jaxpr.replace(outvars=[x, y]), closed.consts)
    compute = as_function(jaxpr)
    return Factors(shared, left, right, positions=positions, compute=compute)


def _source(
    made: dict[Any, Any], var: Any, axes: Axes, through_broadcasts: bool
) -> tuple[Any, Axes]:
    """Returns what a value is a rearrangement of, and where its axes are there."""
    while not isinstance(var, jex.Literal) and var in made:
        eqn = made[var]
        name, params = eqn.primitive.name, eqn.params
        operand = eqn.invars[0]
        before = [i for i, n in enumerate(getattr(operand.aval, "shape", ())) if n != 1]
        after = [i for i, n in enumerate(var.aval.shape) if n != 1]
        if name in ("convert_element_type", "copy", "copy_p"):
            pass
        elif name == "transpose":
            axes = {a: params["permutation"][i] for a, i in axes.items()}
        elif name in ("reshape", "squeeze", "expand_dims") and [
            operand.aval.shape[i] for i in before
        ] == [var.aval.shape[i] for i in after]:
            to = dict(zip(after, before, strict=True))
            axes = {a: to[i] for a, i in axes.items() if i in to}
        elif name == "broadcast_in_dim" and through_broadcasts and len(eqn.invars) == 1:
            dims = params["broadcast_dimensions"]
            to = {d: i for i, d in enumerate(dims) if i in before}
            axes = {a: to[i] for a, i in axes.items() if i in to}
        else:
            break
        var = operand
    return var, axes


def _of_product(eqn: Any, axes: Axes) -> Any:
    (of_x, of_y), (batch_x, batch_y) = eqn.params["dimension_numbers"]
    if sorted(range(len(of_x)), key=lambda i: of_x[i]) != sorted(
        range(len(of_y)), key=lambda i: of_y[i]
    ):
        return None
    x, y = eqn.invars
    free_x = [i for i in range(x.aval.ndim) if i not in (*of_x, *batch_x)]
    free_y = [i for i in range(y.aval.ndim) if i not in (*of_y, *batch_y)]
    count = len(batch_x)
    shared, left, right = [], [], []
    for a, i in axes.items():
        if i < count:
            shared.append((a, batch_x[i], batch_y[i]))
        elif i < count + len(free_x):
            left.append((a, free_x[i - count]))
        else:
            right.append((a, free_y[i - count - len(free_x)]))
    positions = math.prod(x.aval.shape[i] for i in of_x)
    return (x, y), (tuple(shared), tuple(left), tuple(right)), positions


def _of_outer(made: dict[Any, Any], eqn: Any, axes: Axes) -> Any:
    whole = {i: i for i in axes.values()}
    (x, in_x), (y, in_y) = (_source(made, v, whole, True) for v in eqn.invars)
    if isinstance(x, jex.Literal) or isinstance(y, jex.Literal) or set(in_x) == set(in_y):
        return None
    if (
        set(in_x) | set(in_y) != set(whole)
        or not set(whole) - set(in_x)
        or not set(whole) - set(in_y)
    ):
        return None
    shared = tuple((a, in_x[i], in_y[i]) for a, i in axes.items() if i in in_x and i in in_y)
    left = tuple((a, in_x[i]) for a, i in axes.items() if i not in in_y)
    right = tuple((a, in_y[i]) for a, i in axes.items() if i not in in_x)
    return (x, y), (shared, left, right), 1


RULES = {"custom_vjp_call": Primitive(factors=_factors)}
