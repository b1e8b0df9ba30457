"""The studies run end to end in seconds, and their data are what they claim."""

import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

import jaxmtl  # noqa: E402
from experiments import methods, report, timing  # noqa: E402
from experiments.claims import mean_and_error  # noqa: E402
from experiments.images import load_sklearn_digits  # noqa: E402
from experiments.multimnist import __main__ as multimnist  # noqa: E402
from experiments.multimnist import report as multimnist_report  # noqa: E402
from experiments.multimnist.data import make_pairs, paint, read_pairs  # noqa: E402
from experiments.multimnist.networks import ConvPool  # noqa: E402
from experiments.multimnist.train import METHODS  # noqa: E402
from experiments.study import (  # noqa: E402
    Job,
    Part,
    Report,
    Study,
    Table,
    append_records,
    config_of,
    read_records,
)
from tests import methods as conformance  # noqa: E402


@pytest.mark.slow
def test_smoke_run_writes_results_from_which_the_report_is_made_again(tmp_path, capsys):
    methods = ["cr_mgda"]
    arguments = ["--smoke", "--out", str(tmp_path), "--methods", *methods]
    multimnist.study.main(arguments)
    lines = (tmp_path / "multimnist" / "digits.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["method"], r["seed"]) for r in records] == [(m, s) for m in methods for s in (0, 1)]
    assert {"jax", "optax", "flax", "jaxmtl"} == set(records[0]["versions"])
    assert np.isfinite([r["history"]["test_loss"] for r in records]).all()
    losses = [r["history"]["train_loss"] for r in records]
    assert losses[0] != losses[1]  # seeds differ

    multimnist.study.main([*arguments, "--resume"])
    assert (tmp_path / "multimnist" / "digits.jsonl").read_text().splitlines() == lines
    with pytest.raises(SystemExit, match="expected the options"):
        multimnist.study.main([*arguments, "--resume", "--learning-rate", "0.25"])

    figure = tmp_path / "multimnist" / "digits.png"
    figure.unlink()
    capsys.readouterr()
    multimnist.study.main(["--report-only", "--out", str(tmp_path)])
    assert figure.stat().st_size > 10_000
    assert all(method in capsys.readouterr().out for method in methods)


def test_report_without_results_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="expected results in"):
        multimnist.study.main(["--report-only", "--out", str(tmp_path)])


def record_of(method: str, seed: int, batch_size: int, loss: float, accuracy: float) -> dict:
    """Return a record as a run on MNIST writes it, the right digit a tenth worse."""
    config = {"dataset": "mnist", "batch_size": batch_size, "epochs": 1, "max_steps": 5}
    config["canvas"] = 36
    history = {
        "conflict_rate": [0.4],
        "test_loss": [[loss, loss + 0.1]],
        "test_accuracy": [[accuracy, accuracy - 0.1]],
    }
    return {"method": method, "seed": seed, "config": config, "history": history}


def test_claims_of_table_1_are_paired_over_seeds(tmp_path):
    # Seeds differ by far more than the pair does: unpaired, the gain would drown.
    records = [record_of("mgda", s, 32, 0.1, 0.5 + 0.1 * s) for s in (2, 0, 1)]
    records += [record_of("cr_mgda", s, 32, 0.1, 0.51 + 0.1 * s + 0.001 * s) for s in (0, 1, 2)]
    records += [record_of("pcgrad", s, 32, 0.1, 0.8 + 0.01 * s) for s in (0, 1, 2)]
    records += [record_of("cr_pcgrad", s, 32, 0.1, 0.79 + 0.02 * s) for s in (0, 1, 2)]
    append_records(tmp_path / "multimnist" / "mnist.jsonl", records)
    mgda, pcgrad = multimnist.claims(tmp_path / "multimnist")
    assert (mgda.ours, mgda.verdict) == ("+1.10 ± 0.06 and +1.10 ± 0.06", "reproduced")
    assert mgda.paper == "+0.46 and +0.15"  # of table 1
    assert (pcgrad.ours, pcgrad.verdict) == ("+0.00 ± 0.58 and +0.00 ± 0.58", "not")


def test_claims_of_table_2_compare_batch_sizes_and_the_figure_shows_them(tmp_path, capsys):
    losses = {
        "mgda": {8: 0.4, 4: 0.5, 2: 0.7},
        "cr_mgda": {8: 0.3, 4: 0.5, 2: 0.4},
        "cagrad": {8: 0.3, 4: 0.3, 2: 0.3},
        "cr_cagrad": {8: 0.2, 4: 0.2, 2: 0.4},
    }
    append_records(
        tmp_path / "multimnist" / "mnist_batches.jsonl",
        (
            record_of(method, seed, size, loss + 0.1 * seed, 0.9)
            for method, by_size in losses.items()
            for size, loss in by_size.items()
            for seed in (0, 1)
        ),
    )
    claims = multimnist.claims(tmp_path / "multimnist")
    assert claims[0].differs.startswith(
        "2 seeds in place of 3 runs; 40 examples (not stated), a can"
    )
    verdicts = [claim.verdict for claim in claims]
    # MGDA's loss grows; CR-MGDA's is lower but at 4; its advantage grows. CAGrad: at 8 and 4; no.
    assert verdicts == ["reproduced", "partly", "reproduced", "partly", "not"]
    assert claims[0].ours == "+0.300 ± 0.000 and +0.300 ± 0.000"
    assert claims[2].paper == "+0.23 and +0.22"  # (0.71 - 0.28) - (0.44 - 0.24), of table 2
    multimnist.study.main(["--dataset", "mnist_batches", "--report-only", "--out", str(tmp_path)])
    assert (tmp_path / "multimnist" / "mnist_batches.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "0.71 / 0.81" in shown
    assert "after 40 examples" in shown


def test_one_results_file_holds_several_batch_sizes(tmp_path, monkeypatch):
    digits = multimnist.PRESETS["digits"].options[0]
    variants = [replace(digits, batch_size=size, epochs=1, max_steps=3) for size in (4, 2)]
    preset = multimnist.Preset(tuple(variants), ("mgda",), seeds=1)
    monkeypatch.setitem(multimnist.PRESETS, "digits_batches", preset)
    trained = []

    def stop(options, method):
        trained.append((options.batch_size, method))
        raise InterruptedError

    monkeypatch.setattr(multimnist, "make_epoch", stop)
    arguments = ["--dataset", "digits_batches", "--resume", "--out", str(tmp_path)]
    results = tmp_path / "multimnist" / "digits_batches.jsonl"
    done = [record_of("mgda", 0, 4, 0.5, 0.9) | {"config": config_of(variants[0])}]
    append_records(results, done)
    with pytest.raises(InterruptedError):
        multimnist.study.main(arguments)
    assert trained == [(2, "mgda")]  # what the file holds is not trained again
    append_records(results, [done[0] | {"config": config_of(variants[1])}])
    multimnist.study.main(arguments)
    assert len(trained) == 1
    assert results.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="expected no --batch-size"):
        multimnist.study.main([*arguments, "--batch-size", "3"])


def test_pcgrad_of_zhou_is_the_mean_and_its_average_starts_at_one_half():
    rows, params = np.array([[2.0, 0.0], [-1.0, 1.0]], np.float32), np.zeros(2, np.float32)
    # Both in conflict: g1 - (g1.g2 / |g2|^2) g2 = (1, 1), g2 - (g1.g2 / |g1|^2) g1 = (0, 1).
    plain, reduced = METHODS["pcgrad"].make(2), METHODS["cr_pcgrad"].make(2)
    update, _ = plain.update(rows, plain.init(params), params)
    np.testing.assert_allclose(update, [0.5, 1.0], rtol=1e-6)
    # Weights 3/4 and 1 lie 3/4 from (1/2, 1/2): alpha_1 = max(0, 1 - 1 / (3/4)) = 0.
    update, state = reduced.update(rows, reduced.init(params), params)
    np.testing.assert_allclose(update, [0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose(state.mtl_weights, [0.75, 1.0], rtol=1e-6)


def test_every_method_is_built_for_two_tasks():
    assert all(hasattr(method.make(2), "update") for method in METHODS.values())
    assert set(multimnist_report.PAPER) <= set(METHODS)


def test_no_test_digit_is_seen_in_training():
    train, test = load_sklearn_digits("train"), load_sklearn_digits("test")
    assert len(train.labels) + len(test.labels) == 1797
    seen = {image.tobytes() for image in train.images}
    assert not seen & {image.tobytes() for image in test.images}


def test_canvas_holds_both_digits_and_their_maximum():
    left, right = np.full((1, 8, 8), 3, np.uint8), np.full((1, 8, 8), 5, np.uint8)
    canvas = np.asarray(paint(left, right, 12))[0]
    expected = np.zeros((12, 12), np.uint8)
    expected[:8, :8] = 3
    expected[4:, 4:] = 5
    np.testing.assert_array_equal(canvas, expected)


def test_pairs_take_every_digit_as_left_one_and_never_twice_the_same():
    digits = load_sklearn_digits("train")
    pairs = make_pairs(digits, partners=4, statistics_of=digits, seed=0)
    np.testing.assert_array_equal(np.bincount(pairs.left), 4)
    assert (pairs.left != pairs.right).all()
    images, labels = read_pairs(pairs, np.arange(10), 12)
    assert images.shape == (10, 12, 12)
    assert labels.shape == (2, 10)
    np.testing.assert_array_equal(labels[1], digits.labels[np.asarray(pairs.right[:10])])


@pytest.mark.slow
def test_convolution_with_pooling_is_what_flax_computes():
    x = jax.random.normal(jax.random.key(0), (2, 16, 12, 3))
    ours = ConvPool(features=4, size=5)
    params = ours.init(jax.random.key(1), x)
    flax_conv = nn.Conv(features=4, kernel_size=(5, 5), padding="VALID")
    expected = nn.max_pool(flax_conv.apply(params, x), (2, 2), strides=(2, 2))
    np.testing.assert_allclose(ours.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_standard_error_is_that_of_the_mean():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert np.isnan(mean_and_error([1.0])[1])


# --- the house ------------------------------------------------------------------------------------

ROOT = Path(methods.__file__).parent
STUDIES = (*report.STUDIES, "scenes", "molecules")  # these wait for their results


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_imports_no_other_and_no_benchmark(study):
    for path in (ROOT / study).rglob("*.py"):
        imported = re.findall(r"^\s*(?:from|import) experiments\.(\w+)", path.read_text(), re.M)
        assert not set(imported) & {*STUDIES, "benchmarks", "examples"} - {study}, path


def test_one_table_knows_every_method_and_studies_only_change_it():
    by_hand = {method.name for method in conformance.METHODS if method.needs != "a rule"}
    assert by_hand - set(methods.METHODS) <= {"clip_rows", "track_gradients"}  # row transforms
    cagrad = methods.METHODS["cagrad"]
    rows, params = np.array([[2.0, 0.0], [-1.0, 1.0]], np.float32), np.zeros(2, np.float32)

    def update_of(rule):
        return np.asarray(rule.update(rows, rule.init(params), params)[0])

    for made, expected in (
        (cagrad.make(2), jaxmtl.cagrad(0.4)),
        (cagrad.using(c=0.9).make(2), jaxmtl.cagrad(0.9)),
        (cagrad._replace(asks=("c",)).build(2, c=0.2, weights=None), jaxmtl.cagrad(0.2)),
    ):
        np.testing.assert_array_equal(update_of(made), update_of(expected))
    halved = methods.METHODS["pcgrad"].then(methods.mean).make(2)
    np.testing.assert_allclose(update_of(halved), update_of(jaxmtl.pcgrad()) / 2, rtol=1e-6)
    assert {methods.needs(methods.METHODS[n]) for n in ("famo", "rgw")} == {"none"}
    assert methods.needs(methods.METHODS["mgda"]) == "Gramian"
    assert methods.needs(methods.METHODS["graddrop"]) == "coordinates"


def test_the_driver_writes_job_by_job_and_goes_on_where_it_stopped(tmp_path, capsys):
    ran = []

    def run(number, say):
        if number == 2 and not ran[2:]:
            ran.append("stopped")
            raise InterruptedError
        ran.append(number)
        say(f"job {number}")
        return [{"number": number, "config": {"steps": 3}}]

    def plan(args):
        def jobs(results):
            done = {record["number"] for record in results.records}
            return [Job(f"job {n}", partial(run, n)) for n in range(4) if n not in done]

        yield Part("numbers", jobs, [{"steps": args.steps}])

    def report(folder, args):
        records = read_records(folder / "numbers.jsonl")
        return Report([Table("Numbers", ("n",), [(str(r["number"]),) for r in records])], {})

    study = Study(
        "toy", ("",), ("a", "b"), (), plan, report, lambda folder: [],
        {"--steps": {"type": int, "default": 3}},
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        study.main(["--out", str(tmp_path)])
    study.main(["--out", str(tmp_path), "--resume"])
    records = read_records(tmp_path / "toy" / "numbers.jsonl")
    assert [record["number"] for record in records] == [0, 1, 2, 3]
    assert all(record["versions"]["jaxmtl"] == jaxmtl.__version__ for record in records)
    assert ran == [0, 1, "stopped", 2, 3]
    assert "job 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected the options of"):
        study.main(["--out", str(tmp_path), "--resume", "--steps", "4"])
    study.main(["--out", str(tmp_path)])  # without --resume the file starts anew
    assert ran[-4:] == [0, 1, 2, 3]
    assert len(read_records(tmp_path / "toy" / "numbers.jsonl")) == 4
    with pytest.raises(SystemExit):
        study.main(["--out", str(tmp_path), "--methods", "c"])


def test_programs_are_timed_in_turn_until_one_has_had_its_time():
    order = []
    runs = {name: partial(order.append, name) for name in "ab"}
    times = timing.interleaved(runs, repeats=6)
    assert all(len(found) >= 6 for found in times.values())
    assert order[:2] == ["a", "b"]  # once to warm up, then five of each, of which three count
    assert order[2:12] == ["a"] * 5 + ["b"] * 5
    slow = timing.interleaved({"slow": partial(time.sleep, 0.11), "a": runs["a"]}, 6, 0.1)
    assert len(slow["slow"]) == 3
    assert timing.median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 2.0]) == 2.0
    program = timing.compiled(lambda x, y: x @ y, np.ones((4, 4)), np.ones((4, 4)))
    assert program.flops == pytest.approx(2 * 4**3, rel=0.3)
    np.testing.assert_array_equal(program.run(), 4 * np.ones((4, 4)))
