"""Random programs made of the primitives that have rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from jaxmtl import value_and_jacobian
from jaxmtl.engine import value_and_gramian
from tests.problems import flat_rows

T, D = 2, 4  # every activation is (T, D), every matrix (D, D), so that any order of steps is valid
NUM_LEAVES = {"matrix": 3, "vector": 2, "kernel": 2, "table": 1}


def make_params(rng):
    shapes = {"matrix": (D, D), "vector": (D,), "kernel": (3, 1, D, D), "table": (7, D)}
    return {
        f"{kind}{i}": rng.normal(size=shapes[kind]) / 2
        for kind, count in NUM_LEAVES.items()
        for i in range(count)
    }


def _conv(h, kernel, groups, stride, dilation):
    total = (3 - 1) * dilation
    out = lax.conv_general_dilated(
        h[None, :, None],
        kernel[:, :, : D // groups],
        (stride, 1),
        [(total // 2, total - total // 2), (0, 0)],
        rhs_dilation=(dilation, 1),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0, :, 0]
    return jnp.resize(out, (T, D))


def _scan(h, w, b):
    return lax.scan(lambda c, x: (jnp.tanh(x @ w + c + b),) * 2, b, h)[1]


def _stack(h, w, v):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return lax.scan(layer, h, jnp.stack([w, v.T, w]))[0]


def _transposed(h, kernel):
    """A transposed convolution: zeros between the inputs."""
    out = lax.conv_general_dilated(
        h[None, :, None],
        kernel,
        (1, 1),
        [(1, 1), (0, 0)],
        lhs_dilation=(2, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0, :, 0]
    return jnp.resize(out, (T, D))


@jax.custom_vjp
def _rounded(h, w):
    return h @ jnp.round(8 * w) / 8


_rounded.defvjp(
    lambda h, w: (_rounded(h, w), (h, w)), lambda known, g: (g @ known[1].T, known[0].T @ g)
)


def _one_of(h, *branches):
    return lax.switch(jnp.argmax(h[0]) % len(branches), branches)


KERNEL = {
    "transposed": _transposed,
    "in a scan": lambda h, k: lax.scan(
        lambda h, _: (jnp.tanh(_conv(h, k, 1, 1, 1)), None), h, None, length=2
    )[0],
}
MATRIX = {
    "custom": _rounded,
    "expert": lambda h, w: h @ jnp.stack([w, 2 * w.T])[jnp.argmax(h[0]) % 2],
    "switch": lambda h, w: _one_of(h, lambda: h @ w, lambda: jnp.sin(h), lambda: h @ w.T),
    "dense": lambda h, w: h @ w,
    "transposed": lambda h, w: h @ w.T,
    "left": lambda h, w: jnp.tanh(w[:T, :T] @ h),
    "masked": lambda h, w: h @ (w * jnp.triu(jnp.ones((D, D)))),
    "halves": lambda h, w: jnp.concatenate([h @ w[:, : D // 2], h @ w[:, D // 2 :]], -1),
    "heads": lambda h, w: jnp.einsum("td,dhe->the", h, w.reshape(D, 2, D // 2)).reshape(T, D),
    "stopped": lambda h, w: h @ lax.stop_gradient(w) + w[0],
    "diagonal": lambda h, w: jnp.einsum("td,dd->td", h, w),
    "batched": lambda h, w: jnp.einsum("td,ted->te", h, jnp.stack([w, w.T])),
    "jitted": lambda h, w: jax.jit(lambda a, b: jax.nn.relu(a) @ b)(h, w),
    "cond": lambda h, w: lax.cond(h[0, 0] > 0, lambda: h @ w, lambda: h - w[0]),
    "branch": lambda h, w: lax.cond(h[0, 0] > 0, lambda: jnp.log(h[0, 0]) * w[:T], lambda: h @ w),
    "affine": lambda h, w: h @ (2 * w - jnp.eye(D) + w.T / jnp.arange(1.0, D + 1)[:, None]),
    "rounded": lambda h, w: h @ (w + lax.stop_gradient(jnp.round(w) - w)),
    "merged": lambda h, w: h @ (w[:, :2] @ w[2:, :] + w),
    "product": lambda h, w: h @ (w @ jnp.tri(D)) + h @ (w @ w),
    "chosen": lambda h, w: h @ (w * w[0]) + w[jnp.argmax(h[0])],
    "scaled": lambda h, w: h @ (w * jnp.exp(w[:1])) + h @ (jnp.sin(w[0, 0]) * w.T),
    "normalized": lambda h, w: h @ (w / jnp.sqrt(jnp.sum(w**2, 0) + 1)),
    "rows": lambda h, w: h @ (2 * w / (1 + jnp.max(jnp.abs(w), 1, keepdims=True))) + h @ w.T,
    "sigma": lambda h, w: h @ (w.T / (2 + jnp.cos(jnp.ones(D) @ w @ jnp.arange(D)))),
    "sums": lambda h, w: h @ (w * jax.nn.sigmoid(jnp.mean(w, 1)) / (1 + jnp.sum(w * w))),
    "column": lambda h, w: h + w[:, jnp.argmax(h[0])],
}
VECTOR = {
    "bias": lambda h, v: h + v,
    "scale": lambda h, v: h * v,
    "norm": lambda h, v: v * h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1),
    "exponent": lambda h, v: h * jnp.exp(v)[None],
    "maximum": lambda h, v: jnp.maximum(h, v),
    "half": lambda h, v: h.at[:, :2].add(v[2:]),
    "row": lambda h, v: jnp.concatenate([v[None], h[1:]]),
    "outer": lambda h, v: h + jnp.outer(h[:, 0], v),
}
BOTH = {
    "magnitudes": lambda h, w, v: h @ (v * w / jnp.sqrt(jnp.sum(w * w, 0) + 1)),
    "of inputs": lambda h, w, v: h @ (w.T * (v / (1 + jnp.sum(w.T**2, 1)))[:, None]),
    "scalar": lambda h, w, v: h @ (jnp.tanh(v[0]) * w) * v,
    "tied": lambda h, w, v: h @ (w * v[0] / (1 + jnp.sum(w**2))) @ w.T + v,
    "of steps": lambda h, w, v: lax.scan(
        lambda h, u: (jnp.tanh(h @ (u * v / (1 + jnp.sum(u**2, 0))) + h @ (v[1] * w)), None),
        h,
        jnp.stack([w, 2 * w.T]),
    )[0],
}
SCALAR = {"tanh": jnp.tanh, "gelu": jax.nn.gelu, "softmax": jax.nn.softmax, "reverse": jnp.flip}


def step():
    matrix = st.integers(0, NUM_LEAVES["matrix"] - 1)
    vector = st.integers(0, NUM_LEAVES["vector"] - 1)
    kernel = st.integers(0, NUM_LEAVES["kernel"] - 1)
    return st.one_of(
        st.tuples(st.just("matrix"), st.sampled_from(sorted(MATRIX)), matrix),
        st.tuples(st.just("vector"), st.sampled_from(sorted(VECTOR)), vector),
        st.tuples(st.just("scalar"), st.sampled_from(sorted(SCALAR))),
        st.tuples(
            st.just("conv"),
            kernel,
            st.sampled_from([1, 2, D]),
            st.integers(1, 2),
            st.integers(1, 2),
        ),
        st.tuples(st.just("kernel"), st.sampled_from(sorted(KERNEL)), kernel),
        st.tuples(st.just("lookup"), st.booleans()),
        st.tuples(st.just("both"), st.sampled_from(sorted(BOTH)), matrix, vector),
        st.tuples(st.just("scan"), matrix, vector),
        st.tuples(st.just("stack"), matrix, matrix),
    )


def make_network(steps):
    def network(params, x, index):
        h = x
        for kind, *choice in steps:
            if kind == "matrix":
                h = MATRIX[choice[0]](h, params[f"matrix{choice[1]}"])
            elif kind == "vector":
                h = VECTOR[choice[0]](h, params[f"vector{choice[1]}"])
            elif kind == "both":
                h = BOTH[choice[0]](h, params[f"matrix{choice[1]}"], params[f"vector{choice[2]}"])
            elif kind == "scalar":
                h = SCALAR[choice[0]](h)
            elif kind == "conv":
                h = _conv(h, params[f"kernel{choice[0]}"], *choice[1:])
            elif kind == "kernel":
                h = KERNEL[choice[0]](h, params[f"kernel{choice[1]}"])
            elif kind == "lookup":
                table = params["table0"]
                h = h + (table[index] if choice[0] else (h @ table.T)[:, :D])
            elif kind == "scan":
                h = _scan(h, params[f"matrix{choice[0]}"], params[f"vector{choice[1]}"])
            else:
                h = _stack(h, *(params[f"matrix{i}"] for i in choice))
        return h

    return network


def check(steps, seed, tasks="examples"):
    """Compares rows, their Gramian and a weighted sum with `jax.jacrev`.

    Of three examples with a loss each; of four tasks with two examples, one with a head and one
    whose loss another is part of; or of three tasks with nothing in common but parameters.
    """
    rng = np.random.default_rng(seed)
    network, params = make_network(steps), make_params(rng)
    x, index = rng.normal(size=(3, T, D)), rng.integers(0, 7, (3, T))
    weights = rng.normal(size=4 if tasks == "heads" else 3)
    in_axes = (None, 0, 0) if tasks == "examples" else None

    def loss(params, x, index):
        return jnp.sum(jnp.sin(network(params, x, index)))

    def losses_of_tasks(params, x, index):
        h = jax.vmap(network, (None, 0, 0))(params, x[:2], index[:2])
        last = jnp.tanh(h @ params["matrix0"])
        first, second = jnp.sum(jnp.sin(h)), jnp.sum(last**2)
        return jnp.stack([first, second, jnp.sum(jnp.cos(h[0])), jnp.sin(first) * second])

    def losses_apart(params, x, index):
        return jnp.stack([loss(params, *each) for each in zip(x, index, strict=True)])

    def both(params, x, index):
        fun = {"examples": loss, "heads": losses_of_tasks, "apart": losses_apart}[tasks]
        _, gramian, pullback = value_and_gramian(fun, in_axes=in_axes)(params, x, index)
        if in_axes is None:
            jacobian = jax.jacrev(fun)(params, x, index)
        else:
            jacobian = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, index)
        rows = flat_rows(jacobian)
        gap = flat_rows(value_and_jacobian(fun, in_axes=in_axes)(params, x, index)[1]) - rows
        grads = flat_rows(pullback(weights), 0)
        return gramian, rows @ rows.T, grads, weights @ rows, gap

    with jax.enable_x64(True):
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = jax.jit(both).lower(params, x, index).compile(options)
        gramian, expected, grads, expected_grads, gap = compiled(params, x, index)
    scale = np.max(np.abs(expected)) + 1e-30
    assert np.max(np.abs(gramian - expected)) <= 1e-12 * scale
    assert np.max(np.abs(gap)) <= 1e-12 * np.sqrt(scale)
    assert np.max(np.abs(grads - expected_grads)) <= 4e-12 * np.sqrt(scale)


PROGRAMS = {"steps": st.lists(step(), min_size=1, max_size=6), "seed": st.integers(0, 2**31)}
SETTINGS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
    "database": None,
}


@settings(max_examples=8, derandomize=True, **SETTINGS)
@given(**PROGRAMS)
def test_random_programs(steps, seed):
    check(steps, seed)


@pytest.mark.slow
@settings(max_examples=6, derandomize=True, **SETTINGS)
@given(**PROGRAMS)
def test_random_programs_of_tasks(steps, seed):
    check(steps, seed, "heads")


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["examples", "heads", "apart"])
@settings(max_examples=300, **SETTINGS)
@given(**PROGRAMS)
def test_many_random_programs(tasks, steps, seed):
    check(steps, seed, tasks)
