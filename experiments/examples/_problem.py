"""What the four examples share: real digits with three named tasks, parameters, one optimizer.

The tasks are the digit (ten classes), its parity (two classes) and its amount of ink (regression).
Trunk and heads are dense layers. Nothing here knows of a framework but for JAX and optax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxmtl
from experiments.examples._named import by_task

TASKS = ("digit", "parity", "ink")
OUTPUTS = {"digit": 10, "parity": 2, "ink": 1}
PIXELS, HIDDEN = 64, 32

Layer = dict[str, jax.Array]  # kernel (inputs, outputs), bias (outputs,)
Params = dict[str, Any]  # {"trunk": Layer, "heads": {task: Layer}}


class Batch(NamedTuple):
    """Images and the targets of the three tasks, with any leading axes."""

    images: jax.Array  # (..., 64)
    digit: jax.Array  # (...,) int32
    parity: jax.Array  # (...,) int32
    ink: jax.Array  # (...,)


class Log(NamedTuple):
    """What a run reports: by task, one number for each step."""

    losses: dict[str, jax.Array]
    weights: dict[str, jax.Array]


def load_data() -> Batch:
    """Returns the 1,797 digits that come with scikit-learn."""
    digits = load_digits()
    images, labels = digits.data / 16, digits.target.astype(np.int32)
    ink = images.mean(axis=1)
    return Batch(
        jnp.asarray(images),
        jnp.asarray(labels),
        jnp.asarray(labels % 2),
        jnp.asarray((ink - ink.mean()) / ink.std()),
    )


def draw_batches(data: Batch, key: jax.Array, num_steps: int, batch_size: int = 32) -> Batch:
    """Returns the batches of a run, with leading axes (num_steps, batch_size)."""
    index = jax.random.randint(key, (num_steps, batch_size), 0, len(data.digit))
    return Batch(*(x[index] for x in data))


def initial_params(key: jax.Array) -> Params:
    """Returns the parameters from which each framework starts."""
    sizes = {"trunk": (PIXELS, HIDDEN)} | {task: (HIDDEN, n) for task, n in OUTPUTS.items()}
    keys = jax.random.split(key, len(sizes))
    layers = {
        name: {
            "kernel": jax.random.normal(k, size) / jnp.sqrt(size[0]),
            "bias": jnp.zeros(size[1]),
        }
        for k, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    return {"trunk": layers["trunk"], "heads": {task: layers[task] for task in TASKS}}


def losses_by_name(outputs: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """Returns the scalar loss of each task from the outputs (b, n) of its head."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
        "digit": jnp.mean(cross_entropy(outputs["digit"], batch.digit)),
        "parity": jnp.mean(cross_entropy(outputs["parity"], batch.parity)),
        "ink": jnp.mean((outputs["ink"][:, 0] - batch.ink) ** 2),
    }


def trunk_or_heads(params: Any) -> Any:
    """Labels each parameter by its path, which all four frameworks spell with the same names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "heads" if "heads" in jax.tree_util.keystr(path) else "trunk", params
    )


def radius(num_steps: int) -> optax.Schedule:
    """Returns the schedule of CAGrad's c: near the mean gradient at first, then averse."""
    return optax.linear_schedule(0.1, 0.7, num_steps)


def make_optimizer(num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns CAGrad with a scheduled radius on the trunk and plain sums on the heads, then Adam.

    A head has one task, so that the sum of its rows is its gradient. ``num_tasks`` shapes the
    state and stays out of what ``inject_hyperparams`` turns into arrays.
    """
    cagrad = optax.inject_hyperparams(jaxmtl.cagrad, static_args=("num_tasks",))
    return optax.chain(
        optax.partition(
            {
                "trunk": cagrad(c=radius(num_steps), num_tasks=len(TASKS)),
                "heads": jaxmtl.linear_scalarization(jnp.ones(len(TASKS))),
            },
            trunk_or_heads,
        ),
        optax.adam(optax.cosine_decay_schedule(1e-2, num_steps)),
    )


def make_log(losses: jax.Array, opt_state: Any) -> Log:
    """Returns the losses (m,) of a step and the weights that the optimizer gave them, by name."""
    weights = optax.tree.get(opt_state, "mtl_weights")
    return Log(by_task(losses, TASKS), by_task(weights, TASKS))


@partial(jax.jit, static_argnames=("num_steps", "num_seeds"))
def draw_seeds(num_steps: int, num_seeds: int) -> tuple[Params, Batch]:
    """Returns first parameters and batches of all seeds, with a leading axis (num_seeds,)."""
    data = load_data()

    def draw(key: jax.Array) -> tuple[Params, Batch]:
        params_key, data_key = jax.random.split(key)
        return initial_params(params_key), draw_batches(data, data_key, num_steps)

    return jax.vmap(draw)(jax.random.split(jax.random.key(0), num_seeds))


def train_seeds(
    train: Callable[[Params, Batch], Log], num_steps: int = 200, num_seeds: int = 3
) -> Log:
    """Trains all seeds in one compiled call and returns their log, (num_seeds, num_steps)."""
    log: Log = jax.jit(jax.vmap(train))(*draw_seeds(num_steps, num_seeds))
    return log


def show(log: Log) -> None:
    """Prints the losses and weights of the first and the last step, the mean over seeds."""
    for task in TASKS:
        losses, weights = (np.mean(x[task], axis=0) for x in (log.losses, log.weights))
        print(f"{task:<8} loss {losses[0]:.3f} -> {losses[-1]:.3f}, last weight {weights[-1]:.3f}")
