"""Decides, per parameter, how its part of the Gramian of m losses over one batch is computed.

All tasks have the same inputs A at a layer and differ in the cotangents D_i of its output. The
gradients ``A^T D_i`` are compared (rows), or not formed: with ``K = A A^T`` their inner products
are ``sum(D_i * (K D_j))`` (structured). Where the rows of all tasks do not fit, some of them at a
time are pushed forward again: ``sum(D_i * (A A^T D_j))``.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxmtl.engine import factors, paths
from jaxmtl.engine.plan import MEMORY_COST, Group, Plan, group_uses, parts_of
from jaxmtl.engine.program import PARAM, Program, Scan, Use, Value, is_float, operations
from jaxmtl.engine.views import Views

# The cotangents that exist at a time, of all tasks at some layers, take at most this many bytes.
_MOST_BYTES = 2**30
_MOST_PAIRS = 64


def _of_use(use: Use) -> int:
    times = math.prod(loop.length for loop in use.loops)
    return 0 if use.eqn is None else times * operations(use.eqn)


def _of_origins(values: Sequence[Value]) -> int:
    """Returns the operations from the leaves to these values."""
    calls: dict[Any, None] = {}
    stack = list(values)
    while stack:
        v = stack.pop()
        if isinstance(v.origin, Value):
            stack.append(v.origin)
        elif v.origin is not None and v.origin[0] not in calls:
            calls[v.origin[0]] = None
            stack.extend(u for u in v.origin[0].ins if u.kind == PARAM)
    return sum(operations(call.eqn) for call in calls if call.eqn is not None)


def largest_output(program: Program) -> int:
    """Returns the number of entries of the largest output of a use."""
    return max((num_outputs(use) for use in program.uses), default=0)


def num_outputs(use: Use) -> int:
    """Returns the number of entries of the outputs of a use."""
    times = math.prod(loop.length for loop in use.loops)
    return times * sum(math.prod(aval.shape) for aval in use.taps)


def make_task_plan(
    program: Program, in_gramian: Sequence[bool], num_tasks: int, of_use: dict[Use, int]
) -> tuple[Plan, str]:
    """Chooses a method for each group of uses.

    Args:
      program: The losses of m tasks over one batch.
      in_gramian: For each leaf, whether it is part of the Gramian.
      num_tasks: m.
      of_use: The task that depends on a use, for uses on which one alone depends.

    Returns:
      The plan, and why it is dearer than to push whole gradients through the losses, or "".
    """
    views = Views()
    groups = group_uses(program, views)
    plan = Plan(program, groups, tuple(in_gramian))
    largest = largest_output(program)
    found, pushed = 0.0, 0.0
    for group in groups:
        if not plan.counts(group):
            group.reason = "not shared: left out of the Gramian"
            continue
        tasks = {of_use.get(use, -1) for use in group.uses}
        m = num_tasks if -1 in tasks else len(tasks)
        sizes = [math.prod(program.leaves[i].shape) for i in group.leaves if in_gramian[i]]
        is_mixed = not all(in_gramian[i] for i in group.leaves)
        budget = max(2 * num_tasks, 3) * largest
        num_pulls = m
        if m > 1 and -1 not in tasks:  # Each has passes of its own, which stay in memory anyway.
            num_pulls = 1
            budget += sum(map(num_outputs, program.uses))
        cost, whole = _choose(group, views, m, num_pulls, sum(sizes), is_mixed, budget)
        _measure(group, program, m, num_pulls)
        found, pushed = found + cost, pushed + whole * num_tasks / m
    pushed += num_tasks * _of_data(program)
    size = max((program.leaves[i].aval.dtype.itemsize for i in group_leaves(groups)), default=4)
    if found > pushed:
        return plan, "which takes fewer operations than to compare them"
    if 3 * num_tasks * largest * size > _MOST_BYTES:
        return plan, "as the cotangents of all tasks at one layer take much memory"
    return plan, ""


def group_leaves(groups: Sequence[Group]) -> set[int]:
    """Returns the leaves behind groups."""
    return {leaf for group in groups for leaf in group.leaves}


def _of_data(program: Program) -> int:
    """Returns the operations of uses whose other operand changes with the parameters."""
    moved: set[Value] = set()
    total = 0

    def follow(steps: Sequence[Any]) -> None:
        nonlocal total
        for step in steps:
            if isinstance(step, Scan):
                outer, inner = (*step.init, *step.xs), (*step.carry, *step.slices)
                moved.update(v for v, u in zip(inner, outer, strict=True) if u in moved)
                follow(step.steps)
                results = (*step.carry_outs, *step.ys)
                moved.update(v for v, u in zip(step.outs, results, strict=True) if u in moved)
                continue
            if any(v in moved for v in step.ins):
                total += _of_use(step) if isinstance(step, Use) else 0
            elif not isinstance(step, Use):
                continue
            moved.update(v for v in step.outs if is_float(v.aval))

    follow(program.steps)
    return total


def _choose(
    group: Group,
    views: Views,
    m: int,
    num_pulls: int,
    leaf_size: int,
    is_mixed: bool,
    budget: int,
) -> tuple[float, float]:
    """Chooses the method of a group.

    Args:
      group: The group.
      views: What values hold.
      m: The number of tasks that depend on it.
      num_pulls: How many backward passes through all of its uses their rows take.
      leaf_size: The number of entries of its leaves that count.
      is_mixed: Whether there are others.
      budget: How many numbers may exist beside the cotangents.

    Returns:
      What it costs, and what it costs to push every gradient through the losses.
    """
    names = ", ".join(dict.fromkeys(use.name for use in group.uses))
    alone = len(group.values) == 1
    size = leaf_size
    group.method = "leaf rows"
    of_origins = _of_origins(group.values)
    if alone and not is_mixed and views.of(group.values[0]) is not None:
        group.method, size, of_origins = "rows", math.prod(group.values[0].shape), 0
    pull = sum(map(_of_use, group.uses)) + of_origins
    outputs = sum(map(num_outputs, group.uses))
    chunk_size = min(max(budget // (2 * max(size, 1)), 1), m)
    of_rows = m * size + m * size // factors.num_blocks(m)
    moved = 2 * MEMORY_COST * m * size
    push = 2.0 * m * pull + moved
    options = {"push": push + 2.0 * m * m * outputs}
    if of_rows <= budget:
        options["rows"] = num_pulls * pull + moved + _of_half(m) * size
    parts = [] if is_mixed else [parts_of(use, views, alone) for use in group.uses]
    paired = None
    if parts and all(parts):
        paired = _pairings([p for some in parts for p in some or ()], views)
    if paired and not any(p.factors.compute for some in parts for p in some or ()):
        cost, memory = _of_factors(*paired, m)
        if memory <= budget:
            options["factors"] = cost
    best = min(options, key=lambda key: options[key])
    if best == "factors" and paired:
        group.method, group.parts, group.pairings = "factors", *paired
        group.reason = f"inner products of inputs and cotangents of {names}"
    elif best == "push":
        group.chunk_size = chunk_size
        group.reason = f"the gradients of all tasks are larger than what they are made of, {names}"
        if of_rows <= budget:
            group.reason = f"a gradient has many more entries than the outputs of {names}"
    elif size <= outputs:
        group.reason = f"no larger than the operands and cotangents of {names}"
    elif "factors" in options:
        group.reason = f"{names} at so many positions that one row per task is cheaper"
    else:
        group.reason = f"no structured rule for {names}"
    return options[best], push


def _of_half(m: int) -> float:
    """Returns the operations per entry of the inner products of m rows, one half of them."""
    return m * m * (1 + 1 / factors.num_blocks(m))


def _pairings(
    parts: Sequence[paths.Part], views: Views
) -> tuple[tuple[paths.Part, ...], dict[tuple[int, int], str]] | None:
    found: dict[tuple[int, int], str] = {}
    for i, p in enumerate(parts):
        for j, q in enumerate(parts[: i + 1]):
            relation = views.relation(p.value, q.value)
            if relation == "apart":
                continue
            how = paths.pairing(p, q) if relation == "same" else None
            if how is None or p.factors.choice is not None or len(found) == _MOST_PAIRS:
                return None
            found[i, j] = how
    return tuple(parts), found


def _of_factors(
    parts: Sequence[paths.Part], pairings: dict[tuple[int, int], str], m: int
) -> tuple[float, int]:
    """Returns the cost of structured products, and how many numbers exist meanwhile."""
    cost, memory = 0.0, 0
    for (i, j), how in pairings.items():
        some, entries = _of_pair(parts[i], parts[j], how, m)
        cost += some + 2 * MEMORY_COST * entries
        memory = max(memory, entries)
    return cost, memory


def _of_pair(a: paths.Part, b: paths.Part, how: str, m: int) -> tuple[float, int]:
    """Returns the operations of the inner products of two parts, and the entries of tables."""

    def size(axes: Sequence[int]) -> int:
        return math.prod(a.value.shape[axis] for axis in axes)

    shared, (left, right) = size(a.layout.shared), map(size, a.layout.own)
    t, s = shared * a.num_positions(), b.num_positions()
    lookups = (a.factors.lookup is not None) + (b.factors.lookup is not None)
    if how == "crossed":
        width = right + (0 if lookups else left)
        return 2.0 * m * t * s * width + 2.0 * m * m * t * s, 2 * m * t * s
    entries = 2 * m * t * right // factors.num_blocks(m)
    last = (_of_half(m) if a is b else 2.0 * m * m) * t * right
    if lookups == 2:
        return last, entries
    table = 0 if lookups else 2.0 * t * s * left
    return table + 2.0 * m * t * s * right + last, t * s + entries


def _measure(group: Group, program: Program, m: int, num_pulls: int) -> None:
    """Notes the operations and the memory of a group's part of the Gramian."""
    leaves = [program.leaves[leaf].aval for leaf in group.leaves]
    itemsize = max(max(jnp.finfo(aval.dtype).bits for aval in leaves), 32) // 8
    if group.method == "factors":
        found = [
            _of_pair(group.parts[i], group.parts[j], how, m)
            for (i, j), how in group.pairings.items()
        ]
        group.operations = round(sum(some for some, _ in found))
        group.memory = itemsize * max(entries for _, entries in found)
        return
    size = sum(math.prod(aval.shape) for aval in leaves)
    pull = sum(map(_of_use, group.uses)) + _of_origins(group.values)
    if group.method == "rows":
        size = math.prod(group.values[0].shape)
        pull = sum(map(_of_use, group.uses))
    if group.chunk_size:
        group.operations = 2 * m * (pull + m * sum(map(num_outputs, group.uses)))
    else:
        group.operations = round(num_pulls * pull + _of_half(m) * size)
    group.memory = itemsize * (group.chunk_size or m) * size
