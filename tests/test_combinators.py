"""cr_mogm, every_k, scale_rows and clip_rows against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from tests.problems import some

pytestmark = pytest.mark.usefixtures("x64")


def gramians(count, m=3, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, m, 5))
    return [jnp.asarray(j @ j.T) for j in rows]


def weights_over(aggregator, sequence, **extra):
    weighting = aggregator.weighting
    state, found = weighting.init(), []
    step = jax.jit(weighting.update)
    for gram in sequence:
        weights, state = step(gram, state, **extra)
        found.append(np.asarray(weights))
    return np.array(found)


@pytest.mark.parametrize("start", some(["first", None, jnp.array([1.0, 0.0, 0.0])]))
def test_cr_mogm_is_algorithm_1(start):
    sequence = gramians(5)
    plain = weights_over(jaxmtl.mgda(), sequence)
    averaged = weights_over(
        jaxmtl.cr_mogm(jaxmtl.mgda(), alpha=0.7, initial_weights=start, num_tasks=3), sequence
    )
    w = {None: np.full(3, 1 / 3)}.get(start if start is None else 0)
    if w is None:
        w = plain[0] if isinstance(start, str) else np.asarray(start, float)
    for hat, got in zip(plain, averaged, strict=True):
        w = 0.7 * w + 0.3 * hat
        np.testing.assert_allclose(got, w, rtol=1e-12)


def test_cr_mogm_with_a_schedule_counts_from_zero():
    def share(step):
        return step.astype(float) / (step + 1)  # int32 / int32 would be float32

    sequence = gramians(3)
    plain = weights_over(jaxmtl.mgda(), sequence)
    aggregator = jaxmtl.cr_mogm(jaxmtl.mgda(num_tasks=3), alpha=share)
    w = np.full(3, 1 / 3)
    for step, (hat, got) in enumerate(zip(plain, weights_over(aggregator, sequence), strict=True)):
        a = step / (step + 1)
        w = a * w + (1 - a) * hat
        np.testing.assert_allclose(got, w, rtol=1e-12)


@pytest.mark.parametrize("constant", [False, True])
def test_cr_mogm_with_the_rate_of_corollary_1(constant):
    sequence = gramians(4)
    plain = weights_over(jaxmtl.mgda(), sequence)
    eta = (lambda step: 0.1) if constant else (lambda step: 0.1 / (step + 1) ** 0.5)
    aggregator = jaxmtl.cr_mogm(
        jaxmtl.mgda(),
        alpha="corollary1",
        learning_rate=0.1 if constant else eta,
        num_tasks=3,
    )
    w = np.full(3, 1 / 3)
    for k, (hat, got) in enumerate(
        zip(plain, weights_over(aggregator, sequence), strict=True), start=1
    ):
        ratio = eta(k - 1) / eta(0)
        a = max(1 - ratio, 1 - ratio / (k * np.abs(w - hat).sum()))
        w = a * w + (1 - a) * hat
        np.testing.assert_allclose(got, w, rtol=1e-10)


def test_corollary_1_where_nothing_moved():
    """The sum is 0: alpha = 1 - eta_k / eta_1, and the weights stay."""
    aggregator = jaxmtl.cr_mogm(
        jaxmtl.linear_scalarization(), alpha="corollary1", learning_rate=0.1, num_tasks=3
    )
    np.testing.assert_allclose(weights_over(aggregator, gramians(2)), 1 / 3)


@pytest.mark.parametrize(
    "name", ["pcgrad", "upgrad", pytest.param("cagrad", marks=pytest.mark.slow)]
)
def test_cr_mogm_wraps_any_weighting(name):
    inner = jaxmtl.cagrad(0.5) if name == "cagrad" else getattr(jaxmtl, name)()
    sequence = gramians(3)
    plain = weights_over(inner, sequence)
    averaged = weights_over(
        jaxmtl.cr_mogm(inner, alpha=0.5, initial_weights="first", num_tasks=3), sequence
    )
    np.testing.assert_allclose(averaged[1], (plain[0] + plain[1]) / 2, rtol=1e-12)


def test_cr_mogm_keeps_the_weights_of_absent_tasks():
    aggregator = jaxmtl.cr_mogm(jaxmtl.mgda(), alpha=0.5, num_tasks=3)
    weighting = aggregator.weighting
    first, state = weighting.update(gramians(1)[0], weighting.init())
    mask = jnp.array([True, False, True])
    masked, state = weighting.update(gramians(1)[0], state, task_mask=mask)
    assert masked[1] == 0
    assert state.inner.average[1] == first[1]


@pytest.mark.parametrize("start", some(["first", None, np.array([0.5, 0.2, 0.3])]))
@pytest.mark.parametrize("name", ["mgda", pytest.param("upgrad", marks=pytest.mark.slow)])
def test_cr_mogm_with_an_absent_task_is_the_run_on_the_others(name, start):
    """Whatever the weights of the rule sum to; the one that returns has its share of the total."""
    inner, sequence = getattr(jaxmtl, name)(), gramians(6)
    weighting = jaxmtl.cr_mogm(inner, alpha=0.9, initial_weights=start, num_tasks=3).weighting
    present = np.array([0, 2])
    of_two = start if start is None or isinstance(start, str) else start[present] / 0.8
    small = jaxmtl.cr_mogm(inner, alpha=0.9, initial_weights=of_two, num_tasks=2)
    expected = weights_over(small, [g[np.ix_(present, present)] for g in sequence])
    step, state = jax.jit(weighting.update), weighting.init()
    for gram, two in zip(sequence, expected, strict=True):
        weights, state = step(gram, state, task_mask=jnp.array([True, False, True]))
        np.testing.assert_allclose(weights, [two[0], 0, two[1]], rtol=1e-12)
    average = np.asarray(state.inner.average)
    share = 0.0 if isinstance(start, str) else 1 / 3 if start is None else 0.2
    np.testing.assert_allclose(average[1], share * two.sum(), atol=1e-12)
    np.testing.assert_allclose(average.sum(), two.sum(), rtol=1e-12)
    back, _ = step(sequence[0], state, task_mask=jnp.ones(3, bool))
    plain = weights_over(inner, sequence[:1])[0]
    np.testing.assert_allclose(back, 0.9 * average + 0.1 * plain, rtol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    some(
        [
            optax.linear_schedule(0.0, 0.1, 4),
            optax.linear_schedule(1e-6, 1.0, 3),
            optax.constant_schedule(0.0),
            optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8, 0.0),
        ]
    ),
    ids=["from zero", "from a small rate", "zero", "warm-up and decay"],
)
def test_corollary_1_stays_between_its_ends_for_every_schedule(schedule):
    sequence = gramians(9)
    plain = weights_over(jaxmtl.mgda(), sequence)
    aggregator = jaxmtl.cr_mogm(
        jaxmtl.mgda(), alpha="corollary1", learning_rate=schedule, num_tasks=3
    )
    w, highest = np.full(3, 1 / 3), 0.0
    for k, (hat, got) in enumerate(
        zip(plain, weights_over(aggregator, sequence), strict=True), start=1
    ):
        highest = max(highest, float(schedule(k - 1)))
        ratio = float(schedule(k - 1)) / highest if highest else 1.0
        a = max(1 - ratio, 1 - ratio / (k * np.abs(w - hat).sum()))
        assert 0 <= a <= 1
        w = a * w + (1 - a) * hat
        np.testing.assert_allclose(got, w, rtol=1e-6)  # optax's schedules are float32
        assert got.min() >= 0


@pytest.mark.parametrize(
    "rule",
    some([(jaxmtl.fairgrad(2.0, max_norm=1.0),), (jaxmtl.nash_mtl(max_norm=1.0),)]),
    ids=["fair", "nash"],
)
def test_a_bound_on_the_norm_holds_between_renewals(rule):
    aggregator = jaxmtl.every_k(rule, 3, num_tasks=2)
    params, state = jnp.zeros(2), aggregator.init(jnp.zeros(2))
    step, found = jax.jit(aggregator.update), []
    for scale in (1.0, 5.0, 0.5, 7.0):
        update, state = step(scale * jnp.eye(2), state, params)
        found.append(np.asarray(update))
    norms = np.linalg.norm(found, axis=1)
    # Weights kept from I are (1, 1) or (1, 1): of norm sqrt(2) on I, and never above the bound.
    np.testing.assert_allclose(norms[:3], [1, 1, np.sqrt(2) / 2], rtol=1e-10)
    assert norms[3] <= 1 + 1e-12
    on_units = jaxmtl.every_k(jaxmtl.scale_rows(rule, apply_to="scaled"), 2, num_tasks=2)
    state = on_units.init(params)
    for scale in (1.0, 5.0):
        update, state = on_units.update(scale * jnp.eye(2), state, params)
        np.testing.assert_allclose(np.linalg.norm(update), 1, rtol=1e-10)


def test_every_k_waits_for_a_task():
    """A renewal without any task would leave k - 1 steps without weights."""
    sequence = gramians(5)
    weighting = jaxmtl.every_k(jaxmtl.mgda(), 3, num_tasks=3).weighting
    plain = weights_over(jaxmtl.mgda(), sequence)
    step, state, found = jax.jit(weighting.update), weighting.init(), []
    for gram, there in zip(sequence, (False, True, True, True, True), strict=True):
        weights, state = step(gram, state, task_mask=jnp.full(3, there))
        found.append(np.asarray(weights))
    np.testing.assert_allclose(found, [np.zeros(3), *plain[[1, 1, 1, 4]]], rtol=1e-12)


def test_every_k_renews_every_k_steps():
    sequence = gramians(5)
    plain = weights_over(jaxmtl.mgda(), sequence)
    kept = weights_over(jaxmtl.every_k(jaxmtl.mgda(), 2, num_tasks=3), sequence)
    np.testing.assert_allclose(kept, plain[[0, 0, 2, 2, 4]], rtol=1e-12)


@pytest.mark.parametrize("apply_to", ["raw", "scaled"])
@pytest.mark.parametrize("by", some(["loss_norm", "norm", "loss"]))
def test_scale_rows(by, apply_to):
    rng = np.random.default_rng(0)
    jacobian = rng.standard_normal((3, 5)) * np.array([[1.0], [10.0], [1e3]])
    losses = np.array([0.5, 2.0, 1e-3])
    norms = np.linalg.norm(jacobian, axis=1)
    divisor = {"norm": norms, "loss": losses, "loss_norm": losses * norms}[by]
    scaled = jacobian / divisor[:, None]
    w = weights_over(jaxmtl.mgda(), [jnp.asarray(scaled @ scaled.T)])[0]
    expected = w if apply_to == "raw" else w / divisor
    got = weights_over(
        jaxmtl.scale_rows(jaxmtl.mgda(), by=by, apply_to=apply_to),
        [jnp.asarray(jacobian @ jacobian.T)],
        losses=jnp.asarray(losses),
    )[0]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_scale_rows_of_a_rule_with_a_scale_of_its_own():
    """FairGrad on rows divided by the loss sees the divided rows at their true scale."""
    rng = np.random.default_rng(0)
    jacobian = np.abs(rng.standard_normal((3, 5))) * 7
    losses = np.array([0.5, 2.0, 3.0])
    scaled = jacobian / losses[:, None]
    expected = weights_over(jaxmtl.fairgrad(2.0), [jnp.asarray(scaled @ scaled.T)])[0]
    got = weights_over(
        jaxmtl.scale_rows(jaxmtl.fairgrad(2.0), by="loss"),
        [jnp.asarray(jacobian @ jacobian.T)],
        losses=jnp.asarray(losses),
    )[0]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_scale_rows_leaves_rows_of_zero_norm_or_loss():
    aggregator = jaxmtl.scale_rows(jaxmtl.upgrad(), by="loss")
    weights = weights_over(aggregator, [jnp.eye(2)], losses=jnp.array([0.0, 0.0]))[0]
    np.testing.assert_allclose(weights, [0.5, 0.5])
    aggregator = jaxmtl.scale_rows(jaxmtl.mgda(), by="norm")
    weights = weights_over(aggregator, [jnp.diag(jnp.array([0.0, 4.0]))])[0]
    np.testing.assert_allclose(weights, [1, 0])
    with pytest.raises(ValueError, match="reads losses"):
        weights_over(jaxmtl.scale_rows(jaxmtl.mgda(), by="loss"), [jnp.eye(2)])


@pytest.mark.slow
def test_combinators_nest_with_one_set_of_logs():
    inner = jaxmtl.scale_rows(jaxmtl.cagrad(0.5, num_tasks=3), by="norm")
    aggregator = jaxmtl.cr_mogm(jaxmtl.every_k(inner, 2), alpha=0.5)
    params = jnp.zeros(5)
    optimizer = optax.chain(jaxmtl.clip_rows(1.0), aggregator, optax.sgd(0.1))
    state = optimizer.init(params)
    assert optax.tree.get(state, "mtl_weights").shape == (3,)
    assert optax.tree.get(state, "mtl_residual").shape == ()
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)))
    _, state = optimizer.update(rows, state, params)
    assert float(jnp.sum(optax.tree.get(state, "mtl_weights"))) > 0


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_clip_rows(scale):
    rng = np.random.default_rng(0)
    rows = {"a": scale * rng.standard_normal((3, 2)), "b": scale * rng.standard_normal((3, 4))}
    rows["a"][0] *= 1e-3
    rows["b"][0] *= 1e-3
    norms = np.sqrt((rows["a"] / scale) ** 2 @ np.ones(2) + (rows["b"] / scale) ** 2 @ np.ones(4))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(4)}
    clip = jaxmtl.clip_rows(0.5 * scale)
    clipped, _ = clip.update(
        {k: jnp.asarray(v) for k, v in rows.items()}, clip.init(params), params
    )
    factor = np.minimum(1, 0.5 / norms)[:, None]
    for name in rows:
        np.testing.assert_allclose(clipped[name], rows[name] * factor, rtol=1e-12)
    assert factor[0] == 1
    np.testing.assert_array_equal(clipped["a"][0], rows["a"][0])
