"""Preferences at run time: a whole front in one compiled run."""

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `experiments` is not installed")

from experiments.examples import preferences
from experiments.examples._front_problems import load_front, vlmop2


def ends_of(rule):
    ends = np.asarray(preferences.train_front(vlmop2(), rule))
    assert ends.shape == (preferences.NUM_PREFERENCES, 2)
    return ends


def test_a_weighted_sum_has_the_ends_of_a_concave_front_and_a_ratio_all_of_it():
    front = load_front(vlmop2(), None, 500)
    ends = ends_of("weighted sum")
    corners = np.linalg.norm(ends[:, None] - np.array([[0.0, 1.0], [1.0, 0.0]]), axis=-1)
    assert corners.min(axis=1).max() < preferences.CLOSE
    assert (corners.argmin(axis=1) == 0).any()
    assert (corners.argmin(axis=1) == 1).any()
    assert preferences.reached(ends, front) < 0.2
    assert preferences.reached(ends_of("stch"), front) > 0.95


@pytest.mark.slow
def test_the_table_of_the_docstring():
    stated = preferences.__doc__.splitlines()
    for line in preferences.table(preferences.study()).splitlines()[1:]:
        rule, *found = line[:14], *line[14:].replace("%", "").split()
        (expected,) = (x for x in stated if x.strip().startswith(rule.strip()))
        expected = expected.strip()[14:].replace("%", "").split()
        np.testing.assert_allclose(np.float64(found), np.float64(expected), atol=3)


def test_a_preference_is_a_traced_value():
    problem = vlmop2()
    traces = []

    def train(r):
        traces.append(r)
        return preferences.train(problem, "weighted sum", r)

    run = jax.jit(train)
    first, second = run(np.array([0.9, 0.1])), run(np.array([0.1, 0.9]))
    assert len(traces) == 1
    assert first[0] < second[0]
