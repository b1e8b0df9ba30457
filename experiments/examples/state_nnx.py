"""BatchNorm, dropout and two heads in Flax NNX.

    python -m experiments.examples.state_nnx

``jaxmtl.flax.value_and_jacobian(losses_fn)(model, batch)`` stands where ``nnx.value_and_grad``
would: statistics and random streams of the model move once for each step, not once for each task.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxmtl.flax
from experiments.examples import _pictures as pictures
from experiments.examples._pictures import CHANNELS, DROPOUT, OUTPUTS, Pictures


class Network(nnx.Module):
    """A convolution, batch statistics, dropout, and a head for each task."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, CHANNELS, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(CHANNELS, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)
        self.heads = nnx.Dict(
            {task: nnx.Linear(16 * CHANNELS, n, rngs=rngs) for task, n in OUTPUTS.items()}
        )

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Maps pictures (b, 8, 8, 1) to the outputs of every task."""
        z = jax.nn.relu(self.norm(self.conv(images)))
        z = self.dropout(z.reshape(len(images), -1))
        return {task: self.heads[task](z) for task in OUTPUTS}


def losses_fn(model: Network, batch: Pictures) -> dict[str, jax.Array]:
    """Returns the losses by name."""
    return pictures.losses(model(batch.images), batch)


@nnx.jit
def step(
    model: Network, optimizer: nnx.Optimizer[Network], batch: Pictures
) -> dict[str, jax.Array]:
    """Takes one step in place."""
    losses, jacobian = jaxmtl.flax.value_and_jacobian(losses_fn)(model, batch)
    optimizer.update(model, jacobian, losses=losses)
    found: dict[str, jax.Array] = losses
    return found


def train(num_steps: int = 150) -> dict[str, float]:
    """Trains, and returns the test accuracies of the averaged parameters."""
    data, test = pictures.load()
    drawn = pictures.batches(data, num_steps)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, pictures.make_optimizer(num_steps), wrt=nnx.Param)
    ema = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    for i in range(num_steps):
        batch = Pictures(*(x[i] for x in drawn))
        step(model, optimizer, batch)
        ema = pictures.average(ema, nnx.state(model, nnx.Param))
    nnx.update(model, ema)
    model.eval()  # running statistics, no dropout
    return pictures.accuracies(model(test.images), test)


if __name__ == "__main__":
    pictures.show("Flax NNX", train())
