"""The stochastic quadratics: the problem is that of the paper, the study runs end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

from experiments.claims import VERDICTS
from experiments.stochastic_quadratic import __main__ as study


def test_objectives_and_gradients_are_those_of_the_paper():
    x = jnp.array([0.25, 0.5])
    expected = [(0.25 + 3) ** 2 + 0.25 + 8, (0.25 - 3) ** 2 + 0.25 + 8]
    np.testing.assert_allclose(study.losses_fn(x), expected, rtol=1e-6)
    np.testing.assert_allclose(
        study.sampled_gradients(x, jnp.array([-1, 1])), [[2.5, -3.0], [-9.5, 5.0]], rtol=1e-6
    )
    both = jnp.stack([study.sampled_gradients(x, jnp.full(2, sign)) for sign in (-1, 1)])
    np.testing.assert_allclose(both.mean(axis=0), jax.jacobian(study.losses_fn)(x), rtol=1e-6)


def test_points_outside_the_domain_come_back_to_its_border():
    np.testing.assert_array_equal(study.project(jnp.array([-3.0, -0.5])), [-1.0, 0.0])
    np.testing.assert_array_equal(study.project(jnp.array([0.5, 7.0])), [0.5, 7.0])


def least_norm(g: np.ndarray) -> np.ndarray:
    """Return the point of least norm on the segment between the rows of g (2, 2)."""
    along = g[1] - g[0]
    return g[0] + np.clip(-g[0] @ along / (along @ along), 0, 1) * along


def projected_mean(g: np.ndarray) -> np.ndarray:
    """Return the mean of both rows of g (2, 2), each projected off the other in conflict."""
    product = min(g[0] @ g[1], 0)
    return (g[0] * (1 - product / (g[0] @ g[0])) + g[1] * (1 - product / (g[1] @ g[1]))) / 2


@pytest.mark.parametrize(("name", "rule"), [("mgda", least_norm), ("pcgrad", projected_mean)])
def test_expected_direction_is_that_of_the_closed_form(name, rule):
    record = study.expectation_record(name)

    def upward(x: float, y: float) -> float:
        point, centers = np.array([x, y]), study.CENTERS
        pairs = [2 * (point - centers[[0, 1], [i, j]]) for i in (0, 1) for j in (0, 1)]
        return -np.mean([rule(g)[1] for g in pairs])

    np.testing.assert_allclose(record["at_start"], [0, upward(0, 0.4)], atol=1e-6)
    np.testing.assert_allclose(record["upward"], [upward(0, y) for y in record["y"]], atol=1e-5)
    strip = [upward(x, y) for x in np.linspace(-1, 1, 41) for y in (0.0, 0.025, 0.05)]
    np.testing.assert_allclose(record["least_below_gap"], min(strip), atol=1e-6)
    assert abs(upward(0, record["equilibrium"])) < 1e-3
    if name == "mgda":
        np.testing.assert_allclose(record["at_start"], [0, 16 / 65], atol=1e-6)


@pytest.mark.slow
def test_smoke_run_writes_results_from_which_the_report_is_made_again(tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path), "--methods", "mgda"]
    study.study.main(arguments)
    results = tmp_path / "stochastic_quadratic" / "quadratic.jsonl"
    text = results.read_text()
    runs = [r for r in map(json.loads, text.splitlines()) if r["kind"] == "run"]
    assert {(r["form"], r["noise"]) for r in runs} == {
        (form, noise) for form in study.FORMS for noise in study.NOISES
    }
    for run in runs:
        assert run["distance"]["mean"][0] == 0.4
        np.testing.assert_allclose(
            run["distance"]["mean"][-1], np.mean(run["final"]["distance"]), atol=1e-5
        )
        # f1 + f2 = 2 (x^2 + y^2) + 34.
        total = np.add(run["final"]["loss1"], run["final"]["loss2"])
        assert (total >= 34 + 2 * np.square(run["final"]["distance"]) - 1e-3).all()

    study.study.main([*arguments, "--resume"])
    assert results.read_text() == text
    with pytest.raises(SystemExit, match="expected the options"):
        study.study.main(["--steps", "40", "--out", str(tmp_path), "--resume"])

    figure = tmp_path / "stochastic_quadratic" / study.study.figures[0]
    figure.unlink()
    capsys.readouterr()
    study.study.main(["--report-only", "--out", str(tmp_path)])
    assert figure.stat().st_size > 10_000
    assert "mgda" in capsys.readouterr().out

    claims = study.claims(tmp_path / "stochastic_quadratic")
    assert len(claims) == 10
    assert all(claim.verdict in VERDICTS for claim in claims)
    # Thirty steps are far too few for anything to come near the Pareto set.
    assert {c.verdict for c in claims if "keep a distance" in c.claim} == {"reproduced"}
    assert {c.verdict for c in claims if "converge to" in c.claim} == {"not"}


def test_the_report_knows_every_method():
    assert (study.BASELINE, *study.STUDIED) == tuple(study.METHODS)


def test_a_study_without_results_makes_no_claims_and_says_what_is_missing(tmp_path):
    assert study.claims(tmp_path) == []
    with pytest.raises(SystemExit, match="expected results in"):
        study.study.main(["--report-only", "--out", str(tmp_path)])
