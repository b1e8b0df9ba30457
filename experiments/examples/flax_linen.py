"""Three tasks on digits with Flax Linen and ``jaxmtl.flax.TrainState``.

    python -m experiments.examples.flax_linen

The train state carries the optimizer; ``apply_gradients`` takes the Jacobian and hands ``losses``
on to the aggregator. Otherwise as ``experiments.examples.plain_pytrees``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxmtl
from experiments.examples import _problem as problem
from experiments.examples._named import stack_losses
from experiments.examples._problem import HIDDEN, OUTPUTS, TASKS, Batch, Log, Params
from jaxmtl.flax import TrainState


class Heads(nn.Module):
    """One dense layer for each task."""

    @nn.compact
    def __call__(self, z: jax.Array) -> dict[str, jax.Array]:
        """Maps features (b, d) to the outputs of every task."""
        return {task: nn.Dense(OUTPUTS[task], name=task)(z) for task in TASKS}


class Network(nn.Module):
    """A shared trunk and a head for each task."""

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Maps images (b, 64) to the outputs of every task."""
        z = jnp.tanh(nn.Dense(HIDDEN, name="trunk")(images))
        return Heads(name="heads")(z)


def make_state(params: Params, num_steps: int) -> TrainState:
    """Returns the state before the first step; ``problem.initial_params`` has Linen's own names."""
    optimizer = problem.make_optimizer(num_steps)
    state: TrainState = TrainState.create(apply_fn=Network().apply, params=params, tx=optimizer)
    return state


def train(params: Params, batches: Batch) -> Log:
    """Takes one step for each batch; safe under ``jit`` and ``vmap``."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Log]:
        def losses_fn(params: Params) -> jax.Array:
            outputs = state.apply_fn({"params": params}, batch.images)
            return stack_losses(problem.losses_by_name(outputs, batch), TASKS)

        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(state.params)
        state = state.apply_gradients(grads=jacobian, losses=losses)
        return state, problem.make_log(losses, state.opt_state)

    _, log = jax.lax.scan(step, make_state(params, len(batches.digit)), batches)
    return log


def main() -> None:
    """Trains all seeds at once."""
    problem.show(problem.train_seeds(train))


if __name__ == "__main__":
    main()
