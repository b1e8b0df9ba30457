"""The study of faces: its data, its network, its training, its times and its report."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")
Image = pytest.importorskip("PIL.Image", reason="the extra `experiments` is not installed")

from sklearn.metrics import f1_score  # noqa: E402

from experiments import images  # noqa: E402
from experiments.checkpoints import Checkpoint  # noqa: E402
from experiments.claims import NO_DATA  # noqa: E402
from experiments.faces import __main__ as faces  # noqa: E402
from experiments.faces import data, published, report, timing, train  # noqa: E402
from experiments.faces.methods import LIBRARY, METHODS, PAPER, Known  # noqa: E402
from experiments.faces.networks import Network  # noqa: E402
from experiments.study import Results, append_records, read_records  # noqa: E402
from tests.methods import sweep  # noqa: E402
from tests.problems import some  # noqa: E402

pytestmark = pytest.mark.xdist_group("faces")

SMOKE = faces.options_of(faces.study.parse(["--smoke"]))
KNOWN = Known(6, train.rate_of(SMOKE, 6), 0.01)


def made_up_split(options=SMOKE):
    return data.Split(*(data.make_up(options.made_up, options.size, seed) for seed in range(3)))


def flat(tree, rows=()):
    return np.concatenate([np.reshape(x, (*rows, -1)) for x in jax.tree.leaves(tree)], axis=-1)


# --- the network ----------------------------------------------------------------------------------

# Channels into and out of each convolution at width 64, from the description.
CONVOLUTIONS = [(3, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]


def test_parameters_and_shapes_are_those_of_the_layers_described():
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def made(width):
        network = Network(40, width)
        return jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x, False), x)

    logits, variables = made(64)
    shared, heads = variables["params"]["shared"], variables["params"]["heads"]
    assert logits.shape == (2, 40)
    kernels = [shared[f"conv_{i}"]["kernel"].shape for i in range(7)]
    assert kernels == [(3, 3, *pair) for pair in CONVOLUTIONS]
    assert [shared[f"dense_{i}"]["kernel"].shape for i in range(2)] == [(512, 512)] * 2
    assert all(set(shared[name]) == {"kernel"} for name in shared if "norm" not in name)
    assert {name: x.shape for name, x in heads.items()} == {"kernel": (512, 40), "bias": (40,)}
    norms = sum(2 * out for _, out in CONVOLUTIONS) + 2 * 2 * 512
    weights = sum(9 * a * b for a, b in CONVOLUTIONS) + 2 * 512**2
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))
    assert total == weights + norms + 40 * 513 == 5_197_160
    # Running means and variances of every normalized channel.
    stats = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["batch_stats"]))
    assert stats == norms
    _, small = made(8)
    assert small["params"]["shared"]["conv_6"]["kernel"].shape == (3, 3, 64, 64)


def by_hand(params, stats, x):
    """The logits of images (b, h, w, 3) in NumPy, by running averages."""

    def norm(x, name):
        p, s = params["shared"][name]["norm"], stats["shared"][name]["norm"]
        return np.maximum((x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"], 0)

    for i, halved in enumerate([True, False, True, False, True, False, False]):
        kernel = params["shared"][f"conv_{i}"]["kernel"]
        b, h, w, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = np.zeros((b, h, w, kernel.shape[-1]))
        for row in range(h):
            for column in range(w):
                window = padded[:, row : row + 3, column : column + 3]
                out[:, row, column] = np.tensordot(window, kernel, 3)
        x = norm(out, f"conv_norm_{i}")
        if halved:
            x = x.reshape(b, h // 2, 2, w // 2, 2, -1).max(axis=(2, 4))
    x = x.mean(axis=(1, 2))
    for i in range(2):
        x = norm(x @ params["shared"][f"dense_{i}"]["kernel"], f"dense_norm_{i}")
    return x @ params["heads"]["kernel"] + params["heads"]["bias"]


@pytest.fixture(scope="module")
def state():
    """The smoke run's network, with running averages that are not those of the start."""
    params, stats = train.make_init(SMOKE, 3)(jax.random.key(0))
    rng = np.random.default_rng(0)

    def shifted(path, x):
        low, high = (0.02, 0.1) if path[-1].key == "var" else (-0.1, 0.1)
        return jnp.asarray(rng.uniform(low, high, x.shape), jnp.float32)

    stats = jax.tree.map_with_path(shifted, stats)
    return train.State(params, stats, None, None, jnp.zeros(3))


def test_f1_and_losses_of_a_split_are_those_of_the_network_in_numpy(state):
    """40 faces in batches of 16: the last one counts no face twice."""
    split = data.make_up(40, 16, 5)
    params, stats = (jax.tree.map(np.asarray, x) for x in (state.params, state.stats))
    logits = by_hand(params, stats, split.images / 255)
    bias = -np.median(logits, axis=0)  # so that half are predicted
    params["heads"]["bias"] = params["heads"]["bias"] + bias.astype(np.float32)
    logits = logits + bias
    columns = np.array([15, 25, 35])
    labels = split.labels[:, columns]
    f1, losses = train.evaluate(SMOKE, state._replace(params=params), split, columns)
    expected = [f1_score(labels[:, i], logits[:, i] > 0) for i in range(3)]
    assert min(expected) > 0
    np.testing.assert_allclose(f1, expected, rtol=1e-6)
    p = 1 / (1 + np.exp(-logits))
    entropies = -np.log(np.where(labels, p, 1 - p)).mean(axis=0)
    np.testing.assert_allclose(losses, entropies, rtol=1e-4)
    # Tasks in another order are the same columns elsewhere.
    order = np.array([2, 0, 1])
    moved = jax.tree.map(lambda x: x, params) | {
        "heads": {
            "kernel": params["heads"]["kernel"][:, order],
            "bias": params["heads"]["bias"][order],
        }
    }
    again, _ = train.evaluate(SMOKE, state._replace(params=moved), split, columns[order])
    np.testing.assert_allclose(again[np.argsort(order)], f1)


def test_f1_is_that_of_scikit_learn_and_0_without_a_hit():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 6)), rng.random((50, 6)) < 0.4
    labels[:, 1] = False  # none labelled
    logits[:, 2] = -1  # none predicted
    labels[:, 3], logits[:, 3] = False, -1  # neither
    labels[:, 4] = logits[:, 4] <= 0  # all wrong
    kept = np.arange(50) < 45
    counts = train.count(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(kept))
    expected = [f1_score(labels[kept, i], logits[kept, i] > 0, zero_division=0) for i in range(6)]
    np.testing.assert_allclose(train.f1_of(counts), expected, rtol=1e-12)
    assert expected[1:5] == [0, 0, 0, 0]
    assert min(expected[0], expected[5]) > 0.2


# --- gradients and rules --------------------------------------------------------------------------


FORTY = replace(SMOKE, num_tasks=40)


@pytest.fixture(scope="module")
def forty():
    """Forty losses of a small network in float64, and their rows, compiled once."""
    params, stats = train.make_init(FORTY, 40)(jax.random.key(0))
    batch = train.read(made_up_split().train, np.arange(16))
    rng = np.random.default_rng(0)

    def shifted(path, x):  # biases of 0 are a kink for a channel that BatchNorm makes 0
        noise = rng.uniform(0.1, 0.5, x.shape) if path[-1].key == "bias" else 0
        return jnp.asarray(x, jnp.float64) + noise

    with jax.enable_x64(True):
        params = jax.tree.map_with_path(shifted, params)
        losses, new, rows = train.make_rows(FORTY, 40)(params, stats, batch, np.arange(40))
    return params, stats, batch, losses, new, jax.tree.map(np.asarray, rows)


@pytest.mark.slow
def test_rows_are_the_gradients_of_the_cross_entropies(forty):
    params, stats, batch, losses, new, rows = forty
    # Heads are the columns of one matrix: a task's row is zero in all columns but its own.
    kernel = np.asarray(rows["heads"]["kernel"])
    for i in range(40):
        assert not np.delete(kernel[i], i, axis=1).any()
    # What BatchNorm adds up: a tenth of the batch's mean of the first convolution.
    x = np.pad(batch.images / 255, ((0, 0), (1, 1), (1, 1), (0, 0)))
    first = np.asarray(params["shared"]["conv_0"]["kernel"])
    mean = sum(
        x[:, i : i + 16, j : j + 16].mean(axis=(0, 1, 2)) @ first[i, j]
        for i in range(3)
        for j in range(3)
    )
    moved = new["shared"]["conv_norm_0"]["norm"]["mean"]
    np.testing.assert_allclose(moved, 0.1 * mean, rtol=1e-4, atol=1e-6)
    # The slopes of the losses along a direction, by differences.
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    with jax.enable_x64(True):

        def losses_at(h):
            moved = jax.tree.map(lambda x, d: x + h * d, params, direction)
            forward = train.make_passes(FORTY, 40).forward
            return np.asarray(forward(moved, stats, batch, np.arange(40))[0])

        ahead, behind = losses_at(1e-6), losses_at(-1e-6)
    assert ahead.dtype == np.float64
    slopes = flat(rows, (40,)) @ flat(direction)
    np.testing.assert_allclose(slopes, (ahead - behind) / 2e-6, atol=1e-5 * np.abs(slopes).max())
    np.testing.assert_allclose(losses, (ahead + behind) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    "name", sweep(n for n, entry in METHODS.items() if entry.route in ("losses", "rows"))
)
def test_every_method_takes_the_same_forty_rows(forty, name):
    *_, losses, _, rows = forty
    matrix = flat(rows["shared"], (40,)).astype(np.float32)
    losses = jnp.asarray(losses, jnp.float32)
    aggregator = METHODS[name].build(40, KNOWN)

    def update(rows, state, key):
        return aggregator.update(
            rows, state, rows[0], losses=losses, key=key, previous_batch_losses=losses + 0.1
        )

    step = train.compiled(SMOKE, update)
    state = aggregator.init(jnp.zeros(matrix.shape[1]))
    for key in (0, 1):  # the first of MoCo is zero, as its tracked gradients are
        moved, state = step(matrix, state, jax.random.key(key))
    moved = np.asarray(moved)
    assert np.isfinite(moved).all()
    assert moved.any()
    if name not in ("graddrop", "trimmed_mean"):  # these choose coordinate by coordinate
        span, *_ = np.linalg.lstsq(matrix.T.astype(np.float64), moved, rcond=1e-7)
        np.testing.assert_allclose(matrix.T @ span, moved, atol=2e-3 * abs(moved).max())
    if name in ("mgda", "nash_mtl", "imtl_g", "upgrad"):  # no loss rises
        along = matrix @ moved
        assert along.min() > -1e-2 * np.abs(along).max()
    if (weights := train.logged_weights(state)) is not None and name not in ("aligned_mtl", "moco"):
        expected = np.asarray(weights) @ matrix
        np.testing.assert_allclose(moved, expected, atol=1e-3 * abs(moved).max())


@pytest.mark.slow
def test_chunks_of_rows_are_the_same_rows(state):
    batch = train.read(made_up_split().train, np.arange(16))
    args = state.params, state.stats, batch, np.arange(3)
    one_by_one = train.make_rows(SMOKE, 3)(*args)
    chunks = train.make_rows(replace(SMOKE, chunk_size=2), 3)(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one_by_one, chunks
    )


def test_a_rule_moves_the_trunk_and_heads_their_own():
    params = {"shared": jnp.zeros(2), "heads": jnp.zeros(2)}
    rows = {
        "shared": jnp.array([[3.0, 0.0], [0.0, 4.0]]),
        "heads": jnp.diag(jnp.array([6.0, 10.0])),
    }
    rule = train.rule_on_rows(METHODS["mgda"].build(2, KNOWN), 2)
    update, _ = rule.update(rows, rule.init(params), params, losses=jnp.ones(2))
    # The point of least norm between (3, 0) and (0, 4): weights as 1/9 to 1/16.
    np.testing.assert_allclose(update["shared"], [1.92, 1.44], rtol=1e-5)
    np.testing.assert_allclose(update["heads"], [6, 10])


def test_imtl_weighs_heads_by_the_scales_of_their_losses():
    params = {"shared": jnp.zeros(2), "heads": jnp.zeros(2)}
    rows = {
        "shared": jnp.array([[3.0, 0.0], [0.0, 4.0]]),
        "heads": jnp.diag(jnp.array([6.0, 10.0])),
    }
    rule = train.rule_on_rows(METHODS["imtl"].build(2, KNOWN), 2)
    state = rule.init(params)
    for _ in range(2):
        scales = np.exp(np.asarray(state.inner_states["shared"].inner_state.inner.values))
        update, state = rule.update(rows, state, params, losses=jnp.array([5.0, 0.1]))
        np.testing.assert_allclose(update["heads"], scales * [6, 10], rtol=1e-6)
    assert np.ptp(scales) > 1e-3
    # Equal projections on the scaled rows, of lengths 3 and 4 times the scales.
    weights = np.array([1 / 3, 1 / 4]) / np.sum(1 / (scales * [3, 4]))
    np.testing.assert_allclose(update["shared"], weights * [3, 4], rtol=1e-5)


def test_every_rule_of_the_library_that_takes_one_batch_is_timed(tmp_path):
    two_batches = {"sdmgrad", "modo"}
    library = set(METHODS) | two_batches
    assert {name for name in LIBRARY if name not in library} == set()
    command = ["--timing", "--out", str(tmp_path), "--resume"]
    args = faces.study.parse(command)
    (part,) = faces.plan(args)
    path = tmp_path / "faces" / "time.jsonl"
    jobs = [job.label for job in part.jobs(Results(path))]
    assert jobs == ["jacobian", *METHODS]
    done = [{"method": m, "width": 64, "batch_size": 16} for m in ("jacobian", "mgda", "gls")]
    append_records(path, [*done, {"method": "pcgrad", "width": 8, "batch_size": 16}])
    left = [job.label for job in part.jobs(Results(path))]
    assert left == [job for job in jobs if job not in ("jacobian", "mgda", "gls")]


def test_ldc_has_the_numbers_of_its_code_for_celeba():
    rule = METHODS["ldc_mtl"].build(3, KNOWN)
    losses = np.array([0.7, 0.2, 0.5])
    weights, state = rule.weighting.update(
        None, rule.init(jnp.zeros(2)), losses=jnp.asarray(losses)
    )
    sigma = 1 / (1 + np.exp(-np.ones(3)))

    def expected(sigma):
        signs = np.sign(-np.diff(sigma * losses))
        return sigma / sigma.sum() + 0.01 * sigma * (np.append(signs, 0) - np.append(0, signs))

    np.testing.assert_allclose(weights, expected(sigma), rtol=1e-5)
    # W: the sum of sigma is a constant; Adam's first step is 0.001 against the sign.
    slope = losses / sigma.sum() + 0.01 * losses * (
        np.append(np.sign(-np.diff(losses)), 0) - np.append(0, np.sign(-np.diff(losses)))
    )
    w = 1 - 1e-3 * np.sign(slope)
    np.testing.assert_allclose(state.inner.router.values["logits"], w, rtol=1e-5)
    weights, _ = rule.weighting.update(None, state, losses=jnp.asarray(losses))
    np.testing.assert_allclose(weights, expected(1 / (1 + np.exp(-w))), rtol=1e-5)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(["upgrad", "ldc_mtl", "mgda_ub", "gradnorm"]))
def test_a_compiled_step_of_each_route(name):
    split = made_up_split()
    training = train.make_training(SMOKE, name, 3, 6)
    state = training.init(jax.random.key(0))
    before = jax.tree.map(np.array, (state.params, state.stats))
    losses = []
    for step in range(12):
        batch = train.read(split.train, np.arange(16))
        state, log = training.step(state, batch, np.arange(3), jax.random.key(step))
        losses.append(np.asarray(log["train_loss"]))
    after = (state.params, state.stats)
    moved = jax.tree.map(lambda x, y: bool((np.asarray(y) != x).any()), before, after)
    assert all(jax.tree.leaves(moved[0]["heads"]))
    assert np.mean(jax.tree.leaves(moved)) > 0.9
    assert np.isfinite(flat(after)).all()
    assert losses[-1].sum() < losses[0].sum()


def test_the_rate_is_that_of_steplr_or_a_constant():
    options = replace(SMOKE, epochs=8, decay_epochs=3)
    rate = train.rate_of(options, 5)
    found = [float(rate(5 * epoch + step)) for epoch in range(8) for step in (0, 4)]
    np.testing.assert_allclose(found, np.repeat([1e-3] * 3 + [3e-4] * 3 + [9e-5] * 2, 2), rtol=1e-5)
    options = faces.options_of(
        faces.study.parse(["--learning-rate", "3e-4", "--no-schedule", "--smoke"])
    )
    assert float(train.rate_of(options, 5)(1000)) == pytest.approx(3e-4)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path):
    split = made_up_split()

    def run(name, say):
        checkpoint = Checkpoint(tmp_path / name, SMOKE)
        return train.train(SMOKE, "upgrad", 0, split, checkpoint, say)

    def stop(message, steps=1):
        raise InterruptedError

    whole = run("whole.npz", lambda *_: None)
    with pytest.raises(InterruptedError):
        run("cut.npz", stop)
    said = []
    assert run("cut.npz", lambda message, steps=1: said.append(message)) == whole
    assert [("resumed after 1 epochs" in message) for message in said] == [True, False]
    for name in ("whole.npz", "cut.npz"):
        assert (tmp_path / name).exists()
    with np.load(tmp_path / "whole.npz") as a, np.load(tmp_path / "cut.npz") as b:
        for leaf in a.files:
            np.testing.assert_array_equal(a[leaf], b[leaf])
    other = replace(SMOKE, epochs=5)
    checkpoint = Checkpoint(tmp_path / "cut.npz", other)
    with pytest.raises(SystemExit, match="drop --resume"):
        train.train(other, "upgrad", 0, split, checkpoint, lambda *_: None)
    assert len(whole["test_f1"]) == len(whole["test_loss"]) == 3
    means = [np.mean(values) for values in whole["history"]["validation_f1"]]
    assert whole["best_epoch"] == 1 + int(np.argmax(means))
    assert -1 <= whole["cosines"][1] <= whole["cosines"][0] <= 1


def test_another_order_is_a_permutation_and_results_are_put_back():
    first, second = (train.columns_of(train.Options(order=seed), None) for seed in (0, 1))
    for columns in (first, second):
        np.testing.assert_array_equal(np.sort(columns), np.arange(40))
    assert (first != second).any()
    np.testing.assert_array_equal(train.columns_of(train.Options(), None), np.arange(40))
    np.testing.assert_array_equal(train.columns_of(train.Options(order=0), 7), [7])


def test_batches_hold_a_face_once_in_an_epoch():
    options = train.Options(batch_size=4)
    order = train.batches(18, options, np.random.default_rng(0))
    assert order.shape == (4, 4)
    assert len(np.unique(order)) == 16
    assert (np.diff(order, axis=1) > 0).all()
    with pytest.raises(SystemExit, match="at least 4 faces for a batch, got 3"):
        train.batches(3, options, np.random.default_rng(0))


def test_the_study_runs_resumes_and_reports(tmp_path, capsys):
    start = ["--smoke", "--out", str(tmp_path)]
    faces.study.main([*start, "--methods", "single_task", "ldc_mtl", "upgrad"])
    text = capsys.readouterr().out
    path = tmp_path / "faces" / "made_up.jsonl"
    records = read_records(path)
    assert [(r["method"], r["task"]) for r in records] == [
        *(("single_task", i) for i in range(3)),
        ("ldc_mtl", None),
        ("upgrad", None),
    ]
    assert all(np.shape(r["history"]["test_f1"]) == (2, 1 if r["task"] is not None else 3)
               for r in records)  # fmt: skip
    assert "Made-up faces: of 2 methods" in text
    assert (tmp_path / "faces" / "made_up.png").stat().st_size > 10_000
    assert not list((tmp_path / "faces").glob("checkpoints/*"))  # all are recorded
    lines = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in lines[:-1]))
    faces.study.main([*start, "--methods", "single_task", "upgrad", "--resume"])
    assert read_records(path)[-1]["history"] == records[-1]["history"]  # a seed decides all
    with pytest.raises(SystemExit, match="expected results in"):
        faces.study.main(["--report-only", "--out", str(tmp_path)])  # none on CelebA


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "celeba"),
        (["--penalty", "0.005"], "celeba_lambda_0.005"),
        (["--order", "2"], "celeba_order_2"),
        (["--learning-rate", "3e-4", "--no-schedule"], "celeba_rate_0.0003_constant"),
    ],
)
def test_each_recipe_has_a_file_of_its_own(arguments, name):
    assert faces.part_name(faces.options_of(faces.study.parse(arguments))) == name


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_the_network(name):
    options = replace(SMOKE, num_tasks=40, learning_rate=1e-2)
    split = made_up_split()
    training = train.make_training(options, name, 40, 6)
    state = training.init(jax.random.key(0))
    losses = []
    for step in range(20):
        batch = train.read(split.train, np.arange(16))
        state, log = training.step(state, batch, np.arange(40), jax.random.key(step))
        losses.append(np.asarray(log["train_loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


# --- the publishers' files ------------------------------------------------------------------------

PARTS = [0, 2, 0, 1, 0, 2, 1]  # images of a partition need not lie together
NAMES = [f"{i + 1:06d}.jpg" for i in range(len(PARTS))]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def labels_of():
    return np.random.default_rng(1).random((len(NAMES), 40)) < 0.3


def write_tree(root, order=None):
    """Writes CelebA's tree: random photographs, which JPEG blurs."""
    for folder in ("Anno", "Eval", "Img/img_align_celeba"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        pixels = rng.integers(0, 256, (7, 6, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((178, 218), Image.Resampling.BICUBIC)
        picture.save(root / "Img/img_align_celeba" / name, quality=95)
    order = np.arange(40) if order is None else order
    lines = [str(len(NAMES)), " ".join(np.array(data.ATTRIBUTES)[order]) + " "]
    for name, labels in zip(NAMES, labels_of(), strict=True):
        cells = [" 1" if label else "-1" for label in labels[order]]
        lines.append(f"{name} {' '.join(cells)}")
    (root / data.LABELS).write_text("\n".join(lines) + "\n")
    parts = [f"{name} {part}" for name, part in zip(NAMES, PARTS, strict=True)]
    (root / data.PARTITION).write_text("\n".join(parts) + "\n")


def pixels_of(root, name):
    picture = Image.open(root / "Img/img_align_celeba" / name)
    return np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR))


def test_the_tree_is_read_once_and_then_mapped(tmp_path, monkeypatch):
    order = np.random.default_rng(2).permutation(40)  # the names of the header count
    write_tree(tmp_path, order)
    split = data.load_celeba(tmp_path)
    for part, found in zip((0, 1, 2), split, strict=True):
        chosen = [i for i, p in enumerate(PARTS) if p == part]
        np.testing.assert_array_equal(found.labels, labels_of()[chosen])
        expected = np.stack([pixels_of(tmp_path, NAMES[i]) for i in chosen])
        np.testing.assert_array_equal(found.images, expected)
        assert found.images.dtype == np.uint8
    assert np.ptp(split.train.images) > 100

    def refuse(*args):
        raise AssertionError("decoded twice")

    monkeypatch.setattr(data, "decode", refuse)
    again = data.load_celeba(tmp_path)
    np.testing.assert_array_equal(again.test.images, split.test.images)
    files = list((images.cache_dir()).iterdir())
    assert len(files) == 1  # nothing half done is left
    batch = train.read(split.train, np.array([0, 2]))
    assert batch.images.shape == (2, 64, 64, 3)


def test_parts_that_lie_together_stay_in_the_file(tmp_path):
    write_tree(tmp_path)
    parts = [f"{name} {part}" for name, part in zip(NAMES, sorted(PARTS), strict=True)]
    (tmp_path / data.PARTITION).write_text("\n".join(parts))
    for found in data.load_celeba(tmp_path):
        assert isinstance(found.images, np.memmap)


def rewrite(path, change):
    def spoil(root):
        text = (root / path).read_text().splitlines()
        (root / path).write_text("\n".join(change(text)) + "\n")

    return spoil


def replaced(line, old, new):
    return lambda text: [x.replace(old, new, 1) if i == line else x for i, x in enumerate(text)]


def picture(name, make):
    def spoil(root):
        make(root / "Img/img_align_celeba" / name)

    return spoil


def small(path):
    Image.new("RGB", (178, 200)).save(path)


def gray(path):
    Image.new("L", (178, 218)).save(path)


def png(path):
    Image.new("RGB", (178, 218)).save(path, format="PNG")


def zipped(root):
    (root / "Img/img_align_celeba").rename(root / "Img/other")
    (root / "Img/img_align_celeba").write_bytes(b"a zip that is not unpacked")


def cut(path):
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda root: (root / data.LABELS).unlink(), FileNotFoundError,
         r"expected .*list_attr_celeba.txt, got no such file"),
        (lambda root: (root / data.PARTITION).unlink(), FileNotFoundError,
         r"expected .*list_eval_partition.txt, got no such file"),
        (lambda root: (root / "Img/img_align_celeba").rename(root / "Img/other"),
         FileNotFoundError, r"expected .*img_align_celeba, got no such folder"),
        (zipped, FileNotFoundError, r"expected .*img_align_celeba, got no such folder"),
        (lambda root: (root / "Img/img_align_celeba" / NAMES[2]).unlink(), FileNotFoundError,
         r"expected .*000003.jpg, which .* lists, got no such file; unpack"),
        (rewrite(data.LABELS, replaced(1, "Young", "")), ValueError,
         r"expected the 40 attributes .* got 39 \(Young only"),
        (rewrite(data.LABELS, replaced(1, "Young", "Old")), ValueError, r"got 40 \(Old, Young"),
        (rewrite(data.LABELS, lambda text: []), ValueError, "expected the 40 attributes"),
        (rewrite(data.LABELS, lambda text: text[:-1]), ValueError, "says, 7, got 6; the file is"),
        (rewrite(data.LABELS, replaced(3, "-1", "")), ValueError,
         "expected a name and 40 labels in line 4 of .* got 40 words"),
        (rewrite(data.LABELS, replaced(4, "-1", "0")), ValueError,
         "expected labels -1 and 1 in line 5 of .* got 0; where 0"),
        (rewrite(data.LABELS, replaced(2, NAMES[0], NAMES[1])), ValueError,
         "expected every image once"),
        (rewrite(data.PARTITION, replaced(2, "jpg 0", "jpg 3")), ValueError,
         "1 .validation. or 2 .test. in line 3 of .* got '000003.jpg 3'"),
        (rewrite(data.PARTITION, lambda text: text[1:]), ValueError,
         r"expected the same images .* got 000001.jpg in only one"),
        (rewrite(data.PARTITION, lambda text: [x.replace(" 1", " 0") for x in text]), ValueError,
         r"expected images of partition 1 \(validation\)"),
        (picture(NAMES[1], small), ValueError, "expected 178 x 218 pixels in .* got 178 x 200"),
        (picture(NAMES[1], gray), ValueError, "expected a JPEG in color .* got JPEG of mode L"),
        (picture(NAMES[1], png), ValueError, "expected a JPEG in color .* got PNG"),
        (picture(NAMES[1], cut), ValueError, "a picture in .*000002.jpg, got one that Pillow"),
        (lambda root: (root / data.LABELS).write_bytes(b"\xff\xfe\x81"), ValueError,
         "expected text in"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said(tmp_path, spoil, error, words):
    write_tree(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=words):
        data.load_celeba(tmp_path)
    cached = images.cache_dir()
    assert not cached.exists() or not list(cached.iterdir())


def test_celeba_from_tfds(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `data` is not installed")
    asked, rng = [], np.random.default_rng(0)
    pictures = rng.integers(0, 256, (len(NAMES), 218, 178, 3), np.uint8)

    class Source:
        def __init__(self, part):
            self.rows = [i for i, p in enumerate(PARTS) if p == part]

        def __len__(self):
            return len(self.rows)

        def __getitems__(self, keys):
            return [
                {
                    "image": pictures[self.rows[key]],
                    "attributes": dict(
                        zip(data.ATTRIBUTES, labels_of()[self.rows[key]], strict=True)
                    ),
                }
                for key in keys
            ]

    def data_source(name, split, data_dir):
        asked.append((name, split, data_dir))
        return Source(["train", "validation", "test"].index(split))

    monkeypatch.setattr(tfds, "data_source", data_source)
    (tmp_path / "celeb_a").mkdir()
    for _ in range(2):  # decoded, then mapped
        split = data.load_celeba(tmp_path)
        for part, found in zip((0, 1, 2), split, strict=True):
            chosen = [i for i, p in enumerate(PARTS) if p == part]
            np.testing.assert_array_equal(found.labels, labels_of()[chosen])
            size = (64, 64), Image.Resampling.BILINEAR
            expected = [np.asarray(Image.fromarray(pictures[i]).resize(*size)) for i in chosen]
            np.testing.assert_array_equal(found.images, np.stack(expected))
        monkeypatch.setattr(data, "resize", None)
    assert asked[:3] == [("celeb_a", p, tmp_path) for p in ("train", "validation", "test")]


# --- times ----------------------------------------------------------------------------------------


def time_record(method, part, route, ratio, flops, nbytes, **more):
    return {
        "method": method, "part": part, "route": route, "width": 64, "batch_size": 16,
        "clock": "CPU", "base_seconds": 2.0, "ratio": ratio, "flops": flops, "bytes": nbytes,
        "base_flops": 100.0,
    } | more  # fmt: skip


def write_times(folder):
    append_records(
        folder / "time.jsonl",
        [
            time_record("linear_scalarization", "network", "losses", 1.0, 100.0, 5_000_000),
            time_record("ldc_mtl", "network", "losses", 1.05, 101.0, 5_000_000),
            time_record("famo", "network", "losses", 1.3, 133.0, 5_000_000),
            time_record("jacobian", "network", "rows", 27.0, 2700.0, 9_000_000),
            time_record("nash_mtl", "rule", "rows", 3.0, 50.0, 8_000_000),
            time_record("mgda", "rule", "rows", 1.5, 20.0, None),
        ],
    )


def test_a_step_by_rows_is_the_jacobian_and_the_rule(tmp_path):
    assert report.claims(tmp_path) == []
    write_times(tmp_path)
    (times,) = report.read_times(tmp_path)
    nash = times.steps["nash_mtl"]
    assert (nash.time, nash.of_rule, nash.operations, nash.megabytes) == (30.0, 3.0, 27.5, 9.0)
    assert times.steps["mgda"].megabytes is None
    assert times.steps["famo"].time == 1.3
    table = report.time_table(times)
    assert [row[0] for row in table.rows] == [
        "linear_scalarization", "ldc_mtl", "famo", "mgda", "nash_mtl",
    ]  # fmt: skip
    assert table.rows[-1] == ["nash_mtl", "rows", "30.00", "3.00", "27.50", "9"]
    by_words = {claim.claim.split(" (")[0]: claim for claim in report.claims(tmp_path)}
    assert by_words["LDC-MTL's overhead over equal weights is negligible"].verdict == "reproduced"
    assert by_words["Nash-MTL takes about 12 times as long as LDC-MTL"].ours == (
        "28.6 times, by operations 27.2"
    )
    assert by_words["Nash-MTL takes about 12 times as long as LDC-MTL"].verdict == "not"
    without = [claim for claim in report.claims(tmp_path) if claim.verdict == NO_DATA]
    assert {claim.source for claim in without} == {
        f"Xiao 2025, {name}" for name in ("table 2", "table 3", "table 4", "table 10", "figure 7")
    }
    assert all("python -m experiments.faces --" in claim.ours for claim in without)
    assert "28.50 to 30.00 by rows" in report.conclude_times(times)


def test_without_the_jacobian_methods_by_rows_have_no_time(tmp_path):
    append_records(
        tmp_path / "time.jsonl",
        [
            time_record("ldc_mtl", "network", "losses", 1.0, 100.0, 1),
            time_record("mgda", "rule", "rows", 1.5, 20.0, 1),
        ],
    )
    assert list(report.read_times(tmp_path)[0].steps) == ["ldc_mtl"]


@pytest.mark.slow
def test_operations_of_a_step_are_those_of_its_passes():
    """A gradient is a pass forward and two backward; a Jacobian of 40 tasks 1 and 80."""
    options = train.Options(width=4, batch_size=2)
    (base,) = timing.measure(options, "linear_scalarization", 1, lambda *_: None)
    (jacobian,) = timing.measure(options, "jacobian", 1, lambda *_: None)
    assert base["ratio"] == 1
    assert base["flops"] == base["base_flops"] == jacobian["base_flops"]
    # Somewhat fewer than 27: the first convolution's images get no derivative.
    assert 25 < jacobian["flops"] / base["flops"] < 28
    rows = timing.jacobian_program(options).rows[0]
    assert rows["shared"]["conv_0"]["kernel"].shape == (40, 3, 3, 3, 4)
    (rule,) = timing.measure(options, "mgda", 1, lambda *_: None)
    assert rule["part"] == "rule"
    number = flat(rows["shared"], (40,)).shape[1]
    assert rule["flops"] > 2 * number * 40 * (40 + 1) / 2  # at least half of a Gramian and J^T w


@pytest.mark.slow
def test_the_times_are_recorded_method_by_method(tmp_path, capsys):
    command = ["--timing", "--out", str(tmp_path), "--width", "4", "--batch-size", "2"]
    methods = ["linear_scalarization", "ldc_mtl", "famo", "aligned_mtl_ub", "nash_mtl"]
    faces.study.main([*command, "--repeats", "2", "--methods", *methods])
    path = tmp_path / "faces" / "time.jsonl"
    records = {r["method"]: r for r in read_records(path)}
    assert list(records) == ["jacobian", *methods]

    def operations(name):
        return records[name]["flops"] / records[name]["base_flops"]

    assert operations("ldc_mtl") < 1.01
    assert 1.2 < operations("famo") < 1.5  # a pass forward more
    assert operations("aligned_mtl_ub") < 1.5
    assert (tmp_path / "faces" / "time.png").stat().st_size > 10_000
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    faces.study.main([*command, "--repeats", "1", "--methods", *methods, "--resume"])
    again = read_records(path)
    assert [r["repeats"] for r in again[:-1]] == [r["repeats"] for r in records.values()][:-1]
    assert len(again) == len(records)


# --- what is published, and verdicts --------------------------------------------------------------


def test_published_numbers_are_whole():
    assert len(published.STL) == len(data.ATTRIBUTES) == len(set(data.ATTRIBUTES)) == 40
    assert set(PAPER) == set(published.DELTA_M) - {"single_task"}
    assert set(PAPER) <= METHODS.keys()
    assert min(published.DELTA_M, key=published.DELTA_M.get) == "ldc_mtl"
    assert published.PENALTIES[0.01] == published.DELTA_M["ldc_mtl"]
    assert report.drop(np.array(published.STL), np.array(published.STL)) == 0
    # One attribute of 40 half as good: 50 % / 40.
    halved = np.array(published.STL)
    halved[7] /= 2
    assert report.drop(halved, np.array(published.STL)) == pytest.approx(1.25)
    assert report.drop(np.array([0.5, 0.1]), np.array([1.0, 0.0])) == pytest.approx(50)


def face_record(method, seed, f1, loss, cosine, task=None):
    m = 40 if task is None else 1
    return {
        "method": method, "seed": seed, "task": task,
        "config": {"made_up": None, "num_tasks": 40, "epochs": 1}
        | {"width": 64, "batch_size": 256, "learning_rate": 1e-3},
        "test_f1": [f1] * m, "test_loss": [loss] * (m // 2) + [2 * loss] * (m - m // 2),
        "cosines": [cosine, cosine],
    }  # fmt: skip


def test_verdicts_on_faces_are_worked_out_by_hand(tmp_path):
    records = [face_record("single_task", 0, 0.5, 0.3, 0, task) for task in range(40)]
    for seed, shift in enumerate((0.0, 0.001)):
        records += [
            face_record("linear_scalarization", seed, 0.48 + shift, 0.3, 0.1),
            face_record("ldc_mtl", seed, 0.51 + shift, 0.2, 0.4),
            face_record("fairgrad", seed, 0.50 + shift, 0.25, 0.2),
        ]
    append_records(tmp_path / "celeba.jsonl", records)
    found = report.read_found(tmp_path, "celeba")
    np.testing.assert_allclose(
        found.drops("linear_scalarization", found.single), [4, 3.8], rtol=1e-5
    )
    made = report.claims(tmp_path)
    assert [(claim.source, claim.verdict) for claim in made] == [
        (published.TABLE2, "reproduced"),
        (published.TABLE2, "reproduced"),
        (published.TABLE3, "reproduced"),
        (published.FIGURE7, "reproduced"),
        (published.TABLE4, NO_DATA),
        (published.TABLE10, NO_DATA),
    ]
    assert made[0].differs.startswith("epochs 1 in place of 15, seeds 2 in place of 3; the last")
    assert "rank 1 of 3" in made[0].ours
    assert "mean 0.300 against 0.450, standard deviation 0.100 against 0.150" in made[2].ours
    for name, f1 in (("order_0", 0.51), ("order_1", 0.509), ("order_2", 0.50)):
        append_records(tmp_path / f"celeba_{name}.jsonl", [face_record("ldc_mtl", 0, f1, 0.2, 0.4)])
    last = report.claims(tmp_path)[-1]
    assert last.verdict == "partly"  # the third lies 2.1 points off
    assert last.ours == "0 -2.00, 1 -1.80, 2 +0.00 against -2.10"
    shown = report.report(tmp_path, "celeba")
    assert [table.title.split(":")[0] for table in shown.tables[:2]] == ["celeba", "celeba"]
    assert shown.tables[0].rows[1][:4] == [
        "ldc_mtl", "2", "0.5105 ± 0.0005", "-2.10 ± 0.10",
    ]  # fmt: skip
    figure = tmp_path / "celeba.png"
    shown.figures["celeba.png"](figure)
    assert figure.stat().st_size > 10_000
    assert "2 are better than single tasks" in shown.conclusion  # fairgrad by 0.1 %
    assert "ldc_mtl has the best mean F1" in shown.conclusion


def test_records_are_json():
    assert train.rounded(np.array([0.123456, np.nan])) == [0.12346, None]
    assert json.dumps(train.rounded(np.array([np.inf]))) == "[null]"


def test_delta_m_is_the_mean_relative_drop():
    rng = np.random.default_rng(0)
    f1, base = rng.uniform(0.3, 0.9, 40), rng.uniform(0.3, 0.9, 40)
    assert report.drop(f1, base) == pytest.approx(100 * np.mean((base - f1) / base), rel=1e-5)
