"""What a step of every rule costs beside a step of SGD, for table 7 of the Jacobian-descent paper.

All steps are timed in turn in one run, so that a busy machine disturbs them alike; the ratio is the
median over the rounds, seconds are those of the shortest step. Operations are those that XLA counts
in the compiled step, free of noise, but with the body of a solver's loop counted once.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.iwrm.methods import METHODS
from experiments.iwrm.networks import ARCHITECTURES, init
from experiments.iwrm.train import make_loss
from experiments.study import Record, Say
from experiments.timing import compiled, interleaved, make_step, median_ratio, ratio_of

BATCH, STEPS_PER_EPOCH = 32, 1024 // 32


def time_network(network: str, say: Say, *, seconds: float = 6.0) -> list[Record]:
    """Times SGD and every method on a network for so many seconds each."""
    architecture = ARCHITECTURES[network]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, *architecture.shape)), jnp.float32)
    batch = x, jnp.asarray(rng.integers(0, 10, BATCH))
    params, loss = init(architecture, jax.random.key(0)), make_loss(architecture)
    axes = (None, 0)
    steps = {"sgd": compiled(make_step(loss, None, in_axes=axes), params, (), batch)}
    for name, method in METHODS.items():
        rule = method.make(BATCH)
        step = make_step(loss, rule, in_axes=axes)
        steps[name] = compiled(step, params, rule.init(params), batch)
    times = interleaved({name: step.run for name, step in steps.items()}, 100, seconds)
    say(f"{network}: {len(steps)} rules")
    base = steps["sgd"].flops
    return [
        {
            "network": network,
            "aggregator": name,
            "seconds_per_epoch": float(f"{STEPS_PER_EPOCH * min(times[name]):.3g}"),
            "time_ratio": round(median_ratio(times[name], times["sgd"]), 2),
            "flops_ratio": (ratio := ratio_of(step.flops, base)) and round(ratio, 3),
        }
        for name, step in steps.items()
    ]
