"""Losses of m tasks over one batch: equality with the Jacobian, operations and memory."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.operations import count
from jaxmtl import upgrad, value_and_jacobian
from jaxmtl.engine import cross_gramian, explain, value_and_grad, value_and_gramian
from tests.problems import flat_rows, indices, normal, some

M = 4


def errors(z, y, heads):
    """One linear head per task, each a parameter of its own."""
    return jnp.stack([jnp.mean((z @ w - y) ** 2) for w in heads])


def heads(width, m=M):
    return [normal(50 + i, width, 2) for i in range(m)]


# --- models: each returns (losses of m tasks, params, arguments, words of explain) --------------


def dense():
    params = {"w": [normal(i, 30, 30) for i in range(3)], "heads": heads(30)}

    def losses(p, x, y):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return errors(x, y, p["heads"])

    return losses, params, (normal(5, 6, 30), normal(6, 6, 2)), "structured"


def narrow_layers():
    params = {"w": [normal(i, 3, 3) for i in range(2)], "b": normal(3, 3), "heads": heads(3)}

    def losses(p, x, y):
        for w in p["w"]:
            x = jnp.tanh(x @ w) * p["b"] + p["b"]  # a parameter of four uses
        return errors(x, y, p["heads"])

    return losses, params, (normal(5, 40, 3), normal(6, 40, 2)), "rows of the tasks ("


def wide_layers():
    """Rows of all tasks are larger than the layers' outputs, and K than both."""
    params = {"w": normal(1, 200, 4), "v": normal(2, 4, 200), "heads": normal(3, 200, M)}

    def losses(p, x, y):
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] @ p["heads"] - y) ** 2, 0)

    return losses, params, (normal(5, 3, 200), normal(6, 3, M)), "structured"


def penalty():
    """Every task adds the same function of the parameters alone."""
    params = {"w": normal(1, 30, 30), "v": normal(2, 30, M)}

    def losses(p, x, y):
        found = jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2, 0)
        return found + jnp.arange(1, M + 1) * (jnp.sum(p["w"] ** 4) + jnp.sum(p["v"] ** 2))

    return losses, params, (normal(5, 6, 30), normal(6, 6, M)), "pushed through the linearised"


def matrices_of_other_matrices():
    params = {"w": [normal(i, 40, 40) for i in range(3)], "heads": heads(40)}

    def losses(p, x, y):
        for w in p["w"]:
            x = jnp.tanh(x @ jnp.sin(w))
        return errors(x, y, p["heads"])

    return losses, params, (normal(5, 6, 40), normal(6, 6, 2)), "at a time, pushed forward again"


def convolutions():
    params = {
        "k": [normal(0, 3, 3, 2, 3) / 3, normal(1, 3, 3, 3, 8) / 3],
        "depthwise": normal(2, 3, 3, 1, 8),
        "b": normal(3, 8),
        "heads": heads(8),
    }
    numbers = ("NHWC", "HWIO", "NHWC")

    def losses(p, x, y):
        for k, stride in zip(p["k"], (1, 2), strict=True):
            x = lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=numbers)
            x = jax.nn.relu((x - jnp.mean(x, (0, 1, 2))) / jnp.std(x, (0, 1, 2)))  # couples a batch
        x = lax.conv_general_dilated(
            x, p["depthwise"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=8
        )
        return errors(jnp.mean(x + p["b"], (1, 2)), y, p["heads"])

    return losses, params, (normal(5, 3, 6, 6, 2), normal(6, 3, 2)), "rows of the tasks"


def tied_language_model():
    """A table that is looked up, with repetitions and out of range, and a matrix too."""
    params = {
        "table": normal(0, 50, 12),
        "qkv": normal(1, 12, 3, 12),
        "scale": 1 + normal(2, 12) / 4,
        "experts": normal(3, 3, 12, 12),
        "heads": heads(12),
    }

    def losses(p, tokens, y):
        h = p["table"][tokens] + p["table"][tokens[:, ::-1] + 30]
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dce->btce", h * p["scale"], p["qkv"]), 2, 0)
        h = h + jnp.einsum("bts,bsd->btd", jax.nn.softmax(q @ k.mT), v)
        h = jnp.tanh(h @ p["experts"][tokens[0, 0] % 3])
        scores = jax.nn.log_softmax(h @ p["table"].T)
        h = h + jnp.mean(scores, -1, keepdims=True)
        return errors(jnp.mean(h, 1), y, p["heads"])

    return losses, params, (indices(5, 50, 3, 4), normal(6, 3, 2)), "of gather"


def stacked_layers():
    """Layers in a scan, one of them checkpointed, and a recurrent matrix."""
    params = {"w": normal(0, 3, 20, 20), "v": normal(1, 3, 20), "u": normal(2, 20, 20),
              "heads": heads(20)}  # fmt: skip

    def losses(p, x, y):
        layer = jax.checkpoint(lambda h, wv: (jnp.tanh(h @ wv[0] + wv[1]), None))
        h = lax.scan(layer, x, (p["w"], p["v"]))[0]
        h = lax.scan(lambda h, _: (jnp.tanh(h @ p["u"]), None), h, None, length=2)[0]
        return errors(h, y, p["heads"])

    return losses, params, (normal(5, 4, 20), normal(6, 4, 2)), "structured"


def functions_of_parameters():
    params = {"w": normal(0, 20, 20), "a": normal(1, 20, 2), "b": normal(2, 2, 20),
              "g": 1 + normal(3, 20) / 4, "heads": heads(20)}  # fmt: skip

    def losses(p, x, y):
        h = jnp.tanh(x @ (2 * p["w"] + p["a"] @ p["b"]))
        h = jnp.tanh(h @ (p["g"] * p["w"].T / jnp.linalg.norm(p["w"])))
        h = lax.cond(h[0, 0] > 0, lambda h: h @ p["w"], lambda h: jnp.sin(h), h)
        return errors(h @ p["w"][:, :20], y, p["heads"])

    return losses, params, (normal(5, 4, 20), normal(6, 4, 2)), "at a time, pushed forward again"


def heads_of_several_kinds():
    """Heads of several layers, one that two tasks read, a matrix that all heads share."""
    params = {
        "trunk": [normal(i, 10, 10) for i in range(2)],
        "heads": [{"u": normal(20 + i, 10, 10), "v": normal(30 + i, 10)} for i in range(M)],
        "common": normal(9, 10, 10),
    }

    def losses(p, x, y):
        first = jnp.tanh(x @ p["trunk"][0])
        second = jnp.tanh(first @ p["trunk"][1])
        outs = [jnp.tanh((first if i % 2 else second) @ h["u"]) for i, h in enumerate(p["heads"])]
        outs[0] = outs[0] + outs[1]
        outs = [o @ p["common"] @ h["v"] for o, h in zip(outs, p["heads"], strict=True)]
        found = {f"task{i}": jnp.mean((o - y) ** 2) for i, o in enumerate(outs)}
        return jnp.stack([*found.values()])

    return losses, params, (normal(5, 6, 10), normal(6, 6)), "structured"


def losses_of_losses():
    """A loss is part of others, with a head, without, and alone in the trunk."""
    params = {"w": [normal(i, 10, 10) for i in range(2)], "heads": [normal(3, 10), normal(4, 10)]}

    def losses(p, x, y):
        h = jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1])
        first = jnp.mean((h @ p["heads"][0] - y) ** 2)
        second = first + jnp.mean(jnp.sin(h @ p["heads"][1]))
        return jnp.stack([first, second, jnp.log1p(first) * second, jnp.mean(h**2)])

    return losses, params, (normal(5, 6, 10), normal(6, 6)), "structured"


def passes_of_their_own():
    """Every loss evaluates the network on other inputs, as for differential equations."""
    params = {"w": [normal(i, 10, 10) for i in range(2)], "heads": normal(3, 10)}

    def losses(p, x, y):
        def network(x):
            return jnp.tanh(jnp.tanh(x @ p["w"][0]) @ p["w"][1]) @ p["heads"]

        return jnp.stack([jnp.mean((network(x * i) - y[:i].sum()) ** 2) for i in range(1, M + 1)])

    return losses, params, (normal(5, 6, 10), normal(6, 6)), "rows of the tasks"


def closed_over():
    losses, params, args, _ = dense()
    mask = jnp.asarray(np.random.default_rng(7).random((30, 30)) < 0.5, args[0].dtype)

    def of_params(p):
        return losses({**p, "w": [w * mask for w in p["w"]]}, *args)

    return of_params, params, (), "rows of the tasks"


MODELS = {
    f.__name__: f
    for f in (
        dense,
        losses_of_losses,
        passes_of_their_own,
        narrow_layers,
        wide_layers,
        penalty,
        matrices_of_other_matrices,
        convolutions,
        tied_language_model,
        stacked_layers,
        functions_of_parameters,
        heads_of_several_kinds,
        closed_over,
    )
}


def rows_of(jacobian):
    found = [np.reshape(x, (np.shape(x)[0], -1)) for x in jax.tree.leaves(jacobian)]
    return np.concatenate(found, axis=1)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def compiled(fun, *args):
    # Without LLVM's optimisations: compiling is most of the time of these tests.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fun).lower(*args).compile(options)(*args)


@pytest.mark.parametrize("name", some(MODELS, 8))
def test_equals_the_jacobian(name, x64):
    losses_fn, params, args, words = MODELS[name]()
    weights, of_heads = normal(8, M), normal(9, M)

    def shared(path):
        return "heads" not in str(path[0])

    def with_aux(p, *args):
        losses = losses_fn(p, *args)
        return losses, {"sum": jnp.sum(losses), "step": 3}

    def both(params, args):
        (losses, aux), gramian, pullback = value_and_gramian(with_aux, has_aux=True)(params, *args)
        part = value_and_gramian(losses_fn, shared=shared)(params, *args)
        jacobian = jax.jacrev(losses_fn)(params, *args)
        found = losses, aux["sum"], gramian, pullback(weights), part[1], part[2](weights, of_heads)
        return found, (losses_fn(params, *args), jacobian)

    found, (losses, jacobian) = compiled(both, params, args)
    rows, scale = rows_of(jacobian), np.max(np.abs(rows_of(jacobian)))
    np.testing.assert_allclose(found[0], losses, rtol=1e-13)
    np.testing.assert_allclose(found[1], np.sum(losses), rtol=1e-13)
    np.testing.assert_allclose(found[2], rows @ rows.T, rtol=0, atol=1e-12 * np.max(rows @ rows.T))
    assert np.array_equal(found[2], found[2].T)
    np.testing.assert_allclose(flat(found[3]), weights @ rows, rtol=0, atol=1e-12 * scale)
    is_shared = [shared(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves = jax.tree.leaves(jacobian)
    some = [x for x, flag in zip(leaves, is_shared, strict=True) if flag]
    expected = rows_of(some) @ rows_of(some).T if some else np.zeros((M, M))
    np.testing.assert_allclose(found[4], expected, rtol=0, atol=1e-12 * np.max(rows @ rows.T))
    sums = [
        np.tensordot(weights if flag else of_heads, x, 1)
        for x, flag in zip(leaves, is_shared, strict=True)
    ]
    np.testing.assert_allclose(flat(found[5]), flat(sums), rtol=0, atol=1e-12 * scale)
    assert words in explain(losses_fn, params, *args)


@pytest.mark.slow
def test_two_batches_of_different_sizes(x64):
    losses_fn, params, first, _ = dense()
    second = normal(15, 9, 30), normal(16, 9, 2)
    found = compiled(cross_gramian(losses_fn), params, first, second)
    rows = [rows_of(jax.jacrev(losses_fn)(params, *args)) for args in (first, second)]
    np.testing.assert_allclose(found, rows[0] @ rows[1].T, rtol=0, atol=1e-12 * np.max(found))


@pytest.mark.slow
def test_rows_of_very_different_size_have_scales_of_their_own():
    """A step in float32 whose losses differ by 2^110 is that of the same losses near one."""
    losses_fn, params, args, _ = dense()
    rule = upgrad(num_tasks=M)
    powers = jnp.asarray([2.0**60, 2.0**-50, 1.0, 2.0**30])

    def gramian(factors):
        def scaled(p, *args):
            return factors * losses_fn(p, *args)

        step = value_and_grad(scaled, rule)
        (_, state), grads = step(params, rule.init(params), *args)
        return value_and_gramian(scaled)(params, *args)[1], state.mtl_skipped, grads

    plain, _, _ = compiled(gramian, jnp.ones(M))
    found, skipped, grads = compiled(gramian, powers)
    assert int(skipped) == 0
    assert np.all(np.isfinite(flat(grads)))
    exact = np.outer(powers, powers).astype(np.float64) * np.asarray(plain, np.float64)
    representable = np.abs(exact) < 1e38
    assert np.array_equal(np.asarray(found, np.float64)[representable], exact[representable])


# --- operations and memory ------------------------------------------------------------------------

BATCH, WIDTH = 64, 256


def trunk_and_heads(m, inputs, are_leaves):
    """Four dense layers of width 256 and a linear head per task."""
    sizes = (inputs, *(WIDTH,) * 4)
    params = {
        "trunk": [normal(i, *shape) for i, shape in enumerate(itertools.pairwise(sizes))],
        "heads": heads(WIDTH, m) if are_leaves else normal(9, WIDTH, m),
    }

    def encode(p, x, y):
        for w in p["trunk"]:
            x = jax.nn.relu(x @ w)
        return x

    def losses_of_features(p, z, x, y):
        if are_leaves:
            return errors(z, y[:, :2], p["heads"])
        return jnp.mean((z @ p["heads"] - y) ** 2, 0)

    args = normal(10, BATCH, inputs), normal(11, BATCH, m)
    return losses_of_features, encode, params, args


def step_of(losses_fn, m, **options):
    """Losses, Gramian and weighted gradient, without the solver."""

    def step(params, weights, *args):
        losses, gramian, pullback = value_and_gramian(losses_fn, **options)(params, *args)
        return losses, pullback(weights + gramian[0])

    return step


def gradients(losses_fn, params, args, m, whole=None, **options):
    """Operations of the step in gradients of the mean of ``whole``."""
    whole = whole or losses_fn
    one = count(jax.grad(lambda p, *args: jnp.mean(whole(p, *args))), params, *args)
    return count(step_of(losses_fn, m, **options), params, jnp.ones(m), *args) / one


def temporary(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("are_leaves", some([True, False]))
@pytest.mark.parametrize(("m", "inputs", "most"), [(8, 256, 4.5), (40, 256, 18), (40, 784, 16)])
def test_dense_layers_cost_a_third_of_a_gradient_per_task(m, inputs, most, are_leaves):
    of_features, encode, params, args = trunk_and_heads(m, inputs, are_leaves)

    def losses_fn(p, *args):
        return of_features(p, encode(p, *args), *args)

    assert gradients(losses_fn, params, args, m) <= most
    # Through an encoder, one whole gradient and m gradients of all heads.
    features = encode(params, *args)
    of_heads = jax.grad(lambda p, z: jnp.mean(of_features(p, z, *args)), (0, 1))
    whole = count(jax.grad(lambda p: jnp.mean(losses_fn(p, *args))), params)
    found = gradients(of_features, params, args, m, losses_fn, encoder=encode)
    assert found <= 1 + m * count(of_heads, params, features) / whole


@pytest.mark.parametrize("m", some([8, 40]))
def test_memory_of_dense_layers(m):
    of_features, encode, params, args = trunk_and_heads(m, 256, True)

    def losses_fn(p, *args):
        return of_features(p, encode(p, *args), *args)

    plain = temporary(jax.grad(lambda p, *args: jnp.mean(losses_fn(p, *args))), params, *args)
    found = temporary(step_of(losses_fn, m), params, jnp.ones(m), *args)
    assert found <= 4 * m * BATCH * WIDTH * 4 + plain
    text = explain(losses_fn, params, *args)
    assert text.count("structured") == 4  # and rows in the heads


def small_cnn(m):
    shapes = [(3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 32), (3, 3, 32, 32)]
    params = {
        "k": [normal(i, *shape) / 3 for i, shape in enumerate(shapes)],
        "b": [jnp.zeros(shape[-1]) for shape in shapes],
        "heads": heads(32, m),
    }
    numbers = ("NHWC", "HWIO", "NHWC")

    def losses(p, x, y):
        for k, b, stride in zip(p["k"], p["b"], (1, 2, 1, 2), strict=True):
            x = lax.conv_general_dilated(x, k, (stride,) * 2, "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x + b)
        return errors(jnp.mean(x, (1, 2)), y, p["heads"])

    return losses, params, (normal(10, 8, 12, 12, 3), normal(11, 8, 2)), 8 * 12 * 12 * 16


def small_transformer(m):
    width = 32
    block = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width),
             "down": (4 * width, width)}  # fmt: skip
    params = {
        "table": normal(0, 100, width),
        "blocks": [
            {name: normal(10 * i + j, *shape) for j, (name, shape) in enumerate(block.items())}
            | {"scales": [jnp.ones(width)] * 2}
            for i in range(2)
        ],
        "heads": heads(width, m),
    }

    def norm(x, scale):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale

    def losses(p, tokens, y):
        h = p["table"][tokens]
        for layer in p["blocks"]:
            mixed = norm(h, layer["scales"][0]) @ layer["qkv"]
            q, k, v = (x.reshape(*h.shape[:2], 4, -1) for x in jnp.split(mixed, 3, -1))
            scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k))
            h = h + jnp.einsum("bhts,bshe->bthe", scores, v).reshape(h.shape) @ layer["out"]
            h = h + jax.nn.gelu(norm(h, layer["scales"][1]) @ layer["up"]) @ layer["down"]
        return errors(jnp.mean(h, 1), y, p["heads"])

    return losses, params, (indices(10, 100, 8, 8), normal(11, 8, 2)), 8 * 8 * 4 * width


@pytest.mark.parametrize("model", some([small_cnn, small_transformer]))
def test_other_networks_cost_less_than_to_push_every_gradient(model):
    m = 8
    losses_fn, params, args, largest = model(m)
    found, pushed = (gradients(losses_fn, params, args, m, chunk_size=size) for size in (None, 1))
    assert found <= 0.7 * pushed
    plain = temporary(jax.grad(lambda p, *args: jnp.mean(losses_fn(p, *args))), params, *args)
    found = temporary(step_of(losses_fn, m), params, jnp.ones(m), *args)
    assert found <= 4 * m * largest * 4 + plain


def test_losses_with_passes_of_their_own_cost_no_pass_through_those_of_others():
    """One forward pass, two backward passes, and the products of the rows."""
    m, width = 8, 128
    params = [normal(i, width, width) for i in range(3)]

    def losses(p, x):
        def loss(x):
            for w in p:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        return jnp.stack([loss(x * i) for i in range(m)])

    x = normal(4, 64, width)
    rows = 2 * m * m * 3 * width**2
    gradient = count(jax.grad(lambda p: jnp.mean(losses(p, x))), params)
    step = count(step_of(losses, m), params, jnp.ones(m), x)
    assert step <= 1.1 * 5 / 3 * gradient + rows
    by_rows = count(lambda p: value_and_jacobian(losses)(p, x)[1], params)
    assert by_rows <= 1.01 * gradient
    plain = temporary(jax.grad(lambda p: jnp.mean(losses(p, x))), params)
    of_a_layer = m * width**2 * 4
    assert temporary(step_of(losses, m), params, jnp.ones(m), x) <= plain + 3.1 * of_a_layer


def test_when_gradients_are_pushed(x64):
    losses_fn, params, args, _ = dense()
    text = explain(losses_fn, params, *args, chunk_size=2)
    assert "2 at a time, pushed through the linearised losses" in text
    remat = explain(jax.checkpoint(losses_fn), params, *args)
    assert "1 at a time, pushed" in remat
    # The cotangents of a thousand tasks at a layer of a million numbers are no default.
    x = jax.ShapeDtypeStruct((4096, 256), jnp.float64)
    wide = explain(lambda p, x: jnp.mean(jnp.tanh(x @ p), 0), jnp.ones((256, 256)), x)
    assert "1 at a time, pushed" in wide
    assert "much memory" in wide


@pytest.mark.parametrize("shared", ["trunk", "heads", None])
def test_a_product_of_a_shared_and_another_parameter(shared, x64):
    """One value of two leaves, of which one counts: its rows are those of that leaf."""
    params = {"trunk": normal(1, 3, 3), "heads": normal(2, 4, 3)}

    def losses_fn(params):
        return jnp.sum(jnp.tanh(params["trunk"] @ params["heads"].T), axis=0) ** 2

    counted = None if shared is None else {name: name == shared for name in params}
    _, gramian, pullback = value_and_gramian(losses_fn, shared=counted)(params)
    jacobian, weights = jax.jacrev(losses_fn)(params), normal(3, 4)
    rows = flat_rows(jacobian if shared is None else jacobian[shared])
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-12, atol=1e-12)
    grads = jax.tree.map(lambda rows: jnp.tensordot(weights, rows, 1), jacobian)
    chex.assert_trees_all_close(pullback(weights, weights), grads, rtol=1e-12)
