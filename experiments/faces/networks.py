"""The network of CelebA: seven convolutions and two dense layers, shared, and a linear head a task.

As in the code of FairGrad, which LDC-MTL takes over. Running averages of BatchNorm are the
collection ``batch_stats``.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

# Channels, in widths, of the convolutions, and whether the map is halved after it.
CONVOLUTIONS = ((1, True), (2, False), (2, True), (4, False), (4, True), (8, False), (8, False))

# PyTorch's start of kernels: uniform within 1 / sqrt(fan-in).
start = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Norm(nn.Module):
    """BatchNorm as PyTorch has it by default, then ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalizes over all axes but the last."""
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")
        return nn.relu(norm(x))


class Trunk(nn.Module):
    """The shared part."""

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (b, h, w, 3) in [0, 1] to features (b, 8 width)."""
        for i, (factor, halved) in enumerate(CONVOLUTIONS):
            conv = nn.Conv(
                factor * self.width,
                (3, 3),
                use_bias=False,
                kernel_init=start,
                name=f"conv_{i}",
            )
            x = Norm(name=f"conv_norm_{i}")(conv(x), train)
            if halved:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = jnp.mean(x, axis=(1, 2))
        for i in range(2):
            dense = nn.Dense(8 * self.width, use_bias=False, kernel_init=start, name=f"dense_{i}")
            x = Norm(name=f"dense_norm_{i}")(dense(x), train)
        return x


class Network(nn.Module):
    """The trunk and the heads, which are the columns of one matrix."""

    num_tasks: int
    width: int = 64

    def setup(self) -> None:
        """Makes both."""
        bound = (8 * self.width) ** -0.5
        self.shared = Trunk(self.width)
        self.heads = nn.Dense(
            self.num_tasks,
            kernel_init=start,
            bias_init=lambda key, shape, dtype=jnp.float32: jax.random.uniform(
                key, shape, dtype, -bound, bound
            ),
        )

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (b, h, w, 3) in [0, 1] to logits (b, m)."""
        return self.predict(self.features(x, train))

    def features(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns z (b, 8 width)."""
        return self.shared(x, train)

    def predict(self, z: jax.Array) -> jax.Array:
        """Returns the logits (b, m) of features."""
        return jnp.asarray(self.heads(z))
