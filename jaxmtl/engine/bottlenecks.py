"""Finds what the gradients of parameters are that are used through small values (`small`)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine import paths
from jaxmtl.engine.factors import Factors
from jaxmtl.engine.paths import Part
from jaxmtl.engine.primitives import matmul
from jaxmtl.engine.program import PARAM, Call, Use, Value, operands_of
from jaxmtl.engine.small import Meeting, Small, Spread
from jaxmtl.engine.views import Views

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
_ELEMENTWISE = ("abs", "exp", "integer_pow", "log", "neg", "sign", "square")
_SAME = ("convert_element_type", "copy", "copy_p", "name")


def find(
    uses: Sequence[Use], parts: Sequence[Part], views: Views
) -> tuple[Small, list[Part]] | None:
    """Finds what the gradients of small values are.

    Args:
      uses: Uses that have no parts.
      parts: Those of the other uses of the group.
      views: What values hold.

    Returns:
      What is known of the small values, and further parts: those of a sum of a parameter, or of its
      product with constants. None where a value is not small, or something is not known.
    """
    least = min(math.prod(part.value.shape) for part in parts)
    values = tuple(dict.fromkeys(v for use in uses for v in use.params))
    selections: list[Value] = []
    spreads: list[Spread] = []
    more: list[Part] = []
    stack, seen = list(values), set(values)
    while stack:
        v = stack.pop()
        if v.bent or math.prod(v.shape) >= least:
            return None
        if views.of(v) is not None:
            selections.append(v)
            continue
        if not isinstance(v.origin, tuple):
            return None
        params = [u for u in v.origin[0].ins if u.kind == PARAM]
        if all(math.prod(u.shape) < least for u in params):
            stack.extend(u for u in params if u not in seen)
            seen.update(params)
            continue
        found = _parts_of_sum(v, views)
        spread = None if found else _spread_of(v, views)
        if found:
            more.extend(found)
        elif spread is not None:
            spreads.append(spread)
        else:
            return None
    others = [p.value for p in (*parts, *more)] + [s.value for s in spreads]
    for i, v in enumerate(selections):
        if any(views.overlap(v, w) for w in (*selections[:i], *others)):
            return None
    meetings = [
        _meeting(i, part, j, spread, views)
        for i, part in enumerate((*parts, *more))
        for j, spread in enumerate(spreads)
        if views.overlap(part.value, spread.value)
    ]
    products = [
        (i, j)
        for i, a in enumerate(spreads)
        for j, b in enumerate(spreads[: i + 1])
        if views.overlap(a.value, b.value)
    ]
    related = all(views.relation(spreads[i].value, spreads[j].value) == "same" for i, j in products)
    if None in meetings or not related:
        return None
    sums = dict.fromkeys(part.use for part in more)
    ends = (*selections, *(use.outs[0] for use in sums), *(s.source for s in spreads))
    small = Small(
        tuple(uses),
        values,
        tuple(dict.fromkeys(ends)),
        tuple(selections),
        tuple(sums),
        tuple(spreads),
        tuple(m for m in meetings if m is not None),
        tuple(products),
    )
    return small, more


def _parts_of_sum(source: Value, views: Views) -> list[Part] | None:
    """Returns the parts of a sum of a parameter, or of its product with constants."""
    assert isinstance(source.origin, tuple)
    call, _ = source.origin
    operands = operands_of(call)
    matrix = next(v for v in operands if v.kind == PARAM)
    if matrix.loops != source.loops or len(call.outs) != 1:
        return None
    use = Use(call.fun, call.ins, call.outs, call.name, call.eqn, -1, source.loops, (0,))
    prefix = len(matrix.loops)
    before = [(i, i, i) for i in range(prefix)]
    if call.name == "reduce_sum":
        summed = [prefix + a for a in call.eqn.params["axes"]]
        left = [(a, prefix + i) for i, a in enumerate(summed)]
        kept = [a for a in range(prefix, len(matrix.shape)) if a not in summed]
        right = [(a, prefix + i) for i, a in enumerate(kept)]
        found = Factors(tuple(before), tuple(left), tuple(right), positions=1)
    elif call.name == "dot_general" and [v.kind for v in operands].count(PARAM) == 1:
        side = operands.index(matrix)
        if prefix or operands[1 - side].loops:
            return None
        shapes = [v.aval.shape for v in (matrix, operands[1 - side])]
        dims = call.eqn.params["dimension_numbers"]
        shared, left, right = matmul.axes(dims, side, *map(len, shapes))
        met = math.prod(shapes[1][i] for _, i, *_ in (*shared, *left))
        positions = math.prod(shapes[1]) // max(met, 1)
        found = Factors(tuple(shared), tuple(left), tuple(right), positions=positions)
    else:
        return None
    return paths.parts_of(use, found, views, alone=False)


def _spread_of(source: Value, views: Views) -> Spread | None:
    """Returns what a reduction of elementwise functions gives back, None for other values."""
    assert isinstance(source.origin, tuple)
    call, _ = source.origin
    if call.name not in _REDUCTIONS:
        return None
    (v,) = call.ins
    if v.loops != source.loops:
        return None
    reduced = [len(v.loops) + a for a in call.eqn.params["axes"]]
    places = {a: j for j, a in enumerate(a for a in range(len(v.shape)) if a not in reduced)}
    passed: list[Call] = []
    while views.of(v) is None:
        if not isinstance(v.origin, tuple):
            return None
        passed.append(v.origin[0])
        found = _elementwise(v.origin[0], v)
        if found is None:
            return None
        v, axes = found
        places = {i: places[j] for i, j in axes.items() if j in places}
    names = views.axis_names(v, alone=False)
    if names is None or any(a is None for a, n in zip(names, v.shape, strict=True) if n != 1):
        return None
    own = sorted((names[i] or 0, j) for i, j in places.items() if v.shape[i] != 1)
    is_square = (
        call.name == "reduce_sum"
        and bool(passed)
        and _is_square(passed[0])
        and all(step.name in _SAME for step in passed[1:])
    )
    return Spread(
        source, v, names, tuple(j for _, j in own), tuple(name for name, _ in own), is_square
    )


def _is_square(call: Call) -> bool:
    if call.name == "integer_pow":
        return bool(call.eqn.params["y"] == 2)
    return call.name == "square" or (call.name == "mul" and len(call.ins) == 1)


def _elementwise(call: Call, value: Value) -> tuple[Value, dict[int, int]] | None:
    """Returns the one PARAM operand of an elementwise function or a move, and where its axes go."""
    params = [v for v in call.ins if v.kind == PARAM]
    if len(params) != 1 or params[0].loops != value.loops:
        return None
    operand, prefix = params[0], len(value.loops)
    same = {i: i for i in range(len(value.shape))}
    if call.name in (*_ELEMENTWISE, *_SAME):
        return operand, same
    if call.name in ("mul", "add", "sub", "div") and operand.shape == value.shape:
        return operand, same
    if call.name == "transpose":
        order = call.eqn.params["permutation"]
        moved = {prefix + a: prefix + i for i, a in enumerate(order)}
        return operand, {i: moved.get(i, i) for i in same}
    if call.name in ("reshape", "squeeze", "expand_dims"):
        before, after = ([i for i, n in enumerate(v.shape) if n != 1] for v in (operand, value))
        if [operand.shape[i] for i in before] == [value.shape[i] for i in after]:
            return operand, dict(zip(before, after, strict=True))
    return None


def _meeting(i: int, part: Part, j: int, spread: Spread, views: Views) -> Meeting | None:
    """Returns how an outer product meets what a small value gives back, None if it is not known."""
    if views.relation(part.value, spread.value) != "same" or part.factors.choice is not None:
        return None
    shared, left, right, _ = part.axes()
    fits = [set(spread.own) <= {*shared, *own} for own in (left, right)]
    if spread.is_square and not part.steps and _is_exact(part.use):
        for side, other in ((1, part.use.after), (0, part.use.before)):
            if fits[side] and other is not None:
                return Meeting(i, j, side, True)
    if part.factors.lookup is not None or True not in fits:
        return None
    return Meeting(i, j, 1 if fits[1] else 0, False)


def _is_exact(use: Use) -> bool:
    """Tells whether the products of a layer are as good as those of Gramians."""
    bits = jnp.finfo(use.outs[0].aval.dtype).bits
    precision = use.eqn.params.get("precision", lax.Precision.HIGHEST)
    is_highest = precision in (lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)
    return bits > 32 or (bits == 32 and (is_highest or jax.default_backend() == "cpu"))
