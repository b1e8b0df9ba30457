"""Matrices times learned scales and divided by norms: no gradient of an example is formed."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.problems import normal
from tests.test_engine_paths import compare, layers, network, operations


def norm(w, axis=None, keepdims=False):
    return jnp.linalg.norm(w, axis=axis, keepdims=keepdims)


def product(weights_of, **shapes):
    """Two layers, whose weights are a function of matrices w and of other parameters."""

    def problem(width):
        of_width = {k: tuple(width if n == "n" else n for n in v) for k, v in shapes.items()}
        params = layers(width, w=(width, width), **of_width)
        return network(weights_of), params, (normal(9, 32, width),)

    return problem


def spectral(p):
    u, v = lax.stop_gradient((jnp.sin(p["w"][0]), jnp.cos(p["w"][:, 0])))
    sigma = v @ p["w"] @ u
    return p["w"] / jnp.where(sigma != 0, sigma, 1)


# What weights are made of, and the most that a step may cost, in gradients of the mean loss.
WEIGHTS = {
    "scalar": (product(lambda p: p["s"] * p["w"], s=()), 1.15),
    "function of a scalar": (product(lambda p: p["w"] * jax.nn.softplus(p["s"]), s=()), 1.15),
    "of outputs": (product(lambda p: p["g"] * p["w"], g=("n",)), 1.15),
    # The gradient of the scales needs a cotangent of the input, which the first layer has not else.
    "of inputs": (product(lambda p: p["w"] * p["g"][:, None], g=("n",)), 1.35),
    "of both sides": (
        product(lambda p: p["g"] * (p["w"].T * p["h"]).T / 3, g=("n",), h=("n",)),
        1.35,
    ),
    "weight norm": (product(lambda p: p["g"] * p["w"] / norm(p["w"], 0), g=("n",)), 1.15),
    "weight norm of inputs": (
        product(lambda p: p["g"][:, None] * p["w"] / norm(p["w"], 1, True), g=("n",)),
        1.35,
    ),
    "weight norm of Flax": (
        product(
            lambda p: p["w"] * lax.rsqrt(jnp.sum(p["w"] ** 2, 0, keepdims=True) + 1e-6) * p["g"],
            g=("n",),
        ),
        1.15,
    ),
    "one norm": (product(lambda p: p["s"] * p["w"] / norm(p["w"]), s=()), 1.15),
    "scale and norm in one": (
        product(lambda p: p["w"].T * (p["g"] / norm(p["w"].T, 0)), g=("n",)),
        1.15,
    ),
    "spectral norm": (product(spectral), 1.3),
    # Inputs are multiplied by another matrix once more: the signs of W, its largest entries.
    "mean of sizes": (product(lambda p: p["w"] / jnp.mean(jnp.abs(p["w"]))), 1.5),
    "largest entry": (product(lambda p: 2 * p["w"] / jnp.max(jnp.abs(p["w"]), 1)[:, None]), 1.75),
    "sums and norm": (product(lambda p: p["w"] / norm(p["w"]) * jnp.sum(p["w"], 1)), 1.6),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_equals_the_jacobian(name, x64):
    loss, params, args = WEIGHTS[name][0](24)
    compare(loss, params, tuple(x[:4] for x in args))


@pytest.mark.parametrize("name", WEIGHTS)
def test_costs_little_more_than_a_gradient(name):
    problem, most = WEIGHTS[name]
    loss, params, args = problem(512)
    sgd, step, by_rows = operations(loss, params, args)
    assert step <= most * sgd
    assert by_rows > 14 * sgd
