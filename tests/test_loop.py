"""What a loop calls: the check before training, checked updates, skips, logs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from tests.problems import flat_rows

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
M = 2


def rows(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 2))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), (M, *x.shape)), PARAMS)


GOOD = {
    "upgrad": lambda: optax.chain(jaxmtl.upgrad(), optax.adam(1e-3)),
    "tracked": lambda: optax.chain(
        jaxmtl.track_gradients(num_tasks=M), jaxmtl.clip_rows(1.0), jaxmtl.mgda(), optax.sgd(0.1)
    ),
    "famo": lambda: optax.chain(jaxmtl.famo(num_tasks=M), optax.adamw(1e-3)),
    "modo": lambda: jaxmtl.modo(num_tasks=M),
    "multi_steps": lambda: jaxmtl.multi_steps(jaxmtl.pcgrad(), 2, num_tasks=M),
    "lookahead": lambda: optax.chain(jaxmtl.mgda(), optax.trace(0.9)),
    "partition": lambda: optax.partition(
        {"train": jaxmtl.mgda(), "frozen": jaxmtl.frozen()}, {"w": "train", "b": "frozen"}
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_right_chains_pass(name):
    jaxmtl.check(GOOD[name](), PARAMS, M)
    shapes = jax.eval_shape(lambda: PARAMS)
    jaxmtl.check(GOOD[name](), shapes, M)


BAD = {
    "adam first": (lambda: optax.chain(optax.adam(1e-3), jaxmtl.upgrad()), "keep its shapes"),
    "trace first": (lambda: optax.chain(optax.trace(0.9), jaxmtl.mgda()), "keep its shapes"),
    "no aggregator": (lambda: optax.sgd(0.1), "aggregator"),
    "adam alone": (lambda: optax.adam(0.1), "first in the chain"),
    "masked": (
        lambda: optax.chain(optax.masked(jaxmtl.mgda(), {"w": True, "b": False})),
        "optax.partition",
    ),
    "set_to_zero": (
        lambda: optax.partition(
            {"train": jaxmtl.mgda(), "frozen": optax.set_to_zero()},
            {"w": "train", "b": "frozen"},
        ),
        r"jaxmtl\.frozen\(\)",
    ),
    "other m": (lambda: jaxmtl.famo(num_tasks=M + 1), "num_tasks"),
    "two aggregators": (lambda: optax.chain(jaxmtl.mgda(), jaxmtl.mgda()), "task axis"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_chains_are_refused(name):
    make, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        jaxmtl.check(make(), PARAMS, M)


def test_features_are_given_by_the_caller():
    router = jaxmtl.ldc_mtl(num_tasks=M, feature_size=4)
    with pytest.raises(ValueError, match="features"):
        jaxmtl.check(router, PARAMS, M)
    jaxmtl.check(router, PARAMS, M, features=jnp.zeros((8, 4)))


def test_the_loop_refuses_a_chain_whose_state_changes():
    chain = optax.chain(optax.adam(1e-3), jaxmtl.upgrad())
    state = chain.init(PARAMS)
    updates, new = chain.update(rows(), state, PARAMS)
    jaxmtl.apply_updates(PARAMS, updates)  # shapes agree: plain optax goes on
    with pytest.raises(ValueError, match="first in the chain"):
        jaxmtl.apply_updates(PARAMS, updates, state=(state, new))
    steps = jaxmtl.multi_steps(chain, 1, num_tasks=M)
    with pytest.raises(ValueError, match="first in the chain"):
        steps.update(rows(), steps.init(PARAMS), PARAMS)
    flax = pytest.importorskip("jaxmtl.flax")
    train = flax.TrainState.create(apply_fn=None, params=PARAMS, tx=chain)
    with pytest.raises(ValueError, match="first in the chain"):
        train.apply_gradients(grads=rows())


def test_frozen_parameters_stay_out_of_the_gramian():
    optimizer, given = GOOD["partition"](), rows()
    update, _ = optimizer.update(given, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(update["b"], 0)
    alone, _ = jaxmtl.mgda().update(given["w"], jaxmtl.mgda().init(PARAMS["w"]), PARAMS["w"])
    np.testing.assert_allclose(update["w"], alone, rtol=1e-6)
    with pytest.raises(ValueError, match="task axis"):
        jaxmtl.frozen().update(PARAMS, (), PARAMS)


def test_skips_are_told(capsys):
    optimizer = optax.chain(jaxmtl.upgrad(), optax.sgd(1.0))
    state, told = optimizer.init(PARAMS), []
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), rows())

    def step(given, state, on_skip):
        updates, new = optimizer.update(given, state, PARAMS)
        return jaxmtl.apply_updates(PARAMS, updates, state=(state, new), on_skip=on_skip), new

    for given in (rows(), bad, rows(1), bad):
        _, state = jax.jit(step, static_argnums=2)(given, state, told.append)
    jax.effects_barrier()
    assert told == [1, 2]
    step(bad, state, "print")
    jax.effects_barrier()
    assert "(3 so far)" in capsys.readouterr().out

    def wait():
        jax.block_until_ready(step(bad, state, "raise"))
        jax.effects_barrier()

    with pytest.raises(Exception, match="non-finite"):
        wait()
    with pytest.raises(ValueError, match="on_skip"):
        step(bad, state, "shout")
    with pytest.raises(ValueError, match="state="):
        jaxmtl.apply_updates(PARAMS, PARAMS, on_skip="print")


def test_skips_without_the_jacobian_are_told():
    rule, optimizer, told = jaxmtl.upgrad(), optax.sgd(1.0), []
    value_and_grad = jaxmtl.value_and_grad(lambda p, x: jnp.stack([p @ x, p @ x**2]), rule)

    @jax.jit
    def step(params, state, x):
        (_, new), grads = value_and_grad(params, state, x)
        updates, _ = optimizer.update(grads, optimizer.init(params))
        return jaxmtl.apply_updates(params, updates, state=(state, new), on_skip=told.append), new

    params, state = jnp.ones(2), rule.init(jnp.ones(2))
    for x in (1.0, jnp.inf, 2.0, jnp.nan):
        params, state = step(params, state, jnp.array([x, 1.0]))
    jax.effects_barrier()
    assert told == [1, 2]
    assert jnp.all(jnp.isfinite(params))


def test_monitor_names_everything_and_agrees_with_the_matrix(x64):
    given = jax.tree.map(lambda x: x.astype(jnp.float64), rows(3))
    matrix = flat_rows(given)
    aggregator = jaxmtl.upgrad(num_tasks=M)
    optimizer = optax.chain(aggregator, optax.adam(0.1))
    state = optimizer.init(PARAMS)

    @jax.jit
    def step(given, state):
        updates, state = optimizer.update(given, state, PARAMS)
        losses = {"b": jnp.array(2.0), "a": jnp.array(1.0)}
        return updates, jaxmtl.monitor(jacobian=given, updates=updates, losses=losses, state=state)

    updates, log = step(given, state)
    u = flat_rows(updates, 0)
    assert log["losses"] == {"a": 1.0, "b": 2.0}
    norms = np.linalg.norm(matrix, axis=1)
    np.testing.assert_allclose([log["norms"]["a"], log["norms"]["b"]], norms)
    np.testing.assert_allclose([log["progress"][k] for k in "ab"], matrix @ u, rtol=1e-6)
    cosines = matrix @ u / norms / np.linalg.norm(u)
    np.testing.assert_allclose([log["update_cosines"][k] for k in "ab"], cosines, rtol=1e-6)
    cosine = matrix[0] @ matrix[1] / norms.prod()
    np.testing.assert_allclose(log["cosines"]["a, b"], cosine)
    assert log["conflict_rate"] == (cosine < 0)
    assert set(log["weights"]) == {"a", "b"}
    assert log["skipped"] == 0
    assert log["residual"] < 1e-12
    gramian = jnp.asarray(matrix @ matrix.T)
    without = jaxmtl.monitor(gramian=gramian, slopes=matrix @ u, updates=updates, names="ab")
    for key in ("norms", "progress", "update_cosines", "cosines"):
        for name, value in without[key].items():
            np.testing.assert_allclose(value, log[key][name], rtol=1e-6)
    with pytest.raises(ValueError, match="one name per task"):
        jaxmtl.monitor(gramian=gramian, names=("a", "b", "c"))
