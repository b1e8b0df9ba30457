"""PCD against TorchJD's recorded steps, a solver of quadratic programs and worked-out cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadprog

import jaxmtl
from tests.problems import WIDE_FIRST, some


def problem(steps=4):
    rng = np.random.default_rng(5)
    rows = np.round(rng.standard_normal((4, 4, 6)) * 8) / 8
    rows[:, 1:] -= 0.75 * rows[:, :1]
    rows[2, 0] *= 4
    return np.round(rows * 16)[:steps] / 16


# torchjd 0.18.0, PCD(tau, beta=0.9, eps=1e-3) in float64 on the four matrices of `problem`.
RECORDED = {
    0.02: [
        [-1.446916947, -0.479653475, -0.354162292, -0.208264127, 0.658868802, -1.005460550],
        [-1.024781490, -0.191214892, -1.302196282, -1.208527157, -0.523502249, 0.328560665],
        [4.464452586, 2.066958266, 4.655528851, -3.711783458, 2.241596984, 1.679376158],
        [-0.724838375, -0.143512768, -0.876652621, -1.470038686, -0.627872376, -1.537735718],
    ],
    (0.5, 0.0, 0.25): [
        [-1.084472414, -0.343271687, 0.134462178, 0.648477239, 0.178004051, -1.474210258],
        [-1.637237066, -0.045898969, -0.226243837, -0.571346760, -1.214499988, -0.299523722],
        [2.660539480, -0.100134734, 5.429893052, -0.437171308, 3.708038133, 4.121540805],
        [0.993769642, 0.538341862, -1.619619178, -1.343136783, -0.005744641, -0.727852485],
    ],
}


def run(aggregator, matrices, **extra):
    """The updates of a sequence of Jacobians, compiled once."""
    params = jnp.zeros(matrices.shape[-1])

    def step(state, jacobian):
        update, state = aggregator.update(jacobian, state, params, **extra)
        return state, update

    return jax.jit(lambda x: jax.lax.scan(step, aggregator.init(params), x))(jnp.asarray(matrices))


@pytest.mark.parametrize("tau", some([(tau,) for tau in RECORDED]), ids=str)
def test_a_sequence_of_steps_is_that_of_torchjd(tau, precision):
    shares = jnp.asarray(tau) if isinstance(tau, tuple) else tau
    aggregator = jaxmtl.pcd(shares, beta=0.9, eps=1e-3, num_tasks=4)
    _, updates = run(aggregator, problem())
    atol = 2e-9 if precision == "float64" else 2e-5
    np.testing.assert_allclose(updates, RECORDED[tau], rtol=0, atol=atol)


def reference(jacobian, tau, norms):
    """One step by quadprog, in coordinates: rows divided by the running norms."""
    rows = jacobian / norms[:, None]
    bounds = tau * np.sum(rows[1:] ** 2, 1)
    d = quadprog.solve_qp(np.eye(rows.shape[1]), rows[0], rows[1:].T, bounds)[0]
    return d * np.linalg.norm(jacobian[0]) / np.linalg.norm(d)


@pytest.mark.parametrize("kind", some(["imbalanced", "generic", "duplicate"]))
def test_one_step_is_the_quadratic_program(kind, x64):
    step = jax.jit(lambda x: jaxmtl.pcd(0.3, eps=0.0, num_tasks=5).update(x, start, params)[0])
    params = jnp.zeros(9)
    start = jaxmtl.pcd(0.3, num_tasks=5).init(params)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        jacobian = rng.standard_normal((5, 9))
        jacobian -= 0.7 * jacobian.mean(0)
        if kind == "imbalanced":
            jacobian *= np.array([1.0, 2.0**-13, 2.0**13, 1.0, 2.0**-30])[:, None]
        elif kind == "duplicate":
            jacobian[2] = jacobian[1]
        norms = np.linalg.norm(jacobian, axis=1)
        expected = reference(jacobian, 0.3, norms)
        # In floating point, the conditions of duplicates are as good as one.
        np.testing.assert_allclose(step(jacobian), expected, rtol=1e-9, atol=1e-9 * norms[0])


def test_running_means_enter_the_program(x64):
    """The third step, with v = (beta^2 (1-beta) n0^2 + ...) / (1 - beta^3) by hand."""
    matrices, beta, eps = problem(3), 0.9, 0.25
    state, updates = run(jaxmtl.pcd(0.1, beta=beta, eps=eps, num_tasks=4), matrices)
    squares = np.sum(matrices**2, -1)
    weights = (1 - beta) * beta ** np.arange(2, -1, -1) / (1 - beta**3)
    mean = weights @ squares
    np.testing.assert_allclose(state.inner.norms, np.sqrt(mean), rtol=1e-12)
    np.testing.assert_array_equal(state.inner.mtl_steps, 3)
    expected = reference(matrices[2], 0.1, np.sqrt(mean + eps))
    np.testing.assert_allclose(updates[2], expected, rtol=1e-9)


@WIDE_FIRST
def test_without_eps_powers_of_two_change_nothing(precision):
    aggregator = jaxmtl.pcd(0.1, eps=0.0, num_tasks=4)
    params = jnp.zeros(6)
    scan = jax.jit(
        lambda x: jax.lax.scan(
            lambda state, j: aggregator.update(j, state, params)[::-1], aggregator.init(params), x
        )
    )
    state, updates = scan(jnp.asarray(problem()))
    for k in (-60, 40) if precision == "float32" else (-300, 300):
        scaled_state, scaled = scan(jnp.asarray(np.ldexp(problem(), k)))
        np.testing.assert_array_equal(scaled, np.ldexp(np.asarray(updates), k))
        np.testing.assert_array_equal(scaled_state.mtl_weights, state.mtl_weights)
    # A constant factor on a secondary task alone.
    factors = np.array([1.0, 2.0**-20, 8.0, 1.0])[:, None]
    np.testing.assert_allclose(
        scan(jnp.asarray(problem() * factors))[1],
        updates,
        rtol=1e-4 if precision == "float32" else 1e-10,
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # g_1 already gives the others their share: alone.
        ([[2, 0, 0], [3, 4, 0], [4, 0, 3]], [2, 0, 0]),
        # Opposite secondaries cannot both progress: g_1.
        ([[0, 3, 0], [1, 0, 0], [-2, 0, 0]], [0, 3, 0]),
        # The condition of the third row is met by d = u_1 + mu u_3.
        ([[0, 4, 0], [0, 0, 0], [0, -1, 0]], [0, -4, 0]),
        # No primary gradient.
        ([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [0, 0, 0]),
    ],
)
@WIDE_FIRST
def test_worked_out_cases(rows, expected, precision):
    _, updates = run(jaxmtl.pcd(0.25, num_tasks=3), np.array([rows], float))
    np.testing.assert_allclose(updates[0], expected, rtol=1e-5, atol=1e-5)


@WIDE_FIRST
def test_no_share_and_an_opposite_gradient_give_zero(precision):
    rows = np.array([[[0.3, -0.7], [-0.6, 1.4]]])
    np.testing.assert_array_equal(run(jaxmtl.pcd(0.0, num_tasks=2), rows)[1], 0)


def test_without_the_primary_task_nothing_moves(x64):
    mask = jnp.array([False, True, True, True])
    state, updates = run(jaxmtl.pcd(num_tasks=4), problem(2), task_mask=mask)
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(state.inner.mtl_steps, [0, 2, 2, 2])


def test_wrong_hyperparameters_are_sentences():
    with pytest.raises(ValueError, match="tau in"):
        jaxmtl.pcd(1.5, num_tasks=3)
    with pytest.raises(ValueError, match=r"tau of shape \(2,\)"):
        jaxmtl.pcd(jnp.ones(3), num_tasks=3)
    with pytest.raises(ValueError, match="beta in"):
        jaxmtl.pcd(beta=1.0, num_tasks=3)
