"""Gauss-Newton directions against numpy's least squares, LM against optimistix and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxmtl
from tests.problems import WIDE_FIRST, some

IN_AXES = (None, 0, 0)


def residual(params, x, y):
    """One residual of a small network: 13 parameters."""
    hidden = jnp.tanh(params["w"] * x + params["b"])
    return jnp.vdot(params["v"], hidden) + params["c"] - y


def start(seed=0):
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.normal, size=4)
    params = {"w": 2 * draw(), "b": draw(), "v": draw(), "c": rng.normal()}
    return jax.tree.map(lambda x: jnp.asarray(x, float), params)


def data(count):
    x = np.linspace(-1, 1, count)
    return jnp.asarray(x), jnp.asarray(np.sin(3 * x))


def rows_of(params, x, y):
    """Residuals (B,) and Jacobian (B, n) by the simplest means, as numpy arrays."""
    flat, unravel = ravel_pytree(params)

    def f(p):
        return jax.vmap(residual, IN_AXES)(unravel(p), x, y)

    return np.asarray(f(flat), np.float64), np.asarray(jax.jacfwd(f)(flat), np.float64)


def damped(jacobian, target, damping):
    """The damped least-squares solution in the space of the parameters."""
    count, n = jacobian.shape
    rows = np.concatenate([jacobian, np.sqrt(count * damping) * np.eye(n)])
    return np.linalg.lstsq(rows, np.concatenate([target, np.zeros(n)]), rcond=None)[0]


def close(tree, flat, rtol):
    found = np.asarray(ravel_pytree(tree)[0])
    np.testing.assert_allclose(found, flat, atol=rtol * np.linalg.norm(flat))


COUNTS = [6, 13, 20]  # fewer, as many and more residuals than parameters


def scaled(params, x, y, scale):
    return scale * residual(params, x, y)


SCALED = jaxmtl.gauss_newton(scaled, in_axes=(None, 0, 0, None), damping=1e-2)
SCALED_STEP = jax.jit(SCALED.value_and_grad)


@WIDE_FIRST
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("scale", some([2.0**-40, 1.0, 2.0**40]))
def test_the_direction_is_the_damped_least_squares_solution(count, scale, precision):
    params, (x, y) = start(), data(count)
    exact = precision == "float64"
    state = SCALED.init(params)
    state = state._replace(mtl_damping=state.mtl_damping * scale**2)
    (value, state), direction = SCALED_STEP(params, state, x, y, scale)
    residuals, jacobian = rows_of(params, x, y)
    close(direction, damped(jacobian, residuals, 1e-2), 1e-11 if exact else 2e-4)
    expected = np.mean(residuals**2) / 2 * scale**2
    np.testing.assert_allclose(value, expected, rtol=1e-12 if exact else 1e-5)
    assert state.mtl_skipped == 0


def linear(params, x, y):
    return jnp.vdot(params, x) - y


LINEAR = jaxmtl.gauss_newton(linear, in_axes=IN_AXES, damping=0.0)
LINEAR_STEP = jax.jit(LINEAR.value_and_grad)


@pytest.mark.parametrize("count", COUNTS)
def test_without_damping_a_linear_model_is_solved_in_one_step(count, x64):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(count, 13))), jnp.asarray(rng.normal(size=count))
    params = jnp.ones(13)
    _, direction = LINEAR_STEP(params, LINEAR.init(params), x, y)
    # The nearest of all solutions; 4 epsilons of the trace are added.
    expected = np.linalg.lstsq(x, y - x @ params, rcond=None)[0]
    close(-direction, expected, 1e-8)


def test_residuals_as_one_vector_are_those_of_the_examples(x64):
    params, (x, y) = start(), data(6)
    whole = jaxmtl.gauss_newton(lambda p, x, y: jax.vmap(residual, IN_AXES)(p, x, y))
    first = jax.jit(whole.value_and_grad)(params, whole.init(params), x, y)[1]
    close(first, ravel_pytree(by_pieces(params, x, y))[0], 1e-11)


def test_several_residuals_of_an_example_count_each(x64):
    """The pairs (x_i, y_i) two by two; one argument is shared, one is a dictionary."""
    params, (x, y) = start(), data(6)

    def pair(params, shift, example):
        return jnp.stack(
            [residual(params, example["x"][i] + shift, example["y"][i]) for i in (0, 1)]
        )

    both = jaxmtl.gauss_newton(pair, in_axes=(None, None, {"x": 0, "y": 1}))
    examples = {"x": x.reshape(3, 2), "y": y.reshape(3, 2).T}
    (value, _), direction = jax.jit(both.value_and_grad)(params, both.init(params), 0.0, examples)
    np.testing.assert_allclose(value, np.mean(rows_of(params, x, y)[0] ** 2) / 2, rtol=1e-13)
    close(direction, ravel_pytree(by_pieces(params, x, y))[0], 1e-11)


@pytest.mark.parametrize("count", COUNTS)
def test_momentum_is_the_recursion_of_spring(count, x64):
    x, y = data(count)
    mu, damping = 0.7, 1e-2
    method = jaxmtl.gauss_newton(residual, in_axes=IN_AXES, damping=damping, momentum=mu)
    params = start()
    state, phi = method.init(params), np.zeros(13)
    step = jax.jit(method.value_and_grad)
    for _ in range(4):
        residuals, jacobian = rows_of(params, x, y)
        phi = mu * phi + damped(jacobian, residuals - mu * jacobian @ phi, damping)
        (_, state), direction = step(params, state, x, y)
        close(direction, phi, 1e-10)
        params = jax.tree.map(lambda p, d: p - 0.3 * d, params, direction)


@jax.jit
def by_pieces(params, x, y):
    """The direction by the three visible pieces: Gramian, weights, pullback."""
    evaluate = jaxmtl.value_and_gramian(residual, in_axes=IN_AXES)
    residuals, gramian, pullback = evaluate(params, x, y)
    return pullback(jnp.linalg.solve(gramian + len(x) * 1e-3 * jnp.eye(len(x)), residuals))


def test_it_is_gramian_weights_and_pullback(x64):
    params, (x, y) = start(), data(6)
    method = jaxmtl.gauss_newton(residual, in_axes=IN_AXES)
    _, direction = jax.jit(method.value_and_grad)(params, method.init(params), x, y)
    close(direction, ravel_pytree(by_pieces(params, x, y))[0], 1e-11)


# --- Levenberg-Marquardt ------------------------------------------------------------------------


def by_hand(params, x, y, damping, steps):
    """Levenberg-Marquardt in numpy, by the rule that the docstring states."""
    flat, unravel = ravel_pytree(params)
    flat = np.asarray(flat)
    dampings, rejected = [], 0
    for _ in range(steps):
        residuals, jacobian = rows_of(unravel(flat), x, y)
        phi = damped(jacobian, residuals, damping)
        after, _ = rows_of(unravel(flat - phi), x, y)
        decrease = residuals @ residuals - after @ after
        model = residuals - jacobian @ phi
        rho = decrease / (residuals @ residuals - model @ model)
        if rho > 1e-3:
            flat = flat - phi
        else:
            rejected += 1
        damping *= 4 if rho < 0.25 else 0.25 if rho > 0.75 else 1
        dampings.append(damping)
    return flat, dampings, rejected


@pytest.mark.parametrize("count", [6, 20])
@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_adaptive_steps_are_those_of_levenberg_and_marquardt(count, damping, x64):
    x, y = data(count)
    method = jaxmtl.gauss_newton(residual, in_axes=IN_AXES, damping=damping, adaptive=True)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            (_, state), direction = method.value_and_grad(params, state, x, y)
            return (jax.tree.map(jnp.subtract, params, direction), state), state.mtl_damping

        return jax.lax.scan(step, (params, method.init(params)), length=8)

    (params, state), dampings = run(start())
    flat, expected, rejected = by_hand(start(), x, y, damping, 8)
    np.testing.assert_allclose(dampings, expected, rtol=1e-12)
    close(params, flat, 1e-6)
    assert state.mtl_rejected == rejected
    assert rejected or damping == 1.0


def test_a_step_that_overshoots_is_not_taken(x64):
    """Newton on arctan diverges beyond 1.39; the trial steps shrink until one helps."""
    method = jaxmtl.gauss_newton(lambda p: jnp.arctan(p), damping=1e-8, momentum=0.5, adaptive=True)
    params = jnp.array([10.0])
    state = method.init(params)
    step = jax.jit(method.value_and_grad)
    values = []
    for _ in range(40):
        (value, state), direction = step(params, state)
        values.append(float(value))
        params = params - direction
    assert (np.diff(values) <= 0).all()
    assert state.mtl_rejected > 0
    assert abs(params[0]) < 1e-8


def test_leaving_the_domain_is_a_rejection(x64):
    """The full step from 0.5 takes the logarithm of a negative number: not skipped, rejected."""
    method = jaxmtl.gauss_newton(lambda p: jnp.log(p) + 6, damping=0.0, adaptive=True)
    params = jnp.array([0.5])
    (_, state), direction = jax.jit(method.value_and_grad)(params, method.init(params))
    assert direction == 0
    assert (state.mtl_rejected, state.mtl_skipped) == (1, 0)
    assert state.mtl_damping > 0


def decay(params, x, y):
    """Three parameters, one minimum near the start: what is left does not vanish."""
    return params["v"] * jnp.exp(params["w"] * x) + params["c"] - y


@pytest.mark.parametrize(("model", "count"), [(residual, 6), (decay, 20)])
def test_the_minimiser_is_that_of_optimistix(model, count, x64):
    optimistix = pytest.importorskip("optimistix", reason="compared where it is installed")
    x, y = data(count)
    params = start()
    if model is decay:
        noise = np.random.default_rng(1).normal(size=count) / 10
        y = 2 * jnp.exp(-1.5 * x) + 0.5 + noise
        params = {"v": jnp.array(1.0), "w": jnp.array(-1.0), "c": jnp.array(0.0)}
    method = jaxmtl.gauss_newton(model, in_axes=IN_AXES, adaptive=True)

    @jax.jit
    def run(params):
        def step(_, carry):
            params, state = carry
            (_, state), direction = method.value_and_grad(params, state, x, y)
            return jax.tree.map(jnp.subtract, params, direction), state

        return jax.lax.fori_loop(0, 100, step, (params, method.init(params)))[0]

    def residuals(params, _):
        return jax.vmap(model, IN_AXES)(params, x, y)

    solver = optimistix.LevenbergMarquardt(rtol=1e-12, atol=1e-12)
    theirs = optimistix.least_squares(residuals, solver, params, max_steps=1000).value
    ours = run(params)
    np.testing.assert_allclose(residuals(ours, None), residuals(theirs, None), atol=1e-7)
    if model is decay:
        assert jnp.sum(residuals(ours, None) ** 2) > 0.05
        close(ours, ravel_pytree(theirs)[0], 1e-7)


# --- robustness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 20])
@pytest.mark.parametrize("adaptive", [False, True])
def test_what_is_not_finite_is_skipped(count, adaptive, x64):
    params, (x, y) = start(), data(count)
    method = jaxmtl.gauss_newton(residual, in_axes=IN_AXES, momentum=0.5, adaptive=adaptive)
    step = jax.jit(method.value_and_grad)
    (_, state), _ = step(params, method.init(params), x, y)
    (_, after), direction = step(params, state, x, y.at[2].set(jnp.nan))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(direction))
    assert after.mtl_skipped == 1
    kept, expected = after._replace(mtl_skipped=0), state._replace(mtl_skipped=0)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, kept, expected))


@pytest.mark.parametrize("count", [3, 9])
def test_rows_of_zeros_and_duplicates_have_an_answer(count, precision):
    """Equal rows with different residuals, zero rows, and nothing but zero rows."""
    rows = np.zeros((count, 5))
    rows[1] = rows[2] = [1.0, 2.0, 0.0, 0.0, 0.0]
    target = np.arange(count, dtype=float)
    params = jnp.zeros(5)
    state = LINEAR.init(params)._replace(mtl_damping=jnp.asarray(1e-3))
    for matrix in (rows, 0 * rows):
        _, direction = LINEAR_STEP(params, state, jnp.asarray(matrix), jnp.asarray(target))
        expected = damped(matrix, -target, 1e-3)
        np.testing.assert_allclose(
            direction, expected, atol=1e-11 if precision == "float64" else 1e-3
        )
    assert abs(expected).max() == 0
    state = state._replace(mtl_damping=jnp.asarray(0.0))
    (_, state), direction = LINEAR_STEP(params, state, jnp.asarray(0 * rows), jnp.asarray(target))
    assert state.mtl_skipped == 0
    assert (direction == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_narrow_parameters_keep_their_dtype(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), start())
    x, y = data(6)
    method = jaxmtl.gauss_newton(
        residual, in_axes=IN_AXES, momentum=0.5, adaptive=True, damping=1e-2
    )
    state = method.init(params)
    (_, new), direction = jax.jit(method.value_and_grad)(params, state, x, y)
    assert jax.tree.map(jnp.result_type, direction) == jax.tree.map(jnp.result_type, params)
    assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.previous))


def test_it_compiles_once_and_runs_under_vmap(x64):
    x, y = data(6)
    method = jaxmtl.gauss_newton(residual, in_axes=IN_AXES, momentum=0.5, adaptive=True)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        return jax.vmap(lambda p, s: method.value_and_grad(p, s, x, y))(params, state)

    starts = [start(seed) for seed in range(3)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    state = jax.vmap(method.init)(params)
    for _ in range(2):
        (_, state), direction = step(params, state)
        params = jax.tree.map(jnp.subtract, params, direction)
    assert len(traces) == 1
    alone, lone_state = starts[1], method.init(starts[1])
    for _ in range(2):
        (_, lone_state), one = jax.jit(method.value_and_grad)(alone, lone_state, x, y)
        alone = jax.tree.map(jnp.subtract, alone, one)
    close(jax.tree.map(lambda p: p[1], params), ravel_pytree(alone)[0], 1e-9)


def test_optax_reads_the_log(x64):
    method = jaxmtl.gauss_newton(residual, in_axes=IN_AXES, damping=0.25)
    assert optax.tree.get(method.init(start()), "mtl_damping") == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, r"expected damping in \[0, inf\), got -1"),
        ({"momentum": 1.0}, r"expected momentum in \[0, 1\), got 1"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jaxmtl.gauss_newton(residual, **options)


def test_residuals_of_a_wrong_shape_are_refused():
    method = jaxmtl.gauss_newton(lambda p, x: p * x)
    with pytest.raises(ValueError, match="got shape"):
        method.value_and_grad(jnp.ones(()), method.init(jnp.ones(())), jnp.ones((3, 3)))
