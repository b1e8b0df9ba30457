"""Rules on the losses: exact sequences, the objectives they state, their options."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmtl.rules.dwa import dwa
from jaxmtl.rules.famo import famo
from jaxmtl.rules.fixed import rgw
from jaxmtl.rules.go4align import go4align, group_means
from jaxmtl.rules.gradnorm import gradnorm
from jaxmtl.rules.imtl import imtl
from jaxmtl.rules.imtl_g import imtl_g
from jaxmtl.rules.learned_scale import imtl_l, uncertainty_weighting
from jaxmtl.rules.rlw import rlw
from jaxmtl.rules.scale_invariant import gls, scale_invariant
from jaxmtl.rules.stch import stch
from tests.golden_sequences import names, sequences

GOLDEN = {
    "FAMO_default": lambda m: famo(num_tasks=m),
    "DWA_T2_step_every_call": lambda m: dwa(num_tasks=m),
    "GeometricMean": lambda m: gls(),
    "STCH_mu0.5": lambda m: stch(0.5),
    "UW_sgd0.1": lambda m: uncertainty_weighting(num_tasks=m, optimizer=optax.sgd(0.1)),
    "IMTLL_sgd0.1": lambda m: imtl_l(num_tasks=m, optimizer=optax.sgd(0.1)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", GOLDEN)
def test_sequences(name):
    data = sequences()
    for key in names(f"{name}/dvalue_dloss"):
        losses, after = data[f"{key}/losses"], data[f"{key}/losses_after"]
        weighting = GOLDEN[name](losses.shape[1]).weighting

        def step(state, inputs, weighting=weighting):
            now, previous = inputs
            weights, state = weighting.update(
                None, state, losses=now, previous_batch_losses=previous
            )
            return state, weights

        previous = np.concatenate([np.full_like(after[:1], np.nan), after[:-1]])
        scan = jax.jit(lambda x: jax.lax.scan(step, weighting.init(), x)[1])  # noqa: B023
        np.testing.assert_allclose(
            scan((jnp.asarray(losses), jnp.asarray(previous))),
            data[f"{key}/{name}/dvalue_dloss"],
            rtol=0,
            atol=1e-10,
        )


# --- weights are the gradient of the stated objective -----------------------------------------

LOSSES = np.array([0.7, 2.0, 1.3])
P = np.array([0.2, 0.5, 0.3])
NADIR = np.array([1.0, 1.5, 0.5])
Z = np.array([0.1, -0.3, 0.2])

OBJECTIVES = {
    "scale_invariant": (lambda: scale_invariant(), lambda losses: jnp.sum(jnp.log(losses))),
    "gls": (lambda: gls(), lambda losses: jnp.prod(losses) ** (1 / 3)),
    "stch": (
        lambda: stch(0.3, preference=P, ideal=Z),
        lambda losses: 0.3 * jnp.log(jnp.sum(jnp.exp(P * (losses - Z) / 0.3))),
    ),
    "stch_code": (
        lambda: stch(0.3, form="code", nadir=NADIR),
        lambda losses: 3 * 0.3 * jnp.log(jnp.sum((losses / NADIR) ** (1 / 0.3))),
    ),
    "uncertainty_weighting": (
        lambda: uncertainty_weighting(
            ["regression", "classification", "regression"], num_tasks=3, initial=-0.5
        ),
        lambda losses: jnp.sum(jnp.array([0.5, 1, 0.5]) * jnp.exp(0.5) * losses - 0.25),
    ),
    "imtl_l": (lambda: imtl_l(num_tasks=3), lambda losses: jnp.sum(losses)),
    "dwa": (lambda: dwa(num_tasks=3), lambda losses: jnp.sum(losses)),
    "famo": (
        lambda: famo(num_tasks=3, min_losses=Z),
        lambda losses: (
            jnp.sum(jnp.log(losses - Z + 1e-8))
            / 3
            / jax.lax.stop_gradient(jnp.sum(1 / (losses - Z + 1e-8)) / 3)
        ),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_are_the_gradient_of_the_objective(name):
    make, objective = OBJECTIVES[name]
    weighting, losses = make().weighting, jnp.asarray(LOSSES)
    weights, _ = weighting.update(
        None, weighting.init(), losses=losses, previous_batch_losses=jnp.zeros(3)
    )
    np.testing.assert_allclose(weights, jax.grad(objective)(losses), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [uncertainty_weighting, imtl_l])
def test_learned_scales_descend_the_objective(make):
    def objective(s, losses):
        if make is imtl_l:
            return jnp.sum(jnp.exp(s) * losses - s)
        return jnp.sum(0.5 * jnp.exp(-s) * losses + s / 2)

    optimizer = optax.adam(0.1)
    weighting = make(num_tasks=3, optimizer=optimizer).weighting
    state, losses = weighting.init(), jnp.asarray(LOSSES)
    s = jnp.zeros(3)
    inner = optimizer.init(s)
    for _ in range(3):
        _, state = weighting.update(None, state, losses=losses)
        updates, inner = optimizer.update(jax.grad(objective)(s, losses), inner, s)
        s = s + updates
    np.testing.assert_allclose(state.inner.values, s, rtol=1e-12)


# --- the rules one by one ---------------------------------------------------------------------


def test_rlw_draws_what_rgw_draws():
    losses, random = rlw(seed=3).weighting, rgw(seed=3).weighting
    drawn, _ = losses.update(None, losses.init(), losses=jnp.ones(4))
    expected, _ = random.update(jnp.eye(4), random.init())
    np.testing.assert_array_equal(drawn, expected)
    key = jax.random.key(7)
    with_key = losses.update(None, losses.init(), losses=jnp.ones(4), key=key)[0]
    assert not np.array_equal(with_key, drawn)


@pytest.mark.usefixtures("x64")
def test_famo_equals_its_official_order():
    """The authors' loop balances after the step on the same batch; ours at the next call."""
    rng = np.random.default_rng(0)
    before, after = rng.uniform(0.5, 2, (2, 5, 3))
    xi, m, v, decay = np.zeros(3), 0, 0, 1e-3
    weighting = famo(num_tasks=3).weighting
    state, update = weighting.init(), jax.jit(weighting.update)
    previous = np.full(3, np.inf)
    for t in range(5):
        z = np.exp(xi) / np.exp(xi).sum()
        d = before[t] + 1e-8
        expected = z / d / (z / d).sum()
        weights, state = update(
            None, state, losses=jnp.asarray(before[t]), previous_batch_losses=jnp.asarray(previous)
        )
        np.testing.assert_allclose(weights, expected, rtol=1e-12)
        previous = after[t]
        # The official update(): Adam with L2 decay added to the gradient.
        fallen = np.log(d) - np.log(after[t] + 1e-8)
        gradient = z * (fallen - z @ fallen) + decay * xi
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        xi = xi - 0.025 * step


def test_famo_without_previous_losses():
    weighting = famo(num_tasks=2).weighting
    with pytest.raises(ValueError, match="previous_batch_losses"):
        weighting.update(None, weighting.init(), losses=jnp.ones(2))


def test_dwa_averages_over_epochs():
    weighting = dwa(steps_per_epoch=2, num_tasks=2).weighting
    update, state = jax.jit(weighting.update), weighting.init()
    for losses in ([1.0, 3.0], [3.0, 1.0], [1.0, 4.0], [2.0, 5.0]):
        weights, state = update(None, state, losses=jnp.array(losses))
        np.testing.assert_allclose(weights, [1, 1], rtol=1e-6)
    weights, state = update(None, state, losses=jnp.ones(2))
    ratio = np.exp(np.array([1.5 / 2, 4.5 / 2]) / 2)
    np.testing.assert_allclose(weights, 2 * ratio / ratio.sum(), rtol=1e-6)


def test_dwa_does_not_count_an_epoch_without_the_task():
    weighting = dwa(num_tasks=2).weighting
    update, state = jax.jit(weighting.update), weighting.init()
    for losses, present in (([2.0, 2.0], True), ([9.0, 9.0], False), ([1.0, 1.0], True)):
        mask = jnp.array([True, present])
        _, state = update(None, state, losses=jnp.array(losses), task_mask=mask)
    weights, _ = update(None, state, losses=jnp.ones(2), task_mask=jnp.ones(2, bool))
    ratio = np.exp(np.array([1 / 9, 1 / 2]) / 2)
    np.testing.assert_allclose(weights, 2 * ratio / ratio.sum(), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_stch_code_form_warms_up_on_logarithms():
    weighting = stch(0.5, form="code", warmup_epochs=1, steps_per_epoch=2, num_tasks=2).weighting
    update, state = jax.jit(weighting.update), weighting.init()
    steps = np.array([[9.0, 9.0], [9.0, 9.0], [1.0, 2.0], [3.0, 4.0]])
    for losses in steps:
        weights, state = update(None, state, losses=jnp.asarray(losses))
        np.testing.assert_allclose(weights, 1 / losses, rtol=1e-12)
    losses = np.array([1.0, 1.0])
    weights, _ = update(None, state, losses=jnp.asarray(losses))
    q = (losses / np.array([2.0, 3.0])) ** 2
    np.testing.assert_allclose(weights, 2 * q / q.sum() / losses, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_group_means_are_the_best_grouping():
    rng = np.random.default_rng(0)
    grouped = jax.jit(group_means, static_argnums=1)
    for k, values in ((2, rng.uniform(0, 1, 6)), (3, rng.uniform(0, 9, 6) ** 3)):
        best, means = np.inf, None
        order = np.argsort(values)
        for cuts in itertools.combinations(range(1, 6), k - 1):
            candidate = values.copy()
            for part in np.split(order, cuts):
                candidate[part] = values[part].mean()
            cost = ((values - candidate) ** 2).sum()
            if cost < best:
                best, means = cost, candidate
        np.testing.assert_allclose(grouped(values, k, np.ones(6, bool)), means, rtol=1e-12)
        mask = np.array([1, 1, 0, 1, 1, 1], bool)
        np.testing.assert_allclose(
            np.asarray(grouped(np.where(mask, values, 1e9), k, mask))[mask],
            group_means(jnp.asarray(values[mask]), k, jnp.ones(5, bool)),
            rtol=1e-12,
        )


@pytest.mark.usefixtures("x64")
def test_go4align_follows_its_formula():
    weighting = go4align(3, step_size=0.1, num_tasks=3).weighting  # a group each: v itself
    state, p = weighting.init(), np.ones(3) / 3
    for _ in range(2):
        weights, state = weighting.update(None, state, losses=jnp.asarray(LOSSES))
        p = p * np.exp(-0.1 * LOSSES)
        p = p / p.sum()
        np.testing.assert_allclose(weights, p * LOSSES.sum() / LOSSES, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradnorm_descends_its_objective():
    norms, initial, alpha = np.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 4.0]), 1.5
    weighting = gradnorm(alpha, num_tasks=3, initial_losses=initial).weighting
    update, state, w = jax.jit(weighting.update), weighting.init(), jnp.ones(3)
    gramian = jnp.diag(jnp.asarray(norms) ** 2)

    def objective(w):
        ratio = (LOSSES / initial) / np.mean(LOSSES / initial)
        target = jax.lax.stop_gradient(jnp.mean(w * norms) * ratio**alpha)
        return jnp.sum(jnp.abs(w * norms - target))

    for _ in range(3):
        weights, state = update(gramian, state, losses=jnp.asarray(LOSSES))
        np.testing.assert_allclose(weights, w, rtol=1e-12)
        w = w - 0.025 * jax.grad(objective)(w)
        w = 3 * w / jnp.sum(w)
    np.testing.assert_allclose(weighting.head_weights(state), w, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_imtl_is_imtl_g_on_scaled_gradients():
    jacobian = np.random.default_rng(0).standard_normal((3, 5))
    weighting, params = imtl(num_tasks=3).weighting, jnp.zeros(5)
    aggregator = imtl(num_tasks=3, optimizer=optax.sgd(0.1))
    weighting, state, s = aggregator.weighting, aggregator.init(params), np.zeros(3)
    plain = imtl_g()
    for _ in range(2):
        scaled = np.exp(s)[:, None] * jacobian
        expected, _ = plain.update(jnp.asarray(scaled), plain.init(params), params)
        np.testing.assert_allclose(weighting.head_weights(state), np.exp(s), rtol=1e-12)
        update, state = aggregator.update(
            jnp.asarray(jacobian), state, params, losses=jnp.asarray(LOSSES)
        )
        np.testing.assert_allclose(update, expected, rtol=1e-9)
        s = s - 0.1 * (np.exp(s) * LOSSES - 1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (dwa, "num_tasks"),
        (famo, "num_tasks"),
        (imtl, "num_tasks"),
        (lambda: stch(0.0), "mu"),
        (lambda: stch(form="code"), "num_tasks"),
        (lambda: uncertainty_weighting("both", num_tasks=2), "kind"),
        (lambda: uncertainty_weighting(["regression"], num_tasks=2), "tasks"),
        (lambda: dwa(steps_per_epoch=0, num_tasks=2), "steps_per_epoch"),
        (lambda: go4align(0, num_tasks=2), "num_groups"),
        (lambda: gradnorm(-1.0, num_tasks=2), "alpha"),
        (lambda: famo(num_tasks=2, min_losses=jnp.ones(3)), "min_losses"),
    ],
)
def test_refuses_wrong_options(make, word):
    with pytest.raises(ValueError, match=word):
        make()
