"""Accumulation of rows: the step is that of the concatenated batch, and nothing else moves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from tests.methods import INPUTS, METHODS
from tests.problems import params_of

M, K, STEPS = 5, 3, 2
SHAPES = {"w": (4,), "b": (), "empty": (0,)}
QUICK = ("famo", "moco", "cr_mogm")


def losses_fn(params, batch):
    x, y = batch
    return jnp.mean(((x @ params["w"] + params["b"])[:, None] - y) ** 2, axis=0) + 0.5


def data(seed=0, batches=(STEPS, K)):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((*batches, 2, 4))), jnp.asarray(
        rng.standard_normal((*batches, 2, M))
    )


def wrapped(rule, k=K, **options):
    return jaxmtl.multi_steps(optax.chain(rule, optax.adam(0.1)), k, num_tasks=M, **options)


def train(tx, inputs, batches, params):
    """Runs over the leading axis of the batches; returns parameters, updates and the state."""

    def step(carry, batch):
        params, state = carry
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, batch)
        updates, state = tx.update(jacobian, state, params, **(inputs | {"losses": losses}))
        return (jaxmtl.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, updates, state


@pytest.mark.parametrize(
    "method",
    [pytest.param(x, marks=() if x.name in QUICK else pytest.mark.slow) for x in METHODS],
    ids=lambda x: x.name,
)
def test_the_step_is_that_of_the_concatenated_batch(method, x64):
    inputs = {name: INPUTS[name](M) for name in method.inputs if name != "losses"}
    micro = data()
    whole = jax.tree.map(lambda x: x.reshape(STEPS, K * 2, -1), micro)
    flat = jax.tree.map(lambda x: x.reshape(STEPS * K, 2, -1), micro)
    expected, of_whole, inner = jax.jit(functools.partial(train, _chain(method), inputs))(
        whole, params_of(SHAPES, fill=1)
    )
    params, updates, state = jax.jit(functools.partial(train, wrapped(method.make(M)), inputs))(
        flat, params_of(SHAPES, fill=1)
    )
    assert float(jnp.max(jnp.abs(of_whole["w"][-1]))) > 0
    updates = jax.tree.map(lambda x: x.reshape(STEPS, K, *x.shape[1:]), updates)
    assert all(not np.any(x[:, :-1]) for x in jax.tree.leaves(updates))
    last = jax.tree.map(lambda x: x[:, -1], updates)
    chex.assert_trees_all_close(last, of_whole, rtol=1e-8, atol=1e-10)
    chex.assert_trees_all_close(params, expected, rtol=1e-8)
    assert state.gradient_step == STEPS
    assert state.mini_step == 0
    if method.logs:
        weights = optax.tree.get(state, "mtl_weights")
        np.testing.assert_allclose(weights, optax.tree.get(inner, "mtl_weights"), rtol=1e-8)
    assert optax.tree.get(state, "mtl_skipped") == 0


def _chain(method):
    return optax.chain(method.make(M), optax.adam(0.1))


@functools.cache
def famo_step(x64, k=K):
    """One micro-batch of FAMO, compiled once for the tests below; traces are counted."""
    tx, traces = wrapped(jaxmtl.famo(num_tasks=M), k), []

    def step(rows, state, inputs):
        traces.append(1)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), rows)
        return tx.update(rows, state, params, **inputs)

    return tx, jax.jit(step), traces


def micro_batch(seed, mask=None):
    rng = np.random.default_rng(seed)
    rows = {name: rng.standard_normal((M, *shape)) for name, shape in SHAPES.items()}
    inputs = {
        "losses": rng.uniform(0.5, 2, M),
        "previous_batch_losses": rng.uniform(0.5, 2, M),
        "task_mask": np.ones(M, bool) if mask is None else np.array(mask),
    }
    return rows, inputs


def test_nothing_moves_in_between_and_the_state_keeps_its_form(x64):
    tx, step, traces = famo_step(True)
    first = state = tx.init(params_of(SHAPES, fill=1))
    before = len(traces)
    for i in range(2 * K):
        updates, new = step(*_with_state(micro_batch(i), state))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, first)
        moves = (i + 1) % K == 0
        assert bool(np.any(updates["w"])) == moves
        if not moves:
            chex.assert_trees_all_equal(new.inner, state.inner)
        assert new.mini_step == (i + 1) % K
        state = new
    assert len(traces) <= before + 1
    for name in ("count", "ready"):
        own = state._replace(inner=())
        assert not optax.tree.get_all_with_path(own, name)


def _with_state(batch, state):
    rows, inputs = batch
    return rows, state, inputs


def test_masks_are_honoured_exactly(x64):
    """Task 0 is in all micro-batches, 1 in the first, 2 in the last two, 3 in none."""
    masks = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]], bool)
    tx, step, _ = famo_step(True)
    batches = [micro_batch(i, mask) for i, mask in enumerate(masks)]

    def mean(values):
        seen = np.maximum(masks.sum(0), 1)
        return sum(np.where(_column(m, v), v, 0) for m, v in zip(masks, values, strict=True)) / (
            _column(seen, values[0])
        )

    rows = {name: mean([b[0][name] for b in batches]) for name in SHAPES}
    inputs = {
        "losses": mean([b[1]["losses"] for b in batches]),
        "previous_batch_losses": np.mean([b[1]["previous_batch_losses"] for b in batches], 0),
        "task_mask": masks.any(0),
    }
    inner = optax.chain(jaxmtl.famo(num_tasks=M), optax.adam(0.1))
    expected, inner_state = jax.jit(inner.update)(
        rows, inner.init(params_of(SHAPES, fill=1)), params_of(SHAPES, fill=1), **inputs
    )
    state = tx.init(params_of(SHAPES, fill=1))
    for rows, extra in batches:
        for x in (*rows.values(), extra["losses"]):
            x[~extra["task_mask"]] = np.nan
        updates, state = step(rows, state, extra)
    chex.assert_trees_all_close(updates, expected, rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_close(state.inner, inner_state, rtol=1e-9)
    assert optax.tree.get(state, "mtl_weights")[3] == 0


def _column(values, like):
    return np.reshape(values, (-1,) + (1,) * (like.ndim - 1))


@pytest.mark.parametrize("where", ["rows", "losses"])
def test_a_non_finite_micro_batch_leaves_no_trace_but_a_count(where, x64):
    tx, step, _ = famo_step(True)
    _, state = step(*_with_state(micro_batch(0), tx.init(params_of(SHAPES, fill=1))))
    rows, inputs = micro_batch(1)
    (rows["w"] if where == "rows" else inputs["losses"])[1] = np.inf
    updates, after = step(rows, state, inputs)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert optax.tree.get(after, "mtl_skipped") == 1
    chex.assert_trees_all_equal(optax.tree.set(after, mtl_skipped=jnp.int32(0)), state)
    for i in (1, 2):  # the step comes one micro-batch later
        updates, after = step(*_with_state(micro_batch(i), after))
    assert np.any(updates["w"])


def test_accumulators_never_overflow():
    """Finite rows whose difference is not."""
    tx = jaxmtl.multi_steps(jaxmtl.rgw(num_tasks=2), 2, num_tasks=2)
    params, update = jnp.zeros(2), jax.jit(tx.update)
    _, first = update(jnp.full((2, 2), 3e38), tx.init(params), params)
    updates, second = update(jnp.full((2, 2), -3e38), first, params)
    assert not np.any(updates)
    assert optax.tree.get(second, "mtl_skipped") == 1
    chex.assert_trees_all_equal(second.rows, first.rows)
    _, third = update(jnp.full((2, 2), 1e38), second, params)
    chex.assert_tree_all_finite(third)
    assert third.gradient_step == 1


def test_losses_of_previous_batches_may_be_unknown(x64):
    """Non-finite where the task was absent; FAMO ignores all at its first step."""
    tx, step, _ = famo_step(True, 2)
    state = tx.init(params_of(SHAPES, fill=1))
    for i in range(2):
        rows, inputs = micro_batch(i)
        inputs["previous_batch_losses"][:] = np.nan
        _, state = step(rows, state, inputs)
    assert optax.tree.get(state, "mtl_skipped") == 0
    assert state.gradient_step == 1
    known = state
    for i in range(2):
        rows, inputs = micro_batch(i)
        _, known = step(rows, known, inputs | {"previous_batch_losses": np.full(M, 0.7)})
        inputs["previous_batch_losses"][:] = np.nan if i else 0.7
        _, state = step(rows, state, inputs)
    chex.assert_trees_all_close(state, known, rtol=1e-12)


def test_entries_of_a_cross_gramian_are_averaged_where_both_tasks_are_present(x64):
    tx = jaxmtl.multi_steps(jaxmtl.modo(num_tasks=2), 2, num_tasks=2)
    params, rows = jnp.zeros(3), jnp.ones((2, 3))
    state, update = tx.init(params), jax.jit(tx.update)
    for cross, mask in (
        ([[1.0, 2.0], [3.0, 4.0]], [1, 1]),
        ([[5.0, np.nan], [np.nan] * 2], [1, 0]),
    ):
        seen = state
        _, state = update(
            rows,
            state,
            params,
            cross_gramian=jnp.array(cross),
            task_mask=jnp.array(mask, bool),
        )
    assert seen.mini_step == 1
    expected = jaxmtl.modo(num_tasks=2)
    _, inner = jax.jit(expected.update)(
        rows, expected.init(params), params, cross_gramian=jnp.array([[3.0, 2.0], [3.0, 4.0]])
    )
    chex.assert_trees_all_close(state.inner, inner, rtol=1e-12)


def test_a_schedule_changes_the_number_of_micro_batches():
    tx = jaxmtl.multi_steps(jaxmtl.linear_scalarization(), lambda step: step + 1, num_tasks=2)
    params, rows = jnp.zeros(2), jnp.ones((2, 2))

    def step(state, _):
        updates, state = tx.update(rows, state, params)
        return state, updates[0]

    _, moved = jax.jit(lambda s: jax.lax.scan(step, s, None, length=6))(tx.init(params))
    np.testing.assert_array_equal(moved, [1, 0, 1, 0, 0, 1])


def test_low_precision_is_averaged_in_float32_also_under_vmap():
    """The mean of 1 and 1 + 2^-7, neighbours in bfloat16, is none of them."""
    first_row = optax.GradientTransformation(
        optax.init_empty_state, lambda rows, state, params=None: (rows[0], state)
    )
    tx = jaxmtl.multi_steps(first_row, 2, num_tasks=2)
    params = jnp.zeros(2, jnp.bfloat16)

    def run(scale):
        def step(state, x):
            updates, state = tx.update(jnp.full((2, 2), x), state, params)
            return state, updates

        values = scale * jnp.array([1, 1 + 2**-7], jnp.bfloat16)
        state, updates = jax.lax.scan(step, tx.init(params), values)
        return state, updates[-1]

    state, updates = jax.jit(jax.vmap(run))(jnp.array([1.0, 2.0], jnp.bfloat16))
    assert state.rows.value.dtype == jnp.float32
    np.testing.assert_array_equal(updates, np.array([1.0, 2.0])[:, None] * (1 + 2**-8) * [1, 1])


def test_declared_inputs_are_averaged_and_others_passed_last():
    seen = {}

    def weigh(gramian, difficulty, key, note):
        seen.update(difficulty=difficulty, key=key, note=note)
        return jnp.ones(2) * jnp.sum(difficulty)

    rule = jaxmtl.from_weighting(weigh)
    tx = jaxmtl.multi_steps(rule, 2, num_tasks=2, averaged={"difficulty": (3,)})
    params, rows = jnp.zeros(2), jnp.eye(2)
    state = tx.init(params)
    for i in range(2):
        updates, state = tx.update(
            rows, state, params, difficulty=jnp.full(3, 1.0 + i), key=jax.random.key(i), note=None
        )
    np.testing.assert_allclose(updates, [4.5, 4.5])
    assert seen["note"] is None
    with pytest.raises(ValueError, match=r'averaged=\{"difficulty": \(3,\)\}'):
        jaxmtl.multi_steps(rule, 2, num_tasks=2).update(
            rows, state, params, difficulty=jnp.ones(3), key=None, note=None
        )


def test_wrong_use_is_a_sentence():
    mean, params = jaxmtl.linear_scalarization(), jnp.zeros(2)
    with pytest.raises(ValueError, match="num_tasks=m"):
        jaxmtl.multi_steps(mean, 2)
    for k in (0, True, 1.5):
        with pytest.raises(ValueError, match="at least 1 or a schedule"):
            jaxmtl.multi_steps(mean, k, num_tasks=2)
    tx = jaxmtl.multi_steps(optax.adam(1.0), 2, num_tasks=2)
    with pytest.raises(ValueError, match="first in the chain"):
        tx.update(jnp.ones((2, 2)), tx.init(params), params)
    tx = jaxmtl.multi_steps(mean, 2, num_tasks=2)
    with pytest.raises(ValueError, match="expected 2 tasks"):
        tx.update(jnp.ones((3, 2)), tx.init(params), params)
    with pytest.raises(ValueError, match=r"losses of shape \(2,\), got \(3,\)"):
        tx.update(jnp.ones((2, 2)), tx.init(params), params, losses=jnp.ones(3))
    with pytest.raises(ValueError, match="bool task_mask"):
        tx.update(jnp.ones((2, 2)), tx.init(params), params, task_mask=jnp.ones(2))
    with pytest.raises(ValueError, match="value_and_jacobian"):
        jaxmtl.value_and_grad(losses_fn, tx)


def test_the_count_goes_to_every_counter_of_the_chain():
    """And to one of its own where the chain has none."""
    rows = {"a": jnp.full((2, 1), jnp.nan), "b": jnp.ones((2, 1))}
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    groups = {"x": jaxmtl.rgw(), "y": jaxmtl.rlw()}
    for chain, counters in (
        (optax.partition(groups, {"a": "x", "b": "y"}), 2),
        (jaxmtl.linear_scalarization(), 1),
    ):
        tx = jaxmtl.multi_steps(chain, 2, num_tasks=2)
        _, state = tx.update(rows, tx.init(params), params, losses=jnp.ones(2))
        counted = optax.tree.get_all_with_path(state, "mtl_skipped")
        assert [int(value) for _, value in counted] == [1] * counters


def test_without_the_jacobian_the_losses_loop_over_micro_batches(x64):
    batches = data(batches=(K,))
    whole = jax.tree.map(lambda x: x.reshape(K * 2, -1), batches)
    params, rule = params_of(SHAPES, fill=1), jaxmtl.upgrad()

    def looped(params, batches):
        micro = jax.checkpoint(functools.partial(losses_fn, params))
        return jnp.mean(jax.lax.map(micro, batches), axis=0)

    @functools.partial(jax.jit, static_argnums=0)
    def grads(losses_fn, batch):
        return jaxmtl.value_and_grad(losses_fn, rule)(params, rule.init(params), batch)

    chex.assert_trees_all_close(grads(looped, batches), grads(losses_fn, whole), rtol=1e-9)
