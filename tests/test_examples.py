"""The four examples train one model alike, by name; losses by name are never stacked silently."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmtl

pytest.importorskip("flax", reason="the extra `experiments` is not installed")
pytest.importorskip("sklearn", reason="the extra `experiments` is not installed")
pytest.importorskip("equinox", reason="the extra `experiments` is not installed")

from experiments.examples import (
    _problem,
    equinox_modules,
    flax_linen,
    flax_nnx,
    plain_pytrees,
)
from experiments.examples._named import by_task, stack_losses
from experiments.examples._problem import Batch
from tests.problems import flat_rows, some

ROOT = Path(__file__).parents[1]
TASKS = _problem.TASKS
STEPS, SEEDS = 12, 2
TRAIN = {
    "plain": plain_pytrees.train,
    "plain without Jacobian": plain_pytrees.train_without_jacobian,
    "linen": flax_linen.train,
    "nnx": flax_nnx.train,
    "equinox": equinox_modules.train,
}

pytestmark = pytest.mark.xdist_group("examples")


@functools.cache
def logs(name):
    return _problem.train_seeds(TRAIN[name], STEPS, SEEDS)


@pytest.mark.parametrize("other", some(["nnx", "linen", "equinox", "plain without Jacobian"]))
def test_the_examples_agree(other):
    """Twelve steps of Adam in float32: what differs is the order of sums."""
    for ours, theirs in zip(logs("plain"), logs(other), strict=True):
        assert set(ours) == set(theirs) == set(TASKS)
        for task in TASKS:
            assert ours[task].shape == (SEEDS, STEPS)
            np.testing.assert_allclose(theirs[task], ours[task], rtol=2e-4, atol=2e-5)


def test_training_helps_and_seeds_differ():
    total = sum(logs("plain").losses.values())
    assert (total[:, -4:].mean(axis=1) < total[:, :4].mean(axis=1)).all()
    assert (total[0] != total[1]).all()


def test_logged_weights_are_those_of_the_trunk_at_the_scheduled_radius():
    """Whatever the solver: CAGrad's update lies on the sphere of radius c |g_0| around the mean."""
    params, batches = _problem.draw_seeds(STEPS, SEEDS)
    start = jax.tree.map(lambda x: x[0], (params, Batch(*(x[:, 0] for x in batches))))
    losses, jacobian = jax.jit(jaxmtl.value_and_jacobian(plain_pytrees.losses_fn))(*start)
    rows = flat_rows(jacobian["trunk"])
    log = logs("plain")
    np.testing.assert_allclose([log.losses[t][0, 0] for t in TASKS], losses, rtol=1e-6)
    weights = np.array([log.weights[task][0, 0] for task in TASKS])
    mean = rows.mean(axis=0)
    radius = np.linalg.norm(weights @ rows - mean) / np.linalg.norm(mean)
    np.testing.assert_allclose(radius, 0.1, rtol=1e-4)
    np.testing.assert_allclose(_problem.radius(STEPS)(0), 0.1, rtol=1e-6)
    np.testing.assert_allclose(weights.min(), 1 / 3, rtol=1e-4)  # and helps the worst task


@pytest.mark.parametrize("example", [plain_pytrees, flax_linen, flax_nnx, equinox_modules])
def test_examples_run_as_programs(example, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(_problem, "train_seeds", lambda train: calls.append(train) or fake_log())
    example.main()
    assert calls == [example.train]
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == list(TASKS)
    assert "parity   loss 0.000 -> 2.000, last weight 2.000" in printed


def fake_log():
    series = {task: jnp.arange(3.0) * jnp.ones((2, 1)) for task in TASKS}
    return _problem.Log(series, series)


# --- names ------------------------------------------------------------------------------------


def test_the_order_of_losses_is_that_of_the_names_and_not_of_the_dictionary():
    """`jit` returns a dictionary sorted by key, so that values() has another order outside."""
    names = ("right", "left")

    def losses(x):
        return {"right": x, "left": 2 * x}

    inside = jax.jit(lambda x: stack_losses(losses(x), names))(1.0)
    outside = stack_losses(jax.jit(losses)(1.0), names)
    np.testing.assert_array_equal(inside, [1.0, 2.0])
    np.testing.assert_array_equal(outside, [1.0, 2.0])
    assert list(jax.jit(losses)(1.0)) == ["left", "right"]  # the trap
    named = by_task(jnp.stack([outside, 3 * outside]), names)
    np.testing.assert_array_equal(named["left"], [2.0, 6.0])


@pytest.mark.parametrize("names", [("left",), ("left", "right", "top"), ("left", "rigth")])
def test_missing_unknown_and_misspelt_names_are_refused(names):
    with pytest.raises(ValueError, match="expected one loss for each of"):
        stack_losses({"left": jnp.ones(()), "right": jnp.ones(())}, names)


def test_a_wrong_number_of_values_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(\.\.\., 2\)"):
        by_task(jnp.ones((2, 3)), ("left", "right"))


@pytest.mark.parametrize("make", [jaxmtl.value_and_jacobian, jaxmtl.value_and_gramian])
def test_the_library_takes_a_dictionary_and_refuses_a_list(make):
    def losses_fn(params):
        return {"right": params.sum(), "left": 2 * params.sum()}

    found = make(losses_fn)(jnp.ones(2))
    assert found[0] == {"left": 4.0, "right": 2.0}
    if make is jaxmtl.value_and_jacobian:  # tasks in the sorted order of their names
        np.testing.assert_array_equal(found[1], [[2, 2], [1, 1]])
    with pytest.raises(ValueError, match="stack"):
        make(lambda p: list(losses_fn(p).values()))(jnp.ones(2))


# --- types --------------------------------------------------------------------------------------

USER_CODE = """
import jax
import jax.numpy as jnp
import optax
import jaxmtl

Params = dict[str, jax.Array]

def losses_fn(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params["w"]) ** 2, axis=0)

optimizer = optax.chain(jaxmtl.upgrad(), optax.adam(1e-3))
aggregator: jaxmtl.Aggregator = jaxmtl.cagrad(0.5, num_tasks=2)
weighting: jaxmtl.Weighting = aggregator.weighting

def step(params: Params, state: optax.OptState, batch: jax.Array) -> tuple[Params, optax.OptState]:
    losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
    updates, state = optimizer.update(jacobian, state, params, losses=losses)
    return jaxmtl.apply_updates(params, updates), state

def without_jacobian(params: Params, state: optax.OptState, batch: jax.Array) -> Params:
    (losses, state), grads = jaxmtl.value_and_grad(losses_fn, aggregator)(params, state, batch)
    losses, gramian, pullback = jaxmtl.value_and_gramian(losses_fn)(params, batch)
    weights, state = weighting.update(gramian, state, losses=losses)
    total: jax.Array = weights.sum()
    return pullback(weights / total)

jaxmtl.cagrad("0.5")  # error: arg-type
jaxmtl.upgrad(2)  # error: call-arg arg-type
jaxmtl.upgrad(tasks=2)  # error: call-arg
jaxmtl.krum(num_byzantine=1.5)  # error: arg-type
jaxmtl.famo(num_tasks="2")  # error: arg-type
jaxmtl.every_k(jaxmtl.mgda, 2)  # error: arg-type
jaxmtl.value_and_grad(losses_fn, jaxmtl.mgda)  # error: arg-type
jaxmtl.value_and_jacobian(3)  # error: arg-type
jaxmtl.upgrad().weighting.solve()  # error: attr-defined
wrong: int = weighting.update(None, None)  # error: assignment
jaxmtl.pcgard()  # error: attr-defined
"""


def test_a_type_checker_passes_right_code_and_finds_every_mistake(tmp_path):
    pytest.importorskip("mypy", reason="the extra `lint` is not installed")
    file = tmp_path / "user_code.py"
    file.write_text(USER_CODE)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    found = {}
    for line, code in re.findall(r"user_code\.py:(\d+): error: .*\[([a-z-]+)\]$", printed, re.M):
        found.setdefault(int(line), set()).add(code)
    expected = {
        number: set(line.partition("# error: ")[2].split())
        for number, line in enumerate(USER_CODE.splitlines(), 1)
        if "# error: " in line
    }
    assert found == expected, printed
