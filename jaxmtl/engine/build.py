"""Reads a ``Program`` off a jaxpr.

Calls that receive parameters (jit, remat, scan) are opened, so that uses are single primitives;
PARAM values computed inside a loop are hoisted out of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

from jaxmtl.engine import linearity, scales
from jaxmtl.engine.primitives import experts
from jaxmtl.engine.program import (
    CONST,
    DATA,
    FROZEN,
    PARAM,
    Call,
    Loop,
    Program,
    Scan,
    Use,
    Value,
    as_function,
    from_params,
    is_float,
)

# Calls whose body means the same thing inline; the name of the parameter that holds the body.
_INLINE = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}


REMAT = ("remat2", "checkpoint", "remat")

# What data enter a network through, if not as an argument.
_OF_DATA = frozenset(("dot_general", "conv_general_dilated", "gather", "scan", "while", "cond"))


def _single_equation(
    eqn: Any, debug_info: Any
) -> tuple[Callable[..., Sequence[jax.Array]], list[Any], list[Any]]:
    """Returns one equation as a function, with the variables it reads and writes."""
    reads = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))
    writes = [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    about = debug_info._replace(arg_names=("",) * len(reads), result_paths=("",) * len(writes))
    jaxpr = jex.Jaxpr([], reads, writes, [eqn], eqn.effects, about)
    return as_function(jex.ClosedJaxpr(jaxpr, [])), reads, writes


def _is_opaque(eqn: Any, debug_info: Any, ins: Sequence[Value] = ()) -> bool:
    """Tells whether an equation has a backward pass that must see what `jax.grad` would show it.

    It may not be linear in the cotangent, or ask which of its inputs are differentiated.

    Args:
      eqn: The equation.
      debug_info: Of the jaxpr it stands in.
      ins: What it reads, as far as it is known here.
    """
    name = eqn.primitive.name
    if name == "custom_jvp_call":
        return bool(eqn.params["symbolic_zeros"])
    if name == "custom_vjp_call":
        if eqn.params["symbolic_zeros"]:
            return True
        fun, reads, _ = _single_equation(eqn, debug_info)
        wanted = [v.kind in (PARAM, DATA) for v in ins] or [True] * len(reads)
        return not linearity.pull_is_linear(fun, [v.aval for v in reads], wanted)
    bodies = [getattr(body, "jaxpr", body) for body in jex.jaxprs_in_params(eqn.params)]
    return any(_is_opaque(inner, body.debug_info) for body in bodies for inner in body.eqns)


# Finite with finite derivatives, wherever their operands are.
_TAME = frozenset(
    (
        "add",
        "broadcast_in_dim",
        "concatenate",
        "conv_general_dilated",
        "convert_element_type",
        "copy",
        "cos",
        "dot_general",
        "dynamic_slice",
        "erf",
        "gather",
        "logistic",
        "max",
        "min",
        "mul",
        "neg",
        "pad",
        "reduce_sum",
        "reshape",
        "rev",
        "select_n",
        "sin",
        "slice",
        "squeeze",
        "stop_gradient",
        "sub",
        "tanh",
        "transpose",
    )
)


def _is_tame(eqn: Any) -> bool:
    """Tells whether all branches of a `lax.cond` may run where one is meant to.

    A branch that is not taken must neither have effects nor a derivative that is not finite: times
    a cotangent of zero it would be NaN.
    """
    bodies = [getattr(body, "jaxpr", body) for body in jex.jaxprs_in_params(eqn.params)]
    inner = [e for body in bodies for e in body.eqns]
    return not eqn.effects and all(
        e.primitive.name in _TAME or (e.primitive.name in _INLINE and _is_tame(e)) for e in inner
    )


def _has_state(jaxpr: Any) -> bool:
    """Tells whether a jaxpr reads or writes mutable arrays (`jax.new_ref`)."""
    for eqn in jaxpr.eqns:
        if any(hasattr(v.aval, "inner_aval") for v in (*eqn.invars, *eqn.outvars)):
            return True
        if eqn.primitive.name != "pallas_call" and any(
            _has_state(getattr(body, "jaxpr", body)) for body in jex.jaxprs_in_params(eqn.params)
        ):
            return True
    return False


def _identity(x: jax.Array) -> list[jax.Array]:
    return [x]


def _select(index: jax.Array, *cases: jax.Array) -> list[jax.Array]:
    return [lax.select_n(index, *cases)]


class _Builder:
    def __init__(self, closed_over: Sequence[Value] = (), *, splits: bool = False) -> None:
        self.splits = splits  # whether scaled matrices are used without their scales
        self.uses: list[Use] = []
        self.chosen: dict[Value, Use] = {}  # slices of tables, by the lookup they come from
        # Constants that are more likely data than part of a function of the parameters.
        self.closed_over: dict[Value, bool] = dict.fromkeys(closed_over, True)

    def is_closed_over(self, value: Value) -> bool:
        """Tells whether a constant is made of what the function closes over."""
        stack = [value]
        while stack:
            v = stack[-1]
            sources = v.origin[0].ins if isinstance(v.origin, tuple) else ()
            missing = [u for u in sources if u not in self.closed_over]
            if v in self.closed_over or not missing:
                self.closed_over.setdefault(v, any(self.closed_over[u] for u in sources))
                stack.pop()
            else:
                stack.extend(missing)
        return self.closed_over[value]

    def inline(
        self, jaxpr: Any, inputs: Sequence[Value], steps: list[Any], loops: tuple[Loop, ...]
    ) -> tuple[Value, ...]:
        """Appends the equations of an open jaxpr to ``steps``, and returns its outputs."""
        env: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, jex.Literal):
                return Value(atom.aval, CONST, literal=atom.val)
            return env[atom]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            if self.closed_over and eqn.primitive.name in _OF_DATA:
                for var, v in zip(eqn.invars, ins, strict=True):
                    if v.kind == CONST and v.literal is None and self.is_closed_over(v):
                        env[var] = self.as_data(v, v.aval, steps, loops)
                ins = [read(v) for v in eqn.invars]
            has_param = any(v.kind == PARAM for v in ins)
            has_data = any(v.kind == DATA for v in ins)
            name = eqn.primitive.name
            if has_param and name in _INLINE:
                body = eqn.params[_INLINE[name]]
                if isinstance(body, jex.ClosedJaxpr):
                    consts = [self.constant(c) for c in body.consts]
                    body = body.jaxpr
                else:
                    consts = []
                outs = self.inline(body, [*consts, *ins], steps, loops)
            elif has_param and has_data and name == "scan":
                outs = self.scan(eqn, ins, steps, loops)
            elif has_param and name == "cond" and ins[0].kind == DATA and _is_tame(eqn):
                outs = self.branches(eqn, ins, steps, loops)
            else:
                fun, reads, writes = _single_equation(eqn, jaxpr.debug_info)
                for var, out in zip(
                    writes,
                    self.call(
                        fun,
                        [env[v] for v in reads],
                        [v.aval for v in writes],
                        name,
                        eqn,
                        steps,
                        loops,
                        jaxpr.debug_info,
                    ),
                    strict=True,
                ):
                    env[var] = out
                continue
            for var, out in zip(eqn.outvars, outs, strict=True):
                if not isinstance(var, jex.DropVar):
                    env[var] = out
        return tuple(read(v) for v in jaxpr.outvars)

    def is_product_with_chosen(self, ins: Sequence[Value]) -> bool:
        """Tells whether a product is one of data with a matrix from a table."""
        sides = [k for k, v in enumerate(ins) if v in self.chosen]
        if len(sides) != 1 or len(ins) != 2 or ins[1 - sides[0]].kind != DATA:
            return False
        return sum(n != 1 for n in ins[sides[0]].aval.shape) > 1

    def product_with_chosen(
        self, fun: Callable[..., Sequence[jax.Array]], ins: Sequence[Value]
    ) -> tuple[Callable[..., Sequence[jax.Array]], tuple[Value, ...], Use, int]:
        """Returns a product with a slice of a table as a function of the table itself."""
        side = 0 if ins[0] in self.chosen else 1
        inner, shape = self.chosen[ins[side]], ins[side].aval.shape

        def product(*args: jax.Array) -> Sequence[jax.Array]:
            matrix = inner.fun(*args[:-1])[0].reshape(shape)
            return fun(matrix, args[-1]) if side == 0 else fun(args[-1], matrix)

        return product, (*inner.ins, ins[1 - side]), inner, side

    def stateful(
        self, fun: Callable[..., Sequence[jax.Array]], ins: Sequence[Value], avals: Sequence[Any]
    ) -> Use:
        """Appends the one use of a program with mutable arrays: only JAX knows what they hold."""
        outs = tuple(Value(aval, DATA) for aval in avals)
        tapped = tuple(i for i, aval in enumerate(avals) if is_float(aval))
        use = Use(fun, tuple(ins), outs, "mutable arrays", tapped=tapped, probed=True)
        self.uses.append(use)
        return use

    @staticmethod
    def constant(value: jax.Array) -> Value:
        return Value(jax.typeof(value), CONST, literal=value)

    def call(
        self,
        fun: Callable[..., Sequence[jax.Array]],
        ins: Sequence[Value],
        avals: Sequence[Any],
        name: str,
        eqn: Any,
        steps: list[Any],
        loops: tuple[Loop, ...],
        debug_info: Any = None,
    ) -> tuple[Value, ...]:
        kinds = {v.kind for v in ins}
        if name == "dot_general" and self.is_product_with_chosen(ins):
            fun, ins, inner, side = self.product_with_chosen(fun, ins)
            product = (Value(avals[0], DATA),)
            use = Use(fun, ins, product, experts.NAME, eqn, len(self.uses), loops, (0,))
            use.inner, use.side = inner, side
            self.uses.append(use)
            steps.append(use)
            return product
        if DATA in kinds or (name == "identity"):
            outs = tuple(Value(aval, DATA) for aval in avals)
            tapped = tuple(i for i, aval in enumerate(avals) if is_float(aval))
            if PARAM in kinds and tapped and name != "stop_gradient":
                probed = eqn is not None and _is_opaque(eqn, debug_info, ins)
                use = Use(fun, tuple(ins), outs, name, eqn, len(self.uses), loops, tapped, probed)
                split = scales.split(use) if self.splits and not probed else None
                if split is not None:
                    return (self.scaled(use, split, steps),)
                self.uses.append(use)
                steps.append(use)
                if name in ("dynamic_slice", "gather") and experts.chosen_axis(use) is not None:
                    self.chosen[outs[0]] = use
            else:
                steps.append(Call(fun, tuple(ins), outs, name, eqn))
                if name in ("squeeze", "reshape") and ins[0] in self.chosen:
                    shapes = ([n for n in v.aval.shape if n != 1] for v in (ins[0], outs[0]))
                    if len(set(map(tuple, shapes))) == 1:
                        self.chosen[outs[0]] = self.chosen[ins[0]]
            return outs
        varying = tuple(
            sorted({loop for v in ins for loop in v.loops}, key=lambda loop: loop.depth)
        )
        step = Call(fun, tuple(ins), (), name, eqn)
        bent = any(v.bent for v in ins) or (PARAM in kinds and _is_opaque(eqn, debug_info, ins))
        out_values = []
        for position, aval in enumerate(avals):
            if kinds <= {CONST}:
                kind = CONST
            elif PARAM in kinds and is_float(aval) and name != "stop_gradient":
                kind = PARAM
            else:
                kind = FROZEN
            out_values.append(Value(aval, kind, varying, (step, position), bent=bent))
        step.outs = tuple(out_values)
        if kinds <= {CONST}:
            steps.append(step)
        return step.outs

    def scaled(self, use: Use, split: scales.Split, steps: list[Any]) -> Value:
        """Appends the use of a matrix times small values, these beside the matrix."""

        def scale(data: Value, scaling: scales.Scaling) -> tuple[Value, Use | None]:
            before = len(self.uses)
            ins = [data, scaling.value]
            (out,) = self.call(
                scaling.apply, ins, [data.aval], scaling.name, None, steps, use.loops
            )
            return out, self.uses[-1] if len(self.uses) > before else None

        new: dict[Value, Value] = {use.params[0]: split.matrix}
        made = None
        for scaling in split.of_input:
            new[use.data[0]], made = scale(new.get(use.data[0], use.data[0]), scaling)
        ins = [new.get(v, v) for v in use.ins]
        first = len(self.uses)
        (out,) = self.call(use.fun, ins, [use.outs[0].aval], use.name, use.eqn, steps, use.loops)
        product = self.uses[first] if len(self.uses) > first else None
        for scaling in split.of_output:
            out, after = scale(out, scaling)
            if product is not None and product.after is None:
                product.after = after
        if product is not None:
            product.before = made
        return out

    def as_data(self, value: Value, aval: Any, steps: list[Any], loops: tuple[Loop, ...]) -> Value:
        """Returns the value as DATA: a PARAM that enters a carry is used there."""
        if value.kind == DATA:
            return value
        return self.call(_identity, [value], [aval], "identity", None, steps, loops)[0]

    def branches(
        self, eqn: Any, ins: list[Value], steps: list[Any], loops: tuple[Loop, ...]
    ) -> tuple[Value, ...]:
        """Opens a `lax.cond` on the example: mapped over examples, all branches run anyway."""
        found = []
        for branch in eqn.params["branches"]:
            consts = [self.constant(c) for c in branch.consts]
            found.append(self.inline(branch.jaxpr, [*consts, *ins[1:]], steps, loops))
        outs: list[Value] = []
        for var, *cases in zip(eqn.outvars, *found, strict=True):
            cases = [self.as_data(case, var.aval, steps, loops) for case in cases]
            operands = [ins[0], *cases]
            outs += self.call(_select, operands, [var.aval], "select_n", None, steps, loops)
        return tuple(outs)

    def scan(
        self, eqn: Any, ins: list[Value], steps: list[Any], loops: tuple[Loop, ...]
    ) -> tuple[Value, ...]:
        closed, length = eqn.params["jaxpr"], eqn.params["length"]
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        consts, init, xs = (
            ins[:num_consts],
            ins[num_consts : num_consts + num_carry],
            ins[num_consts + num_carry :],
        )
        invars = closed.jaxpr.invars
        loop = Loop(length, len(loops))
        inner = (*loops, loop)
        start = tuple(self.as_data(v, v.aval, steps, loops) for v in init)
        carry = [Value(var.aval, DATA) for var in invars[num_consts : num_consts + num_carry]]
        slices = [
            Value(var.aval, v.kind)
            if v.kind == DATA
            else Value(var.aval, v.kind, (*v.loops, loop), v, bent=v.bent)
            for v, var in zip(xs, invars[num_consts + num_carry :], strict=True)
        ]
        body: list[Any] = []
        first_use = len(self.uses)
        names = {e.primitive.name for e in closed.jaxpr.eqns}
        body_consts = [self.constant(c) for c in closed.consts]
        found = self.inline(closed.jaxpr, [*body_consts, *consts, *carry, *slices], body, inner)
        outs = tuple(
            self.as_data(v, var.aval, body, inner)
            for v, var in zip(found, closed.jaxpr.outvars, strict=True)
        )
        results = tuple(Value(var.aval, DATA) for var in eqn.outvars)
        plain = [(v, s) for v, s in zip(xs, slices, strict=True) if not from_params(v)]
        steps.append(
            Scan(
                loop,
                eqn.params["reverse"],
                eqn.params["unroll"],
                start,
                tuple(carry),
                tuple(v for v, _ in plain),
                tuple(s for _, s in plain),
                body,
                outs[:num_carry],
                outs[num_carry:],
                results,
                tuple(self.uses[first_use:]),
                not names.isdisjoint(REMAT),
            )
        )
        return results


def build(closed: Any, num_leaves: int, is_data: Sequence[bool] | None = None) -> Program:
    """Finds the uses of the first ``num_leaves`` inputs of a traced loss.

    Args:
      closed: A closed jaxpr; its first output is the loss, its inputs are the parameters, then
        what changes from example to example.
      num_leaves: How many of its inputs are parameters.
      is_data: None for the loss of an example, of which scaled matrices are taken apart. For losses
        over one batch, which of the closed-over arrays are data. The others are
        data too where they enter a product, a lookup or a loop.

    Returns:
      The program. Its ``constants`` are the closed-over arrays.
    """
    steps: list[Any] = []
    invars, constvars = closed.jaxpr.invars, closed.jaxpr.constvars
    flags = [False] * len(constvars) if is_data is None else is_data
    constants = [
        Value(var.aval, DATA if flag else CONST) for var, flag in zip(constvars, flags, strict=True)
    ]
    builder = _Builder(() if is_data is None else constants, splits=is_data is None)
    leaves = [Value(var.aval, PARAM, leaf=i) for i, var in enumerate(invars[:num_leaves])]
    data = [Value(var.aval, DATA) for var in invars[num_leaves:]]
    ins = [*constants, *leaves, *data]
    if _has_state(closed.jaxpr):
        avals = [var.aval for var in closed.jaxpr.outvars]

        def everything(*inputs: jax.Array) -> Sequence[jax.Array]:
            consts, inputs = inputs[: len(constants)], inputs[len(constants) :]
            return as_function(jex.ClosedJaxpr(closed.jaxpr, consts))(*inputs)

        use = builder.stateful(everything, ins, avals)
        return Program(tuple(leaves), tuple(constants), tuple(data), [use], use.outs, [use])
    outs = list(builder.inline(closed.jaxpr, ins, steps, ()))
    outs[0] = builder.as_data(outs[0], outs[0].aval, steps, ())
    return Program(tuple(leaves), tuple(constants), tuple(data), steps, tuple(outs), builder.uses)
