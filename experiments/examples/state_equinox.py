"""BatchNorm, dropout and two heads in Equinox.

    python -m experiments.examples.state_equinox

Equinox's ``nn.State`` leaves the losses function as its auxiliary output, which is computed once,
not once for each task. The Jacobian is taken with respect to the arrays of the model.
"""

from typing import Any

import equinox as eqx
import jax

import jaxmtl
from experiments.examples import _pictures as pictures
from experiments.examples._pictures import CHANNELS, DROPOUT, OUTPUTS, Pictures


class Network(eqx.Module):
    """A convolution, batch statistics, dropout, and a head for each task."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    heads: dict[str, eqx.nn.Linear]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(CHANNELS, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(DROPOUT)
        self.heads = {
            task: eqx.nn.Linear(16 * CHANNELS, n, key=k)
            for k, (task, n) in zip(keys[1:], OUTPUTS.items(), strict=True)
        }

    def __call__(self, image: jax.Array, state: Any, key: jax.Array) -> tuple[Any, Any]:
        """Maps one picture (8, 8, 1) to the outputs of every task, and the statistics."""
        z, state = self.norm(self.conv(image.transpose(2, 0, 1)), state)
        z = self.dropout(jax.nn.relu(z).reshape(-1), key=key)
        return {task: head(z) for task, head in self.heads.items()}, state


def run(model: Network, state: Any, images: jax.Array, key: jax.Array) -> tuple[Any, Any]:
    """Returns the outputs for pictures (b, 8, 8, 1), and the statistics."""
    keys = jax.random.split(key, len(images))
    each = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    found: tuple[Any, Any] = each(images, state, keys)
    return found


def train(num_steps: int = 150) -> dict[str, float]:
    """Trains, and returns the test accuracies of the averaged parameters."""
    data, test = pictures.load()
    drawn = pictures.batches(data, num_steps)
    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = pictures.make_optimizer(num_steps)
    opt_state, ema = optimizer.init(arrays), arrays

    @eqx.filter_jit
    def step(arrays: Any, state: Any, opt_state: Any, batch: Pictures, key: jax.Array) -> Any:
        def losses_fn(arrays: Any) -> tuple[dict[str, jax.Array], Any]:
            outputs, new = run(eqx.combine(arrays, static), state, batch.images, key)
            return pictures.losses(outputs, batch), new

        (losses, new), jacobian = jaxmtl.value_and_jacobian(losses_fn, has_aux=True)(arrays)
        updates, opt_state = optimizer.update(jacobian, opt_state, arrays, losses=losses)
        return jaxmtl.apply_updates(arrays, updates), new, opt_state

    keys = jax.random.split(jax.random.key(1), num_steps)
    for i in range(num_steps):
        batch = Pictures(*(x[i] for x in drawn))
        arrays, state, opt_state = step(arrays, state, opt_state, batch, keys[i])
        ema = pictures.average(ema, arrays)
    averaged = eqx.nn.inference_mode(eqx.combine(ema, static))
    outputs, _ = run(averaged, state, test.images, keys[0])
    return pictures.accuracies(outputs, test)


if __name__ == "__main__":
    pictures.show("Equinox", train())
