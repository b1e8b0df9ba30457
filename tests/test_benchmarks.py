"""The benchmarks run, and their counts are what is known of the routes."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the extra `experiments` is not installed")
pytest.importorskip("rich", reason="the extra `experiments` is not installed")

import jaxmtl
from experiments.benchmarks import accelerator, prices, solvers
from experiments.benchmarks.models import MODELS
from experiments.timing import make_step

pytestmark = pytest.mark.xdist_group("benchmarks")


@pytest.mark.slow
def test_prices_of_a_dense_network():
    """Two thirds of a gradient are the backward pass; loss rules, separate data pay one."""
    m = 4
    records = prices.measure(["mlp"], [m])
    price = {r["route"]: r["gradients"] for r in records}
    assert set(price) == set(prices.steps(prices.mlp(), m))
    assert price["gradient"] == 1
    assert price["plain"] == price["losses"] == 1
    assert abs(price["Jacobian"] / ((1 + 2 * m) / 3) - 1) < 0.03
    assert 1 < price["encoder"] < 1.05
    assert 1 < price["separate"] < 1.1
    # Of the solver the 24 steps of splitting count, two products more for their start and factor.
    splitting = 26 * 2 * 64**3 / (6 * 64 * 3 * 256**2)
    assert price["per example"] < 1.35 + splitting
    assert price["no Jacobian"] < 1 + 1.3 * m
    table = prices.table(records)
    assert f"| mlp, m = {m} |" in table
    assert table.count("\n") == 1 + len(price)


def test_every_kind_of_network_has_finite_losses():
    for name, make in prices.KINDS.items():
        step, args, _ = prices.steps(make(), 2)["gradient"]
        for leaf in jax.tree.leaves(jax.jit(step)(*args)):
            assert np.all(np.isfinite(leaf)), name


@pytest.mark.slow
def test_compile_times_are_divided_by_those_of_the_gradient(capsys):
    prices.main(["--kinds", "mlp", "--tasks", "2", "--compile", "1"])
    table = capsys.readouterr().out.split("the gradient step's = 1")[1]
    found = dict(re.findall(r"^\| ([\w ]+) \| ([\d.]+ / [\d.]+) \|$", table, re.MULTILINE))
    assert found.pop("gradient") == "1.00 / 1.00"
    assert set(found) | {"gradient"} == set(prices.steps(prices.mlp(), 2))
    assert all(float(text.split(" / ")[0]) > 0 for text in found.values())


@pytest.mark.slow
def test_1024_examples_take_little_memory_and_none_is_harmed():
    """A whole step of UPGrad on the MLP 784-512x3-10; all rows would be 4 GB."""
    model = MODELS["mlp"]()
    x, y = model.batch(1024)
    rule, axes = jaxmtl.upgrad(), (None, 0, 0)
    args = model.params, rule.init(model.params), x, y
    step = make_step(model.loss, rule, rate=1.0, in_axes=axes)
    executable = jax.jit(step).lower(*args).compile()
    assert executable.memory_analysis().temp_size_in_bytes < 100e6
    *_, moved = executable(*args)
    direction = jax.tree.map(np.subtract, model.params, moved)

    def losses(params):
        return jax.vmap(model.loss, axes)(params, x, y)

    values, change = jax.jvp(losses, (model.params,), (direction,))
    assert np.all(np.isfinite(values))
    assert np.max(change) > 0
    assert np.min(change) > -1e-4 * np.max(change)  # rounding of float32


@pytest.mark.slow
def test_the_command_for_an_accelerator(tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    accelerator.main(["--smoke", "--parts", "precision", "solvers", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(record["device"].startswith("cpu") for record in records)
    assert "device: cpu" in capsys.readouterr().out
    errors = [r["error"] for r in records if r["part"] == "precision"]
    assert len(errors) == 2
    assert all(1e-9 < error < 1e-6 for error in errors), "rounding of float32, and no more"
    found = [r for r in records if r["part"] == "solvers"]
    assert [(r["tasks"], r["dtype"]) for r in found] == [
        (m, dtype) for m in (2, 8) for dtype in ("float32", "float64")
    ]
    assert all(r["residual_in_eps"] < 100 for r in found)


@pytest.mark.slow
def test_the_table_of_the_guide():
    """Operations are exact; memory depends on the compiler's flags."""
    page = Path(__file__).parents[1] / "notebooks" / "guide" / "routes.md"
    memory = re.compile(r" \([\d.]+ MB\)")
    table = prices.table(prices.measure(list(prices.KINDS), [4]))
    assert memory.sub("", table) in memory.sub("", page.read_text())


@pytest.mark.slow
def test_all_parts_for_an_accelerator(tmp_path):
    out = tmp_path / "records.jsonl"
    accelerator.main(["--smoke", "--out", str(out)])
    parts = {json.loads(line)["part"] for line in out.read_text().splitlines()}
    assert parts == set(accelerator.PARTS)


@pytest.mark.slow
def test_gramians_of_the_solvers_benchmark():
    with jax.enable_x64(True):
        found = solvers.unit_gramians(8, 1, 0)
    assert tuple(found) == solvers.KINDS
    for kind, grams in found.items():
        np.testing.assert_allclose(np.diagonal(grams[0]), 1, err_msg=kind)
        rank = np.linalg.matrix_rank(grams[0])
        assert rank == (2 if kind == "rank m/4" else 8), kind
