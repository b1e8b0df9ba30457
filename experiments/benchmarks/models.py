"""Models of the Gramian benchmark, as losses of one example.

The convolutional networks are those of ``experiments.iwrm.networks``, whose depthwise
convolutions are sums of shifted products.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.iwrm.networks import ARCHITECTURES, logits

Array = jax.Array
PyTree = Any


class Model(NamedTuple):
    """A benchmark model."""

    loss: Callable[[PyTree, Array, Array], Array]  # of one example: (params, x, y) -> ()
    params: PyTree  # of float32 arrays
    batch: Callable[[int], tuple[Array, Array]]  # n -> inputs and targets with a leading axis n


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    """Returns weights of variance 1 / fan-in; the last axis is the output."""
    fan_in = max(int(np.prod(shape[:-1])), 1)
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), jnp.float32)


def _dense(rng: np.random.Generator, inputs: int, outputs: int) -> dict[str, Array]:
    return {"w": _normal(rng, inputs, outputs), "b": jnp.zeros(outputs)}


def _apply(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def _cross_entropy(logits: Array, target: Array) -> Array:
    return -jax.nn.log_softmax(logits)[target]


def _classification(rng: np.random.Generator, *shape: int) -> Callable[[int], tuple[Array, Array]]:
    def batch(n: int) -> tuple[Array, Array]:
        x = jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)
        return x, jnp.asarray(rng.integers(0, 10, n), jnp.int32)

    return batch


def mlp() -> Model:
    """Returns the MLP 784-512-512-512-10."""
    rng = np.random.default_rng(0)
    sizes = (784, 512, 512, 512, 10)
    params = [_dense(rng, a, b) for a, b in itertools.pairwise(sizes)]

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        for layer in params[:-1]:
            x = jax.nn.relu(_apply(layer, x))
        return _cross_entropy(_apply(params[-1], x), y)

    return Model(loss, params, _classification(rng, 784))


def _conv(x: Array, layer: dict[str, Array]) -> Array:
    """Convolves ``(height, width, channels)`` with a 3 x 3 kernel, without padding."""
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(x[None], layer["w"], (1, 1), "VALID", dimension_numbers=numbers)
    return out[0] + layer["b"]


def _cnn(name: str) -> Model:
    """Returns a network of the Jacobian-descent paper, with XLA's own dense convolutions."""
    rng = np.random.default_rng(0)
    architecture = ARCHITECTURES[name]
    kernels = []
    for i, (shape, b) in enumerate(
        zip(architecture.kernel_shapes(), architecture.channels, strict=True)
    ):
        depthwise = architecture.grouped and i
        kernels.append({"w": _normal(rng, *shape) / (3.0 if depthwise else 1.0)})
        kernels[-1]["b"] = jnp.zeros(b)
    hidden = architecture.hidden
    layers = [_dense(rng, architecture.flat(), hidden), _dense(rng, hidden, 10)]

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        return _cross_entropy(logits(architecture, params, x, conv=_conv), y)

    params = {"conv": kernels, "dense": layers}
    return Model(loss, params, _classification(rng, *architecture.shape))


def transformer() -> Model:
    """Returns a language model of two blocks, width 64, 4 heads, 16 tokens of 256, tied output."""
    rng = np.random.default_rng(0)
    width, heads, length, vocabulary = 64, 4, 16, 256

    def block() -> PyTree:
        return {
            "qkv": _normal(rng, width, 3 * width),
            "out": _normal(rng, width, width),
            "norm": [{"scale": jnp.ones(width), "shift": jnp.zeros(width)} for _ in range(2)],
            "up": _dense(rng, width, 4 * width),
            "down": _dense(rng, 4 * width, width),
        }

    params = {
        "embedding": _normal(rng, width, vocabulary).T,
        "position": _normal(rng, width, length).T,
        "blocks": [block() for _ in range(2)],
    }

    def norm(layer: PyTree, x: Array) -> Array:
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        return x * layer["scale"] + layer["shift"]

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        h = params["embedding"][x] + params["position"]
        mask = jnp.tril(jnp.ones((length, length), bool))
        for layer in params["blocks"]:
            mixed = norm(layer["norm"][0], h) @ layer["qkv"]
            q, k, v = jnp.moveaxis(mixed.reshape(length, 3, heads, width // heads), 1, 0)
            scores = jnp.einsum("the,she->hts", q, k) / np.sqrt(width // heads)
            attention = jax.nn.softmax(jnp.where(mask, scores, -1e9))
            h = h + jnp.einsum("hts,she->the", attention, v).reshape(length, width) @ layer["out"]
            h = h + _apply(
                layer["down"], jax.nn.gelu(_apply(layer["up"], norm(layer["norm"][1], h)))
            )
        logits = jax.nn.log_softmax(h @ params["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))

    def batch(n: int) -> tuple[Array, Array]:
        tokens = jnp.asarray(rng.integers(0, vocabulary, (n, length + 1)), jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    return Model(loss, params, batch)


def lstm() -> Model:
    """Returns an LSTM of 64 units over 28 steps of 28 inputs."""
    rng = np.random.default_rng(0)
    units = 64
    params = {
        "x": _normal(rng, 28, 4 * units),
        "h": _normal(rng, units, 4 * units),
        "b": jnp.zeros(4 * units),
        "out": _dense(rng, units, 10),
    }

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        def step(carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], None]:
            c, h = carry
            i, f, g, o = jnp.split(x @ params["x"] + h @ params["h"] + params["b"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        (_, h), _ = lax.scan(step, (jnp.zeros(units), jnp.zeros(units)), x)
        return _cross_entropy(_apply(params["out"], h), y)

    return Model(loss, params, _classification(rng, 28, 28))


def autoencoder() -> Model:
    """Returns an autoencoder 784-256-32 whose decoder has the transposed weights."""
    rng = np.random.default_rng(0)
    params = {
        "first": _dense(rng, 784, 256),
        "second": _dense(rng, 256, 32),
        "back": [jnp.zeros(256), jnp.zeros(784)],
    }

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        h = jnp.tanh(_apply(params["first"], x))
        h = jnp.tanh(_apply(params["second"], h))
        h = jnp.tanh(h @ params["second"]["w"].T + params["back"][0])
        return jnp.mean((h @ params["first"]["w"].T + params["back"][1] - x) ** 2)

    return Model(loss, params, _classification(rng, 784))


MODELS: dict[str, Callable[[], Model]] = {
    "mlp": mlp,
    **{name: partial(_cnn, name) for name in ARCHITECTURES},
    "transformer": transformer,
    "lstm": lstm,
    "autoencoder": autoencoder,
}
