"""The study of domains: lists and images, ResNet-18, separate batches, report."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

from PIL import Image  # noqa: E402

import jaxmtl  # noqa: E402
from experiments import resnet, weights  # noqa: E402
from experiments.claims import NO_DATA  # noqa: E402
from experiments.domains import __main__ as main  # noqa: E402
from experiments.domains import data, report, train  # noqa: E402
from experiments.domains.data import BENCHMARKS, Batch  # noqa: E402
from experiments.domains.methods import BASELINE, METHODS, make_direction  # noqa: E402
from experiments.domains.networks import Trunk, init_heads  # noqa: E402
from experiments.domains.published import TABLES  # noqa: E402
from experiments.domains.train import Options, make_training, merged, tasks_of  # noqa: E402
from experiments.methods import needs  # noqa: E402
from experiments.study import append_records, config_of, read_records  # noqa: E402

OFFICE = BENCHMARKS["office31"]

# --- lists and images -----------------------------------------------------------------------------


def write_images(root, benchmark, sizes=(3, 2, 2), shape=(9, 7)):
    """LibMTL's layout with random images, exact in spite of their names; returns the pixels."""
    rng = np.random.default_rng(0)
    made = {}
    for domain in benchmark.domains:
        for split, number in zip(data.SPLITS, sizes, strict=True):
            lines = []
            for i in range(number):
                name = f"{domain}/images/bike/{split}_{i:04}.jpg"
                made[name] = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(made[name]).save(root / name, "PNG")
                lines.append(f"{name} {(7 * i) % benchmark.classes}")
            path = root / "data_txt" / benchmark.lists / f"{domain}_{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return made


def triangle(size, out):
    """The matrix (out, size) of linear interpolation, averaging where it makes smaller."""
    scale = max(size / out, 1.0)
    place = (np.arange(out) + 0.5) * size / out
    weights_ = np.maximum(1 - abs(np.arange(size) + 0.5 - place[:, None]) / scale, 0)
    return weights_ / weights_.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_lists_and_images_are_read(tmp_path, name):
    benchmark = BENCHMARKS[name]
    assert tuple(sorted(benchmark.domains)) == benchmark.domains
    made = write_images(tmp_path, benchmark)
    splits = data.load(benchmark, tmp_path, None, 5, 2**20)
    assert tuple(splits) == ("train", "val", "test")
    with ThreadPoolExecutor() as pool:
        for split, number in zip(splits, (3, 2, 2), strict=True):
            assert tuple(splits[split]) == benchmark.domains
            for domain, images in splits[split].items():
                batch = images.read(np.arange(number)[::-1], pool)
                np.testing.assert_array_equal(batch.labels, np.arange(number)[::-1] * 7)
                assert batch.images.dtype == np.uint8
                for row, i in zip(batch.images, range(number)[::-1], strict=True):
                    pixels = made[f"{domain}/images/bike/{split}_{i:04}.jpg"]
                    expected = np.einsum("ih,jw,hwc->ijc", triangle(9, 5), triangle(7, 5), pixels)
                    assert abs(row - expected).max() < 1.01  # rounded twice
    x = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3) * 20
    expected = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(data.prepare(x), expected, rtol=1e-5, atol=1e-6)


def test_lists_may_lie_elsewhere_and_images_be_gray(tmp_path):
    write_images(tmp_path / "images", OFFICE)
    (tmp_path / "images" / "data_txt").rename(tmp_path / "lists")
    path = tmp_path / "images" / "amazon/images/bike/train_0000.jpg"
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(path, "PNG")
    splits = data.load(OFFICE, tmp_path / "images", tmp_path / "lists", 6, 0)
    with ThreadPoolExecutor() as pool:
        batch = splits["train"]["amazon"].read(np.array([0]), pool)
    np.testing.assert_array_equal(batch.images, np.full((1, 6, 6, 3), 99))


def test_decoded_images_are_kept_up_to_a_limit(tmp_path):
    write_images(tmp_path, OFFICE)
    size = 6 * 6 * 3
    splits = data.load(OFFICE, tmp_path, None, 6, 4 * size)
    domain = splits["train"]["amazon"]
    for path in [*domain.files, *splits["train"]["dslr"].files]:
        domain.cache.read(path, 6)
    assert domain.cache.size == sum(x.nbytes for x in domain.cache.kept.values()) == 4 * size
    kept = domain.files[0]
    before = domain.cache.read(kept, 6)
    kept.unlink()
    np.testing.assert_array_equal(domain.cache.read(kept, 6), before)


def first_list(root):
    return root / "data_txt" / "office-31" / "amazon_train.txt"


def edit(function):
    """Returns a change of the first list's text."""

    def apply(root):
        first_list(root).write_text(function(first_list(root).read_text()))

    return apply


def image_of(root):
    return root / "amazon/images/bike/train_0001.jpg"


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (lambda root: first_list(root).unlink(), FileNotFoundError, "pass --lists with where"),
        (edit(lambda text: text.replace(" 7", "")), ValueError, r"label in line 2 of .*write for"),
        (edit(lambda text: text.replace(" 7", " seven")), ValueError, "label in line 2"),
        (edit(lambda text: text.replace(" 7", " 31")), ValueError, "labels 0 to 30 .* got 31 in"),
        (edit(lambda text: text.replace(" 7", " -1")), ValueError, "labels 0 to 30 .* got -1 in"),
        (edit(lambda text: "\n"), ValueError, "a line per image"),
        (lambda root: first_list(root).write_bytes(b"\xff\xfe\x81"), ValueError, "expected text"),
        (
            lambda root: image_of(root).unlink(),
            FileNotFoundError,
            r"train_0001.jpg, which .* \(1 of 3 are missing\); unpack Office-31",
        ),
        (
            edit(lambda text: text + text.splitlines()[0] + "\n"),
            ValueError,
            "expected every image once",
        ),
        (
            lambda root: image_of(root).write_bytes(b"a web page"),
            ValueError,
            "expected a picture in .*train_0001.jpg",
        ),
        (
            lambda root: image_of(root).write_bytes(image_of(root).read_bytes()[:120]),
            ValueError,
            "fetch the file anew",
        ),
        (
            lambda root: Image.fromarray(np.full((4, 4), 900, np.uint16)).save(
                image_of(root), "PNG"
            ),
            ValueError,
            "picture of 8 bits in .*, got mode I;16",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, spoil, error, text):
    write_images(tmp_path, OFFICE)
    spoil(tmp_path)

    def read():
        splits = data.load(OFFICE, tmp_path, None, 4, 2**20)
        with ThreadPoolExecutor() as pool:
            splits["train"]["amazon"].read(np.arange(3), pool)

    with pytest.raises(error, match=text):
        read()


def test_an_image_of_the_test_list_is_not_trained_on(tmp_path):
    write_images(tmp_path, OFFICE)
    test = tmp_path / "data_txt" / "office-31" / "amazon_test.txt"
    test.write_text(test.read_text() + first_list(tmp_path).read_text())
    with pytest.raises(ValueError, match="must not be tested on"):
        data.load(OFFICE, tmp_path, None, 4, 2**20)


def test_a_missing_folder_says_what_to_pass():
    with pytest.raises(FileNotFoundError, match="amazon, dslr, webcam and data_txt, got none"):
        data.load(OFFICE, None, None, 4, 0)


def test_batches_are_endless_shuffled_passes():
    number, size = 11, 3
    taken = [data.order_of(number, size, step, (5, 1)) for step in range(9)]
    for run in range(3):  # three batches a pass, no image twice, two left out
        images = np.concatenate(taken[3 * run : 3 * run + 3])
        assert len(set(images)) == 9
        assert set(images) <= set(range(number))
    assert len({tuple(np.concatenate(taken[3 * i : 3 * i + 3])) for i in range(3)}) == 3
    assert {i for batch in taken for i in batch} == set(range(number))  # others are left out next
    np.testing.assert_array_equal(taken[4], data.order_of(number, size, 4, (5, 1)))
    other = [data.order_of(number, size, 0, seed) for seed in ((5, 2), (6, 1))]
    assert all((batch != taken[0]).any() for batch in other)


def test_domains_of_all_sizes_give_a_batch_each_step(tmp_path):
    write_images(tmp_path, OFFICE, (7, 2, 2))
    train_part = dict(data.load(OFFICE, tmp_path, None, 4, 2**20)["train"])
    small = train_part["dslr"]
    train_part["dslr"] = replace(small, files=small.files[:3], labels=small.labels[:3])
    assert data.check_batches(train_part, 2) == 3
    made = list(data.read_ahead(train_part, 2, range(3, 7), seed=4))
    assert len(made) == 4
    for step, batches in zip(range(3, 7), made, strict=True):
        for i, (name, domain) in enumerate(train_part.items()):
            index = data.order_of(len(domain.labels), 2, step, (4, i))
            np.testing.assert_array_equal(batches[name].labels, domain.labels[index])
            assert batches[name].images.shape == (2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"at least 4 images for a batch of dslr, got 3"):
        data.check_batches(train_part, 4)


# --- ResNet-18 ------------------------------------------------------------------------------------


def number(tree):
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def test_the_network_has_the_layers_described():
    trunk = Trunk()
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    z, variables = jax.eval_shape(lambda x: trunk.init_with_output(jax.random.key(0), x, False), x)
    assert z.shape == (2, 512)
    encoder = variables["params"]["encoder"]
    assert number(encoder) == 11_689_512 - 1000 * 513  # torchvision's resnet18 but for its fc
    assert number(variables["params"]) == number(encoder) + 512 * 513 + 2 * 512
    heads = jax.eval_shape(lambda key: init_heads(key, OFFICE.domains, 31, 512), jax.random.key(0))
    assert number(heads) == 3 * 513 * 31
    features, _ = jax.eval_shape(
        lambda x: resnet.resnet18().init_with_output(jax.random.key(0), x, False), x
    )
    assert features.shape == (2, 7, 7, 512)
    assert encoder["layer3_0"]["conv1"]["kernel"].shape == (3, 3, 128, 256)
    assert encoder["layer3_0"]["downsample_0"]["kernel"].shape == (1, 1, 128, 256)
    assert [name for name in encoder if "downsample_0" in encoder[name]] == [
        *("layer2_0", "layer3_0", "layer4_0")
    ]
    _, small = jax.eval_shape(
        lambda x: Trunk(width=8, depth=10).init_with_output(jax.random.key(0), x, False), x
    )
    assert small["params"]["hidden"]["kernel"].shape == (64, 64)


def torchvision_weights(width, blocks, rng):
    """A state dict in torchvision's names and shapes of a ResNet of basic blocks."""
    made = {}

    def layer(name, norm, out, into, size):
        made[f"{name}.weight"] = rng.normal(size=(out, into, size, size)) / (size * into**0.5)
        for part in ("weight", "bias", "running_mean", "running_var"):
            made[f"{norm}.{part}"] = rng.uniform(0.5, 1.5, out)

    layer("conv1", "bn1", width, 3, 7)
    into = width
    for stage, count in enumerate(blocks, 1):
        out = width * 2 ** (stage - 1)
        for i in range(count):
            at = f"layer{stage}.{i}"
            layer(f"{at}.conv1", f"{at}.bn1", out, into, 3)
            layer(f"{at}.conv2", f"{at}.bn2", out, out, 3)
            if i == 0 and stage > 1:
                layer(f"{at}.downsample.0", f"{at}.downsample.1", out, into, 1)
            into = out
    made["fc.weight"] = rng.normal(size=(1000, into))
    return made


def resnet_by_hand(arrays, x, blocks):
    """ResNet of basic blocks as PyTorch computes it, in float64, on (b, channels, h, w)."""

    def conv(x, name, stride=1):
        kernel = arrays[f"{name}.weight"]
        size = kernel.shape[-1]
        pad = size // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
        return np.einsum("bchwij,ocij->bohw", windows[:, :, ::stride, ::stride], kernel)

    def norm(x, name):
        scale, bias, mean, var = (
            arrays[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(norm(conv(x, "conv1", 2), "bn1"), 0)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    x = x.max(axis=(-1, -2))
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at, stride = f"layer{stage}.{i}", 2 if i == 0 and stage > 1 else 1
            y = np.maximum(norm(conv(x, f"{at}.conv1", stride), f"{at}.bn1"), 0)
            y = norm(conv(y, f"{at}.conv2"), f"{at}.bn2")
            if stride == 2:
                x = norm(conv(x, f"{at}.downsample.0", 2), f"{at}.downsample.1")
            x = np.maximum(x + y, 0)
    return x


def test_a_forward_pass_with_torchvision_weights_is_that_of_its_layers():
    rng = np.random.default_rng(0)
    blocks = (2, 1, 1, 2)
    arrays = torchvision_weights(3, blocks, rng)
    images = rng.normal(size=(2, 41, 64, 3))  # odd sizes: where padding matters
    net = resnet.resnet18(3, blocks)
    variables = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), False)
    )
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape), dict(variables))
    params, stats = (
        tree["encoder"]
        for tree in weights.load_encoder(
            {"encoder": blank["params"]}, {"encoder": blank["batch_stats"]}, arrays, "resnet18"
        )
    )
    apply = jax.jit(lambda variables, x: net.apply(variables, x, False))
    found = apply({"params": params, "batch_stats": stats}, jnp.float32(images))
    expected = resnet_by_hand(arrays, images.transpose(0, 3, 1, 2), blocks)
    assert found.shape == (2, 2, 2, 24)
    assert expected.std() > 0.1
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), expected, rtol=1e-3, atol=1e-4)
    used = {name for name in arrays if not name.startswith("fc")}
    assert len(jax.tree.leaves((params, stats))) == len(used)


def test_weights_of_another_network_are_refused():
    arrays = torchvision_weights(2, (1, 1, 1, 1), np.random.default_rng(0))
    init = train.make_init(Trunk(width=2), ("a",), 3)
    params, stats = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"layer1.1.* weights of torchvision's resnet18"):
        weights.load_encoder(params["shared"], stats, arrays, "resnet18")


# --- a step ---------------------------------------------------------------------------------------

DOMAINS = ("amazon", "dslr")


def tiny(**given):
    """Options of a network that compiles in seconds."""
    return Options(
        "office31",
        **main.SMALL
        | {"width": 2, "batch_size": 4, "made_up": main.MADE_UP, "learning_rate": 1e-3}
        | given,
    )


def made_up_batches(domains=DOMAINS):
    rng = np.random.default_rng(0)
    return {
        name: Batch(
            rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8),
            rng.integers(0, 31, 4).astype(np.int32),
        )
        for name in domains
    }


@pytest.fixture(scope="module")
def domains():
    """Two domains: losses, their rows, statistics."""
    trunk = Trunk(2, 10)
    losses = train.make_losses(trunk, DOMAINS, 31)
    params, stats = train.make_init(trunk, DOMAINS, 31)(jax.random.key(0))
    stats = jax.tree.map(lambda x: x + 0.3, stats)
    tasks = tasks_of(stats, made_up_batches(), jax.random.key(1))
    rows = jax.jit(jaxmtl.value_and_jacobian(losses, has_aux=True))
    (found, new), jacobian = rows(params, tasks)
    return trunk, losses, params, tasks, found, new, jacobian


@pytest.mark.slow
def test_a_loss_is_that_of_its_domain_alone(domains):
    """Values and the rows of last layers by NumPy; a domain's last layer is no other's."""
    trunk, _, params, tasks, found, _, jacobian = domains
    for i, name in enumerate(DOMAINS):
        z, head = features_of(trunk, params, tasks[name]), params["heads"][name]
        logits = z @ np.asarray(head["kernel"], np.float64) + head["bias"]
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels = tasks[name].batch.labels
        loss = -np.log(chances[np.arange(len(labels)), labels]).mean()
        np.testing.assert_allclose(found[name], loss, rtol=1e-5)
        errors = (chances - np.eye(31)[labels]) / len(labels)
        rows = jacobian["heads"][name]
        np.testing.assert_allclose(rows["kernel"][i], z.T @ errors, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(rows["bias"][i], errors.sum(axis=0), rtol=1e-3, atol=1e-6)
        assert not any(np.asarray(leaf[1 - i]).any() for leaf in rows.values())
        assert all(np.asarray(x[i]).any() for x in jax.tree.leaves(jacobian["shared"]["encoder"]))
        # Half of what the ReLU passes is dropped, and the rest doubled.
        assert 0.5 < (z == 0).mean() < 0.95


def test_initial_values_are_those_described(domains):
    _, _, params, *_ = domains
    hidden = params["shared"]["hidden"]  # 16 x 16
    assert abs(np.asarray(hidden["kernel"]).mean()) < 0.001
    np.testing.assert_allclose(np.asarray(hidden["kernel"]).std(), 0.005, rtol=0.15)
    assert (np.asarray(hidden["bias"]) == np.float32(0.1)).all()
    for head in params["heads"].values():
        for leaf in head.values():
            assert 0.8 * 16**-0.5 < np.abs(leaf).max() <= 16**-0.5
    first, second = params["heads"].values()
    assert (first["kernel"] != second["kernel"]).any()


@jax.jit
def trained(shared, task):
    """Returns features and statistics of the tiny network in training."""
    return Trunk(2, 10).apply(
        {"params": shared, "batch_stats": task.stats},
        data.prepare(task.batch.images),
        True,
        rngs={"dropout": task.key},
        mutable="batch_stats",
    )


def features_of(trunk, params, task):
    assert trunk == Trunk(2, 10)
    return np.asarray(trained(params["shared"], task)[0], np.float64)


def test_running_averages_take_in_one_domain_after_the_other(domains):
    """Against NumPy at the first BatchNorm, and against passes in turn at all of them."""
    _, _, params, tasks, _, new, _ = domains
    old = tasks["amazon"].stats
    found = merged(old, [new[name] for name in DOMAINS])
    kernel = np.asarray(params["shared"]["encoder"]["conv1"]["kernel"], np.float64)
    mean = np.asarray(old["encoder"]["bn1"]["norm"]["mean"], np.float64)
    var = np.asarray(old["encoder"]["bn1"]["norm"]["var"], np.float64)
    in_turn = old
    for name in DOMAINS:
        batch = tasks[name].batch
        x = (batch.images / 255 - np.array(data.MEAN)) / np.array(data.STD)
        x = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (7, 7), axis=(1, 2))[:, ::2, ::2]
        y = np.einsum("bhwcij,ijco->bhwo", windows, kernel)
        mean = 0.9 * mean + 0.1 * y.mean(axis=(0, 1, 2))
        var = 0.9 * var + 0.1 * y.var(axis=(0, 1, 2))
        _, changed = trained(params["shared"], tasks[name]._replace(stats=in_turn))
        in_turn = changed["batch_stats"]
    layer = found["encoder"]["bn1"]["norm"]
    np.testing.assert_allclose(layer["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer["var"], var, rtol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, in_turn
    )
    assert any(
        abs(np.asarray(a) - np.asarray(b)).max() > 1e-3
        for a, b in zip(*map(jax.tree.leaves, (found, new["dslr"])), strict=True)
    )


def test_dropout_draws_for_each_domain_alone():
    one = made_up_batches()
    tasks = tasks_of(None, one, jax.random.key(0))
    keys = [jax.random.key_data(tasks[name].key).tolist() for name in DOMAINS]
    assert keys[0] != keys[1]
    again = tasks_of(None, one, jax.random.key(0))
    assert keys[0] == jax.random.key_data(again["amazon"].key).tolist()


def test_every_method_takes_the_same_jacobian(domains):
    *_, found, _, jacobian = domains
    flat = np.concatenate(
        [np.reshape(x, (2, -1)) for x in jax.tree.leaves(jacobian["shared"])], axis=1
    )
    params = jnp.zeros(flat.shape[1])  # one leaf: less to compile
    losses = jnp.stack([found[name] for name in DOMAINS])

    @jax.jit
    def updates(rows, losses):
        made = {}
        for name, method in METHODS.items():
            aggregator = method.build(2, steps_per_epoch=3)
            made[name], _ = aggregator.update(
                rows,
                aggregator.init(params),
                params,
                losses=losses,
                key=jax.random.key(0),
                previous_batch_losses=losses,
            )
        return made

    for name, moved in jax.device_get(updates(flat, losses)).items():
        assert np.isfinite(moved).all(), name
        assert moved.any(), name
        # Within the span of the rows, but for the one that chooses coordinate by coordinate.
        if name != "graddrop":
            share, *_ = np.linalg.lstsq(flat.T, moved, rcond=None)
            np.testing.assert_allclose(flat.T @ share, moved, atol=1e-3 * abs(moved).max())


def test_moco_takes_the_rates_of_its_paper():
    """Two steps by NumPy: y and lambda by LibMTL's order, beta .5/sqrt(k), gamma .1/sqrt(k)."""
    rows = np.array([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]])
    losses = np.array([0.5, 1.5])
    y, share = np.zeros((2, 3)), np.full(2, 0.5)
    aggregator = METHODS["moco"].build(2)
    state, update_of = aggregator.init(jnp.zeros(3)), jax.jit(aggregator.update)
    for k in (1, 2):
        g = rows / np.linalg.norm(rows, axis=1, keepdims=True) * losses[:, None]
        y = y - 0.5 / np.sqrt(k) * (y - g)
        logits = share - 0.1 / np.sqrt(k) * (y @ y.T) @ share
        share = np.exp(logits) / np.exp(logits).sum()
        update, state = update_of(
            jnp.float32(rows), state, jnp.zeros(3), losses=jnp.float32(losses)
        )
        np.testing.assert_allclose(update, y.T @ share, rtol=1e-5)


ROUTES = {"famo": "none", "mgda": "Gramian", "moco": "coordinates"}


@pytest.fixture(scope="module")
def trainings():
    """The compiled whole step of each route."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BENCHMARKS, "office31", OFFICE._replace(domains=DOMAINS))
        return {name: make_training(tiny(), METHODS[name], 2) for name in ROUTES}


@pytest.mark.parametrize("name", ROUTES)
def test_a_compiled_step_of_each_route(domains, trainings, name):
    """What the first step takes from the rows, by NumPy; then the losses fall."""
    _, _, params, tasks, found, new, jacobian = domains
    assert needs(METHODS[name]) == ROUTES[name]
    state = trainings[name].init(jax.random.key(0))
    before = jax.tree.map(np.asarray, state.params)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    old = tasks["amazon"].stats
    state = state._replace(stats=jax.tree.map(jnp.copy, old))  # the step takes its buffers
    keys = jnp.stack([jax.random.key(1), jax.random.key(2)])  # the first as in ``domains``
    state, log = trainings[name].step(state, made_up_batches(), keys)
    losses = np.array([found[domain] for domain in DOMAINS])
    np.testing.assert_allclose(log["losses"], losses, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        state.stats,
        merged(old, [new[domain] for domain in DOMAINS]),
    )
    # Adam's average starts with a tenth of the gradient and the decay of LibMTL.
    average = np.asarray(optax.tree.get(state.optimizer, "mu"), np.float64)
    flat_params = np.concatenate([np.ravel(x) for x in jax.tree.leaves(before)])
    gradient = 10 * average - 1e-5 * flat_params
    rows = np.concatenate([np.reshape(x, (2, -1)) for x in jax.tree.leaves(jacobian)], axis=1)
    heads = np.concatenate(
        [np.full(x.size, path[0].key == "heads") for path, x in jax.tree.leaves_with_path(before)]
    )
    shared = np.float64(rows[:, ~heads])
    own = np.ones(2)  # last layers get the gradient of their own loss
    if name == "famo":  # but those that never look at gradients weigh them alike
        share = own = np.asarray(log["weights"])
        np.testing.assert_allclose(
            share / share.sum(), (1 / losses) / (1 / losses).sum(), rtol=1e-4
        )
    elif name == "mgda":
        gap = shared[1] - shared[0]
        share = np.clip(shared[1] @ gap / (gap @ gap), 0, 1) * np.array([1, -1]) + [0, 1]
        np.testing.assert_allclose(log["weights"], share, rtol=1e-3, atol=1e-4)
    else:
        scale = 0.5 * losses / np.linalg.norm(shared, axis=1)
        y = scale[:, None] * shared
        logits = 0.5 - 0.1 * (y @ y.T) @ [0.5, 0.5]
        share = scale * np.exp(logits) / np.exp(logits).sum()
    expected = np.where(heads, own @ rows, 0)
    expected[~heads] = share @ shared
    np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=1e-4 * abs(expected).max())

    for step in range(30):
        keys = jax.random.split(jax.random.key(step))
        state, log = trainings[name].step(state, made_up_batches(), keys)
    assert log["losses"].sum() < losses.sum()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    moved = jax.tree.map(lambda x, y: bool((np.asarray(y) != x).any()), before, state.params)
    assert all(jax.tree.leaves(moved))
    if name == "famo":
        assert (np.asarray(state.after) > 0).all()


def flops_of(fun, *args):
    """Of the program as it is traced; nothing is compiled."""
    return jax.jit(fun).lower(*args).cost_analysis()["flops"]


def shapes_of(trunk, names):
    """Shapes of parameters and of what a loss reads, at the size of the paper."""
    params, stats = jax.eval_shape(train.make_init(trunk, names, 31), jax.random.key(0))
    images = jax.ShapeDtypeStruct((64, 224, 224, 3), jnp.uint8)
    batch = Batch(images, jax.ShapeDtypeStruct((64,), jnp.int32))
    return params, train.Task(stats, batch, jax.eval_shape(lambda: jax.random.key(0)))


@pytest.mark.slow
def test_a_step_costs_the_gradients_of_the_domains_and_no_factor_m():
    """At the size of the paper: 64 images of 224 x 224 of each domain."""
    params, task = shapes_of(Trunk(), ("amazon",))
    forward = flops_of(train.make_losses(Trunk(), ("amazon",), 31)["amazon"], params, task)
    # ResNet-18 is published with 1.81 billion multiplications and additions at this size; those
    # with the zeros of the padding are not counted here.
    assert 1.65e9 < forward / 2 / 64 < 1.82e9

    trunk, m = Trunk(depth=10), len(DOMAINS)
    params, task = shapes_of(trunk, DOMAINS)
    losses = train.make_losses(trunk, DOMAINS, 31)
    single = flops_of(jax.value_and_grad(losses["amazon"], has_aux=True), params, task)
    n = number(params)
    for name in ("linear_scalarization", "mgda", "graddrop"):
        init, direction = make_direction(METHODS[name], losses, 2)
        step = flops_of(
            lambda p, s, t, k, direction=direction: direction(p, s, t, key=k),
            params,
            jax.eval_shape(init, params),
            dict.fromkeys(DOMAINS, task),
            task.key,
        )
        assert 0.99 * m * single < step < 1.01 * m * single + 20 * m**2 * n, name


# --- a run ----------------------------------------------------------------------------------------


def test_accuracy_counts_every_image_once(tmp_path):
    """By NumPy from the network's own answers; the last batch is not full."""
    write_images(tmp_path, OFFICE, (2, 7, 2), (32, 32))
    domain = data.load(OFFICE, tmp_path, None, 32, 2**20)["val"]["dslr"]
    options, trunk = tiny(), Trunk(2, 10)
    params, stats = train.make_init(trunk, DOMAINS, 31)(jax.random.key(0))
    state = train.State(params, stats, None, None, None)
    head = params["heads"]["dslr"]
    with ThreadPoolExecutor() as pool:
        images = domain.read(np.arange(7), pool).images
    apply = jax.jit(lambda variables, x: trunk.apply(variables, x, False))
    z = apply({"params": params["shared"], "batch_stats": stats}, data.prepare(images))
    answers = np.asarray(z @ head["kernel"] + head["bias"]).argmax(axis=-1)
    labels = np.where(np.arange(7) % 3 == 1, answers, (answers + 1) % 31)
    right = train.accuracy(options, state, "dslr", replace(domain, labels=labels.astype(np.int32)))
    assert right == round(100 * 2 / 7, 4)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit(tmp_path, capsys, monkeypatch, trainings):
    """A run cut after its first epoch and resumed is the whole one."""
    start = ["--smoke", "--methods", "moco", "--width", "2", "--batch-size", "4", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setitem(BENCHMARKS, "office31", OFFICE._replace(domains=DOMAINS))

    def compiled(options, method, steps):
        assert replace(options, epochs=2) == tiny()
        assert steps == 15  # of 60 made-up images of the first domain
        return trainings["moco"]

    monkeypatch.setattr(train, "make_training", compiled)
    main.study.main([*start, str(whole)])

    def stop(*args, **kwargs):
        if args[-1] == 1:
            raise KeyboardInterrupt
        return run_epoch(*args, **kwargs)

    run_epoch = train.run_epoch
    monkeypatch.setattr(train, "run_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        main.study.main([*start, str(cut)])
    monkeypatch.setattr(train, "run_epoch", run_epoch)
    (checkpoint,) = (cut / "domains" / "checkpoints").iterdir()
    with pytest.raises(SystemExit, match="drop --resume, or delete it"):
        main.study.main([*start, str(cut), "--resume", "--epochs", "3"])
    assert checkpoint.exists()
    capsys.readouterr()
    main.study.main([*start, str(cut), "--resume"])
    assert "resumed after 1 epochs" in capsys.readouterr().out
    assert not checkpoint.exists()  # what is recorded needs none
    records = [read_records(out / "domains" / "office31.jsonl") for out in (whole, cut)]
    for (record,) in records:
        for log in record["history"]:
            del log["seconds"]
    assert records[0] == records[1]
    (record,) = records[0]
    assert [len(log["test"]) for log in record["history"]] == [2, 2]
    best = np.argmax([np.mean(log["validation"]) for log in record["history"]])
    assert record["best_epoch"] == best + 1
    assert record["test_accuracy"] == record["history"][best]["test"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--weights", "a.pth", "--width", "8"], "with --width 64 and --depth 18"),
        (["--size", "16"], "at least 32 x 32"),
        (["--batch-size", "1"], "at least 2 images"),
        (["--epochs", "0"], "expected positive numbers"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, arguments, text):
    with pytest.raises(SystemExit, match=text):
        main.study.main([*arguments, "--out", str(tmp_path)])


# --- report ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_printed_tables_give_their_printed_delta_m(name):
    table = TABLES[name]
    base = np.array(table.values[BASELINE])
    assert len(base) == len(BENCHMARKS[name].domains)
    assert table.values.keys() == table.delta_m.keys() | {BASELINE}
    for method, printed in table.delta_m.items():
        made = np.mean(100 * (base - np.array(table.values[method])) / base)
        assert abs(made - printed) < 0.02, method


def write_records(folder, seeds=(0, 1), **changes):
    """Equal weights at 80, 90 and 50 percent; MoCo a tenth better, the others worse, MGDA most."""
    config = config_of(Options("office31", pretrained=True, **changes))
    gains = {BASELINE: 0.0, "moco": 0.1, "mgda": -0.2, "pcgrad": -0.1, "graddrop": -0.1}
    append_records(
        folder / "office31.jsonl",
        (
            {
                "method": method,
                "seed": seed,
                "config": config,
                "best_epoch": 5 + seed,
                "test_accuracy": [
                    base * (1 + gain + 0.001 * seed * (method == "moco")) for base in (80, 90, 50)
                ],
            }
            for method, gain in (gains | {"cagrad": -0.05}).items()
            for seed in seeds
        ),
    )


def test_delta_m_and_verdicts_are_worked_out_by_hand(tmp_path, capsys):
    write_records(tmp_path / "domains")
    found = report.read_found(tmp_path / "domains", "office31")
    np.testing.assert_allclose(found.drops("moco"), [-10, -10.1], rtol=1e-4)
    np.testing.assert_allclose(found.drops("mgda"), [20, 20], rtol=1e-4)
    claims = report.claims(tmp_path / "domains")
    assert [claim.verdict for claim in claims] == ["reproduced"] * 3 + [NO_DATA] * 3
    assert claims[0].ours == f"`moco` +10.05 ± 0.05 points below `{BASELINE}`"
    assert claims[0].paper == "-1.45 %"
    assert all("--dataset office_home --data-dir DIR --weights" in c.ours for c in claims[3:])
    main.study.main(["--report-only", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "84.22" in text
    assert "1 (moco) are better by more than the error" in text
    assert (tmp_path / "domains" / "office31.png").stat().st_size > 10_000


def test_one_seed_decides_nothing_and_options_are_told(tmp_path):
    write_records(tmp_path, seeds=(0,), size=64, max_steps=3)
    claims = report.claims(tmp_path)
    assert {claim.verdict for claim in claims[:3]} == {"not"}
    assert claims[0].differs.startswith(
        "size 64 in place of 224, max steps 3; seeds 1 in place of 3"
    )
    found = report.read_found(tmp_path, "office31")
    assert "one seed decides nothing" in report.conclusion_of(found)


def test_made_up_images_and_missing_records_are_no_data(tmp_path):
    write_records(tmp_path / "made_up", made_up=3)
    for folder in (tmp_path / "made_up", tmp_path / "none"):
        claims = report.claims(folder)
        assert len(claims) == 6
        assert {claim.verdict for claim in claims} == {NO_DATA}
        assert all("python -m experiments.domains --dataset office" in c.ours for c in claims)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [10, 18])
def test_every_network_is_trained_by_every_method(depth, method):
    training = make_training(tiny(depth=depth), METHODS[method], 2)
    state = training.init(jax.random.key(0))
    batches = made_up_batches(OFFICE.domains)
    losses = []
    for step in range(12):
        keys = jax.random.split(jax.random.key(step))
        state, log = training.step(state, batches, keys)
        losses.append(np.asarray(log["losses"]))
    assert np.isfinite(losses).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert (np.mean(losses[-3:], axis=0) < np.mean(losses[:3], axis=0)).any()
