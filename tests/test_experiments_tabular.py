"""The study of multi-task tables: its data, its driver and its report."""

import csv
import gzip
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

from scipy.io import savemat  # noqa: E402
from sklearn.datasets import fetch_openml  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from sklearn.utils import Bunch  # noqa: E402

import jaxmtl  # noqa: E402
from experiments.claims import VERDICTS  # noqa: E402
from experiments.tabular import __main__ as tabular  # noqa: E402
from experiments.tabular import data as tables  # noqa: E402
from experiments.tabular.methods import (  # noqa: E402
    INPUTS,
    METHODS,
    Batches,
    cross_gramian,
    make_direction,
    swept_weights,
)
from experiments.tabular.networks import MixtureOfExperts, SharedBottom  # noqa: E402
from experiments.tabular.report import beyond_front, conclude, drops, mean_ranks, tuned_of  # noqa: E402
from experiments.tabular.train import area_under_curve, draw_order, relative_error  # noqa: E402
from tests import methods as conformance  # noqa: E402
from tests.problems import flat_rows  # noqa: E402

pytestmark = pytest.mark.xdist_group("tabular")

# One rule of each route and with each further input.
YEAST = ["single_task", "linear_scalarization", "famo", "track_gradients_pcgrad"]
CENSUS = ["single_task", "linear_scalarization", "modo", "swept_scalarization"]
NUM_SWEPT = len(swept_weights(2))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a smoke run."""
    out = tmp_path_factory.mktemp("tabular")
    start = ["--smoke", "--out", str(out), "--datasets"]
    tabular.study.main([*start, "yeast", "--methods", *YEAST])
    tabular.study.main([*start, "census", "--methods", *CENSUS, "--models", "shared_bottom"])
    more = ["--models", "mmoe", "--methods", *CENSUS[1:3], "--resume"]
    tabular.study.main([*start, "census", *more])
    return out


def records_in(folder, dataset):
    lines = (folder / "tabular" / f"{dataset}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_smoke_run_writes_a_record_per_method_and_setting(smoke):
    records = records_in(smoke, "yeast")
    assert [r["method"] for r in records] == YEAST
    for record in records:
        assert np.shape(record["test_auc"]) == (2, 14)  # seeds, tasks
        assert np.isfinite(record["test_auc"]).all()
        assert record["test_auc"][0] != record["test_auc"][1]
        assert {"jax", "optax", "flax", "jaxmtl"} == set(record["versions"])
    made = [(r["model"], r["method"]) for r in records_in(smoke, "census")]
    bottom = CENSUS[:-1] + CENSUS[-1:] * NUM_SWEPT
    assert made == [("shared_bottom", m) for m in bottom] + [("mmoe", m) for m in CENSUS[1:3]]


@pytest.mark.slow
def test_resume_keeps_what_is_there_and_refuses_other_options(smoke):
    path = smoke / "tabular" / "yeast.jsonl"
    before = path.read_text()
    arguments = ["--smoke", "--out", str(smoke), "--datasets", "yeast", "--methods", *YEAST]
    tabular.study.main([*arguments, "--resume"])
    assert path.read_text() == before
    with pytest.raises(SystemExit, match="expected the options of"):
        tabular.study.main([*arguments, "--resume", "--learning-rates", "0.5"])


@pytest.mark.slow
def test_report_is_made_of_the_results_alone(smoke, capsys):
    figures = [smoke / "tabular" / name for name in ("census.png", "yeast.png")]
    for figure in figures:
        figure.unlink(missing_ok=True)
    tabular.study.main(["--report-only", "--out", str(smoke)])
    text = capsys.readouterr().out
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    assert all(name in text for name in ("census, mmoe", "modo", "single_task", "tuned"))


@pytest.mark.slow
def test_claims_are_decided_by_the_records(smoke, tmp_path):
    claims = tabular.claims(smoke / "tabular")
    assert len(claims) >= 4
    assert all(claim.verdict in VERDICTS and claim.ours for claim in claims)
    assert tabular.claims(tmp_path) == []
    # A mixture that is better on both tasks by far, then on one, then on none.
    for better, verdict in (((1, 1), "reproduced"), ((1, -1), "partly"), ((-1, -1), "not")):
        edited = tmp_path / verdict
        edited.mkdir()
        records = records_in(smoke, "census")
        for record in records:
            shift = 0.2 * np.array(better) if record["model"] == "mmoe" else np.zeros(2)
            if record["method"] != "single_task":
                record["test_auc"] = [(0.6 + shift).tolist(), (0.61 + shift).tolist()]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (edited / "census.jsonl").write_text(lines)
        verdicts = {c.source: c.verdict for c in tabular.claims(edited)}
        assert verdicts["Ma 2018"] == verdict


def test_the_conclusion_counts_what_gains_over_equal_weights():
    def record(method, *errors):  # of five seeds, two tasks
        return {"method": method, "setting": None, "test_rrmse": [[e, 2 * e] for e in errors]}

    made = [
        record("linear_scalarization", 1.0, 1.1, 0.9, 1.0, 1.05),
        record("mgda", 0.9, 1.01, 0.8, 0.89, 0.96),  # by a tenth at every seed
        record("cagrad", 0.9, 0.9, 0.9, 0.9, 1.0),  # by nearly a tenth, but not at each
        record("upgrad", 1.0, 1.2, 0.9, 0.9, 1.05),
    ]
    results = {r["method"]: r for r in made}
    sentence = conclude({"rf1, mlp": (results, made[0])})
    assert sentence.endswith("rf1, mlp 2 of 3 (1).")


def test_report_without_results_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="expected results in"):
        tabular.study.main(["--report-only", "--out", str(tmp_path)])


def test_every_rule_of_the_library_is_under_study():
    for method in conformance.METHODS:
        names = [name for name in METHODS if (name + "_").startswith(method.name + "_")]
        assert names, method.name
        declared = set(METHODS[names[0]].inputs)
        assert declared == set(method.inputs) & set(INPUTS), method.name
        assert METHODS[names[0]].min_tasks >= method.min_tasks


# --- data -----------------------------------------------------------------------------------------


def census_rows(n):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        row = [f"category {rng.integers(3)}" for _ in range(42)]
        for j in (*tables.CONTINUOUS, tables.WEIGHT):
            row[j] = str(rng.integers(100))
        row[tables.MARITAL] = ["Never married", "Divorced", "Widowed"][i % 3]
        row[tables.INCOME] = ["- 50000.", "50000+."][i % 2]
        row[25] = "?" if i % 4 == 0 else row[25]
        rows.append(row)
    return rows


def check_census(split, rows, num_train):
    assert [len(part.labels) for part in split[:3]] == [num_train, 3, 3]
    train = rows[:num_train]
    expected = [[row[41] == "50000+.", row[7] == "Never married"] for row in train]
    np.testing.assert_array_equal(split.train.labels, np.asarray(expected, float))
    x = np.asarray(tables.features(split.train, jnp.arange(num_train), split.num_codes))
    # All columns but 7 numbers, two labels and the survey's weight are one-hot.
    np.testing.assert_array_equal(x[:, : split.num_codes].sum(axis=1), 32)
    for i, row in enumerate(train):  # rows with the same category, and they alone, share a 1
        same = [other[1] == row[1] for other in train]
        codes = np.asarray(split.train.codes)[:, 0]
        np.testing.assert_array_equal(codes == codes[i], same)
    np.testing.assert_allclose(x[:, split.num_codes :].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x[:, split.num_codes :].std(axis=0), 1, atol=1e-5)


def test_census_from_a_folder_and_from_openml_is_the_same(tmp_path, monkeypatch):
    rows, num_train = census_rows(18), 12
    monkeypatch.setattr(tables, "CENSUS_TRAIN", num_train)
    for part, chosen in {"train": rows[:num_train], "test": rows[num_train:]}.items():
        with gzip.open(tmp_path / f"census_income_kdd_{part}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows([[" " + cell for cell in row] for row in chosen])
    from_folder = tables.load_census(tmp_path)
    check_census(from_folder, rows, num_train)

    # What OpenML's liac-arff parser gives: categories as numbers, a missing one as NaN.
    names = [f"V{i + 1}" for i in range(42)]
    numeric = (*tables.CONTINUOUS, tables.WEIGHT)
    categories, columns = {}, []
    for j, name in enumerate(names):
        cells = [row[j] for row in rows]
        if j in numeric:
            columns.append([float(cell) for cell in cells])
        else:
            categories[name] = sorted(set(cells) - {"?"})
            columns.append([np.nan if c == "?" else categories[name].index(c) for c in cells])
    asked = {}

    def fetch(**arguments):
        asked.update(arguments)
        return Bunch(data=np.array(columns).T, feature_names=names, categories=categories)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    downloaded = tables.load_census()
    assert asked["data_id"] == 4535
    check_census(downloaded, rows, num_train)
    for ours, other in zip(from_folder[:3], downloaded[:3], strict=True):
        np.testing.assert_array_equal(ours.numbers, other.numbers)
        np.testing.assert_array_equal(ours.labels, other.labels)


def test_yeast_from_a_folder_and_from_openml_is_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    numbers, labels = rng.normal(size=(20, 103)).round(6), rng.integers(0, 2, (20, 14))
    monkeypatch.setattr(tables, "YEAST_TRAIN", 10)
    with gzip.open(tmp_path / "yeast.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"Att{i}" for i in range(103)] + [f"Class{i}" for i in range(14)])
        writer.writerows(np.concatenate([numbers, labels], axis=1).tolist())
    from_folder = tables.load_yeast(tmp_path)
    np.testing.assert_array_equal(from_folder.test.labels, labels[10:])
    assert [len(part.labels) for part in from_folder[:3]] == [8, 2, 10]

    def fetch(**arguments):
        assert (arguments["name"], arguments["version"]) == ("yeast", 4)
        return Bunch(data=numbers, target=np.where(labels, "TRUE", "FALSE").astype(object))

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    for ours, other in zip(from_folder[:3], tables.load_yeast()[:3], strict=True):
        np.testing.assert_array_equal(ours.labels, other.labels)
        np.testing.assert_allclose(ours.numbers, other.numbers, rtol=1e-6)


def write_arff(path, values, missing=None):
    """Writes a table of numbers as multi-target sets are published, with "?" for missing ones."""
    cells = [[repr(float(x)) for x in row] for row in values]
    for row, column in missing or ():
        cells[row][column] = "?"
    lines = ["@relation made_up", *(f"@attribute a{i} numeric" for i in range(values.shape[1]))]
    text = "\n".join([*lines, "@data", *map(",".join, cells)]) + "\n"
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write(text)


def check_regression(split, rows, num_inputs):
    """The parts hold every row once; inputs and targets are standardized by the training rows."""
    assert split.regression
    parts = split[:3]
    for i, name in ((0, "numbers"), (1, "labels")):
        values = np.split(rows, [num_inputs], axis=1)[i]
        got = np.concatenate([np.asarray(getattr(part, name)) for part in parts])
        assert got.shape == values.shape
        # Standardization is affine in each column: sorted, they lie on a line.
        for column in range(values.shape[1]):
            before, after = np.sort(values[:, column]), np.sort(got[:, column])
            line = np.polyval(np.polyfit(before, after, 1), before)
            np.testing.assert_allclose(line, after, atol=1e-4)
        train = np.asarray(getattr(split.train, name))
        np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("dataset", "name", "inputs", "tasks"),
    [("rf1", "rf1.arff.gz", 64, 8), ("water_quality", "wq.arff", 16, 14)],
)
def test_multi_target_files_are_read_and_incomplete_rows_dropped(
    tmp_path, dataset, name, inputs, tasks
):
    rows = np.random.default_rng(0).normal(3, 5, (27, inputs + tasks))
    write_arff(tmp_path / name, rows, missing=[(4, 9), (11, 0)])
    split = tables.load_arff(dataset, tmp_path)
    assert [len(part.labels) for part in split[:3]] == [15, 5, 5]
    assert len(split.tasks) == split.train.labels.shape[1] == tasks
    check_regression(split, np.delete(rows, [4, 11], axis=0), inputs)
    write_arff(tmp_path / name, rows[:, 1:])
    with pytest.raises(ValueError, match=f"expected {inputs} inputs and {tasks} targets"):
        tables.load_arff(dataset, tmp_path)


def test_sarcos_is_split_or_tested_on_the_published_rows(tmp_path):
    rows = np.random.default_rng(1).normal(-1, 2, (30, 28))
    savemat(tmp_path / "sarcos_inv_test.mat", {"sarcos_inv_test": rows[20:]})
    split = tables.load_sarcos(tmp_path)
    assert [len(part.labels) for part in split[:3]] == [6, 2, 2]
    check_regression(split, rows[20:], 21)
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": rows[:20]})
    split = tables.load_sarcos(tmp_path)
    assert [len(part.labels) for part in split[:3]] == [16, 4, 10]
    targets = np.asarray(split.test.labels)
    np.testing.assert_array_equal(targets.argsort(axis=0), rows[20:, 21:].argsort(axis=0))
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": rows[:20, :27]})
    with pytest.raises(ValueError, match="expected as many columns in both files"):
        tables.load_sarcos(tmp_path)


def test_wrong_files_of_sarcos_say_what_is_wrong(tmp_path):
    rows, path = np.random.default_rng(1).normal(size=(30, 28)), tmp_path / "sarcos_inv_test.mat"
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": rows})
    with pytest.raises(FileNotFoundError, match=r"expected sarcos_inv_test.mat beside sarcos_inv"):
        tables.load_sarcos(tmp_path)
    (tmp_path / "sarcos_inv.mat").unlink()
    for name, values, words in (
        ("x", rows, r"expected the variable sarcos_inv_test in .*mat, got \['x'\]"),
        ("sarcos_inv_test", rows[:, 1:], "expected 21 inputs and 7 targets .* shape .30, 27."),
        ("sarcos_inv_test", [["a"] * 28], "expected numbers as sarcos_inv_test in .*, got <U1"),
        ("sarcos_inv_test", rows * np.inf, "expected finite numbers, or missing ones, in sarcos"),
        ("sarcos_inv_test", rows[:4], "expected at least 5 rows .* in sarcos, got 4"),
    ):
        savemat(path, {name: values})
        with pytest.raises(ValueError, match=words):
            tables.load_sarcos(tmp_path)
    savemat(path, {"sarcos_inv_test": rows})
    whole = path.read_bytes()
    for content in (b"no", b"", whole[:1000], b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a file of MATLAB up to version 7.2 in .*_test.mat"):
            tables.load_sarcos(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("no", "expected an ARFF file of numbers in .*wq.arff, got another one"),
        ("", "expected an ARFF file of numbers in"),
        ("@relation a\n@attribute a numeric\n@data\n1,2\n", "expected 16 inputs|expected an ARFF"),
        ("@relation a\n@attribute a numeric\n@data\nx\n", "expected an ARFF file of numbers in"),
        ("@relation a\n@attribute a string\n@data\n'x'\n", "expected an ARFF file of numbers in"),
        ("@relation a\n@attribute b {0,1}\n@data\n1\n", "numeric attributes in .*, got b of type"),
        ("@relation a\n@attribute a numeric\n@data\n1\n", "expected 16 inputs and 14 targets"),
    ],
)
def test_wrong_multi_target_files_say_what_is_wrong(tmp_path, content, words):
    (tmp_path / "wq.arff").write_text(content)
    with pytest.raises(ValueError, match=words):
        tables.load_arff("water_quality", tmp_path)


def test_broken_archives_of_tables_say_what_is_wrong(tmp_path):
    rows = np.random.default_rng(0).normal(size=(200, 72))
    write_arff(tmp_path / "rf1.arff.gz", rows)
    whole = (tmp_path / "rf1.arff.gz").read_bytes()
    for content in (b"no", whole[: len(whole) // 2]):
        (tmp_path / "rf1.arff.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"an ARFF file of numbers in .*rf1.arff.gz"):
            tables.load_arff("rf1", tmp_path)
        (tmp_path / "yeast.csv.gz").write_bytes(content)
        (tmp_path / "census_income_kdd_train.csv.gz").write_bytes(content)
        for load, name in ((tables.load_yeast, "yeast"), (tables.load_census, "census")):
            words = f"expected (a table of text, compressed by gzip,|.* columns) in .*{name}"
            with pytest.raises(ValueError, match=words):
                load(tmp_path)


def write_csv(path, rows):
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize(
    ("place", "cell", "words"),
    [
        (None, None, "expected 117 columns in line 3 of .*yeast.csv.gz, got 116"),
        (5, "x", "expected finite numbers in .*yeast.csv.gz, got 'x'"),
        (5, "nan", "expected finite numbers in .*yeast.csv.gz, got 'nan'"),
        (-1, "2", "expected labels 0 and 1 in the last 14 columns of .*, got .2"),
    ],
)
def test_a_wrong_yeast_says_what_is_wrong(tmp_path, monkeypatch, place, cell, words):
    monkeypatch.setattr(tables, "YEAST_TRAIN", 2)
    rows = [["name"] * 117, *([["1"] * 117] * 5)]
    rows[2] = rows[2][:-1] if place is None else [*rows[2]]
    if place is not None:
        rows[2][place] = cell
    write_csv(tmp_path / "yeast.csv.gz", rows)
    with pytest.raises(ValueError, match=words):
        tables.load_yeast(tmp_path)
    write_csv(tmp_path / "yeast.csv.gz", [["1"] * 117] * 3)
    with pytest.raises(ValueError, match=r"2 rows for training and others .* got 2 in all"):
        tables.load_yeast(tmp_path)


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        (0, "x", "expected finite numbers in column 1 of census_income_kdd in .*, got 'x'"),
        (41, "no", "expected a label, with '-' in one of its values, in column 42"),
        (7, "no", "expected a label, with 'Never married' in one of its values, in column 8"),
        (None, None, "expected 42 columns in line 1 of .*kdd_train.csv.gz, got 41"),
    ],
)
def test_a_wrong_census_says_what_is_wrong(tmp_path, monkeypatch, column, cell, words):
    monkeypatch.setattr(tables, "CENSUS_TRAIN", 12)
    rows = census_rows(18)
    for row in rows:
        if column is None:
            del row[3]
        else:
            row[column] = cell
    for part, chosen in (("train", rows[:12]), ("test", rows[12:])):
        write_csv(tmp_path / f"census_income_kdd_{part}.csv.gz", chosen)
    with pytest.raises(ValueError, match=words):
        tables.load_census(tmp_path)
    if column is not None:
        write_csv(tmp_path / "census_income_kdd_test.csv.gz", rows[:0])
        with pytest.raises(ValueError, match=r"expected 12 rows for training .* got 12 in all"):
            tables.load_census(tmp_path)


@pytest.mark.parametrize("folder", [None, "."])
@pytest.mark.parametrize(
    ("load", "name"),
    [
        (tables.load_sarcos, "sarcos_inv_test.mat"),
        (partial(tables.load_arff, "rf1"), "rf1.arff"),
        (partial(tables.load_arff, "water_quality"), "wq.arff"),
    ],
)
def test_a_missing_regression_says_which_file_and_where(load, name, folder, tmp_path):
    where = folder and tmp_path
    with pytest.raises(FileNotFoundError, match=f"expected {name}.*--data-dir"):
        load(where)


def test_relative_error_is_that_of_the_mean_of_training():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(50, 3))
    outputs = np.stack([np.zeros((50, 3)), targets, 3 * targets])
    np.testing.assert_allclose(
        relative_error(outputs, targets), [[1] * 3, [0] * 3, [2] * 3], atol=1e-12
    )


@pytest.mark.slow
def test_a_regression_is_trained_chosen_and_reported_by_its_error(tmp_path, capsys):
    start = ["--smoke", "--out", str(tmp_path), "--datasets", "water_quality"]
    tabular.study.main([*start, "--methods", "single_task", "linear_scalarization", "mgda"])
    records = {r["method"]: r for r in records_in(tmp_path, "water_quality")}
    for record in records.values():
        assert np.shape(record["test_rrmse"]) == (2, 14)
        assert np.isfinite(record["test_rrmse"]).all()
        assert "test_auc" not in record
    mgda = records["mgda"]
    means = np.array(mgda["validation_means"])  # (checkpoints, rates): the least was taken
    np.testing.assert_allclose(np.mean(mgda["validation_rrmse"]), means.min(), atol=1e-4)
    text = capsys.readouterr().out
    assert "RRMSE %" in text
    assert (tmp_path / "tabular" / "water_quality.png").stat().st_size > 10_000
    worse = {"test_rrmse": (2 * np.array(mgda["test_rrmse"])).tolist(), "setting": None}
    assert (drops(worse, mgda) > 50).all()  # a larger error is a loss
    assert mean_ranks({"a": mgda, "b": worse}) == {"a": 1.0, "b": 2.0}


def test_the_download_asks_for_arguments_that_scikit_learn_has(monkeypatch):
    from inspect import signature

    asked = {}
    original = signature(fetch_openml)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda **kw: asked.update(kw))
    tables._fetch(data_id=4535, target_column=None)
    original.bind(**asked)
    assert asked["parser"] == "liac-arff"


def test_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="leave --data-dir away"):
        tables.load_yeast(tmp_path)


# --- mathematics ----------------------------------------------------------------------------------


def test_area_under_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, 3))
    scores = rng.normal(size=(4, 50, 3)).round(1)  # with ties
    expected = [[roc_auc_score(labels[:, i], s[:, i]) for i in range(3)] for s in scores]
    np.testing.assert_allclose(area_under_curve(scores, labels), expected, rtol=1e-12)


def test_mixture_of_experts_is_the_papers_formula():
    network = MixtureOfExperts(num_tasks=2, num_experts=3, width=4, tower_width=5)
    x = jax.random.normal(jax.random.key(0), (6, 7))
    params = network.init(jax.random.key(1), x)["params"]
    logits = network.apply({"params": params}, x)
    kernel = np.asarray(params["shared"]["kernel"]).reshape(7, 3, 4)
    for task in range(2):
        gate = np.exp(np.asarray(x @ params["gates"][task]))
        gate /= gate.sum(axis=1, keepdims=True)
        experts = [np.maximum(np.asarray(x) @ kernel[:, e], 0) for e in range(3)]
        z = sum(gate[:, [e]] * experts[e] for e in range(3))
        tower = jax.tree.map(lambda leaf, i=task: np.asarray(leaf[i]), params["towers"])
        hidden = np.maximum(z @ tower["hidden"] + tower["hidden_bias"], 0)
        expected = (hidden @ tower["out"])[:, 0] + tower["bias"]
        np.testing.assert_allclose(logits[task], expected, rtol=2e-5, atol=1e-6)


@pytest.fixture(scope="module")
def problem():
    """A network with two tasks of very different loss, its parameters and losses of rows."""
    split = tables.make_up(("a", "b"), 120)
    network = SharedBottom(2, (8,), tower_width=3)
    rows = jnp.arange(40)
    x = tables.features(split.train, rows, split.num_codes)
    params = network.init(jax.random.key(0), x)["params"]

    def losses_fn(params, rows):
        logits = network.apply(
            {"params": params}, tables.features(split.train, rows, split.num_codes)
        )
        targets = split.train.labels[rows].T
        return ((logits - targets) ** 2).mean(axis=1) * jnp.array([1.0, 20.0])

    return losses_fn, params, rows


@pytest.mark.slow
def test_a_rule_moves_the_shared_parameters_and_tasks_move_their_own(problem):
    losses_fn, params, rows = problem
    init, direction = make_direction(METHODS["mgda"], 2, 5, None)
    update, _ = direction(lambda p: losses_fn(p, rows), params, init(params), key=jax.random.key(0))
    jacobian = jax.jacrev(losses_fn)(params, rows)
    flat = flat_rows(jacobian["shared"])
    a, b = flat  # the point of least norm on a segment, by hand
    share = np.clip(b @ (b - a) / ((a - b) @ (a - b)), 0, 1)
    expected = share * a + (1 - share) * b
    ours = flat_rows(update["shared"], 0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    own = jax.tree.map(lambda leaf: leaf.sum(axis=0), jacobian["towers"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), update["towers"], own)


def test_a_setting_is_the_weights_of_one_backward_pass(problem):
    losses_fn, params, rows = problem
    weights = jnp.array([0.9, 0.1])
    init, direction = make_direction(METHODS["swept_scalarization"], 2, 5, weights)
    update, _ = jax.jit(
        lambda params, state: direction(lambda p: losses_fn(p, rows), params, state)
    )(params, init(params))
    expected = jax.jit(jax.grad(lambda p: weights @ losses_fn(p, rows)))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), update, expected)


def test_cross_gramian_is_that_of_the_halves_of_the_next_batch(problem):
    losses_fn, params, rows = problem
    batches = Batches(rows[:10], rows[10:20], rows[20:40])
    ours = jax.jit(lambda params: cross_gramian(losses_fn, params, batches))(params)
    jacobian = jax.jit(jax.jacrev(losses_fn))
    first, second = (jacobian(params, part) for part in jnp.split(rows[20:40], 2))
    expected = jaxmtl.gramian(first["shared"], second["shared"])
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_epochs_visit_rows_once_in_an_order_of_their_seed():
    order = draw_order(jax.random.key(0), num_examples=23, steps=4, epochs=2)
    assert order.shape == (8, 5)
    for epoch in np.asarray(order).reshape(2, 20):
        assert len(set(epoch.tolist())) == 20
    assert (draw_order(jax.random.key(1), num_examples=23, steps=4, epochs=2) != order).any()


def test_swept_weights_are_distinct_and_favor_rare_labels():
    shares = np.linspace(0.02, 0.5, 14)
    for weights in (swept_weights(2), swept_weights(7), swept_weights(14, shares)):
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
        assert (weights > 0).all()
        assert len(np.unique(weights, axis=0)) == len(weights)
    inverse = 1 / (shares * (1 - shares))
    np.testing.assert_allclose(weights[3], inverse / inverse.sum(), rtol=1e-12)
    assert (np.diff(weights[:8, 0]) > 0).all()  # more and more on the rarest


# --- report ---------------------------------------------------------------------------------------


def record(test, validation=None, setting=None):
    return {"test_auc": test, "validation_auc": validation or test, "setting": setting}


def test_drops_ranks_and_tuned_weights_are_worked_out_by_hand():
    single = record([[0.8, 0.5], [0.8, 0.5]])
    other = record([[0.84, 0.5], [0.8, 0.45]])
    np.testing.assert_allclose(drops(other, single), [-2.5, 5.0], rtol=1e-5)
    ranks = mean_ranks({"a": record([[0.9, 0.5]]), "b": record([[0.8, 0.5]])})
    assert ranks == {"a": 1.25, "b": 1.75}
    results = {
        "linear_scalarization": record([[0.9, 0.9]], validation=[[0.5, 0.5]]),
        "weights 0.1 : 0.9": record([[0.6, 0.6]], validation=[[0.7, 0.6]], setting=[0.1, 0.9]),
    }
    assert tuned_of(results)["setting"] == [0.1, 0.9]  # by validation, not by test


def test_a_rule_is_beyond_the_front_only_if_every_weighting_loses_somewhere():
    def near(x, y):
        return [[x, y], [x + 0.001, y - 0.001], [x - 0.001, y + 0.001]]

    results = {
        "linear_scalarization": record(near(0.8, 0.8)),
        "weights 0.9 : 0.1": record(near(0.9, 0.6), setting=[0.9, 0.1]),
        "mgda": record(near(0.85, 0.75)),  # between the two, but no weighting matches it
        "upgrad": record(near(0.7, 0.8)),
    }
    # paired errors vanish only up to rounding: the seeds move alike
    assert beyond_front(results) == ["mgda"]
