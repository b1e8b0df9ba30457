"""The examples that are programs: small runs end with their numbers and a sentence on them."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `experiments` is not installed")
pytest.importorskip("sklearn", reason="the extra `experiments` is not installed")

from scipy.io import savemat

from experiments.examples import (
    adversarial_pair,
    fair_fronts,
    federated_rows,
    gauss_newton,
    live_monitor,
    pareto_fronts,
    pareto_set,
    physics_informed,
    training_steps,
)
from experiments.report import with_tables
from experiments.tabular import data as tables
from tests.test_experiments_tabular import census_rows

pytestmark = pytest.mark.xdist_group("example programs")


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_fronts_of_a_problem_and_of_a_table_share_records_and_notes(tmp_path, monkeypatch, capsys):
    few = ["--seeds", "2", "--out", str(tmp_path), "--methods", "linear_scalarization", "epo"]
    pareto_fronts.main([*few, "--problems", "VLMOP2", "--steps", "300"])
    folder = tmp_path / "fronts"
    page = folder / "notes.md"
    page.write_text("A word.\n\n" + page.read_text())
    monkeypatch.setattr(tables, "CENSUS_TRAIN", 400)
    monkeypatch.setattr(fair_fronts, "TRAIN", 200)
    rows = census_rows(600)
    for name, part in (("train", rows[:400]), ("test", rows[400:])):
        with gzip.open(tmp_path / f"census_income_kdd_{name}.csv.gz", "wt") as file:
            file.writelines(", ".join(row) + "\n" for row in part)
    fair_fronts.main([*few, "--data-dir", str(tmp_path), "--steps", "20"])
    records = records_of(folder / "problems.jsonl")
    assert [r["problem"] for r in records] == ["VLMOP2"] * 2 + ["Census"] * 2
    reached = {r["method"]: np.mean(r["reached"]) for r in records[:2]}
    assert reached["epo"] > 0.9 > 0.4 > reached["linear_scalarization"]
    for record in records:
        assert len(record["hypervolume"]) == 2
        middle, ends = np.array(record["middle"]), np.array(record["ends"])
        assert ((middle >= 0) & (middle <= 1) & (ends >= 0) & (ends <= 1)).all()
    written, printed = page.read_text(), capsys.readouterr().out
    assert written == with_tables("A word.\n\n", pareto_fronts.tables(records).items())
    assert f"| VLMOP2 | {reached['linear_scalarization']:.2f} | - |" in written
    assert "Hypervolume, as a share of the front's" in printed
    for name in ("vlmop2.png", "census.png"):
        assert (folder / name).stat().st_size > 10_000


def test_a_volume_by_samples_is_the_exact_one(x64):
    points = jnp.asarray([[0.2, 0.5, 0.3], [0.6, 0.1, 0.4]])
    exact = pareto_fronts.volume_of(3)(points)
    samples = np.random.default_rng(0).uniform(0, 1.1, (40_000, 3))
    found = np.mean(pareto_fronts.dominated(points, jnp.asarray(samples)))
    np.testing.assert_allclose(found, exact, atol=4 * np.sqrt(exact * (1 - exact) / 40_000))
    # By inclusion and exclusion, of the box of 1.1^3.
    volume = 0.9 * 0.6 * 0.8 + 0.5 * 1.0 * 0.7 - 0.5 * 0.6 * 0.7
    np.testing.assert_allclose(exact, volume / 1.1**3, rtol=1e-12)


def test_the_census_objectives_are_those_of_numpy(x64):
    rng = np.random.default_rng(0)
    inputs, high = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    group, params = rng.integers(0, 2, 30).astype(bool), rng.normal(size=4)
    chances = 1 / (1 + np.exp(-(inputs @ params[:3] + params[3])))
    entropy = -np.mean(np.log(np.where(high, chances, 1 - chances)))
    disparity = abs(chances[group].mean() - chances[~group].mean())
    rows = fair_fronts.Rows(jnp.asarray(inputs), jnp.asarray(high, float), jnp.asarray(group))
    found = fair_fronts.objectives(jnp.asarray(params), rows)
    np.testing.assert_allclose(found, [entropy, disparity], rtol=1e-12)


@pytest.mark.slow
def test_pareto_sets(tmp_path, capsys):
    pareto_set.main(["--steps", "60", "--out", str(tmp_path)])
    records = records_of(tmp_path / "pareto_set" / "volumes.jsonl")
    assert [(r["problem"], r["rule"]) for r in records] == [
        ("VLMOP2", "linear"),
        ("VLMOP2", "stch"),
        ("digits", "separate"),
        ("digits", "adapters"),
    ]
    assert 0 < records[0]["volume"][0] < records[0]["front"] < 0.35
    assert "digits: separate covers the larger volume" in capsys.readouterr().out
    assert (tmp_path / "pareto_set" / "fronts.png").stat().st_size > 10_000


@pytest.mark.slow
def test_physics(tmp_path, monkeypatch, capsys):
    """Beside a made-up reference that has the initial values and fades, as the solution does."""
    x, t = np.linspace(-1, 1, 9), np.linspace(0, 1, 5)
    wave = -np.sin(np.pi * x)[:, None] * np.exp(-t)
    savemat(tmp_path / "burgers_shock.mat", {"x": x, "t": t, "usol": wave})
    few = {"equation": 60, "initial": 20, "boundary": 20}
    monkeypatch.setitem(physics_informed.COUNTS, "Burgers", few)
    arguments = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--steps", "250"]
    physics_informed.main([*arguments, "--problems", "Burgers", "--methods", "gauss_newton"])
    records = records_of(tmp_path / "physics_informed" / "errors.jsonl")
    assert [r["method"] for r in records] == ["mean", "gauss_newton"]
    assert all(np.shape(r["errors"]) == (1, physics_informed.POINTS) for r in records)
    assert all(r["errors"][0][-1] < r["errors"][0][0] for r in records)
    assert "Burgers: from this one start" in capsys.readouterr().out
    assert (tmp_path / "physics_informed" / "errors.png").stat().st_size > 10_000


def test_the_physics_conclusion_counts_pairs_of_runs():
    def record(method, values):
        return {"problem": "p", "method": method, "errors": [[1.0, value] for value in values]}

    # Differences -1, -1.1, -0.9: beyond two standard errors. 1, -1, 1: not. 2, 2.1, 1.9: beyond.
    records = [
        record("mean", [5.0, 9.0, 1.0]),
        record("upgrad", [4.0, 7.9, 0.1]),
        record("config", [6.0, 8.0, 2.0]),
        record("mgda", [7.0, 11.1, 2.9]),
    ]
    assert physics_informed.conclude(records) == "p: better than the mean upgrad; worse mgda."


@pytest.mark.slow
def test_gauss_newton(tmp_path, capsys):
    gauss_newton.main(["--steps", "200", "--out", str(tmp_path)])
    records = records_of(tmp_path / "gauss_newton" / "runs.jsonl")
    assert [r["method"] for r in records] == ["Gauss-Newton", "Adam", "L-BFGS"]
    assert records[0]["steps"] == 200
    assert all(0 < r["loss"] < 0.5 for r in records)
    printed = capsys.readouterr().out
    lowest = min(records, key=lambda record: record["loss"])["method"]
    assert f"Curve, at equal time: {lowest} ends lowest in 1 of 1 seeds" in printed
    assert (tmp_path / "gauss_newton" / "curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_programs_without_files(capsys):
    adversarial_pair.main(20)
    assert "The domain is hidden by: " in capsys.readouterr().out
    federated_rows.main(8)
    assert "Losses rise in the fewest rounds with " in capsys.readouterr().out
    live_monitor.main(6, 3)
    printed = capsys.readouterr().out
    assert printed.count("conflict rate") == 2
    assert "Rows conflicted in " in printed
    training_steps.main(2)
    # One step of 0.05 takes a twentieth off: 3 * 0.95^2 = 2.7, up to noise.
    assert "Within the noise of 0.3 of the Pareto set: none." in capsys.readouterr().out
