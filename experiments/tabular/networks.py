"""Networks with one output per task: a shared bottom, and a mixture of experts with a gate each."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Towers(nn.Module):
    """One network per task, from its own features to a logit."""

    width: int  # of the hidden layer; 0 for a linear tower

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps (m, b, d) to the logits (m, b)."""
        m = features.shape[0]
        initial = nn.initializers.lecun_normal(batch_axis=(0,))
        if self.width:
            hidden = self.param("hidden", initial, (m, features.shape[-1], self.width))
            hidden_bias = self.param("hidden_bias", nn.initializers.zeros, (m, 1, self.width))
            features = nn.relu(features @ hidden + hidden_bias)
        out = self.param("out", initial, (m, features.shape[-1], 1))
        bias = self.param("bias", nn.initializers.zeros, (m, 1))
        return (features @ out)[..., 0] + bias


class Bottom(nn.Module):
    """Dense layers, each with a ReLU."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, d) to (b, widths[-1])."""
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return x


class SharedBottom(nn.Module):
    """Layers that all tasks share, then a tower each.

    Parameters are ``{"shared": ..., "towers": ...}``. With one task it is the single-task network.
    """

    num_tasks: int
    widths: tuple[int, ...]
    tower_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, d) to the logits (m, b)."""
        z = Bottom(self.widths, name="shared")(x)
        shape = (self.num_tasks, *z.shape)
        return Towers(self.tower_width, name="towers")(jnp.broadcast_to(z, shape))


class MixtureOfExperts(nn.Module):
    """Shared experts of one layer; each task mixes them by a gate of its own.

    Parameters are ``{"shared": ..., "gates": ..., "towers": ...}``; gates and towers belong to one
    task each.

    **Reference**: Ma et al. 2018 (MMoE), eq. 6 to 8.
    """

    num_tasks: int
    num_experts: int
    width: int  # of an expert
    tower_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (b, d) to the logits (m, b)."""
        experts = nn.relu(nn.Dense(self.num_experts * self.width, name="shared")(x))
        experts = experts.reshape(-1, self.num_experts, self.width)
        initial = nn.initializers.lecun_normal(batch_axis=(0,))
        gates = self.param("gates", initial, (self.num_tasks, x.shape[-1], self.num_experts))
        mixture = nn.softmax(x @ gates)  # (m, b, experts)
        z = jnp.einsum("mbe,bew->mbw", mixture, experts)
        return Towers(self.tower_width, name="towers")(z)
