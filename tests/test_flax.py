"""The Flax train state: what reaches the optimizer, what is replaced, what is refused."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl

flax = pytest.importorskip("flax", reason="the extra `experiments` is not installed")

from flax import serialization  # noqa: E402

from jaxmtl.flax import UPDATE_INPUTS, TrainState  # noqa: E402

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(())}
TARGETS = jnp.arange(14.0).reshape(2, 7)


class WithStats(TrainState):
    """A subclass whose own field has no default."""

    batch_stats: Any


def losses_fn(params):
    point = jnp.concatenate([params["w"].ravel(), params["b"][None]])
    return jnp.mean((point - TARGETS) ** 2, axis=1) + 1


def optimizer():
    return optax.chain(jaxmtl.famo(num_tasks=2), optax.adam(0.1))


def create(tx=None, **fields):
    cls = WithStats if "batch_stats" in fields else TrainState
    return cls.create(apply_fn=None, params=PARAMS, tx=tx or optimizer(), **fields)


def step(state, _=None):
    losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(state.params)
    state = state.apply_gradients(
        grads=jacobian, losses=losses, previous_batch_losses=losses, task_mask=jnp.ones(2, bool)
    )
    return state, losses


def by_hand(steps):
    tx, params = optimizer(), PARAMS
    opt_state = tx.init(params)
    for _ in range(steps):
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params)
        updates, opt_state = tx.update(
            jacobian, opt_state, params, losses=losses, previous_batch_losses=losses
        )
        params = optax.apply_updates(params, updates)
    return params


def close(tree, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), tree, other)


def test_inputs_reach_the_optimizer_under_jit_scan_and_vmap():
    expected, traces = jax.jit(by_hand, static_argnums=0)(3), []

    @jax.jit
    def compiled(state):
        traces.append(1)
        return step(state)[0]

    state = create().replace(step=jnp.zeros((), jnp.int32))
    for _ in range(3):
        state = compiled(state)
    assert state.step == 3
    assert len(traces) == 1
    close(state.params, expected)

    def run(start):
        start = create().replace(params=start)
        return jax.lax.scan(step, start, None, length=3)

    scanned, losses = jax.jit(jax.vmap(run))(jax.tree.map(lambda x: jnp.stack([x, x + 1]), PARAMS))
    assert losses.shape == (2, 3, 2)
    np.testing.assert_array_equal(scanned.step, [3, 3])
    close(jax.tree.map(lambda x: x[0], scanned.params), expected)
    assert optax.tree.get(scanned.opt_state, "mtl_weights").shape == (2, 2)


def test_fields_are_replaced_and_inputs_passed_on():
    state = create(batch_stats=jnp.zeros(3))
    losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(state.params)
    new = state.apply_gradients(
        grads=jacobian, losses=losses, previous_batch_losses=losses, batch_stats=jnp.ones(3)
    )
    np.testing.assert_array_equal(new.batch_stats, jnp.ones(3))
    assert new.tx is state.tx
    assert new.step == 1
    weights = optax.tree.get(new.opt_state, "mtl_weights")
    np.testing.assert_allclose(weights, (1 / losses) / jnp.sum(1 / losses), rtol=1e-6)
    replaced = new.apply_gradients(
        grads=jacobian, losses=losses, previous_batch_losses=losses, tx=optax.sgd(1.0)
    )
    assert replaced.tx is not state.tx


def test_every_listed_input_arrives():
    """And a name that was declared."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return jax.tree.map(lambda x: x[0], updates), state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    state = create(tx, extra_args=("difficulty",))
    rows = jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), PARAMS)
    names = (*UPDATE_INPUTS, "difficulty")
    state.apply_gradients(grads=rows, **{name: i for i, name in enumerate(names)})
    assert seen == {name: i for i, name in enumerate(names)}


def test_without_an_aggregator_it_is_the_state_of_flax():
    state = create(optax.sgd(1.0))
    new = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, PARAMS))
    close(new.params, jax.tree.map(lambda x: x - 1, PARAMS))


def test_parameters_overwritten_by_their_gradients():
    """Flax's float8 scales; their rows are refused as others are."""
    from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT as SCALES

    params = {"params": PARAMS, SCALES: {"scale": jnp.ones(())}}
    tx = optax.chain(jaxmtl.linear_scalarization(), optax.sgd(1.0))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    rows = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), PARAMS)
    new = state.apply_gradients(grads={"params": rows, SCALES: {"scale": jnp.full((), 5.0)}})
    assert new.params[SCALES]["scale"] == 5
    close(new.params["params"], jax.tree.map(lambda x: x - 1, PARAMS))
    with pytest.raises(ValueError, match=r"shape \(\) at .*scale.*got \(2,\)"):
        state.apply_gradients(grads={"params": rows, SCALES: {"scale": jnp.ones(2)}})


def test_serialization_round_trip():
    tx = optimizer()
    state = step(step(create(tx, batch_stats=jnp.zeros(3)))[0])[0]
    blank = create(tx, batch_stats=jnp.ones(3))
    restored = serialization.from_bytes(blank, serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(np.testing.assert_array_equal, step(restored), step(state))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"loses": 1}, r"input of tx.update \(.*losses.*got loses="),
        ({"batch_stat": 1}, r"field of WithStats \(.*batch_stats.*got batch_stat="),
        ({"params": 1}, r"sets params itself.*state.replace\(params=...\)"),
        ({"step": 1}, "sets step itself"),
    ],
)
def test_wrong_names_are_sentences(kwargs, match):
    rows = jax.tree.map(lambda x: jnp.zeros((2, *x.shape)), PARAMS)
    with pytest.raises(ValueError, match=match):
        create(batch_stats=0).apply_gradients(grads=rows, **kwargs)


def test_a_name_that_is_both_is_refused():
    class WithKey(TrainState):
        key: Any = None

    state = WithKey.create(apply_fn=None, params=PARAMS, tx=optimizer())
    with pytest.raises(ValueError, match=r"got key=, which is both; rename the field of WithKey"):
        state.apply_gradients(grads=PARAMS, key=jax.random.key(0))


@pytest.mark.parametrize(
    "tx", [optax.sgd(1.0), optax.masked(jaxmtl.linear_scalarization(), {"w": True, "b": False})]
)
def test_rows_never_reach_the_parameters(tx):
    rows = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), PARAMS)
    with pytest.raises(ValueError, match=r"expected an update of shape .*optax.partition"):
        create(tx).apply_gradients(grads=rows)


def test_inputs_for_an_optimizer_that_takes_none_are_refused():
    with pytest.raises(ValueError, match="takes losses, got one without extra arguments"):
        create(optax.scale(-1.0)).apply_gradients(grads=PARAMS, losses=jnp.ones(2))


def test_without_flax_the_import_error_is_a_sentence():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import jaxmtl\n"
        "try:\n"
        "    import jaxmtl.flax\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "jaxmtl.flax needs flax" in result.stdout
    assert "pip install flax" in result.stdout
