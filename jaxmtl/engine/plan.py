"""Decides, per parameter and from static shapes alone, how its part of the Gramian is computed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmtl.engine import paths
from jaxmtl.engine.paths import Part
from jaxmtl.engine.primitives import rule_of
from jaxmtl.engine.program import Program, Use, Value
from jaxmtl.engine.views import Views

# Moving one number to or from memory costs about as much as this many operations on it. LSTMs of
# 256 and 512 units with 8 to 28 steps, a batch of 32, take the same paths with 6 and with 16: the
# number decides little, and the smaller one leaves more to the count of operations.
MEMORY_COST = 6
# Rows are kept for the weighted sum if they take at most this many times the memory of what they
# are made of; beyond it they are dropped and the weighted sum is taken afresh. More where this
# saves much: from rows the sum takes one operation on an entry, afresh one at every position.
_KEEP_ROWS = 4
_KEEP_ROWS_OF_MANY = 16
_MANY_POSITIONS = 4


@dataclasses.dataclass(eq=False)
class Group:
    """Uses that may touch the same entry of a parameter.

    Gradients from different groups are orthogonal.

    Attributes:
      values: The PARAM values used.
      uses: Their uses; a use of two values belongs to the group of both.
      leaves: The parameter leaves behind them.
      method: "factors" (inner products of factors, no gradient of an example exists), "rows" (one
        row per example of the one value used) or "leaf rows" (one row per example of each leaf).
      parts: For "factors", the uses with their factors.
      pairings: For "factors", how parts i and j <= i pair, where they have entries in common.
      keep: Whether the rows are kept for the weighted sum.
      bent: Whether the weighted sum is one of rows alone: a custom derivative on the way from the
        values to the leaves need not be linear.
      reason: Why, in words.
      operations: Of the products of its part of the Gramian.
      memory: Bytes of what these are products of: of rows, or of the tables of inner products.
      chunk_size: For tasks on one batch, how many rows exist at a time, which are pushed forward
        again; 0 where all rows are compared.
    """

    values: list[Value]
    uses: list[Use]
    leaves: tuple[int, ...]
    method: str = "leaf rows"
    parts: tuple[Part, ...] = ()
    pairings: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    keep: bool = False
    bent: bool = False
    reason: str = ""
    operations: int = 0
    memory: int = 0
    chunk_size: int = 0


@dataclasses.dataclass(eq=False)
class Plan:
    """A program and the method of each group of its uses."""

    program: Program
    groups: list[Group]
    in_gramian: tuple[bool, ...]

    def counts(self, group: Group) -> bool:
        """Tells whether a group has a part in the Gramian."""
        return any(self.in_gramian[leaf] for leaf in group.leaves)


def make_plan(
    program: Program, in_gramian: Sequence[bool], num_examples: int, diagonal: bool = False
) -> Plan:
    """Groups the uses of a program and chooses a method for each group.

    With ``diagonal`` the methods are chosen for the norms of the gradients alone.
    """
    views = Views()
    groups = group_uses(program, views)
    for group in groups:
        counted = {in_gramian[leaf] for leaf in group.leaves}
        leaf_size = sum(math.prod(program.leaves[leaf].shape) for leaf in group.leaves)
        _choose(group, views, (num_examples, diagonal), leaf_size, mixed=len(counted) > 1)
        if True in counted:
            _measure(group, program, num_examples, diagonal)
        else:
            group.keep = False
            group.reason = "not shared: left out of the Gramian"
    return Plan(program, groups, tuple(in_gramian))


def group_uses(program: Program, views: Views) -> list[Group]:
    """Groups the uses that may touch the same entry of a parameter."""
    values = list(dict.fromkeys(v for use in program.uses for v in use.params))
    parent = {v: v for v in values}

    def find(v: Value) -> Value:
        while parent[v] is not v:
            v = parent[v]
        return v

    of_leaf: dict[int, list[Value]] = {}
    for v in values:
        for leaf in views.leaves(v):
            for w in of_leaf.setdefault(leaf, []):
                if find(v) is not find(w) and views.overlap(v, w):
                    parent[find(v)] = find(w)
            of_leaf[leaf].append(v)
    for use in program.uses:
        for v in use.params[1:]:
            parent[find(v)] = find(use.params[0])
    members: dict[Value, list[Value]] = {}
    for v in values:
        members.setdefault(find(v), []).append(v)
    uses: dict[Value, list[Use]] = {}
    for use in program.uses:
        uses.setdefault(find(use.params[0]), []).append(use)
    return [
        Group(found, uses[root], tuple(sorted(set().union(*map(views.leaves, found)))))
        for root, found in members.items()
    ]


def _choose(
    group: Group, views: Views, wanted: tuple[int, bool], leaf_size: int, mixed: bool
) -> None:
    seen = [views.of(v) for v in group.values]
    alone = len(group.values) == 1
    names = ", ".join(dict.fromkeys(use.name for use in group.uses))
    sources = sum(
        math.prod(loop.length for loop in use.loops) * math.prod(v.aval.shape)
        for use in group.uses
        for v in (*use.data, *use.outs)
    )
    if alone and seen[0] is not None and not mixed:
        group.method, leaf_size = "rows", math.prod(group.values[0].shape)
    group.keep = leaf_size <= _KEEP_ROWS * sources
    group.bent = any(v.bent for v in group.values)
    if mixed or group.bent:  # A bent value has no view.
        group.keep |= group.bent
        group.reason = f"used through a custom derivative that need not be linear, by {names}"
        if mixed:
            group.reason = f"used together with a parameter that is not shared, by {names}"
        return
    found = [parts_of(use, views, alone) for use in group.uses]
    missing = [u for u, parts in zip(group.uses, found, strict=True) if not parts]
    if missing:
        if any(use.probed for use in group.uses):
            group.keep = True
            group.reason = f"differentiated together with the example, by {names}"
        elif any(view is None for view in seen):
            group.reason = f"used through another function of the parameter, by {names}"
        elif len(missing) == 1 and rule_of(missing[0]).has_gradients(missing[0]):
            group.reason = rule_of(missing[0]).reason
        elif leaf_size <= sources:
            group.reason = f"no larger than the operands and cotangents of {names}"
        else:
            unknown = ", ".join(dict.fromkeys(use.name for use in missing))
            group.reason = f"no structured rule for {unknown}"
        return
    parts = tuple(part for some in found for part in some or ())
    pairings = {}
    for i, p in enumerate(parts):
        for j, q in enumerate(parts[: i + 1]):
            relation = views.relation(p.value, q.value)
            if relation != "apart":
                pairings[i, j] = paths.pairing(p, q) if relation == "same" else None
    known = {pair: how for pair, how in pairings.items() if how is not None}
    if len(known) < len(pairings):
        group.reason = f"uses of different shape, by {names}"
        return
    most = max(part.num_positions() for part in parts)
    group.keep |= most >= _MANY_POSITIONS and leaf_size <= _KEEP_ROWS_OF_MANY * sources
    by_factors, by_rows = _costs(group, parts, known, wanted, leaf_size)
    if by_factors <= by_rows:
        group.method, group.parts, group.pairings, group.keep = "factors", parts, known, False
        group.reason = f"inner products of inputs and cotangents of {names}"
    else:
        group.reason = f"{names} at so many positions that one row per example is cheaper"
        known_rows = [rule_of(use).reason for use in group.uses if rule_of(use).has_gradients(use)]
        if len(known_rows) == len(group.uses) == 1:
            group.reason = known_rows[0]


def parts_of(use: Use, views: Views, alone: bool) -> list[Part] | None:
    """Returns the parts of a use, if a rule knows its factors."""
    found = None if use.probed or len(use.params) != 1 else rule_of(use).factors(use)
    return None if found is None else paths.parts_of(use, found, views, alone)


def _costs(
    group: Group,
    parts: Sequence[Part],
    pairings: dict[tuple[int, int], str],
    size: tuple[int, bool],
    leaf_size: int,
) -> tuple[float, float]:
    """Returns the costs of "factors" and of rows beside a weighted sum, in operations."""
    n, diagonal = size
    products = n if diagonal else n * n
    by_factors = 0.0
    for i, j in pairings:
        entries, operations = _of_pair(parts[i], parts[j], products)
        by_factors += operations + MEMORY_COST * (2 * entries if entries > products else 0)
    by_rows = 2.0 * products * leaf_size + MEMORY_COST * 2 * n * leaf_size
    for use in group.uses:
        value_size = math.prod(use.params[0].shape)
        if rule_of(use).writes_rows:
            by_rows += MEMORY_COST * n * value_size
            continue
        t = next(part.num_positions() for part in parts if part.use is use)
        by_rows += 2.0 * n * t * value_size
        if group.keep:  # The weighted sum is then one of rows, and need not be taken afresh.
            by_rows -= 2.0 * n * (t - 1) * value_size
    return by_factors, by_rows


def _of_pair(a: Part, b: Part, products: int) -> tuple[int, int]:
    """Returns the entries of a table of inner products of two parts, and the operations on it.

    Args:
      a: A part.
      b: Another, or the same.
      products: How many pairs of examples are compared.
    """

    def size(axes: Sequence[int]) -> int:
        return math.prod(a.value.shape[axis] for axis in axes)

    left, right = map(size, a.layout.own)
    width = right + (left if a.factors.lookup is None else 0)
    entries = products * a.num_positions() * b.num_positions() * size(a.layout.shared)
    entries *= 1 if a is b else 2
    return entries, 2 * entries * width


def _measure(group: Group, program: Program, n: int, diagonal: bool) -> None:
    """Notes the operations and the memory of a group's part of the Gramian."""
    products = n if diagonal else n * n
    if group.method == "factors":
        found = [_of_pair(group.parts[i], group.parts[j], products) for i, j in group.pairings]
        bits = max(jnp.finfo(program.leaves[leaf].aval.dtype).bits for leaf in group.leaves)
        group.operations = sum(operations for _, operations in found)
        group.memory = 2 * max(entries for entries, _ in found) * max(bits, 32) // 8
        return
    rows = [v.aval for v in (program.leaves[leaf] for leaf in group.leaves)]
    sizes = [math.prod(aval.shape) for aval in rows]
    if group.method == "rows":
        sizes, rows = [math.prod(group.values[0].shape)], [group.values[0].aval]
    group.operations = 2 * products * sum(sizes)
    group.memory = sum(
        n * size * aval.dtype.itemsize for size, aval in zip(sizes, rows, strict=True)
    )


def _size(group: Group) -> str:
    if not group.operations:
        return ""
    return f" ({_short(group.operations, 'FLOP')}, {_short(group.memory, 'B')})"


def _short(number: float, unit: str) -> str:
    """Returns a number with three digits: 12.3 MFLOP."""
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 1000 and len(prefixes) > 1:
        number, prefixes = number / 1000, prefixes[1:]
    return f"{number:.3g} {prefixes[0]}{unit}"


def describe(
    plan: Plan,
    names: Sequence[str],
    leaves: Sequence[Any],
    own: Sequence[bool],
    rows: str = "per-example rows",
) -> str:
    """Returns one line per leaf: its method and the reason; ``rows`` is what rows are called."""

    def method(group: Group) -> str:
        if group.chunk_size:
            return f"{rows}, {group.chunk_size} at a time, pushed forward again"
        return "structured" if group.method == "factors" else rows

    shapes = [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in leaves]
    longest, width = max(map(len, shapes)), max(map(len, names))
    lines = []
    positions = iter(range(len(leaves)))
    for name, shape, is_own in zip(names, shapes, own, strict=True):
        reasons = ["a slice per example: each has a gradient of its own"]
        if not is_own:
            leaf = next(positions)
            reasons = [
                f"{method(group)}{_size(group)}: {group.reason}"
                for group in plan.groups
                if leaf in group.leaves
            ] or ["unused: no loss depends on it"]
        lines += [f"{name:<{width}}  {shape:<{longest}}  {reason}" for reason in reasons]
    return "\n".join(lines)
