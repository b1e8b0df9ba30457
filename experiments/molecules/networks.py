"""The network of QM9: messages through an edge network, a GRU, Set2Set and a linear head a task.

As in the code of Nash-MTL, which FAMO and LDC-MTL share, on graphs that are padded to one size and
masked: what is not there reaches nothing.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

NUM_BONDS = 4  # single, double, triple, aromatic
EDGE_FEATURES = NUM_BONDS + 1  # and the distance


class Graphs(NamedTuple):
    """Complete graphs without loops, padded to ``a`` atoms."""

    nodes: jax.Array  # (b, a, f)
    positions: jax.Array  # (b, a, 3)
    bonds: jax.Array  # (b, a, a) int: 0 for none, else 1 to ``NUM_BONDS``
    sizes: jax.Array  # (b,) numbers of atoms, which come first


def uniform(fan_in: int) -> nn.initializers.Initializer:
    """Returns PyTorch's start of kernels and biases: uniform within 1 / sqrt(fan-in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def dense(features: int, fan_in: int, *, name: str, bias: bool = True) -> nn.Dense:
    """Returns a linear layer that starts as PyTorch's."""
    start = uniform(fan_in)
    return nn.Dense(features, use_bias=bias, kernel_init=start, bias_init=start, name=name)


def atoms_present(graphs: Graphs) -> jax.Array:
    """Returns (b, a) bool."""
    return jnp.arange(graphs.nodes.shape[1])[None, :] < graphs.sizes[:, None]


def edges_present(graphs: Graphs) -> jax.Array:
    """Returns (b, a, a) bool: every atom is joined with every other one."""
    present = atoms_present(graphs)
    return present[:, :, None] & present[:, None, :] & ~jnp.eye(present.shape[1], dtype=bool)[None]


def edge_features(graphs: Graphs) -> jax.Array:
    """Returns (b, a, a, 5): the kind of bond as 0 and 1, none of them without a bond; distances.

    The distance of an atom to itself is a constant, as its square root would have no derivative.
    """
    steps = graphs.positions[:, :, None] - graphs.positions[:, None, :]
    square = jnp.sum(steps**2, axis=-1, keepdims=True)
    distances = jnp.sqrt(jnp.where(edges_present(graphs)[..., None], square, 1))
    kinds = jax.nn.one_hot(graphs.bonds - 1, NUM_BONDS, dtype=distances.dtype)
    return jnp.concatenate([kinds, distances], axis=-1)


class EdgeConvolution(nn.Module):
    """NNConv: a matrix for each edge, made from its features, applied to the neighbor, averaged.

    ``x_i R + b + mean_j x_j W(e_ij)`` with ``W(e) = sum_k z_k(e) W_k + W_0`` of width x width.
    The matrices of the edges are never formed: ``x_j W_k`` is, once an atom, and edges add these up
    with their ``z``. For 120 molecules of 29 atoms and a width of 64 that is 114 MB, not 1.6 GB.
    """

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array, edges: jax.Array) -> jax.Array:
        """Returns (b, a, width).

        Args:
          x: (b, a, width) atoms.
          z: (b, a * hidden, a) hidden layer of the edge network, 0 where there is no edge. The
            neighbors and units that a message sums over come first: the product and both of its
            derivatives are then quick on CPU.
          edges: (b, a, a) bool.
        """
        (batch, atoms, width), start = x.shape, uniform(self.hidden)
        kernels = self.param("kernels", start, (width, self.hidden, width))
        constant = self.param("constant", start, (width, width))
        of_atoms = x.reshape(-1, width) @ kernels.reshape(width, -1)
        of_atoms = of_atoms.reshape(batch, atoms * self.hidden, width)
        messages = jnp.einsum("bpi,bpe->bie", z, of_atoms)
        messages += jnp.einsum("bij,bjd->bid", edges.astype(x.dtype), x) @ constant
        degree = jnp.maximum(jnp.sum(edges, axis=-1), 1)[..., None]
        return messages / degree + dense(width, width, name="root")(x)


class Set2Set(nn.Module):
    """Vinyals et al. 2016: an LSTM that asks the set what to look at, step by step."""

    width: int
    steps: int

    @nn.compact
    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        """Returns (b, 2 width) from atoms x (b, a, width), of which some are present."""
        start = uniform(self.width)
        cell = nn.OptimizedLSTMCell(
            self.width, kernel_init=start, recurrent_kernel_init=start, bias_init=start, name="lstm"
        )
        blank = jnp.zeros((x.shape[0], self.width), x.dtype)
        carry, asked = (blank, blank), jnp.concatenate([blank, blank], axis=-1)
        for _ in range(self.steps):
            carry, question = cell(carry, asked)
            scores = jnp.einsum("bad,bd->ba", x, question)
            attention = jax.nn.softmax(scores, where=present)
            asked = jnp.concatenate([question, jnp.einsum("ba,bad->bd", attention, x)], axis=-1)
        return asked


class MessagePassing(nn.Module):
    """The shared part: graphs to features (b, width); the edge network is twice as wide."""

    width: int = 64
    steps: int = 3  # of messages, and of Set2Set

    @nn.compact
    def __call__(self, graphs: Graphs) -> jax.Array:
        """Returns (b, width)."""
        width, hidden, num_features = self.width, 2 * self.width, graphs.nodes.shape[-1]
        present, edges = atoms_present(graphs), edges_present(graphs)
        x = nn.relu(dense(width, num_features, name="atoms")(graphs.nodes))
        z = nn.relu(dense(hidden, EDGE_FEATURES, name="edges")(edge_features(graphs)))
        z = jnp.where(edges[..., None], z, 0)  # (b, j, i, hidden) and (b, i, j, hidden): the same
        z = z.swapaxes(2, 3).reshape(z.shape[0], -1, z.shape[1])
        convolution = EdgeConvolution(width, hidden, name="convolution")
        start = uniform(width)
        cell = nn.GRUCell(
            width, kernel_init=start, recurrent_kernel_init=start, bias_init=start, name="gru"
        )
        for _ in range(self.steps):
            x, _ = cell(x, nn.relu(convolution(x, z, edges)))
        pooled = Set2Set(width, self.steps, name="set2set")(x, present)
        return nn.relu(dense(width, 2 * width, name="features")(pooled))


class Network(nn.Module):
    """The shared part and a linear head per task."""

    num_tasks: int
    width: int = 64

    @nn.compact
    def __call__(self, graphs: Graphs) -> jax.Array:
        """Returns (m, b) standardized properties."""
        features = MessagePassing(self.width, name="shared")(graphs)
        return dense(self.num_tasks, self.width, name="heads")(features).T
