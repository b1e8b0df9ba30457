"""The solvers against independent ones, on matrices by class, in float64 and float32."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmtl import solvers
from tests.problems import WIDE_FIRST

KINDS = ("generic", "conflict", "rank_deficient", "duplicate", "stationary", "imbalanced", "ill")


def jacobian_of(m, kind, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((m, 2 * m))
    if kind == "conflict":
        matrix -= 0.9 * matrix.mean(0)
    elif kind == "rank_deficient":
        matrix = rng.standard_normal((m, max(m // 3, 1))) @ matrix[: max(m // 3, 1)]
    elif kind == "duplicate":
        matrix[m // 2 :] = matrix[: m - m // 2]
    elif kind == "stationary":
        matrix[-1] = -matrix[:-1].sum(0)
    elif kind == "imbalanced":
        matrix *= 2.0 ** rng.integers(-13, 14, (m, 1))
    elif kind == "ill":
        matrix = rng.standard_normal((m, m)) @ np.diag(np.logspace(0, -6, m)) @ matrix
    return matrix


def quadprog_dual_cone(gram, lower):
    """The same problem by Goldfarb and Idnani's method, on unit rows."""
    norms = np.sqrt(np.diag(gram))
    unit = gram / norms[:, None] / norms + 1e-13 * np.eye(len(gram))
    x = quadprog.solve_qp(unit, np.zeros(len(gram)), np.eye(len(gram)), lower * norms)[0]
    return x / norms


@functools.cache
def compiled(name, x64):
    del x64
    return jax.jit(getattr(solvers, name))


def call(name, *args):
    return compiled(name, jax.config.jax_enable_x64)(*args)


@WIDE_FIRST
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [3, 8])
def test_dual_cone_solves_the_kkt_conditions(m, kind, precision):
    eps = float(jnp.finfo(precision).eps)
    matrix = jacobian_of(m, kind)
    gram = jnp.asarray(matrix @ matrix.T, float)
    lower = jnp.eye(m)
    value, residual = call("project_dual_cone", gram, lower)
    assert value.shape == (m, m)
    assert residual.shape == (m,)
    assert float(residual.max()) <= 100 * m * eps
    assert bool(jnp.all(value >= lower))
    if precision == "float64":
        gap = matrix.T @ (
            np.asarray(value).T
            - np.stack([quadprog_dual_cone(np.asarray(gram), e) for e in np.eye(m)], axis=1)
        )
        # The ridge that quadprog needs for singular matrices bounds the comparison.
        scale = np.linalg.norm(matrix, axis=1).max()
        assert np.abs(gap).max() <= 1e-6 * scale


@WIDE_FIRST
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 3, 8])
def test_min_norm_is_the_nearest_point_of_the_hull(m, kind, precision):
    eps = float(jnp.finfo(precision).eps)
    matrix = jacobian_of(m, kind)
    gram = jnp.asarray(matrix @ matrix.T, float)
    weights, residual = call("min_norm", gram)
    assert float(residual) <= 100 * m * eps
    assert bool(jnp.all(weights >= 0))
    np.testing.assert_allclose(float(jnp.sum(weights)), 1, rtol=10 * m * eps)
    if precision == "float64":
        # g_i . g >= |g|^2 for every i, with equality where the weight is positive.
        point = matrix.T @ np.asarray(weights)
        slack = matrix @ point - point @ point
        bound = 1e-12 * np.linalg.norm(matrix, axis=1) * np.linalg.norm(matrix, axis=1).max()
        assert np.all(slack >= -bound)
        assert np.all(np.abs(slack[np.asarray(weights) > 0]) <= bound[np.asarray(weights) > 0])


@pytest.mark.parametrize("kind", ["generic", "conflict", "imbalanced"])
def test_cagrad_maximises_the_worst_improvement(kind, x64):
    m = 4
    matrix = jacobian_of(m, kind)
    mean = matrix.mean(0)
    for c in (0.0, 0.1, 0.5, 0.9):
        weights, residual = call(
            "worst_improvement", jnp.asarray(matrix @ matrix.T), c, jnp.full(m, 1 / m)
        )
        d = matrix.T @ np.asarray(weights)
        assert float(residual) <= 1e-12
        assert np.linalg.norm(d - mean) <= c * np.linalg.norm(mean) * (1 + 1e-12) + 1e-14
        # Duality: the dual value a^T w + c |g0| |g_w| bounds the primal from above and meets it.
        step = np.maximum(np.asarray(weights) - 1 / m, 0)
        if c > 0 and step.sum() > 0:
            w = step / step.sum()
            dual = matrix @ mean @ w + c * np.linalg.norm(mean) * np.linalg.norm(matrix.T @ w)
            primal = np.min(matrix @ d)
            np.testing.assert_allclose(primal, dual, rtol=1e-9, atol=1e-12)


def test_cagrad_at_stationary_points_projects_the_mean(x64):
    matrix = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    weights, _ = call("worst_improvement", jnp.asarray(matrix @ matrix.T), 0.5, jnp.full(3, 1 / 3))
    np.testing.assert_allclose(matrix.T @ np.asarray(weights), [0, 1 / 3], atol=1e-12)


@pytest.mark.parametrize("p", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["generic", "rank_deficient", "imbalanced"])
def test_bargaining_equations_hold(kind, p, x64):
    matrix = np.abs(jacobian_of(5, kind))
    gram = matrix @ matrix.T
    w, residual = call("bargaining", jnp.asarray(gram), p)
    w = np.asarray(w)
    assert np.all(w > 0)
    assert float(residual) <= 1e-10
    np.testing.assert_allclose(gram @ w, w**-p, rtol=1e-9)


def test_bargaining_at_a_stationary_point_is_the_stated_limit(precision):
    """Opposite gradients gain nothing; the third bargains over what is orthogonal to them."""
    matrix = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0]])
    w, _ = call("bargaining", jnp.asarray(matrix @ matrix.T, float), 1.0)
    update = matrix.T @ np.asarray(w, np.float64)
    tolerance = 1e-6 if precision == "float64" else 2e-2
    np.testing.assert_allclose(update, [0, 1], atol=tolerance)


def test_simplex_projection(x64):
    rng = np.random.default_rng(0)
    project = jax.jit(solvers.project_simplex)
    for scale in (1e-3, 1, 1e3):
        x = scale * rng.standard_normal(6)
        mine = np.asarray(project(jnp.asarray(x)))
        qp = quadprog.solve_qp(
            np.eye(6), x, np.vstack([np.ones(6), np.eye(6)]).T, np.r_[1.0, np.zeros(6)], meq=1
        )[0]
        np.testing.assert_allclose(mine, qp, atol=1e-12 * max(1, scale))
    mask = jnp.array([True, False, True, True, False, True])
    masked = np.asarray(project(jnp.asarray(x), mask))
    np.testing.assert_allclose(masked[np.asarray(mask)], project(jnp.asarray(x)[mask]), atol=1e-12)
    assert np.all(masked[~np.asarray(mask)] == 0)


def test_second_opinion_of_jaxopt(x64):
    """Well-conditioned problems, where first-order solvers converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt
    matrix = jacobian_of(6, "generic")
    gram = jnp.asarray(matrix @ matrix.T)
    objective = lambda w: 0.5 * w @ gram @ w  # noqa: E731
    descent = jaxopt.ProjectedGradient(
        objective, jaxopt.projection.projection_simplex, maxiter=5000, tol=1e-12
    )
    w = descent.run(jnp.full(6, 1 / 6)).params
    np.testing.assert_allclose(call("min_norm", gram).value, w, atol=1e-7)
    lower = jnp.full(6, 1 / 6)
    box = jaxopt.BoxCDQP(maxiter=5000, tol=1e-12)
    v = box.run(
        lower, params_obj=(gram, jnp.zeros(6)), params_ineq=(lower, jnp.full(6, 1e3))
    ).params
    np.testing.assert_allclose(call("project_dual_cone", gram, lower).value, v, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(KINDS),
    exponent=st.integers(-20, 20),
    zero=st.integers(0, 7),
)
def test_any_gramian_has_a_certified_solution(seed, kind, exponent, zero):
    with jax.enable_x64(True):
        matrix = jacobian_of(8, kind, seed) * 2.0**exponent
        matrix[zero] = 0 if zero % 2 else matrix[zero]
        gram = jnp.asarray(matrix @ matrix.T)
        value, residual = call("project_dual_cone", gram, jnp.eye(8))
        assert float(residual.max()) <= 1e-11
        update = matrix.T @ np.asarray(value.mean(0))
        norms = np.linalg.norm(matrix, axis=1) * np.linalg.norm(update)
        cosines = matrix @ update / np.where(norms > 0, norms, 1)
        # Where everything cancels, the direction is rounding.
        if np.linalg.norm(update) > 1e-7 * np.linalg.norm(matrix, axis=1).max():
            assert cosines.min() >= -1e-7
        _, residual = call("min_norm", gram)
        assert float(residual) <= 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("m", [16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_large_problems(m, kind, precision):
    for seed in range(3):
        matrix = jacobian_of(m, kind, seed)
        gram = jnp.asarray(matrix @ matrix.T, float)
        bound = 1000 * m * float(jnp.finfo(precision).eps)
        assert float(call("project_dual_cone", gram, jnp.eye(m)).residual.max()) <= bound
        assert float(call("min_norm", gram).residual) <= bound
