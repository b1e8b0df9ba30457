"""MultiMNIST: two digits on one canvas, top-left and bottom-right, to be read separately.

**Reference**: Sabour, Frosst and Hinton 2017 (the overlapping digits); Sener and Koltun,
*Multi-Task Learning as Multi-Objective Optimization*, NeurIPS 2018 (the two-task form).

**Differs from** the official loader (isl-org/MultiObjectiveOptimization,
``multi_mnist_loader.py``): that one shifts the second digit by 6 pixels instead of into the corner
and shrinks 36 x 36 to 28 x 28 by nearest neighbor; here the canvas is what the papers say, and a
digit is never paired with itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.images import Images


class DigitPairs(NamedTuple):
    """Digits once, and pairs of indices into them; canvases are painted batch by batch."""

    images: jax.Array  # (n, size, size) uint8
    labels: jax.Array  # (n,) int32
    left: jax.Array  # (pairs,) int32
    right: jax.Array  # (pairs,) int32
    mean: jax.Array  # () float32, of the training digits' pixels in [0, 1]
    std: jax.Array  # () float32


def make_pairs(digits: Images, *, partners: int, statistics_of: Images, seed: int) -> DigitPairs:
    """Pairs every digit, as the left one, with ``partners`` random others.

    Args:
      digits: The n digits of one split: no digit is shared with another split.
      partners: Right digits per left digit.
      statistics_of: The training digits, whose mean and deviation normalize the canvas.
      seed: Decides the pairs, which are part of the data set and not of a run.

    Returns:
      The n * partners pairs.
    """
    n = len(digits.labels)
    shifts = np.random.default_rng(seed).integers(1, n, (n, partners))  # never 0: never itself
    left = np.repeat(np.arange(n), partners)
    right = (left + shifts.ravel()) % n
    pixels = statistics_of.images / np.float32(255)
    return DigitPairs(
        images=jnp.asarray(digits.images),
        labels=jnp.asarray(digits.labels),
        left=jnp.asarray(left, jnp.int32),
        right=jnp.asarray(right, jnp.int32),
        mean=jnp.asarray(pixels.mean(), jnp.float32),
        std=jnp.asarray(pixels.std(), jnp.float32),
    )


def paint(left: jax.Array, right: jax.Array, canvas: int) -> jax.Array:
    """Returns (b, canvas, canvas): left at top-left, right at bottom-right, maximum of both."""
    size = left.shape[-1]
    top_left = jnp.zeros((left.shape[0], canvas, canvas), left.dtype).at[:, :size, :size].set(left)
    return top_left.at[:, canvas - size :, canvas - size :].max(right)


def read_pairs(data: DigitPairs, index: jax.Array, canvas: int) -> tuple[jax.Array, jax.Array]:
    """Returns the pairs at ``index`` (b,): normalized (b, canvas, canvas), and labels (2, b)."""
    left, right = data.left[index], data.right[index]
    pixels = paint(data.images[left], data.images[right], canvas).astype(jnp.float32) / 255
    return (pixels - data.mean) / data.std, jnp.stack([data.labels[left], data.labels[right]])
