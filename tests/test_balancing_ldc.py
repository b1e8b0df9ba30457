"""LDC-MTL: both algorithms, its objectives written out, and what its options are for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmtl.rules.ldc_mtl import descend_lower, ldc_mtl

LOSSES = np.array([0.7, 2.0, 1.3])
START = np.array([1.4, 0.5, 1.3])
pytestmark = pytest.mark.usefixtures("x64")


def softmax(x):
    return jnp.exp(x) / jnp.sum(jnp.exp(x))


def objective(logits, losses, penalty=0.5, tau="sigma", form="paper", bounds=None, smooth=0.0):
    """f + lambda g of the paper, as printed."""
    sigma = softmax(logits)
    if bounds is not None:
        sigma = jnp.clip(sigma, *bounds)
    scaled = sigma * losses if tau == "sigma" else losses
    gaps = scaled[:-1] - scaled[1:]
    f = jnp.sum(jnp.sqrt(gaps**2 + smooth) if smooth else jnp.abs(gaps))
    g = jnp.sum(sigma * losses)
    return f + penalty * g if form == "paper" else g + penalty * f


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tau": "ones"},
        {"form": "code"},
        {"bounds": (0.2, 0.3)},
        {"smooth": 0.1},
    ],
    ids=str,
)
def test_both_sides_descend_the_objective(options):
    mine = {"weight_bounds" if k == "bounds" else k: v for k, v in options.items()}
    weighting = ldc_mtl(0.5, num_tasks=3, optimizer=optax.sgd(0.7), **mine).weighting
    update, state, logits = jax.jit(weighting.update), weighting.init(), jnp.ones(3)
    slopes = jax.jit(jax.grad(lambda *args: objective(*args, **options), (0, 1)))
    for _ in range(3):
        of_logits, of_losses = slopes(logits, jnp.asarray(LOSSES))
        weights, state = update(None, state, losses=jnp.asarray(LOSSES))
        np.testing.assert_allclose(weights, of_losses, rtol=1e-9)
        logits = logits - 0.7 * of_logits
        np.testing.assert_allclose(state.inner.router.values["logits"], logits, rtol=1e-9)


def test_weights_of_the_parameters_are_those_of_the_formula():
    weighting = ldc_mtl(0.5, num_tasks=3, normalize="log").weighting
    state = weighting.update(None, weighting.init(), losses=jnp.asarray(START))[1]
    sigma = softmax(state.inner.router.values["logits"])
    weights, _ = weighting.update(None, state, losses=jnp.asarray(LOSSES))
    scaled = sigma * np.log(LOSSES / START)
    s = np.concatenate([[0], np.sign(scaled[:-1] - scaled[1:]), [0]])
    expected = (0.5 * sigma + sigma * (s[1:] - s[:-1])) / LOSSES
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


@pytest.mark.parametrize("how", ["ratio", "ratio_min", "log"])
def test_normalisations_start_anew_each_epoch(how):
    weighting = ldc_mtl(num_tasks=3, normalize=how, tau="ones", steps_per_epoch=2).weighting
    update, state = jax.jit(weighting.update), weighting.init()
    for losses in (LOSSES, LOSSES, START, LOSSES):
        sigma = softmax(state.inner.router.values["logits"])
        weights, state = update(None, state, losses=jnp.asarray(losses))
    scale = {"ratio": START, "ratio_min": START / START.min(), "log": LOSSES}[how]
    scaled = np.log(LOSSES / START) if how == "log" else LOSSES / scale
    s = np.concatenate([[0], np.sign(scaled[:-1] - scaled[1:]), [0]])
    np.testing.assert_allclose(weights, (sigma + s[1:] - s[:-1]) / scale, rtol=1e-9)


def test_sigmoid_form_divides_by_the_sum_of_weights():
    weighting = ldc_mtl(2.0, num_tasks=3, activation="sigmoid", optimizer=optax.sgd(1.0)).weighting

    def stated(logits, losses):
        sigma = jax.nn.sigmoid(logits)
        gaps = jnp.diff(sigma * losses)
        return jnp.sum(jnp.abs(gaps)) + 2 * jnp.sum(sigma * losses) / jnp.sum(sigma)

    of_logits, of_losses = jax.grad(stated, (0, 1))(jnp.ones(3), jnp.asarray(LOSSES))
    weights, state = weighting.update(None, weighting.init(), losses=jnp.asarray(LOSSES))
    np.testing.assert_allclose(weights, of_losses, rtol=1e-9)
    np.testing.assert_allclose(state.inner.router.values["logits"], 1 - of_logits, rtol=1e-9)


def test_router_on_features():
    weighting = ldc_mtl(
        0.5, num_tasks=3, feature_size=2, hidden=(4,), optimizer=optax.sgd(0.5)
    ).weighting
    state = weighting.init()
    values = state.inner.router.values
    features = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7, 2)))

    def logits(values, features):
        z = jnp.mean(features, (0, 1))
        z = jax.nn.relu(z @ values["hidden"][0]["kernel"] + values["hidden"][0]["bias"])
        return z @ values["logits"]["kernel"] + values["logits"]["bias"]

    def stated(values, losses, features):
        return objective(logits(values, features), losses)

    losses = jnp.asarray(LOSSES)
    slopes = jax.grad(stated, (0, 1, 2))(values, losses, features)
    attached = weighting.feature_gradient(state, losses, features)
    np.testing.assert_allclose(attached, slopes[2], rtol=1e-9, atol=1e-15)
    weights, state = weighting.update(None, state, losses=losses, features=features)
    np.testing.assert_allclose(weights, slopes[1], rtol=1e-9)
    expected = jax.tree.map(lambda x, g: x - 0.5 * g, values, slopes[0])
    new = state.inner.router.values
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), new, expected)
    with pytest.raises(ValueError, match="features"):
        weighting.update(None, state, losses=losses)
    with pytest.raises(ValueError, match="features"):
        weighting.update(None, state, losses=losses, features=jnp.ones(3))


def test_algorithm_two():
    """N plain steps on lambda g from x, then W on f + lambda (g(x) - g(z_N))."""
    targets, penalty, beta = jnp.array([1.0, -2.0, 0.5]), 0.5, 0.1

    def losses_fn(params):
        return (params - targets) ** 2 + jnp.array([0.1, 0.2, 0.3])

    aggregator = ldc_mtl(penalty, num_tasks=3, double_loop=True, optimizer=optax.sgd(1.0))
    params = jnp.array(0.3)
    state = aggregator.init(params)
    sigma = softmax(jnp.ones(3))
    z = params
    for _ in range(4):
        z = z - beta * penalty * jnp.sum(sigma * 2 * (z - targets))
    lower = descend_lower(losses_fn, aggregator, num_steps=4, step_size=beta)(params, state)
    np.testing.assert_allclose(lower, losses_fn(z), rtol=1e-12)

    def stated(logits):
        below = jnp.sum(softmax(logits) * losses_fn(z))
        return objective(logits, losses_fn(params)) - penalty * below

    losses = losses_fn(params)
    _, state = aggregator.weighting.update(None, state, losses=losses, lower_losses=lower)
    expected = 1 - jax.grad(stated)(jnp.ones(3))
    np.testing.assert_allclose(state.inner.router.values["logits"], expected, rtol=1e-9)
    with pytest.raises(ValueError, match="lower_losses"):
        aggregator.weighting.update(None, state, losses=losses)


def test_reversing_the_tasks_changes_nothing_and_other_orders_do():
    weighting = ldc_mtl(num_tasks=3).weighting
    update, state = jax.jit(weighting.update), weighting.init()
    weights, _ = update(None, state, losses=jnp.asarray(LOSSES))
    reverse, _ = update(None, state, losses=jnp.asarray(LOSSES[::-1]))
    np.testing.assert_allclose(reverse, weights[::-1], rtol=1e-12)
    rolled, _ = update(None, state, losses=jnp.asarray(np.roll(LOSSES, 1)))
    assert not np.allclose(rolled, np.roll(weights, 1))


@pytest.mark.parametrize("bounds", [None, (0.2, 0.8)])
def test_with_tau_one_the_router_collapses_unless_bounded(bounds):
    weighting = ldc_mtl(
        num_tasks=2, tau="ones", weight_bounds=bounds, optimizer=optax.sgd(1.0)
    ).weighting
    losses = jnp.array([1.0, 3.0])

    def step(state, _):
        weights, state = weighting.update(None, state, losses=losses)
        return state, weights

    weights = jax.jit(lambda: jax.lax.scan(step, weighting.init(), None, 300)[1])()[-1]
    sigma = weights - jnp.array([-1.0, 1.0])  # less the part of f
    np.testing.assert_allclose(sigma, [1, 0] if bounds is None else [0.8, 0.2], atol=0.01)


def test_absent_task_makes_its_neighbours_neighbours():
    three, two = ldc_mtl(0.5, num_tasks=3).weighting, ldc_mtl(0.5, num_tasks=2).weighting
    mask = jnp.array([True, False, True])
    weights, state = three.update(
        None, three.init(), losses=jnp.array([0.7, jnp.nan, 1.3]), task_mask=mask
    )
    expected, small = two.update(None, two.init(), losses=jnp.array([0.7, 1.3]))
    np.testing.assert_allclose(weights, [expected[0], 0, expected[1]], rtol=1e-12)
    logits, kept = small.inner.router.values["logits"], state.inner.router.values["logits"]
    np.testing.assert_allclose(kept, [logits[0], 1, logits[1]], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_tasks": None}, "num_tasks"),
        ({"form": "both"}, "form"),
        ({"hidden": (3,)}, "feature_size"),
        ({"weight_bounds": (0.8, 0.2)}, "bound"),
        ({"smooth": -1.0}, "smooth"),
        ({"penalty": -1.0}, "penalty"),
    ],
)
def test_refuses_wrong_options(options, word):
    with pytest.raises(ValueError, match=word):
        ldc_mtl(**({"num_tasks": 2} | options))
