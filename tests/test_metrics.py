"""Diagnostics against their definitions on the Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmtl import metrics

JACOBIAN = np.array([[3.0, 4.0, 0.0], [0.0, -2.0, 0.0], [1.0, 0.0, 1.0]])
GRAMIAN = jnp.asarray(JACOBIAN @ JACOBIAN.T)


@pytest.mark.parametrize("scale", [1.0, 2.0**-30])
def test_of_the_gramian(precision, scale):
    gramian = jnp.asarray(JACOBIAN @ JACOBIAN.T * scale**2)
    norms = np.linalg.norm(JACOBIAN, axis=1)
    tolerance = 1e-5 if precision == "float32" else 1e-12
    close = {"rtol": tolerance, "atol": tolerance}
    cosines = JACOBIAN @ JACOBIAN.T / np.outer(norms, norms)
    np.testing.assert_allclose(metrics.cosine_similarities(gramian), cosines, **close)
    similarity = 2 * np.outer(norms, norms) / np.add.outer(norms**2, norms**2)
    np.testing.assert_allclose(metrics.gradient_magnitude_similarity(gramian), similarity, **close)
    np.testing.assert_allclose(metrics.conflict_rate(gramian), 1 / 3, **close)
    singular = np.linalg.svd(JACOBIAN, compute_uv=False)
    np.testing.assert_allclose(
        metrics.condition_number(gramian), singular[0] / singular[-1], rtol=10 * tolerance
    )
    np.testing.assert_allclose(metrics.norm_ratio(gramian), norms.max() / norms.min(), rtol=1e-6)


def test_condition_beyond_the_root_of_epsilon(precision):
    """An eigenvalue below the machine epsilon is no rounding where it comes from a short row."""
    ratio = 1e-6 if precision == "float32" else 1e-12
    rows = np.array([[3.0, 4.0], [0.0, ratio]])
    gramian = jnp.asarray(rows @ rows.T)
    # Of a 2 x 2 matrix: |det| is the product of its singular values, and the larger is |g_1|.
    expected = 5 / (3 * ratio / 5)
    rtol = 1e-5 if precision == "float32" else 1e-11
    np.testing.assert_allclose(metrics.condition_number(gramian), expected, rtol=rtol)
    np.testing.assert_allclose(metrics.norm_ratio(gramian), 5 / ratio, rtol=rtol)


def test_condition_of_dependent_gradients(precision):
    rows = JACOBIAN[[0, 1, 0]]
    gramian = jnp.asarray(rows @ rows.T)
    singular = np.linalg.svd(rows, compute_uv=False)
    assert metrics.condition_number(gramian) == np.inf
    np.testing.assert_allclose(
        metrics.condition_number(gramian, nonzero=True), singular[0] / singular[1], rtol=1e-5
    )
    with_zero = jnp.asarray(np.diag([4.0, 0.0, 9.0]))
    assert metrics.condition_number(with_zero) == np.inf
    np.testing.assert_allclose(metrics.condition_number(with_zero, nonzero=True), 1.5, rtol=1e-6)
    assert metrics.norm_ratio(with_zero) == np.inf


def test_balanced_rows(precision):
    tolerance = 1e-5 if precision == "float32" else 1e-12
    gramian = jnp.asarray(GRAMIAN, float)
    weights = jnp.array([0.5, 2.0, 0.0])
    rows = np.asarray(weights)[:, None] * JACOBIAN
    np.testing.assert_allclose(
        metrics.balanced_gramian(gramian, weights), rows @ rows.T, rtol=tolerance, atol=tolerance
    )
    coefficients = metrics.aligned_coefficients(gramian)
    left, singular, right = np.linalg.svd(JACOBIAN, full_matrices=False)
    aligned = singular[-1] * left @ right  # Senushkin et al. 2023, eq. 5
    np.testing.assert_allclose(np.asarray(coefficients) @ JACOBIAN, aligned, atol=30 * tolerance)
    system = metrics.balanced_gramian(gramian, coefficients)
    np.testing.assert_allclose(system, singular[-1] ** 2 * np.eye(3), atol=30 * tolerance)
    np.testing.assert_allclose(metrics.condition_number(system), 1, rtol=30 * tolerance)
    with pytest.raises(ValueError, match="coefficients"):
        metrics.balanced_gramian(gramian, jnp.ones(2))


def test_pareto_stationarity(precision):
    tolerance = 1e-5 if precision == "float32" else 1e-12
    two = jnp.diag(jnp.array([1.0, 4.0])) * 2.0**-40
    # The least norm between two orthogonal gradients a and b is ab / sqrt(a^2 + b^2).
    np.testing.assert_allclose(
        metrics.pareto_stationarity(two), 2 / np.sqrt(5) * 2.0**-20, rtol=tolerance
    )
    opposite = jnp.array([[1.0, -2.0], [-2.0, 4.0]])
    np.testing.assert_allclose(metrics.pareto_stationarity(opposite), 0, atol=1e-3)


def test_edges():
    zero = jnp.zeros((2, 2))
    np.testing.assert_array_equal(metrics.cosine_similarities(zero), np.eye(2))
    np.testing.assert_array_equal(metrics.gradient_magnitude_similarity(zero), np.ones((2, 2)))
    assert metrics.condition_number(zero) == np.inf
    assert metrics.condition_number(zero, nonzero=True) == 1
    assert metrics.norm_ratio(zero) == 1
    np.testing.assert_array_equal(metrics.aligned_coefficients(zero), zero)
    assert metrics.condition_number(jnp.ones((2, 2))) == np.inf
    assert metrics.pareto_stationarity(zero) == 0
    assert metrics.conflict_rate(jnp.ones((1, 1))) == 0


def test_absent_tasks_are_left_out():
    mask = jnp.array([True, False, True])
    gramian = GRAMIAN.at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    two = GRAMIAN[jnp.ix_(jnp.array([0, 2]), jnp.array([0, 2]))]
    for metric in (
        metrics.conflict_rate,
        metrics.condition_number,
        metrics.norm_ratio,
        metrics.pareto_stationarity,
    ):
        np.testing.assert_allclose(metric(gramian, mask), metric(two), rtol=1e-5)


def test_multi_gradient_bias():
    samples = {"a": jnp.array([[1.0, 0.0], [3.0, 0.0]]), "b": jnp.array([4.0, 6.0])}
    reference = {"a": jnp.array([2.0, 3.0]), "b": jnp.array(1.0)}
    assert jax.jit(metrics.multi_gradient_bias)(samples, reference) == 5


# Xiao et al. 2025, table 1: mIoU, pixel accuracy, absolute and relative error on Cityscapes.
SINGLE = [74.01, 93.16, 0.0125, 27.77]
TABLE = {
    "LS": ([75.18, 93.49, 0.0155, 46.77], 22.60),
    "UW": ([72.02, 92.85, 0.0140, 30.13], 5.89),
    "FAMO": ([74.54, 93.29, 0.0145, 32.59], 8.13),
}


@pytest.mark.parametrize("row", TABLE)
def test_delta_m_of_published_tables(row):
    values, expected = TABLE[row]
    higher = jnp.array([True, True, False, False])
    result = metrics.delta_m(jnp.array(values), jnp.array(SINGLE), higher)
    np.testing.assert_allclose(result, expected, atol=0.03)  # the table's own rounding


def test_delta_m_within_tasks():
    values, baselines = jnp.array([90.0, 2.0, 3.0]), jnp.array([100.0, 1.0, 2.0])
    higher = jnp.array([True, False, False])

    def delta(reduce):
        return jax.jit(
            lambda v: metrics.delta_m(v, baselines, higher, tasks=[0, 1, 1], reduce=reduce)
        )(values)

    np.testing.assert_allclose(delta("none"), [10, 100, 50])
    np.testing.assert_allclose(delta("task"), [10, 75])
    np.testing.assert_allclose(delta("mean"), 42.5)
    worse = metrics.delta_m(jnp.array([-2.0]), jnp.array([-1.0]), jnp.array([True]))
    assert worse == 100
    with pytest.raises(ValueError, match="shape"):
        metrics.delta_m(values, baselines[:2], higher)
    with pytest.raises(ValueError, match="reduce"):
        metrics.delta_m(values, baselines, higher, reduce="task")
