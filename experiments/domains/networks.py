"""ResNet-18 with a shared layer on top, and a last layer for each domain."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.resnet import Norm, pytorch_uniform, resnet18

DEPTHS = {18: (2, 2, 2, 2), 10: (1, 1, 1, 1)}  # blocks of each stage
DROPOUT = 0.5


class Trunk(nn.Module):
    """What all domains share: images to features of 8 * width, 512 at width 64."""

    width: int = 64
    depth: int = 18

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps (b, h, w, 3) to (b, 8 * width); in training it draws from the key ``dropout``."""
        encoder = resnet18(self.width, DEPTHS[self.depth], name="encoder")
        x = jnp.mean(encoder(images, train), axis=(1, 2))
        x = nn.Dense(
            8 * self.width,
            kernel_init=nn.initializers.normal(0.005),
            bias_init=nn.initializers.constant(0.1),
            name="hidden",
        )(x)
        x = nn.relu(Norm(name="norm")(x, train))
        return jnp.asarray(nn.Dropout(DROPOUT, deterministic=not train)(x))


def make_head(classes: int, features: int) -> nn.Dense:
    """Returns the last layer of a domain, from (b, features) to logits (b, classes)."""
    init = pytorch_uniform(features)
    return nn.Dense(classes, kernel_init=init, bias_init=init)


def init_heads(
    key: jax.Array, domains: Sequence[str], classes: int, features: int
) -> dict[str, dict[str, jax.Array]]:
    """Returns the parameters of all last layers."""
    head, z = make_head(classes, features), jnp.zeros((1, features))
    keys = jax.random.split(key, len(domains))
    return {name: head.init(k, z)["params"] for name, k in zip(domains, keys, strict=True)}
