"""The linear program over the simplex against scipy, with degenerate and infeasible ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxmtl.solvers import linear_program
from tests.problems import WIDE_FIRST, some


def cases(n, k, seed):
    """A program, its condition rows scaled over 20 orders of magnitude on every other seed."""
    rng = np.random.default_rng(seed)
    cost, rows = rng.standard_normal(n), rng.standard_normal((k, n))
    inside = rng.dirichlet(np.ones(n))
    slack = np.where(rng.random(k) < 0.3, 0, rng.exponential(0.3, k))
    bounds = rows @ inside - slack
    if seed % 4 == 1:  # most likely infeasible
        bounds += 1.0
    if seed % 4 == 2:  # ties of the cost, whole numbers: degenerate vertices
        cost, rows = np.round(cost), np.round(rows)
        bounds = np.minimum(np.round(rows @ inside - 0.5), 0)
    if seed % 2:
        scales = np.ldexp(1.0, rng.integers(-30, 30, k))
        rows, bounds = rows * scales[:, None], bounds * scales
    return cost, rows, bounds


@WIDE_FIRST
@pytest.mark.parametrize(("n", "k"), some([(1, 2), (8, 9), (2, 3), (4, 5), (20, 21)], 2))
def test_the_optimum_is_that_of_scipy(n, k, precision):
    solve = jax.jit(jax.vmap(linear_program))
    programs = [cases(n, k, seed) for seed in range(40)]
    found = solve(*(jnp.asarray(np.stack(part), float) for part in zip(*programs, strict=True)))
    eps = jnp.finfo(found.value.dtype).eps
    feasible = []
    for i, (cost, rows, bounds) in enumerate(programs):
        scale = np.maximum(np.max(np.abs(rows), 1), 2.0**-40)
        expected = optimize.linprog(
            -cost, -rows / scale[:, None], -bounds / scale, np.ones((1, n)), [1], method="highs"
        )
        feasible.append(expected.status == 0)
        x = np.asarray(found.value[i], float)
        assert bool(found.feasible[i]) == feasible[-1]
        if feasible[-1]:
            size = np.max(np.abs(cost)) if np.any(cost) else 1
            assert found.residual[i] <= 2000 * n * eps
            np.testing.assert_allclose(cost @ x, -expected.fun, atol=4000 * n * eps * size)
            assert np.min(x) >= 0
            np.testing.assert_allclose(np.sum(x), 1, rtol=1000 * eps)
            assert np.min(((rows @ x) - bounds) / scale) >= -2000 * n * eps
    assert 10 <= sum(feasible) <= 39


def test_conditions_and_variables_can_be_taken_out(x64):
    cost, rows = jnp.array([3.0, 1.0, 2.0]), jnp.array([[0.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
    solve = jax.jit(linear_program)
    found = solve(cost, rows, jnp.array([0.25, -jnp.inf]))
    np.testing.assert_allclose(found.value, [0.75, 0.25, 0])
    found = solve(cost, rows, jnp.array([0.25, 0.0]))
    assert not bool(found.feasible)
    found = solve(cost, rows, jnp.array([0.25, -1.0]), allowed=jnp.array([False, True, True]))
    np.testing.assert_allclose(found.value, [0, 0.25, 0.75])


def test_a_vertex_of_many_ties_is_reached(x64):
    """All costs are equal, and all conditions meet in the only point."""
    n = 6
    rows = np.concatenate([np.eye(n), -np.eye(n), np.ones((1, n))])
    bounds = np.concatenate([np.full(n, 1 / n), np.full(n, -1 / n), [1.0]])
    found = jax.jit(linear_program)(jnp.zeros(n), jnp.asarray(rows), jnp.asarray(bounds))
    assert bool(found.feasible)
    np.testing.assert_allclose(found.value, 1 / n, rtol=1e-12)
