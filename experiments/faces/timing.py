"""What a step of every method costs at 40 tasks beside one of equal weights, on random images.

Losses and their gradients cost the same on random images as on faces. A step by rows has two parts,
the Jacobian, which all methods by rows share, and what the method makes of it; each is timed in
turn with the step of equal weights, and the ratio of the step is the sum of theirs. Adam, which is
the same for all, is left out. The clock is the CPU time of the process where a CPU computes, as a
busy machine disturbs it least, and wall time elsewhere; operations are those that XLA counts in the
compiled programs, the body of a solver's loop once.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmtl
from experiments.faces.data import ATTRIBUTES, SIZE
from experiments.faces.methods import METHODS, Known
from experiments.faces.train import (
    Batch,
    Model,
    Options,
    init_rule,
    make_init,
    make_one_pass,
    make_passes,
    network_of,
    rate_of,
    rule_on_rows,
)
from experiments.study import Record, Say
from experiments.timing import Program, compiled, flops_of, interleaved, median_ratio

BASE, JACOBIAN = "linear_scalarization", "jacobian"
M = len(ATTRIBUTES)


class Problem(NamedTuple):
    """What every step starts from."""

    options: Options
    params: Any
    stats: Any
    batch: Batch
    columns: Any
    losses: jax.Array


def clock() -> Callable[[], float]:
    """Returns the clock of this device."""
    return time.process_time if jax.default_backend() == "cpu" else time.perf_counter


@cache
def make_problem(options: Options) -> Problem:
    """Returns random images and labels, and a network at its start."""
    rng = np.random.default_rng(0)
    b = options.batch_size
    images = rng.integers(0, 256, (b, SIZE, SIZE, 3), np.uint8)
    batch = Batch(jnp.asarray(images), jnp.asarray(rng.random((b, M)) < 0.3))
    params, stats = make_init(options, M)(jax.random.key(0))
    return Problem(options, params, stats, batch, jnp.arange(M), jnp.full(M, 0.7))


def _aggregator(options: Options, method: str) -> Any:
    return METHODS[method].build(M, Known(1000, rate_of(options, 1000), options.penalty))


@cache
def one_pass_program(options: Options, method: str) -> Program:
    """Returns the step of a method by one pass backwards.

    FAMO's has the further pass forward that gives the losses after the step.
    """
    problem, entry = make_problem(options), METHODS[method]
    model, aggregator = Model(network_of(options, M)), _aggregator(options, method)
    one_pass = make_one_pass(model, entry, aggregator)
    again = "previous_batch_losses" in entry.method.inputs
    rule = init_rule(model, entry, aggregator, M, problem.params, options.batch_size)

    def step(params: Any, rule: Any, stats: Any, batch: Batch, columns: Any, losses: Any) -> Any:
        extra = {"previous_batch_losses": losses} if again else {}
        key = jax.random.key(1)
        found = one_pass(params, rule, stats, batch, columns, key=key, **extra)
        if again:  # at parameters that the step has moved, or it would be the same pass
            moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, found[2])
            return *found, model.losses(moved, stats, batch, columns)[0]
        return found

    args = problem.params, rule, problem.stats, problem.batch, problem.columns, problem.losses
    return compiled(step, *args)


class Jacobian(NamedTuple):
    """The Jacobian, as the training computes it."""

    program: Program
    rows: list[Any]  # the last ones, for the methods


@cache
def jacobian_program(options: Options) -> Jacobian:
    """Returns the Jacobian: a pass forward, and one backward for each task or for a chunk."""
    problem = make_problem(options)
    args = problem.params, problem.stats, problem.batch, problem.columns
    kept: list[Any] = []

    def keep(rows: Any) -> Any:
        kept[:] = [rows]
        return rows

    if options.chunk_size is not None:
        losses = Model(network_of(options, M)).losses
        program = compiled(
            jaxmtl.value_and_jacobian(losses, has_aux=True, chunk_size=options.chunk_size), *args
        )
        # The body of the loop over chunks is counted once.
        return Jacobian(program._replace(run=lambda: keep(program.run()[1]), flops=None), kept)
    passes, units = make_passes(options, M), list(np.eye(M, dtype=np.float32))
    forward = passes.forward.lower(*args).compile()
    pull = forward(*args)[-1]
    backward = passes.backward.lower(pull, units[0]).compile()

    def stack(rows: list[Any]) -> Any:
        # Leaf by leaf: the whole of the rows is held twice for one leaf only.
        leaves = [jax.tree.leaves(row) for row in rows]
        rows.clear()
        made = []
        for i in range(len(leaves[0])):
            made.append(jnp.stack([row[i] for row in leaves]))
            for row in leaves:
                row[i] = None
        return jax.tree.unflatten(jax.tree.structure(problem.params), made)

    def run() -> Any:
        kept.clear()
        pull = forward(*args)[-1]
        return keep(stack([jax.block_until_ready(backward(pull, unit)) for unit in units]))

    once, each = flops_of(forward), flops_of(backward)
    flops = None if once is None or each is None else once + M * each
    memory = [executable.memory_analysis() for executable in (forward, backward)]
    held = sum(x.nbytes for x in jax.tree.leaves(pull))  # what the passes backwards read
    temporary = max(m.temp_size_in_bytes for m in memory) + held if all(memory) else None
    return Jacobian(Program(run, flops, temporary), kept)


def rule_program(options: Options, method: str) -> Program:
    """Returns what a method by rows does with the Jacobian: the gradients of trunk and heads."""
    problem, found = make_problem(options), jacobian_program(options)
    if not found.rows:
        found.program.run()
    rule = rule_on_rows(_aggregator(options, method), M)

    def update(rows: Any, state: Any, params: Any, losses: jax.Array) -> Any:
        return rule.update(rows, state, params, losses=losses, key=jax.random.key(1))

    return compiled(
        update, found.rows[0], rule.init(problem.params), problem.params, problem.losses
    )


def _timed(programs: dict[str, Program], repeats: int) -> dict[str, list[float]]:
    runs = {name: program.run for name, program in programs.items()}
    return interleaved(runs, repeats, clock=clock())


def measure(options: Options, method: str, repeats: int, say: Say) -> list[Record]:
    """Returns the record of a method, or of the Jacobian, beside a step of equal weights."""
    options = replace(options, made_up=None)
    base = one_pass_program(options, BASE)
    begin = time.perf_counter()
    if method == JACOBIAN:
        route, program = "rows", jacobian_program(options).program
    elif METHODS[method].route == "rows":
        route, program = "rows", rule_program(options, method)
    else:
        route, program = METHODS[method].route, one_pass_program(options, method)
    times = _timed({BASE: base} | {method: program}, repeats)
    record = {
        "method": method,
        "route": route,
        "part": "rule" if route == "rows" and method != JACOBIAN else "network",
        "width": options.width,
        "batch_size": options.batch_size,
        "chunk_size": options.chunk_size,
        "tasks": M,
        "repeats": len(times[method]),
        "clock": "CPU" if jax.default_backend() == "cpu" else "wall",
        "seconds": float(f"{statistics.median(times[method]):.4g}"),
        "base_seconds": float(f"{statistics.median(times[BASE]):.4g}"),
        "ratio": round(median_ratio(times[method], times[BASE]), 4),
        "flops": program.flops,
        "base_flops": base.flops,
        "bytes": program.bytes,
        "base_bytes": base.bytes,
    }
    whole = time.perf_counter() - begin
    say(f"{method}: {record['ratio']:.3g} steps of equal weights ({whole:.0f} s)")
    return [record]
