"""Mixed precision: narrow rows and losses, wide Gramians, weights and states; loss scaling."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from experiments.examples import mixed_precision as example
from tests.methods import BY_NAME, METHODS, sweep
from tests.problems import flat, inputs_of, params_of, rows_of, size_of, tasks_of

NAMES = [method.name for method in METHODS]
WEIGHTED = [method.name for method in METHODS if method.weighted]
NARROW = [jnp.bfloat16, jnp.float16]

pytestmark = pytest.mark.xdist_group("precision")


@pytest.fixture(autouse=True)
def eager():
    """Op by op: compiling each rule once per dtype and route would take most of the time."""
    with jax.disable_jit():
        yield


def matrix_of(m, seed=0):
    """Rows with conflicts; the squared condition number of the unit rows is about 4 (m = 5: 11)."""
    matrix = np.random.default_rng(seed).standard_normal((m, size_of()))
    return matrix - 0.4 * matrix.mean(0)


def conditioning(matrix):
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.linalg.cond(unit) ** 2


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def narrow_inputs(name, dtype=jnp.float32):
    """What a rule reads beside the rows; losses are rounded to ``dtype``, the rest is float32."""
    inputs = inputs_of(name, tasks_of(name), dtype=jnp.float32)
    return {key: x.astype(dtype) if "losses" in key else x for key, x in inputs.items()}


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)
    assert [x.dtype for x in jax.tree.leaves(tree)] == [x.dtype for x in jax.tree.leaves(other)]


def run(aggregator, rows, params, inputs):
    update, state = None, aggregator.init(params)
    for jacobian in rows:
        update, state = aggregator.update(jacobian, state, params, **inputs)
    return update, state


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", sweep(NAMES, ("upgrad", "graddrop")))
def test_narrow_rows_count_as_their_float32_copies(rule, dtype):
    """Bit for bit: weights and state do not change, the update is rounded once, at the end."""
    aggregator, m = BY_NAME[rule].make(tasks_of(rule)), tasks_of(rule)
    matrices = [matrix_of(m, seed) for seed in range(2 if BY_NAME[rule].stateful else 1)]
    wide = params_of(dtype=jnp.float32)
    exact = [rows_of(matrix, dtype=jnp.float32) for matrix in matrices]
    rows, inputs = [cast(x, dtype) for x in exact], narrow_inputs(rule, dtype)
    copies = cast(rows, jnp.float32)
    expected, state = run(aggregator, copies, wide, cast(inputs, jnp.float32))
    assert_same(
        run(aggregator, rows, params_of(dtype=dtype), inputs), (cast(expected, dtype), state)
    )
    # With master weights the update is not rounded.
    assert_same(run(aggregator, rows, wide, inputs), (expected, state))

    # And against rows that were not rounded: what their rounding can change.
    unrounded, unrounded_state = run(aggregator, exact, wide, cast(inputs, jnp.float32))
    bound = float(jnp.finfo(dtype).eps) * max(map(conditioning, matrices))
    largest = np.abs(flat(unrounded)).max()
    np.testing.assert_allclose(flat(expected), flat(unrounded), rtol=0, atol=bound * largest)
    if BY_NAME[rule].logs:
        weights = np.asarray(optax.tree.get(unrounded_state, "mtl_weights"))
        found = optax.tree.get(state, "mtl_weights")
        np.testing.assert_allclose(found, weights, rtol=0, atol=bound * np.abs(weights).max())


@pytest.mark.parametrize("rule", ["upgrad", "graddrop", "moco"])
def test_wide_rows_of_narrow_parameters_have_narrow_updates(rule):
    """Lest the state of the optimizer that follows change its dtype; the rows lose nothing."""
    aggregator = BY_NAME[rule].make(3)
    rows, narrow = [rows_of(matrix_of(3), dtype=jnp.float32)], params_of(dtype=jnp.bfloat16)
    update, state = run(aggregator, rows, narrow, {})
    expected, expected_state = run(aggregator, rows, params_of(dtype=jnp.float32), {})
    assert_same((update, state), (cast(expected, jnp.bfloat16), expected_state))


@pytest.mark.parametrize(
    "rule", sweep((n for n in NAMES if BY_NAME[n].scale_free), ("upgrad", "aligned_mtl", "config"))
)
def test_loss_scaling_changes_no_bit_of_the_weights(rule):
    """Although the squares of float16 rows vanish at 2^-6 and overflow at 2^12."""
    aggregator, m = BY_NAME[rule].make(tasks_of(rule)), tasks_of(rule)
    matrix = np.round(matrix_of(m) * 256) / 256  # normal numbers of float16 at either scale
    params, inputs = params_of(dtype=jnp.float16), narrow_inputs(rule)
    (small, state), (large, large_state) = (
        run(aggregator, [rows_of(np.ldexp(matrix, k), dtype=jnp.float16)], params, inputs)
        for k in (-6, 12)
    )
    if BY_NAME[rule].logs:
        assert_same(large_state, state)
    assert np.abs(flat(small)).max() > 0
    # But for subnormal numbers, the update divided is that of the other scale.
    least = float(jnp.finfo(jnp.float16).smallest_subnormal)
    np.testing.assert_allclose(np.ldexp(flat(large), -18), flat(small), rtol=0, atol=least)


def problem(route, rows, losses):
    """A losses function whose gradients are the given rows, exactly, at params 0."""
    if route == "examples":

        def one(params, row, loss):
            return jnp.vdot(row, params) + loss

        return one, (rows, losses), {"in_axes": (None, 0, 0)}
    return lambda params, rows, losses: rows @ params + losses, (rows, losses), {}


# Each dtype on each route: by the slow sweep; by default one of them on each.
ROUTES = [
    pytest.param(jnp.bfloat16, "tasks"),
    pytest.param(jnp.float16, "examples"),
    pytest.param(jnp.bfloat16, "examples", marks=pytest.mark.slow),
    pytest.param(jnp.float16, "tasks", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "route"), ROUTES)
@pytest.mark.parametrize("rule", sweep(WEIGHTED, ("upgrad", "nash_mtl", "famo", "imtl")))
def test_without_the_jacobian_weights_are_those_of_float32(rule, dtype, route):
    """From narrow parameters and losses; the gradient is rounded as a backward pass rounds."""
    aggregator, m = BY_NAME[rule].make(tasks_of(rule)), tasks_of(rule)
    inputs = narrow_inputs(rule, dtype)
    losses = inputs.pop("losses")
    rows = jnp.asarray(matrix_of(m), dtype)
    wide = np.asarray(rows, np.float64)
    weights, state = aggregator.weighting.update(
        jaxmtl.gramian(rows),
        aggregator.weighting.init(),
        losses=losses.astype(jnp.float32),
        **inputs,
    )
    eps = jnp.finfo(jnp.float32).eps * conditioning(wide)
    rounding = 2 * float(jnp.finfo(dtype).eps) * (np.abs(np.asarray(weights)) @ np.abs(wide))
    params = jnp.zeros(size_of(), dtype)
    fun, args, options = problem(route, rows, losses)
    step = jaxmtl.value_and_grad(fun, aggregator, **options)
    (_, found), grads = step(params, aggregator.init(params), *args, **inputs)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=4 * m * eps, atol=4 * m * eps)
    assert grads.dtype == dtype
    error = np.abs(np.asarray(grads, np.float64) - np.asarray(weights) @ wide)
    assert np.all(error <= rounding)


@pytest.mark.parametrize("route", ["tasks", "examples", "encoder"])
def test_weights_beyond_float16_are_pulled_back(route):
    """A weight of 1e6 times a row of 1e-3 is no overflow, although 1e6 is one."""
    rows = jnp.asarray(matrix_of(3) / 1024, jnp.float16)
    params = jnp.zeros(size_of(), jnp.float16)
    if route == "encoder":
        fun, args, options = (
            lambda p, z, rows: rows @ z,
            (rows,),
            {"encoder": lambda p, rows: p + 0},
        )
    else:
        fun, args, options = problem(route, rows, jnp.zeros(3, jnp.float16))
    _, _, pullback = jaxmtl.value_and_gramian(fun, **options)(params, *args)
    weights = jnp.array([1e6, 2e6, 0.5])
    grads = np.asarray(pullback(weights), np.float64)
    exact = np.asarray(weights) @ np.asarray(rows, np.float64)
    scale = np.asarray(weights) @ np.abs(np.asarray(rows, np.float64))
    assert np.all(np.abs(grads - exact) <= 2 * float(jnp.finfo(jnp.float16).eps) * scale)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_computation_on_wide_parameters_has_the_gramian_of_its_rows(dtype):
    """Tangents pushed through a narrow network would cost the small eigenvalues all digits."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((32, size)), jnp.float32) for size in (16, 4))
    params = {
        "in": jnp.asarray(rng.standard_normal((16, 32)) / 4, jnp.float32),
        "out": jnp.asarray(rng.standard_normal((32, 4)) / 6, jnp.float32),
    }

    def losses_fn(p):
        narrow = cast(p, dtype)
        hidden = jnp.tanh(x.astype(dtype) @ narrow["in"])
        error = (hidden @ narrow["out"]).astype(jnp.float32) - y
        return jnp.mean((error[:, :1] + 0.03 * error) ** 2, axis=0)  # four tasks, nearly parallel

    _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params)
    expected = np.asarray(jaxmtl.gramian(jacobian), np.float64)
    _, gramian, _ = jaxmtl.value_and_gramian(losses_fn)(params)
    norms = np.sqrt(np.diag(expected))
    error = np.abs(np.asarray(gramian, np.float64) - expected) / np.outer(norms, norms)
    assert error.max() <= 64 * jnp.finfo(jnp.float32).eps
    assert str(jnp.dtype(dtype)) in str(jaxmtl.explain(losses_fn, params))


@pytest.mark.parametrize("dtype", NARROW)
def test_tracked_gradients_are_as_wide_as_master_weights(dtype):
    tracking = jaxmtl.track_gradients(0.1, num_tasks=3)
    rows, params = rows_of(matrix_of(3), dtype=dtype), params_of(dtype=jnp.float32)
    found = run(tracking, (rows, rows), params, {})
    assert_same(found, run(tracking, cast((rows, rows), jnp.float32), params, {}))
    narrow, _ = run(tracking, (rows, rows), params_of(dtype=dtype), {})
    assert_same(narrow, cast(found[0], dtype))


def test_the_gradient_of_features_is_taken_in_float32():
    aggregator = jaxmtl.ldc_mtl(num_tasks=3, feature_size=2)
    state, features = aggregator.init(jnp.zeros(2)), jnp.array([[1.0, -0.5]])
    gradient = aggregator.weighting.feature_gradient
    losses = jnp.array([0.3, 1.7, 0.9], jnp.bfloat16)
    assert_same(
        gradient(state, losses, features), gradient(state, losses.astype(jnp.float32), features)
    )


@functools.cache
def trained(log2, dtype, dynamic):
    with jax.disable_jit(False):
        train = functools.partial(example.train, dtype=dtype, dynamic=dynamic)
        return jax.jit(train)(example.make_data(), example.start_scale(log2))


@pytest.mark.slow
def test_the_loss_scale_follows_the_overflows():
    log = trained(24, jnp.float16, True)
    overflow = np.diff(np.asarray(log.skipped), prepend=0) > 0
    assert 0 < overflow.sum() < example.STEPS / 4
    assert np.all(log.weights[0] == 0)  # those of no step at all: the first one overflows
    good, scale = 0, 2.0**24
    for step in range(example.STEPS):
        assert log.scale[step] == scale
        good = 0 if overflow[step] else good + 1
        if overflow[step] or good == example.PATIENCE:
            scale *= 0.5 if overflow[step] else 2
            good = 0
    assert np.all(np.isfinite(log.losses))
    assert np.all(log.losses[-1] < 0.05 * log.losses[0])
    # A skipped step moves nothing, whatever momentum Adam has.
    after = np.flatnonzero(overflow[:-1]) + 1
    np.testing.assert_array_equal(log.losses[after], log.losses[after - 1])


@pytest.mark.slow
def test_a_static_loss_scale_changes_no_bit():
    """In bfloat16, whose range is that of float32, of the weights and of the whole run."""
    log, scaled = (trained(log2, jnp.bfloat16, False) for log2 in (0, 10))
    np.testing.assert_array_equal(scaled.weights, log.weights)
    np.testing.assert_array_equal(scaled.losses, log.losses)
    assert log.skipped[-1] == scaled.skipped[-1] == 0


@pytest.mark.parametrize("dtype", NARROW)
def test_mixed_precision_trains_as_float32_does(dtype):
    narrow, wide = trained(8, dtype, False), trained(8, jnp.float32, False)
    eps = float(jnp.finfo(dtype).eps)
    # At the start the rows differ by the rounding of a network; then the runs drift apart.
    np.testing.assert_allclose(narrow.losses[0], wide.losses[0], rtol=8 * eps)
    np.testing.assert_allclose(narrow.weights[0], wide.weights[0], atol=64 * eps)
    np.testing.assert_allclose(narrow.losses[-1], wide.losses[-1], atol=4 * eps)


def test_the_example_runs_as_a_program(capsys):
    with jax.disable_jit(False):
        example.main()
    assert "loss scale 2^24 -> 2^" in capsys.readouterr().out


def test_the_listing_of_the_guide():
    """It halves the scale until the rows fit and then learns, from float32 parameters."""
    page = (Path(__file__).parents[1] / "notebooks" / "guide" / "precision.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]

    def losses_fn(params, batch):
        return jnp.mean((params[None] - batch.astype(params.dtype)) ** 2, axis=1)

    adam, aggregator = optax.adam(0.1), jaxmtl.upgrad(num_tasks=2)
    scope = {"jax": jax, "jnp": jnp, "jaxmtl": jaxmtl, "adam": adam, "aggregator": aggregator}
    scope["losses_fn"] = losses_fn
    exec(code, scope)
    params, batch, scale = jnp.full(4, 3.0), jnp.array([[0.0], [1.0]]), jnp.float32(2.0**20)
    state, opt_state = aggregator.init(params), adam.init(params)
    with jax.disable_jit(False):
        for _ in range(60):
            params, state, opt_state, scale = scope["step"](params, state, opt_state, scale, batch)
    skipped = int(state.mtl_skipped)
    assert 0 < skipped < 10
    assert float(scale) == 2.0 ** (20 - skipped)
    assert params.dtype == jnp.float32
    assert np.all((params > -0.2) & (params < 1.2))
