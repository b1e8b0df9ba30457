"""Matrices times small values: ``x @ (s * W)`` is computed as ``(x @ W) * s``.

The small value, a learned scale or the norm of a weight, is then used beside the matrix and not
inside it, so that each of the two has gradients of a form that is known.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.primitives import rule_of
from jaxmtl.engine.program import FROZEN, PARAM, Call, Use, Value, operands_of, unbroadcast

_NAMES = ("dot_general", "conv_general_dilated", "gather", "dynamic_slice")
_UNARY = ("convert_element_type", "copy", "copy_p", "name", "neg")
_RESHAPES = ("reshape", "squeeze", "expand_dims")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Multiplies an array by a small value.

    Attributes:
      value: The small value.
      axes: For each of its axes that is not of length one, the axis of the array.
      is_divisor: Whether to divide instead.
    """

    value: Value
    axes: dict[int, int]
    is_divisor: bool

    @property
    def name(self) -> str:
        """The primitive."""
        return "div" if self.is_divisor else "mul"

    def renamed(self, places: dict[int, int]) -> "Scaling":
        """Returns the same along other axes."""
        axes = {i: places[axis] for i, axis in self.axes.items()}
        return Scaling(self.value, axes, self.is_divisor)

    def apply(self, array: jax.Array, scale: jax.Array) -> list[jax.Array]:
        """Returns the array, scaled, in a list."""
        scale = jnp.asarray(scale)
        order = sorted(self.axes, key=lambda i: self.axes[i])
        units = [i for i in range(scale.ndim) if i not in self.axes]
        shape = [1] * array.ndim
        for i in order:
            shape[self.axes[i]] = scale.shape[i]
        scale = lax.transpose(scale, [*order, *units]).reshape(shape).astype(array.dtype)
        return [array / scale if self.is_divisor else array * scale]


@dataclasses.dataclass(frozen=True)
class Split:
    """A use of a matrix times small values, taken apart.

    Attributes:
      matrix: Takes the place of the PARAM operand.
      of_input: What multiplies the DATA operand in turn.
      of_output: What multiplies the output.
    """

    matrix: Value
    of_input: list[Scaling]
    of_output: list[Scaling]


def split(use: Use) -> Split | None:
    """Takes a use of a scaled matrix apart; None where there is no small PARAM value to take out.

    Half precision stays as it is written: what a scale keeps small may overflow without it.
    """
    if use.name not in _NAMES or len(use.params) != 1 or use.params[0].bent:
        return None
    value, out = use.params[0], use.outs[0].aval
    found = rule_of(use).factors(use)
    if jnp.finfo(out.dtype).maxexp < 128 or found is None:
        return None
    matrix, scalings = _peel(value)
    depth, prefix = len(use.loops), len(value.loops)
    right = {a - prefix: i - depth for a, *_, i in (*found.shared, *found.right)}
    left: dict[int, int] = {}
    if use.name == "dot_general":
        left = {a - prefix: i - depth for a, i, *_ in (*found.shared, *found.left)}
    of_input, of_output = [], []
    for scaling in scalings:
        axes = set(scaling.axes.values())
        if axes <= right.keys():
            of_output.append(scaling.renamed(right))
        elif axes <= left.keys():
            of_input.append(scaling.renamed(left))
        else:
            return None
    if not any(s.value.kind == PARAM for s in scalings):
        return None
    # Learned scales next to the product, as its output and its input's cotangent are then known.
    of_input.sort(key=lambda s: s.value.kind == PARAM)
    of_output.sort(key=lambda s: s.value.kind != PARAM)
    return Split(matrix, of_input, of_output)


def _peel(value: Value) -> tuple[Value, list[Scaling]]:
    """Returns what a value is without the small values that it is multiplied by, and those."""
    scalings: list[Scaling] = []
    moves: list[Call] = []
    passed = 0  # of the moves, those before the last product
    places = {i: i for i, n in enumerate(value.aval.shape) if n != 1}
    v = matrix = value
    while isinstance(v.origin, tuple) and v.kind == PARAM:
        call, _ = v.origin
        operands = operands_of(call)
        if call.name in ("mul", "div"):
            found = _of_product(call.name == "div", operands, v)
            if found is None:
                break
            v, scaling = found
            scalings.append(scaling.renamed(places))
            matrix, passed = v, len(moves)
            continue
        before = _moved(call, operands, v, places)
        if before is None:
            break
        v, places = operands[0], before
        moves.append(call)
    for call in reversed(moves[:passed]):
        matrix = _again(call, matrix)
    return matrix, scalings


def _of_product(
    is_divisor: bool, operands: Sequence[Value], value: Value
) -> tuple[Value, Scaling] | None:
    """Returns the matrix and the small value of which a value is the product or the quotient."""
    size = math.prod(value.aval.shape)
    found = [unbroadcast(v) for v in operands]
    small = [math.prod(v.aval.shape) < size for v, _ in found]
    for i in (1,) if is_divisor else (1, 0):
        matrix, (scale, axes) = operands[1 - i], found[i]
        if small == [i == 0, i == 1] and matrix.aval.shape == value.aval.shape:
            return matrix, Scaling(scale, axes, is_divisor)
    return None


def _moved(
    call: Call, operands: Sequence[Value], value: Value, places: dict[int, int]
) -> dict[int, int] | None:
    """Returns where the axes of an operand end, None for what is no linear move of entries."""
    if len(operands) != 1 or not jnp.issubdtype(operands[0].aval.dtype, jnp.floating):
        return None
    if call.name in _UNARY:
        return places
    if call.name == "transpose":
        order = call.eqn.params["permutation"]
        return {order[i]: place for i, place in places.items()}
    if call.name in _RESHAPES:
        shapes = operands[0].aval.shape, value.aval.shape
        before, after = ([i for i, n in enumerate(shape) if n != 1] for shape in shapes)
        if [shapes[0][i] for i in before] == [shapes[1][i] for i in after]:
            return {i: places[j] for i, j in zip(before, after, strict=True)}
    return None


def _again(call: Call, operand: Value) -> Value:
    """Returns what an equation with one operand gives for another one."""
    step = Call(call.fun, (operand,), (), call.name, call.eqn)
    kind = operand.kind if operand.kind == PARAM else FROZEN
    out = Value(call.outs[0].aval, kind, operand.loops, (step, 0), bent=operand.bent)
    step.outs = (out,)
    return out
