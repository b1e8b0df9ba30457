"""What one step of every rule costs beside one gradient, against the number of tasks.

    python -m experiments.benchmarks.overhead                           # 2, 8, 40 and 128 tasks
    python -m experiments.benchmarks.overhead --tasks 2 8 --rules famo ldc_mtl upgrad

One network with a shared trunk and a linear output per task; each rule makes the same step from
the same batch on the Jacobian-free route, rules that need coordinates with the Jacobian. Printed
are compiled operations and the median time, both divided by those of the gradient step on the mean
loss. The rules are timed in turns, so that a busy machine disturbs all alike. Operations
count the body of a loop once: those of solvers, hardly any beside the network's.

What is not in a step: FAMO's second evaluation of the losses (half a gradient or less) and the two
further batches of MoDo and SDMGrad.

Published ratios of wall time to linear scalarization: LDC-MTL at most 1.11, FAMO and GO4Align
alike, Nash-MTL about 12 times LDC-MTL on the 40 tasks of CelebA (Xiao et al. 2025, section 5.1).
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import methods, timing
from experiments.methods import METHODS
from experiments.study import append_records, environment
from experiments.timing import Program, compiled, interleaved, ratio_of
from experiments.timing import flops_of as flops_of

# Those that promise the price of one gradient: they see losses, and no second batch.
LOSS_RULES: dict[str, Callable[[int], Any]] = {
    name: method.make
    for name, method in METHODS.items()
    if methods.needs(method) == "none" and "cross_gramian" not in method.inputs
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    tasks: tuple[int, ...] = (2, 8, 40, 128)
    rules: tuple[str, ...] = tuple(METHODS)
    width: int = 256  # of the trunk's two layers
    batch: int = 64
    repeats: int = 20
    out: Path | None = None


def task_losses(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the (m,) mean squared errors of a trunk with one output per task."""
    for layer in params["trunk"]:
        x = jax.nn.relu(x @ layer)
    return jnp.mean((x @ params["heads"] - y) ** 2, axis=0)


def make_problem(num_tasks: int, width: int, batch: int) -> tuple[Any, jax.Array, jax.Array]:
    """Returns parameters, inputs and targets."""
    keys = jax.random.split(jax.random.key(0), 5)
    scale = (2 / width) ** 0.5
    trunk = [scale * jax.random.normal(key, (width, width)) for key in keys[:2]]
    heads = jax.random.normal(keys[2], (width, num_tasks)) / width**0.5
    x = jax.random.normal(keys[3], (batch, width))
    y = jax.random.normal(keys[4], (batch, num_tasks))
    return {"trunk": trunk, "heads": heads}, x, y


def extras(num_tasks: int) -> dict[str, jax.Array]:
    """Returns what some rules read besides the losses."""
    return {"previous_batch_losses": jnp.ones(num_tasks), "cross_gramian": jnp.eye(num_tasks)}


def gradient_step(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """Takes a step on the mean loss, the unit of the table."""
    return timing.make_step(task_losses, None)(params, (), x, y)


def make_step(aggregator: Any, num_tasks: int) -> Callable[..., Any]:
    """Returns one step of a rule, of which the last argument is a dict of further inputs."""
    step = timing.make_step(task_losses, aggregator, chunk_size=num_tasks)
    return lambda params, state, x, y, inputs: step(params, state, x, y, **inputs)


def measure(options: Options) -> list[dict[str, Any]]:
    """Returns one record per number of tasks and rule."""
    records = []
    for m in options.tasks:
        params, x, y = make_problem(m, options.width, options.batch)
        programs: dict[str, Program] = {"gradient": compiled(gradient_step, params, x, y)}
        for name in options.rules:
            if METHODS[name].min_tasks <= m:
                rule = METHODS[name].make(m)
                args = params, rule.init(params), x, y, extras(m)
                programs[name] = compiled(make_step(rule, m), *args)
        runs = {name: program.run for name, program in programs.items()}
        found = interleaved(runs, options.repeats)
        times = {name: statistics.median(seconds) for name, seconds in found.items()}
        base = programs["gradient"].flops
        records += [
            {
                "tasks": m,
                "rule": name,
                "flops": program.flops,
                "flops_ratio": ratio_of(program.flops, base),
                "milliseconds": 1e3 * times[name],
                "time_ratio": times[name] / times["gradient"],
            }
            for name, program in programs.items()
        ]
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Returns the ratios as text: operations / time, one column per number of tasks."""
    tasks = sorted({record["tasks"] for record in records})
    cells = {(r["rule"], r["tasks"]): r for r in records}
    lines = [f"{'operations / time':<24}" + "".join(f"{f'm = {m}':>16}" for m in tasks)]
    for rule in dict.fromkeys(record["rule"] for record in records):
        ratios = [cells.get((rule, m)) for m in tasks]  # some rules need more tasks
        row = (f"{r['flops_ratio']:.2f} / {r['time_ratio']:.2f}" if r else "" for r in ratios)
        lines.append(f"{rule:<24}" + "".join(f"{cell:>16}" for cell in row))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    default = Options()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=default.tasks)
    parser.add_argument("--rules", nargs="+", choices=list(METHODS), default=default.rules)
    parser.add_argument("--width", type=int, default=default.width)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = Options(**vars(parser.parse_args(arguments)))
    records = measure(options)
    if options.out is not None:
        append_records(options.out, [record | environment() for record in records])
    print(table(records))


if __name__ == "__main__":
    main()
