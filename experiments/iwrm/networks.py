"""The convolutional networks of the Jacobian-descent paper, as functions of one example.

Convolutions are written as matrix products of patches, depthwise ones as sums of shifted products.
XLA's CPU backend makes grouped convolutions of both under ``vmap`` over seeds (the kernels differ)
and runs the backward pass of those about 80 times slower; without ``vmap`` patches cost the same as
its own convolution.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = dict[str, list[dict[str, Array]]]  # {"conv": three layers, "dense": two}


class Architecture(NamedTuple):
    """Three 3 x 3 convolutions without padding, each pooled, then two dense layers."""

    shape: tuple[int, int, int]  # of an image: height, width, channels
    channels: tuple[int, int, int]
    pools: tuple[int, int, int]  # side and stride of the maximum after each convolution, 1 for none
    hidden: int
    grouped: bool  # whether the second and third convolution have one group per input channel

    def kernel_shapes(self) -> list[tuple[int, int, int, int]]:
        """Returns (3, 3, inputs, outputs), or (3, 3, groups, outputs per group) where grouped."""
        pairs = enumerate(itertools.pairwise((self.shape[-1], *self.channels)))
        return [(3, 3, a, b // a if self.grouped and i else b) for i, (a, b) in pairs]

    def flat(self) -> int:
        """Returns the number of features before the dense layers."""
        sides = list(self.shape[:2])
        for pool in self.pools:
            sides = [(side - 2) // pool for side in sides]
        return sides[0] * sides[1] * self.channels[-1]


# Tables 2 to 5; table 5 serves MNIST, Fashion-MNIST and Kuzushiji-MNIST.
ARCHITECTURES = {
    "svhn": Architecture((32, 32, 3), (16, 32, 32), (1, 2, 3), 64, grouped=True),
    "cifar10": Architecture((32, 32, 3), (32, 64, 64), (1, 2, 3), 128, grouped=True),
    "eurosat": Architecture((64, 64, 3), (32, 64, 64), (2, 2, 3), 128, grouped=True),
    "mnist": Architecture((28, 28, 1), (32, 64, 64), (1, 2, 3), 128, grouped=False),
}


def conv(x: Array, layer: dict[str, Array]) -> Array:
    """Convolves (height, width, channels) with a kernel (3, 3, channels, outputs)."""
    height, width, channels = x.shape
    patches = jnp.concatenate(
        [x[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)], axis=-1
    )
    kernel = layer["w"].reshape(9 * channels, -1)
    out = patches.reshape(-1, 9 * channels) @ kernel
    return out.reshape(height - 2, width - 2, -1) + layer["b"]


def depthwise(x: Array, layer: dict[str, Array]) -> Array:
    """Convolves each channel with its own kernels (3, 3, channels, multiplier).

    All first kernels come before all second ones, unlike in PyTorch, where those of a channel are
    neighbors: the inner loop then runs over channels, which takes less than half the time.
    """
    height, width, _ = x.shape
    shifted = [x[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    kernels = jnp.moveaxis(layer["w"], -1, 0).reshape(layer["w"].shape[-1], 9, -1)
    out = [sum(x * w for x, w in zip(shifted, kernel, strict=True)) for kernel in kernels]
    return jnp.concatenate(out, axis=-1) + layer["b"]


def pool(x: Array, size: int) -> Array:
    """Takes the maximum over windows that do not overlap; rests at the border are dropped."""
    height, width, channels = x.shape
    x = x[: height // size * size, : width // size * size]
    x = x.reshape(height // size, size, width // size, size, channels)
    return jnp.max(x, axis=(1, 3))


def dense(x: Array, layer: dict[str, Array]) -> Array:
    """Maps (inputs,) to (outputs,)."""
    return x @ layer["w"] + layer["b"]


def logits(
    architecture: Architecture,
    params: Params,
    x: Array,
    *,
    conv: Callable[[Array, dict[str, Array]], Array] = conv,
) -> Array:
    """Returns the logits (10,) of one image (height, width, channels)."""
    layers = zip(params["conv"], architecture.pools, strict=True)
    for i, (layer, size) in enumerate(layers):
        x = depthwise(x, layer) if architecture.grouped and i else conv(x, layer)
        x = jax.nn.elu(pool(x, size) if size > 1 else x)
    first, last = params["dense"]
    return dense(jax.nn.elu(dense(x.reshape(-1), first)), last)


def init(architecture: Architecture, key: Array) -> Params:
    """Returns parameters as PyTorch draws them: uniform within 1 / sqrt(fan-in), biases too."""

    def layer(key: Array, shape: tuple[int, ...], fan_in: int, outputs: int) -> dict[str, Array]:
        weight_key, bias_key = jax.random.split(key)
        bound = 1 / np.sqrt(fan_in)
        return {
            "w": jax.random.uniform(weight_key, shape, minval=-bound, maxval=bound),
            "b": jax.random.uniform(bias_key, (outputs,), minval=-bound, maxval=bound),
        }

    conv_keys, dense_keys = jax.random.split(key, 5)[:3], jax.random.split(key, 5)[3:]
    kernels = architecture.kernel_shapes()
    fan_ins = [9 if architecture.grouped and i else 9 * s[2] for i, s in enumerate(kernels)]
    convs = [
        layer(k, shape, fan_in, outputs)
        for k, shape, fan_in, outputs in zip(
            conv_keys, kernels, fan_ins, architecture.channels, strict=True
        )
    ]
    sizes = itertools.pairwise((architecture.flat(), architecture.hidden, 10))
    return {
        "conv": convs,
        "dense": [layer(k, (a, b), a, b) for k, (a, b) in zip(dense_keys, sizes, strict=True)],
    }
