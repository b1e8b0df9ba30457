"""The problems of the study of fronts, against values of other implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.examples import _front_problems as problems
from jaxmtl import fronts
from tests.problems import some

# The authors' own Python code of the RE suite, at two points of the box: from its lowest corner
# the shares linspace(.2, .7, n) of its sides, and linspace(.05, .01, n).
SUITE = {
    "RE21": ([1905.124004860074, 0.024276526684347256], [1301.3788228251997, 0.0375097742318243]),
    "RE24": ([4219.2, 0.0], [120.075, 12.692545948765316]),
    "RE31": (
        [210.2952819356169, 1.9436498541551581, 210.19528193561692],
        [24.925339882228556, 16.188212136452, 24.825339882228555],
    ),
    "RE32": (
        [21.219785785025, 0.003985022873164471, 0.0],
        [0.10956657784335314, 348.38969410539147, 26981007.246463675],
    ),
    "RE33": (
        [3.2864064527777774, 2.4482730095504053, 0.0],
        [1.3127003001777775, 8.446757932411174, 0.0],
    ),
    "RE34": (
        [1683.38994365, 9.945635000000003, 0.10066550000000003],
        [1662.801421778, 8.37874808, 0.07811768000000001],
    ),
    "RE37": (
        [0.46642804444444436, 0.5341392222222222, 0.866309185185185],
        [0.6877378184444445, 0.16182200222222223, 0.37358878385185196],
    ),
    "RE41": (
        [25.810825599999998, 4.12891, 12.227212291666667, 4.439114354999998],
        [16.5518908, 4.4051383, 13.046784271666667, 8.454529105999992],
    ),
    "RE61": (
        [74892.045695, 294.0, 1441001.8272955993, 2452592.626280836, 14037.12052939988, 0.0],
        [
            64224.686732,
            96.0,
            362390.55854760617,
            5959017.865619453,
            84853.03976377951,
            2.3941215905511806,
        ],
    ),
}
# pymoo 0.6.2 at default_rng(0).random((2, n)).
PYMOO = {
    "ZDT1": [[0.63696169, 3.85900915], [0.68844673, 3.32486498]],
    "ZDT2": [[0.63696169, 5.70709837], [0.68844673, 5.12991002]],
    "ZDT3": [[0.63696169, 3.27473952], [0.68844673, 3.08043898]],
    "DTLZ2": [[1.13930973, 0.51395862, 1.94886178], [0.3886303, 0.02052166, 1.70830608]],
}


@pytest.mark.slow
def test_the_re_suite_is_the_authors(x64):
    assert {make().name for make in problems.SUITE} == set(SUITE)
    for name, values in SUITE.items():
        problem = problems.PROBLEMS[name]()
        n = len(problem.low)
        shares = np.stack([np.linspace(0.2, 0.7, n), np.linspace(0.05, 0.01, n)])
        found = jax.vmap(problem.evaluate)(problem.low + (problem.high - problem.low) * shares)
        np.testing.assert_allclose(found, values, rtol=1e-12, atol=1e-15)


def test_zdt_and_dtlz_are_pymoos(x64):
    for name, values in PYMOO.items():
        problem = problems.PROBLEMS[name]()
        points = np.random.default_rng(0).random((2, len(problem.low)))
        np.testing.assert_allclose(jax.vmap(problem.evaluate)(points), values, rtol=1e-7)


@pytest.mark.parametrize("make", some(problems.FORMULAS, 2))
def test_the_fronts_by_formula_bound_the_problems(make, x64):
    """No point of the front dominates another, no random point is below it, ends are the scale."""
    problem = make()
    front = jnp.asarray(problems.load_front(problem, None, 400))
    assert fronts.non_dominated(front).all()
    np.testing.assert_allclose(front.min(axis=0), 0, atol=2e-3)
    np.testing.assert_allclose(front.max(axis=0), 1, atol=2e-3)
    rng = np.random.default_rng(0)
    unit = rng.random((2000, len(problem.low)))
    if "ZDT" in problem.name:
        unit[:, 1:] *= rng.random((2000, 1)) ** 8  # near the front, where all others are 0
    points = jax.vmap(problem.losses_fn)(jnp.asarray(unit))
    # By how much every objective of the nearest point of the front must fall to be dominated.
    below = jnp.max(jnp.min(front[:, None] - points, axis=2), axis=0)
    assert below.max() < 5e-3


def test_a_front_that_is_in_a_file_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"re_suite\.zip"):
        problems.load_front(problems.re21(), tmp_path)
