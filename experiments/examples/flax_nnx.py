"""Three tasks on digits with Flax NNX and ``nnx.Optimizer``.

    python -m experiments.examples.flax_nnx

``nnx.split`` gives the parameters, with respect to which rows are taken; ``optimizer.update`` takes
the Jacobian in place of gradients and hands ``losses`` on. Model and optimizer pass through
``scan`` and ``vmap`` as their state. Otherwise as ``experiments.examples.plain_pytrees``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxmtl
from experiments.examples import _problem as problem
from experiments.examples._named import stack_losses
from experiments.examples._problem import HIDDEN, OUTPUTS, PIXELS, TASKS, Batch, Layer, Log, Params


class Network(nnx.Module):
    """A shared trunk and a head for each task."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.trunk = nnx.Linear(PIXELS, HIDDEN, rngs=rngs)
        self.heads = nnx.Dict(
            {task: nnx.Linear(HIDDEN, OUTPUTS[task], rngs=rngs) for task in TASKS}
        )

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (b, 64) to the outputs of every task."""
        z = jnp.tanh(self.trunk(images))
        return {task: self.heads[task](z) for task in TASKS}


def make_network(params: Params) -> Network:
    """Returns the network with given parameters in place of random ones."""
    network = Network(rngs=nnx.Rngs(0))

    def fill(layer: nnx.Linear, values: Layer) -> None:
        nnx.update(layer, values)

    fill(network.trunk, params["trunk"])
    for task in TASKS:
        fill(network.heads[task], params["heads"][task])
    return network


def step(network: Network, optimizer: nnx.Optimizer[Network], batch: Batch) -> Log:
    """Takes one step in place; under ``nnx.jit`` in a plain loop."""
    graph, params = nnx.split(network, nnx.Param)

    def losses_fn(params: nnx.State[Any, Any]) -> jax.Array:
        outputs = nnx.merge(graph, params)(batch.images)
        return stack_losses(problem.losses_by_name(outputs, batch), TASKS)

    losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params)
    optimizer.update(network, jacobian, losses=losses)
    return problem.make_log(losses, optimizer.opt_state)


def train(params: Params, batches: Batch) -> Log:
    """Takes one step for each batch; safe under ``jit`` and ``vmap``."""
    network = make_network(params)
    optimizer = nnx.Optimizer(network, problem.make_optimizer(len(batches.digit)), wrt=nnx.Param)
    graph, state = nnx.split((network, optimizer))

    def body(state: Any, batch: Batch) -> tuple[Any, Log]:
        network, optimizer = nnx.merge(graph, state)
        log = step(network, optimizer, batch)
        return nnx.state((network, optimizer)), log

    _, log = jax.lax.scan(body, state, batches)
    return log


def main() -> None:
    """Trains all seeds at once."""
    problem.show(problem.train_seeds(train))


if __name__ == "__main__":
    main()
