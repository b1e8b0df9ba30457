"""Losses that share parts of a network in random ways, on every route, against `jax.jacrev`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmtl import value_and_gramian, value_and_jacobian
from tests.problems import flat_rows

WIDTH = 4


@jax.custom_vjp
def sine(h):
    return jnp.sin(h)


sine.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (g * jnp.cos(h),))

LAYERS = {
    "dense": lambda h, w, p, other: jnp.tanh(h @ w),
    "transposed": lambda h, w, p, other: h @ w.T,
    "bias": lambda h, w, p, other: h + p["b"],
    "scale": lambda h, w, p, other: h * jnp.exp(p["s"]),
    "scan": lambda h, w, p, other: lax.scan(
        lambda c, _: (jnp.tanh(c @ w + p["b"]), None), h, None, length=2
    )[0],
    "cond": lambda h, w, p, other: lax.cond(h[0, 0] > 0, lambda: h @ w, lambda: jnp.sin(h)),
    "jit": lambda h, w, p, other: jax.jit(lambda h, w: (jnp.tanh(h @ w), h))(h, w)[0],
    "remat": lambda h, w, p, other: jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, w),
    "custom": lambda h, w, p, other: sine(h),
    "sorted": lambda h, w, p, other: h[jnp.argsort(h[:, 0])] @ w,
    "two": lambda h, w, p, other: h * jnp.mean(other, 0),
}
LOSSES = {
    "square": lambda h, w, known: jnp.mean(h**2),
    "largest": lambda h, w, known: jnp.max(h),
    "penalty": lambda h, w, known: jnp.mean(h) + jnp.sum(w**2),
    "head": lambda h, w, known: jnp.mean(jnp.cos(h @ w)),
    "sum": lambda h, w, known: jnp.mean(jnp.sin(h)) + known,
    "product": lambda h, w, known: jnp.mean(h) * known,
}


def draw(seed):
    """A network of some layers on two inputs, and losses of any of its values and of others."""
    rng = np.random.default_rng(seed)
    num_matrices, m = rng.integers(2, 5), int(rng.integers(2, 6))
    params = {f"w{i}": rng.normal(size=(WIDTH, WIDTH)) / 2 for i in range(num_matrices)}
    params |= {"b": rng.normal(size=WIDTH), "s": np.array(rng.normal())}
    data = rng.normal(size=(3, WIDTH)), rng.normal(size=(5, WIDTH))
    num_layers = rng.integers(2, 10)
    layers = [
        (rng.choice(list(LAYERS)), f"w{rng.integers(num_matrices)}", *rng.integers(k + 2, size=2))
        for k in range(num_layers)
    ]
    losses = [
        (
            rng.choice(list(LOSSES)),
            f"w{rng.integers(num_matrices)}",
            rng.integers(max(0, num_layers - 3), num_layers + 2),
            rng.integers(k + 1),
        )
        for k in range(m)
    ]

    def each(params, *data):
        values = [*data]
        for kind, name, i, j in layers:
            values.append(LAYERS[kind](values[i], params[name], params, values[j]))
        found = [jnp.array(0.5)]
        for kind, name, i, k in losses:
            found.append(LOSSES[kind](values[i], params[name], found[k]))
        return found[1:], {"last": values[-1], "best": jnp.argmax(values[-1])}

    def stacked(params, *data):
        found, aux = each(params, *data)
        return jnp.stack(found), aux

    def named(params, *data):
        found, aux = each(params, *data)
        return {f"task {i}": loss for i, loss in enumerate(found)}, aux

    return (stacked, named, jax.jit(named))[seed % 3], stacked, params, data, m


@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=[pytest.mark.slow] * (i not in (3, 4, 6))) for i in range(60)]
)
def test_every_route_agrees_with_the_jacobian(seed):
    with jax.enable_x64(True):
        losses_fn, stacked, params, data, m = draw(seed)
        weights, shared = np.arange(1.0, m + 1), {name: name != "w0" for name in params}

        def evaluate(params, *data):
            jacobian, aux = jax.jacrev(stacked, has_aux=True)(params, *data)
            (losses, found), rows = value_and_jacobian(losses_fn, has_aux=True)(params, *data)
            values, routes = [(jnp.hstack(jax.tree.leaves(losses)), found)], []
            for options in ({}, {"chunk_size": 1}, {"shared": shared}):
                gramian = value_and_gramian(losses_fn, has_aux=True, **options)
                (losses, found), table, pullback = gramian(params, *data)
                values.append((jnp.hstack(jax.tree.leaves(losses)), found))
                routes.append((table, pullback(weights)))
            return jacobian, (stacked(params, *data)[0], aux), rows, values, routes

        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = jax.jit(evaluate).lower(params, *data).compile(quick)
        jacobian, expected, rows, values, routes = compiled(params, *data)
        jacobian, full = jax.tree.map(np.asarray, jacobian), flat_rows(jacobian)
        size = 1e-12 * (np.max(np.abs(full)) + 1e-30)
        np.testing.assert_allclose(flat_rows(rows), full, rtol=0, atol=size)
        for found in values:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13),
                found,
                expected,
            )
        part = flat_rows({name: x for name, x in jacobian.items() if shared[name]})
        for (table, pulled), of in zip(routes, (full, full, part), strict=True):
            np.testing.assert_allclose(
                table, of @ of.T, rtol=0, atol=10 * size * np.max(np.abs(full))
            )
            if of is full:
                np.testing.assert_allclose(
                    flat_rows(pulled, 0), weights @ full, rtol=0, atol=10 * m * size
                )
