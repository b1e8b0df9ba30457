"""From a use back to the parameters, with gradients kept as outer products on the way.

A dense layer with the weights ``s * W + A B`` has, for W, the outer product of its inputs and s
times its output cotangents; for A that of its inputs and ``B`` times the cotangents. So sums,
scales along one side, transposes and products with other matrices need no gradient of an example.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.factors import AxisNames, Factor, Factors
from jaxmtl.engine.program import PARAM, Use, Value, operands_of, unbroadcast
from jaxmtl.engine.views import Views

_LEFT, _RIGHT = 0, 1
_ENTRYWISE = ("select_n", "integer_pow", "square", "abs", "exp", "log", "tanh", "max", "min")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a value, those of length one left out, the two factors run over.

    Attributes:
      shared: Those that both have.
      own: Those of X, and those of Y.
    """

    shared: tuple[int, ...]
    own: tuple[tuple[int, ...], tuple[int, ...]]

    def renamed(self, names: dict[int, int]) -> "Layout":
        """Returns the layout with other numbers for the axes."""
        left, right = (tuple(names[a] for a in side) for side in self.own)
        return Layout(tuple(names[a] for a in self.shared), (left, right))


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiplies one factor: by -1, or by a value along some of its axes.

    Attributes:
      side: 0 for X, 1 for Y.
      value: By what; -1 if None.
      axes: For each axis of the value its place in the factor, counted from the first shared one
        or, negative, from the last own one; None for axes of length one.
      is_divisor: Whether to divide instead.
    """

    side: int
    value: Value | None
    axes: tuple[int | None, ...] = ()
    is_divisor: bool = False

    def apply(self, array: jax.Array, known: Any) -> jax.Array:
        """Returns the factor, scaled."""
        if self.value is None:
            return -array
        scale = known(self.value)
        kept = [(a % array.ndim, i) for i, a in enumerate(self.axes) if a is not None]
        scale = lax.transpose(scale, [*(i for _, i in sorted(kept)), *_units(self.axes)])
        shape = [1] * array.ndim
        for axis, i in kept:
            shape[axis] = self.value.shape[i]
        scale = scale.reshape(shape)
        return array / scale if self.is_divisor else array * scale


@dataclasses.dataclass(frozen=True)
class Contract:
    """Multiplies one factor by a matrix.

    Attributes:
      side: 0 for X, 1 for Y.
      value: The matrix.
      axes: Places of the own axes that are summed over, counted from the last.
      of_value: The axes of the matrix that they meet; its others become the last own axes.
    """

    side: int
    value: Value
    axes: tuple[int, ...]
    of_value: tuple[int, ...]

    def apply(self, array: jax.Array, known: Any) -> jax.Array:
        """Returns the factor times the matrix."""
        matrix = known(self.value)
        numbers = (([a % array.ndim for a in self.axes], self.of_value), ((), ()))
        dtype = jnp.promote_types(array.dtype, matrix.dtype)
        product = lax.dot_general(
            array.astype(dtype), matrix.astype(dtype), numbers, precision=lax.Precision.HIGHEST
        )
        rest = [i for i in range(matrix.ndim) if i not in self.of_value]
        first = product.ndim - len(rest)
        units = [first + k for k, i in enumerate(rest) if matrix.shape[i] == 1]
        return lax.squeeze(product, units)


Step = Scale | Contract


def _units(axes: Sequence[int | None]) -> list[int]:
    return [i for i, a in enumerate(axes) if a is None]


@dataclasses.dataclass(frozen=True)
class Part:
    """The outer product by which a use is part of the gradient of one selection of parameters.

    Attributes:
      use: The use.
      factors: Its factors.
      start: Their layout on its PARAM operand.
      steps: What happens to them on the way back.
      value: The selection; an operand of the use where there are no steps.
      layout: The layout on it.
      names: The name of each of its axes; axes of one name run over the same axis of a parameter.
    """

    use: Use
    factors: Factors
    start: Layout
    steps: tuple[Step, ...]
    value: Value
    layout: Layout
    names: AxisNames

    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the names of the shared, left and right axes, and of that of a choice."""
        choice = () if self.factors.choice is None else (self.factors.choice,)
        sides = (self.layout.shared, *self.layout.own, choice)
        return tuple(tuple(sorted(self.names[a] or 0 for a in side)) for side in sides)

    def num_positions(self) -> int:
        """Returns the number of positions per example and shared index."""
        return num_positions(self.use, self.factors)

    def arrange(self, x: jax.Array, y: jax.Array, known: Any) -> tuple[Factor, Factor]:
        """Brings X and Y, ``(examples, ...)``, into the order that `Factor` states.

        Args:
          x: The first factor as the use has it.
          y: The second.
          known: ``value -> array`` for values that all examples share.
        """
        shared = self.factors.shared
        found = [
            self._canonical(x, [(a, i) for a, i, _ in shared], self.factors.left),
            self._canonical(y, [(a, i) for a, _, i in shared], self.factors.right),
        ]
        for step in self.steps:
            found[step.side] = step.apply(found[step.side], known)
        left, right = (
            self._in_order(array, side) for array, side in zip(found, (0, 1), strict=True)
        )
        return dataclasses.replace(left, is_lookup=self.factors.lookup is not None), right

    def _canonical(
        self, array: jax.Array, shared: Sequence[tuple[int, int]], own: Sequence[tuple[int, int]]
    ) -> jax.Array:
        """Returns ``(examples, *shared, *positions, *own)`` in the order of the start."""
        shape = self.use.params[0].shape
        units = [axis + 1 for a, axis in (*shared, *own) if shape[a] == 1]
        places = {a: axis + 1 for a, axis in (*shared, *own) if shape[a] != 1}
        first = [places[a] for a in self.start.shared]
        last = [places[a] for a, _ in sorted(own) if shape[a] != 1]
        middle = [i for i in range(1, array.ndim) if i not in (*units, *first, *last)]
        array = lax.transpose(array, [0, *first, *middle, *last, *units])
        return lax.squeeze(array, range(array.ndim - len(units), array.ndim))

    def _in_order(self, array: jax.Array, side: int) -> Factor:
        own = () if self.factors.lookup is not None and side == _LEFT else self.layout.own[side]
        shared = self.layout.shared

        def order(axes: Sequence[int]) -> list[int]:
            return sorted(range(len(axes)), key=lambda i: self.names[axes[i]] or 0)

        last = array.ndim - len(own)
        middle = range(1 + len(shared), last)
        permutation = [0, *(1 + i for i in order(shared)), *middle, *(last + i for i in order(own))]
        return Factor(lax.transpose(array, permutation), len(shared), len(own))


def num_positions(use: Use, factors: Factors) -> int:
    """Returns the number of positions of a use per example and shared index."""
    if factors.positions is not None:
        return factors.positions
    shape, out = use.params[0].shape, use.outs[use.tapped[0]].aval.shape
    total = math.prod(loop.length for loop in use.loops) * math.prod(out)
    inner = math.prod(shape[a] for a, *_ in (*factors.shared, *factors.right))
    return total // max(inner, 1)


def pairing(a: Part, b: Part) -> str | None:
    """Returns "straight" if X meets X, "crossed" if X meets the other's Y, None if neither."""
    shared, left, right, choice = a.axes()
    other_shared, other_left, other_right, other_choice = b.axes()
    if (shared, choice) == (other_shared, other_choice):
        if (left, right) == (other_left, other_right):
            return "straight"
        if (left, right) == (other_right, other_left):
            return "crossed"
    return None


def parts_of(use: Use, found: Factors, views: Views, alone: bool) -> list[Part] | None:
    """Returns the parts of a use, one for each selection of parameters behind its operand.

    Args:
      use: A use with one PARAM operand.
      found: Its factors.
      views: What values hold.
      alone: Whether its group has no other value.

    Returns:
      None where something on the way is no map of outer products to outer products.
    """
    value = use.params[0]
    sizes = value.shape

    def kept(entries: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(sorted(a for a, *_ in entries if sizes[a] != 1))

    left = kept(found.left if found.lookup is None else [(found.lookup,)])
    start = Layout(kept(found.shared), (left, kept(found.right)))
    if found.lookup is not None and (found.shared or sizes[found.lookup] == 1):
        return None
    parts: list[Part] = []
    stack: list[tuple[Value, Layout, tuple[Step, ...]]] = [(value, start, ())]
    while stack:
        v, layout, steps = stack.pop()
        names = None
        if views.of(v) is not None:
            names = views.axis_names(v, alone and v is value)
        if names is not None:
            if found.choice is not None and (v is not value or names[found.choice] is None):
                return None
            if any(names[a] is None for a in (*layout.shared, *layout.own[0], *layout.own[1])):
                return None
            parts.append(Part(use, found, start, steps, v, layout, names))
            continue
        back = _back(v, layout, is_lookup=found.lookup is not None)
        if back is None:
            return None
        stack.extend((operand, below, (*steps, *more)) for operand, below, more in back)
    return parts


def is_entrywise(value: Value, views: Views) -> bool:
    """Tells whether a parameter passes a function of single entries, such as a mask, on its way."""
    while views.of(value) is None and isinstance(value.origin, tuple):
        call, _ = value.origin
        params = [v for v in call.ins if v.kind == PARAM]
        if call.name in _ENTRYWISE:
            return True
        if call.name in ("mul", "div"):
            sizes = [math.prod(unbroadcast(v)[0].aval.shape) for v in operands_of(call)]
            if min(sizes) == math.prod(value.aval.shape):
                return True
        if len(params) != 1:
            return False
        value = params[0]
    return False


Back = list[tuple[Value, Layout, tuple[Step, ...]]]


def _back(value: Value, layout: Layout, is_lookup: bool) -> Back | None:
    """Returns the PARAM operands of what computes a value, and what its factors are for each."""
    if not isinstance(value.origin, tuple) or value.bent:
        return None
    call, _ = value.origin
    operands = operands_of(call)
    params = [v for v in operands if v.kind == PARAM]
    if any(v.loops for v in operands) or any(
        not jnp.issubdtype(v.aval.dtype, jnp.floating) for v in params
    ):
        return None
    if call.name in ("add", "sub", "add_any"):
        if any(v.shape != value.shape for v in params):
            return None
        signs = ((), (Scale(_RIGHT, None),) if call.name == "sub" else ())
        pairs = zip(operands, signs, strict=True)
        return [(v, layout, sign) for v, sign in pairs if v.kind == PARAM]
    if call.name == "neg":
        return [(params[0], layout, (Scale(_RIGHT, None),))]
    if call.name in ("mul", "div") and len(params) == 1:
        return _of_product(call.name == "div", operands, value, layout, is_lookup)
    if call.name == "transpose":
        names = dict(enumerate(call.eqn.params["permutation"]))
        return [(params[0], layout.renamed(names), ())]
    if call.name in ("convert_element_type", "copy", "copy_p", "name"):
        return [(params[0], layout, ())]
    if call.name in ("reshape", "squeeze", "expand_dims"):
        before, after = ([i for i, n in enumerate(v.shape) if n != 1] for v in (params[0], value))
        if [params[0].shape[i] for i in before] != [value.shape[i] for i in after]:
            return None
        return [(params[0], layout.renamed(dict(zip(after, before, strict=True))), ())]
    if call.name == "dot_general":
        return _of_matmul(call.eqn.params["dimension_numbers"], operands, value, layout, is_lookup)
    return None


def _of_product(
    is_divisor: bool, operands: list[Value], value: Value, layout: Layout, is_lookup: bool
) -> Back | None:
    """Scales the factor that has all axes along which the other operand changes."""
    position = [v.kind for v in operands].index(PARAM)
    operand, scale = operands[position], operands[1 - position]
    if operand.shape != value.shape or (is_divisor and position == 1):
        return None
    scale, axes = unbroadcast(scale)
    for side in (_RIGHT, _LEFT):
        own = layout.own[side]
        places = {a: i - len(own) for i, a in enumerate(own)}
        places |= {a: 1 + i for i, a in enumerate(layout.shared)}
        if all(a in places for a in axes.values()) and not (is_lookup and side == _LEFT):
            found = [places[axes[i]] if i in axes else None for i in range(len(scale.shape))]
            return [(operand, layout, (Scale(side, scale, tuple(found), is_divisor),))]
    return None


def _of_matmul(
    numbers: Any, operands: list[Value], value: Value, layout: Layout, is_lookup: bool
) -> Back | None:
    """Contracts the factor that has all free axes of the other matrix with it."""
    contract, batch = numbers
    if batch[0]:
        return None
    free = [
        [i for i in range(len(v.shape)) if i not in contract[k]] for k, v in enumerate(operands)
    ]
    # The axes of the value: the free axes of the first operand, then those of the second.
    of_value = [range(len(free[0])), range(len(free[0]), len(free[0]) + len(free[1]))]
    back: Back = []
    for k, operand in enumerate(operands):
        if operand.kind != PARAM:
            continue
        other = operands[1 - k]
        summed = [a for a in of_value[1 - k] if value.shape[a] != 1]
        sides = [s for s in (_RIGHT, _LEFT) if all(a in layout.own[s] for a in summed)]
        if not sides or (is_lookup and sides[0] == _LEFT):
            return None
        side, own = sides[0], layout.own[sides[0]]
        names = dict(zip(of_value[k], free[k], strict=True))
        meets = dict(zip(contract[1 - k], contract[k], strict=True))
        new = [meets[i] for i in sorted(meets) if other.shape[i] != 1]
        moved = (*(names[a] for a in own if a not in summed), *new)
        opposite = tuple(names[a] for a in layout.own[1 - side])
        both = (moved, opposite) if side == _LEFT else (opposite, moved)
        matched = dict(zip(of_value[1 - k], free[1 - k], strict=True))
        places = tuple(own.index(a) - len(own) for a in summed)
        step = Contract(side, other, places, tuple(matched[a] for a in summed))
        back.append((operand, Layout(tuple(names[a] for a in layout.shared), both), (step,)))
    return back
