"""The learner alone, on made-up transitions of ten tasks: what a rule adds to an update."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.metaworld.learner import Batch, Options, make_learner
from experiments.metaworld.methods import BASELINE
from experiments.study import Record, Say
from experiments.timing import Program, compiled, interleaved, median_ratio

SIZES = {"3 x 128, 64 per task": ((128,) * 3, 64), "3 x 400, 128 per task": ((400,) * 3, 128)}
OBSERVATION, ACTION = 39, 4


def made_up_batch(options: Options) -> Batch:
    """Returns random transitions of every task, rewards of different sizes."""
    generator = np.random.default_rng(0)
    m, b = len(options.tasks), options.batch_size

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=(m, b, *shape)), jnp.float32)

    rewards = normal() * jnp.arange(1, m + 1)[:, None]
    return Batch(normal(OBSERVATION), jnp.tanh(normal(ACTION)), rewards, normal(OBSERVATION))


def program_of(options: Options, method: str) -> Program:
    """Returns one compiled update."""
    learner = make_learner(options, method, OBSERVATION, ACTION)
    agent = jax.jit(learner.init)(jax.random.key(0))
    return compiled(learner.update, agent, made_up_batch(options), jax.random.key(1))


def measure(options: Options, methods: tuple[str, ...], size: str, say: Say) -> list[Record]:
    """Returns a record for each rule: operations, milliseconds, and what it adds to the mean's.

    Operations count the body of a loop once; time counts every round of it.
    """
    widths, batch_size = SIZES[size]
    options = replace(options, widths=widths, batch_size=batch_size)
    programs: dict[str, Any] = {}
    for name in dict.fromkeys((BASELINE, *methods)):
        programs[name] = program_of(options, name)
        say(f"{size}: {name} compiled")
    times = interleaved({name: p.run for name, p in programs.items()}, 60, seconds=10)
    base = programs[BASELINE]
    records = []
    for name, program in programs.items():
        ratio = median_ratio(times[name], times[BASELINE])
        records.append(
            {
                "size": size,
                "method": name,
                "tasks": len(options.tasks),
                "flops": program.flops,
                "flops_ratio": round(program.flops / base.flops, 3) if base.flops else None,
                "milliseconds": round(1e3 * float(np.median(times[name])), 2),
                "time_ratio": round(ratio, 3),
                "share_of_rule": round(max(1 - 1 / ratio, 0.0), 3),
            }
        )
    return records
