"""PMGDA's two problems against quadprog and scipy, and the point that it finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import jaxmtl
from tests.problems import WIDE_FIRST

P = np.array([0.5, 1.0, 1.5])


def run(jacobians, losses, sigma=0.3):
    def step(jacobian, values):
        aggregator, params = jaxmtl.pmgda(sigma, preference=P), jnp.zeros(jacobian.shape[-1])
        return aggregator.update(jacobian, aggregator.init(params), params, losses=values)[0]

    found = jax.jit(jax.vmap(step))(jnp.asarray(jacobians, float), jnp.asarray(losses, float))
    return np.asarray(found, float)


def problems(count=12):
    rng = np.random.default_rng(2)
    rows = np.round(rng.standard_normal((count, 3, 5)) * 64) / 64
    return rows - 0.5 * rows.mean(1, keepdims=True), rng


@WIDE_FIRST
def test_predictions_are_the_least_norm_off_the_constraint(precision):
    jacobians, rng = problems()
    losses = P + 1e-3 * rng.standard_normal((12, 3))
    found = run(jacobians, losses)
    u = P / np.linalg.norm(P)
    atol = 1e-7 if precision == "float64" else 2e-3
    for d, jacobian, values in zip(found, jacobians, losses, strict=True):
        across = values - values @ u * u
        gradient = across / np.linalg.norm(across) @ jacobian
        gradient /= np.linalg.norm(gradient)
        assert abs(d @ gradient) <= atol
        # The point of least norm of a hull: all of its points lie beyond it.
        rows = jacobian - np.outer(jacobian @ gradient, gradient)
        assert np.min(rows @ d) >= d @ d - atol
        hull = np.vstack([rows.T, np.ones(3)])
        weights = optimize.nnls(hull, np.append(d, 1))
        assert weights[1] <= 10 * atol


@WIDE_FIRST
def test_corrections_are_the_linear_program(precision):
    jacobians, rng = problems()
    losses = rng.uniform(0.2, 3, (12, 3))
    found = run(jacobians, losses)
    u = P / np.linalg.norm(P)
    atol = 1e-8 if precision == "float64" else 2e-4
    for d, jacobian, values in zip(found, jacobians, losses, strict=True):
        across = values - values @ u * u
        gradient = across / np.linalg.norm(across) @ jacobian
        rows = np.vstack([jacobian, gradient])
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        # Variables (mu, t): maximise t with A mu >= t and the last row at least sigma |g_h|.
        level = np.append(np.ones(3), 0)[:, None]
        size = np.linalg.norm(gradient)
        best = optimize.linprog(
            np.append(np.zeros(4), -1),
            np.hstack([-rows @ units.T, level]),
            np.append(np.zeros(3), -0.3 * size),
            np.append(np.ones(4), 0)[None],
            [1],
            bounds=[(0, None)] * 4 + [(None, None)],
        )
        np.testing.assert_allclose(np.min(jacobian @ d), -best.fun, atol=10 * atol)
        assert gradient @ d >= (0.3 - atol) * size - atol
        assert np.linalg.norm(d) <= 1 + atol


@pytest.mark.slow
def test_reaches_the_ray_on_a_concave_front(x64):
    """The losses of Fonseca and Fleming on one line, from both ends."""

    def losses_fn(x):
        return 1 - jnp.exp(-jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)]) / 2)

    def search(start):
        aggregator = jaxmtl.pmgda(preference=jnp.array([1.0, 2.0]), tolerance=3e-3)

        def step(carry, _):
            x, state = carry
            losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(x)
            update, state = aggregator.update(jacobian, state, x, losses=losses)
            return (x - 0.01 * update, state), losses

        carry = (start, aggregator.init(start))
        return jax.lax.scan(step, carry, None, length=4000)[1][-1]

    starts = jnp.array([[0.9, 0.4], [-0.8, 0.2]])
    for losses in jax.jit(jax.vmap(search))(starts):
        np.testing.assert_allclose(losses[1] / losses[0], 2.0, rtol=0.05)
        expected = optimize.brentq(
            lambda t: 2 * (1 - np.exp(-((t - 1) ** 2))) - (1 - np.exp(-((t + 1) ** 2))), -1, 1
        )
        np.testing.assert_allclose(losses[0], 1 - np.exp(-((expected - 1) ** 2)), atol=0.02)


def test_wrong_hyperparameters_are_sentences():
    with pytest.raises(ValueError, match="sigma in"):
        jaxmtl.pmgda(0.0)
    with pytest.raises(ValueError, match="tolerance in"):
        jaxmtl.pmgda(tolerance=0.0)
