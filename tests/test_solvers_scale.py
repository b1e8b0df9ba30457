"""The solvers on many tasks and at the edges of their definition."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog

from jaxmtl import solvers
from jaxmtl.solvers.nonneg_qp import inverse_of, split
from tests.problems import WIDE_FIRST, some

KINDS = ("square", "wide", "rank_deficient", "decaying", "duplicate")


def unit_gramian(m, kind, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "square":
        rows = rng.standard_normal((m, m))
    elif kind == "rank_deficient":
        rows = rng.standard_normal((m, m // 4))
    elif kind == "decaying":
        rows = rng.standard_normal((m, m)) * np.logspace(0, -3, m)
    else:
        rows = rng.standard_normal((m, 2 * m))
        if kind == "duplicate":
            rows[m // 2 :] = rows[: m - m // 2]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def gap(matrix, linear, x):
    """Largest violation of the KKT conditions, computed in float64."""
    matrix, linear, x = (np.asarray(array, np.float64) for array in (matrix, linear, x))
    return np.abs(np.minimum(x, x @ matrix - linear)).max()


@functools.cache
def compiled(x64, **options):
    del x64
    return jax.jit(lambda q, b: solvers.nonneg_qp(q, b, **options))


def solve(matrix, linear, **options):
    return compiled(jax.config.jax_enable_x64, **options)(matrix, linear)


@WIDE_FIRST
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "m", [96, pytest.param(256, marks=pytest.mark.slow), pytest.param(512, marks=pytest.mark.slow)]
)
def test_many_tasks_solve_the_kkt_conditions(m, kind, precision):
    eps = float(jnp.finfo(precision).eps)
    matrix = jnp.asarray(unit_gramian(m, kind), precision)
    x, residual = solve(matrix, -matrix)
    # Decaying Gramians have a condition beyond 1 / eps of float32: their faces are then noise.
    bound = (100 if kind == "decaying" and precision == "float32" else 10) * m * eps
    assert bool(jnp.all(x >= 0))
    assert float(residual.max()) <= bound
    assert gap(matrix, -matrix, x) <= bound * max(1, float(x.max()))


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_many_tasks_agree_with_quadprog(kind, x64):
    m = 96
    matrix = unit_gramian(m, kind)
    x, _ = solve(jnp.asarray(matrix), jnp.asarray(-matrix))
    for i in range(0, m, 8):
        reference = quadprog.solve_qp(matrix, -matrix[i], np.eye(m), np.zeros(m))[0]
        np.testing.assert_allclose(x[i], reference, atol=1e-10)


@pytest.mark.parametrize("kind", some(["square", "rank_deficient"]))
def test_results_do_not_depend_on_the_chunk(kind, x64):
    """Without conjugate-gradient steps, every problem is the active-set method's."""
    matrix = jnp.asarray(unit_gramian(12, kind))
    whole = solve(matrix, -matrix, steps=0)
    for chunk_size in (1, 5):
        parts = solve(matrix, -matrix, steps=0, chunk_size=chunk_size)
        np.testing.assert_allclose(parts.value, whole.value, rtol=0, atol=1e-12)
        assert float(parts.residual.max()) <= 1e-13
    if kind == "square":
        np.testing.assert_allclose(whole.value, solve(matrix, -matrix).value, atol=1e-11)


@pytest.mark.parametrize("kind", ["square", "rank_deficient"])
def test_results_of_the_default_solver_do_not_depend_on_the_chunk(kind, x64):
    """With the steps that it takes by itself: the solutions, or their images where many are."""
    matrix = jnp.asarray(unit_gramian(40, kind))
    whole = solve(matrix, -matrix)
    for chunk_size in (1, 7, 32):
        parts = solve(matrix, -matrix, chunk_size=chunk_size)
        np.testing.assert_allclose(parts.value @ matrix, whole.value @ matrix, rtol=0, atol=1e-12)
        if kind == "square":
            np.testing.assert_allclose(parts.value, whole.value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("m", [16, 40, 96])
def test_an_inverse_by_blocks_of_columns(m, x64):
    """Of a nearly singular Gramian with 1 on its diagonal, which one block does not divide."""
    matrix = np.eye(m) + unit_gramian(m, "decaying")
    found = jax.jit(inverse_of)(jnp.asarray(matrix))
    np.testing.assert_allclose(found, np.linalg.inv(matrix), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_splitting_finds_nearly_all_zeros(kind, x64):
    m = 96
    matrix = unit_gramian(m, kind)
    allowed = np.arange(m)[:, None] != 5
    x = jax.jit(split)(jnp.asarray(matrix), jnp.asarray(-matrix), jnp.asarray(allowed))
    assert np.min(x) >= 0
    assert not np.any(x[5])
    wrong = []
    kept = np.delete(np.arange(m), 5)
    for i in range(0, m, 8):
        part = matrix[np.ix_(kept, kept)]
        identity, zero = np.eye(m - 1), np.zeros(m - 1)
        reference = quadprog.solve_qp(part, -matrix[i, kept], identity, zero)[0]
        wrong.append(np.sum((reference > 1e-9) != (np.asarray(x)[kept, i] > 0)))
    assert np.mean(wrong) <= 0.05 * m  # half of them are zero


def test_splitting_of_nothing_is_zero(x64):
    nothing = jnp.zeros((40, 40))
    assert not np.any(split(nothing, nothing, jnp.ones((40, 40), bool)))


def test_right_hand_sides_beyond_a_block_are_solved_alike(x64):
    """Columns are padded to whole blocks: 40 of 96 are solved as among all."""
    matrix = jnp.asarray(unit_gramian(96, "wide"))
    whole = solve(matrix, -matrix).value
    some = solve(matrix, -matrix[:40]).value
    np.testing.assert_allclose(some, whole[:40], atol=1e-12)


def test_blocks_return_problems_in_their_order(x64):
    """Easy, hard and mostly fixed problems rest at different times; Gramians in a batch too."""
    m, rng = 70, np.random.default_rng(3)
    grams = np.stack([unit_gramian(m, "wide"), unit_gramian(m, "square")])
    linear = rng.normal(size=(2, 100, m)) * 10.0 ** rng.integers(-6, 3, (2, 100, 1))
    linear[:, ::7] = -np.abs(linear[:, ::7])  # solved by zero
    linear[:, 5] = 0
    allowed = rng.random((2, 100, m)) < np.linspace(0.05, 1, 100)[:, None]

    def values(matrix, linear, allowed):
        found = solvers.nonneg_qp(matrix, linear, allowed=allowed)
        return found.value, found.residual

    x, residual = jax.jit(jax.vmap(values))(grams, linear, allowed)
    assert float(residual.max()) <= 1e-13
    for g, b, free, got in zip(grams, linear, allowed, x, strict=True):
        for first in (0, 30, 60, 70):  # 30 at a time are one block
            part = slice(first, first + 30)
            alone, _ = jax.jit(values)(g, b[part], free[part])
            np.testing.assert_allclose(got[part] @ g, alone @ g, atol=1e-10 * np.abs(b).max())


def test_default_chunk_bounds_the_memory(x64):
    m = 512
    shape = jax.ShapeDtypeStruct((m, m), jnp.float64)
    run = jax.jit(lambda q: solvers.nonneg_qp(q, -q)).lower(shape).compile()
    assert run.memory_analysis().temp_size_in_bytes <= 32e6


def test_batched_gramians_equal_single_ones(x64):
    grams = jnp.asarray([unit_gramian(8, kind, seed) for seed in range(13) for kind in KINDS][:64])
    batched = jax.jit(jax.vmap(lambda q: solvers.nonneg_qp(q, -q)))(grams)
    assert float(batched.residual.max()) <= 1e-13
    for q, x in zip(grams[:10], batched.value[:10], strict=True):
        # Minimisers of singular problems may differ; what they reach may not.
        np.testing.assert_allclose(x @ q, solve(q, -q).value @ q, atol=1e-11)


@pytest.mark.parametrize("exponent", [-900, -300, 300, 900])
def test_scale_of_the_right_hand_side_changes_no_digit(exponent, x64):
    matrix = jnp.asarray(unit_gramian(12, "wide"))
    plain, scaled = solve(matrix, -matrix), solve(matrix, jnp.ldexp(-matrix, exponent))
    np.testing.assert_array_equal(scaled.value, jnp.ldexp(plain.value, exponent))
    np.testing.assert_array_equal(scaled.residual, plain.residual)


UNBOUNDED = {
    "zero": ([[0.0, 0.0], [0.0, 0.0]], [1.0, 1.0]),
    "opposite": ([[1.0, -1.0], [-1.0, 1.0]], [1.0, 1.0]),
    "opposite and skew": ([[1.0, -1.0], [-1.0, 1.0]], [3.0, -1.0]),
    "beside a bounded part": ([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0.001] * 3),
    "cancelling three": (
        [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]],
        [0.5, 0.25, 0.125],
    ),
}


@pytest.mark.parametrize("name", list(UNBOUNDED))
@pytest.mark.parametrize("scale", some([1.0, 2.0**-70, 2.0**70]))
def test_unbounded_problems_have_an_infinite_residual(name, scale, precision):
    matrix, linear = (jnp.asarray(array, precision) for array in UNBOUNDED[name])
    # A bounded problem of the same matrix, in the same call, is none the worse for it.
    bounded = matrix @ jnp.ones_like(linear)
    value, residual = solve(matrix, jnp.stack([linear * scale, bounded, -linear]))
    assert np.isinf(residual[0])
    assert bool(jnp.all(jnp.isfinite(value)))
    assert float(residual[1]) <= 100 * float(jnp.finfo(precision).eps)


def test_bounded_problems_of_singular_matrices_are_not_taken_for_unbounded(precision):
    eps = float(jnp.finfo(precision).eps)
    for matrix, linear, expected in (
        ([[1.0, 1.0], [1.0, 1.0]], [1.0, 2.0], [0.0, 2.0]),
        ([[0.0, 0.0], [0.0, 1.0]], [-1.0, 3.0], [0.0, 3.0]),
        ([[1.0, -1.0], [-1.0, 1.0]], [-2.0, -1.0], [0.0, 0.0]),
    ):
        value, residual = solve(jnp.asarray(matrix, precision), jnp.asarray([linear], precision))
        assert float(residual[0]) <= 20 * eps
        np.testing.assert_allclose(value[0], expected, atol=20 * eps)


@pytest.mark.parametrize("flag", some(["jax_numpy_rank_promotion", "jax_enable_checks"]))
def test_strict_flags_of_jax(flag):
    gramian = jnp.asarray(unit_gramian(4, "wide"), jnp.float32)
    with contextlib.ExitStack() as stack:
        if flag == "jax_numpy_rank_promotion":
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        else:
            jax.config.update(flag, True)
            stack.callback(jax.config.update, flag, False)
        runs = (
            lambda g: solvers.project_dual_cone(g, jnp.eye(4)),
            lambda g: solvers.project_dual_cone(g, jnp.full(4, 0.25)),
            lambda g: solvers.min_norm(g),
            lambda g: solvers.worst_improvement(g, 0.5, jnp.full(4, 0.25)),
            lambda g: solvers.bargaining(g, 1.0),
            lambda g: solvers.nonneg_qp(g, -g, steps=0, start=jnp.eye(4), allowed=g > -2),
            lambda g: solvers.project_simplex(g[0]),
        )
        for run in runs:  # both flags speak when tracing
            jax.jit(run).lower(gramian)
        assert bool(jnp.all(jnp.isfinite(jax.jit(runs[0])(gramian).residual)))
