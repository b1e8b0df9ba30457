"""Instance-wise training: the networks, the search, the steps, and a smoke run with its report."""

import io
import json
import zipfile
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from PIL import Image

nn = pytest.importorskip("flax.linen", reason="the extra `experiments` is not installed")

import jaxmtl  # noqa: E402
from experiments import timing  # noqa: E402
from experiments.claims import NO_DATA, VERDICTS  # noqa: E402
from experiments.images import (  # noqa: E402
    EUROSAT_CLASSES,
    load_local_images,
    load_tfds_images,
)
from experiments.iwrm import __main__ as iwrm  # noqa: E402
from experiments.iwrm import networks, search, train  # noqa: E402
from experiments.iwrm import report as iwrm_report  # noqa: E402
from experiments.study import append_records  # noqa: E402
from tests.problems import flat_rows  # noqa: E402


def linear_loss(params, example):
    x, target = example
    return (jnp.tanh(params["w"] @ x) @ params["v"] - target) ** 2


def linear_problem(m=6):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (4, 5)), "v": jax.random.normal(keys[1], (4,))}
    return params, (jax.random.normal(keys[2], (m, 5)), 3 * jax.random.normal(keys[3], (m,)))


# --- networks


def test_convolutions_and_maxima_are_what_xla_computes():
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (9, 8, 4))
    numbers = ("NHWC", "HWIO", "NHWC")
    dense = {"w": jax.random.normal(keys[1], (3, 3, 4, 6)), "b": jnp.arange(6.0)}
    expected = lax.conv_general_dilated(
        x[None], dense["w"], (1, 1), "VALID", dimension_numbers=numbers
    )
    np.testing.assert_allclose(networks.conv(x, dense), expected[0] + dense["b"], atol=1e-4)
    grouped = {"w": jax.random.normal(keys[2], (3, 3, 4, 2)), "b": jnp.arange(8.0)}
    expected = lax.conv_general_dilated(
        x[None],
        grouped["w"].reshape(3, 3, 1, 8),
        (1, 1),
        "VALID",
        dimension_numbers=numbers,
        feature_group_count=4,
    )
    # XLA's outputs of a channel are neighbors, ours are one for every channel, then the next.
    expected = expected[0].reshape(7, 6, 4, 2).swapaxes(2, 3).reshape(7, 6, 8) + grouped["b"]
    np.testing.assert_allclose(networks.depthwise(x, grouped), expected, atol=1e-4)
    np.testing.assert_array_equal(networks.pool(x, 3), nn.max_pool(x, (3, 3), (3, 3)))


# Features before the dense layers from tables 2 to 5, parameters counted by hand from them.
@pytest.mark.parametrize(
    ("name", "flat", "count"),
    [
        ("svhn", 512, 448 + 320 + 320 + 32832 + 650),
        ("cifar10", 1024, 896 + 640 + 640 + 131200 + 1290),
        ("eurosat", 1024, 896 + 640 + 640 + 131200 + 1290),
        ("mnist", 576, 320 + 18496 + 36928 + 73856 + 1290),
    ],
)
def test_networks_are_those_of_the_tables(name, flat, count):
    architecture = networks.ARCHITECTURES[name]
    params = networks.init(architecture, jax.random.key(0))
    assert architecture.flat() == flat
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    x = jax.ShapeDtypeStruct(architecture.shape, jnp.float32)
    assert jax.eval_shape(lambda x: networks.logits(architecture, params, x), x).shape == (10,)
    # Uniform within 1 / sqrt(fan-in): the largest of many draws is close to the bound.
    weights = params["dense"][0]["w"]
    assert 0.99 < float(jnp.abs(weights).max()) * np.sqrt(flat) <= 1


# --- the search of appendix C.1


def test_a_training_is_known_by_its_rate_before_and_after_it_is_recorded():
    """Rounded to six digits and then to five, some rates differ from those rounded to five."""
    rates = np.geomspace(1e-5, 100, 20_000).tolist()
    assert all(iwrm.key_of(1, r) == iwrm.key_of(1, iwrm.recorded(r)) for r in rates)
    assert any(f"{r:.5g}" != f"{iwrm.recorded(r):.5g}" for r in rates)


def test_full_search_tries_72_rates_around_the_two_best_of_each_seed():
    tried = [[], []]

    def evaluate(rates):
        best = (0.03, 2.0)
        areas = []
        for seed, rate in enumerate(rates):
            tried[seed].append(rate)
            areas.append(abs(np.log(rate / best[seed])))
        return areas

    search.search_fully(evaluate, 2)
    assert [len(rates) for rates in tried] == [72, 72]
    assert tried[0][0] == pytest.approx(1e-5)
    assert tried[0][21] == pytest.approx(1e2)
    # 0.03 lies between 10^(-5/3) and 10^(-4/3): a margin of one step beyond each.
    fine = np.array(tried[0][22:])
    assert (fine[0], fine[-1]) == pytest.approx((10**-2, 10**-1))
    np.testing.assert_allclose(np.diff(np.log10(fine)), 1 / 49)
    assert tried[1][22] == pytest.approx(10 ** (-1 / 3))


@pytest.mark.parametrize("start", [1e-3, 0.1, 10.0])
def test_climb_finds_the_best_coarse_rate_without_asking_twice(start):
    asked = []

    def area(rate):
        asked.append(rate)
        return np.inf if rate > 1 else (np.log10(rate) + 4 / 3) ** 2

    assert search.climb(area, start) == pytest.approx(10 ** (-4 / 3))
    assert len(asked) == len(set(asked)) < 10


def test_climb_says_when_nothing_trains():
    with pytest.raises(ValueError, match="expected a rate"):
        search.climb(lambda rate: np.inf, 1e-4)


# --- steps


# Without any optimization XLA computes what a maximum is compared with anew, and not bit for bit:
# no entry equals it, and its derivative is 0 / 0.
COMPILED = {"xla_backend_optimization_level": 1}
# The smallest images whose features are not empty.
SIDES = {"svhn": 14, "cifar10": 14, "eurosat": 26, "mnist": 14}
COLUMNS = 80_000  # as many as the largest of these networks has: a rule is compiled once for all


@cache
def rule_on_rows(name):
    """A rule of four examples as a compiled function of their rows and losses."""
    aggregator = iwrm.METHODS[name].make(4)

    def update(rows, losses):
        state = aggregator.init(rows[0])
        key = jax.random.key(0)
        return aggregator.update(rows, state, rows[0], losses=losses, key=key)[0]

    return jax.jit(update)


@pytest.mark.parametrize("network", networks.ARCHITECTURES)
def test_every_method_takes_the_jacobian_of_every_network(network):
    architecture = networks.ARCHITECTURES[network]
    architecture = architecture._replace(shape=(*[SIDES[network]] * 2, architecture.shape[-1]))
    params = networks.init(architecture, jax.random.key(0))
    batch = jax.random.normal(jax.random.key(1), (4, *architecture.shape)), jnp.arange(4)
    loss = train.make_loss(architecture)
    of_rows = jaxmtl.value_and_jacobian(loss, in_axes=(None, 0))
    losses, jacobian = jax.jit(of_rows, compiler_options=COMPILED)(params, batch)
    flat = flat_rows(jacobian)
    # The slope of a loss along its own row, by differences.
    moved = jax.tree.map(lambda x, row: x + 1e-2 * row[2], params, jacobian)
    ahead = jax.jit(loss)(moved, jax.tree.map(lambda x: x[2], batch))
    assert (ahead - losses[2]) / 1e-2 == pytest.approx(flat[2] @ flat[2], rel=0.2)
    rows = jnp.asarray(np.pad(flat, ((0, 0), (0, COLUMNS - flat.shape[1]))))
    for name in iwrm.METHODS:
        update = np.asarray(rule_on_rows(name)(rows, losses))[: flat.shape[1]]
        assert np.isfinite(update).all(), name
        assert update.any(), name
        if name != "graddrop":  # which chooses coordinate by coordinate
            weights, *_ = np.linalg.lstsq(flat.T, update, rcond=None)
            error = np.abs(flat.T @ weights - update).max()
            assert error < 1e-3 * np.abs(update).max(), name


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["kmnist", "eurosat/rgb", "svhn_cropped", "cifar10"])
def test_every_network_is_trained_by_every_method(dataset):
    options = train.Options(dataset, 8, 4, examples=8)
    shape = networks.ARCHITECTURES[train.NETWORKS[dataset]].shape
    images = jax.random.normal(jax.random.key(0), (1, 8, *shape))
    keys, labels = jax.random.split(jax.random.key(1), 1), jnp.arange(8)[None]
    for names in train.programs(list(iwrm.METHODS)):
        args = jnp.ones(1), keys, images, labels
        lowered = train.make_train(options, shape, names).lower(0, *args)
        trained = lowered.compile(compiler_options=COMPILED)
        for i, name in enumerate(names):
            rate = jnp.full(1, 0.3 * search.STARTS[name])
            curves = trained(i, rate, *args[1:])
            loss = np.asarray(curves["loss"][0])
            assert np.isfinite(loss).all(), name
            assert loss[-1] < loss[0], name


@pytest.mark.slow
def test_the_shared_program_takes_every_rules_own_step():
    params, batch = linear_problem()
    (weighted, *single) = train.programs(list(iwrm.METHODS))
    assert len(weighted) == 12
    assert single == [("graddrop",)]
    aggregators = [iwrm.METHODS[name].make(6) for name in weighted]
    states = tuple(aggregator.init(params) for aggregator in aggregators)
    key = jax.random.key(3)
    direction = jax.jit(train.weighted_direction(aggregators, linear_loss))
    losses, jacobian = jaxmtl.value_and_jacobian(linear_loss, in_axes=(None, 0))(params, batch)
    rows = flat_rows(jacobian)
    for i, aggregator in enumerate(aggregators):
        found, update, similarity, _ = direction(i, params, states, batch, key)
        expected, _ = aggregator.update(
            jacobian, aggregator.init(params), params, losses=losses, key=key
        )
        flat = flat_rows(expected, 0)
        ours = flat_rows(update, 0)
        np.testing.assert_allclose(ours, flat, atol=1e-3 * np.abs(flat).max(), err_msg=weighted[i])
        mean = rows.mean(axis=0)
        cosine = flat @ mean / np.linalg.norm(flat) / np.linalg.norm(mean)
        np.testing.assert_allclose(similarity, cosine, atol=2e-3, err_msg=weighted[i])
        np.testing.assert_allclose(found, losses, rtol=1e-5)


@pytest.mark.slow
def test_the_rule_of_coordinates_takes_its_step_and_cosine():
    params, batch = linear_problem()
    aggregator, key = jaxmtl.graddrop(), jax.random.key(3)
    direction = train.coordinate_direction([aggregator], linear_loss)
    _, update, similarity, _ = direction(0, params, (aggregator.init(params),), batch, key)
    _, jacobian = jaxmtl.value_and_jacobian(linear_loss, in_axes=(None, 0))(params, batch)
    expected, _ = aggregator.update(jacobian, aggregator.init(params), params, key=key)
    flat, mean = (
        flat_rows(tree, 0)
        for tree in (expected, jax.tree.map(lambda rows: rows.mean(axis=0), jacobian))
    )
    jax.tree.map(np.testing.assert_array_equal, update, expected)
    cosine = flat @ mean / np.linalg.norm(flat) / np.linalg.norm(mean)
    np.testing.assert_allclose(similarity, cosine, rtol=1e-5)


def test_timed_steps_of_the_mean_are_those_of_sgd_on_every_route():
    params, batch = linear_problem()
    rows = jaxmtl.Aggregator  # an aggregator by the Jacobian alone, as GradDrop's
    mean = jaxmtl.linear_scalarization()
    by_rows = rows(mean.init, mean.update)
    steps = []
    for rule in (None, mean, by_rows):
        step = timing.make_step(linear_loss, rule, in_axes=(None, 0))
        steps.append(step(params, rule.init(params) if rule else (), batch)[2])
    assert by_rows.weighting is None
    for step in steps[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), step, steps[0])


# --- data and the whole


def test_subsets_differ_by_seed():
    setting = train.Options("digits", 1, examples=8)
    (a, labels), (b, _) = (train.subset(setting, None, seed) for seed in (1, 2))
    assert labels.shape == (8,)
    assert a.shape == (8, 16, 16, 1)
    assert not np.array_equal(a, b)
    images, _ = train.load("digits", None)
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-4)


def jpeg(color, side=64):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_eurosat(folder, archive=False, **files):
    """Writes an image of each class, and these files in place of or beside them."""
    made = {f"2750/{name}/{name}_1.jpg": jpeg((0, 255, 0)) for name in EUROSAT_CLASSES}
    made = {name: content for name, content in (made | files).items() if content is not None}
    if archive:
        with zipfile.ZipFile(folder / "EuroSAT.zip", "w") as file:
            for name, content in made.items():
                file.writestr(name, content)
        return
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("archive", [True, False])
def test_eurosat_is_read_from_a_zip_or_a_tree_of_classes(tmp_path, archive):
    more = {"2750/River/River_2.jpg": jpeg((0, 0, 255)), "2750/SeaLake/a.JPEG": jpeg((255, 0, 0)),
            "2750/readme.txt": b"-", "previews/a.jpg": b"-"}  # fmt: skip
    write_eurosat(tmp_path, archive, **more)
    found = load_local_images("eurosat/rgb", str(tmp_path))
    assert found.images.shape == (12, 64, 64, 3)
    np.testing.assert_array_equal(found.labels, [*range(9), 8, 9, 9])  # by alphabet
    np.testing.assert_array_equal(found.images.argmax(axis=-1)[:, 32, 32], [1] * 9 + [2, 1, 0])
    if archive:
        again = load_local_images("eurosat/rgb", str(tmp_path / "EuroSAT.zip"))
        np.testing.assert_array_equal(again.labels, found.labels)
    normalized, labels = train.load("eurosat/rgb", str(tmp_path))
    np.testing.assert_allclose(normalized.mean(axis=(0, 1, 2)), 0, atol=1e-3)
    assert labels.shape == (12,)


def gray_jpeg():
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 9).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"2750/River/River_1.jpg": jpeg((9, 9, 9), 32)}, "expected images of one size"),
        ({"2750/River/River_1.jpg": None}, "each of EuroSAT's ten classes .* none of River;"),
        ({"2750/River/River_1.jpg": b"no"}, "a picture in .*River_1.jpg, got one that Pillow"),
        ({"2750/River/River_1.jpg": jpeg((9, 9, 9))[:400]}, "River_1.jpg, got one that Pillow"),
        ({"2750/River/River_1.jpg": gray_jpeg()}, "a picture in colors in .*, got mode L; take"),
        ({"River.zip": b"no"}, "expected a zip in .*River.zip, got another file; fetch"),
    ],
)
def test_wrong_files_of_eurosat_say_what_is_wrong(tmp_path, files, words):
    write_eurosat(tmp_path, **files)
    with pytest.raises(ValueError, match=words):
        load_local_images("eurosat/rgb", str(tmp_path))


def test_images_of_another_size_than_the_networks_are_refused(tmp_path):
    """Networks fit any size: 32 x 32 files would train, and say nothing about EuroSAT."""
    write_eurosat(tmp_path, **{f"2750/{n}/{n}_1.jpg": jpeg((9, 9, 9), 32) for n in EUROSAT_CLASSES})
    with pytest.raises(
        ValueError, match=r"expected images of .*\(64, 64, 3\) .* got \(32, 32, 3\)"
    ):
        train.load("eurosat/rgb", str(tmp_path))


def write_kmnist(folder, part="train", images=None, labels=None):
    images = np.zeros((6, 28, 28), np.uint8) if images is None else images
    labels = np.arange(len(images), dtype=np.uint8) if labels is None else labels
    np.savez(folder / f"kmnist-{part}-imgs.npz", images)
    np.savez(folder / f"kmnist-{part}-labels.npz", labels)


def test_kuzushiji_is_read_from_its_own_files_and_the_training_part_comes_first(tmp_path):
    assert load_local_images("kmnist", str(tmp_path)) is None
    assert load_local_images("kmnist", None) is None
    assert load_local_images("mnist", str(tmp_path)) is None  # TFDS's business
    write_kmnist(tmp_path, "test", np.zeros((4, 28, 28), np.uint8))
    found = load_local_images("kmnist", str(tmp_path))
    assert found.images.shape == (4, 28, 28)
    assert found.labels.dtype == np.int32
    write_kmnist(tmp_path)
    assert len(load_local_images("kmnist", str(tmp_path)).labels) == 6


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": np.zeros(5, np.uint8)}, "expected one label for each image"),
        ({"labels": np.zeros((6, 1), np.uint8)}, r"shape \(n\) in .*labels.npz, got \(6, 1\)"),
        ({"labels": np.full(6, 48, np.uint8)}, "labels 0 to 9 in .*, got 48; .*Kuzushiji-49"),
        ({"labels": np.zeros(6)}, "type uint8 in .*labels.npz, got float64"),
        ({"images": np.zeros((6, 32, 32), np.uint8)}, r"shape \(n, 28, 28\) .* got \(6, 32, 32\)"),
        ({"images": np.zeros((6, 28, 28))}, "type uint8 in .*imgs.npz, got float64"),
    ],
)
def test_wrong_arrays_of_kuzushiji_say_what_is_wrong(tmp_path, arrays, words):
    write_kmnist(tmp_path, **arrays)
    with pytest.raises(ValueError, match=words):
        load_local_images("kmnist", str(tmp_path))


def test_wrong_files_of_kuzushiji_say_what_is_wrong(tmp_path):
    path = tmp_path / "kmnist-train-imgs.npz"
    write_kmnist(tmp_path)
    np.savez(path, images=np.zeros((6, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"one array, arr_0, in .*imgs.npz, got .'images'.;"):
        load_local_images("kmnist", str(tmp_path))
    whole = path.read_bytes()
    np.save(buffer := io.BytesIO(), np.zeros(3))
    for content in (b"no", b"", whole[: len(whole) // 2], buffer.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected arrays .* in .*imgs.npz, got another file"):
            load_local_images("kmnist", str(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*imgs.npz beside kmnist-train-labels"):
        load_local_images("kmnist", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kmnist", "expected kmnist-.train,test.-.imgs,labels..npz, or TFDS's folder kmnist in"),
        ("eurosat/rgb", "expected a zip, or folders by class, of .* or TFDS's folder eurosat/rgb"),
        ("mnist", "expected TFDS's folder mnist in .* leave --data-dir away to download by TFDS"),
    ],
)
def test_a_folder_without_the_set_is_no_reason_to_download(tmp_path, name, words):
    with pytest.raises(FileNotFoundError, match=words):
        train.load(name, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected .*nowhere"):
        train.load(name, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("set_", ["mnist/3.0.1", "eurosat/rgb/2.0.0"])
def test_a_folder_of_tfds_is_read_by_tfds(tmp_path, monkeypatch, set_):
    """It has the set, or another one: then TFDS downloads to it, as its users expect."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `data` is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / set_).mkdir(parents=True)
    (tmp_path / set_ / "dataset_info.json").write_text("{}")

    class Source:
        def __len__(self):
            return 2

        def __getitems__(self, keys):
            return [{"image": np.full((28, 28, 1), key, np.uint8), "label": key} for key in keys]

    asked = []
    monkeypatch.setattr(
        tfds, "data_source", lambda name, **keywords: asked.append((name, keywords)) or Source()
    )
    images, labels = load_tfds_images("mnist", "train", data_dir=str(tmp_path))
    assert asked == [("mnist", {"split": "train", "data_dir": str(tmp_path)})]
    assert images.shape == (2, 28, 28)
    np.testing.assert_array_equal(labels, [0, 1])


@pytest.mark.parametrize(
    ("name", "network", "shape"),
    [
        ("kmnist", "mnist", (28, 28, 1)),
        ("eurosat/rgb", "eurosat", (64, 64, 3)),
        ("svhn_cropped", "svhn", (32, 32, 3)),
        ("cifar10", "cifar10", (32, 32, 3)),
    ],
)
def test_every_data_set_has_the_network_of_its_table(name, network, shape):
    assert train.NETWORKS[name] == network
    assert networks.ARCHITECTURES[network].shape == shape
    options = train.Options(name, 2, 4, examples=8)
    curves = jax.eval_shape(
        train.make_train(options, shape, ("upgrad",)),
        0,
        jnp.ones(1),
        jax.random.split(jax.random.key(0), 1),
        jnp.zeros((1, 8, *shape)),
        jnp.zeros((1, 8), int),
    )
    assert curves["loss"].shape == (1, 2)
    epochs = {"kmnist": 10, "eurosat/rgb": 30, "svhn_cropped": 25, "cifar10": 20}  # table 6
    main = [p.options for p in iwrm.PAPER.values() if p.options[0].optimizer == "sgd"]
    assert (train.Options(name, epochs[name]),) in main


def test_a_data_set_without_a_network_is_not_given_another_ones():
    with pytest.raises(KeyError):
        train.make_train(train.Options("imagenet", 1), (28, 28, 1), ("mean",))


def test_smoke_run_is_resumed_reported_and_judged(tmp_path, capsys):
    arguments = ["--smoke", "--out", str(tmp_path)]
    iwrm.study.main(arguments)
    results = tmp_path / "iwrm" / "mnist.jsonl"
    lines = results.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {(r["aggregator"], r["seed"]) for r in records} == {
        (name, seed) for name in ("mean", "upgrad") for seed in (1, 2)
    }
    for record in records:
        assert len(record["loss"]) == len(record["cosine"]) == record["setting"]["epochs"]
        np.testing.assert_allclose(record["area"], np.mean(record["loss"]), rtol=1e-3)
        if record["aggregator"] == "mean":
            np.testing.assert_allclose(record["cosine"], 1, atol=1e-3)
    for name, best in iwrm_report.best_of(records, records[0]["setting"]).items():
        assert [record["seed"] for record in best] == [1, 2]
        for record in best:
            assert record["loss"][-1] < record["loss"][0]
            areas = {
                round(3 * np.log10(r["learning_rate"])): r["area"] or np.inf
                for r in records
                if (r["aggregator"], r["seed"]) == (name, record["seed"])
            }
            place = round(3 * np.log10(record["learning_rate"]))
            assert areas[place] <= min(areas[place - 1], areas[place + 1])  # the search went on

    results.write_text("\n".join(lines[:-2]) + "\n")
    iwrm.study.main([*arguments, "--resume"])
    again = [json.loads(line) for line in results.read_text().splitlines()]
    timeless = [{k: v for k, v in r.items() if k != "seconds"} for r in (*records, *again)]
    assert timeless[: len(records)] == timeless[len(records) :]

    figure = tmp_path / "iwrm" / "mnist.png"
    figure.unlink()
    capsys.readouterr()
    iwrm.study.main(["--report-only", "--out", str(tmp_path)])
    assert figure.stat().st_size > 10_000
    assert "upgrad" in capsys.readouterr().out
    found = iwrm.claims(tmp_path / "iwrm")
    assert found
    assert all(claim.verdict in VERDICTS for claim in found)


def test_report_without_results_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="expected results in"):
        iwrm.study.main(["--report-only", "--out", str(tmp_path)])


def record_of(aggregator, seed, final, area, batch_size=32):
    setting = {"dataset": "mnist", "epochs": 2, "batch_size": batch_size, "optimizer": "sgd"}
    return {
        "setting": setting | {"examples": 1024},
        "aggregator": aggregator,
        "seed": seed,
        "learning_rate": 0.1 * area,
        "loss": [2 * area, final],
        "cosine": [0.5, 0.8],
        "area": area,
        "final_loss": final,
    }


def test_verdicts_follow_the_records_at_the_best_rate_of_each_seed(tmp_path):
    def verdicts(upgrad_final, upgrad_area):
        folder = tmp_path / f"{upgrad_final}-{upgrad_area}"
        records = [record_of("mean", seed, 0.5, 1.0) for seed in (1, 2)]
        records += [record_of("mean", 1, 0.1, 1.5)]  # a worse rate: its end does not count
        records += [record_of("upgrad", seed, upgrad_final, upgrad_area) for seed in (1, 2)]
        append_records(folder / "mnist.jsonl", records)
        return [c.verdict for c in iwrm_report.claims(folder) if "faster" in c.claim]

    assert verdicts(0.4, 0.9) == ["reproduced"]
    assert verdicts(0.4, 1.1) == ["partly"]
    assert verdicts(0.6, 1.1) == ["not"]


def test_the_lead_must_grow_with_the_batch(tmp_path):
    def verdict(*leads):
        folder = tmp_path / str(leads)
        for batch_size, lead in zip((4, 16, 64), leads, strict=True):
            records = [record_of("mean", seed, 0.5, 1.0, batch_size) for seed in (1, 2)]
            records += [record_of("upgrad", s, 0.4, 1.0 / lead, batch_size) for s in (1, 2)]
            append_records(folder / "batch_size.jsonl", records)
        (claim,) = iwrm_report.claims(folder)
        return claim.verdict

    assert verdict(1.05, 1.5, 2.0) == "reproduced"
    assert verdict(1.5, 1.01, 2.0) == "partly"
    assert verdict(2.0, 1.5, 1.1) == "partly"  # two seeds, but neither growth nor a start near 1


def test_one_seed_never_makes_a_claim_reproduced(tmp_path):
    records = [record_of("mean", 1, 0.5, 1.0), record_of("upgrad", 1, 0.1, 0.5)]
    append_records(tmp_path / "mnist.jsonl", records)
    (faster,) = [c for c in iwrm_report.claims(tmp_path) if "faster" in c.claim]
    assert faster.verdict == "partly"
    assert "one seed" in faster.ours


def test_svhn_is_not_runnable_until_it_has_records_and_rates_are_counted(tmp_path):
    tried = [record_of("mean", 1, 0.5, 1 + 0.01 * i) for i in range(30)]  # more than a walk tries
    append_records(tmp_path / "mnist.jsonl", [*tried, record_of("upgrad", 1, 0.1, 0.5)])
    made = iwrm_report.claims(tmp_path)
    assert [c.claim for c in made if c.verdict == NO_DATA] == [
        "svhn_cropped: UPGrad is the best of eleven aggregators, DualProj better than the mean",
        "svhn_cropped: with Adam UPGrad beats the mean, by less than with SGD",
    ]
    assert made[0].differs.startswith(
        "seeds 1 in place of 8; a walk over 22 coarse rates in place of 72 but in 1 of 2 searches"
    )
    for part in ("svhn", "adam_svhn"):
        append_records(tmp_path / f"{part}.jsonl", tried)
    assert NO_DATA not in {c.verdict for c in iwrm_report.claims(tmp_path)}


def test_times_of_every_rule_stand_beside_table_7():
    def record(name):
        row = {"network": "mnist", "aggregator": name, "seconds_per_epoch": 3.0}
        return row | {"time_ratio": 1.0, "flops_ratio": None}

    table = iwrm_report.make_time_table([record(name) for name in iwrm.METHODS])
    assert len(table.rows) == 15
    assert table.rows[-1][-1] == "4.04"  # 1.90 / 0.47


def test_each_form_of_the_ridge_is_ranked_against_the_other_rules_alone(tmp_path):
    """The paper has one UPGrad and one DualProj: other forms of them are no rivals."""
    areas = {"upgrad_ridge": 0.8, "upgrad_ridge_largest": 0.7, "dual_proj_ridge_largest": 0.75}
    areas |= dict.fromkeys(("upgrad", "dual_proj", "dual_proj_ridge"), 0.1)
    areas |= {name: 0.9 for name in iwrm.METHODS if name not in areas}
    append_records(
        tmp_path / "mnist.jsonl", [record_of(n, s, a, a) for n, a in areas.items() for s in (1, 2)]
    )
    best = {c.claim: c for c in iwrm_report.claims(tmp_path) if c.claim.endswith("is the best")}
    ours = {name: claim.ours.partition(" by area")[0] for name, claim in best.items()}
    assert ours == {
        "mnist: UPGrad with the paper's ridge is the best": "rank 1 of 11",
        "mnist: UPGrad with a ridge of the trace is the best": "rank 2 of 11",
    }


@pytest.mark.parametrize(
    ("areas", "end"),
    [([0.9, 1.9], "(1.4000 ± 0.5000; mean 1.5000 ± 0.5000)."), ([0.6, 2.2], "undecided).")],
)
def test_the_conclusion_is_undecided_within_the_error_of_the_pairs(tmp_path, areas, end):
    records = [record_of("mean", seed, a, a) for seed, a in enumerate([1.0, 2.0])]
    records += [record_of("upgrad", seed, a, a) for seed, a in enumerate(areas)]
    records += [record_of("pcgrad", seed, 3.0, 3.0) for seed in (0, 1)]
    append_records(tmp_path / "mnist.jsonl", records)
    found = iwrm_report.report(tmp_path, None).conclusion
    assert "mnist: upgrad (" in found
    assert found.endswith(end)
