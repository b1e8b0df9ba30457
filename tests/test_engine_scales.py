"""Matrices times learned scales and divided by norms: no gradient of an example is formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmtl import per_example_norms
from jaxmtl.engine import cross_gramian, explain, value_and_gramian
from tests.problems import flat_rows, indices, normal, some
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


@pytest.mark.parametrize("name", some(WEIGHTS, 7))
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


def tokens(width):
    """Two positions, a matrix with three axes, one norm over two of them."""
    params = {"w": normal(1, width, width), "g": normal(2, width)}
    params["v"] = normal(3, width, 2, width // 2)

    def loss(p, x):
        h = jnp.tanh(x @ (p["w"] / norm(p["w"], 0) * p["g"]))
        heads = p["v"] / norm(p["v"], (0, 2), True)
        return jnp.sum(jnp.einsum("td,dhe->the", h, heads) ** 2)

    return loss, params, (normal(5, 32, 2, width),)


def tied(width):
    """One matrix with two norms, with a factor, as it is and transposed."""
    params = {"w": normal(1, width, width), "g": normal(2, width)}

    def loss(p, x):
        h = jnp.tanh(x @ (p["w"] / norm(p["w"], 0) * p["g"]))
        h = jnp.tanh(h @ (0.5 * p["w"]))
        h = jnp.tanh(h @ p["w"].T)
        return jnp.sum(h @ (p["w"].T * p["g"][:, None] / norm(p["w"])))

    return loss, params, (normal(5, 32, width),)


def table(width):
    params = {"t": normal(1, 50, width), "g": normal(2, width), "s": normal(3)}

    def loss(p, i):
        scaled = p["t"] / norm(p["t"]) * p["g"]
        return jnp.sum(jnp.tanh(scaled[i[0]] + (jnp.exp(p["s"]) * p["t"])[i[1]]) ** 3)

    return loss, params, (indices(5, 50, 32, 2),)


def convolution(width, side=2):
    """Many channels on a small map, so that no kernel's gradient is formed."""
    params = {"k": normal(1, 3, 3, width, width), "g": normal(2, width), "s": normal(3)}
    params["l"] = normal(4, 2, 3, width, width)

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def loss(p, x):
        h = jnp.tanh(convolve(x, p["k"] / jnp.sqrt(jnp.sum(p["k"] ** 2, (0, 1, 2))) * p["g"])[0])
        return jnp.sum(jnp.tanh(convolve(h, p["s"] * p["l"])))

    return loss, params, (normal(5, 32, side, side, width),)


def stacked(width):
    """Normalized weights of its own in every step of a scan, and one that all steps share."""
    params = {"w": normal(1, 3, width, width), "g": normal(2, 3, width)}
    params["v"] = normal(3, width, width)

    def loss(p, x):
        shared = p["v"] / norm(p["v"], 0)

        def step(h, layer):
            w, g = layer
            return jnp.tanh(h @ (w / norm(w, 0) * g) + h @ shared), None

        return jnp.sum(lax.scan(step, x, (p["w"], p["g"]))[0] ** 2)

    return loss, params, (normal(5, 32, width),)


def chosen_in_a_scan(width):
    """Experts of every step, and one step that takes an expert that others took."""
    params = {"a": normal(1, 8, width, width), "w": normal(2, width, width)}

    def loss(p, x, e):
        def step(h, e):
            return jnp.tanh(h @ p["a"][e] + h @ p["w"]), None

        h = lax.scan(step, x, e)[0]
        return jnp.sum((h @ p["a"][e[0]]) ** 2)

    return loss, params, (normal(3, 32, width), indices(4, 8, 32, 3))


def recurrent_convolution(width, side=2):
    params = {"x": normal(1, 3, 3, width, 4 * width), "h": normal(2, 3, 3, width, 4 * width)}

    def convolve(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def loss(p, xs):
        def step(carry, x):
            c, h = carry
            i, f, g, o = jnp.split(convolve(x, p["x"])[0] + convolve(h, p["h"])[0], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        start = jnp.zeros(xs.shape[1:], xs.dtype)
        (_, h), _ = lax.scan(step, (start, start), xs)
        return jnp.sum(h**2)

    return loss, params, (normal(6, 32, 2, side, side, width),)


NETWORKS = {
    f.__name__: f
    for f in (
        tokens,
        tied,
        table,
        convolution,
        stacked,
        chosen_in_a_scan,
        recurrent_convolution,
    )
}


@pytest.mark.parametrize("name", some(NETWORKS, 4))
def test_networks_equal_the_jacobian(name, x64):
    loss, params, args = NETWORKS[name](16)
    args = tuple(x[:4] for x in args)
    text = explain(loss, params, *args, in_axes=(None,) + (0,) * len(args))
    assert "structured" in text
    compare(loss, params, args)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"table"}))
def test_networks_cost_a_gradient_and_the_products(name):
    """The bound is the count of operations that `explain` tells beside the gradient's."""
    loss, params, args = NETWORKS[name](64 if "convolution" in name else 256)
    sgd, step, by_rows = operations(loss, params, args)
    most = {"tied": 1.6, "chosen_in_a_scan": 1.3, "convolution": 2, "recurrent_convolution": 1.6}
    assert step <= most.get(name, 1.25) * sgd
    assert step <= by_rows


@pytest.mark.parametrize("problem", [recurrent_convolution, convolution])
def test_kernels_on_large_maps_have_rows(problem, x64):
    loss, params, args = problem(8, side=8)
    assert "per-example rows" in explain(loss, params, *args, in_axes=(None, 0))
    _, step, by_rows = operations(loss, params, args)
    assert step <= 1.05 * by_rows
    compare(loss, params, tuple(x[:3] for x in args))


def test_a_mask_leaves_rows_and_says_why():
    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ (p["w"] * p["mask"])) ** 2)

    params, x = {"w": normal(1, 64, 64), "mask": normal(2, 64, 64)}, normal(3, 8, 64)
    text = explain(loss, params, x, in_axes=(None, 0))
    assert "rows" in text
    assert "each entry has a factor of its own" in text
    _, step, by_rows = operations(loss, params, (x,))
    assert step <= 1.05 * by_rows


def test_norms_and_products_of_two_batches(x64):
    loss, params, (x,) = tied(16)
    some, others = x[:4], 2 * x[4:7]
    in_axes = (None, 0)

    def both(params, some, others):
        _, norms, pullback = per_example_norms(loss, in_axes=in_axes)(params, some)
        products = cross_gramian(loss, in_axes=in_axes)(params, (some,), (others,))
        rows = [flat_rows(jax.vmap(jax.grad(loss), in_axes)(params, z)) for z in (some, others)]
        return norms, products, rows, flat_rows(pullback(norms), 0)

    norms, products, (rows, more), grads = jax.jit(both)(params, some, others)
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-11)
    np.testing.assert_allclose(products, rows @ more.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grads, norms @ rows, rtol=1e-10, atol=1e-12)


def test_parameters_that_are_not_shared_stay_out(x64):
    """A matrix or its magnitudes alone, though they are used as one, and a part of a merged one."""

    def loss(p, x):
        h = jnp.tanh(x @ (p["w"] * (p["g"] / norm(p["w"], 0))))
        return jnp.sum((h @ (p["w"] + p["a"] @ p["b"])) ** 2)

    shapes = {"w": (16, 16), "g": (16,), "a": (16, 2), "b": (2, 16)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x = normal(9, 3, 16)
    rows = jax.vmap(jax.grad(loss), (None, 0))(params, x)

    @functools.partial(jax.jit, static_argnums=0)
    def of_names(names):
        shared = {name: name in names for name in shapes}
        fun = value_and_gramian(loss, in_axes=(None, 0), shared=shared)
        _, gramian, pullback = fun(params, x)
        return gramian, pullback(jnp.arange(3.0))

    for names in ("w", "g", "ab", "wg"):
        gramian, grads = of_names(names)
        some = flat_rows({name: rows[name] for name in names})
        np.testing.assert_allclose(gramian, some @ some.T, rtol=1e-10, atol=1e-10)
        weighted = {
            name: jnp.tensordot(jnp.arange(3.0) if name in names else jnp.ones(3), row, 1)
            for name, row in rows.items()
        }
        np.testing.assert_allclose(
            flat_rows(grads, 0), flat_rows(weighted, 0), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("dtype", some(["bfloat16", "float16", "float32"]))
def test_low_precision(dtype):
    """Half precision keeps the order of operations: a scale may be what keeps numbers small."""
    loss, params, (x,) = WEIGHTS["weight norm"][0](16)
    params, x = jax.tree.map(lambda z: z.astype(dtype), (params, x[:4]))
    fun = jax.jit(lambda *args: value_and_gramian(loss, in_axes=(None, 0))(*args)[:2])
    losses, gramian = fun(params, x)
    assert (losses.dtype, gramian.dtype) == (dtype, jnp.float32)
    like = jax.tree.map(lambda z: z.astype("float32"), params)
    rows = flat_rows(jax.vmap(jax.grad(loss), (None, 0))(like, x.astype("float32")))
    error = np.max(np.abs(gramian - rows @ rows.T)) / np.max(rows @ rows.T)
    assert error <= 100 * jnp.finfo(dtype).eps
    if dtype == "float16":
        assert "rows" in explain(loss, params, x, in_axes=(None, 0)).splitlines()[-1]
        large = {"w": jnp.full((2, 64, 64), 300, dtype), "g": params["g"][:, :1]}
        x = jnp.full((2, 64), 10, dtype)  # whose products with the matrix are infinite
        assert np.all(np.isfinite(fun(large, x)[0]))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_of_extreme_size(size):
    loss, params, (x,) = WEIGHTS["weight norm"][0](16)

    @jax.jit
    def norms(size):
        fun = per_example_norms(lambda p, x: size * loss(p, x), in_axes=(None, 0))
        return fun(params, x[:4])[1]

    one, scaled = norms(1.0), norms(size)
    np.testing.assert_allclose(scaled, one * np.float32(size), rtol=1e-4)


@pytest.mark.slow
def test_where_products_of_layers_are_rounded_they_are_taken_again(monkeypatch, x64):
    """On an accelerator a layer may multiply in less than float32; a Gramian may not."""
    loss, params, (x,) = WEIGHTS["weight norm"][0](16)
    params, x = jax.tree.map(lambda z: z.astype("float32"), (params, x[:4]))

    def fun(params, x):
        return value_and_gramian(loss, in_axes=(None, 0))(params, x)[1]

    def products():
        return str(jax.make_jaxpr(lambda *args: fun(*args))(params, x)).count("dot_general")

    known = products()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert products() == known + 4  # of each layer T times inputs, and that times cotangents
    with jax.default_matmul_precision("highest"):
        assert products() == known
    gramian = jax.jit(fun)(params, x)
    rows = flat_rows(jax.vmap(jax.grad(loss), (None, 0))(params, x))
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_kept_rows_in_a_scan_with_remat_need_no_inputs_and_cotangents(x64):
    """These take 128 positions in 12 layers; the rows themselves fewer bytes."""
    params = {"w": normal(1, 12, 16, 32), "v": normal(2, 12, 32, 16), "b": normal(3, 12, 32)}
    x = normal(4, 8, 128, 16)

    def loss(p, x):
        def layer(h, weights):
            w, v, b = weights
            return h + jnp.tanh(jnp.tanh(h @ w + b) @ v), None

        return jnp.sum(lax.scan(jax.checkpoint(layer), x, (p["w"], p["v"], p["b"]))[0] ** 2)

    def step(params, x):
        _, gramian, pullback = value_and_gramian(loss, in_axes=(None, 0))(params, x)
        return gramian, pullback(jnp.diagonal(gramian))

    def memory(fun):
        return jax.jit(fun).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    def sgd(params, x):
        return jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, x)))(params)

    rows = 8 * 8 * 12 * (2 * 16 * 32 + 32)
    # Twice: as the loop stacks them and with the examples first.
    assert memory(step) <= 1.5 * memory(sgd) + 2 * rows
    compare(loss, params, (x[:3, :8],))
    compare(loss, params, (x[:3],))


@pytest.mark.slow
def test_rows_of_stacked_layers_are_formed_some_at_a_time(x64):
    """Masked weights have rows; those of one layer exist beside what a gradient needs."""
    width, depth, n = 32, 6, 16
    params = {"w": normal(1, depth, width, width), "c": normal(2, depth, width, width)}
    params["b"] = normal(3, width)

    def loss(p, x):
        def layer(h, weights):
            w, c = weights
            masked = w * jnp.tri(width) + jnp.sin(c) * w.T + lax.stop_gradient(c)
            return jnp.tanh(h @ masked + p["b"]), None

        return jnp.sum(lax.scan(layer, x, (p["w"], p["c"]), reverse=True)[0] ** 2)

    x, in_axes = normal(4, n, width), (None, 0)
    text = explain(loss, params, x, in_axes=in_axes)
    assert text.count("1 of 6 steps at a time") == 2
    compare(loss, params, (x[:3],))

    def of_norms(params, x):
        return per_example_norms(loss, in_axes=in_axes)(params, x)[1]

    def step(params, x):
        _, gramian, pullback = value_and_gramian(loss, in_axes=in_axes)(params, x)
        return gramian, pullback(jnp.diagonal(gramian))

    def gradients(params, x):
        return jax.vmap(jax.grad(loss), in_axes)(params, x)

    rows = flat_rows(jax.jit(gradients)(params, x[:3]))
    norms = jax.jit(of_norms)(params, x[:3])
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-11)

    def memory(fun):
        return jax.jit(fun).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    def sgd(params, x):
        return jax.grad(lambda p: jnp.sum(jax.vmap(loss, in_axes)(p, x)))(params)

    of_layer = n * 8 * 2 * width**2
    assert memory(step) <= 1.5 * memory(sgd) + 2.5 * of_layer
