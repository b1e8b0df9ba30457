"""A shared trunk with one classifier per task.

Flax Linen, not NNX: parameters are a plain dict of arrays, and ``init`` and ``apply`` pure
functions, which is what ``vmap`` over seeds and ``scan`` over steps want.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvPool(nn.Module):
    """A valid convolution and a 2 x 2 maximum over its output, as one matrix product.

    XLA's CPU convolutions are not threaded inside a ``scan`` and turn into grouped convolutions
    under ``vmap`` over seeds or tasks: this form takes less than a tenth of their time there.
    A pooling window sees one patch of side ``size + 1``; four shifted copies of the kernel give
    its four values.
    """

    features: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, h, w, c) to (b, (h - size + 1) / 2, (w - size + 1) / 2, features)."""
        b, _, _, c = x.shape
        shape = (self.size, self.size, c, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        h, w = ((side - self.size + 1) // 2 for side in x.shape[1:3])
        shifts = range(self.size + 1)
        patches = jnp.concatenate(
            [x[:, i : i + 2 * h : 2, j : j + 2 * w : 2] for i in shifts for j in shifts], axis=-1
        )
        nothing = (0, 0)
        kernels = jnp.stack(
            [
                jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), nothing, nothing))
                for i in (0, 1)
                for j in (0, 1)
            ],
            axis=3,
        )  # (size + 1, size + 1, c, 4, features)
        values = patches.reshape(b * h * w, -1) @ kernels.reshape(-1, 4 * self.features)
        return values.reshape(b, h, w, 4, self.features).max(axis=3) + bias


class LeNetTrunk(nn.Module):
    """The shared part of Sener and Koltun's ``multi_lenet.py``, without its dropout."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (b, h, w) to (b, 50)."""
        x = nn.relu(ConvPool(10, 5)(images[..., None]))
        x = nn.relu(ConvPool(20, 5)(x))
        return nn.relu(nn.Dense(50)(x.reshape(x.shape[0], -1)))


class DenseTrunk(nn.Module):
    """One hidden layer, enough for 12 x 12 canvases."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (b, h, w) to (b, width)."""
        return nn.relu(nn.Dense(self.width)(images.reshape(images.shape[0], -1)))


class Head(nn.Module):
    """Two dense layers down to ten logits, as MultiLeNetO."""

    width: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps (b, features) to (b, 10)."""
        return nn.Dense(10)(nn.relu(nn.Dense(self.width)(features)))


class TwoHeads(nn.Module):
    """The multi-task network; its parameters are ``{"trunk": ..., "left": ..., "right": ...}``."""

    trunk: nn.Module
    head_width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps (b, h, w) to the logits (2, b, 10)."""
        features = self.trunk(images)
        return jnp.stack([Head(self.head_width, name=side)(features) for side in ("left", "right")])
