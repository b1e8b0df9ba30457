"""The engine's public functions: routes, keywords, transformations, cost, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmtl import base, linalg, linear_scalarization, mgda, trimmed_mean
from jaxmtl.engine import cross_gramian, explain, value_and_grad, value_and_gramian
from tests.problems import flat_rows, some


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.result_type(float))


def inverse_norms(gramian):
    return 1 / jnp.sqrt(jnp.diagonal(gramian))


M = 5


def parameters():
    return {
        "trunk": {"w": normal(1, 4, 6), "b": normal(2, 6)},
        "heads": {"w": normal(3, M, 6), "b": normal(4, M)},
    }


def encode(params, x):
    return jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])


def head_losses(params, z, x=None):
    out = z @ params["heads"]["w"].T + params["heads"]["b"]
    return jnp.mean(out**2, axis=0)


def task_losses(params, x):
    return head_losses(params, encode(params, x))


def example_loss(params, x):
    return jnp.sum(task_losses(params, x[None]))


def assert_close(x, y, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b), initial=1e-30))


# --- tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", some([None, 2, 1, 5, 9], 2))
def test_tasks_equal_the_jacobian_for_every_chunk_size(chunk_size, x64):
    params, x = parameters(), normal(9, 8, 4)
    fun = jax.jit(value_and_gramian(task_losses, chunk_size=chunk_size))
    losses, gramian, pullback = fun(params, x)
    jacobian = jax.jacrev(task_losses)(params, x)
    assert_close(losses, task_losses(params, x))
    assert_close(gramian, flat_rows(jacobian) @ flat_rows(jacobian).T)
    assert np.array_equal(gramian, gramian.T)
    weights = normal(10, M)
    assert_close(pullback(weights), jax.tree.map(lambda j: jnp.tensordot(weights, j, 1), jacobian))


@jax.custom_vjp
def _less_gradient(x):
    return x


_less_gradient.defvjp(lambda x: (x, None), lambda _, g: (0.3 * g,))


def test_tasks_without_forward_mode_contract_rows(x64):
    params, x = parameters(), normal(9, 8, 4)

    def losses_fn(params, x):
        return head_losses(params, _less_gradient(encode(params, x)))

    assert "custom_vjp_call has no forward mode" in explain(losses_fn, params, x)
    assert "2 at a time, pushed" in explain(task_losses, params, x, chunk_size=2)
    # A rule of its own on the data alone is no obstacle.
    text = explain(lambda p, x: task_losses(p, _less_gradient(x)), params, x)
    assert text.count("rows of the tasks (") == 4
    _, gramian, pullback = value_and_gramian(losses_fn)(params, x)
    jacobian = jax.jacrev(losses_fn)(params, x)
    assert_close(gramian, flat_rows(jacobian) @ flat_rows(jacobian).T)
    assert_close(pullback(jnp.ones(M)), jax.tree.map(lambda j: jnp.sum(j, 0), jacobian))


@pytest.mark.slow
def test_tasks_accumulate_narrow_parameters_in_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters())
    _, gramian, pullback = value_and_gramian(task_losses)(params, normal(9, 8, 4))
    assert gramian.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(pullback(jnp.ones(M))))


def test_encoder_gives_the_gramian_of_the_features(x64):
    params, x = parameters(), normal(9, 8, 4)
    losses, gramian, pullback = jax.jit(value_and_gramian(head_losses, encoder=encode))(params, x)
    of_features = jax.jacrev(lambda z: head_losses(params, z))(encode(params, x))
    assert_close(losses, task_losses(params, x))
    assert_close(gramian, flat_rows(of_features) @ flat_rows(of_features).T)
    weights = normal(10, M)
    expected = jax.grad(lambda p: weights @ task_losses(p, x))(params)
    assert_close(pullback(weights), expected)


# --- keywords ---------------------------------------------------------------------------------


SHARED = {"trunk": True, "heads": False}


@pytest.mark.parametrize("route", ["tasks", "examples", "encoder"])
@pytest.mark.parametrize("shared", [SHARED, lambda path: path[0].key == "trunk"])
def test_heads_stay_out_of_the_gramian(route, shared, x64):
    params, x = parameters(), normal(9, 8, 4)
    options = {"shared": shared}
    fun, jacobian = task_losses, jax.jacrev(task_losses)(params, x)
    if route == "examples":
        fun, options["in_axes"] = example_loss, (None, 0)
        jacobian = jax.vmap(jax.grad(example_loss), (None, 0))(params, x)
    if route == "encoder":
        fun, options["encoder"] = head_losses, encode
    losses, gramian, pullback = jax.jit(value_and_gramian(fun, **options))(params, x)
    if route != "encoder":
        assert_close(gramian, flat_rows(jacobian["trunk"]) @ flat_rows(jacobian["trunk"]).T)
    weights, heads = normal(10, *losses.shape), normal(11, *losses.shape)
    for h, grads in ((jnp.ones_like(heads), pullback(weights)), (heads, pullback(weights, heads))):
        assert_close(
            grads,
            {
                "trunk": jax.tree.map(lambda j: jnp.tensordot(weights, j, 1), jacobian["trunk"]),
                "heads": jax.tree.map(lambda j, h=h: jnp.tensordot(h, j, 1), jacobian["heads"]),
            },
        )


def test_shared_and_not_shared_parameters_in_one_use(x64):
    params, x = {"a": normal(1, 4, 3), "b": normal(2, 4, 3)}, normal(3, 6, 4)

    def loss(p, x):
        return jnp.sum(jnp.tanh(x @ jnp.concatenate([p["a"], p["b"]], 1)))

    fun = value_and_gramian(loss, in_axes=(None, 0), shared={"a": True, "b": False})
    _, gramian, pullback = jax.jit(fun)(params, x)
    jacobian = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    assert_close(gramian, flat_rows(jacobian["a"]) @ flat_rows(jacobian["a"]).T)
    grads = pullback(jnp.zeros(6))
    assert_close(grads["b"], jnp.sum(jacobian["b"], 0))
    assert not np.any(grads["a"])


@pytest.mark.parametrize("route", some(["examples", "tasks", "encoder"]))
def test_aux(route):
    params, x = parameters(), normal(9, 8, 4)
    kwargs, fun, n = {}, task_losses, None
    if route == "examples":
        fun, kwargs, n = example_loss, {"in_axes": (None, 0)}, 8
    if route == "encoder":
        fun, kwargs = head_losses, {"encoder": encode}

    def with_aux(params, *args):
        return fun(params, *args), {"b": params["trunk"]["b"], "x": args[0], "one": 1, "none": None}

    (_, aux), _, _ = jax.jit(value_and_gramian(with_aux, has_aux=True, **kwargs))(params, x)
    lead = () if n is None else (n,)
    assert aux["b"].shape == (*lead, 6)
    assert aux["one"].shape == lead
    assert aux["none"] is None
    mean = linear_scalarization()
    step = value_and_grad(with_aux, mean, has_aux=True, **kwargs)
    ((_, aux), _), grads = step(params, mean.init(params), x)
    assert aux["b"].shape == (*lead, 6)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("route", ["tasks", "examples", "encoder"])
def test_cross_gramian(route, x64):
    params, first, second = parameters(), normal(9, 8, 4), normal(10, 3, 4)
    if route == "tasks":
        found = jax.jit(cross_gramian(task_losses, chunk_size=2))(params, (first,), (second,))
        rows = [flat_rows(jax.jacrev(task_losses)(params, x)) for x in (first, second)]
    elif route == "examples":
        fun = cross_gramian(example_loss, in_axes=(None, 0))
        found = jax.jit(fun)(params, (first,), (second,))
        per_example = jax.vmap(jax.grad(example_loss), (None, 0))
        rows = [flat_rows(per_example(params, x)) for x in (first, second)]
    else:
        second = normal(10, 8, 4)
        fun = cross_gramian(head_losses, encoder=encode)
        found = jax.jit(fun)(params, (first,), (second,))
        rows = [
            flat_rows(jax.jacrev(lambda z: head_losses(params, z))(encode(params, x)))
            for x in (first, second)
        ]
    assert_close(found, rows[0] @ rows[1].T)


# --- value_and_grad ---------------------------------------------------------------------------


def test_value_and_grad_is_sugar(x64):
    params, x = parameters(), normal(9, 8, 4)
    aggregator = base.from_weighting(inverse_norms, num_tasks=M)
    fun = jax.jit(value_and_grad(task_losses, aggregator))
    (losses, state), grads = fun(params, aggregator.init(params), x)
    jacobian = jax.jacrev(task_losses)(params, x)
    expected, expected_state = aggregator.update(
        jacobian, aggregator.init(params), params, losses=losses
    )
    assert_close(grads, expected)
    assert_close(state.mtl_weights, expected_state.mtl_weights)


def test_extra_arguments_reach_the_weighting():
    params, x = parameters(), normal(9, 8, 4)
    seen = {}

    def weigh(gramian, **inputs):
        seen.update(inputs)
        return jnp.ones(len(gramian))

    aggregator = base.from_weighting(weigh)
    fun = value_and_grad(head_losses, aggregator, encoder=encode)
    fun(params, aggregator.init(params), x, key=jax.random.key(0))
    assert {"key", "losses", "features"} <= set(seen)
    assert seen["features"].shape == (8, 6)
    fun(params, aggregator.init(params), x, features=jnp.zeros(3))
    assert seen["features"].shape == (3,)


def test_head_weights_of_loss_rules_and_of_rules_that_say():
    params, x = parameters(), normal(9, 8, 4)
    weights = jnp.arange(1.0, 1 + M)
    of_losses = base.from_weighting(lambda losses: weights)
    fun = value_and_grad(task_losses, of_losses, shared=SHARED)
    _, grads = fun(params, of_losses.init(params), x)
    jacobian = jax.jacrev(task_losses)(params, x)["heads"]["w"]
    assert_close(grads["heads"]["w"], jnp.tensordot(weights, jacobian, 1), 1e-5)

    aggregator = base.from_weighting(
        lambda losses: weights, head_weights=lambda state, task_mask: 2 * jnp.ones(M)
    )
    _, grads = value_and_grad(task_losses, aggregator, shared=SHARED)(
        params, of_losses.init(params), x
    )
    assert_close(grads["heads"]["w"], 2 * jnp.sum(jacobian, 0), 1e-5)


def test_absent_tasks_move_no_head():
    params, x = parameters(), normal(9, 8, 4)
    aggregator = base.from_weighting(lambda gramian, task_mask: task_mask / 1.0)
    mask = jnp.arange(M) != 2
    fun = value_and_grad(task_losses, aggregator, shared=SHARED)
    _, grads = fun(params, aggregator.init(params), x, task_mask=mask)
    assert np.array_equal(np.any(grads["heads"]["w"], axis=1), mask)


def test_non_finite_steps_are_skipped():
    params, x = parameters(), normal(9, 8, 4)
    aggregator = base.from_weighting(inverse_norms, num_tasks=8)
    fun = jax.jit(value_and_grad(example_loss, aggregator, in_axes=(None, 0)))
    (_, state), grads = fun(params, aggregator.init(params), x.at[3].set(jnp.nan))
    assert int(state.mtl_skipped) == 1
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    (_, state), grads = fun(params, state, x)
    assert int(state.mtl_skipped) == 1
    assert all(np.any(g) for g in jax.tree.leaves(grads))


def huge(dtype):
    """A step of a rule whose weights are 1e4: of gradients of 1 it is 2e4, of 10 it is 2e5."""
    rule = base.from_weighting(lambda gramian: jnp.full(len(gramian), 1e4))

    def step(state, size):
        params = jnp.ones(3, dtype)
        evaluate = value_and_grad(lambda p: jnp.stack([p.sum(), p.sum()]) * size, rule)
        (_, state), grads = evaluate(params, state)
        return state, grads

    return jax.jit(step), rule.init(jnp.ones(3, dtype))


@pytest.mark.parametrize("dtype", some([jnp.float16, jnp.float32]))
def test_updates_that_leave_the_format_are_skipped(dtype):
    """Finite gradients and weights, whose sum is not: found before the last scaling of it."""
    step, state = huge(dtype)
    unit = 1 if dtype == jnp.float16 else 1e33
    state, grads = step(state, unit)
    np.testing.assert_allclose(grads, np.full(3, 2e4 * unit, dtype), rtol=1e-3)
    assert int(state.mtl_skipped) == 0
    state, grads = step(state, 10 * unit if dtype == jnp.float16 else 1e35)
    np.testing.assert_array_equal(grads, np.zeros(3))
    assert int(state.mtl_skipped) == 1


def test_steps_hold_no_copy_of_their_update():
    """Beside the update itself, which may lie where the new parameters will."""
    rule = mgda()
    params = {"w": normal(1, 256, 256), "v": normal(2, 256, 256)}
    x = normal(3, 16, 256)

    def loss(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"]))

    def step(params, state, x):
        (_, state), grads = value_and_grad(loss, rule, in_axes=(None, 0))(params, state, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

    program = jax.jit(step).lower(params, rule.init(params), x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * params["w"].nbytes  # of two


@pytest.mark.parametrize("make", [linalg.symmetric, linalg.mirrored])
def test_tables_of_many_tasks_are_symmetric_to_the_last_bit(make):
    """Also where sums of products stand behind them, batched, differentiated and not finite."""
    n = 80  # past the size from which on tables are written first
    x, y = normal(1, n, 30), normal(2, n, 30)

    def table(x, y):
        return make((x @ y.T) * (y @ x.T) + x @ x.T)

    found = np.asarray(jax.jit(table)(x, y))
    np.testing.assert_array_equal(found, found.T)
    x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
    expected = (x64 @ y64.T) * (y64 @ x64.T) + x64 @ x64.T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    batched = jax.jit(jax.vmap(table))(jnp.stack([x, y]), jnp.stack([y, x]))
    np.testing.assert_allclose(batched[0], found, rtol=1e-5, atol=1e-5)
    units = jax.grad(lambda t: jnp.sum(make(t)))(jnp.zeros((n, n)))
    lower = np.tri(n) + np.tri(n, k=-1)
    np.testing.assert_array_equal(units, np.ones((n, n)) if make is linalg.symmetric else lower)
    broken = make(jnp.ones((n, n)).at[0, 0].set(jnp.nan).at[5, 3].set(jnp.inf))
    assert np.isnan(broken[0, 0])
    assert np.isinf(broken[[5, 3], [3, 5]]).all()


# --- transformations --------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["tasks", "examples"])
def test_seeds_steps_and_derivatives_around_it(route, x64):
    x = normal(9, 5, 4)
    aggregator = base.from_weighting(inverse_norms)
    if route == "tasks":
        fun = value_and_grad(task_losses, aggregator)
    else:
        fun = value_and_grad(example_loss, aggregator, in_axes=(None, 0))

    def step(carry, _):
        params, state = carry
        (losses, state), grads = fun(params, state, x)
        return (jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), state), losses

    def train(scale):
        params = jax.tree.map(lambda p: scale * p, parameters())
        (params, _), losses = jax.lax.scan(step, (params, aggregator.init(params)), None, length=3)
        return params, losses

    together, _ = jax.jit(jax.vmap(train))(jnp.array([1.0, 0.5]))
    alone, _ = jax.jit(train)(0.5)
    assert_close(jax.tree.map(lambda p: p[1], together), alone)

    # The Gramian and the losses of the inner problem are differentiable in what is closed over.
    def outer(scale):
        _, gramian, _ = (
            value_and_gramian(lambda p, x: scale * task_losses(p, x))
            if route == "tasks"
            else value_and_gramian(lambda p, x: scale * example_loss(p, x), in_axes=(None, 0))
        )(parameters(), x)
        return jnp.trace(gramian)

    value, derivative = jax.jit(jax.value_and_grad(outer))(2.0)
    assert_close(derivative, 2 * value / 2.0)


def test_pullback_leaves_a_compiled_function():
    params, x = parameters(), normal(9, 8, 4)
    for fun, options in ((task_losses, {}), (example_loss, {"in_axes": (None, 0)})):
        losses, _, pullback = jax.jit(value_and_gramian(fun, **options))(params, x)
        assert isinstance(pullback, jax.tree_util.Partial)
        doubled = jax.jit(lambda pull, w: pull(2 * w))(pullback, jnp.ones(losses.shape))
        assert_close(doubled, jax.tree.map(lambda g: 2 * g, pullback(jnp.ones(losses.shape))), 1e-6)


def test_compiles_once():
    params, x = parameters(), normal(9, 8, 4)
    aggregator = base.from_weighting(inverse_norms)
    step = jax.jit(value_and_grad(example_loss, aggregator, in_axes=(None, 0)))
    (_, state), _ = step(params, aggregator.init(params), x)
    step(params, state, x + 1)
    assert step._cache_size() == 1


# --- cost -------------------------------------------------------------------------------------


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


def deep_loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def test_one_backward_pass_for_the_gramian_of_dense_layers():
    n, width = 16, 256
    params, x = [normal(i, width, width) for i in range(3)], normal(9, n, width)
    summed = lambda p, x: jnp.sum(jax.vmap(deep_loss, (None, 0))(p, x))  # noqa: E731
    one_gradient = flops(jax.value_and_grad(summed), params, x)
    aggregator = base.from_weighting(inverse_norms)
    fun = value_and_grad(deep_loss, aggregator, in_axes=(None, 0))
    assert flops(fun, params, aggregator.init(params), x) <= 1.15 * one_gradient


@pytest.mark.parametrize("route", ["tasks", "examples", "encoder"])
def test_rules_that_read_no_gramian_cost_one_backward_pass(route):
    width = 64
    params = {
        "trunk": {"w": normal(1, width, width), "b": normal(2, width)},
        "heads": {"w": normal(3, M, width), "b": normal(4, M)},
    }
    x = normal(9, 32, width)
    mean = linear_scalarization()
    options = {"examples": {"in_axes": (None, 0)}, "encoder": {"encoder": encode}, "tasks": {}}
    funs = {"examples": example_loss, "encoder": head_losses, "tasks": task_losses}
    fun = value_and_grad(funs[route], mean, **options[route])
    if route == "examples":
        total = lambda p, x: jnp.mean(jax.vmap(example_loss, (None, 0))(p, x))  # noqa: E731
    else:
        total = lambda p, x: jnp.mean(task_losses(p, x))  # noqa: E731
    one_gradient = flops(jax.value_and_grad(total), params, x)
    assert flops(fun, params, mean.init(params), x) <= 1.1 * one_gradient
    # Written out with the three visible pieces, the compiler drops the Gramian.
    pieces = value_and_gramian(funs[route], **options[route])

    def by_hand(params, x):
        losses, _, pullback = pieces(params, x)
        return losses, pullback(jnp.full(losses.shape, 1 / losses.shape[0]))

    assert flops(by_hand, params, x) <= 1.1 * one_gradient


# --- errors -----------------------------------------------------------------------------------


def _scalar(p, x):
    return jnp.sum(p * x)


P, X = jnp.ones(3), jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: value_and_gramian(_scalar)(P, X), r"\(m,\) vector .* got shape \(\)"),
        (lambda: value_and_gramian(_scalar, in_axes=0)(P, X), "entry for params"),
        (lambda: value_and_gramian(_scalar, in_axes=(None,))(P, X), "2 entries"),
        (lambda: value_and_gramian(_scalar, in_axes=(0, 0))(P, X), "params has 3"),
        (lambda: value_and_gramian(_scalar, in_axes=(None, None))(P, X), "at least one array"),
        (lambda: value_and_gramian(_scalar, in_axes=(None, (0, 0)))(P, X), "match the arguments"),
        (lambda: value_and_gramian(_scalar, in_axes=(None, 2))(P, X), "an axis 2"),
        (
            lambda: value_and_gramian(lambda p, x, y: _scalar(p, x), in_axes=(None, 0, 0))(
                P, X, jnp.ones(5)
            ),
            "has 4, .* has 5",
        ),
        (lambda: value_and_gramian(_scalar, in_axes=(None, 0))(P, X[:0]), "m = 0"),
        (lambda: value_and_gramian(lambda p: p[:0])(P), "m = 0"),
        (lambda: value_and_gramian(lambda p: (p, p))(P), "one array"),
        (lambda: value_and_gramian(lambda p: p, has_aux=True)(P), r"\(losses, aux\)"),
        (
            lambda: value_and_gramian(_scalar, in_axes=(None, 0))({"a": jnp.arange(3)}, X),
            r"int32 at \['a'\]",
        ),
        (lambda: value_and_gramian(lambda p: P)({}), "empty pytree"),
        (lambda: value_and_gramian(lambda p: p > 0)(P), "floating point losses, got bool"),
        (lambda: value_and_gramian(_scalar, in_axes=(None, 0), encoder=_scalar), "got both"),
        (lambda: value_and_gramian(_scalar, in_axes=(None, 0), chunk_size=2), "no chunk_size"),
        (lambda: value_and_gramian(_scalar, chunk_size=0), "a positive int"),
        (lambda: value_and_gramian(3), "a losses function, got int"),
        (lambda: value_and_gramian(lambda p: p, shared={"b": True})({"a": P}), "prefix"),
        (lambda: value_and_gramian(lambda p: p["a"], shared={"a": 1})({"a": P}), "True or False"),
        (lambda: value_and_gramian(lambda p: p, shared=False)(P), "at least one shared"),
        (
            lambda: value_and_gramian(lambda p, z: p, encoder=lambda p: jnp.arange(3))(P),
            "features from the encoder",
        ),
        (lambda: cross_gramian(lambda p, x: x @ p)(P, X, X), "as a tuple"),
        (lambda: value_and_grad(_scalar, trimmed_mean(1)), "value_and_jacobian"),
    ],
)
def test_wrong_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "expected" in str(error.value)
