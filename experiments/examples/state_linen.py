"""BatchNorm, dropout and two heads in Flax Linen.

    python -m experiments.examples.state_linen

What a module changes (``mutable``) leaves the losses function as its auxiliary output, which is
computed once, not once for each task; ``apply_gradients`` puts it into the train state.
"""

from typing import Any

import flax.linen as nn
import jax

import jaxmtl
from experiments.examples import _pictures as pictures
from experiments.examples._pictures import CHANNELS, DROPOUT, OUTPUTS, Pictures
from jaxmtl.flax import TrainState


class Network(nn.Module):
    """A convolution, batch statistics, dropout, and a head for each task."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """Maps pictures (b, 8, 8, 1) to the outputs of every task."""
        z = nn.Conv(CHANNELS, (3, 3), strides=2)(images)
        z = nn.relu(nn.BatchNorm(use_running_average=not train)(z))
        z = nn.Dropout(DROPOUT, deterministic=not train)(z.reshape(len(images), -1))
        return {task: nn.Dense(n, name=task)(z) for task, n in OUTPUTS.items()}


class State(TrainState):
    """The train state with batch statistics and averaged parameters."""

    batch_stats: Any
    ema: Any


@jax.jit
def step(state: State, batch: Pictures, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    """Takes one step."""

    def losses_fn(params: Any) -> tuple[dict[str, jax.Array], Any]:
        outputs, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch.images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return pictures.losses(outputs, batch), changed["batch_stats"]

    (losses, stats), jacobian = jaxmtl.value_and_jacobian(losses_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=jacobian, losses=losses, batch_stats=stats)
    return state.replace(ema=pictures.average(state.ema, state.params)), losses


def train(num_steps: int = 150) -> dict[str, float]:
    """Trains, and returns the test accuracies of the averaged parameters."""
    data, test = pictures.load()
    drawn = pictures.batches(data, num_steps)
    network = Network()
    variables = network.init(jax.random.key(0), data.images[:1], train=False)
    state: Any = State.create(
        apply_fn=network.apply,
        params=variables["params"],
        tx=pictures.make_optimizer(num_steps),
        batch_stats=variables["batch_stats"],
        ema=variables["params"],
    )
    keys = jax.random.split(jax.random.key(1), num_steps)
    for i in range(num_steps):
        batch = Pictures(*(x[i] for x in drawn))
        state, _ = step(state, batch, keys[i])
    averaged = {"params": state.ema, "batch_stats": state.batch_stats}
    outputs: Any = network.apply(averaged, test.images, train=False)
    return pictures.accuracies(outputs, test)


if __name__ == "__main__":
    pictures.show("Flax Linen", train())
