"""Which entries of which parameters a PARAM value holds.

A transposed, reshaped, sliced or concatenated parameter holds each entry at most once, so inner
products of its gradients are inner products of gradients of the parameters themselves, and no
per-example gradient is needed. Anything else (``W * mask``, a broadcast bias) has no view, and goes
through the gradient of the parameter.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxmtl.engine.program import CONST, PARAM, Call, Value

Box = tuple[tuple[int, int, int], ...]  # (start, step, size) of each axis of a leaf

_SAME = frozenset(
    {"convert_element_type", "copy", "copy_p", "name", "reshard", "sharding_constraint"}
)


@dataclasses.dataclass(frozen=True)
class View:
    """Entries of parameters, each once.

    Attributes:
      pieces: Pairs ``(leaf, box)`` that share no entry; the box is None where it is unknown.
      axes: For each axis of the value (outside loops) the axis of the leaf that it runs over,
        or None for an axis of length one; None as a whole where there is no such map.
    """

    pieces: tuple[tuple[int, Box | None], ...]
    axes: tuple[int | None, ...] | None


class Views:
    """The views of the values of one program, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[Value, View | None] = {}
        self._leaves: dict[Value, frozenset[int]] = {}

    def leaves(self, value: Value) -> frozenset[int]:
        """Returns the positions of the leaves that a value depends on."""
        found: set[int] = set()
        seen: set[Value] = set()
        stack = [] if value in self._leaves else [value]
        while stack:
            v = stack.pop()
            if v in seen or v.kind == CONST:
                continue
            seen.add(v)
            if v in self._leaves:
                found |= self._leaves[v]
            elif v.leaf is not None:
                found.add(v.leaf)
            else:
                stack.extend(_sources(v))
        return self._leaves.setdefault(value, frozenset(found))

    def of(self, value: Value) -> View | None:
        """Returns the entries that a PARAM value holds, or None where it is no such selection."""
        stack = [value]  # and no recursion: a parameter may pass through thousands of equations
        while stack:
            v = stack[-1]
            needed = [u for u in _operands(v) if u not in self._known]
            if v not in self._known and needed:
                stack.extend(needed)
                continue
            if v not in self._known:
                self._known[v] = _view(v, [self._known[u] for u in _operands(v)])
            stack.pop()
        return self._known[value]

    def overlap(self, v: Value, w: Value) -> bool:
        """Tells whether gradients of two PARAM values can share an entry of a parameter."""
        view_v, view_w = self.of(v), self.of(w)
        if view_v is None or view_w is None:
            return bool(self.leaves(v) & self.leaves(w))
        return any(not _disjoint(p, q) for p in view_v.pieces for q in view_w.pieces)

    def relation(self, v: Value, w: Value) -> str:
        """Tells whether two selections are "same", "apart", or "mixed" ones."""
        view_v, view_w = self.of(v), self.of(w)
        if view_v is None or view_w is None or not self.overlap(v, w):
            return "apart" if not self.overlap(v, w) else "mixed"
        is_known = all(box is not None for _, box in view_v.pieces)
        return "same" if v is w or (is_known and view_v.pieces == view_w.pieces) else "mixed"

    def axis_names(self, value: Value, alone: bool) -> tuple[int | None, ...] | None:
        """Names each axis of a value by the parameter's axis that it runs over.

        Two views of the same entries get the same names.

        Args:
          value: A PARAM value with a view.
          alone: Whether it is compared with itself only, so that its own axes will do.
        """
        if alone:
            return tuple(range(len(value.shape)))
        found = self.of(value)
        return None if found is None else found.axes


def _sources(value: Value) -> tuple[Value, ...]:
    if isinstance(value.origin, Value):
        return (value.origin,)
    return () if value.origin is None else value.origin[0].ins


def _operands(value: Value) -> list[Value]:
    return [] if value.leaf is not None else [v for v in _sources(value) if v.kind == PARAM]


def _view(value: Value, bases: Sequence[View | None]) -> View | None:
    """Returns the view of a value, given those of its PARAM operands."""
    if value.leaf is not None:
        box = tuple((0, 1, n) for n in value.aval.shape)
        return View(((value.leaf, box),), tuple(range(len(box))))
    if isinstance(value.origin, Value):
        return bases[0]
    if value.origin is None:
        return None
    call, position = value.origin
    if call.name == "concatenate":
        return _concatenate(bases, len(call.ins) == len(call.eqn.invars) == len(bases))
    operands = _operands(value)
    if len(operands) != 1 or operands[0].loops != value.loops:
        return None
    if not jnp.issubdtype(value.aval.dtype, jnp.floating):
        return None  # a complex value: its gradients have two real parts
    return None if bases[0] is None else _step(bases[0], call, position, operands[0], value)


def _step(base: View, call: Call, position: int, operand: Value, value: Value) -> View | None:
    params = call.eqn.params
    prefix = len(value.loops)
    if call.name in _SAME:
        return base
    if call.name == "transpose":
        if base.axes is None:
            return base
        body = tuple(base.axes[prefix + axis] for axis in params["permutation"])
        return View(base.pieces, base.axes[:prefix] + body)
    if call.name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
        if math.prod(operand.aval.shape) != math.prod(value.aval.shape):
            return None
        return View(base.pieces, _drop_and_add_units(base.axes, operand, value, prefix))
    if call.name == "rev":
        return View(_without_boxes(base), None)
    if call.name == "slice":
        steps = params["strides"] or (1,) * len(params["start_indices"])
        return _slice(base, prefix, params["start_indices"], steps, value.aval.shape)
    if call.name == "split":
        axis = params["axis"]
        starts = [0] * len(value.aval.shape)
        starts[axis] = sum(params["sizes"][:position])
        return _slice(base, prefix, starts, [1] * len(starts), value.aval.shape)
    if call.name == "dynamic_slice" and all(v.kind == CONST for v in call.ins if v is not operand):
        return View(_without_boxes(base), None)
    return None


def _without_boxes(base: View) -> tuple[tuple[int, Box | None], ...]:
    return tuple((leaf, None) for leaf, _ in base.pieces)


def _drop_and_add_units(
    axes: tuple[int | None, ...] | None, operand: Value, value: Value, prefix: int
) -> tuple[int | None, ...] | None:
    old, new = operand.aval.shape, value.aval.shape
    if axes is None or [n for n in old if n != 1] != [n for n in new if n != 1]:
        return None
    kept = iter([a for a, n in zip(axes[prefix:], old, strict=True) if n != 1])
    return axes[:prefix] + tuple(None if n == 1 else next(kept) for n in new)


def _slice(
    base: View, prefix: int, starts: Sequence[int], steps: Sequence[int], sizes: Sequence[int]
) -> View:
    if base.axes is None or len(base.pieces) != 1 or base.pieces[0][1] is None:
        return View(_without_boxes(base), None)
    leaf, box = base.pieces[0]
    new = list(box or ())
    for axis, start, step, size in zip(base.axes[prefix:], starts, steps, sizes, strict=True):
        if axis is not None:
            old_start, old_step, _ = new[axis]
            new[axis] = (old_start + start * old_step, old_step * step, size)
    return View(((leaf, tuple(new)),), base.axes)


def _concatenate(views: Sequence[View | None], distinct: bool) -> View | None:
    pieces: list[tuple[int, Box | None]] = []
    for operand in views:
        if operand is None or not distinct:
            return None
        if any(not _disjoint(p, q) for p in pieces for q in operand.pieces):
            return None
        pieces.extend(operand.pieces)
    return View(tuple(pieces), None)


def _disjoint(p: tuple[int, Box | None], q: tuple[int, Box | None]) -> bool:
    if p[0] != q[0]:
        return True
    if p[1] is None or q[1] is None:
        return False
    return any(_separate(a, b) for a, b in zip(p[1], q[1], strict=True))


def _separate(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    (start1, step1, size1), (start2, step2, size2) = a, b
    if start1 + step1 * (size1 - 1) < start2 or start2 + step2 * (size2 - 1) < start1:
        return True
    return (start1 - start2) % math.gcd(step1, step2) != 0
