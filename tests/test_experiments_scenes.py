"""The study of scenes: networks, loaders, losses and metrics, training, report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

from experiments.scenes import data, networks  # noqa: E402
from experiments.scenes.benchmarks import BENCHMARKS, LOSSES, count, measure  # noqa: E402

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
    return jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, False), x
    )


def number(params):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize("width", [64, 8])
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
    shared = [params[f"tower_{way}_{i}"]["conv"]["kernel"].shape[2:] for way in ("down", "up") for i in range(5)]
    assert shared == [
        *((64, 128), (128, 256), (256, 512), (512, 512), (512, 512)),
        *((64, 64), (128, 64), (256, 128), (512, 256), (512, 512)),
    ]
