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
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments._runs import environment
from jaxmtl import (
    aligned_mtl,
    apply_updates,
    cagrad,
    config,
    db_mtl,
    dual_proj,
    dwa,
    excess_mtl,
    fairgrad,
    famo,
    gls,
    go4align,
    graddrop,
    gradnorm,
    gradvac,
    imtl,
    imtl_g,
    imtl_l,
    ldc_mtl,
    linear_scalarization,
    mgda,
    moco,
    modo,
    nash_mtl,
    pcgrad,
    rlw,
    scale_invariant,
    sdmgrad,
    stch,
    uncertainty_weighting,
    upgrad,
    value_and_grad,
    value_and_jacobian,
)

Step = Callable[..., Any]

LOSS_RULES: dict[str, Callable[[int], Any]] = {
    "linear_scalarization": lambda m: linear_scalarization(),
    "scale_invariant": lambda m: scale_invariant(),
    "rlw": lambda m: rlw(),
    "dwa": lambda m: dwa(num_tasks=m),
    "uncertainty_weighting": lambda m: uncertainty_weighting(num_tasks=m),
    "imtl_l": lambda m: imtl_l(num_tasks=m),
    "gls": lambda m: gls(),
    "stch": lambda m: stch(),
    "famo": lambda m: famo(num_tasks=m),
    "go4align": lambda m: go4align(num_tasks=m),
    "ldc_mtl": lambda m: ldc_mtl(num_tasks=m),
}
RULES = LOSS_RULES | {
    "modo": lambda m: modo(num_tasks=m),
    "sdmgrad": lambda m: sdmgrad(num_tasks=m),
    "gradnorm": lambda m: gradnorm(num_tasks=m),
    "imtl": lambda m: imtl(num_tasks=m),
    "mgda": lambda m: mgda(),
    "upgrad": lambda m: upgrad(),
    "dual_proj": lambda m: dual_proj(),
    "pcgrad": lambda m: pcgrad(),
    "gradvac": lambda m: gradvac(num_tasks=m),
    "cagrad": lambda m: cagrad(0.5),
    "imtl_g": lambda m: imtl_g(),
    "nash_mtl": lambda m: nash_mtl(),
    "fairgrad": lambda m: fairgrad(2.0),
    "aligned_mtl": lambda m: aligned_mtl(),
    "config": lambda m: config(),
    "graddrop": lambda m: graddrop(),
    "excess_mtl": lambda m: excess_mtl(num_tasks=m),
    "moco": lambda m: moco(num_tasks=m, beta=0.5),
    "db_mtl": lambda m: db_mtl(num_tasks=m),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    tasks: tuple[int, ...] = (2, 8, 40, 128)
    rules: tuple[str, ...] = tuple(RULES)
    width: int = 256  # of the trunk's two layers
    batch: int = 64
    repeats: int = 20
    out: Path | None = None


def task_losses(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the (m,) mean squared errors of a trunk with one output per task."""
    for layer in params["trunk"]:
        x = jax.nn.relu(x @ layer)
    return jnp.mean((x @ params["heads"] - y) ** 2, axis=0)


def make_problem(num_tasks: int, width: int, batch: int) -> tuple[Any, jax.Array, jax.Array]:
    """Return parameters, inputs and targets."""
    keys = jax.random.split(jax.random.key(0), 5)
    scale = (2 / width) ** 0.5
    trunk = [scale * jax.random.normal(key, (width, width)) for key in keys[:2]]
    heads = jax.random.normal(keys[2], (width, num_tasks)) / width**0.5
    x = jax.random.normal(keys[3], (batch, width))
    y = jax.random.normal(keys[4], (batch, num_tasks))
    return {"trunk": trunk, "heads": heads}, x, y


def extras(num_tasks: int) -> dict[str, jax.Array]:
    """Return what some rules read besides the losses."""
    return {
        "previous_batch_losses": jnp.ones(num_tasks),
        "cross_gramian": jnp.eye(num_tasks),
    }


def gradient_step(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """One step on the mean loss, the unit of the table."""

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        losses = task_losses(params, x, y)
        return jnp.mean(losses), losses

    (_, losses), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return losses, descend(params, grads)


def descend(params: Any, grads: Any) -> Any:
    """Return the parameters after a step."""
    return apply_updates(params, jax.tree.map(lambda g: -0.01 * g, grads))


def make_step(aggregator: Any, num_tasks: int) -> Step:
    """Return one step of a rule, on the Jacobian-free route where it has a weighting."""

    def with_jacobian(params: Any, state: Any, x: jax.Array, y: jax.Array, inputs: Any) -> Any:
        losses, jacobian = value_and_jacobian(task_losses)(params, x, y)
        update, state = aggregator.update(jacobian, state, params, losses=losses, **inputs)
        return losses, state, descend(params, update)

    if aggregator.weighting is None:
        return with_jacobian
    function = value_and_grad(task_losses, aggregator, chunk_size=num_tasks)

    def without(params: Any, state: Any, x: jax.Array, y: jax.Array, inputs: Any) -> Any:
        (losses, state), grads = function(params, state, x, y, **inputs)
        return losses, state, descend(params, grads)

    return without


def flops_of(compiled: Any) -> float:
    """Return the compiled operations."""
    return float((compiled.cost_analysis() or {}).get("flops", float("nan")))


def median_times(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each function, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if index:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(options: Options) -> list[dict[str, Any]]:
    """Return one record per number of tasks and rule."""
    records = []
    for m in options.tasks:
        params, x, y = make_problem(m, options.width, options.batch)
        base = jax.jit(gradient_step).lower(params, x, y).compile()
        programs: dict[str, tuple[Any, tuple[Any, ...]]] = {"gradient": (base, (params, x, y))}
        for name in options.rules:
            aggregator = RULES[name](m)
            args = (params, aggregator.init(params), x, y, extras(m))
            programs[name] = jax.jit(make_step(aggregator, m)).lower(*args).compile(), args
        runs = {name: partial(program, *args) for name, (program, args) in programs.items()}
        times = median_times(runs, options.repeats)
        for name, (program, _) in programs.items():
            records.append(
                {
                    "tasks": m,
                    "rule": name,
                    "flops": flops_of(program),
                    "flops_ratio": flops_of(program) / flops_of(base),
                    "milliseconds": 1e3 * times[name],
                    "time_ratio": times[name] / times["gradient"],
                }
            )
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the ratios as text: operations / time, one column per number of tasks."""
    tasks = sorted({record["tasks"] for record in records})
    cells = {(r["rule"], r["tasks"]): r for r in records}
    lines = [f"{'operations / time':<24}" + "".join(f"{f'm = {m}':>16}" for m in tasks)]
    for rule in dict.fromkeys(record["rule"] for record in records):
        ratios = [cells[rule, m] for m in tasks]
        row = (f"{r['flops_ratio']:.2f} / {r['time_ratio']:.2f}" for r in ratios)
        lines.append(f"{rule:<24}" + "".join(f"{cell:>16}" for cell in row))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    default = Options()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=default.tasks)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=default.rules)
    parser.add_argument("--width", type=int, default=default.width)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = Options(**vars(parser.parse_args(arguments)))
    records = measure(options)
    if options.out is not None:
        with options.out.open("a") as file:
            file.writelines(json.dumps(record | environment()) + "\n" for record in records)
    print(table(records))


if __name__ == "__main__":
    main()
