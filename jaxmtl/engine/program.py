"""The per-example program: where parameters are used, read off a jaxpr.

Every value of the traced loss is one of four kinds:

* ``CONST``: depends neither on the parameters nor on the example;
* ``PARAM``: a differentiable function of the parameters alone (a leaf, its transpose, W * mask);
* ``FROZEN``: depends on the parameters, but carries no derivative (stop_gradient(W), W > 0);
* ``DATA``: everything else.

An equation that mixes PARAM and DATA operands is a *use*. The cotangents of the outputs of all uses
determine every gradient, and they come from one backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

CONST, PARAM, FROZEN, DATA = "const", "param", "frozen", "data"


@dataclasses.dataclass(eq=False)
class Loop:
    """One opened scan: its number of steps and how many opened scans enclose it."""

    length: int
    depth: int


@dataclasses.dataclass(eq=False)
class Value:
    """One value of the program.

    Attributes:
      aval: shape and dtype, as seen inside the innermost loop.
      kind: CONST, PARAM, FROZEN or DATA.
      loops: for kinds other than DATA, the opened loops its value changes with, outermost first.
        Outside those loops its array has one more leading axis per loop.
      origin: ``(call, position)`` that computes it, or the outer ``Value`` it is one slice of.
      leaf: position among the parameter leaves, for a leaf.
      literal: its value, for a literal.
      bent: whether its cotangent goes back to the leaves by a rule that need not be linear.
    """

    aval: Any
    kind: str
    loops: tuple[Loop, ...] = ()
    origin: tuple[Call, int] | Value | None = None
    leaf: int | None = None
    literal: Any = None
    bent: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape outside all loops."""
        return tuple(loop.length for loop in self.loops) + tuple(self.aval.shape)


@dataclasses.dataclass(eq=False)
class Call:
    """``outs = fun(*ins)``: one equation."""

    fun: Callable[..., Sequence[jax.Array]]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    name: str
    eqn: Any = None


@dataclasses.dataclass(eq=False)
class Use(Call):
    """An equation with PARAM and DATA operands.

    Attributes:
      index: its position in ``Program.uses``.
      loops: the opened loops around it, outermost first.
      tapped: positions of the outputs that carry a derivative.
      probed: whether taps are added to its PARAM operands in place of its outputs: the backward
        pass then gives the rows themselves, by whatever rule a custom derivative has.
      inner: for the product with a matrix from a table, the lookup.
      side: and which operand of the product the matrix is.
      before: the use that makes the DATA operand for this use alone, where there is one.
      after: a use that reads the output.
    """

    index: int = 0
    loops: tuple[Loop, ...] = ()
    tapped: tuple[int, ...] = ()
    probed: bool = False
    inner: Use | None = None
    side: int = 0
    before: Use | None = None
    after: Use | None = None

    @property
    def taps(self) -> tuple[Any, ...]:
        """The types of what its taps are added to, as seen inside the innermost loop."""
        if self.probed:
            return tuple(v.aval for v in self.params)
        return tuple(self.outs[k].aval for k in self.tapped)

    @property
    def params(self) -> tuple[Value, ...]:
        """Its PARAM operands."""
        return tuple(v for v in self.ins if v.kind == PARAM)

    @property
    def data(self) -> tuple[Value, ...]:
        """Its DATA operands, which are its residuals."""
        return tuple(v for v in self.ins if v.kind == DATA)


@dataclasses.dataclass(eq=False)
class Scan:
    """An opened scan; with ``remat``, one whose steps are computed again in the backward pass."""

    loop: Loop
    reverse: bool
    unroll: Any
    init: tuple[Value, ...]
    carry: tuple[Value, ...]
    xs: tuple[Value, ...]
    slices: tuple[Value, ...]
    steps: list[Any]
    carry_outs: tuple[Value, ...]
    ys: tuple[Value, ...]
    outs: tuple[Value, ...]
    uses: tuple[Use, ...]
    remat: bool = False


@dataclasses.dataclass(eq=False)
class Program:
    """A traced function ``(leaves, constants, example) -> outputs`` with its uses marked."""

    leaves: tuple[Value, ...]
    constants: tuple[Value, ...]
    data: tuple[Value, ...]
    steps: list[Any]
    outs: tuple[Value, ...]
    uses: list[Use]


def is_float(aval: Any) -> bool:
    """Tells whether values of this type carry derivatives."""
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def from_params(value: Value) -> bool:
    """Tells whether the value depends on the parameters alone: it is computed outside all loops."""
    return value.kind in (PARAM, FROZEN)


def operands_of(call: Call) -> list[Value]:
    """Returns the operands of an equation in its own order, literals among them."""
    read = dict.fromkeys(v for v in call.eqn.invars if not isinstance(v, jex.Literal))
    values = dict(zip(read, call.ins, strict=True))
    return [
        Value(v.aval, CONST, literal=v.val) if isinstance(v, jex.Literal) else values[v]
        for v in call.eqn.invars
    ]


def unbroadcast(value: Value) -> tuple[Value, dict[int, int]]:
    """Returns what a value is a broadcast of, and the place of each axis that is not of length one.

    Axes are those inside the innermost loop.
    """
    axes = {i: i for i, n in enumerate(value.aval.shape) if n != 1}
    while isinstance(value.origin, tuple) and value.origin[0].name == "broadcast_in_dim":
        inner, *shape = operands_of(value.origin[0])
        if shape:
            break
        dims = value.origin[0].eqn.params["broadcast_dimensions"]
        axes = {i: axes[d] for i, d in enumerate(dims) if inner.aval.shape[i] != 1 and d in axes}
        value = inner
    return value, axes


def operations(eqn: Any) -> int:
    """Returns the multiplications and additions of the products of an equation."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        size = math.prod(eqn.invars[0].aval.shape[a] for a in contract)
        return 2 * size * math.prod(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        total = 2 * math.prod(eqn.outvars[0].aval.shape) * per_output
        return total // math.prod(params["lhs_dilation"])
    bodies = [getattr(body, "jaxpr", body) for body in jex.jaxprs_in_params(params)]
    found = [sum(map(operations, body.eqns)) for body in bodies]
    if name == "cond":
        return max(found)
    return sum(found) * params.get("length", 1) if name == "scan" else sum(found)


def as_function(closed: Any) -> Callable[..., Sequence[jax.Array]]:
    """Returns a closed jaxpr as a function of its inputs.

    Constants and literals that are arrays of NumPy are arrays of JAX in it: the rule of a custom
    derivative may index them by a traced number.
    """
    literals: list[Any] = []
    added: list[Any] = []
    eqns = []
    for eqn in closed.jaxpr.eqns:
        invars = list(eqn.invars)
        for i, v in enumerate(invars):
            if isinstance(v, jex.Literal) and jnp.ndim(v.val):
                invars[i] = jex.Var(v.aval)
                literals.append(v.val)
                added.append(invars[i])
        eqns.append(eqn.replace(invars=invars))
    jaxpr = closed.jaxpr.replace(constvars=[*closed.jaxpr.constvars, *added], eqns=eqns)

    def fun(*args: jax.Array) -> Sequence[jax.Array]:
        consts = [jnp.asarray(x) for x in (*closed.consts, *literals)]
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))(*args)

    return fun
