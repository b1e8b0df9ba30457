"""All routes read their arguments as jax.vmap does."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmtl import linear_scalarization
from jaxmtl.engine import cross_gramian, explain, value_and_grad, value_and_gramian
from jaxmtl.jacobian import value_and_jacobian
from tests.problems import flat_rows

Pair = collections.namedtuple("Pair", "x y")
N = 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def one_by_one(fun, params, args, in_axes, kwargs):
    """Returns losses, and rows (a list of pytrees like params), by one gradient after the other."""
    none = {"is_leaf": lambda x: x is None}
    own = jax.tree.leaves(jax.tree.broadcast(in_axes[0], params, **none), **none)

    def of_example(params, i):
        leaves, tree = jax.tree.flatten(params)
        leaves = [x if axis is None else x[i] for x, axis in zip(leaves, own, strict=True)]
        example = [pick(axis, arg, i) for axis, arg in zip(in_axes[1:], args, strict=True)]
        return fun(jax.tree.unflatten(tree, leaves), *example, **kwargs)

    losses, rows = [], []
    for i in range(N):
        for entry in np.ndindex(of_example(params, i).shape):
            value, row = jax.value_and_grad(lambda p, at=(i, entry): of_example(p, at[0])[at[1]])(
                params
            )
            losses.append(value)
            rows.append(row)
    return np.array(losses), rows


def pick(axis, arg, i):
    if axis is None:
        return arg
    if isinstance(axis, int):
        return jax.tree.map(lambda x: jnp.take(x, i, axis=axis), arg)
    if isinstance(axis, dict):
        return {name: pick(axis[name], arg[name], i) for name in arg}
    found = [pick(a, sub, i) for a, sub in zip(axis, arg, strict=True)]
    return type(arg)(*found) if hasattr(arg, "_fields") else type(arg)(found)


def check(fun, params, args, in_axes, kwargs=None):
    """Compare the three routes with one gradient after the other."""
    kwargs = kwargs or {}
    losses, rows = one_by_one(fun, params, args, in_axes, kwargs)
    flat = np.stack([flat_rows(row, 0) for row in rows])
    weights = normal(7, len(losses))
    expected = jax.tree.map(lambda *x: np.tensordot(weights, np.stack(x), 1), *rows)

    def close(a, b):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)

    def gramian_route(params):
        found, gramian, pullback = value_and_gramian(fun, in_axes=in_axes)(params, *args, **kwargs)
        return found, gramian, pullback(weights)

    found, gramian, grads = jax.jit(gramian_route)(params)
    close(found, losses)
    close(gramian, flat @ flat.T)
    close(grads, expected)
    cross = cross_gramian(fun, in_axes=in_axes)
    close(jax.jit(lambda p: cross(p, args, args, **kwargs))(params), flat @ flat.T)
    for chunk_size in (None, 2, 3):
        route = value_and_jacobian(fun, in_axes=in_axes, chunk_size=chunk_size)
        found, jacobian = jax.jit(lambda p, route=route: route(p, *args, **kwargs))(params)
        close(found, losses)
        close(jacobian, jax.tree.map(lambda *x: np.stack(x), *rows))
    assert "[" in explain(fun, params, *args, in_axes=in_axes, **kwargs)


def pairs(p, pair, nothing, repeat, name, activation, scale=1.0):
    assert nothing is None
    assert name == "sum"
    h = pair.x @ p["w"]
    for _ in range(repeat):  # static, as jax.vmap passes it
        h = activation(h)
    return scale * jnp.sum(h) * (pair.y if pair.y is not None else 1.0)


STATIC = (None, 2, "sum", jnp.tanh)


@pytest.mark.parametrize(
    ("pair", "axes"),
    [
        (lambda: Pair(normal(2, N, 3), normal(3, N)), Pair(0, 0)),
        (lambda: Pair(normal(2, 3, N), normal(3)), Pair(1, None)),
        (lambda: Pair(normal(2, N, 3), None), 0),
        (lambda: Pair(normal(2, N, 3), None), Pair(-2, None)),
    ],
)
def test_named_tuples_none_and_static_arguments(pair, axes, x64):
    params, args = {"w": normal(1, 3, 5)}, (pair(), *STATIC)
    check(pairs, params, args, (None, axes, None, None, None, None), {"scale": 2.0})


def test_tuples_and_shared_arguments_inside_a_mapped_one(x64):
    def fun(p, batch, flag):
        x, (y, rest) = batch
        return jnp.sum(jnp.tanh(x @ p) * y) * rest["scale"] if flag else None

    args = ((normal(1, N, 3), (normal(2, 5, N), {"scale": jnp.asarray(2.0), "none": None})), True)
    check(fun, normal(3, 3, 5), args, (None, (0, (1, {"scale": None, "none": None})), None))


def heads(p, x, y):
    h = jnp.tanh(x @ p["trunk"])
    return (jnp.dot(h, p["head"]["w"]) + p["head"]["b"] - y) ** 2


def test_parameters_that_each_example_owns(x64):
    params = {"trunk": normal(1, 3, 5), "head": {"w": normal(2, N, 5), "b": normal(3, N)}}
    args = (normal(4, N, 3), normal(5, N))
    check(heads, params, args, ({"trunk": None, "head": 0}, 0, 0))
    # Data that all tasks share, and nothing but the heads is mapped.
    check(heads, params, (normal(4, 3), jnp.asarray(0.3)), ({"trunk": None, "head": 0}, None, None))
    text = explain(heads, params, *args, in_axes=({"trunk": None, "head": 0}, 0, 0))
    assert "a slice per example" in text


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_parameters_that_each_example_owns_stay_out_of_the_gramian(flags, x64):
    params = {"trunk": normal(1, 3, 5), "head": {"w": normal(2, N, 5), "b": normal(3, N)}}
    args = (normal(4, N, 3), normal(5, N))
    in_axes = ({"trunk": None, "head": 0}, 0, 0)
    shared = dict(zip(("trunk", "head"), flags, strict=True))
    fun = value_and_gramian(heads, in_axes=in_axes, shared=shared)
    _, jacobian = value_and_jacobian(heads, in_axes=in_axes)(params, *args)
    _, gramian, pullback = jax.jit(fun)(params, *args)
    side = "trunk" if flags[0] else "head"
    rows = flat_rows(jacobian[side])
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-12)
    weights, others = normal(6, N), normal(7, N)
    for name, w in ((side, weights), ("head" if flags[0] else "trunk", others)):
        expected = jax.tree.map(lambda x, w=w: np.tensordot(w, x, 1), jacobian[name])
        found = pullback(weights, others)[name]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), found, expected)


def several(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"])
    h = jnp.tanh(jnp.stack([h, 2 * h]) @ p["v"])
    return h.reshape(2, -1)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((4,), marks=pytest.mark.slow),
        (2, 2),
        pytest.param((1,), marks=pytest.mark.slow),
    ],
)
def test_losses_of_any_shape_per_example(shape, x64):
    params = {"w": normal(1, 3, 5), "b": normal(2, 5), "v": normal(3, 5, 2), "own": normal(6, N, 2)}

    def fun(p, x):
        found = several(p, x) * jnp.sum(p["own"] ** 2)
        return jnp.sum(found)[None] if shape == (1,) else found.reshape(shape)

    args = (normal(4, N, 3),)
    axes = {"w": None, "b": None, "v": None, "own": 0}
    check(fun, params, args, (axes, 0))
    (losses, aux), _ = value_and_jacobian(
        lambda p, x: (fun(p, x), x), in_axes=(axes, 0), has_aux=True
    )(params, *args)
    (again, same), _, _ = value_and_gramian(
        lambda p, x: (fun(p, x), x), in_axes=(axes, 0), has_aux=True
    )(params, *args)
    assert losses.shape == again.shape == (N * np.prod(shape),)
    assert aux.shape == same.shape == (N, 3)


def test_rules_without_a_gramian_take_the_same_arguments(x64):
    params = {"w": normal(1, 3, 5), "b": normal(2, 5), "v": normal(3, 5, 2), "own": normal(6, N, 2)}

    def fun(p, x, nothing, flag, scale):
        return scale * several(p, x) * jnp.sum(p["own"] ** 2) if flag else nothing

    in_axes = ({"w": None, "b": None, "v": None, "own": 0}, 0, None, None, None)
    weights = normal(4, 4 * N)
    rule = linear_scalarization(weights)
    args = (normal(4, N, 3), None, True, 2.0)
    _, _, pullback = value_and_gramian(fun, in_axes=in_axes)(params, *args)
    step = value_and_grad(fun, rule, in_axes=in_axes)
    (losses, _), grads = step(params, rule.init(params), *args)
    assert losses.shape == (4 * N,)
    expected = pullback(weights)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), grads, expected)


def test_random_keys_on_any_axis():
    def fun(p, key):
        return jnp.sum(p * jax.random.normal(key, p.shape))

    keys = jax.random.split(jax.random.key(0), (1, N))
    losses, jacobian = value_and_jacobian(
        lambda p, key: fun(p, key[0]), in_axes=(None, 1), chunk_size=2
    )(jnp.ones(3), keys)
    expected = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys[0])
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6)
    assert losses.shape == (N,)


def test_keywords_reach_the_losses_of_every_route():
    def tasks(p, x, scale):
        return scale * jnp.mean(x @ p, 0)

    p, x = jnp.ones((3, 2)), jnp.ones((N, 3))
    of_jacobian, _ = value_and_jacobian(tasks)(p, x, scale=2.0)
    of_gramian, gramian, _ = value_and_gramian(tasks)(p, x, scale=2.0)
    of_features, _, _ = value_and_gramian(
        lambda p, z, x, scale: scale * jnp.mean(z, 0), encoder=lambda p, x: x @ p
    )(p, x, scale=2.0)
    for losses in (of_jacobian, of_gramian, of_features):
        np.testing.assert_allclose(losses, [6.0, 6.0])
    np.testing.assert_allclose(cross_gramian(tasks)(p, (x,), (x,), scale=2.0), gramian)
    assert "rows of the tasks" in explain(tasks, p, x, scale=2.0)
    flagged = explain(lambda p, x, flag: tasks(p, x, 1.0) if flag else None, p, x, True)
    assert "rows of the tasks" in flagged


P, X, Y = jnp.ones(3), jnp.ones((4, 3)), jnp.ones(4)


def _scalar(p, x, y=None):
    return jnp.sum(p * x)


def routes(*args, in_axes, **kwargs):
    yield lambda: value_and_jacobian(_scalar, in_axes=in_axes)(*args)
    yield lambda: value_and_gramian(_scalar, in_axes=in_axes)(*args)
    yield lambda: explain(_scalar, *args, in_axes=in_axes)


@pytest.mark.parametrize(
    ("args", "in_axes", "message"),
    [
        ((P, X, Y), (None, 0), r"3 entries, .* write for instance in_axes=\(None, 0, 0\)"),
        ((P, X), 0, r"2 entries, .* write for instance in_axes=\(None, 0\)"),
        ((P, X), (None, (0, 0)), "match the arguments as in jax.vmap"),
        ((P, {"a": X}), (None, {"b": 0}), "match the arguments as in jax.vmap"),
        ((P, X), (None, 2), r"an axis 2 of examples in args\[0\]"),
        ((P, X), (None, "x"), r"an axis 'x' of examples in args\[0\]"),
        ((P, X, 3), (None, 0, 0), r"axis 0 of examples in args\[1\], got int of shape \(\)"),
        ((P, X, "mean"), (None, 0, 0), r"axis 0 of examples in args\[1\], got str of shape \(\)"),
        ((P, X, Y[:3]), (None, 0, 0), r"args\[0\] has 4, args\[1\] has 3"),
        ((P, X[:0]), (None, 0), r"has 0 \(m = 0\)"),
        ((P, X), (None, None), "no batched argument"),
        ((P, X), (0, 0), r"params has 3, args\[0\] has 4"),
        (({"a": P, "b": X}, X), ({"a": None, "b": 1}, 0), "None or 0 for params"),
    ],
)
def test_what_does_not_match_is_one_sentence_on_every_route(args, in_axes, message):
    for call in routes(*args, in_axes=in_axes):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith("expected")


def test_wrong_losses_are_one_sentence_on_every_route():
    for route in (value_and_jacobian, value_and_gramian):
        with pytest.raises(ValueError, match="floating point losses, got int32"):
            route(lambda p, x: jnp.arange(3), in_axes=(None, 0))(P, X)
        with pytest.raises(ValueError, match=r"one loss per example, got shape \(0,\)"):
            route(lambda p, x: p[:0], in_axes=(None, 0))(P, X)
        with pytest.raises(ValueError, match=r"got shape \(4, 3\); average over the batch"):
            route(lambda p, x: p * x)(P, X)
        with pytest.raises(ValueError, match=r"vector of the m task losses, got shape \(\)"):
            route(lambda p, x: jnp.sum(p * x))(P, X)
        with pytest.raises(ValueError, match="as one array"):
            route(lambda p, x: [jnp.sum(p), jnp.sum(x)])(P, X)
        with pytest.raises(ValueError, match=r"\(losses, aux\) with has_aux=True"):
            route(lambda p, x: p, has_aux=True)(P, X)
        with pytest.raises(ValueError, match="chunk_size to be a positive int"):
            route(_scalar, chunk_size=True)
        with pytest.raises(ValueError, match="a losses function, got int"):
            route(3)
        with pytest.raises(ValueError, match="empty pytree"):
            route(lambda p: P)({})
