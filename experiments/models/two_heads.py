"""A shared trunk with one classifier per task.

Flax Linen, not NNX: parameters are a plain dict of arrays, and `init` and `apply` pure functions,
which is what `vmap` over seeds and `scan` over steps want.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class PatchConv(nn.Module):
    """A valid convolution written as one matrix product over its patches.

    XLA's CPU convolutions are not threaded inside a `scan` and turn into grouped convolutions
    under `vmap` over seeds or tasks: this form is about ten times as fast there.
    """

    features: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (b, h, w, c) to (b, h - size + 1, w - size + 1, features)."""
        height, width = x.shape[1] - self.size + 1, x.shape[2] - self.size + 1
        shifts = [(i, j) for i in range(self.size) for j in range(self.size)]
        patches = [x[:, i : i + height, j : j + width] for i, j in shifts]
        return nn.Dense(self.features)(jnp.concatenate(patches, axis=-1))


def max_pool(x: jax.Array) -> jax.Array:
    """Halve height and width (a reshape: the gradient of `reduce_window` is slow on CPU)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


class LeNetTrunk(nn.Module):
    """The shared part of Sener and Koltun's MultiLeNet (`multi_lenet.py`), without its dropout."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (b, h, w) to (b, 50)."""
        x = nn.relu(max_pool(PatchConv(10, 5)(images[..., None])))
        x = nn.relu(max_pool(PatchConv(20, 5)(x)))
        return nn.relu(nn.Dense(50)(x.reshape(x.shape[0], -1)))


class DenseTrunk(nn.Module):
    """One hidden layer, enough for 12 x 12 canvases."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (b, h, w) to (b, width)."""
        return nn.relu(nn.Dense(self.width)(images.reshape(images.shape[0], -1)))


class Head(nn.Module):
    """Two dense layers down to ten logits, as MultiLeNetO."""

    width: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Map (b, features) to (b, 10)."""
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(features)))


class TwoHeads(nn.Module):
    """The multi-task network; its parameters are ``{"trunk": ..., "left": ..., "right": ...}``."""

    trunk: nn.Module
    head_width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (b, h, w) to the logits (2, b, 10)."""
        features = self.trunk(images)
        return jnp.stack([Head(self.head_width, name=side)(features) for side in ("left", "right")])
