"""Decide, per parameter and from static shapes alone, how its part of the Gramian is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxmtl.engine import conv, dense, gather, views
from jaxmtl.engine.factors import Factors, Structure, structure
from jaxmtl.engine.program import Program, Use, Value

# Moving one number to or from memory costs about as much as this many operations on it.
_MEMORY_COST = 16
# Rows are kept for the weighted sum if they take at most this many times the memory of what they
# are made of; beyond it they are dropped and the weighted sum is taken afresh.
_KEEP_ROWS = 4
_LOOKUPS = ("gather", "dynamic_slice")


@dataclasses.dataclass(eq=False)
class Group:
    """Uses whose gradients can share an entry of a parameter; others have no inner product.

    Attributes:
      values: the PARAM values used.
      uses: their uses; a use of two values belongs to the group of both.
      leaves: the parameter leaves behind them.
      method: "factors" (inner products of factors, no gradient of an example exists), "rows" (one
        row per example of the one value used) or "leaf rows" (one row per example of each leaf).
      keep: whether the rows are kept for the weighted sum.
      reason: why, in words.
    """

    values: list[Value]
    uses: list[Use]
    leaves: tuple[int, ...]
    method: str = "leaf rows"
    keep: bool = False
    reason: str = ""


@dataclasses.dataclass(eq=False)
class Plan:
    """A program and the method of each group of its uses."""

    program: Program
    groups: list[Group]
    in_gramian: tuple[bool, ...]


def factors_of(use: Use) -> Factors | None:
    """Return the factors of a use, if a rule knows them."""
    return dense.factors(use) or gather.factors(use)


def structure_of(use: Use, alone: bool) -> Structure | None:
    """Return the structure of a use; `alone` if its group has no other value."""
    factors = factors_of(use)
    names = views.keys(use.params[0], alone) if len(use.params) == 1 else None
    if factors is None or names is None:
        return None
    return structure(factors, names, use.params[0].shape)


def make_plan(
    program: Program, leaves: Sequence[Any], in_gramian: Sequence[bool], num_examples: int
) -> Plan:
    """Group the uses of a program and choose a method for each group."""
    groups = _group(program)
    for group in groups:
        counted = {in_gramian[leaf] for leaf in group.leaves}
        leaf_size = sum(math.prod(program.leaves[leaf].shape) for leaf in group.leaves)
        _choose(group, num_examples, leaf_size, mixed=len(counted) > 1)
        if counted == {False}:
            group.keep = False
            group.reason = "not shared: left out of the Gramian"
    return Plan(program, groups, tuple(in_gramian))


def _group(program: Program) -> list[Group]:
    values = list(dict.fromkeys(v for use in program.uses for v in use.params))
    parent = {v: v for v in values}

    def find(v: Value) -> Value:
        while parent[v] is not v:
            v = parent[v]
        return v

    for i, v in enumerate(values):
        for w in values[:i]:
            if find(v) is not find(w) and views.overlap(v, w):
                parent[find(v)] = find(w)
    for use in program.uses:
        for v in use.params[1:]:
            parent[find(v)] = find(use.params[0])
    members: dict[Value, list[Value]] = {}
    for v in values:
        members.setdefault(find(v), []).append(v)
    groups = []
    for found in members.values():
        uses = [use for use in program.uses if use.params[0] in found]
        groups.append(Group(found, uses, tuple(sorted(set().union(*map(views.leaves_of, found))))))
    return groups


def _choose(group: Group, n: int, leaf_size: int, mixed: bool) -> None:
    seen = [views.view(v) for v in group.values]
    alone = len(group.values) == 1
    names = ", ".join(dict.fromkeys(use.name for use in group.uses))
    sources = sum(
        math.prod(loop.length for loop in use.loops) * math.prod(v.aval.shape)
        for use in group.uses
        for v in (*use.data, *use.outs)
    )
    group.keep = leaf_size <= _KEEP_ROWS * sources
    if mixed or any(v is None for v in seen):
        group.method = "leaf rows"
        group.reason = f"used through another function of the parameter, by {names}"
        if mixed:
            group.reason = f"used together with a parameter that is not shared, by {names}"
        return
    structures = [structure_of(use, alone) for use in group.uses]
    pairings = [a and b and a.pairing(b) for i, a in enumerate(structures) for b in structures[:i]]
    boxes = {v.pieces for v in seen if v is not None}
    if None in structures or None in pairings or (len(boxes) > 1 and not alone):
        group.method = "rows" if alone else "leaf rows"
        missing = [u.name for u, s in zip(group.uses, structures, strict=True) if s is None]
        if not missing:
            group.reason = f"uses of different shape, by {names}"
        elif leaf_size <= sources:
            group.reason = f"no larger than the operands and cotangents of {names}"
        else:
            group.reason = f"no structured rule for {', '.join(dict.fromkeys(missing))}"
        if missing == ["conv_general_dilated"] and conv.supported(group.uses[0]):
            group.reason = "convolution: the gradients of examples are products of shifted inputs"
        return
    by_factors, by_rows = _costs(group, n)
    if by_factors <= by_rows:
        group.method, group.keep = "factors", False
        group.reason = f"inner products of inputs and cotangents of {names}"
    else:
        group.method = "rows" if alone else "leaf rows"
        group.reason = f"{names} at so many positions that one row per example is cheaper"


def _costs(group: Group, n: int) -> tuple[float, float]:
    """Return the costs of "factors" and of rows, in operations."""
    positions = []
    for use in group.uses:
        factors, shape = factors_of(use), use.params[0].shape
        assert factors is not None
        num_shared = math.prod(shape[a] for a, *_ in factors.shared)
        width = sum(shape[a] for a, *_ in (*factors.left, *factors.right))
        positions.append((factors.num_positions(use), num_shared, width))
    by_factors = 0.0
    for i, (t, num_shared, width) in enumerate(positions):
        for s, _, _ in positions[: i + 1]:
            pairs = n * n * t * s * num_shared * (1 if s == t else 2)
            by_factors += pairs * 2 * width + _MEMORY_COST * (2 * pairs if t * s > 1 else 0)
    size = math.prod(group.values[0].shape)
    by_rows = 2.0 * n * n * size + _MEMORY_COST * 2 * n * size
    for use, (t, _, _) in zip(group.uses, positions, strict=True):
        # A lookup's row is written, not multiplied out.
        by_rows += _MEMORY_COST * n * size if use.name in _LOOKUPS else 2.0 * n * t * size
    return by_factors, by_rows


def describe(plan: Plan, names: Sequence[str], leaves: Sequence[jax.ShapeDtypeStruct]) -> str:
    """Return one line per leaf: its method and the reason."""
    words = {
        "factors": "structured",
        "rows": "per-example rows",
        "leaf rows": "per-example rows",
    }
    lines = []
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
    longest = max(map(len, shapes))
    shapes = [f"{shape:<{longest}}" for shape in shapes]
    width = max(map(len, names))
    for i, name in enumerate(names):
        found = [g for g in plan.groups if i in g.leaves]
        shape = shapes[i]
        if not found:
            lines.append(f"{name:<{width}}  {shape}  unused: no example depends on it")
        for group in found:
            lines.append(f"{name:<{width}}  {shape}  {words[group.method]}: {group.reason}")
    return "\n".join(lines)
