"""Parameters that enter through a function: the Gramian without the gradient of an example."""

import cProfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.operations import count
from jaxmtl import linear_scalarization, scale_invariant
from jaxmtl.engine import plan, value_and_grad, value_and_gramian
from tests.problems import flat_rows, indices, normal, some


def network(weights_of):
    """Two layers with weights that are a function of the parameters."""

    def loss(p, x):
        for i in range(2):
            x = jnp.tanh(x @ weights_of(jax.tree.map(lambda w, i=i: w[i], p)))
        return jnp.sum(x**2)

    return loss


def layers(width, **shapes):
    return {name: normal(i, 2, *shape) for i, (name, shape) in enumerate(shapes.items())}


def affine(width):
    def weights_of(p):
        w = 0.5 * p["w"] - jnp.eye(width) + p["v"].T / jnp.arange(1.0, width + 1)[:, None]
        return -(w * jnp.arange(1.0, width + 1)) / width + jnp.reshape(p["u"], (width, width))

    square = (width, width)
    params = layers(width, w=square, v=square, u=(1, width, width))
    return network(weights_of), params, (normal(9, 32, width),)


def straight_through(width):
    def weights_of(p):
        rounded = jnp.round(16 * p["w"]) / 16
        return p["w"] + lax.stop_gradient(rounded - p["w"])

    return network(weights_of), layers(width, w=(width, width)), (normal(9, 32, width),)


def low_rank(width):
    def weights_of(p):
        return p["w"] + 0.5 * (p["a"] @ p["b"]) + (p["c"].T @ jnp.ones((8, width)) / 8)

    shapes = {"w": (width, width), "a": (width, 8), "b": (8, width), "c": (8, width)}
    return network(weights_of), layers(width, **shapes), (normal(9, 32, width),)


def adapter(width):
    frozen = normal(7, width, width)

    def weights_of(p):
        return frozen + p["a"] @ p["b"]

    return network(weights_of), layers(width, a=(width, 4), b=(4, width)), (normal(9, 32, width),)


def symmetric(width):
    return (
        network(lambda p: p["w"] + p["w"].T),
        layers(width, w=(width, width)),
        (normal(9, 32, width),),
    )


def projected_heads(width):
    """Matrices with more axes, a product along a left axis, positions."""
    params = {"k": normal(1, width, 2, width // 2), "q": normal(2, width, width)}

    def loss(p, x):
        kernel = jnp.einsum("da,ahe->dhe", p["q"], p["k"])
        return jnp.sum(jnp.tanh(jnp.einsum("td,dhe->the", x, kernel)) ** 2)

    return loss, params, (normal(3, 32, 2, width),)


def tied(width):
    """One matrix in two layers, scaled differently, once transposed."""
    params = {"w": normal(1, width, width)}

    def loss(p, x):
        h = jnp.tanh(x @ (2 * p["w"]))
        return jnp.sum(jnp.tanh(h @ (p["w"].T / 3 + 1.0)) ** 2)

    return loss, params, (normal(3, 32, width),)


def branches(width):
    params = {"w": normal(1, width, width), "v": normal(2, width, width)}

    def loss(p, x):
        h = lax.cond(x[0] > 0, lambda x: jax.nn.sigmoid(x @ p["w"]), lambda x: 2 * x, x)
        h = lax.switch(
            jnp.int32(x[1] > 0) + jnp.int32(x[2] > 0),
            [lambda h: h @ p["v"], lambda h: jnp.sin(h), lambda h: h @ p["w"].T],
            h,
        )
        return jnp.sum(jnp.tanh(h) ** 2)

    return loss, params, (normal(3, 32, width),)


def tables(width, rows=200):
    params = {"t": normal(1, rows, width), "u": normal(2, width, rows), "s": normal(4, 3, width)}
    params["w"] = normal(3, width, width)

    def loss(p, i):
        h = p["t"][i[0]] * p["u"][:, i[1]] + jnp.take(p["t"], i[2], axis=0) * p["s"][0]
        h = h + lax.dynamic_index_in_dim(p["t"], i[3], keepdims=False)
        return jnp.sum(jnp.tanh(h @ p["w"]) ** 2)

    return loss, params, (indices(5, rows, 32, 4) - 3,)


def experts(width):
    """A matrix chosen by an index, in two spellings, one transposed."""
    params = {"a": normal(1, 4, width, width), "b": normal(2, width, 4, width)}

    def loss(p, x, e):
        h = jnp.tanh(x @ p["a"][e[0]])
        h = jnp.tanh(jnp.take(p["a"], e[1], axis=0) @ h)
        return jnp.sum(jnp.tanh(jnp.einsum("d,dk->k", h, p["b"][:, e[1]])) ** 2)

    return loss, params, (normal(3, 32, width), indices(4, 4, 32, 2))


@jax.custom_vjp
def quantized(x, w):
    return x @ jnp.round(w * 8) / 8


quantized.defvjp(
    lambda x, w: (quantized(x, w), (x, w)),
    lambda r, g: (g @ r[1].T, jnp.outer(r[0], g) if g.ndim == 1 else (g.T @ r[0]).T),
)


def custom_layers(width):
    params = {"w": normal(1, width, width), "v": normal(2, width, width)}

    def loss(p, x):
        h = jnp.tanh(quantized(jnp.tanh(quantized(x, p["w"])), p["v"]))
        return jnp.sum(quantized(jnp.stack([h, 2 * h]), p["v"]) ** 2)

    return loss, params, (normal(3, 32, width),)


STRUCTURED = {
    f.__name__: f
    for f in (
        affine,
        straight_through,
        low_rank,
        adapter,
        symmetric,
        projected_heads,
        tied,
        branches,
        tables,
        experts,
        custom_layers,
    )
}


def compare(loss, params, args, tolerance=1e-12):
    in_axes = (None,) + (0,) * len(args)
    n = len(args[0])
    weights = normal(77, n)

    def both(params, args):
        losses, gramian, pullback = value_and_gramian(loss, in_axes=in_axes)(params, *args)
        expected, rows = jax.vmap(jax.value_and_grad(loss), in_axes)(params, *args)
        rows = flat_rows(rows)
        grads = flat_rows(pullback(weights), 0)
        return losses, expected, gramian, rows, grads

    losses, expected, gramian, rows, grads = jax.jit(both)(params, args)
    np.testing.assert_allclose(losses, expected, rtol=10 * tolerance)
    scale = np.max(np.abs(rows @ rows.T))
    assert np.max(np.abs(gramian - rows @ rows.T)) <= tolerance * scale
    assert np.max(np.abs(grads - weights @ rows)) <= 4 * tolerance * np.sqrt(scale)


@pytest.mark.parametrize("name", some(STRUCTURED, 6))
def test_equals_the_jacobian(name, x64):
    loss, params, args = STRUCTURED[name](40)
    compare(loss, params, tuple(x[:4] for x in args))


def operations(loss, params, args):
    """Returns the operations of SGD, of the step, and of the step that has the Jacobian."""
    in_axes = (None,) + (0,) * len(args)

    def sgd(params, *args):
        return jax.value_and_grad(lambda p: jnp.mean(jax.vmap(loss, in_axes)(p, *args)))(params)

    def step(params, *args):
        losses, gramian, pullback = value_and_gramian(loss, in_axes=in_axes)(params, *args)
        return losses, gramian, pullback(jnp.diagonal(gramian))

    def by_rows(params, *args):
        losses, rows = jax.vmap(jax.value_and_grad(loss), in_axes)(params, *args)
        rows = [x.reshape(len(losses), -1) for x in jax.tree.leaves(rows)]
        gramian = sum(x @ x.T for x in rows)
        return losses, gramian, [jnp.diagonal(gramian) @ x for x in rows]

    return [count(fun, params, *args) for fun in (sgd, step, by_rows)]


def convolution(width):
    """Many channels on a small map, then one that is dilated, with axes in another order."""
    params = {"k": normal(1, 3, 3, width // 2, width // 2), "t": normal(2, width, width // 2, 2, 3)}

    def loss(p, x):
        h = lax.conv_general_dilated(
            x[None], p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = lax.conv_general_dilated(
            jnp.tanh(h),
            p["t"],
            (2, 1),
            [(1, 0), (2, 1)],
            lhs_dilation=(1, 2),
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "OIHW", "HCNW"),
        )
        return jnp.sum(jnp.sin(h))

    return loss, params, (normal(3, 32, 4, 4, width // 2),)


def patches(width):
    params = {"k": normal(1, 8, 8, 3, width // 2), "w": normal(2, width // 2, width // 2)}

    def loss(p, x):
        h = lax.conv_general_dilated(
            x[None], p["k"], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.tanh(jnp.tanh(h.reshape(16, -1)) @ p["w"]) ** 2)

    return loss, params, (normal(3, 32, 32, 32, 3),)


def recurrent(width):
    hidden = width // 2
    params = {"x": normal(1, 64, 4 * hidden), "h": normal(2, hidden, 4 * hidden)}
    params["b"] = normal(3, 4 * hidden)

    def loss(p, xs):
        def step(carry, x):
            c, h = carry
            i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        start = jnp.zeros(hidden, xs.dtype)
        (_, h), _ = lax.scan(step, (start, start), xs)
        return jnp.sum(h**2)

    return loss, params, (normal(6, 32, 16, 64),)


def differential_equation(width):
    params = {"w": normal(1, width, width), "v": normal(2, width, width), "b": normal(3, width)}

    def loss(p, x):
        def step(h, _):
            return h + 0.1 * jnp.tanh(jnp.tanh(h @ p["w"] + p["b"]) @ p["v"]), None

        h, _ = lax.scan(step, x, None, length=10)
        return jnp.sum(h**2)

    return loss, params, (normal(4, 32, width),)


MIXED = {f.__name__: f for f in (convolution, patches, recurrent, differential_equation)}


@pytest.mark.parametrize("name", MIXED)
def test_uses_at_many_positions_equal_the_jacobian(name, x64):
    loss, params, args = MIXED[name](16)
    compare(loss, params, tuple(x[:4] for x in args))


@pytest.mark.parametrize("name", MIXED)
def test_never_costs_more_than_the_jacobian(name):
    _, step, by_rows = operations(*MIXED[name](512))
    assert step <= 1.05 * by_rows


@pytest.mark.parametrize("name", STRUCTURED)
def test_costs_little_more_than_a_gradient(name):
    loss, params, args = STRUCTURED[name](512)
    sgd, step, by_rows = operations(loss, params, args)
    # Products of inputs and cotangents of 32 examples with those of all: 32 / 512 of a product.
    most = {"tables": 1.35, "tied": 1.2, "symmetric": 1.2, "custom_layers": 1.3}
    assert step <= most.get(name, 1.15) * sgd
    assert by_rows > 5 * sgd or name == "adapter"


@pytest.mark.parametrize("name", [*STRUCTURED, *MIXED])
def test_the_choice_is_that_of_the_cheaper_path(name, monkeypatch):
    """Against products of inputs and cotangents wherever there are any, and rows everywhere."""
    problem = {**STRUCTURED, **MIXED}[name](512)
    found = {}
    for path, costs in {"chosen": None, "structured": (0, 1), "rows": (1, 0)}.items():
        if costs is not None:
            monkeypatch.setattr(plan, "_costs", lambda *_, costs=costs: costs)
        _, found[path], _ = operations(*problem)
    assert found["chosen"] <= 1.15 * min(found["structured"], found["rows"])


def test_parameters_of_another_dtype_are_used_as_they_are():
    """Half-precision parameters, cast before they are used."""

    def loss(p, x):
        for w in p:
            x = jnp.tanh(x @ w.astype(x.dtype))
        return jnp.sum(x**2)

    params = [normal(i, 512, 512).astype(jnp.bfloat16) for i in range(2)]
    sgd, step, by_rows = operations(loss, params, (normal(3, 32, 512).astype(jnp.float32),))
    assert step <= 1.15 * sgd
    assert by_rows > 5 * sgd


def test_two_tables_of_many_rows_cost_what_they_touch():
    """A lookup takes the operations, and the memory, of the rows that it reads."""

    def loss(p, i):
        h = p["t"][i[0]] * p["u"][i[1]] + jnp.take(p["t"], i[2], axis=0)
        return jnp.sum(jnp.tanh(h @ p["w"]) ** 2)

    shapes = {"t": (100_000, 512), "u": (100_000, 512), "w": (512, 512)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    x = jax.ShapeDtypeStruct((32, 3), jnp.int32)

    def sgd(p, x):
        return jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, x)))(p)

    def step(p, x):
        _, gramian, pullback = value_and_gramian(loss, in_axes=(None, 0))(p, x)
        return gramian, pullback(jnp.diagonal(gramian))

    assert count(step, params, x) <= 1.3 * count(sgd, params, x)
    sizes = [
        jax.jit(fun).lower(params, x).compile().memory_analysis().temp_size_in_bytes
        for fun in (sgd, step)
    ]
    assert sizes[1] <= 1.5 * max(sizes[0], 1e5)


def test_a_branch_that_is_not_taken_has_no_say(x64):
    """Its derivative is not finite: the branches stay apart, as vmap(grad) has them."""
    params = {"w": normal(1, 4)}

    def loss(p, x):
        return jnp.sum(
            lax.cond(x[0] > 0, lambda x: jnp.log(x[0]) * p["w"], lambda x: x * p["w"], x)
        )

    x = jnp.array([[0.0, 1, 2, 3], [1.0, 2, 3, 4], [-1.0, 0, 1, 2]])
    compare(loss, params, (x,))


@pytest.mark.parametrize(
    "weights_of",
    [
        lambda p: p["w"] * jnp.tri(6),  # a mask is no outer product
        lambda p: p["w"] * p["w"],
        lambda p: p["w"] @ p["w"],
        lambda p: jnp.exp(p["w"]) + p["w"],
        lambda p: p["w"] / jnp.linalg.norm(p["w"], axis=0),
        lambda p: p["w"] + jnp.concatenate([p["w"][:3], p["w"][3:] * 2]),
        lambda p: p["w"] - p["w"][0],
        lambda p: jnp.where(jnp.tri(6) > 0, p["w"], 0.0),
        lambda p: 1.0 / (3.0 + p["w"]),
        lambda p: jnp.cumsum(p["w"], 0) + jnp.flip(p["w"]),
        lambda p: p["w"].reshape(4, 9).T.reshape(6, 6) + 1.0,
    ],
)
def test_other_functions_are_as_right_as_before(weights_of, x64):
    params, x = {"w": normal(1, 6, 6)}, normal(2, 3, 2, 6)
    compare(lambda p, x: jnp.sum(jnp.tanh(x @ weights_of(p))), params, (x,))


# --- rules without a Gramian, and tracing ------------------------------------------------------


def classifier(width=512):
    shapes = [(784, width), (width, width), (width, width), (width, 10)]
    params = [(normal(i, *s), normal(9, s[1])) for i, s in enumerate(shapes)]

    def loss(p, x, y):
        for w, b in p[:-1]:
            x = jax.nn.relu(x @ w + b)
        return -jax.nn.log_softmax(x @ p[-1][0] + p[-1][1])[y]

    return loss, params, (normal(5, 32, 784), indices(6, 10, 32))


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("route", ["examples", "tasks", "encoder"])
def test_rules_without_a_gramian_cost_what_scalarization_costs(route):
    loss, params, args = classifier()

    def losses(p, *args):
        return jax.vmap(loss, (None, 0, 0))(p, *args)

    def encode(p, x, y):
        return jax.nn.relu(x @ p[0][0] + p[0][1])

    def of_features(p, z, x, y):
        for w, b in p[1:3]:
            z = jax.nn.relu(z @ w + b)
        scores = jax.nn.log_softmax(z @ p[3][0] + p[3][1])
        return -jnp.take_along_axis(scores, y[:, None], 1)[:, 0]

    fun, options = losses, {}
    if route == "examples":
        fun, options = loss, {"in_axes": (None, 0, 0)}
    if route == "encoder":
        fun, options = of_features, {"encoder": encode}
    mean = linear_scalarization()
    plain = flops(jax.value_and_grad(lambda p: jnp.mean(losses(p, *args))), params)
    step = value_and_grad(fun, mean, **options)
    assert flops(lambda p: step(p, mean.init(p), *args), params) <= 1.02 * plain


@pytest.mark.parametrize("route", ["examples", "tasks"])
@pytest.mark.parametrize("rule", [linear_scalarization, scale_invariant])
def test_parameters_that_are_not_shared_cost_no_pass_of_their_own(route, rule):
    """The layers are in a scan, of which the compiler would not merge two."""
    params = {"trunk": normal(0, 4, 64, 64), "head": normal(1, 64, 10)}
    x, y = normal(2, 256, 64), indices(3, 10, 256)

    def loss(p, x, y):
        z, _ = jax.lax.scan(lambda z, w: (z + jnp.tanh(z @ w), None), x, p["trunk"])
        return -jax.nn.log_softmax(z @ p["head"])[y]

    def losses(p, x, y):
        return jax.vmap(loss, (None, 0, 0))(p, x, y)

    shared = {"trunk": True, "head": False}
    fun, axes = (loss, (None, 0, 0)) if route == "examples" else (losses, None)
    step = value_and_grad(fun, rule(), in_axes=axes, shared=shared)
    state = rule().init(params)
    plain = flops(jax.value_and_grad(lambda p: jnp.mean(losses(p, x, y))), params)
    assert flops(lambda p: step(p, state, x, y), params) <= 1.02 * plain


@pytest.mark.slow
def test_tracing_takes_time_linear_in_depth():
    """Of unrolled transformer blocks, counted in calls: at most three times those of the rows."""
    shapes = {"qkv": (3, 8, 8), "out": (8, 8), "up": (8, 16), "down": (16, 8)}

    def norm(x):
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def loss(p, x):
        for w in p:
            q, k, v = jnp.einsum("td,kde->kte", norm(x), w["qkv"])
            x = x + jax.nn.softmax(q @ k.T, -1) @ v @ w["out"]
            x = x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"]
        return jnp.sum(x)

    def step(params, x):
        _, gramian, pullback = value_and_gramian(loss, in_axes=(None, 0))(params, x)
        return pullback(jnp.diagonal(gramian))

    def rows(params, x):
        return jax.vmap(jax.grad(loss), (None, 0))(params, x)

    def calls(fun, depth):
        params = [{k: normal(i, *s) for k, s in shapes.items()} for i in range(depth)]
        profile = cProfile.Profile()
        profile.runcall(jax.jit(fun).lower, params, normal(99, 4, 3, 8))
        return sum(entry.callcount for entry in profile.getstats())

    for fun in (step, rows):
        calls(fun, 2)  # what is only done once
    found = calls(step, 24)
    assert found <= 2.2 * calls(step, 12)
    assert found <= 3 * calls(rows, 24)
