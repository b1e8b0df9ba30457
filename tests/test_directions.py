"""ConicGrad, DiBS-MTL, DCGD and Bloop against coordinates, scipy and the authors' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog
from scipy import optimize

import jaxmtl
from tests.problems import WIDE_FIRST, some


def update_of(aggregator, jacobian, **extra):
    params = jnp.zeros(jacobian.shape[-1])
    jacobian = jnp.asarray(jacobian, float)
    return aggregator.update(jacobian, aggregator.init(params), params, **extra)[0]


def batch(aggregator, jacobians):
    updates = jax.jit(jax.vmap(lambda x: update_of(aggregator, x)))(jnp.asarray(jacobians, float))
    return np.asarray(updates, float)


def matrices(count, m, n, seed=0, conflict=0.7):
    rng = np.random.default_rng(seed)
    rows = np.round(rng.standard_normal((count, m, n)) * 64) / 64
    return rows - conflict * rows.mean(1, keepdims=True)


# --- ConicGrad --------------------------------------------------------------------------------


def best_in_cone(jacobian, c):
    """The least value of the dual, ``|g_0| |g_w + l g_0| - l c |g_0|^2``, w by quadprog."""
    mean = jacobian.mean(0)
    size = np.linalg.norm(mean)
    m = len(jacobian)
    simplex = np.vstack([np.ones(m), np.eye(m)]).T

    def dual(level):
        rows = jacobian + level * mean
        scale = np.max(np.linalg.norm(rows, axis=1))
        gramian = rows @ rows.T / scale**2 + 1e-15 * np.eye(m)
        w = quadprog.solve_qp(gramian, np.zeros(m), simplex, np.append(1.0, np.zeros(m)), 1)[0]
        return size * np.linalg.norm(w @ rows) - level * c * size**2

    longest = np.max(np.linalg.norm(jacobian, axis=1)) / size
    bounds = (0, 2 * longest / np.sqrt(1 - c**2))
    found = optimize.minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return min(found.fun, dual(0.0))


@jax.jit
def conic(jacobians, c):
    """The updates of ConicGrad, compiled once for all angles."""
    return jax.vmap(lambda x: update_of(jaxmtl.conic_grad(c), x))(jacobians)


def conic_updates(jacobians, c):
    return np.asarray(conic(jnp.asarray(jacobians, float), jnp.asarray(c, float)), float)


@pytest.mark.parametrize("m", some([2, 4]))
@WIDE_FIRST
def test_conic_grad_is_the_best_in_its_cone(m, precision):
    jacobians = matrices(8, m, 5, seed=m)
    tolerance = 1e-6 if precision == "float64" else 2e-4
    for c in (0.1, 0.6, 0.95):
        for d, jacobian in zip(conic_updates(jacobians, c), jacobians, strict=True):
            mean = jacobian.mean(0)
            size = np.linalg.norm(mean)
            np.testing.assert_allclose(np.linalg.norm(d), size, rtol=tolerance)
            assert mean @ d >= (c - tolerance) * size**2
            best = best_in_cone(jacobian, c)
            largest = np.max(np.linalg.norm(jacobian, axis=1))
            np.testing.assert_allclose(np.min(jacobian @ d), best, atol=tolerance * size * largest)


@pytest.mark.slow
def test_conic_grad_lies_between_mgda_and_the_mean(x64):
    jacobians = matrices(8, 4, 5, conflict=0.3)
    means = jacobians.mean(1)
    sizes = np.linalg.norm(means, axis=1)
    mgda = batch(jaxmtl.mgda(), jacobians)
    mgda = mgda * (sizes / np.linalg.norm(mgda, axis=1))[:, None]
    own = np.sum(mgda * means, 1) / sizes**2
    middle = float(np.median(own))
    for c in (0.0, middle, 0.99):
        found = conic_updates(jacobians, c)
        cosines = np.sum(found * means, 1) / sizes**2
        np.testing.assert_allclose(cosines, np.maximum(own, c), rtol=1e-9)
        np.testing.assert_allclose(found[own > c], mgda[own > c], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(conic_updates(jacobians, 1 - 1e-12), means, atol=1e-5)


@WIDE_FIRST
def test_conic_grad_where_gradients_cancel(precision):
    """At stationary points the direction stays in the cone; without a mean there is none."""
    rows = np.array(
        [[[1.0, 2.0], [-1.0, -2.0]], [[3.0, 0.0], [-1.0, 0.0]], [[2.0, 1.0], [0.0, 0.0]]]
    )
    found = conic_updates(rows, 0.5)
    np.testing.assert_array_equal(found[0], 0)
    for d, mean in zip(found[1:], rows[1:].mean(1), strict=True):
        np.testing.assert_allclose(np.linalg.norm(d), np.linalg.norm(mean), rtol=1e-3)
        assert mean @ d >= (0.5 - 1e-3) * mean @ mean


# --- CAGrad-Clip ------------------------------------------------------------------------------


def clipped_in_coordinates(jacobian, c, preference):
    """The dual weights by sequential quadratic programming, clipped at the preference."""
    mean = preference @ jacobian
    size = np.linalg.norm(mean)

    def dual(w):
        return w @ jacobian @ mean + c * size * np.linalg.norm(w @ jacobian)

    m = len(jacobian)
    found = optimize.minimize(
        dual,
        np.full(m, 1 / m),
        bounds=[(0, 1)] * m,
        constraints={"type": "eq", "fun": lambda w: np.sum(w) - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    part = np.minimum(found.x, preference) @ jacobian
    return mean + c * size * part / np.linalg.norm(part)


@WIDE_FIRST
def test_cagrad_clip_caps_the_dual_weights(precision):
    jacobians = jnp.asarray(matrices(6, 4, 7, seed=9), float)

    @jax.jit
    def run(preference):
        forms = [jaxmtl.cagrad(0.6, preference=preference, clip=clip) for clip in (True, False)]
        return [jax.vmap(lambda x, form=form: update_of(form, x))(jacobians) for form in forms]

    atol = 2e-5 if precision == "float64" else 2e-3
    for preference in ([0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]):
        found, plain = (np.asarray(x, float) for x in run(jnp.array(preference)))
        for d, jacobian in zip(found, np.asarray(jacobians, float), strict=True):
            expected = clipped_in_coordinates(jacobian, 0.6, np.array(preference))
            np.testing.assert_allclose(d, expected, atol=atol)
        assert np.max(np.abs(found - plain)) > 0.05  # some weight was above its share


# --- DiBS-MTL ---------------------------------------------------------------------------------


def dibs_in_coordinates(jacobian, step_size, steps):
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    delta = np.zeros(jacobian.shape[1])
    for _ in range(steps):
        delta = delta - step_size * np.linalg.norm(delta + units, axis=1) @ units
        delta = delta / max(np.linalg.norm(delta), 1)
    return -delta


@pytest.mark.parametrize(("step_size", "steps"), [(0.01, 5), (0.3, 4), (2.0, 3)])
def test_dibs_mtl_is_the_steps_in_coordinates(step_size, steps, precision):
    jacobians = matrices(6, 4, 9) * np.array([1.0, 1e-3, 1e3, 1.0])[:, None]
    found = batch(jaxmtl.dibs_mtl(step_size, num_steps=steps), jacobians)
    expected = np.stack([dibs_in_coordinates(x, step_size, steps) for x in jacobians])
    atol = 1e-12 if precision == "float64" else 1e-5
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.slow
def test_dibs_mtl_does_not_see_monotone_maps_of_losses(x64):
    """Of exp, log and a cube of the losses the gradients keep their directions."""
    targets = jnp.asarray(matrices(1, 3, 4)[0])

    def losses_fn(x):
        return jnp.sum((x - targets) ** 2, 1)

    def mapped(x):
        a, b, c = losses_fn(x)
        return jnp.stack([jnp.exp(3 * a), jnp.log(b), c**3])

    params = jnp.asarray([0.3, -0.2, 0.5, 0.1])
    plain, other = (jax.jacobian(f)(params) for f in (losses_fn, mapped))
    aggregator = jaxmtl.dibs_mtl(0.2)
    found = update_of(aggregator, other)
    np.testing.assert_allclose(found, update_of(aggregator, plain), rtol=1e-9)


# --- DCGD -------------------------------------------------------------------------------------


def pairs(count=20):
    rows = matrices(count, 2, 6, seed=3, conflict=0.6)
    rows[::2, 0] *= 5
    return rows


def test_dcgd_is_the_mean_of_two_projections(precision):
    found = batch(jaxmtl.dcgd(), pairs())
    outside = 0
    for d, (p, b) in zip(found, pairs(), strict=True):
        product, total = p @ b, p + b
        expected = total
        if total @ p < 0 or total @ b < 0:
            outside += 1
            expected = ((1 - product / (b @ b)) * b + (1 - product / (p @ p)) * p) / 2
        np.testing.assert_allclose(d, expected, rtol=1e-4, atol=1e-5)
        assert min(d @ p, d @ b) >= -1e-4
    assert 4 <= outside <= 16


def test_dcgd_s_other_forms_are_methods_of_the_library(x64):
    """On two rows, center is ConFIG and projection is twice DualProj."""
    config, dual_proj = batch(jaxmtl.config(), pairs()), batch(jaxmtl.dual_proj(), pairs())
    for i, (p, b) in enumerate(pairs()):
        center = p / np.linalg.norm(p) + b / np.linalg.norm(b)
        center *= center @ (p + b) / (center @ center)
        np.testing.assert_allclose(config[i], center, rtol=1e-9, atol=1e-12)
        projection = p + b
        if (p + b) @ b < 0:
            projection = p - (p @ b) / (b @ b) * b
        elif (p + b) @ p < 0:
            projection = b - (p @ b) / (p @ p) * p
        np.testing.assert_allclose(2 * dual_proj[i], projection, rtol=1e-9, atol=1e-12)


# --- Bloop ------------------------------------------------------------------------------------


def bloop_in_numpy(sequence, scale, rate):
    mean, updates = sequence[0, 0], []
    for rows in sequence:
        mean = mean + rate * (rows[0] - mean)
        projected = rows[1:] - np.outer(rows[1:] @ mean, mean) / (mean @ mean)
        updates.append(rows[0] + scale @ projected)
    return np.stack(updates), mean


@pytest.mark.parametrize("scale", [0.5, (0.5, 0.0, 2.0)], ids=str)
def test_bloop_projects_off_the_running_mean(scale, precision):
    sequence = matrices(5, 4, 6, seed=1)
    factor = jnp.asarray(scale) if isinstance(scale, tuple) else scale
    aggregator = jaxmtl.bloop(factor, rate=0.3)
    params = {"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}

    def step(state, rows):
        tree = {"a": rows[:, :2], "b": rows[:, 2:].reshape(4, 2, 2)}
        update, state = aggregator.update(tree, state, params)
        return state, jnp.concatenate([update["a"], update["b"].ravel()])

    scan = jax.jit(lambda x: jax.lax.scan(step, aggregator.init(params), x))
    atol = 1e-13 if precision == "float64" else 1e-5
    expected, mean = bloop_in_numpy(sequence, np.broadcast_to(scale, 3), 0.3)
    state, found = scan(jnp.asarray(sequence, float))
    np.testing.assert_allclose(found, expected, atol=atol)
    reached = np.concatenate([state.inner.mean["a"], state.inner.mean["b"].ravel()])
    np.testing.assert_allclose(reached, mean, atol=atol)
    power = 300 if precision == "float64" else 60
    for k in (-power, power):
        _, scaled = scan(jnp.asarray(np.ldexp(sequence, k), float))
        np.testing.assert_array_equal(scaled, np.ldexp(np.asarray(found), k))


def test_bloop_without_a_main_gradient_projects_the_others(x64):
    rows = matrices(1, 3, 4)[0]
    aggregator, params = jaxmtl.bloop(1.0), jnp.zeros(4)
    _, state = aggregator.update(jnp.asarray(rows), aggregator.init(params), params)
    mask = jnp.array([False, True, True])
    update, after = aggregator.update(jnp.asarray(-rows), state, params, task_mask=mask)
    e = rows[0]
    others = -(rows[1] + rows[2])
    np.testing.assert_allclose(update, others - (others @ e) / (e @ e) * e, rtol=1e-12)
    np.testing.assert_array_equal(after.inner.mean, e)
    np.testing.assert_array_equal(update_of(aggregator, np.zeros((3, 4))), 0)


def test_wrong_hyperparameters_are_sentences():
    for make, match in (
        (lambda: jaxmtl.conic_grad(1.0), "c in"),
        (lambda: jaxmtl.dibs_mtl(0.0), "step_size in"),
        (lambda: jaxmtl.dibs_mtl(num_steps=0), "num_steps"),
        (lambda: jaxmtl.bloop(-1.0), "scale in"),
        (lambda: jaxmtl.bloop(rate=0.0), "rate in"),
        (lambda: jaxmtl.bloop(jnp.ones(3), num_tasks=3), r"scale of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
