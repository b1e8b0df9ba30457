"""Flax models, and batches sharded over devices."""

import os
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmtl.engine import explain, value_and_gramian
from tests.problems import flat_rows, some


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(6)(nn.gelu(nn.Dense(12)(nn.RMSNorm()(x))))


class ImageModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3), strides=2)(x)))
        x = nn.avg_pool(nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(-1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, t):
        x = nn.Embed(11, 5, param_dtype=jnp.result_type(float))(t)
        return nn.Dense(2)(nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=x.dtype))(x)[-1])


LINEN = {
    "block": (Block, (4, 6), False),
    "image": (ImageModel, (8, 8, 2), False),
    "recurrent": (Recurrent, (5,), True),
}


def compare(loss, params, x):
    n = x.shape[0]
    weights = np.linspace(-1, 1, n)

    def both(params, x):
        _, gramian, pullback = value_and_gramian(loss, in_axes=(None, 0))(params, x)
        jacobian = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        rows = flat_rows(jacobian)
        grads = flat_rows(pullback(weights), 0)
        return gramian, rows @ rows.T, grads, weights @ rows

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    gramian, expected, grads, expected_grads = (
        jax.jit(both).lower(params, x).compile(options)(params, x)
    )
    scale = np.max(np.abs(expected))
    assert np.max(np.abs(gramian - expected)) <= 1e-12 * scale
    assert np.max(np.abs(grads - expected_grads)) <= 4e-12 * np.sqrt(scale)


@pytest.mark.parametrize("name", some(LINEN))
def test_linen(name):
    make, shape, integers = LINEN[name]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(
            rng.integers(0, 11, (3, *shape)) if integers else rng.normal(size=(3, *shape))
        )
        model = make()
        variables = jax.eval_shape(model.init, jax.random.key(0), x[0])
        params = jax.tree.map(
            lambda s: jnp.asarray(rng.normal(size=s.shape) / 2), variables["params"]
        )

        def loss(params, x):
            return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

        compare(loss, params, x)


def test_nnx():
    with jax.enable_x64(True):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Linear(4, 6, rngs=rngs, param_dtype=jnp.float64),
            nnx.LayerNorm(6, rngs=rngs, param_dtype=jnp.float64),
            nnx.relu,
            nnx.Linear(6, 3, rngs=rngs, param_dtype=jnp.float64),
        )
        graph, params = nnx.split(model)

        def loss(params, x):
            return jnp.sum(nnx.merge(graph, params)(x) ** 2)

        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
        compare(loss, params, x)
        assert "structured" in explain(loss, params, x, in_axes=(None, 0))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxmtl import from_weighting
from jaxmtl.engine import value_and_gramian, value_and_grad

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
params = {"w": normal(6, 5), "b": normal(5), "k": normal(3, 2, 4), "e": normal(7, 6)}
params["v"] = normal(5, 5)
x, y, t = normal(8, 6), normal(8, 9, 2), jnp.asarray(rng.integers(0, 7, (8, 2)))


def example_loss(p, x, y, t):
    if lookups:  # which the explicit mode of JAX cannot map over examples
        x = x + p["e"][t[0]] + p["e"][t[1]]
    h = jnp.tanh(x @ p["w"] + p["b"])
    h = jnp.tanh(jnp.stack([h, h]) @ p["v"])
    c = jax.lax.conv_general_dilated(
        y[None], p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.sum(h**2) + jnp.sum(jnp.sin(c))


def tasks(p, x):
    return jnp.mean(jnp.tanh(x @ p["w"] + p["b"]) ** 2, axis=0)


def run(params, x, y, t):
    fun = value_and_gramian(example_loss, in_axes=(None, 0, 0, 0))
    losses, gramian, pullback = fun(params, x, y, t)
    grads = pullback(losses)
    rule = from_weighting(lambda gramian: 1 / jnp.sqrt(jnp.diagonal(gramian)))
    (_, state), update = value_and_grad(example_loss, rule, in_axes=(None, 0, 0, 0))(
        params, rule.init(params), x, y, t)
    of_tasks, task_gramian, task_pullback = value_and_gramian(tasks, chunk_size=2)(params, x)
    return gramian, grads, update, task_gramian, task_pullback(jnp.ones(5))


options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
for kind in (AxisType.Auto, AxisType.Explicit):
    lookups = kind == AxisType.Auto
    expected = jax.jit(lambda *a: run(*a)).lower(params, x, y, t).compile(options)(params, x, y, t)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        batch = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, y, t)]
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        found = jax.jit(lambda *a: run(*a)).lower(whole, *batch).compile(options)(whole, *batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.max(np.abs(b)))
"""


@pytest.mark.slow
def test_sharded_batches_give_one_gramian():
    env = dict(os.environ, JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu")
    code = textwrap.dedent(SHARDED)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
