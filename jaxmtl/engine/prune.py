"""Drop uses on which the loss does not depend differentiably: behind stop_gradient, or for aux."""

from collections.abc import Iterable
from typing import Any

from jaxmtl.engine.program import DATA, Call, Program, Scan, Use, Value, is_float


def prune(program: Program) -> Program:
    """Turn uses that cannot reach the first output into ordinary calls.

    Their cotangents are zero, so that they add nothing; and they need not have a derivative, such
    as a ``while_loop`` under ``stop_gradient``.
    """
    live = {program.outs[0]}
    _mark(program.steps, live)
    uses: list[Use] = []
    program.steps = _rewrite(program.steps, live, uses)
    program.uses = uses
    for index, use in enumerate(uses):
        use.index = index
    return program


def _mark(steps: Iterable[Any], live: set[Value]) -> None:
    """Adds to ``live`` the DATA values from which a derivative reaches a live one."""
    for step in reversed(list(steps)):
        if isinstance(step, Scan):
            _mark_scan(step, live)
        elif step.name != "stop_gradient" and any(
            v in live and is_float(v.aval) for v in step.outs
        ):
            live.update(v for v in step.ins if v.kind == DATA and is_float(v.aval))


def _mark_scan(scan: Scan, live: set[Value]) -> None:
    inner = (*scan.carry_outs, *scan.ys)
    live.update(v for out, v in zip(scan.outs, inner, strict=True) if out in live)
    size = -1
    while len(live) != size:  # What is live in a carry is so at the end of the step before.
        size = len(live)
        _mark(scan.steps, live)
        pairs = zip(scan.carry, scan.carry_outs, strict=True)
        live.update(end for start, end in pairs if start in live)
    outer, start = (*scan.init, *scan.xs), (*scan.carry, *scan.slices)
    live.update(v for v, into in zip(outer, start, strict=True) if into in live)


def _rewrite(steps: Iterable[Any], live: set[Value], uses: list[Use]) -> list[Any]:
    kept: list[Any] = []
    for step in steps:
        if isinstance(step, Scan):
            first = len(uses)
            step.steps = _rewrite(step.steps, live, uses)
            step.uses = tuple(uses[first:])
        elif isinstance(step, Use):
            if any(step.outs[k] in live for k in step.tapped):
                uses.append(step)
            else:
                step = Call(step.fun, step.ins, step.outs, step.name, step.eqn)
        kept.append(step)
    return kept
