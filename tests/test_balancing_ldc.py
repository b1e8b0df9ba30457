"""LDC-MTL: both algorithms, its objectives written out, and what its options are for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
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


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("tau", ["ones", "sigma"])
@pytest.mark.parametrize("how", [None, "log", "ratio", "ratio_min"])
def test_equal_neighbours_have_no_slope(how, tau, form):
    """At the first step of an epoch every normalized loss is equal: f is then not descended."""
    m, equal = 3, np.full(3, 1.5)
    losses = equal if how is None else LOSSES
    weighting = ldc_mtl(
        0.5, num_tasks=m, normalize=how, tau=tau, form=form, optimizer=optax.sgd(1.0)
    ).weighting
    weights, state = weighting.update(None, weighting.init(), losses=jnp.asarray(losses))
    slope = {"ratio": 1 / losses, "ratio_min": losses.min() / losses, "log": 1 / losses}
    expected = (0.5 if form == "paper" else 1.0) / m * slope.get(how, np.ones(m))
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    # All terms of g are equal under the softmax: the router stays, within rounding.
    scaled = {"log": np.zeros(m), "ratio": np.ones(m)}.get(how, np.full(m, 1.0))
    if np.ptp(scaled) == 0:
        np.testing.assert_allclose(state.inner.router.values["logits"], np.ones(m), atol=1e-12)


def test_two_equal_losses_with_tau_one():
    weighting = ldc_mtl(0.5, num_tasks=2, tau="ones").weighting
    weights, _ = weighting.update(None, weighting.init(), losses=jnp.ones(2))
    np.testing.assert_allclose(weights, [0.25, 0.25], rtol=1e-12)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def adam(gradient, start, steps, rate=1e-3):
    x, first, second = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t in range(1, steps + 1):
        g = gradient(x)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        x -= rate * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    return x


def run_constant(weighting, steps):
    """Router and the last weights after many steps at constant losses."""

    def step(state, _):
        weights, state = weighting.update(None, state, losses=jnp.asarray(LOSSES))
        return state, weights

    state, weights = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(weighting.init())
    return np.asarray(state.inner.router.values["logits"]), np.asarray(weights[-1])


def test_the_code_of_celeba_keeps_its_shares():
    """g over the sum of sigmoids, a constant to W: by Adam and derivatives written out."""
    weighting = ldc_mtl(0.01, num_tasks=3, form="code", activation="sigmoid").weighting

    def gradient(logits):
        sigma = sigmoid(logits)
        slope = sigma * (1 - sigma)
        s = np.concatenate([[0], np.sign(sigma[:-1] * LOSSES[:-1] - sigma[1:] * LOSSES[1:]), [0]])
        return slope * LOSSES * (1 / sigma.sum() + 0.01 * (s[1:] - s[:-1]))

    logits, weights = run_constant(weighting, 3000)
    expected = adam(gradient, np.ones(3), 3000)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    shares = sigmoid(logits) / sigmoid(logits).sum()
    np.testing.assert_allclose(shares, [0.331, 0.337, 0.331], atol=1e-3)
    before = sigmoid(adam(gradient, np.ones(3), 2999))
    s = np.concatenate([[0], np.sign(before[:-1] * LOSSES[:-1] - before[1:] * LOSSES[1:]), [0]])
    np.testing.assert_allclose(
        weights, before / before.sum() + 0.01 * before * (s[1:] - s[:-1]), rtol=1e-6
    )


def differences(function, x, width=1e-6):
    return np.array(
        [(function(x + h) - function(x - h)) / (2 * width) for h in width * np.eye(x.size)]
    )


@pytest.mark.parametrize("name", ["qm9", "nyuv2", "cityscapes"])
def test_the_other_codes(name):
    """QM9: sigmoid(relu(W)), g divided by a constant. NYUv2: clamped, then divided, in f and g."""
    options = {
        "qm9": {"activation": "relu_sigmoid", "seed": 3},
        "nyuv2": {"weight_bounds": (0.2, 0.8), "divide_weights": True},
        "cityscapes": {"weight_bounds": (0.2, 0.8)},
    }[name]
    weighting = ldc_mtl(
        0.3, num_tasks=3, form="code", optimizer=optax.sgd(0.7), **options
    ).weighting
    state = weighting.init()
    start = np.asarray(state.inner.router.values["logits"])
    if name == "qm9":
        assert np.all((start >= 0.2) & (start < 1))
        assert np.ptp(start) > 0
        start = np.array([0.9, 0.3, -0.4])  # one that the ReLU cuts off
    else:
        start = np.array([1.5, 0.2, 0.1])  # softmax .66 .18 .16, of which the last are clamped
    values = {"logits": jnp.asarray(start)}
    router = state.inner.router._replace(values=values)
    state = state._replace(inner=state.inner._replace(router=router))

    def stated(logits, losses, divisor=None):
        if name == "qm9":
            w = sigmoid(np.maximum(logits, 0))
            g = np.sum(w * losses) / divisor
        else:
            w = np.clip(np.exp(logits) / np.exp(logits).sum(), 0.2, 0.8)
            w = w / w.sum() if name == "nyuv2" else w
            g = np.sum(w * losses)
        return g + 0.3 * np.sum(np.abs(np.diff(w * losses)))

    constant = sigmoid(np.maximum(start, 0)).sum()
    of_logits = differences(lambda x: stated(x, LOSSES, constant), start)
    of_losses = differences(lambda x: stated(start, x, constant), LOSSES)
    weights, state = weighting.update(None, state, losses=jnp.asarray(LOSSES))
    np.testing.assert_allclose(weights, of_losses, rtol=1e-7)
    moved = np.asarray(state.inner.router.values["logits"])
    np.testing.assert_allclose(moved, start - 0.7 * of_logits, rtol=1e-7, atol=1e-9)


def test_shuffled_orders_compare_other_neighbours():
    """Each order is as likely, and gives the weights of the tasks in that order."""
    plain = ldc_mtl(0.5, num_tasks=3, tau="ones").weighting
    mixed = ldc_mtl(0.5, num_tasks=3, tau="ones", shuffle=True).weighting
    draw = jax.jit(
        jax.vmap(lambda k: mixed.update(None, mixed.init(), losses=jnp.asarray(LOSSES), key=k)[0])
    )
    found = np.round(np.asarray(draw(jax.random.split(jax.random.key(0), 600))), 9)
    # Three tasks in a row have three pairs of neighbours, by which one stands in the middle.
    expected = []
    for order in ([0, 1, 2], [1, 0, 2], [0, 2, 1]):
        weights = np.empty(3)
        weights[order], _ = plain.update(None, plain.init(), losses=jnp.asarray(LOSSES[order]))
        expected.append(np.round(weights, 9))
    counts = [np.sum(np.all(found == w, axis=1)) for w in expected]
    assert sum(counts) == 600
    assert min(counts) > 150
    first, state = mixed.update(None, mixed.init(), losses=jnp.asarray(LOSSES))
    drawn = [first]
    for _ in range(5):
        weights, state = mixed.update(None, state, losses=jnp.asarray(LOSSES))
        drawn.append(weights)
    assert len({tuple(np.sign(np.asarray(w) - 1 / 6).round(3)) for w in drawn}) > 1
    mask = jnp.array([True, False, True])
    masked, _ = mixed.update(None, mixed.init(), losses=jnp.asarray(LOSSES), task_mask=mask)
    without, _ = plain.update(None, plain.init(), losses=jnp.asarray(LOSSES), task_mask=mask)
    np.testing.assert_allclose(masked, without, rtol=1e-12)
    assert "key" in jaxmtl.ldc_mtl(num_tasks=3, shuffle=True).rule.accepts
    assert "key" not in jaxmtl.ldc_mtl(num_tasks=3).rule.accepts


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
        ({"activation": "relu"}, "activation"),
        ({"smooth": -1.0}, "smooth"),
        ({"penalty": -1.0}, "penalty"),
    ],
)
def test_refuses_wrong_options(options, word):
    with pytest.raises(ValueError, match=word):
        ldc_mtl(**({"num_tasks": 2} | options))
