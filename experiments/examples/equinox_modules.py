"""Three tasks on digits with Equinox.

    python -m experiments.examples.equinox_modules

``eqx.partition`` gives the arrays, with respect to which rows are taken, and ``eqx.combine`` the
network again. Otherwise as ``experiments.examples.plain_pytrees``.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import jaxmtl
from experiments.examples import _problem as problem
from experiments.examples._named import stack_losses
from experiments.examples._problem import HIDDEN, OUTPUTS, PIXELS, TASKS, Batch, Layer, Log, Params


class Network(eqx.Module):
    """A shared trunk and a head for each task."""

    trunk: eqx.nn.Linear
    heads: dict[str, eqx.nn.Linear]

    def __init__(self, *, key: jax.Array):
        trunk_key, *keys = jax.random.split(key, 1 + len(TASKS))
        self.trunk = eqx.nn.Linear(PIXELS, HIDDEN, key=trunk_key)
        self.heads = {
            task: eqx.nn.Linear(HIDDEN, OUTPUTS[task], key=k)
            for task, k in zip(TASKS, keys, strict=True)
        }

    def __call__(self, image: jax.Array) -> dict[str, jax.Array]:
        """Maps ONE image (64,) to the outputs of every task, as Equinox's layers do."""
        z = jnp.tanh(self.trunk(image))
        return {task: self.heads[task](z) for task in TASKS}


def make_network(params: Params) -> Network:
    """Returns the network with given parameters in place of random ones."""

    def arrays(network: Network) -> list[jax.Array | None]:
        layers = [network.trunk, *(network.heads[task] for task in TASKS)]
        return [array for layer in layers for array in (layer.weight, layer.bias)]

    def values(layer: Layer) -> list[jax.Array]:
        return [layer["kernel"].T, layer["bias"]]  # weight is (outputs, inputs)

    layers = [params["trunk"], *(params["heads"][task] for task in TASKS)]
    new = [array for layer in layers for array in values(layer)]
    network: Network = eqx.tree_at(arrays, Network(key=jax.random.key(0)), new)
    return network


def train(params: Params, batches: Batch) -> Log:
    """Takes one step for each batch; safe under ``jit`` and ``vmap``."""
    arrays, static = eqx.partition(make_network(params), eqx.is_inexact_array)
    optimizer = problem.make_optimizer(len(batches.digit))

    def losses_fn(arrays: Network, batch: Batch) -> jax.Array:
        outputs = jax.vmap(eqx.combine(arrays, static))(batch.images)
        return stack_losses(problem.losses_by_name(outputs, batch), TASKS)

    def step(carry: tuple[Network, Any], batch: Batch) -> tuple[tuple[Network, Any], Log]:
        arrays, opt_state = carry
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(arrays, batch)
        updates, opt_state = optimizer.update(jacobian, opt_state, arrays, losses=losses)
        arrays = jaxmtl.apply_updates(arrays, updates)
        return (arrays, opt_state), problem.make_log(losses, opt_state)

    _, log = jax.lax.scan(step, (arrays, optimizer.init(arrays)), batches)
    return log


def main() -> None:
    """Trains all seeds at once."""
    problem.show(problem.train_seeds(train))


if __name__ == "__main__":
    main()
