"""EPO against the linear programs of the paper, solved by scipy, and on fronts of known shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import jaxmtl
from tests.problems import some


def reference(gramian, losses, r, tolerance=1e-4):
    """The optimal value of the paper's program, and its cost vector; None where infeasible."""
    m = len(r)
    h = r * losses / np.sum(r * losses)
    mu = np.sum(h * np.log(m * h))
    a = r * (np.log(m * h) - mu)
    slopes = gramian @ a
    if mu > tolerance:
        cost, rows, lower = slopes, gramian, np.zeros(m)
        if np.any(slopes > 0):
            lower = np.where(slopes > 0, -1e30, slopes)
            lower[r * losses == np.max(r * losses)] = 0
    else:
        cost, rows = gramian.sum(0), np.vstack([gramian, slopes])
        lower = np.append(np.zeros(m), min(0, np.max(slopes)))
    kept = lower > -1e29
    found = optimize.linprog(-cost, -rows[kept], -lower[kept], np.ones((1, m)), [1])
    return (None if found.status == 2 else -found.fun), cost, rows, lower, mu > tolerance


@pytest.mark.parametrize("m", some([3, 2, 6]))
def test_weights_solve_the_program(m, precision):
    def weigh(jacobian, losses, preference):
        aggregator = jaxmtl.epo()
        gramian = jacobian @ jacobian.T
        state = aggregator.weighting.init()
        return aggregator.weighting.update(gramian, state, losses=losses, preference=preference)[0]

    run = jax.jit(jax.vmap(weigh))
    rng = np.random.default_rng(m)
    jacobians = np.round(rng.standard_normal((60, m, m + 2)) * 64) / 64
    jacobians -= 0.6 * jacobians.mean(1, keepdims=True)
    r = rng.dirichlet(np.full(m, 3.0), 60)
    losses = rng.uniform(0.2, 2, (60, m))
    losses[::3] = 1 / r[::3] * (1 + 1e-3 * rng.standard_normal((20, m)))  # near the ray: descent
    found = np.asarray(run(*(jnp.asarray(x, float) for x in (jacobians, losses, r))), float)
    atol = 1e-9 if precision == "float64" else 2e-4
    kinds, missing = [], 0
    for w, jacobian, loss, preference in zip(found, jacobians, losses, r, strict=True):
        gramian = jacobian @ jacobian.T
        best, cost, rows, lower, balance = reference(gramian, loss, preference)
        kinds.append(balance)
        if best is None:
            missing += 1
            np.testing.assert_allclose(w, preference / preference.sum(), atol=1e-6)
            continue
        scale = np.max(np.abs(gramian))
        np.testing.assert_allclose(w.sum(), 1, atol=1e-5)
        np.testing.assert_allclose(cost @ w, best, atol=atol * scale)
        assert np.min(rows @ w - lower) >= -atol * scale
    assert 15 <= np.sum(kinds) <= 45
    assert missing <= 5


def test_the_scale_of_the_losses_does_not_count(x64):
    rng = np.random.default_rng(0)
    jacobian, losses = jnp.asarray(rng.standard_normal((4, 7))), jnp.asarray(rng.uniform(1, 2, 4))
    aggregator = jaxmtl.epo(preference=jnp.array([0.1, 0.2, 0.3, 0.4]))
    step = jax.jit(
        lambda x: aggregator.update(jacobian, aggregator.init(start), start, losses=x)[0]
    )
    start = jnp.zeros(7)
    for scale in (1e-200, 0.125, 1e200):
        np.testing.assert_allclose(step(losses * scale), step(losses), rtol=1e-9, atol=1e-12)


def search(losses_fn, r, start, steps=3000, rate=0.02):
    """Descends with EPO and returns the losses reached."""
    aggregator = jaxmtl.epo(preference=r)

    def step(carry, _):
        x, state = carry
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(x)
        update, state = aggregator.update(jacobian, state, x, losses=losses)
        return (x - rate * update, state), losses

    run = jax.jit(lambda x: jax.lax.scan(step, (x, aggregator.init(x)), None, length=steps)[1][-1])
    return run(jnp.asarray(start))


@pytest.mark.parametrize("r", [(0.3, 0.7), (0.5, 0.5), (0.8, 0.2)])
def test_reaches_the_ray_on_a_concave_front(r, x64):
    """Fonseca and Fleming's two losses; on the front x = t (1, 1) / sqrt(2) with |t| <= 1."""

    def losses_fn(x):
        center = jnp.ones(2) / np.sqrt(2)
        return 1 - jnp.exp(-jnp.stack([jnp.sum((x - center) ** 2), jnp.sum((x + center) ** 2)]))

    losses = search(losses_fn, np.array(r), [0.9, 0.1])
    np.testing.assert_allclose(losses[0] / losses[1], r[1] / r[0], rtol=0.03)
    t = optimize.brentq(
        lambda t: r[0] * (1 - np.exp(-((t - 1) ** 2))) - r[1] * (1 - np.exp(-((t + 1) ** 2))), -1, 1
    )
    np.testing.assert_allclose(losses[0], 1 - np.exp(-((t - 1) ** 2)), rtol=0.03)


def test_reaches_the_ray_of_three_tasks(x64):
    targets = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    r = np.array([0.2, 0.3, 0.5])
    losses = search(lambda x: jnp.sum((x - targets) ** 2, 1), r, [0.9, -0.3, 0.4])
    np.testing.assert_allclose(r * losses, np.mean(r * losses), rtol=0.03)


def test_zero_losses_and_preferences_are_finite(precision):
    aggregator = jaxmtl.epo()
    jacobian, params = jnp.asarray(np.eye(3) - 0.5), jnp.zeros(3)

    @jax.jit
    def step(losses, r):
        state = aggregator.init(params)
        return aggregator.update(jacobian, state, params, losses=losses, preference=r)

    for losses, r in (([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]), ([1.0, 1.0, 2.0], [0.0, 0.5, 0.5])):
        update, state = step(jnp.array(losses), jnp.array(r))
        assert np.all(np.isfinite(update))
        assert np.any(update != 0)
        assert int(state.mtl_skipped) == 0
