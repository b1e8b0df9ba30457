"""Scalarizations of the losses: TorchJD's recorded gradients, closed forms, their meaning."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmtl

R = np.array([0.2, 0.3, 0.5])
LOSSES = np.array([[0.5, 1.25, 2.0], [3.0, 0.125, 0.75], [1.0, 2.0, 3.0], [0.2, 0.3, 0.1]])
# torchjd 0.18.0 in float64: the gradients of COSMOS(2, r), PBI(5, r) and PBI(0.5, r, z) at LOSSES.
IDEAL = np.array([-0.5, 0.1, 0.05])
RECORDED = {
    "cosmos": [
        [0.101602814, 0.323152279, 0.510129122],
        [0.322789694, -0.000646632, 0.058948996],
        [0.169031787, 0.324774571, 0.493806357],
        [0.695491411, 1.043237117, -2.720694173],
    ],
    "pbi": [
        [-4.354950595, 1.935047946, 1.813834271],
        [5.027200117, -0.798756058, -0.298743611],
        [-3.421900404, 3.764714604, 0.3428142],
        [2.574049196, 3.861073793, -2.113381154],
    ],
    "pbi_ideal": [
        [0.795847363, 0.368813133, 0.693255975],
        [0.794618371, 0.357297684, 0.700656842],
        [0.764063865, 0.567188906, 0.586943911],
        [0.784637854, 0.504364072, 0.616409216],
    ],
}


def weights(aggregator, losses, **inputs):
    weighting = aggregator.weighting
    return weighting.update(None, weighting.init(), losses=jnp.asarray(losses, float), **inputs)[0]


def all_weights(aggregator, losses):
    return jax.jit(jax.vmap(lambda x: weights(aggregator, x)))(jnp.asarray(losses, float))


@pytest.mark.parametrize("name", RECORDED)
def test_weights_are_the_gradients_of_torchjd(name, precision):
    aggregator = {
        "cosmos": lambda: jaxmtl.cosmos(2.0, preference=R),
        "pbi": lambda: jaxmtl.pbi(5.0, preference=R),
        "pbi_ideal": lambda: jaxmtl.pbi(0.5, preference=R, ideal=IDEAL),
    }[name]()
    atol = 2e-9 if precision == "float64" else 2e-5
    np.testing.assert_allclose(all_weights(aggregator, LOSSES), RECORDED[name], rtol=0, atol=atol)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_cosmos_and_pbi_keep_their_digits_at_any_scale(scale, x64):
    losses = LOSSES[1] * scale
    unit = R / np.linalg.norm(R)
    gaps = losses - losses @ unit * unit
    expected = unit + 2 * gaps / np.linalg.norm(gaps / scale) / scale
    np.testing.assert_allclose(weights(jaxmtl.pbi(2.0, preference=R), losses), expected, rtol=1e-12)
    length = np.linalg.norm(LOSSES[1])
    slope = (unit - (LOSSES[1] @ unit) * LOSSES[1] / length**2) / length
    expected = R - 2 * slope / scale
    found = weights(jaxmtl.cosmos(2.0, preference=R), losses)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_where_an_objective_has_no_slope(precision):
    """On the ray of PBI, at zero losses of COSMOS, at ties of the maximum and the minimum."""
    unit = R / np.linalg.norm(R)
    for length in (0.0, 0.3, 7.0, 1e12):
        found = weights(jaxmtl.pbi(5.0, preference=R), length * R)
        np.testing.assert_allclose(found, unit, rtol=1e-5)
    np.testing.assert_allclose(weights(jaxmtl.cosmos(2.0, preference=R), np.zeros(3)), R, rtol=1e-6)
    p = np.array([1.0, 0.5, 0.25])
    found = weights(jaxmtl.tchebycheff(preference=p), [0.5, 2.0, 4.0])
    np.testing.assert_array_equal(found, [0, 0.25, 0.125])
    tied = jaxmtl.hypervolume_scalarization(2.0, preference=np.array([1.0, 0.0, 1.0]))
    # Two gaps of 1 over 1 / sqrt(2): 3 t^2 / u, shared by two; the third has no part.
    found = weights(tied, [1.0, 7.0, 1.0])
    np.testing.assert_allclose(found, [3 * 2**0.5, 0, 3 * 2**0.5], rtol=1e-5)


def test_tchebycheff_takes_the_largest_weighted_gap(x64):
    z = np.array([0.0, 1.0, -1.0])
    found = all_weights(jaxmtl.tchebycheff(preference=R, ideal=z), LOSSES)
    expected = np.zeros_like(LOSSES)
    for row, losses in zip(expected, LOSSES, strict=True):
        worst = np.argmax(R * (losses - z))
        row[worst] = R[worst]
    np.testing.assert_array_equal(found, expected)
    limit = all_weights(jaxmtl.stch(1e-4, preference=R, ideal=z), LOSSES)
    np.testing.assert_allclose(limit, expected, atol=1e-12)


def objective_of_hypervolume(losses, bounds, preference):
    t = np.min((bounds - losses) / (preference / np.linalg.norm(preference)))
    return -np.sign(t) * np.abs(t) ** len(losses)


def test_hypervolume_weights_are_finite_differences_of_the_objective(x64):
    bounds = np.array([2.0, 1.5, 2.5])  # the loss 3.0 lies outside
    found = all_weights(jaxmtl.hypervolume_scalarization(bounds, preference=R), LOSSES)
    step = 1e-6
    for losses, w in zip(LOSSES, found, strict=True):
        for i, unit in enumerate(np.eye(3)):
            ahead, behind = (
                objective_of_hypervolume(losses + s * unit, bounds, R) for s in (step, -step)
            )
            np.testing.assert_allclose(w[i], (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)
        assert np.all(w >= 0)
        assert np.sum(w) > 0


def test_the_mean_over_directions_is_the_hypervolume(x64):
    """By Euler's rule w . (b - l) = m s, so the weights of random directions give the volume."""
    rng = np.random.default_rng(0)
    directions = np.abs(rng.standard_normal((200_000, 3)))
    aggregator = jaxmtl.hypervolume_scalarization(2.0)
    gaps = np.array([0.5, 1.0, 1.5])

    def scalarized(direction):
        return weights(aggregator, 2.0 - gaps, preference=direction) @ gaps / 3

    mean = float(jnp.mean(jax.jit(jax.vmap(scalarized))(jnp.asarray(directions))))
    constant = math.pi**1.5 / (8 * math.gamma(2.5))
    np.testing.assert_allclose(constant * mean, np.prod(gaps), rtol=0.01)


def test_a_preference_given_at_run_time_replaces_that_of_construction(x64):
    losses = jnp.asarray(LOSSES[0])
    for make in (jaxmtl.cosmos, jaxmtl.pbi, jaxmtl.tchebycheff):
        given = jax.jit(lambda p, make=make: weights(make(preference=R), losses, preference=p))
        for p in (R[::-1], np.array([1.0, 0.0, 0.0])):
            expected = weights(make(preference=p), losses)
            np.testing.assert_allclose(given(p.copy()), expected, rtol=1e-14)


def minimum_on(problem, aggregator):
    """Descends two losses of one parameter and returns them."""

    def step(x, _):
        losses, slopes = jax.vmap(problem, in_axes=(None, 0))(x, jnp.arange(2))
        return x - 0.002 * jnp.clip(weights(aggregator, losses) @ slopes, -5, 5), losses

    return jax.jit(lambda: jax.lax.scan(step, 0.9, None, length=4000)[1][-1])()


def test_where_the_ray_meets_a_concave_front(x64):
    """Fonseca and Fleming's front is concave: no linear weights reach its middle."""

    def losses_fn(x, i):
        return 1 - jnp.exp(-((x - jnp.array([1.0, -1.0])[i]) ** 2))

    problem = jax.value_and_grad(losses_fn)
    p = np.array([1.0, 2.0])
    on_front = minimum_on(problem, jaxmtl.tchebycheff(preference=p))
    np.testing.assert_allclose(on_front[0] / on_front[1], 2.0, rtol=0.05)
    on_front = minimum_on(problem, jaxmtl.pbi(5.0, preference=p))
    np.testing.assert_allclose(on_front[1] / on_front[0], 2.0, rtol=0.05)
    linear = minimum_on(problem, jaxmtl.linear_scalarization(p))
    assert min(linear) < 0.02
    assert max(linear) > 0.9
