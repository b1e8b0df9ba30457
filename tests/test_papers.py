"""Table 1 and appendix B of Quinton and Rey 2024, and facts stated in other papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmtl
from jaxmtl.rules.graddrop import drop_signs
from jaxmtl.rules.gradvac import vaccinate_in_order
from jaxmtl.rules.pcgrad import project_in_order
from jaxmtl.tasks import draw_orders
from tests.problems import some

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def compiled(name, *args):
    aggregator = getattr(jaxmtl, name)(*args)

    def update(jacobian):
        params = jnp.zeros(jacobian.shape[1:])
        return aggregator.update(jacobian, aggregator.init(params), params)[0]

    return jax.jit(update)


def aggregate(name, jacobian, *args):
    return np.asarray(compiled(name, *args)(jnp.asarray(jacobian, float)))


def test_mean_conflicts():  # B.1
    np.testing.assert_allclose(aggregate("linear_scalarization", [[-2.0], [4.0]]), [1])


@pytest.mark.parametrize(("a", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_mgda_is_not_affine_in_a_row(a, expected):  # B.2
    update = aggregate("mgda", [[2, 0], [0, 2], [a, a]])
    np.testing.assert_allclose(update, [expected, expected], atol=1e-14)


@pytest.mark.parametrize("a", [0.5, 0.75, 1.0, 2.0])
def test_dual_proj_is_not_affine_in_a_row(a):  # B.3
    expected = [0, a] if a >= 1 else [1 - a, a]
    update = aggregate("dual_proj", [[2, 0], [-2 * a, 2 * a]])
    np.testing.assert_allclose(update, expected, atol=1e-14)


def test_pcgrad_takes_four_values():  # B.4
    jacobian = np.array([[1, 0], [0, 1], [-0.5, -1]])
    gram = jnp.asarray(jacobian @ jacobian.T)
    project = jax.jit(jax.vmap(lambda key: project_in_order(gram, draw_orders(key, 3))))
    weights = project(jax.random.split(jax.random.key(0), 400))
    updates = np.round(np.asarray(weights) @ jacobian, 12)
    values, counts = np.unique(updates, axis=0, return_counts=True)
    np.testing.assert_allclose(values, [[0.4, -0.2], [0.4, 0.2], [0.8, -0.2], [0.8, 0.2]])
    assert counts.min() > 60  # each has probability 1/4


def test_pcgrad_is_twice_upgrad_for_two_tasks():  # B.4
    jacobian = [[1.0, 2.0, 0.0], [-3.0, 1.0, 1.0]]
    np.testing.assert_allclose(
        aggregate("pcgrad", jacobian), 2 * aggregate("upgrad", jacobian), atol=1e-14
    )


def test_pcgrad_orders_are_permutations_of_the_others():
    orders = np.asarray(draw_orders(jax.random.key(1), 5))
    assert orders.shape == (5, 4)
    for i, row in enumerate(orders):
        assert sorted(row) == [j for j in range(5) if j != i]


def test_pcgrad_equals_the_projections_done_on_vectors():
    rng = np.random.default_rng(0)
    jacobian = rng.standard_normal((4, 6))
    jacobian -= 0.9 * jacobian.mean(0)
    orders = np.asarray(draw_orders(jax.random.key(0), 4))
    total = np.zeros(6)
    for i in range(4):
        v = jacobian[i].copy()
        for j in orders[i]:
            if v @ jacobian[j] < 0:
                v -= v @ jacobian[j] / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += v
    weights = project_in_order(jnp.asarray(jacobian @ jacobian.T), jnp.asarray(orders))
    np.testing.assert_allclose(jacobian.T @ np.asarray(weights), total, atol=1e-12)


def test_gradvac_equals_the_turns_done_on_vectors():
    rng = np.random.default_rng(0)
    jacobian = rng.standard_normal((3, 6))
    jacobian -= 0.9 * jacobian.mean(0)
    target = rng.uniform(-0.2, 0.5, (3, 3))
    orders = np.asarray(draw_orders(jax.random.key(0), 3))
    phi, total = target.copy(), np.zeros(6)
    for i in range(3):
        v = jacobian[i].copy()
        for j in orders[i]:
            g = jacobian[j]
            cos = v @ g / np.linalg.norm(v) / np.linalg.norm(g)
            p = phi[i, j]
            if cos < p:
                amount = np.linalg.norm(v) * (p * np.sqrt(1 - cos**2) - cos * np.sqrt(1 - p**2))
                v = v + amount / (np.linalg.norm(g) * np.sqrt(1 - p**2)) * g
            phi[i, j] = 0.7 * phi[i, j] + 0.3 * cos
        total += v
    weights, new = vaccinate_in_order(
        jnp.asarray(jacobian @ jacobian.T), jnp.asarray(target), jnp.asarray(orders), 0.3
    )
    np.testing.assert_allclose(jacobian.T @ np.asarray(weights), total, atol=1e-12)
    np.testing.assert_allclose(new, phi, atol=1e-12)


def test_graddrop_keeps_one_sign():  # B.5
    jacobian = jnp.array([[-2.0], [1.0]])
    np.testing.assert_array_equal(drop_signs(jacobian, jnp.array([0.3])), [1])  # P = 1/3 > u
    np.testing.assert_array_equal(drop_signs(jacobian, jnp.array([0.4])), [-2])
    leak = jnp.array([0.5, 0.0])
    np.testing.assert_array_equal(drop_signs(jacobian, jnp.array([0.3]), leak), [0])
    zero = jnp.zeros((2, 1))
    np.testing.assert_array_equal(drop_signs(zero, jnp.array([0.1])), [0])


def test_imtl_g_conflicts_for_dependent_gradients():  # B.6
    np.testing.assert_allclose(aggregate("imtl_g", [[1.0], [-1.0], [-1.0]]), [-3], rtol=1e-13)
    # v = 1/9 [-1, 1, 1]; its sum is not zero
    np.testing.assert_allclose(aggregate("imtl_g", [[1.0], [-1.0]]), [0], atol=1e-14)


@pytest.mark.parametrize("a", [0.25, 1.0, 4.0])
def test_imtl_g_is_not_affine_in_a_row(a):  # B.6
    expected = 1 / (1 / a + 1)
    update = aggregate("imtl_g", [[a, 0], [0, 1]])
    np.testing.assert_allclose(update, [expected, expected], rtol=1e-13)


@pytest.mark.parametrize("degrees", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_imtl_g_of_nearly_parallel_gradients_in_float32(degrees, size):
    angle = np.deg2rad(degrees)
    units = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    jacobian = jnp.asarray(units * [[1.0], [size]], jnp.float32)
    expected = size / (1 + size) * units.sum(axis=0)  # equal projections: w_1 |g_1| = w_2 |g_2|
    np.testing.assert_allclose(compiled("imtl_g")(jacobian), expected, rtol=1e-5)


def test_cagrad_conflicts():  # B.7
    c, a = 0.5, 1.0
    jacobian = np.array([[2.0, 0.0], [-2 * a - 2, 2.0]])
    assert -a + c * np.sqrt(a**2 + 1) < 0
    assert jacobian[0] @ aggregate("cagrad", jacobian, c) < 0


@pytest.mark.parametrize("a", [2.5, 4.0])
def test_cagrad_is_not_affine_in_a_row(a):  # B.7
    c = 0.5
    assert c * np.sqrt(1 + a**2) + 1 < a**2
    update = aggregate("cagrad", [[2.0, 0.0], [0.0, 2 * a]], c)
    np.testing.assert_allclose(update, [c * np.sqrt(a**2 + 1) + 1, a], rtol=1e-9)


def test_rgw_weights_are_on_the_simplex():  # B.8
    weighting = jaxmtl.rgw().weighting
    state = weighting.init()
    first, state = weighting.update(jnp.eye(2), state)
    second, state = weighting.update(jnp.eye(2), state)
    np.testing.assert_allclose([jnp.sum(first), jnp.sum(second)], 1)
    assert first[0] != second[0]
    assert int(state.inner.mtl_step) == 2


def test_nash_does_not_depend_on_the_scale():  # B.9
    jacobian = np.array([[1.0, 2.0], [3.0, -1.0]])
    update = aggregate("nash_mtl", jacobian)
    np.testing.assert_allclose(aggregate("nash_mtl", 8 * jacobian), update, rtol=1e-12)
    np.testing.assert_allclose(update @ update, 2, rtol=1e-12)  # |J^T a|^2 = m


@pytest.mark.parametrize(("a", "expected"), [(0.5, 0.25), (1.0, 0.5), (3.0, 0.5)])
def test_aligned_mtl_is_not_affine_in_a_row(a, expected):  # B.10
    update = aggregate("aligned_mtl", [[1.0, 0.0], [0.0, a]])
    np.testing.assert_allclose(update, [expected, expected], rtol=1e-13)


def test_aligned_mtl_conflicts():  # B.10
    v = np.array([[np.sqrt(3), 1], [-1, np.sqrt(3)]]) / 2
    jacobian = v @ np.diag([1.0, 0.0])
    improvement = jacobian @ aggregate("aligned_mtl", jacobian)
    expected = np.array([3 - np.sqrt(3), 1 - np.sqrt(3)]) / 8
    np.testing.assert_allclose(improvement, expected, atol=1e-12)


def test_upgrad_is_the_mean_without_conflict():
    rng = np.random.default_rng(0)
    jacobian = np.abs(rng.standard_normal((3, 5)))
    np.testing.assert_allclose(aggregate("upgrad", jacobian), jacobian.mean(0), atol=1e-14)


def test_fairgrad_ends():
    jacobian = np.array([[1.0, 2.0], [3.0, -1.0]])
    np.testing.assert_allclose(aggregate("fairgrad", jacobian, 0.0), jacobian.mean(0))
    np.testing.assert_allclose(
        aggregate("fairgrad", jacobian, 1.0), aggregate("nash_mtl", jacobian), rtol=1e-10
    )
    # Large alpha: the direction of the least norm in the hull.
    update, least = aggregate("fairgrad", jacobian, 400.0), aggregate("mgda", jacobian)
    cosine = update @ least / np.linalg.norm(update) / np.linalg.norm(least)
    assert cosine > 1 - 1e-4


@pytest.mark.slow
def test_options_of_nash_and_fairgrad():
    jacobian = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    params = jnp.zeros(2)

    def update(aggregator, rows):
        return np.asarray(jax.jit(aggregator.update)(rows, aggregator.init(params), params)[0])

    normalised = jaxmtl.nash_mtl(normalize=True)
    gram = np.asarray(jacobian @ jacobian.T)
    first = update(normalised, jacobian)
    np.testing.assert_allclose(update(normalised, 3 * jacobian), 3 * first, rtol=1e-10)
    raw = update(jaxmtl.nash_mtl(), jacobian)
    np.testing.assert_allclose(first, raw * np.sqrt(np.linalg.norm(gram)), rtol=1e-10)
    for factory in (jaxmtl.nash_mtl(max_norm=0.5), jaxmtl.fairgrad(2.0, max_norm=0.5)):
        np.testing.assert_allclose(np.linalg.norm(update(factory, jacobian)), 0.5, rtol=1e-10)
    # Degree (1 - alpha) / (1 + alpha) at extreme scales, in range of the format or not.
    fair = jaxmtl.fairgrad(2.0)
    scaled = update(fair, jacobian * 2.0**-600)
    np.testing.assert_allclose(scaled, update(fair, jacobian) * 2.0**200, rtol=1e-10)


@pytest.mark.slow
def test_cagrad_rescaling():
    jacobian = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    params = jnp.zeros(2)
    for rescale, factor in (("1/(1+c^2)", 1 / 1.25), ("1/(1+c)", 1 / 1.5)):
        aggregator = jaxmtl.cagrad(0.5, rescale=rescale)
        update, _ = aggregator.update(jacobian, aggregator.init(params), params)
        expected = factor * aggregate("cagrad", jacobian, 0.5)
        np.testing.assert_allclose(update, expected, rtol=1e-12)


def test_krum_selects_by_the_stated_distance():
    """Squared distances punish one far neighbour more, and then another row is chosen."""
    params, differ = jnp.zeros(3), 0
    rules = [
        jaxmtl.krum(1, num_selected=2, distance=distance, num_tasks=7)
        for distance in ("squared", "euclidean")
    ]
    steps = [(rule, jax.jit(rule.update)) for rule in rules]
    for seed in range(12):
        rows = np.random.default_rng(seed).standard_normal((7, 3))
        gaps = np.linalg.norm(rows[:, None] - rows[None], axis=2)
        chosen = []
        for power, (aggregator, step) in zip((2, 1), steps, strict=True):
            scores = np.sort(gaps**power, 1)[:, 1:5].sum(1)  # m - f - 2 = 4 nearest others
            update, state = step(jnp.asarray(rows), aggregator.init(params), params)
            best = np.argsort(scores)[:2]
            np.testing.assert_allclose(update, rows[best].mean(0), atol=1e-14)
            np.testing.assert_array_equal(np.flatnonzero(state.mtl_weights), np.sort(best))
            chosen.append(set(best))
        differ += chosen[0] != chosen[1]
    assert differ > 0


@pytest.mark.parametrize(
    "name", some(["upgrad", "config", "dual_proj", "cagrad", "aligned_mtl"], 2)
)
def test_preference(name):
    """A preference weighs the tasks; the uniform one is the default."""
    rng = np.random.default_rng(0)
    jacobian = jnp.asarray(rng.standard_normal((3, 5)))
    params = jnp.zeros(5)
    args = (0.5,) if name == "cagrad" else ()

    def update(preference):
        aggregator = getattr(jaxmtl, name)(*args, preference=preference)
        step = jax.jit(aggregator.update)
        return np.asarray(step(jacobian, aggregator.init(params), params)[0])

    np.testing.assert_allclose(update(jnp.full(3, 1 / 3)), update(None), rtol=1e-10)
    tilted = update(jnp.array([1.0, 0.1, 0.1]))
    assert np.abs(tilted - update(None)).max() > 1e-3
    with pytest.raises(ValueError, match="nonnegative"):
        getattr(jaxmtl, name)(*args, preference=jnp.array([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="shape"):
        getattr(jaxmtl, name)(*args, preference=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="num_tasks"):
        update(jnp.ones(4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: jaxmtl.cagrad(-0.1), "c in"),
        (lambda: jaxmtl.cagrad(0.5, rescale="2"), "rescale"),
        (lambda: jaxmtl.upgrad(ridge=-1.0), "ridge"),
        (lambda: jaxmtl.dual_proj(ridge=1e-4, ridge_of="norm"), "ridge_of"),
        (lambda: jaxmtl.mgda(rho=-1.0), "rho"),
        (lambda: jaxmtl.gradvac(num_tasks=2, parts="row"), "parts"),
        (lambda: jaxmtl.gradnorm(num_tasks=2, weights="sigmoid"), "weights"),
        (lambda: jaxmtl.gradvac(2.0, num_tasks=2), "beta"),
        (lambda: jaxmtl.gradvac(), "num_tasks"),
        (lambda: jaxmtl.fairgrad(-1.0), "alpha"),
        (lambda: jaxmtl.nash_mtl(max_norm=0.0), "max_norm"),
        (lambda: jaxmtl.aligned_mtl(scale="max"), "scale"),
        (lambda: jaxmtl.krum(-1), "num_byzantine"),
        (lambda: jaxmtl.krum(1, distance="manhattan"), "distance"),
        (lambda: jaxmtl.trimmed_mean(-1), "trim"),
        (lambda: jaxmtl.graddrop(leak=jnp.array([0.5, 1.5])), "leak"),
        (lambda: jaxmtl.clip_rows(0.0), "max_norm"),
        (lambda: jaxmtl.mgda(num_tasks=0), "num_tasks"),
        (lambda: jaxmtl.mgda(num_tasks=2.0), "num_tasks"),
        (lambda: jaxmtl.linear_scalarization(jnp.ones((2, 2))), "weights"),
        (lambda: jaxmtl.cr_mogm(jaxmtl.mgda()), "num_tasks"),
        (lambda: jaxmtl.cr_mogm(jaxmtl.mgda(), alpha=1.5, num_tasks=2), "alpha"),
        (lambda: jaxmtl.cr_mogm(jaxmtl.mgda(), alpha="corollary1", num_tasks=2), "learning_rate"),
        (lambda: jaxmtl.cr_mogm(jaxmtl.graddrop(), num_tasks=2), "value_and_jacobian"),
        (lambda: jaxmtl.every_k(jaxmtl.mgda(), 0, num_tasks=2), "k to be"),
        (lambda: jaxmtl.scale_rows(jaxmtl.mgda(), by="size"), "by"),
    ],
)
def test_hyperparameters_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_too_few_tasks_for_the_robust_rules():
    params = jnp.zeros(2)
    for aggregator, m in ((jaxmtl.krum(1), 3), (jaxmtl.trimmed_mean(1), 2)):
        with pytest.raises(ValueError, match="got"):
            aggregator.update(jnp.ones((m, 2)), aggregator.init(params), params)
