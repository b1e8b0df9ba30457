"""What a step of every rule costs beside a step of SGD, for table 7 of the Jacobian-descent paper.

All steps are timed in turn in one run, so that a busy machine disturbs them alike; the ratio is the
median over the rounds, seconds are those of the shortest step. Operations are those that XLA counts
in the compiled step, free of noise, but with the body of a solver's loop counted once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmtl
from experiments.iwrm.methods import METHODS
from experiments.iwrm.networks import ARCHITECTURES, init
from experiments.iwrm.train import make_loss
from experiments.study import Record, Say
from experiments.timing import compiled, interleaved, median_ratio, ratio_of

Losses = Callable[..., Any]
BATCH, STEPS_PER_EPOCH = 32, 1024 // 32


def make_step(loss: Losses, aggregator: Any) -> Callable[..., Any]:
    """Returns ``(params, batch) -> (new params, losses)``; None stands for plain SGD."""
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


def time_network(network: str, say: Say, *, seconds: float = 6.0) -> list[Record]:
    """Times SGD and every method on a network for so many seconds each."""
    architecture = ARCHITECTURES[network]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, *architecture.shape)), jnp.float32)
    batch = x, jnp.asarray(rng.integers(0, 10, BATCH))
    params, loss = init(architecture, jax.random.key(0)), make_loss(architecture)
    rules = {"sgd": None} | {name: method.make(BATCH) for name, method in METHODS.items()}
    steps = {name: compiled(make_step(loss, rule), params, batch) for name, rule in rules.items()}
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
