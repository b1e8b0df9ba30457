"""The study of scenes: networks, loaders, losses and metrics, training, report."""

import io
import json
import shutil
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

from PIL import Image  # noqa: E402

import jaxmtl  # noqa: E402
from experiments import resnet, weights  # noqa: E402
from experiments.checkpoints import Checkpoint  # noqa: E402
from experiments.claims import NO_DATA, VERDICTS  # noqa: E402
from experiments.scenes import __main__ as main  # noqa: E402
from experiments.scenes import convert, data, networks, published, report  # noqa: E402
from experiments.scenes.benchmarks import BENCHMARKS, LOSSES, count, measure  # noqa: E402
from experiments.scenes.methods import METHODS, Known  # noqa: E402
from experiments.scenes.published import TABLES  # noqa: E402
from experiments.scenes.train import (  # noqa: E402
    Model,
    Options,
    State,
    balanced,
    evaluate,
    figures_of,
    make_init,
    make_training,
    network_of,
    rate_of,
)
from experiments.study import append_records, config_of, read_records  # noqa: E402
from tests.problems import some  # noqa: E402

# --- losses and metrics ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    """Predictions and targets of all tasks, (3, 5, 4) pixels, with undefined ones."""
    rng = np.random.default_rng(0)
    shape = (3, 5, 4)
    logits = rng.normal(size=(*shape, 6))
    normals = rng.normal(size=(*shape, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[rng.random(shape) < 0.3] = 0
    directions = rng.normal(size=(*shape, 3))
    labels = rng.integers(-1, 6, shape)
    labels[0, 0] = 250
    offsets = rng.normal(0, 3, (*shape, 2))
    offsets[rng.random(offsets.shape) < 0.4] = 250
    targets = {
        "semantic": labels,
        "depth": rng.uniform(0.5, 4, (*shape, 1)) * (rng.random((*shape, 1)) < 0.7),
        "normal": normals,
        "instance": offsets,
        "disparity": rng.uniform(0, 0.1, (*shape, 1)) * (rng.random((*shape, 1)) < 0.7),
    }
    predictions = {
        "semantic": logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)),
        "depth": rng.normal(2, 1, (*shape, 1)),
        "normal": directions / np.linalg.norm(directions, axis=-1, keepdims=True),
        "instance": rng.normal(0, 3, (*shape, 2)),
        "disparity": rng.normal(0.05, 0.02, (*shape, 1)),
    }
    return predictions, targets


def loop_losses(predictions, targets):
    """The losses in float64, pixel by pixel."""
    found = {name: [] for name in targets}
    for i in np.ndindex(targets["semantic"].shape):
        label = targets["semantic"][i]
        if 0 <= label < 6:
            found["semantic"].append(-predictions["semantic"][i][label])
        if targets["normal"][i].any():
            found["normal"].append(1 - predictions["normal"][i] @ targets["normal"][i])
        for name, defined in (
            ("depth", lambda t: t != 0),
            ("disparity", lambda t: t > 0),
            ("instance", lambda t: t != 250),
        ):
            for p, t in zip(predictions[name][i], targets[name][i], strict=True):
                if defined(t):
                    found[name].append(abs(p - t))
    return {name: np.mean(values) for name, values in found.items()}


def test_losses_are_means_over_defined_pixels(scene):
    predictions, targets = scene
    expected = loop_losses(predictions, targets)
    for name, loss in LOSSES.items():
        p = jnp.asarray(predictions[name], jnp.float32)
        t = jnp.asarray(targets[name], jnp.int32 if name == "semantic" else jnp.float32)
        np.testing.assert_allclose(loss(p, t), expected[name], rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "channels", "void"),
    [("semantic", 6, -1), ("depth", 1, 0), ("normal", 3, 0), ("instance", 2, 250)],
)
def test_a_batch_without_defined_pixels_has_no_gradient(name, channels, void):
    p = jnp.ones((1, 2, 2, channels))
    t = jnp.full((1, 2, 2) if name == "semantic" else p.shape, void)
    value, slope = jax.value_and_grad(lambda p: LOSSES[name](p, t))(p)
    assert value == (1 if name == "normal" else 0)
    np.testing.assert_array_equal(slope, jnp.zeros_like(p))


def test_metrics_are_those_of_all_pixels_of_the_split(scene):
    predictions, targets = scene
    kept = np.array([True, True, True]), np.array([True, False, False])  # the last two fill up
    parts = []
    for keep in kept:
        p = {k: jnp.asarray(v, jnp.float32) for k, v in predictions.items()}
        t = {
            k: jnp.asarray(v, jnp.int32 if k == "semantic" else jnp.float32)
            for k, v in targets.items()
        }
        parts.append(jax.jit(count)(p, t, jnp.asarray(keep)))
    found = measure(parts)
    p = {k: np.concatenate([v, v[:1]]) for k, v in predictions.items()}
    t = {k: np.concatenate([v, v[:1]]) for k, v in targets.items()}
    confusion = np.zeros((6, 6))
    for label, guess in zip(t["semantic"].ravel(), p["semantic"].argmax(-1).ravel(), strict=True):
        if 0 <= label < 6:
            confusion[label, guess] += 1
    ious = [
        confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum() - confusion[c, c])
        for c in range(6)
    ]
    defined = t["depth"] != 0
    errors = np.abs(p["depth"] - t["depth"])[defined]
    angles = [
        np.degrees(np.arccos(np.clip(a @ b, -1, 1)))
        for a, b in zip(p["normal"].reshape(-1, 3), t["normal"].reshape(-1, 3), strict=True)
        if b.any()
    ]
    seen = t["instance"] != 250
    offsets = np.abs(np.trunc(p["instance"]) - np.trunc(t["instance"]))[seen]
    there = t["disparity"] != 0
    expected = {
        "semantic": {
            "mIoU": 100 * np.mean(ious),
            "pixel accuracy": 100 * np.trace(confusion) / confusion.sum(),
        },
        "depth": {
            "abs error": errors.mean(),
            "rel error": (errors / t["depth"][defined]).mean(),
        },
        "normal": {
            "mean angle": np.mean(angles),
            "median angle": np.median(angles),
            **{f"within {a}": 100 * np.mean(np.array(angles) < a) for a in (11.25, 22.5, 30)},
        },
        "instance": {"L1 error": offsets.mean()},
        "disparity": {"squared error": ((p["disparity"] - t["disparity"]) ** 2)[there].mean()},
    }
    assert found.keys() == expected.keys()
    for task, values in expected.items():
        assert found[task].keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_allclose(found[task][name], value, rtol=1e-4, err_msg=name)


def test_a_class_that_nowhere_occurs_is_left_out_of_the_mean():
    labels = jnp.array([[[0, 1]]])
    certain = jax.nn.log_softmax(50 * jax.nn.one_hot(labels, 4))
    parts = [count({"semantic": certain}, {"semantic": labels}, jnp.array([True]))]
    assert measure(parts) == {"semantic": {"mIoU": 100.0, "pixel accuracy": 100.0}}


# --- augmentation ---------------------------------------------------------------------------------


def test_augmentation_is_a_crop_scaled_back_and_mirrored():
    """Each scene must be one of the crops, scales and mirrorings, worked out pixel by pixel."""
    rng = np.random.default_rng(0)
    height, width, number = 6, 9, 24
    raw = {
        "image": rng.integers(0, 256, (number, height, width, 3)).astype(np.uint8),
        "semantic": rng.integers(-1, 5, (number, height, width)).astype(np.int8),
        "depth": rng.uniform(1, 3, (number, height, width, 1)).astype(np.float32),
        "normal": rng.normal(size=(number, height, width, 3)).astype(np.float16),
    }
    made = jax.jit(data.prepare)(raw, jax.random.key(3))
    seen = set()
    for i in range(number):
        ratio = float(made["depth"][i].max())
        matches = []
        for scale in (1.0, 1.2, 1.5):
            h, w = int(height / scale), int(width / scale)
            for top in range(height - h + 1):
                for left in range(width - w + 1):
                    for mirrored in (False, True):
                        expected = crop_by_hand(raw, i, (top, left, h, w), scale, mirrored)
                        if np.allclose(expected["depth"], made["depth"][i], rtol=1e-5):
                            matches.append((scale, top, left, mirrored, expected))
        assert len(matches) == 1, ratio
        scale, top, left, mirrored, expected = matches[0]
        seen.add((scale, mirrored))
        np.testing.assert_array_equal(made["semantic"][i], expected["semantic"])
        np.testing.assert_allclose(made["image"][i], expected["image"], atol=1e-5)
        np.testing.assert_allclose(made["normal"][i], expected["normal"], atol=1e-5)
    assert len(seen) == 6


def crop_by_hand(raw, i, window, scale, mirrored):
    top, left, h, w = window
    height, width = raw["semantic"].shape[1:]
    made = {k: np.zeros(v[i].shape, np.float64) for k, v in raw.items()}
    for y in range(height):
        for x in range(width):
            at = (top + int(np.floor(y * h / height)), left + int(np.floor(x * w / width)))
            made["semantic"][y, x] = raw["semantic"][i][at]
            made["depth"][y, x] = raw["depth"][i][at] / scale
            v, u = top + y * (h - 1) / (height - 1), left + x * (w - 1) / (width - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            a, b = v - y0, u - x0
            for name, unit in (("image", 255), ("normal", 1)):
                s = raw[name][i].astype(np.float64) / unit
                made[name][y, x] = (1 - a) * ((1 - b) * s[y0, x0] + b * s[y0, x1]) + a * (
                    (1 - b) * s[y1, x0] + b * s[y1, x1]
                )
    if mirrored:
        made = {k: v[:, ::-1] for k, v in made.items()}
        made["normal"] = made["normal"] * [-1, 1, 1]
    return made


# --- networks -------------------------------------------------------------------------------------

NYU = BENCHMARKS["nyuv2"].outputs


def test_pooling_and_unpooling_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, 4, 6, 3)).astype(np.float32)  # with ties, as after a ReLU
    pooled, places = networks.max_pool(jnp.asarray(x))
    y = rng.normal(size=pooled.shape).astype(np.float32)
    largest, spread, slope = np.zeros_like(y), np.zeros_like(x), np.zeros_like(x)
    for b, i, j, c in np.ndindex(*y.shape):
        window = x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        largest[b, i, j, c] = window.max()
        k = int(window.ravel().argmax())  # the first among equals, as PyTorch
        spread[b, 2 * i + k // 2, 2 * j + k % 2, c] = y[b, i, j, c]
    np.testing.assert_array_equal(pooled, largest)
    np.testing.assert_array_equal(networks.max_unpool(jnp.asarray(y), places), spread)
    # The slope goes where the maximum was, once.
    slope = jax.grad(lambda x: jnp.vdot(networks.max_pool(x)[0], y))(jnp.asarray(x))
    np.testing.assert_array_equal(slope, spread)


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_resizing_is_that_of_a_loop(align_corners):
    x = np.random.default_rng(0).normal(size=5)
    for out in (3, 5, 10):
        expected = []
        for i in range(out):
            place = i * 4 / (out - 1) if align_corners else (i + 0.5) * 5 / out - 0.5
            place = min(max(place, 0), 4)
            low = int(place)
            expected.append((1 - place + low) * x[low] + (place - low) * x[min(low + 1, 4)])
        matrix = networks.bilinear_matrix(5, out, align_corners=align_corners)
        np.testing.assert_allclose(matrix @ x, expected, rtol=1e-5, atol=1e-6)


def conv_norm(a, b, size=3):
    """Parameters of a convolution with bias and of its BatchNorm."""
    return size * size * a * b + b + 2 * b


def segnet_count(f, outputs):
    """Parameters of the encoder and decoder, of the heads, layer by layer."""
    layers = [(3, f[0]), (f[0], f[0]), (f[0], f[1]), (f[1], f[1])]
    for a, b in ((1, 2), (2, 3), (3, 4)):
        layers += [(f[a], f[b]), (f[b], f[b]), (f[b], f[b])]
    for a, b in ((4, 3), (3, 2), (2, 1)):
        layers += [(f[a], f[b]), (f[b], f[b]), (f[b], f[b])]
    layers += [(f[1], f[0]), (f[0], f[0]), (f[0], f[0]), (f[0], f[0])]
    heads = sum(9 * f[0] ** 2 + f[0] + f[0] * k + k for k in outputs)
    return sum(conv_norm(a, b) for a, b in layers), heads


def mtan_count(f, outputs):
    def mask(a, b):
        return conv_norm(a, b, 1) + conv_norm(b, b, 1)

    towers = mask(f[0], f[0]) + sum(mask(2 * f[j], f[j]) for j in range(1, 5))
    for before, after in ((4, 3), (3, 2), (2, 1), (1, 0), (0, 0)):
        towers += mask(f[before] + f[after], f[after])
    down = [(f[0], f[1]), (f[1], f[2]), (f[2], f[3]), (f[3], f[4]), (f[4], f[4])]
    up = [(f[4], f[3]), (f[3], f[2]), (f[2], f[1]), (f[1], f[0]), (f[0], f[0])]
    shared = sum(conv_norm(a, b) for a, b in down + up)
    return sum(segnet_count(f, outputs)) + len(outputs) * towers + shared


def shapes_of(network, size=(32, 64)):
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: network.init_with_output(jax.random.key(0), x, False), x)


def number(params):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("width", some([8, 64]))
def test_parameters_are_those_of_the_layers_described(width):
    f = [width * k for k in (1, 2, 4, 8, 8)]
    outputs = [13, 1, 3]
    predictions, variables = shapes_of(networks.MTAN(NYU, width=width))
    assert number(variables["params"]) == mtan_count(f, outputs)
    assert {k: v.shape for k, v in predictions.items()} == {
        "semantic": (2, 32, 64, 13),
        "depth": (2, 32, 64, 1),
        "normal": (2, 32, 64, 3),
    }
    _, variables = shapes_of(networks.SegNet(NYU, width=width))
    assert number(variables["params"]) == sum(segnet_count(f, outputs))
    _, variables = shapes_of(networks.CrossStitch(NYU, width=width))
    body = segnet_count(f, [])[0]
    heads = segnet_count(f, outputs)[1]
    assert number(variables["params"]) == 3 * body + heads + 9 * 9
    _, variables = shapes_of(networks.MTAN(NYU[:1], width=width))
    assert number(variables["params"]) == mtan_count(f, outputs[:1])


def test_attention_sees_the_channels_described():
    _, variables = shapes_of(networks.MTAN(NYU))
    params = variables["params"]
    seen = {
        kind: [params[f"{kind}_mask_1_{i}"]["first"]["conv"]["kernel"].shape for i in range(5)]
        for kind in ("encoder", "decoder")
    }
    assert seen["encoder"] == [
        (1, 1, a, b) for a, b in ((64, 64), (256, 128), (512, 256), (1024, 512), (1024, 512))
    ]
    assert seen["decoder"] == [
        (1, 1, a, b) for a, b in ((128, 64), (192, 64), (384, 128), (768, 256), (1024, 512))
    ]
    shared = [
        params[f"tower_{way}_{i}"]["conv"]["kernel"].shape[2:]
        for way in ("down", "up")
        for i in range(5)
    ]
    assert shared == [
        *((64, 128), (128, 256), (256, 512), (512, 512), (512, 512)),
        *((64, 64), (128, 64), (256, 128), (512, 256), (512, 512)),
    ]


# --- training -------------------------------------------------------------------------------------

NETWORK_OF = {"nyuv2": "mtan", "cityscapes2": "segnet", "cityscapes3": "pspnet"}


def tiny(dataset, network=None, **given):
    """Options of a network that compiles in seconds."""
    network = network or NETWORK_OF[dataset]
    size = (32, 32) if network == "pspnet" else (8, 8)
    return Options(
        dataset,
        network,
        size,
        width=2,
        levels=1,
        batch_size=2,
        epochs=2,
        learning_rate=1e-2,
        average=1,
        scenes=4,
        **given,
    )


def test_rates_over_the_epochs_are_those_of_the_recipes():
    """Cityscapes' as a loop over epochs, which is how its authors' code has it."""
    steps = 3

    def rates(dataset, epochs):
        options = replace(tiny(dataset), epochs=epochs, learning_rate=1.0)
        return [float(rate_of(options, steps)(epoch * steps)) for epoch in range(epochs)]

    for dataset in ("nyuv2", "cityscapes2"):
        assert rates(dataset, 200) == [1.0] * 100 + [0.5] * 100
        assert rates(dataset, 3) == [1.0, 0.5, 0.5]
    rate, expected = 1.0, []
    for epoch in range(1, 61):
        expected.append(rate)
        if epoch >= 40 and epoch % 3 == 0:
            rate *= 0.7
    np.testing.assert_allclose(rates("cityscapes3", 60), expected, rtol=1e-6)
    assert set(rates("cityscapes3", 40)) == {1.0}


FLOPS = {}  # of programs that were compiled


@cache
def rows_of(dataset, network):
    """A tiny network on made-up scenes: what a rule gets, compiled once."""
    options, benchmark = tiny(dataset, network), BENCHMARKS[dataset]
    model = Model(network_of(options, benchmark.tasks), benchmark.tasks)
    raw = data.make_up(benchmark, 2, options.size).arrays
    params, stats = make_init(model.network)(jax.random.key(0))
    batch = data.prepare(raw)
    compiled = jax.jit(model.rows).lower(params, stats, batch).compile()
    FLOPS[network] = compiled.cost_analysis()["flops"]
    (losses, new), jacobian = compiled(params, stats, batch)
    return model, params, stats, batch, losses, new, jacobian


@pytest.fixture(scope="module")
def mtan():
    """A tiny MTAN."""
    return rows_of("nyuv2", "mtan")


@pytest.mark.slow
def test_rows_are_the_gradients_of_the_losses(mtan):
    model, params, stats, batch, losses, new, jacobian = mtan

    def dense(params, stats, batch):
        def losses_of(params):
            return model.losses(params, stats, batch)[0]

        return model.losses(params, stats, batch), jax.jacrev(losses_of)(params)

    compiled = jax.jit(dense).lower(params, stats, batch).compile()
    assert FLOPS["mtan"] < 0.55 * compiled.cost_analysis()["flops"]  # one pass forward, own towers
    (expected, expected_stats), jac = compiled(params, stats, batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), jacobian, jac)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), new, expected_stats
    )
    # A tower and a head belong to a task: the rows of the others are zero.
    for i in range(3):
        for name in (f"heads_{i}", f"encoder_mask_{i}_0"):
            for leaf in jax.tree.leaves(jacobian[name]):
                assert not np.delete(np.asarray(leaf), i, axis=0).any()
                assert np.asarray(leaf)[i].any() or leaf.ndim == 2  # a bias before BatchNorm


ROWS = [name for name, entry in METHODS.items() if entry.route != "features"]
COLUMNS = 80_000  # as many as the largest network has: each rule is compiled once for all


@cache
def rule_on_rows(name):
    """A rule of three tasks as a compiled function of rows and losses."""
    aggregator = METHODS[name].build(3, Known("nyuv2", 6, optax.constant_schedule(1e-3)))

    def update(rows, losses):
        params = rows[0]
        extra = {"key": jax.random.key(0), "previous_batch_losses": jnp.zeros(3)}
        state = aggregator.init(params)
        return aggregator.update(rows, state, params, losses=losses, **extra)[0]

    return jax.jit(update)


@pytest.mark.parametrize(
    ("dataset", "network"),
    [("nyuv2", "mtan"), ("nyuv2", "segnet"), ("nyuv2", "cross_stitch"), ("cityscapes3", "pspnet")],
)
def test_every_method_takes_the_same_jacobian(dataset, network):
    _, _, _, _, losses, _, jacobian = rows_of(dataset, network)
    shared = {name: rows for name, rows in jacobian.items() if not name.startswith("heads")}
    flat = np.concatenate([np.reshape(x, (3, -1)) for x in jax.tree.leaves(shared)], axis=1)
    assert np.isfinite(flat).all()
    assert np.linalg.norm(flat, axis=1).all()
    rows = jnp.asarray(np.pad(flat, ((0, 0), (0, COLUMNS - flat.shape[1]))))
    for name in ROWS:
        padded = np.asarray(rule_on_rows(name)(rows, losses))
        assert not padded[flat.shape[1] :].any(), name
        moved = padded[: flat.shape[1]]
        assert np.isfinite(moved).all(), name
        assert moved.any(), name
        # Within the span of the rows, but for the one that chooses coordinate by coordinate.
        if name != "graddrop":
            weights, *_ = np.linalg.lstsq(flat.T, moved, rcond=None)
            np.testing.assert_allclose(
                flat.T @ weights, moved, atol=1e-3 * abs(moved).max(), err_msg=name
            )


@pytest.mark.parametrize("name", ["famo", "aligned_mtl", "aligned_mtl_ub", "gradnorm"])
def test_a_compiled_step_of_each_route(name):
    options = tiny("nyuv2", "segnet")
    benchmark = BENCHMARKS["nyuv2"]
    raw = data.make_up(benchmark, 2, options.size).arrays
    training = make_training(options, benchmark.tasks, METHODS[name], 2, raw)
    state = training.init(jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    state, log = training.step(state, raw, jax.random.split(jax.random.key(1)))
    first = log["losses"]
    for step in range(2, 12):
        state, log = training.step(state, raw, jax.random.split(jax.random.key(step)))
    assert log["losses"].sum() < first.sum()  # Adam at 0.01 on two scenes
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    moved = jax.tree.map(lambda x, y: bool((np.asarray(y) != x).any()), before, state.params)
    assert all(any(jax.tree.leaves(moved[layer])) for layer in moved)
    if name == "famo":
        assert (np.asarray(state.after) > 0).all()


@pytest.mark.slow
def test_the_gramian_at_the_features_of_mtan_is_diagonal(mtan):
    model, params, stats, batch, *_ = mtan
    _, gramian, _ = jax.jit(
        jaxmtl.value_and_gramian(model.losses_of_features, encoder=model.encode, has_aux=True)
    )(params, stats, batch)
    off = np.asarray(gramian)[~np.eye(3, dtype=bool)]
    assert np.diagonal(gramian).min() > 0
    np.testing.assert_array_equal(off, 0)


def test_a_pass_of_training_moves_each_running_average_once_per_use(mtan):
    _, params, _, batch, _, new, _ = mtan
    x = np.asarray(batch["image"], np.float64)
    kernel = np.asarray(params["body"]["encoder_0_0"]["conv"]["kernel"], np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    y = sum(
        padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)
    ) + np.asarray(params["body"]["encoder_0_0"]["conv"]["bias"])
    layer = new["body"]["encoder_0_0"]["norm"]["norm"]
    np.testing.assert_allclose(layer["mean"], 0.1 * y.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer["var"], 0.9 + 0.1 * y.var(axis=(0, 1, 2)), rtol=1e-4)


def test_quantities_are_those_of_the_balanced_rows():
    """By NumPy from rows: w_i g_i of MGDA, projected ones of PCGrad, orthogonal ones of Aligned."""
    g = np.array([[2.0, 0.0, 1.0], [-1.0, 1.0, 0.0]])
    gap = g[1] - g[0]
    share = np.clip(g[1] @ gap / (gap @ gap), 0, 1)
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    rows = {
        "mgda": g * [[share], [1 - share]],
        "pcgrad": np.stack([a - (a @ b) / (b @ b) * b for a, b in (g, g[::-1])]),
        "aligned_mtl": s.min() * u @ vt,
    }
    gramian, known = jnp.asarray(g @ g.T, jnp.float32), Known("nyuv2", 4, None)
    for name, expected in rows.items():
        made = balanced(name, METHODS[name].build(2, known), gramian, None)
        np.testing.assert_allclose(made, expected @ expected.T, rtol=1e-4, atol=1e-5, err_msg=name)
        norms = np.linalg.norm(expected, axis=1)
        singular = np.linalg.svd(expected, compute_uv=False)
        quantities = {
            "condition": singular[0] / singular[1],
            "norm_ratio": norms.max() / norms.min(),
            "least_cosine": expected[0] @ expected[1] / norms.prod(),
            "least_similarity": 2 * norms.prod() / (norms**2).sum(),
        }
        found = figures_of(made)
        assert found.keys() == quantities.keys()
        for key, value in quantities.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-5, err_msg=key)
    for shares, expected in ((None, g), ((0.1, 0.9), g * [[0.1], [0.9]])):
        rule = METHODS["linear_scalarization"].build(2, known._replace(task_weights=shares))
        x = jnp.zeros(g.shape[1])
        _, state = rule.update(jnp.asarray(g), rule.init(x), x, losses=jnp.ones(2))
        made = balanced("linear_scalarization", rule, gramian, state)
        np.testing.assert_allclose(made, expected @ expected.T, rtol=1e-5)
    graddrop = METHODS["graddrop"].build(2, known)
    assert balanced("graddrop", graddrop, gramian, graddrop.init(jnp.zeros(3))) is None
    dwa = METHODS["dwa"].build(2, known)
    weighted = balanced("dwa", dwa, gramian, dwa.init(jnp.zeros(3)))
    weights = np.asarray(optax.tree.get(dwa.init(jnp.zeros(3)), "mtl_weights"))
    np.testing.assert_allclose(weighted, weights[:, None] * np.asarray(gramian) * weights)


# --- PSPNet ---------------------------------------------------------------------------------------


def test_the_encoder_is_resnet_50():
    _, variables = shapes_of(networks.PSPNet(NYU, upsample=8))
    encoder = variables["params"]["encoder"]
    assert number(encoder) == 23_508_032  # published, without the last layer
    heads = sum(
        4 * (2048 * 512 + 2 * 512) + 9 * 4096 * 512 + 2 * 512 + 512 * k + k for k in (13, 1, 3)
    )
    assert number(variables["params"]) == 23_508_032 + heads
    assert encoder["layer3_0"]["conv2"]["kernel"].shape == (3, 3, 256, 256)
    assert encoder["layer4_2"]["conv3"]["kernel"].shape == (1, 1, 512, 2048)
    assert sum(name.startswith("layer3_") for name in encoder) == 6
    assert "downsample_0" in encoder["layer2_0"]
    assert "downsample_0" not in encoder["layer2_1"]


def test_shapes_of_pspnet_are_those_described():
    net = networks.PSPNet(NYU, upsample=8)
    x = jax.ShapeDtypeStruct((1, 288, 384, 3), jnp.float32)
    z, _ = jax.eval_shape(
        lambda x: net.init_with_output(jax.random.key(0), x, False, method="features"), x
    )
    assert z.shape == (1, 36, 48, 2048)
    predictions, _ = shapes_of(net, (288, 384))
    assert predictions["normal"].shape == (2, 288, 384, 3)
    coarse, _ = shapes_of(networks.PSPNet(BENCHMARKS["cityscapes3"].outputs), (256, 512))
    assert {k: v.shape for k, v in coarse.items()} == {
        "semantic": (2, 32, 64, 19),
        "instance": (2, 32, 64, 2),
        "disparity": (2, 32, 64, 1),
    }


def conv_by_hand(x, kernel, stride=1, dilation=1):
    """A convolution (h, w, c) with padding that keeps the size of a 3 x 3 one; float64."""
    size = kernel.shape[0]
    pad = dilation * (size - 1) // 2
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    reach = dilation * (size - 1)
    h, w = ((n - reach - 1) // stride + 1 for n in x.shape[:2])
    y = np.zeros((h, w, kernel.shape[3]))
    for i, j in np.ndindex(h, w):
        for p, q in np.ndindex(size, size):
            y[i, j] += x[i * stride + p * dilation, j * stride + q * dilation] @ kernel[p, q]
    return y


def test_a_bottleneck_is_its_layers():
    """A block's output is that of torchvision's layers with their weights, by loops."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 6, 4))
    block = resnet.Bottleneck(2, 1, 2, project=True)
    variables = block.init(jax.random.key(0), jnp.asarray(x, jnp.float32)[None], False)
    stats = jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.5, 2, s.shape)), variables["batch_stats"]
    )
    params = variables["params"]

    def norm(y, name):
        s, p = stats[name]["norm"], params[name]["norm"]
        return (y - s["mean"]) / np.sqrt(np.asarray(s["var"], float) + 1e-5) * p["scale"] + p[
            "bias"
        ]

    def conv(y, name, **more):
        return conv_by_hand(y, np.asarray(params[name]["kernel"], np.float64), **more)

    y = np.maximum(norm(conv(x, "conv1"), "bn1"), 0)
    y = np.maximum(norm(conv(y, "conv2", dilation=2), "bn2"), 0)
    y = norm(conv(y, "conv3"), "bn3") + norm(conv(x, "downsample_0"), "downsample_1")
    made = block.apply(
        {"params": params, "batch_stats": stats}, jnp.asarray(x, jnp.float32)[None], False
    )
    np.testing.assert_allclose(made[0], np.maximum(y, 0), rtol=2e-4, atol=1e-4)


def test_dilations_and_strides_are_those_described(monkeypatch):
    made = {}
    original = resnet.Bottleneck.__call__

    def spy(self, x, train):
        made[self.name] = (self.stride, self.dilation, self.project)
        return original(self, x, train)

    monkeypatch.setattr(resnet.Bottleneck, "__call__", spy)
    shapes_of(networks.PSPNet(NYU[:1], width=2, blocks=(2, 2, 3, 3)))
    assert made == {
        "layer1_0": (1, 1, True),
        "layer1_1": (1, 1, False),
        "layer2_0": (2, 1, True),
        "layer2_1": (1, 1, False),
        "layer3_0": (1, 1, True),
        "layer3_1": (1, 2, False),
        "layer3_2": (1, 2, False),
        "layer4_0": (1, 2, True),
        "layer4_1": (1, 4, False),
        "layer4_2": (1, 4, False),
    }


def test_adaptive_averages_are_those_of_pytorch():
    x = np.arange(7.0)
    # Bins from floor(i 7 / 3) to ceil((i + 1) 7 / 3): [0, 3), [2, 5), [4, 7).
    np.testing.assert_allclose(networks.average_matrix(7, 3) @ x, [1, 3, 5], rtol=1e-6)
    np.testing.assert_allclose(networks.average_matrix(2, 3) @ x[:2], [0, 0.5, 1], rtol=1e-6)


def torchvision_weights(width, blocks, rng):
    """A state dict in torchvision's names and shapes, without its order."""
    made = {}

    def layer(name, out, into, size):
        made[f"{name}.weight"] = rng.normal(size=(out, into, size, size))

    def norm(name, out):
        for part in ("weight", "bias", "running_mean", "running_var"):
            made[f"{name}.{part}"] = rng.uniform(0.5, 1.5, out)
        made[f"{name}.num_batches_tracked"] = np.array(7)

    layer("conv1", width, 3, 7)
    norm("bn1", width)
    into = width
    for stage, count_ in enumerate(blocks, 1):
        planes = width * 2 ** (stage - 1)
        for i in range(count_):
            at = f"layer{stage}.{i}"
            for k, (out, c, size) in enumerate(
                ((planes, into, 1), (planes, planes, 3), (4 * planes, planes, 1)), 1
            ):
                layer(f"{at}.conv{k}", out, c, size)
                norm(f"{at}.bn{k}", out)
            if i == 0:
                layer(f"{at}.downsample.0", 4 * planes, into, 1)
                norm(f"{at}.downsample.1", 4 * planes)
            into = 4 * planes
    made["fc.weight"], made["fc.bias"] = rng.normal(size=(1000, into)), rng.normal(size=1000)
    return {k: v.astype(np.int64 if v.ndim == 0 else np.float32) for k, v in made.items()}


def write_safetensors(path, arrays):
    """The published format: length of a JSON header, the header, the bytes."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        end = len(blob) + array.nbytes
        kinds = {"float32": "F32", "int64": "I64", "bfloat16": "BF16"}
        kind = kinds[array.dtype.name]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(blob), end],
        }
        blob += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


def test_weights_of_a_file_reach_their_layers(tmp_path):
    rng = np.random.default_rng(0)
    arrays = torchvision_weights(2, (1, 1, 1, 1), rng)
    path = tmp_path / "resnet50.safetensors"
    write_safetensors(path, arrays)
    read = weights.read_weights(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    _, variables = shapes_of(networks.PSPNet(NYU[:1], width=2, blocks=(1, 1, 1, 1)))
    params, stats = (
        jax.tree.map(lambda x: jnp.zeros(x.shape), variables[kind])
        for kind in ("params", "batch_stats")
    )
    params, stats = weights.load_encoder(params, stats, read, "resnet50")
    encoder = params["encoder"]
    np.testing.assert_array_equal(
        encoder["layer2_0"]["conv2"]["kernel"][1, 2, 3, 0],
        arrays["layer2.0.conv2.weight"][0, 3, 1, 2],
    )
    np.testing.assert_array_equal(
        encoder["layer4_0"]["downsample_1"]["norm"]["scale"], arrays["layer4.0.downsample.1.weight"]
    )
    np.testing.assert_array_equal(stats["encoder"]["bn1"]["norm"]["var"], arrays["bn1.running_var"])
    used = {k for k in arrays if not k.startswith("fc") and "num_batches" not in k}
    assert len(jax.tree.leaves(encoder)) + len(jax.tree.leaves(stats["encoder"])) == len(used)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["heads_0"]))  # left as they were


def test_weights_of_half_precision_are_read(tmp_path):
    made = np.asarray(jnp.array([1.0, -2.5], jnp.bfloat16))
    write_safetensors(tmp_path / "a.safetensors", {"a": made})
    np.testing.assert_array_equal(weights.read_weights(tmp_path / "a.safetensors")["a"], made)


def test_weights_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="correct --weights"):
        weights.read_weights(tmp_path / "none.safetensors")
    (tmp_path / "a.bin").touch()
    with pytest.raises(ValueError, match="expected a file that ends in"):
        weights.read_weights(tmp_path / "a.bin")
    (tmp_path / "b.safetensors").write_bytes(b"no header at all")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        weights.read_weights(tmp_path / "b.safetensors")
    write_safetensors(tmp_path / "d.safetensors", {"a": np.zeros(2, np.float32)})
    text = (tmp_path / "d.safetensors").read_bytes().replace(b'"F32"', b'"F99"')
    (tmp_path / "d.safetensors").write_bytes(text)
    with pytest.raises(ValueError, match=r"cannot be read .*; save it anew, in float32"):
        weights.read_weights(tmp_path / "d.safetensors")
    (tmp_path / "c.pth").touch()
    try:
        import torch  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="expected PyTorch to read"):
            weights.read_weights(tmp_path / "c.pth")
    arrays = torchvision_weights(2, (1, 1, 1, 1), np.random.default_rng(0))
    _, variables = shapes_of(networks.PSPNet(NYU[:1], width=2, blocks=(1, 1, 1, 1)))
    params, stats = variables["params"], variables["batch_stats"]
    with pytest.raises(ValueError, match=r"expected layer1.0.conv1.weight among"):
        weights.load_encoder(
            params,
            stats,
            {k: v for k, v in arrays.items() if k != "layer1.0.conv1.weight"},
            "resnet50",
        )
    arrays["conv1.weight"] = arrays["conv1.weight"][:1]
    with pytest.raises(ValueError, match=r"expected conv1.weight of shape"):
        weights.load_encoder(params, stats, arrays, "resnet50")


# --- loaders --------------------------------------------------------------------------------------


def write_folder(root, dataset, size=(4, 6), number_=2):
    """MTAN's layout with random scenes; returns the arrays by split, kind and number."""
    rng = np.random.default_rng(0)
    label, classes = {"nyuv2": ("label", 13), "cityscapes2": ("label_7", 7)}[dataset]
    made = {}
    for split in ("train", "val"):
        for i in range(number_):
            normal = rng.normal(size=(*size, 3))
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
            arrays = {
                "image": rng.integers(0, 256, (*size, 3)) / 255,  # float64, as in MTAN's files
                label: rng.integers(-1, classes, size).astype(np.float64),
                "depth": rng.uniform(0, 5, (*size, 1)).astype(np.float32),
            }
            if dataset == "nyuv2":
                arrays["normal"] = normal
            for kind, array in arrays.items():
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                np.save(root / split / kind / f"{i}.npy", array)
                made[split, kind, i] = array
    return made


@pytest.mark.parametrize("dataset", ["nyuv2", "cityscapes2"])
def test_mtan_folders_are_read(tmp_path, dataset):
    made = write_folder(tmp_path, dataset, number_=11)  # "10" comes after "9", not after "1"
    benchmark = BENCHMARKS[dataset]
    label = data.FOLDERS[dataset]
    for split in ("train", "val"):
        source = data.load_folder(benchmark, tmp_path, split, (4, 6))
        assert source.size == 11
        raw = source.read(np.array([10, 2]))
        batch = data.prepare(raw)
        assert set(batch) == {"image", *benchmark.tasks}
        for row, i in enumerate((10, 2)):
            expected = {"image": "image", "semantic": label, "depth": "depth", "normal": "normal"}
            for name, x in batch.items():
                kept = made[split, expected[name], i]
                np.testing.assert_allclose(x[row], kept, atol=5e-4 if name == "normal" else 1e-6)


def change(kind, function):
    """Returns a change of the first file of a kind."""

    def apply(root):
        path = root / "train" / kind / "0.npy"
        np.save(path, function(np.load(path)))

    return apply


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda root: shutil.rmtree(root / "train"), FileNotFoundError, "expected .*image/0.npy"),
        (
            lambda root: shutil.rmtree(root / "train" / "normal"),
            FileNotFoundError,
            "needs the folders image, label, depth, normal",
        ),
        (
            lambda root: (root / "train" / "depth" / "1.npy").unlink(),
            FileNotFoundError,
            "got 1.npy in only one",
        ),
        (change("image", lambda x: x.transpose(2, 0, 1)), ValueError, "channels come last"),
        (change("label", lambda x: x[:2]), ValueError, r"of shape \(4, 6\), got \(2, 6\)"),
        (change("depth", lambda x: x[..., 0]), ValueError, r"of shape \(4, 6, 1\)"),
        (change("image", lambda x: x * 255), ValueError, "between 0 and 1 .* divide by 255"),
        (change("image", lambda x: x.astype(str)), ValueError, "expected numbers"),
        (change("label", lambda x: x + 0.5), ValueError, "expected labels -1"),
        (change("label", lambda x: x * 0 + 255), ValueError, "expected labels -1"),
        (change("depth", lambda x: -x - 1), ValueError, "at least 0"),
        (change("depth", lambda x: x * np.nan), ValueError, "expected finite numbers"),
        (change("normal", lambda x: x * 127), ValueError, "length 1"),
        (
            lambda root: (root / "train" / "label" / "0.npy").write_bytes(b"text"),
            ValueError,
            "expected an array in",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, spoil, error, text):
    write_folder(tmp_path, "nyuv2")
    spoil(tmp_path)
    with pytest.raises(error, match=text):
        data.load_folder(BENCHMARKS["nyuv2"], tmp_path, "train", (4, 6))


def test_a_missing_folder_says_what_to_pass():
    with pytest.raises(FileNotFoundError, match=r"experiments.scenes.convert"):
        data.load_folder(BENCHMARKS["nyuv2"], None, "train", (4, 6))
    with pytest.raises(FileNotFoundError, match="leftImg8bit, gtFine and disparity"):
        data.load_tree(BENCHMARKS["cityscapes3"], None, "train", (16, 32))


# The archive of NYUv2.


def picture(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def write_archive(path, change=None):
    """The archive's layout at 8 x 12, with PNG in place of JPEG so that values are exact."""
    rng = np.random.default_rng(0)
    normals = np.zeros((8, 12, 3), np.float64)
    normals[..., 2] = -1
    normals[:4, :, :2] = (0.6, 0)
    normals[:4, :, 2] = -0.8
    normals[:, :4] = 0.1  # too short: undefined
    scenes = {}
    for n in (1, 2, 3):
        label = np.repeat(np.repeat(rng.integers(0, 13, (4, 6)), 2, 0), 2, 1)
        label[:2, :2] = 255
        scenes[n] = {
            "image": np.repeat(np.repeat(rng.integers(0, 256, (4, 6, 3)), 2, 0), 2, 1),
            "depth": np.repeat(np.repeat(rng.integers(0, 250, (4, 6)), 2, 0), 2, 1),
            "label": label,
            "normal": np.round((normals + 1) * 127.5),
        }
    members = {"splits.json": json.dumps({"train": [3, 1], "test": [2]}).encode()}
    for n, kinds in scenes.items():
        for kind, array in kinds.items():
            name = f"{kind}/{n:04d}.{convert.KINDS[kind]}"
            members[name] = picture(array.astype(np.uint8))
    if change:
        change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return scenes


def test_the_archive_becomes_mtan_folders(tmp_path):
    scenes = write_archive(tmp_path / "nyu.zip")
    assert convert.convert(tmp_path / "nyu.zip", tmp_path / "out", (4, 6)) == {"train": 2, "val": 1}
    for split, numbers in (("train", (3, 1)), ("val", (2,))):
        for i, n in enumerate(numbers):
            made = {k: np.load(tmp_path / "out" / split / k / f"{i}.npy") for k in convert.KINDS}
            label = scenes[n]["label"][::2, ::2]
            np.testing.assert_array_equal(made["label"], np.where(label == 255, -1, label))
            depth = scenes[n]["depth"][::2, ::2, None] * 0.04
            np.testing.assert_allclose(made["depth"], depth, rtol=1e-6)
            inner = made["image"][1:-1, 1:-1]  # linear: pixels mix with their neighbors
            assert np.abs(inner - scenes[n]["image"][2:-2:2, 2:-2:2] / 255).mean() < 0.2
            length = np.linalg.norm(made["normal"], axis=-1)
            np.testing.assert_allclose(length[:, 3:], 1, rtol=1e-5)
            assert not length[:, 0].any()
            np.testing.assert_allclose(made["normal"][0, 4], [0.6, 0, -0.8], atol=0.01)
            assert all(made[k].dtype == np.float32 for k in ("image", "depth", "normal"))
    source = data.load_folder(BENCHMARKS["nyuv2"], tmp_path / "out", "train", (4, 6))
    assert source.size == 2


def test_short_normals_are_undefined_and_others_of_length_1():
    normals = np.array([[0.3, 0.3, 0.1], [0.0, 0.3, -0.4], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = [[0, 0, 0], [0, 0.6, -0.8], [0.5**0.5, 0.5**0.5, 0], [0, 0, 0]]
    np.testing.assert_allclose(convert.unit_normals(normals), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("splits.json"), "expected splits.json"),
        (lambda m: m.update({"splits.json": b'{"train": []}'}), "expected train and test"),
        (lambda m: m.pop("depth/0003.png"), "expected depth/0003.png"),
        (
            lambda m: m.update({"label/0003.png": picture(np.zeros((3, 3), np.uint8))}),
            r"at the image's size \(8, 12\)",
        ),
        (
            lambda m: m.update({"depth/0003.png": picture(np.zeros((8, 12, 3), np.uint8))}),
            "8-bit picture of one channel",
        ),
        (lambda m: m.update({"splits.json": b"{"}), "expected JSON in splits.json of .*nyu.zip"),
        (lambda m: m.update({"splits.json": b"[1, 2]"}), "train and test in splits.json, got list"),
        (
            lambda m: m.update({"splits.json": b'{"train": ["0003"], "test": [2]}'}),
            r"whole numbers for train in splits.json, got \['0003'\]",
        ),
        (
            lambda m: m.update({"depth/0003.png": m["depth/0003.png"][:60]}),
            "a picture in depth/0003.png, got one that Pillow cannot read .* the archive anew",
        ),
        (
            lambda m: m.update({"label/0003.png": b"text"}),
            "a picture in label/0003.png, got one that Pillow cannot read .* the archive anew",
        ),
    ],
)
def test_what_is_wrong_with_an_archive_is_said(tmp_path, change, text):
    write_archive(tmp_path / "nyu.zip", change)
    with pytest.raises(ValueError, match=text):
        convert.convert(tmp_path / "nyu.zip", tmp_path / "out", (4, 6))


def test_a_missing_archive_ends_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit, match="not there"):
        convert.main([str(tmp_path / "no.zip"), str(tmp_path / "out")])
    write_archive(tmp_path / "nyu.zip")
    convert.main([str(tmp_path / "nyu.zip"), str(tmp_path / "big"), "--size", "288x384"])
    assert "upsampled" in capsys.readouterr().out


# Cityscapes' tree.


def cut(path, size):
    """Leaves the first bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])


THINGS = (24, 25, 26, 27, 28, 31, 32, 33)


def write_tree(root, size=(32, 64)):
    """Cityscapes' layout with two scenes in two cities for each split; returns the labels."""
    rng = np.random.default_rng(0)
    labels = {}
    for split in ("train", "val"):
        for city in ("aachen", "ulm"):
            scene = f"{city}_000000_000019"
            label = np.repeat(np.repeat(rng.integers(0, 34, (4, 8)), 8, 0), 8, 1).astype(np.uint8)
            label[:8, :8] = 26
            instance = label.astype(np.uint16)
            instance[np.isin(label, THINGS)] *= 1000
            instance[:4, :8], instance[4:8, :8] = 26001, 26002
            pictures = {
                f"leftImg8bit/{split}/{city}/{scene}_leftImg8bit.png": rng.integers(
                    0, 256, (*size, 3)
                ).astype(np.uint8),
                f"gtFine/{split}/{city}/{scene}_gtFine_labelIds.png": label,
                f"gtFine/{split}/{city}/{scene}_gtFine_instanceIds.png": instance,
                f"disparity/{split}/{city}/{scene}_disparity.png": rng.integers(
                    0, 20000, size
                ).astype(np.uint16),
            }
            for name, array in pictures.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(picture(array))
            labels[split, city] = {
                Path(name).name.split("_")[-1]: a for name, a in pictures.items()
            }
    return labels


def test_the_tree_of_cityscapes_is_read(tmp_path):
    made = write_tree(tmp_path)
    source = data.load_tree(BENCHMARKS["cityscapes3"], tmp_path, "val", (32, 64))
    assert source.size == 2
    raw = source.read(np.array([1, 0]))
    assert {k: v.shape[1:] for k, v in raw.items()} == {
        "image": (32, 64, 3),
        "semantic": (4, 8),
        "instance": (4, 8, 2),
        "disparity": (4, 8, 1),
    }
    names = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for row, city in enumerate(("ulm", "aachen")):
        files = made["val", city]
        bgr = files["leftImg8bit.png"][..., ::-1].astype(np.float64)
        expected = (bgr - [123.675, 116.28, 103.53]) / 255
        np.testing.assert_allclose(raw["image"][row], expected, atol=1e-5)
        label, instance = files["labelIds.png"], files["instanceIds.png"].astype(int)
        for i, j in np.ndindex(4, 8):
            at = 8 * i + 4, 8 * j + 4  # the center of the cell
            kind = label[at]
            assert raw["semantic"][row, i, j] == (names.index(kind) if kind in names else 250)
            disparity = files["disparity.png"][at] / 2729.0680031169923
            np.testing.assert_allclose(raw["disparity"][row, i, j, 0], disparity, rtol=1e-6)
            if kind in THINGS:
                y, x = np.nonzero(instance == instance[at])
                center = [at[0] - y.mean(), at[1] - x.mean()]
                np.testing.assert_allclose(raw["instance"][row, i, j], center, atol=1e-4)
            else:
                assert (raw["instance"][row, i, j] == 250).all()


def test_cityscapes_is_rotated_and_mirrored_with_its_targets(tmp_path):
    write_tree(tmp_path)
    source = data.load_tree(BENCHMARKS["cityscapes3"], tmp_path, "train", (32, 64))

    class Draws:
        """Draws what a test wants."""

        def __init__(self, angle, chance):
            self.angle, self.chance = angle, chance

        def uniform(self, low, high):
            assert (low, high) == (-10, 10)
            return self.angle

        def random(self):
            return self.chance

    plain = source.read(np.array([0]))
    same = source.read(np.array([0]), Draws(0.0, 0.9))
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    flipped = source.read(np.array([0]), Draws(0.0, 0.1))
    np.testing.assert_allclose(flipped["image"], plain["image"][:, :, ::-1], atol=1e-6)
    # The grid's pixel 8 j + 4 lies one beside the middle: compare where blocks are constant.
    np.testing.assert_array_equal(flipped["semantic"], plain["semantic"][:, :, ::-1])
    seen = (plain["instance"] != 250).all(axis=-1)[:, :, ::-1]
    total = flipped["instance"][..., 1] + plain["instance"][:, :, ::-1, 1]
    np.testing.assert_allclose(total[seen], 1, atol=1e-4)  # x is negated, less that one pixel
    turned = source.read(np.array([0]), Draws(10.0, 0.9))
    assert (turned["semantic"][0, 0, 0], turned["disparity"][0, 0, 0, 0]) == (250, 0)  # came in
    assert (turned["image"] != plain["image"]).mean() > 0.5


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (
            lambda root: shutil.rmtree(root / "leftImg8bit"),
            FileNotFoundError,
            "unpack leftImg8bit_trainvaltest.zip",
        ),
        (
            lambda root: next((root / "disparity").glob("train/*/*.png")).unlink(),
            FileNotFoundError,
            "unpack the archive of disparity",
        ),
        (
            lambda root: next((root / "gtFine").glob("train/*/*labelIds.png")).write_bytes(
                picture(np.zeros((16, 32), np.uint8))
            ),
            ValueError,
            "of the size of its image, 32 x 64, got 16 x 32",
        ),
        (
            lambda root: next((root / "gtFine").glob("train/*/*instanceIds.png")).write_bytes(
                picture(np.zeros((32, 64, 3), np.uint8))
            ),
            ValueError,
            "expected .* to be a 16-bit picture, got mode RGB",
        ),
        (
            lambda root: next((root / "leftImg8bit").glob("train/*/*.png")).write_bytes(b"text"),
            ValueError,
            "a picture in .*_leftImg8bit.png, got one that Pillow .* its archive anew",
        ),
        (
            lambda root: cut(next((root / "disparity").glob("train/*/*.png")), 60),
            ValueError,
            "a picture in .*_disparity.png, got one that Pillow .* its archive anew",
        ),
    ],
)
def test_what_is_wrong_with_the_tree_is_said(tmp_path, spoil, error, text):
    write_tree(tmp_path)
    spoil(tmp_path)

    def read():
        data.load_tree(BENCHMARKS["cityscapes3"], tmp_path, "train", (32, 64)).read(np.arange(2))

    with pytest.raises(error, match=text):
        read()


# --- report ---------------------------------------------------------------------------------------


def half_unit(values):
    """Half a unit of the last decimal of each number."""
    return np.array([0.5 * 10.0 ** -len(f"{v:g}".partition(".")[2]) for v in values])


@pytest.mark.parametrize("key", TABLES)
def test_printed_tables_give_their_printed_delta_m(key):
    """Columns against the printed delta_m: they agree within the rounding of the columns."""
    benchmark = BENCHMARKS[key[0]]
    sign = np.array([-1 if metric.higher else 1 for metric in benchmark.metrics])
    tasks = np.array(benchmark.task_of_metric())
    for table in TABLES[key]:
        base = np.array(table.values["single_task"])
        assert len(base) == len(benchmark.metrics)
        for name, values in table.values.items():
            if name == "single_task" or (key[0] == "nyuv2" and name == "ldc_mtl_router"):
                continue  # the latter is printed with another row's pixel accuracy
            drop = 100 * sign * (np.array(values) - base) / base
            # Half a unit of the last digit of each column, of both rows.
            slack = np.mean(100 * (half_unit(base) + half_unit(values)) / base) + 0.2
            assert abs(drop.mean() - table.delta_m[name][0]) < slack, name
            if len(table.delta_m[name]) > 1:
                by_task = np.mean([drop[tasks == t].mean() for t in np.unique(tasks)])
                assert abs(by_task - table.delta_m[name][1]) < 1.5 * slack, name


def made_up_record(method, seed, tasks, result, epochs=3):
    """A record as a run leaves it."""
    quantities = {
        "condition": 4.0,
        "norm_ratio": 2.0,
        "least_cosine": -0.2,
        "least_similarity": 0.7,
    }
    even = {"condition": 1.0, "norm_ratio": 1.0, "least_cosine": 0.0, "least_similarity": 1.0}
    log = {"losses": [1.0] * len(tasks), "metrics": result, "seconds": 1.0}
    if len(tasks) > 1:
        log |= {"raw": quantities, "balanced": even if method == "aligned_mtl" else quantities}
    config = config_of(tiny("nyuv2")) | {"scenes": None}
    return {
        "method": method,
        "seed": seed,
        "tasks": list(tasks),
        "config": config,
        "result": result,
        "history": [log] * epochs,
    }


BASE = [40.0, 60.0, 0.6, 0.2, 25.0, 20.0, 30.0, 50.0, 70.0]


def write_records(folder):
    """Single tasks, equal weights 10 % worse everywhere, Aligned-MTL 5 % better, two seeds."""
    benchmark = BENCHMARKS["nyuv2"]
    higher = np.array([metric.higher for metric in benchmark.metrics])
    numbers = np.array(benchmark.task_of_metric())
    records = []
    for seed in (0, 1):
        for i, task in enumerate(benchmark.tasks):
            result = [x if n == i else None for n, x in zip(numbers, BASE, strict=True)]
            records.append(made_up_record("single_task", seed, (task,), result))
        for method, change in (("linear_scalarization", 0.1), ("aligned_mtl", -0.05)):
            factor = 1 + (change + 0.001 * seed) * np.where(higher, -1, 1)
            result = (np.array(BASE) * factor).tolist()
            records.append(made_up_record(method, seed, benchmark.tasks, result))
    append_records(folder / "nyuv2_mtan.jsonl", records)


def test_delta_m_orders_and_verdicts_are_worked_out_by_hand(tmp_path):
    write_records(tmp_path)
    setup = report.setups(tmp_path)["nyuv2_mtan"]
    np.testing.assert_allclose(setup.single, BASE)
    for reduce in ("metric", "task"):
        np.testing.assert_allclose(
            setup.drops("linear_scalarization", reduce), [10, 10.1], rtol=1e-4
        )
        np.testing.assert_allclose(setup.drops("aligned_mtl", reduce), [-5, -4.9], rtol=1e-4)
    theirs = {"linear_scalarization": 5.46, "aligned_mtl": -4.93, "mgda": 1.47}
    assert report.compare_orders(setup, theirs) == (1, 0, 0)
    assert report.compare_orders(setup, {"linear_scalarization": -1, "aligned_mtl": 1}) == (0, 1, 0)
    assert "1 (aligned_mtl) are lower by more than the error, none higher" in report.conclusion(
        [setup]
    )
    verdicts = {c.claim: c.verdict for c in report.claims(tmp_path)}
    assert all(verdict in VERDICTS for verdict in verdicts.values())
    assert verdicts["NYUv2, mtan: aligned_mtl has a lower delta_m than equal weights"] == (
        "reproduced"
    )
    balanced = "NYUv2, mtan: Aligned-MTL's balanced gradients have condition number 1 and cosines 0"
    assert verdicts[balanced] == "reproduced"
    made = {c.claim: c for c in report.claims(tmp_path)}
    lowest = made["NYUv2, mtan: aligned_mtl has the lowest delta_m"]
    assert lowest.verdict == "partly"  # not all rivals have run
    assert lowest.ours.startswith("rank 1 of the 2 that ran, of 14: aligned_mtl -5.0 ± 0.1, linear")
    assert lowest.differs.startswith("size 8 x 8 in place of 288 x 384, width 2 in place of 64")
    for c in made.values():
        if c.verdict == NO_DATA:
            assert "python -m experiments.scenes --dataset" in c.ours
            command = c.ours.partition("`")[2].removesuffix("`").split("; ")[-1]
            arguments = command.removeprefix("python -m experiments.scenes ").split()
            (part,) = main.plan(main.study.parse(arguments))  # its options fit together
            assert "scenes --dataset " + part.name.replace("_", " --network ") in command
    three = made["Cityscapes, 3 tasks, pspnet: aligned_mtl_ub has the lowest delta_m"]
    assert "--dataset cityscapes3 --network pspnet --data-dir DIR --weights FILE" in three.ours
    assert "--epochs 100 --seeds 3" in three.ours
    table = TABLES["cityscapes3", "pspnet"][0].values
    assert set(table) == set(three.ours.strip("`").partition("--methods ")[2].split())


CITY = [70.0, 90.0, 0.01, 30.0]


def write_city(folder, changes, file="cityscapes2_mtan", seeds=(0, 1), **config):
    """Single tasks, and methods that are better by a share of each metric, by seed a bit more."""
    benchmark = BENCHMARKS["cityscapes2"]
    records = []
    for seed in seeds:
        if file == "cityscapes2_mtan":
            for task, row in (("semantic", [*CITY[:2], None, None]), ("depth", [None, None])):
                row = [*row, *CITY[2:]][:4]
                records.append(made_up_record("single_task", seed, (task,), row))
        for method, change in changes.items():
            sign = np.where([metric.higher for metric in benchmark.metrics], 1, -1)
            result = np.array(CITY) * (1 + sign * (change + 1e-4 * seed))
            records.append(made_up_record(method, seed, benchmark.tasks, result.tolist()))
    for record in records:
        record["config"] |= {"dataset": "cityscapes2"} | config
    append_records(folder / f"{file}.jsonl", records)


def test_statements_of_the_tables_are_judged_once_there_are_records(tmp_path):
    table = TABLES["cityscapes2", "mtan"][1]
    # As printed, but for GO4Align, which is made the best.
    changes = {name: -v[0] / 100 for name, v in table.delta_m.items() if v and name in METHODS}

    def verdicts(folder, changes):
        write_city(folder, changes)
        where = "Cityscapes, 2 tasks, mtan: "
        return {
            c.claim.removeprefix(where): c
            for c in report.claims(folder)
            if c.claim.startswith(where)
        }

    made = verdicts(tmp_path / "printed", changes)
    best = made["ldc_mtl_router has the lowest delta_m"]
    assert best.verdict == "reproduced"
    assert best.ours.startswith("rank 1 of the 18 that ran, of 18: ldc_mtl_router -0.6 ± 0.0, fair")
    for text in (
        "famo has a lower delta_m than equal weights",
        "ldc_mtl_router has a lower delta_m than equal weights",
        "moco has the lowest delta_m of that paper's methods",
        "pcgrad has a lower delta_m than moco_pcgrad",
        "moco_cagrad has a lower delta_m than cagrad",
    ):
        assert made[text].verdict == "reproduced", text
    assert made["aligned_mtl has the lowest delta_m"].verdict == NO_DATA  # it has not run
    made = verdicts(tmp_path / "other", changes | {"go4align": 0.02, "moco": -0.3})
    assert made["ldc_mtl_router has the lowest delta_m"].verdict == "partly"
    assert made["moco has the lowest delta_m of that paper's methods"].verdict == "partly"
    fewer = {name: changes[name] for name in ("ldc_mtl_router", "fairgrad")}
    made = verdicts(tmp_path / "fewer", fewer | {"fairgrad": 0.1})
    assert made["ldc_mtl_router has the lowest delta_m"].verdict == "not"
    assert made["moco has the lowest delta_m of that paper's methods"].verdict == NO_DATA


def test_averaged_forms_are_compared_metric_by_metric(tmp_path):
    def verdicts(folder, changes):
        write_city(tmp_path / folder, changes)
        made = [c for c in report.claims(tmp_path / folder) if c.source == published.ZHOU]
        return [c.verdict for c in made]

    plain = {"mgda": -0.3, "pcgrad": -0.1, "cagrad": -0.1}
    good = {"cr_mgda": -0.1, "cr_pcgrad": -0.1, "cr_cagrad": -0.05}
    assert verdicts("none", {"upgrad": 0.0}) == [NO_DATA] * 4
    assert verdicts("some", plain | {"cr_mgda": -0.1}) == ["reproduced"] + [NO_DATA] * 3
    assert verdicts("all", plain | good) == ["reproduced"] * 4
    assert verdicts("worse", plain | good | {"cr_cagrad": -0.2}) == [
        *("reproduced", "reproduced", "not", "partly")
    ]


def test_runs_with_another_hyperparameter_are_apart_and_judged(tmp_path):
    def verdicts(source):
        return [(c.verdict, c.ours) for c in report.claims(tmp_path) if c.source == source]

    plain = {"ldc_mtl_router": 0.01, "fairgrad": -0.05, "linear_scalarization": -0.2}
    write_city(tmp_path, plain)
    assert verdicts(published.XIAO8)[0][0] == NO_DATA
    for penalty in published.PENALTIES:
        if penalty != published.OWN_PENALTY:
            name = report.part_name("cityscapes2", "mtan", penalty)
            write_city(tmp_path, {"ldc_mtl_router": -penalty}, name, penalty=penalty)
    ((verdict, ours),) = verdicts(published.XIAO8)
    assert verdict == "partly"  # from 0.05 on they are no better
    assert ours.startswith("0.02 +3.0 ± 0.0, 0.05 +0.0 ± 0.0, 0.06 -1.0 ± 0.0")
    assert ours.endswith("0.1 +6.0 ± 0.0 points")
    for shares in published.WEIGHTS:
        name = report.part_name("cityscapes2", "mtan", task_weights=shares)
        write_city(tmp_path, {"linear_scalarization": -0.1}, name, task_weights=list(shares))
    assert verdicts(published.XIAO9)[0][0] == "reproduced"
    setup = report.read_setup(tmp_path, "cityscapes2", "mtan", {"task_weights": (0.1, 0.9)})
    assert report.title_of(setup).endswith(", weights 0.1 0.9")
    assert [row[:3] for row in report.drops_table(setup).rows] == [
        ["linear_scalarization", "+10.0 ± 0.0", ""]  # no printed number of equal weights
    ]
    assert report.setups(tmp_path).keys() == {"cityscapes2_mtan"}


def test_tables_of_hyperparameters_give_their_printed_delta_m():
    base = np.array(TABLES["cityscapes2", "mtan"][1].values["single_task"])
    for row in (*published.PENALTIES.values(), *published.WEIGHTS.values()):
        drop = 100 * np.array([-1, -1, 1, 1]) * (np.array(row[:4]) - base) / base
        slack = np.mean(100 * (half_unit(base) + half_unit(row[:4])) / base) + 0.2
        assert abs(drop.mean() - row[4]) < slack, row
    tables = report.published_tables()
    assert len(tables) == sum(map(len, TABLES.values())) + 3
    assert all(len(row) == len(table.header) for table in tables for row in table.rows)


def test_one_seed_decides_nothing(tmp_path):
    write_records(tmp_path / "two")
    records = read_records(tmp_path / "two" / "nyuv2_mtan.jsonl")
    append_records(tmp_path / "nyuv2_mtan.jsonl", [r for r in records if r["seed"] == 0])
    setup = report.setups(tmp_path)["nyuv2_mtan"]
    theirs = {"linear_scalarization": 5.46, "aligned_mtl": -4.93}
    assert report.compare_orders(setup, theirs) == (0, 0, 1)
    assert "undecided" in report.conclusion([setup])
    assert "reproduced" not in {
        c.verdict for c in report.claims(tmp_path) if "lower delta_m than equal" in c.claim
    }


def test_results_without_single_tasks_have_no_delta_m(tmp_path):
    write_records(tmp_path / "all")
    records = read_records(tmp_path / "all" / "nyuv2_mtan.jsonl")
    kept = [r for r in records if r["tasks"] != ["depth"]]
    append_records(tmp_path / "nyuv2_mtan.jsonl", kept)
    setup = report.setups(tmp_path)["nyuv2_mtan"]
    assert setup.single is None
    assert "no delta_m yet" in report.conclusion([setup])
    table = report.task_table(setup, "normal")
    assert [row[0] for row in table.rows] == ["linear_scalarization", "aligned_mtl"]
    assert table.rows[0][1] == "27.51 ± 0.01 (28.15)"
    assert all(row[1] == "" for row in report.drops_table(setup).rows)


@pytest.mark.slow
def test_a_study_runs_resumes_and_reports(tmp_path, capsys):
    """One smoke run with a method by rows, cut after its first epoch and resumed."""
    start = ["--smoke", "--dataset", "cityscapes2", "--network", "segnet", "--out", str(tmp_path)]
    methods = ["single_task", "linear_scalarization", "aligned_mtl"]
    main.study.main([*start, "--methods", *methods])
    text = capsys.readouterr().out
    path = tmp_path / "scenes" / "cityscapes2_segnet.jsonl"
    records = read_records(path)
    assert [(r["method"], r["tasks"]) for r in records] == [
        ("single_task", ["semantic"]),
        ("single_task", ["depth"]),
        *((name, ["semantic", "depth"]) for name in methods[1:]),
    ]
    for record in records:
        assert len(record["history"]) == 2
        seen = [value is not None for value in record["result"]]
        kinds = ["semantic", "semantic", "depth", "depth"]
        assert seen == [kind in record["tasks"] for kind in kinds]
    balanced = records[-1]["history"][-1]["balanced"]
    np.testing.assert_allclose(balanced["condition"], 1, atol=1e-3)
    np.testing.assert_allclose(balanced["least_cosine"], 0, atol=1e-3)
    assert "made-up scenes, segnet: equal weights have delta_m" in text
    for kind in ("delta_m", "gradients"):
        assert (tmp_path / "scenes" / f"cityscapes2_segnet_{kind}.png").stat().st_size > 10_000
    assert not list((tmp_path / "scenes").glob("checkpoints/*"))  # all are recorded
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    main.study.main([*start, "--methods", *methods, "--resume"])
    again = read_records(path)[-1]
    assert again["result"] == records[-1]["result"]  # a seed decides all


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    options = tiny("cityscapes2")
    tasks = BENCHMARKS["cityscapes2"].tasks
    raw = data.make_up(BENCHMARKS["cityscapes2"], 2, options.size).arrays
    training = make_training(options, tasks, METHODS["famo"], 2, raw)
    state = training.init(jax.random.key(0))
    checkpoint = Checkpoint(tmp_path / "deep" / "a.npz", options)
    assert checkpoint.load(state) == (state, [])
    checkpoint.save(state, [{"losses": [1.0, 2.0]}])
    other = training.init(jax.random.key(1))
    loaded, history = checkpoint.load(other)
    assert history == [{"losses": [1.0, 2.0]}]
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    with pytest.raises(SystemExit, match="drop --resume, or delete it"):
        Checkpoint(checkpoint.path, replace(options, epochs=5)).load(state)
    checkpoint.remove()
    assert not checkpoint.path.exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--dataset", "cityscapes3"], "expected a network of"),
        (["--size", "100x128"], "divisible by 32"),
        (["--weights", "a.pth"], "with --network pspnet"),
        (["--penalty", "0.1"], "expected --penalty with --methods of ldc_mtl_router, ldc_mtl"),
        (["--penalty", "0", "--methods", "ldc_mtl"], "expected a positive --penalty, got 0.0"),
        (
            ["--task-weights", "1", "2", "--methods", "famo"],
            "expected --task-weights with --methods of linear_scalarization, which alone have it",
        ),
        (
            ["--task-weights", "1", "2", "--methods", "linear_scalarization"],
            "of 3 numbers for semantic, depth, normal, none negative and not all 0, got 1.0 2.0",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, arguments, text):
    with pytest.raises(SystemExit, match=text):
        main.study.main([*arguments, "--out", str(tmp_path)])


def part_of(*arguments):
    """The part of a command line: the name of its results file and its options."""
    (part,) = main.plan(main.study.parse(arguments))
    return part


def test_every_method_has_the_rate_of_its_authors_unless_one_is_given():
    def rates(*arguments):
        return {config["learning_rate"] for config in part_of(*arguments).configs}

    assert rates("--dataset", "nyuv2") == {1e-4, 8e-5}
    assert rates("--dataset", "cityscapes2") == {1e-4, 3e-4}
    assert rates("--dataset", "cityscapes2", "--learning-rate", "1e-3") == {1e-3}


def test_another_hyperparameter_is_in_the_records_and_in_the_name_of_their_file():
    plain = part_of("--dataset", "cityscapes2")
    assert plain.name == "cityscapes2_mtan"
    # Options as they were before there were others, so that older records can be resumed.
    assert all({"penalty", "task_weights"}.isdisjoint(config) for config in plain.configs)
    start = ("--dataset", "cityscapes2", "--methods")
    other = part_of(*start, "ldc_mtl_router", "--penalty", "0.05")
    assert other.name == "cityscapes2_mtan_lambda_0.05"
    assert {config["penalty"] for config in other.configs} == {0.05}
    other = part_of(*start, "linear_scalarization", "--task-weights", "0.1", "0.9")
    assert other.name == "cityscapes2_mtan_weights_0.1_0.9"
    assert other.configs[0]["task_weights"] == [0.1, 0.9]


def test_hyperparameters_reach_their_methods():
    schedule = optax.constant_schedule(1e-3)
    weighted = METHODS["linear_scalarization"].build(
        2, Known("cityscapes2", 4, schedule, task_weights=(0.1, 0.9))
    )
    weights, _ = weighted.weighting.update(jnp.eye(2), weighted.weighting.init())
    np.testing.assert_allclose(weights, [0.1, 0.9], rtol=1e-6)
    # The gradient of g + lambda f is linear in lambda.
    losses, rows = jnp.array([1.0, 3.0]), jnp.eye(2)
    made = []
    for penalty in (None, 0.1, 0.2, 0.3):
        known = Known("cityscapes2", 4, schedule, penalty)
        rule = METHODS["ldc_mtl"].build(2, known)
        made.append(rule.update(rows, rule.init(jnp.zeros(2)), jnp.zeros(2), losses=losses)[0])
    np.testing.assert_allclose(made[0], made[1])  # the authors'
    np.testing.assert_allclose(made[3] - made[2], made[2] - made[1], rtol=1e-5)
    assert np.abs(made[3] - made[2]).min() > 0.01


@pytest.mark.slow
def test_a_last_batch_counts_no_scene_twice():
    """Metrics of 3 scenes in batches of 2 are those of the 3 scenes."""
    options, benchmark = tiny("cityscapes2"), BENCHMARKS["cityscapes2"]
    network = network_of(options, benchmark.tasks)
    source = data.make_up(benchmark, 3, options.size)
    params, stats = make_init(network)(jax.random.key(0))
    state = State(params, stats, None, None, jnp.zeros(2))
    row = evaluate(network, benchmark, state, source, options)
    batch = data.prepare(source.arrays)
    variables = {"params": params, "batch_stats": stats}
    predictions = network.apply(variables, batch["image"], False)
    defined = np.asarray(batch["depth"]) != 0
    error = np.abs(np.asarray(predictions["depth"]) - batch["depth"])[defined].mean()
    np.testing.assert_allclose(row[2], error, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dataset", "network"),
    [(name, network) for name, b in BENCHMARKS.items() for network in b.networks],
)
def test_every_network_is_trained_by_every_method(dataset, network, method):
    if network == "cross_stitch" and method == "gradnorm":
        pytest.skip("no layer is shared")
    options, benchmark = tiny(dataset, network), BENCHMARKS[dataset]
    raw = data.make_up(benchmark, 2, options.size).arrays
    training = make_training(options, benchmark.tasks, METHODS[method], 2, raw)
    state = training.init(jax.random.key(0))
    losses = []
    for step in range(12):
        keys = jax.random.split(jax.random.key(step))
        state, log = training.step(state, raw, keys)
        losses.append(np.asarray(log["losses"]))
    assert np.isfinite(losses).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert (np.mean(losses[-3:], axis=0) < np.mean(losses[:3], axis=0)).any()


def test_gradnorm_needs_a_shared_layer():
    with pytest.raises(ValueError, match="leave gradnorm out"):
        networks.last_shared_layer(networks.CrossStitch(NYU))
