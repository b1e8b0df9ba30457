"""Options of the rules, against what they are meant to be: written out, or by another solver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quadprog

import jaxmtl
from jaxmtl.rules.graddrop import drop_signs
from jaxmtl.rules.gradvac import vaccinate_in_order
from jaxmtl.rules.pcgrad import project_in_order
from jaxmtl.tasks import draw_orders
from tests.methods import METHODS
from tests.problems import WIDE_FIRST

ROWS = np.array([[1.0, 2.0, -1.0], [-2.0, 1.0, 0.5], [0.1, -0.3, 0.2], [3.0, -1.0, -4.0]])


@functools.cache
def compiled(aggregator, x64):
    del x64
    return jax.jit(aggregator.update)


def aggregate(aggregator, rows, **inputs):
    params = jax.tree.map(lambda x: jnp.zeros(np.shape(x)[1:]), rows)
    rows = jax.tree.map(lambda x: jnp.asarray(x, float), rows)
    step = compiled(aggregator, jax.config.jax_enable_x64)
    return step(rows, aggregator.init(params), params, **inputs)[0]


# --- a preference for the weighted sum -----------------------------------------------------------


def test_the_weighted_sum_takes_a_preference_at_run_time(precision):
    r = np.array([0.4, 0.3, 0.2, 0.1])
    rule = jaxmtl.linear_scalarization(num_tasks=4)
    tolerance = {"rtol": 0, "atol": 16 * jnp.finfo(jnp.result_type(float)).eps}
    later = aggregate(rule, ROWS, preference=jnp.asarray(r, float))
    np.testing.assert_allclose(later, r @ ROWS, **tolerance)
    np.testing.assert_array_equal(later, aggregate(jaxmtl.linear_scalarization(r), ROWS))
    np.testing.assert_allclose(aggregate(rule, ROWS), ROWS.mean(0), **tolerance)
    # Task 2 is absent: the others keep the total of 1 in proportion, 4 : 3 : 1.
    mask = jnp.array([True, True, False, True])
    absent = aggregate(rule, ROWS, preference=jnp.asarray(r, float), task_mask=mask)
    np.testing.assert_allclose(absent, np.array([4, 3, 0, 1]) / 8 @ ROWS, **tolerance)


def test_weights_of_the_construction_stay(x64):
    """As of the heads in a partition, whose trunk alone follows the preference."""
    ones = jaxmtl.linear_scalarization(jnp.ones(4))
    found = aggregate(ones, ROWS, preference=jnp.array([1.0, 0, 0, 0]))
    np.testing.assert_allclose(found, ROWS.sum(0), rtol=1e-14)


def test_the_weighted_sum_takes_a_preference_without_the_jacobian(x64):
    rule = jaxmtl.linear_scalarization()
    step = jaxmtl.value_and_grad(lambda p: jnp.asarray(ROWS) @ p, rule)
    preferences = jnp.eye(4)
    found = jax.vmap(lambda r: step(jnp.ones(3), rule.init(jnp.ones(3)), preference=r)[1])
    np.testing.assert_allclose(jax.jit(found)(preferences), ROWS, rtol=1e-14)


# --- ridges -------------------------------------------------------------------------------------

# TorchJD 0.18.0 in float64, with its default reg_eps of 1e-4 and with 1e-2, of ROWS.
TORCHJD = {
    ("upgrad", 1e-4): [-0.0359179172336, 0.0124943496503, -0.115311086494],
    ("upgrad", 1e-2): [-0.0887406038278, 0.57693929897, -1.01864083109],
    ("dual_proj", 1e-4): [-0.0426862849165, -0.033815167394, -0.108993781025],
    ("dual_proj", 1e-2): [0.121106285568, 0.486582541116, -0.847698686902],
}


@pytest.mark.parametrize(("name", "ridge"), TORCHJD)
def test_ridge_of_the_trace_is_that_of_torchjd(name, ridge, x64):
    rule = getattr(jaxmtl, name)(ridge=ridge)
    for scale in (1.0, 2.0**-100, 2.0**100):
        update = aggregate(rule, scale * ROWS)
        np.testing.assert_allclose(update, scale * np.array(TORCHJD[name, ridge]), rtol=1e-9)


@pytest.mark.parametrize("ridge_of", ["trace", "largest"])
@WIDE_FIRST
def test_ridge_of_the_present_tasks(ridge_of, precision):
    """The dual cone of G + ridge I by Goldfarb and Idnani's method, with a task that is absent."""
    rows, ridge = np.vstack([ROWS[:3], np.full(3, np.nan)]), 3e-3
    gramian = ROWS[:3] @ ROWS[:3].T
    size = np.trace(gramian) if ridge_of == "trace" else np.linalg.eigvalsh(gramian)[-1]
    solve = functools.partial(quadprog.solve_qp, gramian + ridge * size * np.eye(3), np.zeros(3))
    each = [solve(np.eye(3), unit)[0] for unit in np.eye(3)]
    mask = jnp.array([True, True, True, False])
    rtol = 1e-9 if precision == "float64" else 1e-4
    rule = jaxmtl.upgrad(ridge=ridge, ridge_of=ridge_of)
    np.testing.assert_allclose(
        aggregate(rule, rows, task_mask=mask), np.mean(each, 0) @ ROWS[:3], rtol=rtol, atol=rtol
    )
    rule = jaxmtl.dual_proj(ridge=ridge, ridge_of=ridge_of)
    expected = solve(np.eye(3), np.full(3, 1 / 3))[0] @ ROWS[:3]
    np.testing.assert_allclose(
        aggregate(rule, rows, task_mask=mask), expected, rtol=rtol, atol=rtol
    )


@pytest.mark.slow
def test_a_ridge_may_be_traced(x64):
    gramian = jnp.asarray(ROWS @ ROWS.T)

    def weights(ridge):
        weighting = jaxmtl.upgrad(ridge=ridge).weighting
        return weighting.update(gramian, weighting.init())[0]

    none, some = jax.jit(jax.vmap(weights))(jnp.array([0.0, 1e-2]))
    bare = jaxmtl.upgrad().weighting
    np.testing.assert_allclose(none, jax.jit(bare.update)(gramian, bare.init())[0], rtol=1e-9)
    np.testing.assert_allclose(ROWS.T @ some, TORCHJD["upgrad", 1e-2], rtol=1e-9)
    optimizer = optax.inject_hyperparams(jaxmtl.upgrad)(ridge=1e-2)
    step, params = jax.jit(optimizer.update), jnp.zeros(3)
    update, _ = step(jnp.asarray(ROWS), optimizer.init(params), params)
    np.testing.assert_allclose(update, TORCHJD["upgrad", 1e-2], rtol=1e-9)


def test_regularized_mgda(precision):
    """By Goldfarb and Idnani's method on G + rho I, at every scale; absolute in the gradients."""
    rtol = 1e-9 if precision == "float64" else 2e-4
    sum_and_signs = np.vstack([np.ones(4), np.eye(4)]).T

    @jax.jit
    def mgda(rho, rows):
        aggregator, params = jaxmtl.mgda(rho=rho), jnp.zeros(3)
        return aggregator.update(rows, aggregator.init(params), params)[0]

    for rho in (1e-3, 1.0, 1e3):
        gramian = ROWS @ ROWS.T + rho * np.eye(4)
        exact = quadprog.solve_qp(gramian, np.zeros(4), sum_and_signs, np.eye(5)[0], 1)[0]
        for scale in (1.0, 2.0**-20, 2.0**20):
            update = mgda(rho * scale**2, jnp.asarray(scale * ROWS, float))
            np.testing.assert_allclose(update, scale * exact @ ROWS, rtol=rtol, atol=rtol * scale)
    weighting = jaxmtl.mgda(rho=0.1).weighting  # no gradient at all: equal weights
    weights, _ = jax.jit(weighting.update)(jnp.zeros((4, 4)), weighting.init())
    np.testing.assert_allclose(weights, 0.25, rtol=1e-6)


# --- CAGrad beyond the mean's ball --------------------------------------------------------------


def simplex_grid(steps):
    """Points of the simplex of three tasks, its edges included."""
    i, j = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
    inside = i + j <= steps
    return np.stack([i, j, steps - i - j], axis=-1)[inside] / steps


@WIDE_FIRST
def test_cagrad_of_any_radius(precision):
    """The worst improvement in the ball equals its dual bound, found on a fine grid."""
    rtol = 1e-8 if precision == "float64" else 1e-3
    weights, hull = simplex_grid(200), jaxmtl.mgda()

    @jax.jit
    def cagrad(c, rows):
        aggregator, params = jaxmtl.cagrad(c), jnp.zeros(5)
        return aggregator.update(rows, aggregator.init(params), params)[0]

    for seed in range(4):
        rows = np.random.default_rng(seed).standard_normal((3, 5))
        mean, least = rows.mean(0), aggregate(hull, rows)
        for c in (1.0, 1.5, 4.0, 1e3):
            update = np.asarray(cagrad(c, jnp.asarray(rows, float)), float)
            radius = c * np.linalg.norm(mean)
            assert np.linalg.norm(update - mean) <= radius * (1 + rtol)
            bound = weights @ rows @ mean + radius * np.linalg.norm(weights @ rows, axis=1)
            best = (rows @ update).min()
            assert best <= bound.min() * (1 + rtol)
            assert best >= bound.min() * (1 - 1e-3)  # as fine as the grid is
            assert best >= -rtol * radius  # non-conflicting: the ball holds 0
        cosine = update @ least / np.linalg.norm(update) / np.linalg.norm(least)
        assert cosine > 1 - 1e-5


# --- sums and means -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("pcgrad", {}), ("gradvac", {"num_tasks": 4}), ("graddrop", {}), ("db_mtl", {"num_tasks": 4})],
)
def test_a_mean_is_the_sum_over_the_number_of_present_tasks(name, options, x64):
    make = getattr(jaxmtl, name)
    inputs = {"losses": jnp.ones(4)} if name == "db_mtl" else {}
    key = {} if name == "db_mtl" else {"key": jax.random.key(3)}
    total, mean = make(**options), make(reduction="mean", **options)
    for mask in (jnp.ones(4, bool), jnp.array([True, False, True, True])):
        given = inputs | key | {"task_mask": mask}
        expected = np.asarray(aggregate(total, ROWS, **given)) / int(mask.sum())
        np.testing.assert_allclose(aggregate(mean, ROWS, **given), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="reduction"):
        make(reduction="max", **options)


def test_pcgrad_mean_is_upgrad_for_two_tasks(x64):
    """As Zhou et al. 2022 print it, of total weight 1 where there is no conflict."""
    rows = ROWS[:2]
    np.testing.assert_allclose(
        aggregate(jaxmtl.pcgrad(reduction="mean"), rows), aggregate(jaxmtl.upgrad(), rows)
    )


# --- GradVac by parts, softmax GradNorm, GradDrop's f -------------------------------------------


@pytest.mark.parametrize("parts", ["layer", "leaf"])
def test_gradvac_by_parts(parts, x64):
    """Each part is turned by itself, in the same orders, and keeps targets of its own."""
    rng = np.random.default_rng(0)
    shapes = {"first": {"w": (2, 3), "b": (3,)}, "last": {"w": (4,)}}
    rows = [
        jax.tree.map(
            lambda shape: jnp.asarray(rng.standard_normal((3, *shape))),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(2)
    ]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), rows[0])
    rule = jaxmtl.gradvac(0.3, num_tasks=3, parts=parts)
    assert rule.weighting is None
    state, step = rule.init(params), jax.jit(rule.update)
    count = 2 if parts == "layer" else 3
    assert state.inner.target.shape == (count, 3, 3)
    targets = np.zeros((count, 3, 3))
    key = jax.random.key(5)
    orders = draw_orders(key, 3)
    for jacobian in rows:
        update, state = step(jacobian, state, params, key=key)
        leaves = jax.tree.leaves(jacobian)  # first b, first w, last w
        members = [[0, 1], [2]] if parts == "layer" else [[0], [1], [2]]
        for k, places in enumerate(members):
            flat = np.concatenate([np.reshape(leaves[p], (3, -1)) for p in places], axis=1)
            weights, targets[k] = vaccinate_in_order(
                jnp.asarray(flat @ flat.T), jnp.asarray(targets[k]), orders, 0.3
            )
            found = np.concatenate([np.ravel(jax.tree.leaves(update)[p]) for p in places])
            np.testing.assert_allclose(found, flat.T @ np.asarray(weights), atol=1e-12)
        np.testing.assert_allclose(state.inner.target, targets, atol=1e-12)


def test_softmax_gradnorm_descends_its_objective(x64):
    """v on sum |w_i |g_i| - sg(mean w |g| r^alpha)| with w = m softmax(v), by jax.grad."""
    gramian = jnp.diag(jnp.array([1.0, 4.0, 0.25]))
    norms, initial = jnp.array([1.0, 2.0, 0.5]), jnp.array([1.0, 2.0, 3.0])
    weighting = jaxmtl.gradnorm(
        1.5, num_tasks=3, weights="softmax", initial_losses=initial, optimizer=optax.sgd(0.1)
    ).weighting
    state, v, step = weighting.init(), jnp.zeros(3), jax.jit(weighting.update)

    def objective(v, losses):
        products = 3 * jax.nn.softmax(v) * norms
        ratio = losses / initial
        target = jnp.mean(products) * (ratio / jnp.mean(ratio)) ** 1.5
        return jnp.sum(jnp.abs(products - jax.lax.stop_gradient(target)))

    slope = jax.jit(jax.grad(objective))
    for t in range(3):
        losses = jnp.array([0.9, 1.0, 2.9]) ** (t + 1)
        weights, state = step(gramian, state, losses=losses)
        np.testing.assert_allclose(weights, 3 * jax.nn.softmax(v), rtol=1e-12)
        np.testing.assert_allclose(
            weighting.head_weights(state),
            3 * jax.nn.softmax(state.inner.weights.values),
            rtol=1e-12,
        )
        v = v - 0.1 * slope(v, losses)
        np.testing.assert_allclose(state.inner.weights.values, v, rtol=1e-10)


def test_function_of_the_purity(x64):
    """With f a step at 1/2 the sign of the majority is kept, without chance."""
    rule = jaxmtl.graddrop(f=lambda p: jnp.where(p > 0.5, 1.0, -1.0))
    positive, negative = np.maximum(ROWS, 0).sum(0), np.minimum(ROWS, 0).sum(0)
    majority = np.where(ROWS.sum(0) > 0, positive, negative)
    for seed in range(3):
        np.testing.assert_allclose(aggregate(rule, ROWS, key=jax.random.key(seed)), majority)
    jacobian, u = jnp.array([[-2.0], [1.0]]), jnp.array([0.2])  # P = 1/3, P^2 = 1/9
    np.testing.assert_array_equal(drop_signs(jacobian, u), [1])
    np.testing.assert_array_equal(drop_signs(jacobian, u, f=jnp.square), [-2])


# --- DWA on a window ----------------------------------------------------------------------------


def test_dwa_on_a_window(x64):
    losses = np.random.default_rng(0).uniform(0.5, 2, (9, 3))
    mask = np.ones((9, 3), bool)
    mask[4, 1] = mask[5, 1] = False
    weighting = jaxmtl.dwa(2.0, window=2, num_tasks=3).weighting
    step, state = jax.jit(weighting.update), weighting.init()
    for t in range(9):
        weights, state = step(
            None, state, losses=jnp.asarray(losses[t]), task_mask=jnp.asarray(mask[t])
        )
        ratio = np.ones(3)
        for i in range(3):
            last = losses[max(t - 2, 0) : t, i][mask[max(t - 2, 0) : t, i]]
            before = losses[max(t - 4, 0) : max(t - 2, 0), i][
                mask[max(t - 4, 0) : max(t - 2, 0), i]
            ]
            if t >= 4 and last.size and before.size:
                ratio[i] = last.mean() / before.mean()
        expected = np.where(mask[t], np.exp(ratio / 2), 0)
        np.testing.assert_allclose(weights, mask[t].sum() * expected / expected.sum(), rtol=1e-12)
    single, plain = (
        jaxmtl.dwa(num_tasks=3, **options).weighting for options in ({"window": 1}, {})
    )
    states = [single.init(), plain.init()]
    for row in losses:
        one, states[0] = single.update(None, states[0], losses=jnp.asarray(row))
        two, states[1] = plain.update(None, states[1], losses=jnp.asarray(row))
        np.testing.assert_allclose(one, two, rtol=1e-12)
    with pytest.raises(ValueError, match="window"):
        jaxmtl.dwa(num_tasks=3, window=0)
    with pytest.raises(ValueError, match="window"):
        jaxmtl.dwa(num_tasks=3, window=2, steps_per_epoch=5)


# --- losses at zero -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uncertainty_weighting", "imtl_l", "imtl"])
@pytest.mark.parametrize("stuck", [0.0, -1.0])
def test_a_loss_that_stays_at_zero_does_not_stop_the_others(name, stuck):
    """Its weight ends at the bound; without one it overflows, and every step is skipped."""

    def train(bound):
        rule = getattr(jaxmtl, name)(
            num_tasks=2, max_weight=bound, optimizer=optax.adam(0.1)
        ).weighting

        def step(state, _):
            weights, state = rule.update(jnp.eye(2), state, losses=jnp.array([stuck, 1.0]))
            return state, weights

        return jax.lax.scan(step, rule.init(), None, 1500)

    state, weights = jax.jit(lambda: train(1e6))()
    assert int(state.mtl_skipped) == 0
    scale = jnp.exp(state.inner.values * (-1 if name == "uncertainty_weighting" else 1))
    np.testing.assert_allclose(scale[0], 1e6, rtol=1e-3)
    assert weights[-1, 1] > 0
    if name != "imtl":  # whose weights are then those of equal projections
        expected = 0.5 if name == "uncertainty_weighting" else 1.0
        np.testing.assert_allclose(weights[-1, 1], expected, rtol=0.2)
    without, _ = jax.jit(lambda: train(None))()
    assert int(without.mtl_skipped) > 0
    with pytest.raises(ValueError, match="max_weight"):
        getattr(jaxmtl, name)(num_tasks=2, max_weight=0.0)


def test_gls_without_the_tasks_at_zero(precision):
    weighting = jaxmtl.gls().weighting
    weights, _ = weighting.update(None, weighting.init(), losses=jnp.array([2.0, 0.0, 0.5, -1.0]))
    np.testing.assert_allclose(weights, [1 / (2 * 2), 0, 1 / (2 * 0.5), 0], rtol=1e-6)
    nothing, _ = weighting.update(None, weighting.init(), losses=jnp.zeros(2))
    np.testing.assert_array_equal(nothing, 0)


# --- ConFIG from coordinates --------------------------------------------------------------------


def test_config_of_an_ill_conditioned_system_in_float32():
    """Its error is that of a backward stable solver, a few eps times the condition."""
    rng, rule = np.random.default_rng(0), jaxmtl.config()
    for m, n in ((3, 10), (8, 50)):
        for condition in (40, 40, 400, 400):
            left = np.linalg.qr(rng.standard_normal((m, m)))[0]
            right = np.linalg.qr(rng.standard_normal((n, m)))[0]
            rows = (left * np.logspace(0, -np.log10(condition), m)) @ right.T
            rows = rows.astype(np.float32)
            wide = rows.astype(float)
            units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
            x = np.linalg.pinv(units) @ np.ones(m)
            x /= np.linalg.norm(x)
            gap = np.asarray(aggregate(rule, rows), float) - (wide @ x).sum() * x
            assert np.linalg.norm(gap) < 5e-6 * np.linalg.norm(rows)


def test_config_of_dependent_rows(precision):
    """The least-squares solution of the pseudo-inverse, of every rank."""
    rtol = 1e-9 if precision == "float64" else 1e-4
    rule = jaxmtl.config()
    a, b, c = np.random.default_rng(1).standard_normal((3, 5))
    for rows in ([a, 2 * a, b, c], [a, b, a - b, c], [a, -a, b, c], [a, 0 * a, b, c], [a, a, a, a]):
        rows = np.array(rows)
        norms = np.linalg.norm(rows, axis=1)
        units = rows / np.where(norms > 0, norms, 1)[:, None]
        x = np.linalg.pinv(units, rcond=1e-10) @ (norms > 0)
        x /= np.linalg.norm(x)
        update = aggregate(rule, rows)
        np.testing.assert_allclose(update, (rows @ x).sum() * x, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(aggregate(rule, np.array([a, -a, a, -a])), 0)


# --- states that can be donated -----------------------------------------------------------------

MADE = {method.name: method.make for method in METHODS} | {
    "cr_mogm, given start": lambda m: jaxmtl.cr_mogm(
        jaxmtl.dwa(num_tasks=m), initial_weights=np.arange(1.0, m + 1)
    ),
    "gradnorm, given losses": lambda m: jaxmtl.gradnorm(
        num_tasks=m, initial_losses=jnp.arange(1.0, m + 1)
    ),
    "gradnorm, softmax": lambda m: jaxmtl.gradnorm(num_tasks=m, weights="softmax"),
    "gradvac, leaf": lambda m: jaxmtl.gradvac(num_tasks=m, parts="leaf"),
    "dwa, window": lambda m: jaxmtl.dwa(num_tasks=m, window=2),
    "imtl_l, lookahead": lambda m: jaxmtl.imtl_l(num_tasks=m, optimizer=optax.ema(0.9)),
    "multi_steps": lambda m: jaxmtl.multi_steps(
        optax.chain(jaxmtl.excess_mtl(num_tasks=m), optax.adam(0.1)), 2, num_tasks=m
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_a_fresh_state_can_be_donated(name):
    """No buffer twice, and none that the rule needs again."""
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}
    optimizer = MADE[name](5)
    through = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
    state = optimizer.init(params)
    before = jax.tree.map(np.array, state)
    through(state)
    again = optimizer.init(params)
    jax.tree.map(np.testing.assert_array_equal, again, before)
    through(again)


def test_pcgrad_rows_add_up_to_its_weights(x64):
    gramian = jnp.asarray(ROWS @ ROWS.T)
    orders = draw_orders(jax.random.key(0), 4)
    rows = jaxmtl.metrics.pcgrad_coefficients(gramian, jax.random.key(0))
    np.testing.assert_allclose(rows.sum(0), project_in_order(gramian, orders), rtol=1e-12)
    for i, order in enumerate(np.asarray(orders)):
        v = ROWS[i].copy()
        for j in order:
            if v @ ROWS[j] < 0:
                v -= v @ ROWS[j] / (ROWS[j] @ ROWS[j]) * ROWS[j]
        np.testing.assert_allclose(rows[i] @ ROWS, v, atol=1e-12)
    mask = jnp.array([True, True, False, True])
    assert not np.any(jaxmtl.metrics.pcgrad_coefficients(gramian, jax.random.key(0), mask)[2])


# --- M-ConFIG and GradDrop on activations -------------------------------------------------------


def plain_config(rows):
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    x = np.linalg.pinv(units) @ np.ones(len(rows))
    x /= np.linalg.norm(x)
    return (rows @ x).sum() * x


@pytest.mark.parametrize("beta2", [0.99, None])
def test_momentum_of_config_takes_one_task_a_step(beta2, x64):
    """Liu et al. 2024, algorithm 1, written out; rows of absent tasks are not read."""
    rule = jaxmtl.config(beta1=0.8, beta2=beta2, num_tasks=3)
    params, state = jnp.zeros(5), rule.init(jnp.zeros(5))
    step, rng = jax.jit(rule.update), np.random.default_rng(0)
    means, times, t = np.zeros((3, 5)), np.zeros(3), 0
    first, second = np.zeros(5), np.zeros(5)
    for k in range(8):
        rows = np.full((3, 5), np.nan)
        task, rows[k % 3] = k % 3, rng.standard_normal(5)
        means[task] = 0.8 * means[task] + 0.2 * rows[task]
        times[task] += 1
        expected = np.zeros(5)
        if np.all(times):
            t += 1
            expected = plain_config(means / (1 - 0.8**times)[:, None])
            if beta2 is not None:
                moment = expected * (1 - 0.8**t)
                pseudo = (moment - 0.8 * first) / 0.2
                first, second = moment, 0.99 * second + 0.01 * pseudo**2
                expected = expected / (np.sqrt(second / (1 - 0.99**t)) + 1e-8)
        update, state = step(jnp.asarray(rows), state, params, task_mask=jnp.arange(3) == task)
        np.testing.assert_allclose(update, expected, rtol=1e-9, atol=1e-12)
    assert int(state.mtl_skipped) == 0
    with pytest.raises(ValueError, match="num_tasks"):
        jaxmtl.config(beta1=0.9)
    with pytest.raises(ValueError, match="beta1"):
        jaxmtl.config(beta1=1.0, num_tasks=3)


def test_graddrop_on_activations(x64):
    """Signs of sgn(z) g summed over the batch decide, once per channel, for all examples."""
    rng = np.random.default_rng(0)
    z, rows = rng.standard_normal((6, 3)), rng.standard_normal((4, 6, 3))
    leak = np.array([0.0, 0.5, 0.0, 1.0])
    rule = jaxmtl.graddrop(activations=True, leak=leak)
    update = jax.jit(rule.update)
    signed = (rows * np.sign(z)).sum(1)
    keep_positive, keep_negative = (
        (leak[:, None] + (1 - leak[:, None]) * kept)[:, None] * rows
        for kept in (signed > 0, signed < 0)
    )
    chance = (1 + signed.sum(0) / np.abs(signed).sum(0)) / 2
    drawn = []
    for seed in range(200):
        found, _ = update(
            jnp.asarray(rows),
            rule.init(jnp.asarray(z)),
            jnp.asarray(z),
            features=jnp.asarray(z),
            key=jax.random.key(seed),
        )
        positive = np.all(np.isclose(found, keep_positive.sum(0)), axis=0)
        negative = np.all(np.isclose(found, keep_negative.sum(0)), axis=0)
        assert np.all(positive | negative)
        drawn.append(positive)
    np.testing.assert_allclose(np.mean(drawn, axis=0), chance, atol=0.12)
    with pytest.raises(ValueError, match="features"):
        rule.update(jnp.asarray(rows), rule.init(z), jnp.asarray(z))
    with pytest.raises(ValueError, match="shapes"):
        rule.update(jnp.asarray(rows), rule.init(z), jnp.asarray(z), features=jnp.zeros(3))


@pytest.mark.parametrize("shared", [None, {"encoder": True, "heads": False}])
def test_coordinate_rules_act_on_the_rows_at_the_features(shared, x64):
    """The update at z goes back through the encoder; heads descend the sum of the losses."""
    rng = np.random.default_rng(0)
    params = {
        "encoder": jnp.asarray(rng.standard_normal((3, 4))),
        "heads": jnp.asarray(rng.standard_normal((2, 4))),
    }
    x = jnp.asarray(rng.standard_normal((5, 3)))

    def encode(params, x):
        return jnp.tanh(x @ params["encoder"])

    def losses_fn(params, z, x):
        del x
        return jnp.mean((z @ params["heads"].T - 1) ** 2, axis=0)

    def split(params):
        z, pull = jax.vjp(lambda p: encode(p, x), params)
        rows = jax.jacrev(lambda z: losses_fn(params, z, x))(z)
        return z, pull, rows, jax.grad(lambda p: jnp.sum(losses_fn(p, z, x)))(params)

    z, pull, rows, direct = split(params)
    key = jax.random.key(1)
    for rule, inputs in (
        (jaxmtl.graddrop(activations=True), {"key": key}),
        (jaxmtl.trimmed_mean(0), {}),
    ):
        step = jax.jit(jaxmtl.value_and_grad(losses_fn, rule, encoder=encode, shared=shared))
        (losses, state), grads = step(params, rule.init(z), x, **inputs)
        np.testing.assert_allclose(losses, losses_fn(params, z, x))
        given = {"features": z} if inputs else {}
        update, _ = jax.jit(rule.update)(rows, rule.init(z), z, **given, **inputs)
        expected = jax.tree.map(jnp.add, pull(update)[0], direct)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), grads, expected)
        bad = {**params, "heads": params["heads"].at[0, 0].set(jnp.nan)}
        (_, state), grads = step(bad, state, x, **inputs)
        assert int(state.mtl_skipped) == 1
        assert not any(np.any(g) for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="weighting"):
        jaxmtl.value_and_grad(losses_fn, jaxmtl.trimmed_mean(1))
