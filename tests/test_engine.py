"""The instance-wise Gramian equals that of the explicit Jacobian, on every kind of network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmtl.engine import explain, value_and_gramian
from tests.problems import some


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def tokens(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape))


def compiled(fun, *args):
    # Without LLVM's optimisations: compiling is most of the time of these tests.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(fun).lower(*args).compile(options)(*args)


def check(example_loss, params, *args, in_axes=None, tolerance=1e-12):
    """Compare losses, Gramian and pullback with those of the explicit Jacobian."""
    in_axes = in_axes or (None,) + (0,) * len(args)

    def both(params, args, weights):
        losses, gramian, pullback = value_and_gramian(example_loss, in_axes=in_axes)(params, *args)
        gradient = jax.value_and_grad(example_loss)
        expected_losses, jacobian = jax.vmap(gradient, in_axes=in_axes)(params, *args)
        n = expected_losses.shape[0]
        matrices = [x.reshape(n, -1).astype(gramian.dtype) for x in jax.tree.leaves(jacobian)]
        expected = sum(x @ x.T for x in matrices)
        sums = jax.tree.map(lambda x: jnp.tensordot(weights, x.astype(gramian.dtype), 1), jacobian)
        return losses, gramian, pullback(weights), expected_losses, expected, sums

    shape = jax.eval_shape(jax.vmap(example_loss, in_axes), params, *args).shape
    weights = normal(77, *shape)
    losses, gramian, grads, *expected = compiled(both, params, args, weights)
    expected_losses, expected_gramian, expected_grads = expected
    scale = np.max(np.abs(expected_gramian))
    assert gramian.shape == weights.shape * 2
    assert np.max(np.abs(gramian - expected_gramian)) <= tolerance * scale
    assert np.array_equal(gramian, np.transpose(gramian))
    np.testing.assert_allclose(losses, expected_losses, rtol=10 * tolerance)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    size = np.sqrt(np.trace(expected_gramian))
    leaves = map(jax.tree.leaves, (grads, expected_grads, params))
    for grad, other, param in zip(*leaves, strict=True):
        assert (grad.shape, grad.dtype) == (jnp.shape(param), jnp.result_type(param))
        assert np.max(np.abs(grad - other), initial=0) <= 4 * tolerance * size


# --- networks: each returns (loss of one example, params, batched args) ------------------------


def mlp():
    params = {"w1": normal(1, 5, 7), "b1": normal(2, 7), "w2": normal(3, 7, 3), "s": normal(4, 3)}

    def loss(p, x):
        h = jax.nn.relu(x @ p["w1"] + p["b1"])
        return jnp.sum(jax.nn.log_softmax(h @ p["w2"]) * p["s"])

    return loss, params, (normal(5, 6, 5),)


def transposed_layouts():
    params = {"a": normal(1, 7, 5), "b": normal(2, 3, 4, 7), "c": normal(3, 4, 3)}

    def loss(p, x):
        h = jnp.tanh(p["a"] @ x)
        h = jnp.tanh(jnp.einsum("ijk,k->ji", p["b"], h))
        return jnp.sum(jnp.einsum("ij,ij->i", p["c"], h) ** 2)  # batch axes in common

    return loss, params, (normal(5, 6, 5),)


def sequence():
    params = {"w": normal(1, 5, 40), "v": normal(2, 40, 40), "k": normal(3, 2, 40, 3)}

    def loss(p, x):
        h = jnp.tanh(x @ p["w"])
        h = h + jnp.tanh(h @ p["v"])
        return jnp.sum(jnp.einsum("td,hde->the", h, p["k"]) ** 2)

    return loss, params, (normal(5, 4, 2, 5),)


def conv_net(strides=(1, 1), groups=1, multiplier=1, lhs=(1, 1), rhs=(1, 1), padding="SAME"):
    features = 4 * multiplier
    params = {
        "k1": normal(1, 3, 3, 2, 4),
        "b1": normal(2, 4),
        "k2": normal(3, 3, 2, 4 // groups, features),
    }

    def loss(p, x):
        conv = functools.partial(
            lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jnp.tanh(conv(x[None], p["k1"], (1, 1), "VALID") + p["b1"])
        h = conv(
            h,
            p["k2"],
            strides,
            padding,
            lhs_dilation=lhs,
            rhs_dilation=rhs,
            feature_group_count=groups,
        )
        return jnp.sum(jnp.sin(h))

    return loss, params, (normal(5, 3, 7, 8, 2),)


def conv_channels_first():
    params = {"k": normal(1, 4, 2, 3), "t": normal(2, 3, 4, 2)}

    def loss(p, x):
        h = lax.conv_general_dilated(
            x[None], p["k"], (2,), [(1, 2)], dimension_numbers=("NCH", "OIH", "NCH")
        )
        h = lax.conv_transpose(
            jnp.tanh(h), p["t"], (2,), "SAME", dimension_numbers=("NCH", "HIO", "NCH")
        )
        return jnp.sum(h**2)

    return loss, params, (normal(5, 3, 2, 9),)


def transformer():
    d, heads, length = 6, 2, 5
    params = {
        "embed": normal(1, 9, d),
        "position": normal(2, length, d),
        "qkv": normal(3, 3, d, heads, d // heads) / 3,
        "out": normal(4, heads, d // heads, d) / 3,
        "scale": 1 + normal(5, 2, d) / 5,
        "shift": normal(6, d),
        "up": normal(7, d, 2 * d) / 3,
        "down": normal(8, 2 * d, d) / 3,
    }

    def norm(x, scale):
        x = x - jnp.mean(x, -1, keepdims=True)
        return scale * x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)

    def loss(p, t):
        x = p["embed"][t] + p["position"]
        h = norm(x, p["scale"][0]) + p["shift"]
        q, k, v = (jnp.einsum("td,dhe->the", h, w) for w in p["qkv"])
        a = jax.nn.softmax(jnp.einsum("the,she->hts", q, k))
        x = x + jnp.einsum("hts,she,hed->td", a, v, p["out"])
        x = x + jax.nn.gelu(norm(x, p["scale"][1]) @ p["up"]) @ p["down"]
        logits = jax.nn.log_softmax(x @ p["embed"].T)
        return -jnp.sum(logits[jnp.arange(length), t])

    return loss, params, (tokens(9, 9, 4, length),)


def lstm():
    params = {"x": normal(1, 3, 16) / 2, "h": normal(2, 4, 16) / 2, "b": normal(3, 16)}
    params |= {"start": normal(4, 2, 4), "out": normal(5, 4)}

    def loss(p, xs):
        def step(carry, x):
            c, h = carry
            i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h @ p["out"]

        _, ys = lax.scan(step, (p["start"][0], p["start"][1]), xs, reverse=True)
        return jnp.sum(ys**2)

    return loss, params, (normal(6, 4, 5, 3),)


def stacked_layers():
    params = {"w": normal(1, 3, 40, 40) / 6, "b": normal(2, 3, 40), "last": normal(3, 40)}

    def loss(p, x):
        @jax.checkpoint
        def layer(h, layer_params):
            w, b = layer_params
            return jnp.tanh(h @ w + b), None

        h, _ = lax.scan(layer, x, (p["w"], p["b"]))
        return jnp.dot(h, p["last"])

    return loss, params, (normal(5, 6, 40),)


def nested_scans():
    params = {"w": normal(1, 2, 4, 4) / 2, "shared": normal(2, 4, 4) / 2, "u": normal(3, 2, 3, 4)}

    def loss(p, x):
        def outer(h, layer):
            w, u = layer

            def inner(h, u):
                return jnp.tanh(h @ (w * 2.0) + h @ p["shared"] + u * jnp.exp(u)), h[0] * u

            h, ys = lax.scan(inner, h, u)
            return h, jnp.sum(ys)

        h, ys = lax.scan(outer, x, (p["w"], p["u"]))
        return jnp.sum(h**2) + jnp.sum(ys)

    return loss, params, (normal(5, 5, 4),)


def layers_by_index():
    params = {"w": normal(1, 3, 4, 4) / 2, "b": normal(2, 3, 4)}

    def loss(p, x):
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i] + p["b"][i]), x)
        return jnp.sum(h)

    return loss, params, (normal(5, 5, 4),)


def tied_autoencoder():
    params = {"w": normal(1, 30, 8) / 5, "b": normal(2, 8), "c": normal(3, 30)}

    def loss(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"])
        return jnp.sum((h @ p["w"].T + p["c"] - x) ** 2)

    return loss, params, (normal(5, 6, 30),)


def tied_embedding():
    params = {"e": normal(1, 60, 40) / 6, "w": normal(2, 40, 40) / 6}

    def loss(p, t):
        x, y = t
        h = jnp.tanh(p["e"][x] @ p["w"])
        return -jax.nn.log_softmax(h @ p["e"].T)[y]

    return loss, params, (tokens(3, 60, 6, 2),)


def embedding_bag():
    params = {"e": normal(1, 50, 30), "w": normal(2, 30)}

    def loss(p, t):
        h = jnp.tanh(jnp.sum(p["e"].at[t].get(mode="fill", fill_value=0.0), axis=0))
        h = h + jnp.take(p["e"], t[0], axis=0, mode="clip")
        return jnp.dot(h, p["w"])

    return loss, params, (jnp.concatenate([tokens(3, 50, 5, 3), jnp.full((5, 1), 50)], 1),)


def derived_parameters():
    params = {"w": normal(1, 4, 5), "v": normal(2, 5), "m": normal(3, 6, 5), "s": normal(4)}

    def loss(p, x):
        standard = (p["w"] - jnp.mean(p["w"], 0)) / jnp.std(p["w"], 0)
        h = jnp.tanh(x @ (standard * (jnp.arange(5) > 1)))
        h = h + x @ lax.stop_gradient(p["w"]) + p["v"][::-1]
        low, high = p["m"][:2], p["m"][2:]
        h = jnp.tanh(low.reshape(5, 2).T @ h) * p["s"]
        return jnp.sum(jnp.concatenate([high @ (x[:1] * p["v"]), h, p["v"]]) ** 2)

    return loss, params, (normal(5, 6, 4),)


def concatenated_parameters():
    params = {"a": normal(1, 4, 30), "b": normal(2, 4, 30), "c": normal(3, 60)}

    def loss(p, x):
        kernel = jnp.concatenate([p["a"], p["b"]], axis=1)
        return jnp.sum(jnp.tanh(x @ kernel + p["c"]))

    return loss, params, (normal(5, 6, 4),)


def sliced_twice():
    params = {"w": normal(1, 4, 4)}

    def loss(p, x):
        for _ in range(2):  # the halves are apart, but each half has uses of two layouts
            x = jnp.tanh(jnp.concatenate([x @ p["w"][:, :2], x @ p["w"][:, 2:]]))
        return jnp.sum(x)

    return loss, params, (normal(5, 3, 4),)


def sliced_layers():
    params = {"w": normal(1, 3, 30, 30) / 5, "unused": normal(2, 3)}

    def loss(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    return loss, params, (normal(5, 6, 30),)


@jax.custom_jvp
def _soft(x):
    return jnp.log1p(jnp.exp(x))


_soft.defjvps(lambda t, _, x: 0.3 * t * x)


@jax.custom_vjp
def _scaled(x, w):
    return x * jnp.sin(w)


_scaled.defvjp(lambda x, w: (_scaled(x, w), (x, w)), lambda r, g: (g * r[1], g * r[0] * 0.5))


def custom_derivatives():
    params = {"w": normal(1, 4, 5), "a": normal(2, 5), "b": normal(3, 5)}

    def loss(p, x):
        return jnp.sum(_scaled(_soft(x @ p["w"] + p["a"]), p["b"]) * _soft(p["b"]))

    return loss, params, (normal(5, 6, 4),)


def control_flow():
    params = {"w": normal(1, 4, 4), "b": normal(2, 4)}

    def loss(p, x):
        h = lax.cond(x[0] > 0, lambda h: h @ p["w"], lambda h: h * p["b"], x)
        h = jnp.where(x > 0, h, p["b"])
        h = lax.dynamic_update_slice(h, p["b"][:2], (1,))
        return jnp.sum(jnp.sort(h) ** 2) + jnp.sum(p["b"] ** 2)

    return loss, params, (normal(5, 6, 4),)


def awkward():
    params = {"python": 0.5, "weak": jnp.asarray(2.0), "w": normal(1, 3, 3), "e": jnp.zeros((0, 3))}

    def loss(p, x):
        def no_reverse_mode(h):
            return lax.while_loop(lambda h: jnp.sum(h) > 1, lambda h: h @ p["w"] / 9, h)

        h = x * p["python"] + lax.stop_gradient(no_reverse_mode(jnp.abs(x)))
        h = jnp.abs(jnp.exp(1j * h) @ lax.complex(p["w"], p["w"].T)) ** 2
        return jnp.sum(jnp.sin(h) * p["weak"]) + jnp.sum(p["e"])

    return loss, params, (normal(5, 4, 3),)


def loss_of_parameters_alone():
    return (lambda p, x: jnp.sum(p["w"] ** 2)), {"w": normal(1, 3)}, (normal(2, 4, 2),)


NETWORKS = {
    "mlp": mlp,
    "transposed": transposed_layouts,
    "sequence": sequence,
    "conv": conv_net,
    "conv strided": functools.partial(conv_net, strides=(2, 1), padding="VALID"),
    "conv dilated": functools.partial(conv_net, rhs=(2, 1), padding=[(1, -1), (0, 2)]),
    "conv transposed": functools.partial(conv_net, lhs=(2, 3), padding=[(2, 1), (1, 1)]),
    "conv grouped": functools.partial(conv_net, groups=2, multiplier=5),
    "conv depthwise": functools.partial(conv_net, groups=4, multiplier=2),
    "conv channels first": conv_channels_first,
    "transformer": transformer,
    "lstm": lstm,
    "stacked layers": stacked_layers,
    "nested scans": nested_scans,
    "layers by index": layers_by_index,
    "tied autoencoder": tied_autoencoder,
    "tied embedding": tied_embedding,
    "embedding bag": embedding_bag,
    "derived": derived_parameters,
    "concatenated": concatenated_parameters,
    "sliced layers": sliced_layers,
    "sliced twice": sliced_twice,
    "custom derivatives": custom_derivatives,
    "control flow": control_flow,
    "awkward": awkward,
    "parameters alone": loss_of_parameters_alone,
}


@pytest.mark.parametrize("name", some(NETWORKS, 14))
def test_equals_the_jacobian(name, x64):
    example_loss, params, args = NETWORKS[name]()
    check(example_loss, params, *args)


@pytest.mark.parametrize("name", some(["mlp", "conv grouped", "transformer", "lstm"]))
def test_equals_the_jacobian_in_float32(name):
    example_loss, params, args = NETWORKS[name]()
    check(example_loss, params, *args, tolerance=1e-5)


def test_low_precision_parameters_accumulate_in_float32():
    example_loss, params, (x,) = mlp()
    params, x = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, x))
    check(example_loss, params, x, tolerance=0.02)
    losses, gramian, _ = jax.eval_shape(
        value_and_gramian(example_loss, in_axes=(None, 0)), params, x
    )
    assert (losses.dtype, gramian.dtype) == (jnp.bfloat16, jnp.float32)


def test_axes_as_in_vmap(x64):
    params = {"w": normal(1, 4, 5)}

    def loss(p, batch, shift, keys):
        noise = jax.random.normal(keys, (5,), shift.dtype)
        return jnp.sum(jnp.tanh(batch["x"] @ p["w"] + shift + noise)) * batch["scale"]

    batch = {"x": normal(2, 4, 6), "scale": jnp.asarray(2.0)}
    keys = jax.random.split(jax.random.key(0), 6)
    in_axes = (None, {"x": 1, "scale": None}, None, 0)
    check(loss, params, batch, normal(3, 5), keys, in_axes=in_axes)


@pytest.mark.parametrize(
    ("name", "leaf", "path"),
    [
        ("mlp", "['w1']", "structured"),
        ("mlp", "['b1']", "per-example rows"),
        ("sequence", "['v']", "structured"),
        ("lstm", "['h']", "per-example rows"),
        ("stacked layers", "['w']", "structured"),
        ("tied autoencoder", "['w']", "structured"),
        ("tied embedding", "['e']", "structured"),
        ("embedding bag", "['e']", "structured"),
        ("concatenated", "['a']", "structured"),
        ("sliced layers", "['w']", "structured"),
        ("sliced layers", "['unused']", "unused"),
        ("conv", "['k2']", "convolution"),
        ("derived", "['w']", "another function"),
    ],
)
def test_explains_which_path_each_leaf_takes(name, leaf, path):
    example_loss, params, args = NETWORKS[name]()
    text = explain(example_loss, params, *args, in_axes=(None, 0))
    lines = [line for line in text.splitlines() if line.startswith(leaf)]
    assert lines, text
    assert all(path in line for line in lines), text
