"""Decides, per parameter and from static shapes alone, how its part of the Gramian is computed."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl.engine import paths
from jaxmtl.engine.factors import Factors
from jaxmtl.engine.paths import Part
from jaxmtl.engine.primitives import rule_of
from jaxmtl.engine.program import DATA, PARAM, Program, Scan, Use, Value
from jaxmtl.engine.small import Small
from jaxmtl.engine.structure import Structure, structure_of
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
# Rows that are not kept are formed for blocks of examples where all take more bytes than this, two
# blocks at a time. A row is then formed several times, by an operation on each entry at each
# position: with blocks of eight times the positions this is little beside the products.
_MOST_BYTES = 2**24
_FEWEST_EXAMPLES = 8


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
      small: For "factors", what is known of uses that have no parts.
      keep: Whether the rows are kept for the weighted sum.
      bent: Whether the weighted sum is one of rows alone: a custom derivative on the way from the
        values to the leaves need not be linear.
      reason: Why, in words.
      operations: Of the products of its part of the Gramian.
      memory: Bytes of what these are products of: of rows, or of the tables of inner products.
      roots: For rows that are formed some steps of a scan at a time, the arrays of one entry per
        step behind its values, and those that stand beside them.
      steps: How many steps at a time; 0 for all.
      blocks: In how many blocks of examples rows are formed, two of which exist at a time.
      chunk_size: For tasks on one batch, how many rows exist at a time, which are pushed forward
        again; 0 where all rows are compared.
    """

    values: list[Value]
    uses: list[Use]
    leaves: tuple[int, ...]
    method: str = "leaf rows"
    parts: tuple[Part, ...] = ()
    pairings: dict[tuple[int, int], str] = dataclasses.field(default_factory=dict)
    small: Small | None = None
    keep: bool = False
    bent: bool = False
    reason: str = ""
    operations: int = 0
    memory: int = 0
    roots: tuple[Value, ...] = ()
    steps: int = 0
    blocks: int = 1
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
        leaf_size = sum(math.prod(program.leaves[leaf].shape) for leaf in group.leaves)
        _choose(group, views, (num_examples, diagonal), leaf_size, in_gramian)
        if any(in_gramian[leaf] for leaf in group.leaves):
            _cut(group)
            _block(group, program, num_examples)
            _measure(group, program, num_examples, diagonal)
        else:
            group.keep = False
            group.reason = "not shared: left out of the Gramian"
    return Plan(program, groups, tuple(in_gramian))


def _cut(group: Group) -> None:
    """Lets rows of stacked layers that are not kept be formed some layers at a time."""
    found = None if group.keep or group.method == "factors" else _roots(group)
    if found is None:
        return
    length = group.uses[0].loops[0].length
    size = sum(math.prod(v.shape) for v in found if v.kind == PARAM)
    most = max(_KEEP_ROWS * _num_sources(group.uses) * length // size, 1)
    group.roots = tuple(found)
    group.steps = max(c for c in range(1, length + 1) if length % c == 0 and c <= most)
    group.reason += f"; {group.steps} of {length} steps at a time"


def _block(group: Group, program: Program, n: int) -> None:
    """Lets rows that are not kept be formed for blocks of examples, if all take much memory."""
    if group.keep or group.method == "factors" or group.steps:
        return
    if jax.sharding.get_abstract_mesh().size > 1:  # Devices hold rows of their own examples.
        return
    row = _row_bytes(group, program)
    known = [(use, factors_of(use)) for use in group.uses]
    positions = max(_MANY_POSITIONS if x is None else paths.num_positions(u, x) for u, x in known)
    most = max(_MOST_BYTES // max(2 * row, 1), _FEWEST_EXAMPLES * positions)
    if n * row > _MOST_BYTES:
        group.blocks = n // max(b for b in range(1, n + 1) if n % b == 0 and b <= most)
    if group.blocks > 1:
        group.reason += f"; {n // group.blocks} of {n} examples at a time"


def _row_bytes(group: Group, program: Program) -> int:
    """Returns the bytes of the rows of an example."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in _row_avals(group, program))


def _row_avals(group: Group, program: Program) -> list[Any]:
    """Returns what the rows of a group that is not structured are like."""
    if group.method == "rows":
        return [group.values[0].aval]
    return [program.leaves[leaf].aval for leaf in group.leaves]


def _roots(group: Group) -> list[Value] | None:
    """Returns the slices of a scan that a group is made of, None where leaves are used whole."""
    loops = {use.loops[:1] for use in group.uses}
    if len(loops) > 1 or () in loops or any(use.probed for use in group.uses):
        return None
    (loop,) = loops
    roots: list[Value] = []
    stack = [v for use in group.uses for v in use.ins if v.kind != DATA]
    seen: set[Value] = set()
    while stack:
        v = stack.pop()
        if v in seen:
            continue
        seen.add(v)
        if v.loops[:1] != loop:
            if v.loops or v.kind == PARAM:
                return None
        elif not isinstance(v.origin, Value):
            stack.extend(() if v.origin is None else v.origin[0].ins)
        elif v.loops != loop:
            stack.append(v.origin)
        elif v.kind == PARAM and v.origin.leaf is None:
            return None
        else:
            roots.append(v)
    return roots


def take_rows_in_remat(plan: Plan) -> None:
    """Lets the backward pass itself form rows that are kept, in the body of a scan with remat.

    What they are made of, inputs and cotangents of all steps, is then never stored.
    """
    uses = plan.program.uses
    again = {use for scan in _scans(plan.program.steps) if scan.remat for use in scan.uses}
    again -= {other for use in uses for other in (use.before, use.after) if other is not None}
    for group in plan.groups:
        size = sum(math.prod(v.shape) for v in group.values)
        # Rows of all steps exist twice: as they are stacked, and with the examples first.
        if group.keep and again.issuperset(group.uses) and 2 * size < _num_sources(group.uses):
            for use in group.uses:
                use.probed = True


def _scans(steps: Sequence[Any]) -> list[Scan]:
    found = [step for step in steps if isinstance(step, Scan)]
    return [*found, *(inner for scan in found for inner in _scans(scan.steps))]


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
    group: Group,
    views: Views,
    wanted: tuple[int, bool],
    leaf_size: int,
    in_gramian: Sequence[bool],
) -> None:
    seen = [views.of(v) for v in group.values]
    alone = len(group.values) == 1
    names = ", ".join(dict.fromkeys(use.name for use in group.uses))
    mixed = len({in_gramian[leaf] for leaf in group.leaves}) > 1
    sources = _num_sources(group.uses)
    if alone and seen[0] is not None and not mixed:
        group.method, leaf_size = "rows", math.prod(group.values[0].shape)
    group.keep = leaf_size <= _KEEP_ROWS * sources
    known = {use: factors_of(use) for use in group.uses}
    positions = [paths.num_positions(use, x) for use, x in known.items() if x is not None]
    many = max(positions, default=1) >= _MANY_POSITIONS
    group.keep |= many and leaf_size <= _KEEP_ROWS_OF_MANY * sources
    group.bent = any(v.bent for v in group.values)
    if group.bent:  # A bent value has no view.
        group.keep = True
        group.reason = f"used through a custom derivative that need not be linear, by {names}"
        return
    found = {
        use: None if x is None else paths.parts_of(use, x, views, alone) for use, x in known.items()
    }
    structure = structure_of(found, views, in_gramian)
    if structure is None:
        group.keep |= any(use.probed for use in group.uses)
        group.reason = _why_not(group, found, views, leaf_size <= sources, names)
    else:
        by_factors, by_rows = _costs(group, structure, wanted, leaf_size)
        if by_factors <= by_rows:
            group.method, group.keep = "factors", False
            group.parts, group.pairings = structure.parts, structure.pairings
            group.small = structure.small
            group.reason = f"inner products of inputs and cotangents of {names}"
        else:
            group.reason = f"{names} at so many positions that one row per example is cheaper"
            known_rows = [rule_of(u).reason for u in group.uses if rule_of(u).has_gradients(u)]
            if len(known_rows) == len(group.uses) == 1:
                group.reason = known_rows[0]
    if mixed and group.method != "factors":
        group.reason = f"used together with a parameter that is not shared, by {names}"


def _num_sources(uses: Sequence[Use]) -> int:
    """Returns the number of entries that the gradient of an example is made of."""
    return sum(
        math.prod(loop.length for loop in use.loops) * math.prod(v.aval.shape)
        for use in uses
        for v in (*use.data, *use.outs)
    )


def _why_not(
    group: Group,
    found: dict[Use, list[Part] | None],
    views: Views,
    is_smaller: bool,
    names: str,
) -> str:
    """Returns why a group has no structure that is known."""
    missing = [use for use, parts in found.items() if not parts]
    if not missing:
        return f"uses of different shape, by {names}"
    if any(use.probed for use in group.uses):
        return f"differentiated together with the example, by {names}"
    if any(views.of(v) is None for v in group.values):
        products = [use for use in missing if factors_of(use) is not None]
        if any(paths.is_entrywise(use.params[0], views) for use in products):
            return f"each entry has a factor of its own, so that nothing is cheaper, by {names}"
        return f"used through another function of the parameter, by {names}"
    if len(missing) == 1 and rule_of(missing[0]).has_gradients(missing[0]):
        return rule_of(missing[0]).reason
    if is_smaller:
        return f"no larger than the operands and cotangents of {names}"
    unknown = ", ".join(dict.fromkeys(use.name for use in missing))
    return f"no structured rule for {unknown}"


def factors_of(use: Use) -> Factors | None:
    """Returns the factors of a use of one value, if a rule knows them."""
    return None if use.probed or len(use.params) != 1 else rule_of(use).factors(use)


def parts_of(use: Use, views: Views, alone: bool) -> list[Part] | None:
    """Returns the parts of a use, if a rule knows its factors."""
    found = factors_of(use)
    return None if found is None else paths.parts_of(use, found, views, alone)


def _costs(
    group: Group, structure: Structure, size: tuple[int, bool], leaf_size: int
) -> tuple[float, float]:
    """Returns the costs of "factors" and of rows beside a weighted sum, in operations."""
    n, diagonal = size
    parts = structure.parts
    products = n if diagonal else n * n
    by_factors = 0.0
    for i, j in structure.pairings:
        entries, operations = _of_pair(parts[i], parts[j], products)
        by_factors += operations + MEMORY_COST * (2 * entries if entries > products else 0)
    if structure.small is not None:
        by_factors += structure.small.operations(parts, n, products)
    by_rows = 2.0 * products * leaf_size + MEMORY_COST * 2 * n * leaf_size
    for use in group.uses:
        value_size = math.prod(use.params[0].shape)
        if rule_of(use).writes_rows:
            by_rows += MEMORY_COST * n * value_size
            continue
        t = next((part.num_positions() for part in parts if part.use is use), 0)
        if not t:  # A small value: its rows are sums of entries.
            continue
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


def _entries(part: Part) -> int:
    """Returns the entries of both factors of an example."""

    def size(axes: Sequence[int]) -> int:
        return math.prod(part.value.shape[axis] for axis in axes)

    left, right = map(size, part.layout.own)
    left = 1 if part.factors.lookup is not None else left
    return part.num_positions() * size(part.layout.shared) * (left + right)


def _measure(group: Group, program: Program, n: int, diagonal: bool) -> None:
    """Notes the operations and the memory of a group's part of the Gramian."""
    products = n if diagonal else n * n
    if group.method == "factors":
        pairs = [(group.parts[i], group.parts[j]) for i, j in group.pairings]
        found = [_of_pair(a, b, products) for a, b in pairs]
        bits = max(jnp.finfo(program.leaves[leaf].aval.dtype).bits for leaf in group.leaves)
        group.operations = sum(operations for _, operations in found)
        if group.small is not None:
            group.operations += group.small.operations(group.parts, n, products)
        tables = [2 * entries for entries, _ in found]
        if not diagonal:  # These are made for some examples at a time: see `factors`.
            sizes = [n * (_entries(a) + (0 if a is b else _entries(b))) for a, b in pairs]
            tables = [min(t, max(s, 2 * products)) for t, s in zip(tables, sizes, strict=True)]
        group.memory = max(tables, default=0) * max(bits, 32) // 8
        return
    rows = _row_avals(group, program)
    num_chunks = group.uses[0].loops[0].length // group.steps if group.steps else 1
    rows_at_once = 2 * n // group.blocks if group.blocks > 1 else n
    group.operations = 2 * products * sum(math.prod(aval.shape) for aval in rows)
    group.memory = rows_at_once * _row_bytes(group, program) // num_chunks


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
