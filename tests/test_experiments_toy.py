"""The toy study: its landscape and front against independent answers, its runs end to end."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the extra `experiments` is not installed")

import jaxmtl
from experiments.claims import VERDICTS
from experiments.report import RESULTS
from experiments.toy import __main__ as toy
from experiments.toy import landscape
from experiments.toy import report as toy_report

pytestmark = pytest.mark.xdist_group("toy")
STARTS = [(-8.5, 7.5), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0), (3.0, -6.0)]


def by_hand(x1, x2):
    valley_1 = math.log(abs(-0.5 * (x1 + 7) + math.tanh(x2))) + 6
    valley_2 = math.log(abs(0.5 * (3 - x1) - math.tanh(x2) + 2)) + 6
    bowl_1 = ((x1 - 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    bowl_2 = ((x1 + 7) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    share = math.tanh(abs(x2) / 2)
    return (share * valley_1, share * valley_2) if x2 > 0 else (share * bowl_1, share * bowl_2)


def test_losses_are_the_formulas_that_give_the_published_figures(x64):
    got = landscape.losses_at(np.array(STARTS))
    np.testing.assert_allclose(got, [by_hand(*start) for start in STARTS], rtol=1e-12)
    # LDC-MTL's figure 1, where L1 is scaled by 0.1: dots at about (0.65, 7.9) and (0.8, 6.7).
    np.testing.assert_allclose(got[:2] * [0.1, 1], [[0.65, 7.9], [0.8, 6.7]], atol=0.02)
    printed = landscape.losses_at(np.array(STARTS[:2]), landscape.FORMS["LDC-MTL, printed"])
    assert abs(printed[0, 1] - 7.9) > 0.2
    assert abs(printed[1, 1] - 6.7) > 10


def test_logarithms_have_a_floor(x64):
    valley = np.array([-7 + 2 * math.tanh(3), 3.0])
    expected = math.tanh(1.5) * (math.log(5e-6) + 6)
    np.testing.assert_allclose(landscape.losses_at(valley)[0], expected, rtol=1e-12)


def test_weighted_optima_are_those_of_two_nested_scans():
    alphas = np.array([0.0, 0.1, 0.5, 0.7, 1.0])
    got = landscape.minimize_weighted(alphas)
    # In the bowls the weighted sum is a product of shares: x1 does not depend on x2.
    np.testing.assert_allclose(got[:, 0], 14 * alphas - 7, atol=1e-3)
    depth = np.linspace(-12, 0, 1_200_001)
    for alpha, (_, x2) in zip(alphas, got, strict=True):
        height = 19.6 * alpha * (1 - alpha) + 0.01 * (depth + 8) ** 2 - 20
        assert abs(x2 - depth[np.argmin(np.tanh(-depth / 2) * height)]) < 1e-3


@pytest.mark.slow
def test_no_point_of_a_dense_grid_dominates_the_front(x64):
    ticks = np.linspace(-12, 12, 241)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    losses, front = landscape.losses_at(grid), landscape.losses_at(landscape.pareto_set())
    better = (losses[:, None] < front[::10] - 1e-6).all(axis=-1)
    assert not better.any()
    # And the points of the grid that nothing dominates have losses beside those of the front. (x2
    # is loose: half a unit costs less than a step of the grid in x1.)
    low = losses.min(axis=1) < 1
    order = np.argsort(losses[low, 0], kind="stable")
    points, near = grid[low][order], losses[low][order]
    undominated = near[:, 1] <= np.minimum.accumulate(near[:, 1])
    assert undominated.sum() > 100
    assert landscape.distance(near[undominated], front).max() < 0.01
    assert landscape.distance(points[undominated], landscape.pareto_set()).max() < 0.5


def test_printed_forms_have_another_front_or_none():
    alphas = np.array([0.1, 0.5])
    published = landscape.minimize_weighted(alphas)
    assert published[1, 1] == pytest.approx(-8.3551, abs=2e-4)  # their bar lies at -8.3552
    bottomless = landscape.minimize_weighted(alphas, landscape.FORMS["MoCo, printed"])
    np.testing.assert_allclose(bottomless[:, 1], -12, atol=1e-3)  # the edge of the search
    mirrored = landscape.minimize_weighted(alphas, landscape.FORMS["Aligned-MTL, printed"])
    np.testing.assert_allclose(mirrored, published * [-1, 1], atol=1e-3)


def test_distance_to_a_line():
    line = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]])
    points = np.array([[1.0, 1.0], [3.0, 3.0], [-3.0, 4.0], [1.5, 0.0]])
    np.testing.assert_allclose(landscape.distance(points, line), [1, math.sqrt(2), 5, 0])


def test_a_run_is_adam_on_the_shorter_combination_of_two_gradients(x64):
    options = toy.Options(starts=((-4.0, -4.0), (-6.0, 1.0)), steps=4, points=2, seeds=1,
                          learning_rate=0.1, decay=0.5)  # fmt: skip
    record = toy.run_entry(options, toy.MOCO["smg"])
    gradients = jax.jit(jax.jacobian(landscape.losses))
    for start, end in zip(options.starts, record["final"][0][0], strict=True):
        x, mean, square = np.array(start), np.zeros(2), np.zeros(2)
        for k in range(1, 5):
            g1, g2 = np.asarray(gradients(jnp.asarray(x)))
            share = np.clip(g2 @ (g2 - g1) / ((g1 - g2) @ (g1 - g2)), 0, 1)
            g = share * g1 + (1 - share) * g2
            mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g**2
            step = (mean / (1 - 0.9**k)) / (np.sqrt(square / (1 - 0.999**k)) + 1e-8)
            x = x - 0.1 / math.sqrt(k) * step
        np.testing.assert_allclose(end, x, atol=1e-4)  # records are rounded to four digits


@pytest.mark.slow
def test_closed_form_of_imtl_stops_at_the_front_where_the_pseudo_inverse_slides(x64):
    def updates(rows):
        for rule in (toy.imtl_closed_form(), jaxmtl.imtl_g()):
            yield rule.update(jnp.array(rows), rule.init(jnp.zeros(2)), jnp.zeros(2))[0]

    closed, inverse = updates([[3.0, 1.0], [-0.5, 2.0]])
    np.testing.assert_allclose(closed, inverse, rtol=1e-12)
    closed, inverse = updates([[3.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(closed, 0, atol=1e-12)
    np.testing.assert_allclose(inverse, [5, 0], rtol=1e-12)  # (9 + 1) / (3 - 1)


@pytest.mark.slow
def test_smoke_run_writes_results_from_which_the_report_is_made_again(tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path), "--parts", "bias"]
    toy.study.main(arguments)
    path = tmp_path / "toy" / "bias.jsonl"
    lines = path.read_text().splitlines()
    records = {record["method"]: record for record in map(json.loads, lines)}
    assert list(records) == ["smg", "smg_growing_batch", "moco"]
    assert {"jax", "optax", "flax", "jaxmtl"} == set(records["moco"]["versions"])
    bias = np.array([record["bias"] for record in records.values()])
    assert bias.shape == (3, 2, 3, 4)  # methods, seeds, starts, points
    assert (bias > 0).all()
    assert (bias[:, 0] != bias[:, 1]).any()  # seeds differ
    assert records["smg"]["samples"] == [1, 4, 7, 10]

    toy.study.main([*arguments, "--resume"])
    assert path.read_text().splitlines() == lines
    with pytest.raises(SystemExit, match="expected the options"):
        toy.study.main([*arguments, "--resume", "--seeds", "3"])

    figure = tmp_path / "toy" / "bias.png"
    figure.unlink()
    capsys.readouterr()
    toy.study.main(["--report-only", "--out", str(tmp_path)])
    assert figure.stat().st_size > 10_000
    assert "smg_growing_batch" in capsys.readouterr().out
    assert {claim.verdict for claim in toy.claims(tmp_path / "toy")} <= set(VERDICTS)
    assert len(toy.claims(tmp_path / "toy")) == 2


def test_report_without_results_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="expected results in"):
        toy.study.main(["--report-only", "--out", str(tmp_path)])


def test_verdicts_follow_the_records():
    optimum = landscape.minimize_weighted(np.array([0.5]))[0]
    stuck = [5.0, 9.0]
    starts = toy.PRESETS["moco_1"].options.starts
    config = {"starts": [list(start) for start in starts], "alphas": [0.5], "seeds": 2}

    def record(*ends):
        final = [[[list(end) for end in ends]]] * 2
        return {"config": config, "final": final}

    there, once_stuck = record(*[optimum] * 6), record(optimum, stuck, *[optimum] * 4)
    as_published = {"mgda": there, "moco": there} | dict.fromkeys(
        ("smg", "pcgrad", "cagrad"), once_stuck
    )
    claims = toy_report.claims_of({"moco_1": as_published})
    assert [claim.verdict for claim in claims] == ["reproduced", "reproduced"]
    claims = toy_report.claims_of({"moco_1": as_published | {"moco": once_stuck, "smg": there}})
    assert [claim.verdict for claim in claims] == ["partly", "partly"]
    claims = toy_report.claims_of({"moco_1": dict.fromkeys(as_published, there)})
    assert [claim.verdict for claim in claims] == ["reproduced", "not"]


def test_every_claim_of_the_committed_results_has_a_verdict():
    folder = RESULTS / "toy"
    claims = toy.claims(folder)
    assert len(claims) == 12
    assert {claim.verdict for claim in claims} <= set(VERDICTS)
    assert all((folder / name).exists() for name in toy.study.figures)
