"""What a step of every rule costs beside a step of SGD, for table 7 of the Jacobian-descent paper.

All steps are timed in turn in one run, so that a busy machine disturbs them alike; the ratio is the
median over the rounds, seconds are those of the shortest step. Operations are those that XLA counts
in the compiled step, free of noise, but with the body of a solver's loop counted once.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxmtl
from experiments._runs import append_records, environment, read_records
from experiments.benchmarks.gramian import Step, measure
from experiments.models.iwrm_networks import ARCHITECTURES, init, logits

Losses = Callable[..., Any]
STEPS_PER_EPOCH = 1024 // 32


def make_step(loss: Losses, aggregator: Any) -> Callable[..., Any]:
    """Return ``(params, batch) -> (new params, losses)``; None stands for plain SGD."""
    if aggregator is None:

        def value_and_grad(params: Any, batch: Any) -> Any:
            mean = lambda p: jax.vmap(loss, (None, 0))(p, batch).mean()  # noqa: E731
            return jax.value_and_grad(mean)(params)

    elif aggregator.weighting is not None:
        weighted = jaxmtl.value_and_grad(loss, aggregator, in_axes=(None, 0))

        def value_and_grad(params: Any, batch: Any) -> Any:
            (losses, _), grads = weighted(params, aggregator.init(params), batch)
            return losses, grads

    else:
        rows = jaxmtl.value_and_jacobian(loss, in_axes=(None, 0))

        def value_and_grad(params: Any, batch: Any) -> Any:
            losses, jacobian = rows(params, batch)
            update, _ = aggregator.update(jacobian, aggregator.init(params), params, losses=losses)
            return losses, update

    def step(params: Any, batch: Any) -> Any:
        losses, grads = value_and_grad(params, batch)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), losses

    return step


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the ratios of times that were measured one after the other."""
    return float(np.median([a / b for a, b in zip(times, base, strict=False)]))


def _run(executable: Callable[..., Any], args: tuple[Any, ...]) -> None:
    jax.block_until_ready(executable(*args))


def time_rules(
    results: Path,
    rules: Mapping[str, Any],
    console: Console,
    *,
    networks: tuple[str, ...] = ("mnist", "cifar10"),
    seconds: float = 6.0,
) -> None:
    """Append the times of SGD and of every rule on networks that the file does not hold yet."""
    done = {record["network"] for record in read_records(results)}
    for network in networks:
        if network in done:
            continue
        architecture = ARCHITECTURES[network]

        def loss(params: Any, example: Any, architecture: Any = architecture) -> Any:
            x, label = example
            return -jax.nn.log_softmax(logits(architecture, params, x))[label]

        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(32, *architecture.shape)), jnp.float32)
        args = init(architecture, jax.random.key(0)), (x, jnp.asarray(rng.integers(0, 10, 32)))
        steps = {}
        for name, aggregator in {"sgd": None, **rules}.items():
            executable = jax.jit(make_step(loss, aggregator)).lower(*args).compile()
            cost = executable.cost_analysis()
            steps[name] = Step(partial(_run, executable, args), cost["flops"] if cost else None)
        times = measure(steps, 100, seconds)
        base = steps["sgd"].flops
        records = [
            {
                "network": network,
                "aggregator": name,
                "seconds_per_epoch": float(f"{STEPS_PER_EPOCH * min(times[name]):.3g}"),
                "time_ratio": round(median_ratio(times[name], times["sgd"]), 2),
                "flops_ratio": round(step.flops / base, 3) if step.flops and base else None,
                **environment(),
            }
            for name, step in steps.items()
        ]
        append_records(results, records)
        console.print(f"{results.stem} {network}: {len(records)} rules")
