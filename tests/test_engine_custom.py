"""Custom derivatives, mutable arrays, losses of extreme size: always the rows of vmap(grad)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmtl import from_weighting, linear_scalarization, upgrad, value_and_jacobian
from jaxmtl.engine import cross_gramian, explain, value_and_grad, value_and_gramian
from tests.problems import flat_rows, some

N = 3


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


@jax.custom_vjp
def clip_gradient(x):
    return x


clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


@jax.custom_vjp
def identity(x):
    return x


identity.defvjp(lambda x: (x, None), lambda _, g: (g,))


@jax.custom_vjp
def dense(x, w):
    return x @ w


dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.outer(r[0], g)))


@jax.custom_vjp
def loud_dense(x, w):  # normalizes the cotangent of its weights
    return x @ w


def _loud(residual, g):
    x, w = residual
    grad = jnp.outer(x, g)
    return g @ w.T, grad / (1 + jnp.linalg.norm(grad))


loud_dense.defvjp(lambda x, w: (x @ w, (x, w)), _loud)


@jax.custom_jvp
def asks(x, w, keep):
    """A product whose rule stops what no one differentiates."""
    return x * w


@functools.partial(asks.defjvp, symbolic_zeros=True)
def _asks(primals, tangents):
    x, w, _ = primals
    is_zero = [isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents]
    out = x * w
    if is_zero[2]:  # not differentiated: a loop that is constant in it
        return out, jnp.zeros_like(out)
    tx, tw = (
        jnp.zeros_like(out) if zero else t
        for t, zero in zip(tangents[:2], is_zero[:2], strict=True)
    )
    return out, tx * w + tw * x


def clipped_weights(p, x):
    return jnp.sum(jnp.sin(x @ clip_gradient(p["w"])) * p["b"])


def clipped_activations(p, x):
    return jnp.sum(jnp.sin(clip_gradient(x @ p["w"]) * 2) * p["b"])


def clipped_in_a_loop(p, x):
    def step(h, _):
        return jnp.tanh(loud_dense(h, p["w"][:, :4]) + p["b"][:4]), None

    h, _ = lax.scan(step, x, None, length=3)
    return jnp.sum(h @ p["w"])


def clipped_in_layers(p, x):
    def step(h, w):
        return jnp.tanh(loud_dense(h, w)), None

    h, _ = lax.scan(step, x, jnp.stack([p["w"][:, :4], 2 * p["w"][:, 2:6]]))
    return jnp.sum(h * p["b"][:4])


def clipped_in_a_branch(p, x):
    return lax.cond(
        x[0] > 0, lambda: jnp.sum(loud_dense(x, p["w"])), lambda: jnp.sum(p["b"] * x[1])
    )


def custom_dense(p, x):
    return jnp.sum(jnp.sin(dense(x, p["w"])) * p["b"])


def asks_what_is_differentiated(p, x):
    h = jnp.tanh(x @ p["w"])
    return jnp.sum(asks(h, h, p["b"]) + asks(h, 2.0, h))


def array_in_a_rule(p, x):
    @jax.custom_vjp
    def table(x, w, times):
        return x * w[0] * times[1]

    def backward(residual, g):
        x, w, times = residual
        index = lax.fori_loop(0, 1, lambda i, n: n + i, 1)  # a traced index into the times
        return (
            g * w[0] * times[index],
            jnp.zeros_like(w).at[0].set(jnp.sum(g * x * times[index])),
            None,
        )

    table.defvjp(lambda x, w, times: (table(x, w, times), (x, w, times)), backward)
    return jnp.sum(table(x @ p["w"], p["b"], jnp.array([0.0, 1.5])))


def solved_equation(p, x):
    from jax.experimental.ode import odeint

    times = jnp.array([0.0, 0.1])
    return jnp.sum(odeint(lambda y, t, w: jnp.sin(y @ w), x, times, p["w"][:, :4]))


def written_array(p, x):
    array = jax.new_ref(x @ p["w"])
    array[...] += p["b"]
    return jnp.sum(jnp.sin(array[...]))


def written_parameters(p, x):
    array = jax.new_ref(p["w"] * 1.0)
    array[...] = array[...] * 2
    return jnp.sum(jnp.sin(x @ array[...] + p["b"]))


LOSSES = {
    f.__name__: f
    for f in (
        clipped_weights,
        clipped_activations,
        clipped_in_a_loop,
        clipped_in_layers,
        clipped_in_a_branch,
        custom_dense,
        asks_what_is_differentiated,
        array_in_a_rule,
        written_array,
        written_parameters,
        solved_equation,
    )
}


def problem(width=40):
    return {"w": normal(1, 4, width) / 2, "b": normal(2, width)}, normal(3, N, 4)


@pytest.mark.parametrize("name", some(LOSSES, 6))
def test_rows_are_those_of_vmap_grad(name, x64):
    """Losses, Gramian, pullback of both routes, with the Gramian and without."""
    loss, (params, x) = LOSSES[name], problem()
    weights = normal(4, N)

    def tasks(p, x):
        return jax.vmap(loss, (None, 0))(p, x)

    def everything(params, x):
        expected = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, x)
        found = []
        for fun, options in (
            (loss, {"in_axes": (None, 0)}),
            (tasks, {}),
            (tasks, {"chunk_size": 2}),
        ):
            losses, gramian, pullback = value_and_gramian(fun, **options)(params, x)
            found.append((losses, gramian, pullback(weights)))
        fixed = linear_scalarization(weights)
        for fun, options in ((loss, {"in_axes": (None, 0)}), (tasks, {})):
            step = value_and_grad(fun, fixed, **options)
            _, grads = step(params, fixed.init(params), x)
            found.append((grads,))
        return expected, found

    (losses, rows), found = jax.jit(everything)(params, x)
    rows = flat_rows(rows)
    for *values, grads in found:
        if values:
            np.testing.assert_allclose(values[0], losses, rtol=1e-13)
            scale = np.max(np.abs(rows @ rows.T))
            np.testing.assert_allclose(values[1], rows @ rows.T, atol=1e-12 * scale)
        error = np.max(np.abs(flat_rows(grads, 0) - weights @ rows))
        assert error <= 1e-12 * np.max(np.abs(rows))


@pytest.mark.parametrize("kind", ["checkpointed", "bounded"])
def test_loops_of_equinox(kind, x64):
    loops = pytest.importorskip("equinox.internal")
    params, x = {"w": normal(1, 4)}, normal(2, N, 4)

    def loss(p, x):
        def body(carry):
            i, y = carry
            return i + 1, jnp.tanh(y * p["w"])

        done = loops.while_loop(lambda c: c[0] < 3, body, (0, x), kind=kind, max_steps=4)
        return jnp.sum(done[1])

    compare(loss, params, x)


@pytest.mark.parametrize("adjoint", ["RecursiveCheckpoint", "Direct", "Backsolve"])
def test_adjoints_of_diffrax(adjoint, x64):
    diffrax = pytest.importorskip("diffrax")
    params, x = {"a": normal(1, 4)}, normal(2, N, 4)

    def loss(p, x):
        term = diffrax.ODETerm(lambda t, y, a: -a * jnp.sin(y))
        found = diffrax.diffeqsolve(
            term,
            diffrax.Heun(),
            0.0,
            1.0,
            0.25,
            x,
            p["a"],
            adjoint=getattr(diffrax, f"{adjoint}Adjoint")(),
            max_steps=8,
        )
        return jnp.sum(found.ys)

    compare(loss, params, x)


def compare(loss, params, x):
    weights = normal(4, N)

    def both(params, x):
        rows = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        _, gramian, pullback = value_and_gramian(loss, in_axes=(None, 0))(params, x)
        return rows, gramian, pullback(weights)

    rows, gramian, grads = jax.jit(both)(params, x)
    rows = flat_rows(rows)
    assert np.max(np.abs(gramian - rows @ rows.T)) <= 1e-12 * np.max(np.abs(gramian))
    assert np.max(np.abs(flat_rows(grads, 0) - weights @ rows)) <= 1e-12 * np.max(np.abs(rows))


@pytest.mark.parametrize("kind", ["params", "features"])
def test_an_encoder_with_a_backward_pass_that_is_not_linear(kind, x64):
    params = {"w": normal(1, 4, 5), "v": normal(2, 5, N)}
    x, weights = normal(3, 6, 4), normal(4, N)

    def encode(p, x):
        w = clip_gradient(p["w"]) if kind == "params" else p["w"]
        return jnp.tanh(x @ w)

    def heads(p, z, x):
        return jnp.sum((clip_gradient(z) if kind == "features" else z) @ p["v"], 0) ** 2

    _, _, pullback = jax.jit(value_and_gramian(heads, encoder=encode))(params, x)
    units = jnp.eye(N)
    _, pull = jax.vjp(lambda p: heads(p, encode(p, x), x), params)
    rows = flat_rows(jax.vmap(lambda u: pull(u)[0])(units))
    np.testing.assert_allclose(flat_rows(pullback(weights), 0), weights @ rows, rtol=1e-12)


# --- what holds memory down -------------------------------------------------------------------

M, WIDTH = 12, 128


def deep(custom, dtype=jnp.float32):
    params = [normal(i, WIDTH, WIDTH).astype(dtype) / 12 for i in range(3)]

    def losses(params, x):
        for w in params:
            x = jnp.tanh(custom(x @ w))
        return jnp.mean(x[:, :M], 0)

    return losses, params, normal(9, 8, WIDTH).astype(dtype)


def temporary(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["linear", "clipped", "narrow"])
def test_chunks_bound_memory_whatever_the_losses_are_made_of(kind):
    custom = {"linear": identity, "clipped": clip_gradient, "narrow": lambda x: x}[kind]
    dtype = jnp.bfloat16 if kind == "narrow" else jnp.float32
    losses, params, x = deep(custom, dtype)

    def route(chunk_size):
        fun = value_and_gramian(losses, chunk_size=chunk_size)
        return lambda params, x: fun(params, x)[1]

    row = sum(4 * w.size for w in params)
    for chunk_size in (1, 4):
        # Two chunks of rows, one of them in the making; all M at once without.
        assert temporary(route(chunk_size), params, x) <= (4 * chunk_size + 4) * row
    np.testing.assert_allclose(
        jax.jit(route(5))(params, x), jax.jit(route(None))(params, x), rtol=1e-4, atol=1e-7
    )
    text = explain(losses, params, x, chunk_size=4)
    if kind == "linear":
        assert "4 at a time, pushed through the transposed backward pass" in text
    else:
        assert "4 at a time, row against row in 24 backward passes" in text  # 12 (12/4 + 1) / 2
    assert ("the pullback is a sum of rows" in text) == (kind == "clipped")


def test_two_batches_row_against_row(x64):
    losses, params, x = deep(clip_gradient, jnp.float64)
    pull = jax.jit(
        jax.vmap(lambda u, x: jax.vjp(lambda p: losses(p, x), params)[1](u)[0], (0, None))
    )
    rows = [flat_rows(pull(jnp.eye(M), batch)) for batch in (x, 2 * x)]
    for chunk_size in (None, 5):
        found = jax.jit(cross_gramian(losses, chunk_size=chunk_size))(params, (x,), (2 * x,))
        np.testing.assert_allclose(found, rows[0] @ rows[1].T, rtol=1e-12)


# --- size and flags ---------------------------------------------------------------------------


def regression(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"][:6])
    return jnp.mean((jnp.stack([h, h]) @ p["v"]) ** 2, (0, 1)) if x.ndim == 2 else jnp.mean(h**2)


@pytest.mark.parametrize(
    ("route", "factor"),
    some(
        [
            ("tasks", 1e24),
            ("examples", 1e24),
            ("examples", 1e-24),
            ("chunks", 1e24),
            ("rows", 1e24),
            ("encoder", 1e24),
        ],
        3,
    ),
)
def test_losses_of_extreme_size_give_the_step_of_the_jacobian(route, factor):
    params = {"w": normal(1, 4, 40), "v": normal(2, 40, N)}
    x = normal(3, N, 4)

    def tasks(p, z):
        return factor * jnp.mean(jnp.tanh(z @ p["v"]) ** 2, 0)

    def encode(p, x):
        return jnp.tanh(x @ p["w"])

    options, fun = {"chunk_size": 2}, lambda p, x: tasks(p, encode(p, x))
    if route == "tasks":
        options = {}
    if route == "rows":
        fun = lambda p, x: tasks(p, clip_at_large(encode(p, x)))  # noqa: E731
    if route == "encoder":
        options, fun = {"encoder": encode}, lambda p, z, x: tasks(p, z)
    if route == "examples":
        options, fun = {"in_axes": (None, 0)}, lambda p, x: jnp.sum(tasks(p, encode(p, x[None])))
    rule = upgrad(num_tasks=N)
    step = value_and_grad(fun, rule, **options)
    (losses, state), grads = jax.jit(step)(params, rule.init(params), x)
    assert int(state.mtl_skipped) == 0
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda z: jnp.asarray(np.asarray(z), jnp.float64), (params, x))
        rule = upgrad(num_tasks=N)
        if route == "encoder":
            _, gramian, pullback = value_and_gramian(fun, **options)(*wide)
            weights, _ = rule.weighting.update(gramian, rule.weighting.init())
            expected = pullback(weights)
        else:
            jacobian_options = options if route == "examples" else {}
            losses, jacobian = value_and_jacobian(fun, **jacobian_options)(*wide)
            expected, _ = rule.update(jacobian, rule.init(wide[0]), wide[0], losses=losses)
    scale = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected))
    assert np.max(np.abs(flat_rows(grads, 0) - flat_rows(expected, 0))) <= 2e-4 * scale


@jax.custom_vjp
def clip_at_large(x):
    return x


clip_at_large.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e35, 1e35),))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["jax_enable_checks", "jax_numpy_rank_promotion"])
def test_under_the_flags_of_the_careful(flag):
    value = {"jax_enable_checks": True, "jax_numpy_rank_promotion": "raise"}[flag]
    before = getattr(jax.config, flag)
    params = {
        "w": normal(1, 4, 6),
        "b": normal(2, 6),
        "e": normal(3, 7, 6),
        "k": normal(4, 3, 1, 2),
    }

    def loss(p, x, i):
        h = jnp.tanh(x @ p["w"] + p["b"]) + p["e"][i]
        c = lax.conv_general_dilated(
            h[None, :, None], p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )
        h, _ = lax.scan(lambda h, _: (jnp.tanh(h * p["b"]), None), h, None, length=2)
        scores = jax.nn.log_softmax(h @ (2 * p["e"]).T)  # a matrix that is a table too
        return jnp.sum(c**2) + jnp.sum(h) + scores[i]

    def tasks(p, x, i):
        return jax.vmap(loss, (None, 0, 0))(p, x, i)

    args = normal(5, N, 4), jnp.array([1, 1, 3])
    rule = from_weighting(lambda gramian: jnp.ones(len(gramian)) / len(gramian))
    jax.config.update(flag, value)
    try:
        for fun, options in ((loss, {"in_axes": (None, 0, 0)}), (tasks, {"chunk_size": 2})):
            step = jax.jit(value_and_grad(fun, rule, **options))
            (losses, _), grads = step(params, rule.init(params), *args)
            expected = jax.grad(lambda p: jnp.mean(tasks(p, *args)))(params)
            np.testing.assert_allclose(
                flat_rows(grads, 0), flat_rows(expected, 0), rtol=1e-4, atol=1e-6
            )
            assert losses.shape == (N,)
    finally:
        jax.config.update(flag, before)


def test_a_parameter_that_passes_through_a_thousand_equations(x64):
    params, x = {"w": normal(1, 4)}, normal(2, N, 4)

    def loss(p, x):
        w = p["w"]
        for i in range(600):
            w = w[::-1] if i % 2 else w * 1.001
        return jnp.sum(jnp.sin(w * x))

    rows = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(params, x)["w"])
    _, gramian, _ = value_and_gramian(loss, in_axes=(None, 0))(params, x)
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-12)


def test_explains_python_numbers():
    text = explain(
        lambda p, x: jnp.sum(p["a"] * x * p["b"]),
        {"a": 0.5, "b": jnp.ones(4)},
        jnp.ones((N, 4)),
        in_axes=(None, 0),
    )
    assert "['a']  float32[]" in text
