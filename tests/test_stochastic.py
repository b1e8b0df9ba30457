"""Rules against gradient noise: exact sequences, and algorithms unrolled in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import training_steps
from jaxmtl.rules.db_mtl import db_mtl
from jaxmtl.rules.excess_mtl import excess_mtl
from jaxmtl.rules.mgda import mgda
from jaxmtl.rules.moco import moco
from jaxmtl.rules.modo import modo
from jaxmtl.rules.sdmgrad import sdmgrad
from jaxmtl.transforms.track_gradients import track_gradients
from tests.golden_sequences import names, sequences
from tests.problems import some

pytestmark = pytest.mark.usefixtures("x64")
ROWS = np.random.default_rng(0).standard_normal((4, 3, 5))
LOSSES = np.random.default_rng(1).uniform(0.5, 2, (4, 3))
PARAMS = np.zeros(5)


def project(x):
    u = np.sort(x)[::-1]
    excess = (np.cumsum(u) - 1) / np.arange(1, x.size + 1)
    return np.maximum(x - excess[np.nonzero(u > excess)[0][-1]], 0)


def run(aggregator, rows=ROWS, **inputs):
    """Updates and states of a scan over the steps."""

    def step(state, inputs):
        jacobian, extra = inputs
        update, state = aggregator.update(jacobian, state, jnp.asarray(PARAMS), **extra)
        return state, (update, state)

    start = aggregator.init(jnp.asarray(PARAMS))
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    return jax.jit(lambda x: jax.lax.scan(step, start, x)[1])((jnp.asarray(rows), inputs))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("MoDo_g0.1_r0.1", lambda m: modo(0.1, rho=0.1, num_tasks=m)),
        ("SDMGrad_default", lambda m: sdmgrad(form="code", num_tasks=m)),
    ],
)
def test_sequences_of_double_sampling(name, make):
    data = sequences()
    for key in names("J"):
        rows, others = data[f"{key}/J"], data[f"{key}/J2"]
        # A step of 10 times the curvature never settles: at m = 8 rounding of 1e-16 has grown to
        # 1e-7 at the fourth call and to 0.7 at the sixth, in 80-bit arithmetic too.
        calls = 2 if rows.shape[1] == 8 and name == "SDMGrad_default" else 8
        weighting = make(rows.shape[1]).weighting

        def step(state, cross, weighting=weighting):
            weights, state = weighting.update(jnp.eye(cross.shape[0]), state, cross_gramian=cross)
            return state, weights

        cross = jnp.asarray(rows @ np.swapaxes(others, 1, 2))[:calls]
        weights = jax.jit(lambda x: jax.lax.scan(step, weighting.init(), x)[1])(cross)  # noqa: B023
        np.testing.assert_allclose(weights, data[f"{key}/{name}/w"][:calls], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "step_size", "warmup"), [("ExcessMTL_s1", 1.0, 0), ("ExcessMTL_s0.01_w2", 0.01, 2)]
)
def test_sequences_of_excess_risks(name, step_size, warmup):
    data = sequences()
    for key in names("J"):
        rows = data[f"{key}/J"]
        params = jnp.zeros(rows.shape[2])
        rule = excess_mtl(step_size, num_tasks=rows.shape[1], warmup_steps=warmup)

        def step(state, jacobian, rule=rule, params=params):
            _, state = rule.update(jacobian, state, params)
            return state, state.inner.mtl_weights

        scan = jax.jit(lambda x: jax.lax.scan(step, rule.init(params), x)[1])  # noqa: B023
        weights = scan(jnp.asarray(rows))
        np.testing.assert_allclose(weights, data[f"{key}/{name}/w"], rtol=0, atol=1e-10)


def test_excess_mtl_official_form():
    """The first call only sets the baseline, and weights sum to m (LibMTL)."""
    _, states = run(excess_mtl(0.5, num_tasks=3, total="tasks"))
    w, total, initial = np.ones(3), np.zeros((3, 5)), None
    for t in range(4):
        total += ROWS[t] ** 2
        e = (ROWS[t] ** 2 / np.sqrt(total + 1e-7)).sum(1)
        if initial is None:
            initial = e
        else:
            w = w * np.exp(0.5 * e / initial)
            w = 3 * w / w.sum()
        np.testing.assert_allclose(states.inner.mtl_weights[t], w, rtol=1e-5)


@pytest.mark.parametrize("initial", ["zeros", "first"])
def test_tracking(initial):
    bound = np.array([0.5, 9.0, 1.0])

    def beta(k):
        return 0.5 / jnp.sqrt(k)

    tracked, _ = run(track_gradients(beta, num_tasks=3, initial=initial, max_norm=bound))
    y = ROWS[0] if initial == "first" else np.zeros((3, 5))
    for t in range(4):
        y = y - 0.5 / np.sqrt(t + 1) * (y - ROWS[t])
        y = y * np.minimum(1, bound / np.linalg.norm(y, axis=1))[:, None]
        np.testing.assert_allclose(tracked[t], y, rtol=1e-12)


@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("projection", ["simplex", "softmax"])
@pytest.mark.parametrize("normalise", [None, "norm_loss"])
def test_moco(order, projection, normalise):
    rule = moco(
        num_tasks=3,
        beta=lambda k: 0.9 / k,
        gamma=lambda k: 0.3 / jnp.sqrt(k),
        rho=0.1,
        order=order,
        projection=projection,
        initial="first" if order == "paper" else "zeros",
        normalize=normalise,
    )
    updates, states = run(rule, losses=LOSSES)
    y, lam = None, np.full(3, 1 / 3)
    for t in range(4):
        g = ROWS[t]
        if normalise:
            g = g / np.linalg.norm(g, axis=1, keepdims=True) * LOSSES[t][:, None]
        if y is None:
            y = g if order == "paper" else np.zeros_like(g)
        new_y = y - 0.9 / (t + 1) * (y - g)  # eq. 7
        old = y if order == "paper" else new_y
        moved = lam - 0.3 / np.sqrt(t + 1) * (old @ old.T + 0.1 * np.eye(3)) @ lam  # eq. 10
        new_lam = project(moved) if projection == "simplex" else np.exp(moved) / np.exp(moved).sum()
        expected = y.T @ lam if order == "paper" else new_y.T @ new_lam  # eq. 11
        np.testing.assert_allclose(updates[t], expected, rtol=1e-10)
        y, lam = new_y, new_lam
        np.testing.assert_allclose(states.inner.coefficients[t], lam, rtol=1e-10)


def test_paper_order_starts_with_a_zero_step():
    updates, _ = run(moco(num_tasks=3))
    np.testing.assert_array_equal(updates[0], np.zeros(5))
    assert np.any(updates[1] != 0)


def test_moco_reaches_the_least_norm_in_noise():
    """The weights found with tracking are near the exact ones; those of a noisy MGDA are not."""
    true = np.array([[2.0, 0.0], [0.0, 1.0]])
    exact = np.array([0.2, 0.8])
    noise = np.random.default_rng(0).standard_normal((4000, 2, 2)) * 2

    def mean_weights(rule):
        params = jnp.zeros(2)

        def step(state, jacobian):
            _, state = rule.update(jacobian, state, params)
            return state, optax.tree.get(state, "mtl_weights")

        scan = jax.jit(lambda x: jax.lax.scan(step, rule.init(params), x)[1])
        return np.asarray(scan(jnp.asarray(true + noise)))[2000:].mean(0)

    tracked = mean_weights(moco(num_tasks=2, beta=0.005, gamma=0.05))
    noisy = mean_weights(mgda(num_tasks=2))
    assert abs(tracked - exact).max() < 0.05 < abs(noisy - exact).max()


def test_x_plus_moco():
    """Tracking before any aggregator, in a chain (tables 4-6)."""
    updates, _ = run(optax.chain(track_gradients(0.5, num_tasks=3), mgda(), optax.scale(2.0)))
    rule, y = mgda(), np.zeros((3, 5))
    for t in range(2):
        y = y - 0.5 * (y - ROWS[t])
        expected, _ = rule.update(jnp.asarray(y), rule.init(PARAMS), jnp.asarray(PARAMS))
        np.testing.assert_allclose(updates[t], 2 * expected, rtol=1e-9)


def test_a_nan_does_not_enter_the_tracked_gradients():
    rows = ROWS.copy()
    rows[1, 2, 3] = np.nan
    chain = optax.chain(track_gradients(0.5, num_tasks=3), mgda())
    updates, (tracking, last) = run(chain, rows)
    np.testing.assert_array_equal(updates[1], np.zeros(5))
    np.testing.assert_array_equal(last.mtl_skipped, [0, 1, 1, 1])
    np.testing.assert_array_equal(tracking.tracked[1], tracking.tracked[0])
    np.testing.assert_array_equal(tracking.mtl_step, [1, 1, 2, 3])


def test_db_mtl():
    updates, _ = run(db_mtl(0.9, sigma=0.5, num_tasks=3), losses=LOSSES)
    y = np.zeros((3, 5))
    for t in range(4):
        g = ROWS[t] / (LOSSES[t] + 1e-8)[:, None]
        y = g + 0.9 / (t + 1) ** 0.5 * (y - g)
        norms = np.linalg.norm(y, axis=1, keepdims=True)
        np.testing.assert_allclose(updates[t], norms.max() * (y / norms).sum(0), rtol=1e-10)


def test_sdmgrad_paper_form():
    rng = np.random.default_rng(0)
    cross, p = rng.standard_normal((3, 3)), np.array([0.5, 0.3, 0.2])
    rule = sdmgrad(0.7, step_size=0.2, num_steps=3, preference=p, num_tasks=3)
    updates, states = run(rule, cross_gramian=np.broadcast_to(cross, (4, 3, 3)))
    w = np.full(3, 1 / 3)
    for t in range(2):  # warm start
        for _ in range(3):
            w = project(w - 0.2 * (cross @ w + 0.7 * cross @ p))
        np.testing.assert_allclose(states.inner.simplex_weights[t], w, rtol=1e-10)
        expected = (ROWS[t].T @ w + 0.7 * ROWS[t].T @ p) / 1.7
        np.testing.assert_allclose(updates[t], expected, rtol=1e-10)


@pytest.mark.parametrize("make", [modo, sdmgrad])
def test_double_sampling_reads_a_cross_gramian(make):
    weighting = make(num_tasks=2).weighting
    with pytest.raises(ValueError, match="cross_gramian"):
        weighting.update(jnp.eye(2), weighting.init())
    bad = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
    weights, state = weighting.update(jnp.eye(2), weighting.init(), cross_gramian=bad)
    np.testing.assert_array_equal(weights, [0, 0])
    assert state.mtl_skipped == 1
    np.testing.assert_array_equal(state.inner.simplex_weights, [0.5, 0.5])


@pytest.mark.parametrize("example", some([(run,) for run in training_steps.runs()], 2))
def test_training_steps(example):
    """Every written-out step brings the parameters near the Pareto set, from 3 away."""
    params = training_steps.train(*training_steps.runs()[example])
    assert abs(params[1]) < 0.3


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (track_gradients, "num_tasks"),
        (moco, "num_tasks"),
        (excess_mtl, "num_tasks"),
        (db_mtl, "num_tasks"),
        (modo, "num_tasks"),
        (sdmgrad, "num_tasks"),
        (lambda: track_gradients(2.0, num_tasks=2), "beta"),
        (lambda: track_gradients(num_tasks=2, max_norm=0.0), "max_norm"),
        (lambda: moco(num_tasks=2, order="both"), "order"),
        (lambda: moco(num_tasks=2, gamma=-1.0), "gamma"),
        (lambda: excess_mtl(num_tasks=2, warmup_steps=-1), "warmup_steps"),
        (lambda: db_mtl(1.0, num_tasks=2), "beta"),
        (lambda: sdmgrad(num_tasks=2, num_steps=0), "num_steps"),
        (lambda: modo(0.0, num_tasks=2), "gamma"),
    ],
)
def test_refuses_wrong_options(make, word):
    with pytest.raises(ValueError, match=word):
        make()
