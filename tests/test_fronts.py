"""Filter, volume and distance of fronts against exact arithmetic and pymoo; fronts by vmap."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from jaxmtl import fronts
from tests.problems import WIDE_FIRST, some

# pymoo 0.6.2: HV, IGD, IGDPlus and NonDominatedSorting of the points that `pymoo_points` draws.
PYMOO = {
    2: (
        1.0827152688519006,
        0.6746344216356372,
        0.0932458592473982,
        0.002196012680479507,
        [24, 32, 33],
    ),
    3: (
        0.90426065921174,
        1.0039064368884643,
        0.14944141980763537,
        0.0814826710244835,
        [0, 3, 6, 9, 17, 25, 26, 29, 40],
    ),
    4: (
        0.2656253393936093,
        0.4714211253853075,
        0.3327414179616709,
        0.18569161521571764,
        [1, 5, 7, 9, 11, 12, 17, 22, 23, 25, 29, 34, 38, 41],
    ),
}


def pymoo_points(m):
    rng = np.random.default_rng(m)
    points = rng.random((40, m))
    points = np.concatenate([points, points[:3]])
    return points, rng.dirichlet(np.ones(m), 30), np.full(m, 1.1 if m < 4 else 0.9)


def volume_by_inclusion_exclusion(points, corner):
    """The union of boxes, in rational numbers: sum over subsets of (-1)^(size + 1) |meet|."""
    total = Fraction(0)
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            sides = [corner[j] - max(p[j] for p in subset) for j in range(len(corner))]
            meet = np.prod([max(side, Fraction(0)) for side in sides])
            total += meet if size % 2 else -meet
    return total


@pytest.mark.parametrize("m", some(PYMOO, 2))
@WIDE_FIRST
def test_measures_are_those_of_pymoo(m, precision):
    points, simplex, corner = (jnp.asarray(a) for a in pymoo_points(m))
    volume, of_simplex, igd, plus, kept = PYMOO[m]
    rtol = 1e-12 if precision == "float64" else 2e-6
    np.testing.assert_allclose(fronts.hypervolume(points, corner), volume, rtol=rtol)
    np.testing.assert_allclose(fronts.hypervolume(simplex, corner), of_simplex, rtol=rtol)
    np.testing.assert_allclose(fronts.igd(points, simplex), igd, rtol=rtol)
    np.testing.assert_allclose(fronts.igd(points, simplex, plus=True), plus, rtol=30 * rtol)
    np.testing.assert_array_equal(jnp.nonzero(fronts.non_dominated(points))[0], kept)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_hypervolume_is_exact_on_a_grid_with_ties_and_outsiders(m, x64):
    """Small whole numbers: ties, duplicates, points on and beyond the corner; no rounding."""
    measure = jax.jit(fronts.hypervolume)
    rng = np.random.default_rng(m)
    for _ in range(8):
        points, corner = rng.integers(0, 6, (7, m)), np.full(m, 4)
        rational = [[Fraction(int(v)) for v in p] for p in points]
        expected = volume_by_inclusion_exclusion(rational, [Fraction(4)] * m)
        found = measure(jnp.asarray(points, float), jnp.asarray(corner, float))
        assert float(found) == expected


def test_hypervolume_at_extreme_scales(precision):
    points, _, corner = pymoo_points(3)
    scales = np.array([1e-12, 1.0, 1e12])
    found = fronts.hypervolume(jnp.asarray(points * scales), jnp.asarray(corner * scales))
    np.testing.assert_allclose(found, PYMOO[3][0], rtol=1e-12 if precision == "float64" else 2e-6)


@pytest.mark.slow
def test_masks_and_nan_remove_points(x64):
    points, simplex, corner = (jnp.asarray(a) for a in pymoo_points(3))
    mask = jnp.arange(len(points)) % 2 == 0
    spoilt = jnp.where(mask[:, None], points, jnp.nan)
    half = points[::2]
    volume = fronts.hypervolume(half, corner)
    np.testing.assert_allclose(fronts.hypervolume(points, corner, mask=mask), volume, rtol=1e-14)
    np.testing.assert_allclose(fronts.hypervolume(spoilt, corner), volume, rtol=1e-14)
    expected = fronts.non_dominated(half)
    np.testing.assert_array_equal(fronts.non_dominated(points, mask=mask)[::2], expected)
    np.testing.assert_array_equal(fronts.non_dominated(spoilt)[::2], expected)
    assert not fronts.non_dominated(spoilt)[1::2].any()
    distance = fronts.igd(half, simplex)
    np.testing.assert_allclose(fronts.igd(points, simplex, mask=mask), distance, rtol=1e-14)
    assert fronts.igd(points, simplex, mask=jnp.zeros(len(points), bool)) == np.inf
    assert fronts.hypervolume(points, corner, mask=jnp.zeros(len(points), bool)) == 0


def test_dominated_points_change_no_volume(x64):
    points, _, corner = (jnp.asarray(a) for a in pymoo_points(3))
    mask = fronts.non_dominated(points)
    kept = fronts.hypervolume(points, corner, mask=mask)
    np.testing.assert_allclose(kept, fronts.hypervolume(points, corner), rtol=1e-14)


def test_equal_points_stay_together():
    """Of fewer points than are compared at a time, and of more."""
    points = jnp.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    many = jnp.tile(points, (100, 1))
    np.testing.assert_array_equal(fronts.non_dominated(points), [True, True, False, True])
    np.testing.assert_array_equal(fronts.non_dominated(many), [True, True, False, True] * 100)


@pytest.mark.parametrize("m", some([3, 2]))
def test_gradient_of_the_hypervolume_is_that_of_finite_differences(m, x64):
    points, _, corner = (jnp.asarray(a) for a in pymoo_points(m))
    points = points[:10]
    measure = jax.jit(lambda p: fronts.hypervolume(p, corner))
    gradient = jax.grad(measure)(points)
    numeric = np.zeros(points.shape)
    for index in np.ndindex(points.shape):
        up, down = points.at[index].add(1e-6), points.at[index].add(-1e-6)
        numeric[index] = (measure(up) - measure(down)) / 2e-6
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)
    assert (np.abs(numeric).sum(axis=1)[np.asarray(fronts.non_dominated(points))] > 0).all()


@pytest.mark.slow
def test_under_vmap_the_measures_are_those_of_each_set(x64):
    sets = jnp.asarray(np.random.default_rng(0).random((3, 12, 3)))
    corner, front = jnp.ones(3), sets[0]
    for measure in (
        lambda p: fronts.hypervolume(p, corner),
        fronts.non_dominated,
        lambda p: fronts.igd(p, front, plus=True),
    ):
        alone = [measure(points) for points in sets]
        np.testing.assert_allclose(jax.jit(jax.vmap(measure))(sets), jnp.stack(alone), rtol=1e-13)


@pytest.mark.parametrize(
    ("m", "partitions", "count"), [(1, 3, 1), (2, 4, 5), (3, 4, 15), (4, 3, 20)]
)
def test_preferences_are_all_multiples_that_sum_to_one(m, partitions, count):
    counts = itertools.product(range(partitions + 1), repeat=m)
    whole = [c for c in counts if sum(c) == partitions]
    found = fronts.preferences(m, partitions)
    assert found.shape == (count, m)
    np.testing.assert_allclose(found, np.array(sorted(whole)) / partitions, rtol=1e-6)
    inner = fronts.preferences(m, partitions, margin=0.05)
    np.testing.assert_allclose(inner.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(inner.min(), 0.05 if m > 1 else 1, rtol=1e-6)


# --- training -----------------------------------------------------------------------------------

TARGETS = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]])


def quadratics(params, weights=1.0):
    """Two paraboloids whose weighted sum is least at the weighted mean of their centres."""
    return weights * jnp.sum((params["x"] - jnp.asarray(TARGETS)) ** 2, axis=1)


def start():
    return {"x": jnp.array([3.0, -2.0, 0.5])}


def scalarized(preference):
    return optax.chain(jaxmtl.linear_scalarization(preference), optax.sgd(0.3))


def test_a_front_is_that_of_closed_form(x64):
    chosen = fronts.preferences(2, 6)
    front = jax.jit(lambda p: fronts.train(quadratics, scalarized, p, chosen, num_steps=80))(
        start()
    )
    expected = np.asarray(chosen) @ TARGETS
    np.testing.assert_allclose(front.params["x"], expected, atol=1e-12)
    losses = jax.vmap(quadratics)({"x": jnp.asarray(expected)})
    np.testing.assert_allclose(front.losses, losses, atol=1e-11)
    assert front.history.shape == (80, 7, 2)
    np.testing.assert_allclose(front.history[0], np.tile(quadratics(start()), (7, 1)))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("constructed", some([True, False]))
def test_each_run_is_the_run_alone(paired, constructed, x64):
    """By a rule of the losses that has a state, with batches, a projection and many starts.

    The preference is one of the construction or of each update.
    """
    chosen = fronts.preferences(2, 3, margin=0.1)
    batches = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (5, 2)))
    starts = {"x": jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))}

    def project(params):
        return jax.tree.map(lambda x: jnp.clip(x, -0.8, 0.8), params)

    def make(preference):
        rule = jaxmtl.cr_mogm(jaxmtl.stch(0.5, preference=preference), num_tasks=2)
        return (rule, optax.adam(0.05)) if paired else optax.chain(rule, optax.adam(0.05))

    optimizer = make if constructed else make(None)
    front = fronts.train(
        quadratics, optimizer, starts, chosen, batches, project=project, stacked=True
    )

    @jax.jit
    def alone(preference, params):
        rule = jaxmtl.cr_mogm(jaxmtl.stch(0.5, preference=preference), num_tasks=2)
        chain = optax.chain(rule, optax.adam(0.05))
        state, history = chain.init(params), []
        for batch in batches:
            losses, jacobian = jaxmtl.value_and_jacobian(quadratics)(params, batch)
            updates, state = chain.update(jacobian, state, params, losses=losses)
            params = project(optax.apply_updates(params, updates))
            history.append(losses)
        return params, jnp.stack(history)

    for i, preference in enumerate(chosen):
        params, history = alone(preference, jax.tree.map(lambda x, i=i: x[i], starts))
        np.testing.assert_allclose(front.history[:, i], history, rtol=1e-10)
        np.testing.assert_allclose(front.params["x"][i], params["x"], rtol=1e-10)
        np.testing.assert_allclose(front.losses[i], quadratics(params, batches[-1]), rtol=1e-10)


def test_the_front_compiles_once():
    traces = []

    @jax.jit
    def run(params, chosen):
        traces.append(None)
        return fronts.train(quadratics, scalarized, params, chosen, num_steps=3).losses

    first = run(start(), fronts.preferences(2, 4))
    second = run(start(), fronts.preferences(2, 4, margin=0.2))
    assert len(traces) == 1
    assert (first != second).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fronts.non_dominated(jnp.ones(3)), r"expected points of shape \(k, m\)"),
        (lambda: fronts.non_dominated(jnp.ones((3, 2)), mask=jnp.ones(2)), r"mask of shape \(3,\)"),
        (lambda: fronts.hypervolume(jnp.ones((3, 2)), jnp.ones(3)), r"reference of shape \(2,\)"),
        (lambda: fronts.igd(jnp.ones((3, 2)), jnp.ones((3, 3))), "same number of objectives"),
        (lambda: fronts.preferences(2, 0), "expected partitions"),
        (lambda: fronts.preferences(2, 3, margin=0.5), r"margin .* below 1/2"),
        (
            lambda: fronts.train(quadratics, scalarized, start(), jnp.ones((2, 2))),
            "expected one number of steps",
        ),
        (
            lambda: fronts.train(
                quadratics, scalarized, start(), jnp.ones((2, 2)), jnp.ones((3, 2)), num_steps=4
            ),
            "expected one number of steps",
        ),
        (
            lambda: fronts.train(
                quadratics, scalarized, start(), jnp.ones((2, 2)), num_steps=4, stacked=True
            ),
            "leading axis of 2, one start",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
