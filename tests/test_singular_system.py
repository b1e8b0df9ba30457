"""Singular values and left vectors from a Gramian, against eigenvalues in 120 decimal digits."""

import functools
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmtl import linalg
from jaxmtl.solvers import singular_system
from tests.problems import some

SIZES = [1, 4]


@functools.cache
def compiled(x64):
    del x64
    return jax.jit(singular_system)


def system(gramian, mask=None):
    m = len(gramian)
    mask = jnp.ones((m,), bool) if mask is None else jnp.asarray(mask)
    return compiled(jax.config.jax_enable_x64)(jnp.asarray(gramian), mask)


def exact(rows):
    """Singular values and left vectors by Jacobi's method on the exact Gramian."""
    with localcontext() as context:
        context.prec = 120
        rows = [[Decimal(float(x)) for x in row] for row in rows]
        m = len(rows)
        a = [[sum(x * y for x, y in zip(p, q, strict=True)) for q in rows] for p in rows]
        v = [[Decimal(int(i == j)) for j in range(m)] for i in range(m)]
        for _ in range(9):
            for p in range(m):
                for q in range(p + 1, m):
                    if a[p][q] == 0:
                        continue
                    theta = (a[q][q] - a[p][p]) / (2 * a[p][q])
                    t = (1 if theta >= 0 else -1) / (abs(theta) + (theta * theta + 1).sqrt())
                    c = 1 / (t * t + 1).sqrt()
                    s = t * c
                    for matrix in (a, v):  # columns of both, then the rows of a
                        for row in matrix:
                            row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
                    a[p], a[q] = (
                        [c * x - s * y for x, y in zip(a[p], a[q], strict=True)],
                        [s * x + c * y for x, y in zip(a[p], a[q], strict=True)],
                    )
        order = sorted(range(m), key=lambda i: -a[i][i])
        values = [float(abs(a[i][i]).sqrt()) for i in order]
        return np.array(values), np.array([[float(row[i]) for i in order] for row in v])


def aligned(values, vectors, shares):
    """Senushkin et al. 2023, algorithm 1, of a system of full rank."""
    return vectors @ (values[-1] / values * (vectors.T @ shares))


def well_conditioned(m, seed):
    rows = np.random.default_rng(seed).standard_normal((m, 2 * m + 1))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("decades", some([18, 0, 4]))
def test_small_values_are_as_accurate_as_large_ones(m, decades, precision):
    eps = float(jnp.finfo(precision).eps)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grading = 10.0 ** -rng.permutation(np.linspace(0, decades, m))
        rows = (well_conditioned(m, seed) * grading[:, None]).astype(precision)
        gramian, log2_scale = linalg.balanced_gramian(jnp.asarray(rows))
        found = system(gramian)
        values, vectors = exact(rows)
        values = values * 2.0 ** -int(log2_scale)
        rows = rows * 2.0 ** -int(log2_scale)
        np.testing.assert_allclose(found.values, values, rtol=40 * m * eps)
        assert found.residual < 10 * m * eps
        # The update of Aligned-MTL: each weight has the size of 1 / |g_i|.
        expected = rows.T.astype(float) @ aligned(values, vectors, np.full(m, 1 / m))
        weights = aligned(
            np.asarray(found.values, float), np.asarray(found.vectors, float), np.full(m, 1 / m)
        )
        gap = np.linalg.norm(rows.T.astype(float) @ weights - expected)
        assert gap < 60 * m * eps * np.linalg.norm(expected)


def test_the_update_of_two_orthogonal_rows_in_float32():
    rows = jnp.array([[1.0, 0.0], [0.0, 4e-4]])
    found = system(rows @ rows.T)
    np.testing.assert_allclose(found.values, [1, 4e-4], rtol=1e-6)
    update = rows.T @ aligned(found.values, found.vectors, jnp.full(2, 0.5))
    np.testing.assert_allclose(update, [2e-4, 2e-4], rtol=1e-6)


@pytest.mark.parametrize("m", [33])
def test_many_tasks(m, precision):
    eps = float(jnp.finfo(precision).eps)
    for seed, decades in enumerate((0, 2)):
        rows = well_conditioned(m, seed) * np.logspace(0, -decades, m)[:, None]
        rows = rows.astype(precision)
        found = system(jnp.matmul(rows, rows.T, precision="highest"))
        left, values, _ = np.linalg.svd(rows.astype(float), full_matrices=False)
        # The reference is good to eps of the largest value only.
        np.testing.assert_allclose(
            found.values, values, rtol=4 * m * eps, atol=10 * np.finfo(float).eps
        )
        assert found.residual < 10 * m * eps
        gramian = rows.astype(float) @ rows.astype(float).T
        vectors = np.asarray(found.vectors, float)
        rebuilt = (vectors * np.asarray(found.values, float) ** 2) @ vectors.T
        assert np.abs(rebuilt - gramian).max() < 20 * m * eps
        assert np.abs(vectors.T @ vectors - np.eye(m)).max() < 10 * m * eps
        assert left.shape == vectors.shape


def test_dependent_rows(precision):
    eps = float(jnp.finfo(precision).eps)
    a, b = well_conditioned(2, 0)
    cases = {
        "duplicate": ([a, 3 * a, b], 2),
        "rank one": ([a, -2 * a, 1e-4 * a, 1e4 * a], 1),
        "sum": ([a, b, a - b / 7], 2),
        "zero row": ([a, 0 * a, b], 2),
        "all zero": ([0 * a, 0 * a], 0),
    }
    for rows, rank in cases.values():
        rows = np.array(rows).astype(precision)
        found = system(jnp.matmul(rows, rows.T, precision="highest"))
        assert np.count_nonzero(found.values) == rank
        assert np.all(np.diff(found.values) <= 0)
        values = np.linalg.svd(rows.astype(float), compute_uv=False)[:rank]
        np.testing.assert_allclose(found.values[:rank], values, rtol=100 * eps)
        vectors = np.asarray(found.vectors, float)
        np.testing.assert_array_equal(vectors[:, rank:], 0)
        np.testing.assert_allclose(
            vectors.T @ vectors, np.diag(np.arange(len(rows)) < rank), atol=20 * eps
        )
        np.testing.assert_array_equal(vectors[np.all(rows == 0, axis=1)], 0)


def test_a_row_that_differs_by_less_than_rounding_counts_as_dependent():
    a = jnp.array([1.0, 0.0])
    for angle, rank in ((3e-4, 1), (1e-2, 2)):
        rows = jnp.stack([a, jnp.array([np.cos(angle), np.sin(angle)], jnp.float32)])
        assert jnp.sum(system(rows @ rows.T).values > 0) == rank


def test_absent_tasks_are_left_out(precision):
    eps = float(jnp.finfo(precision).eps)
    rows = well_conditioned(3, 1)
    gramian = jnp.asarray(rows @ rows.T, precision)
    poisoned = gramian.at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    found = system(poisoned, [True, False, True])
    pair = system(gramian[jnp.ix_(jnp.array([0, 2]), jnp.array([0, 2]))])
    np.testing.assert_allclose(found.values[:2], pair.values, rtol=4 * eps)
    assert found.values[2] == 0
    np.testing.assert_array_equal(found.vectors[1], 0)
    assert jnp.all(system(poisoned, [False, False, False]).values == 0)


def test_powers_of_two_change_no_bit(precision):
    rows = well_conditioned(5, 2) * np.logspace(0, -3, 5)[:, None]
    gramian = jnp.asarray(rows @ rows.T, precision)
    reference = system(gramian)
    for k in (-40, -7, 40) if precision == "float32" else (-60, 60):
        found = system(gramian * 4.0**k)
        np.testing.assert_array_equal(found.values, reference.values * 2.0**k)
        np.testing.assert_array_equal(found.vectors, reference.vectors)


def test_batches():
    rows = np.stack([well_conditioned(3, s) * np.array([[1], [1e-3], [1]]) for s in range(4)])
    gramians = jnp.einsum("bin,bjn->bij", rows, rows, precision="highest").astype(jnp.float32)
    batched = jax.jit(jax.vmap(singular_system))(gramians)
    for i, gramian in enumerate(gramians):
        one = system(gramian)
        np.testing.assert_allclose(batched.values[i], one.values, rtol=1e-6)
