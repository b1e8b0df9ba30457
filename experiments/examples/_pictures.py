"""What the three examples of layers with state share: digits as pictures, two tasks, an optimizer.

The network is a small one with every kind of state: a convolution, batch statistics, dropout, a
head for each task. Trained with UPGrad and Adam under a cosine schedule, and evaluated with an
exponential moving average of its parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxmtl

CHANNELS, DROPOUT, EMA_RATE = 8, 0.2, 0.05
OUTPUTS = {"digit": 10, "parity": 2}


class Pictures(NamedTuple):
    """Pictures (b, 8, 8, 1) and their digits (b,)."""

    images: jax.Array
    digit: jax.Array


def load() -> tuple[Pictures, Pictures]:
    """Returns 1,500 pictures to train on and 297 to test on."""
    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    data = Pictures(images, jnp.asarray(digits.target, jnp.int32))
    return Pictures(*(x[:1500] for x in data)), Pictures(*(x[1500:] for x in data))


def batches(data: Pictures, num_steps: int, batch_size: int = 64) -> Pictures:
    """Returns batches with leading axes (num_steps, batch_size)."""
    index = np.random.default_rng(0).integers(0, len(data.digit), (num_steps, batch_size))
    return Pictures(*(x[index] for x in data))


def losses(outputs: dict[str, jax.Array], batch: Pictures) -> dict[str, jax.Array]:
    """Returns the loss of each task, by name."""
    targets = {"digit": batch.digit, "parity": batch.digit % 2}
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {task: jnp.mean(cross_entropy(outputs[task], targets[task])) for task in OUTPUTS}


def accuracies(outputs: dict[str, jax.Array], batch: Pictures) -> dict[str, float]:
    """Returns the share of right answers of each task."""
    targets = {"digit": batch.digit, "parity": batch.digit % 2}
    return {t: float(jnp.mean(outputs[t].argmax(-1) == targets[t])) for t in OUTPUTS}


def make_optimizer(num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns UPGrad, then Adam with a cosine schedule."""
    rate = optax.cosine_decay_schedule(1e-2, num_steps)
    return optax.chain(jaxmtl.upgrad(num_tasks=len(OUTPUTS)), optax.adam(rate))


def average(ema: Any, params: Any) -> Any:
    """Returns the moving average after one more step."""
    return optax.incremental_update(params, ema, EMA_RATE)


def show(name: str, found: dict[str, float]) -> None:
    """Prints the accuracies of the averaged parameters."""
    text = ", ".join(f"{task} {100 * value:.1f} %" for task, value in found.items())
    print(f"{name}: test accuracy of the averaged parameters: {text}")
