"""The studies run end to end in seconds, and their data are what they claim."""

import json

import jax
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

from experiments import multimnist  # noqa: E402
from experiments._runs import mean_and_error  # noqa: E402
from experiments.data.digit_pairs import make_pairs, paint, read_pairs  # noqa: E402
from experiments.data.images import load_sklearn_digits  # noqa: E402
from experiments.methods import METHODS  # noqa: E402
from experiments.models.two_heads import ConvPool  # noqa: E402


def test_smoke_run_writes_results_from_which_the_report_is_made_again(tmp_path, capsys):
    methods = ["cr_mgda"]
    arguments = ["--smoke", "--out", str(tmp_path), "--methods", *methods]
    multimnist.main(arguments)
    lines = (tmp_path / "multimnist_digits.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["method"], r["seed"]) for r in records] == [(m, s) for m in methods for s in (0, 1)]
    assert {"jax", "optax", "flax", "jaxmtl"} == set(records[0]["versions"])
    assert np.isfinite([r["history"]["test_loss"] for r in records]).all()
    losses = [r["history"]["train_loss"] for r in records]
    assert losses[0] != losses[1]  # seeds differ

    multimnist.main([*arguments, "--resume"])
    assert (tmp_path / "multimnist_digits.jsonl").read_text().splitlines() == lines
    with pytest.raises(SystemExit, match="expected the options"):
        multimnist.main([*arguments, "--resume", "--learning-rate", "0.25"])

    figure = tmp_path / "multimnist_digits.png"
    figure.unlink()
    capsys.readouterr()
    multimnist.main(["--report-only", "--out", str(tmp_path)])
    assert figure.stat().st_size > 10_000
    assert all(method in capsys.readouterr().out for method in methods)


def test_report_without_results_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="expected results in"):
        multimnist.main(["--report-only", "--out", str(tmp_path)])


def test_every_method_is_built_for_two_tasks():
    assert all(hasattr(factory(2), "update") for factory in METHODS.values())
    assert set(multimnist.PAPER) <= set(METHODS)


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
