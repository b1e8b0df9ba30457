"""The documentation's table of optimizers and wrappers: each row is printed from its own check.

``python -m tests.test_wrappers`` prints the table.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

import jaxmtl
from tests.problems import some

pytestmark = pytest.mark.xdist_group("wrappers")

WORKS, INSTEAD = "works", "use instead"
TARGETS = jnp.array([[1.0, 0, 0, 2, 1], [0, 3.0, 0, 1, 1]])
PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.zeros(())}


class Row(NamedTuple):
    """A line of the table and the function that checks it."""

    wrapper: str
    verdict: str
    note: str
    check: Callable[[], None]


ROWS: list[Row] = []


def row(wrapper, verdict, note):
    def add(check):
        ROWS.append(Row(wrapper, verdict, note, check))
        return check

    return add


def table() -> str:
    """Returns the table in Markdown."""
    lines = ["| wrapper or optimizer | verdict | how |", "|---|---|---|"]
    lines += [f"| {row.wrapper} | {row.verdict} | {row.note} |" for row in ROWS]
    return "\n".join(lines)


# --- what the checks share --------------------------------------------------------------------


def losses_fn(params):
    point = jnp.concatenate([params["w"].ravel(), params["b"][None]])
    return jnp.mean((point - TARGETS) ** 2, axis=1) + 1


@functools.cache
def losses_and_rows():
    return jax.jit(jaxmtl.value_and_jacobian(losses_fn))(PARAMS)


def rule(num_tasks=None):
    """A cheap rule that is not linear in the rows: weights are their inverse norms."""
    return jaxmtl.from_weighting(
        lambda gramian: 1 / jnp.sqrt(jnp.diagonal(gramian)), num_tasks=num_tasks
    )


@jax.jit
def aggregate(rows):
    return rule().update(rows, rule().init(PARAMS), PARAMS)[0]


def run(tx, steps=3, rows=None, params=PARAMS, **extra):
    """Feeds the same rows to every step, in a scan; returns the updates and the last state."""
    rows = losses_and_rows()[1] if rows is None else rows

    def step(state, _):
        updates, state = tx.update(rows, state, params, **extra)
        return state, updates

    @jax.jit
    def whole():
        state, updates = jax.lax.scan(step, tx.init(params), None, length=steps)
        return updates, state

    return whole()


def once(tx, rows, state=None, params=PARAMS, **extra):
    state = tx.init(params) if state is None else state
    return jax.jit(lambda s: tx.update(rows, s, params, **extra))(state)


def same(tx, other, params=PARAMS, **extra):
    """Checks that two optimizers take the same steps, the second on the aggregated rows."""
    mean = aggregate(losses_and_rows()[1])
    other = optax.with_extra_args_support(other)

    def step(states, _):
        got, state = tx.update(losses_and_rows()[1], states[0], params, **extra)
        expected, of_other = other.update(mean, states[1], params, **extra)
        return (state, of_other), (got, expected)

    @jax.jit
    def both():
        return jax.lax.scan(step, (tx.init(params), other.init(params)), None, length=3)[1]

    got, expected = both()
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert np.any(got["w"] if isinstance(got, dict) else got.fast["w"])


def has_task_axis(updates):
    return updates["w"].shape == (2, *PARAMS["w"].shape)


def refused(params, updates):
    with pytest.raises(ValueError, match=r"expected an update of shape .*optax.partition"):
        jaxmtl.apply_updates(params, updates)


# --- the rows ---------------------------------------------------------------------------------


@row(
    "`optax.chain`, `named_chain`",
    WORKS,
    "the aggregator first; before it only what keeps the m rows apart (`clip_rows`, "
    "`track_gradients`)",
)
def _():
    keep = (jaxmtl.clip_rows(1e3), jaxmtl.track_gradients(1.0, num_tasks=2))
    same(optax.chain(*keep, rule(), optax.adam(0.1)), optax.adam(0.1))
    same(optax.named_chain(("mtl", rule()), ("sgd", optax.sgd(0.1))), optax.sgd(0.1))


@row(
    "no aggregator at all",
    INSTEAD,
    "one, first in the chain. `jaxmtl.apply_updates` and `jaxmtl.flax.TrainState` refuse the rows "
    "as updates; `optax.apply_updates` and `nnx.Optimizer` broadcast the parameters without a word",
)
def _():
    from flax import nnx

    updates, _ = optax.sgd(0.1).update(losses_and_rows()[1], optax.sgd(0.1).init(PARAMS))
    refused(PARAMS, updates)
    with pytest.raises(ValueError, match="expected an update of shape"):
        _train_state(optax.sgd(0.1)).apply_gradients(grads=losses_and_rows()[1])
    assert has_task_axis(optax.apply_updates(PARAMS, updates))
    model, optimizer = _nnx(optax.sgd(0.1))
    rows = jax.tree.map(lambda x: jnp.stack([x, x]), nnx.state(model, nnx.Param))
    optimizer.update(model, rows)
    assert model.w[...].shape == (2, 2, 2)


@row(
    "`partition`, `multi_transform`",
    WORKS,
    "one aggregator for the trunk, one for the heads; a group without one is refused by "
    "`jaxmtl.apply_updates`",
)
def _():
    assert optax.multi_transform is optax.partition
    labels, rows = {"w": "trunk", "b": "head"}, losses_and_rows()[1]
    heads = jaxmtl.linear_scalarization(jnp.ones(2))
    updates, _ = once(optax.partition({"trunk": rule(), "head": heads}, labels), rows)
    trunk, _ = rule().update({"w": rows["w"]}, rule().init(PARAMS), {"w": PARAMS["w"]})
    np.testing.assert_allclose(updates["w"], trunk["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], jnp.sum(rows["b"]), rtol=1e-6)
    updates, _ = once(optax.partition({"trunk": rule(), "head": optax.sgd(0.1)}, labels), rows)
    refused(PARAMS, updates)


@row(
    "`masked`",
    INSTEAD,
    "`partition`: what a partly false mask leaves out passes on as rows, which "
    "`jaxmtl.apply_updates` and the `TrainState` refuse; an all-true mask works",
)
def _():
    tx, rows = optax.masked(rule(), {"w": True, "b": False}), losses_and_rows()[1]
    updates, _ = tx.update(rows, tx.init(PARAMS), PARAMS)
    refused(PARAMS, updates)
    with pytest.raises(ValueError, match=r"optax.partition"):
        _train_state(tx).apply_gradients(grads=rows)
    same(optax.masked(rule(), {"w": True, "b": True}), optax.identity())


@row(
    "`transforms.freeze`",
    WORKS,
    "first in the chain, frozen leaves stay out of the Gramian; last, they count in it. "
    "`selective_transform` around an aggregator leaves rows, which `jaxmtl.apply_updates` refuses",
)
def _():
    frozen = optax.transforms.freeze({"w": True, "b": False})
    first, _ = run(optax.chain(frozen, rule()), steps=1)
    last, _ = run(optax.chain(rule(), frozen), steps=1)
    rows = losses_and_rows()[1]
    alone, _ = rule().update({"b": rows["b"]}, rule().init(PARAMS), {"b": PARAMS["b"]})
    np.testing.assert_allclose(first["b"][0], alone["b"], rtol=1e-6)
    np.testing.assert_allclose(last["b"][0], aggregate(rows)["b"], rtol=1e-6)
    assert abs(float(first["b"][0] - last["b"][0])) > 0.1
    assert not np.any(first["w"])
    assert not np.any(last["w"])
    tx = optax.transforms.selective_transform(rule(), freeze_mask={"w": True, "b": False})
    updates, _ = tx.update(rows, tx.init(PARAMS), PARAMS)
    refused(PARAMS, updates)


@row(
    "`inject_hyperparams`",
    WORKS,
    '`static_args=("num_tasks",)`, with every other whole number of the rule; the result has no '
    "`.weighting`, which combinators and `value_and_grad` need",
)
def _():
    inject = functools.partial(optax.inject_hyperparams, jaxmtl.dwa)
    values = []
    tx = inject(static_args=("num_tasks", "steps_per_epoch"))(
        temperature=lambda step: 2.0 + step, num_tasks=2
    )
    state, (losses, rows) = tx.init(PARAMS), losses_and_rows()
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(rows, state, PARAMS, losses=losses)
        values.append(float(state.hyperparams["temperature"]))
    assert values == [2.0, 3.0, 4.0]
    assert optax.tree.get(state, "mtl_weights").shape == (2,)
    with pytest.raises(ValueError, match=r'static_args=\("num_tasks",\)'):
        inject()(temperature=2.0, num_tasks=2).init(PARAMS)
    with pytest.raises(ValueError, match="steps_per_epoch to be a positive int"):
        inject(static_args=("num_tasks",))(temperature=2.0, num_tasks=2).init(PARAMS)
    assert not hasattr(tx, "weighting")
    with pytest.raises(ValueError, match="inject_hyperparams"):
        jaxmtl.cr_mogm(tx, num_tasks=2)
    with pytest.raises(ValueError, match="value_and_jacobian"):
        jaxmtl.value_and_grad(losses_fn, tx)


@row(
    "`lbfgs`",
    WORKS,
    "`linesearch=None` in a chain. A line search needs the scalar that the weights make: aggregate "
    "first, then `lbfgs().update(grads, ..., value_fn=lambda p: weights @ losses_fn(p))`",
)
def _():
    plain = optax.lbfgs(0.1, linesearch=None)
    same(optax.chain(rule(), plain), plain, value_fn=lambda p: 0.0)
    aggregator, search, params = rule(num_tasks=2), optax.lbfgs(memory_size=2), PARAMS

    @jax.jit
    def step(params, state, search_state):
        losses, rows = jaxmtl.value_and_jacobian(losses_fn)(params)
        grads, state = aggregator.update(rows, state, params)

        def value_fn(p):
            return state.mtl_weights @ losses_fn(p)

        updates, search_state = search.update(
            grads, search_state, params, value=value_fn(params), grad=grads, value_fn=value_fn
        )
        return jaxmtl.apply_updates(params, updates), state, search_state, losses

    state, search_state, history = aggregator.init(params), search.init(params), []
    for _ in range(8):
        params, state, search_state, losses = step(params, state, search_state)
        history.append(losses)
    assert np.all(history[-1] < history[0])
    before, after = (aggregate(jax.jacrev(losses_fn)(p)) for p in (PARAMS, params))
    assert optax.tree.norm(after) < 0.05 * optax.tree.norm(before)


@row("`contrib.schedule_free`", WORKS, "around the chain, or behind the aggregator")
def _():
    make = functools.partial(optax.contrib.schedule_free, learning_rate=0.1)
    same(make(optax.chain(rule(), optax.sgd(0.1))), make(optax.sgd(0.1)))
    same(optax.chain(rule(), make(optax.sgd(0.1))), make(optax.sgd(0.1)))


@row(
    "`contrib.prodigy`, `contrib.mechanize`, `polyak_sgd`, `contrib.reduce_on_plateau`",
    WORKS,
    "behind the aggregator, with their `value=`; `mechanize` around it fails",
)
def _():
    contrib = optax.contrib
    for tx, extra in (
        (contrib.prodigy(), {}),
        (contrib.mechanize(optax.sgd(0.1)), {}),
        (optax.polyak_sgd(), {"value": 2.0}),
        (optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau()), {"value": 2.0}),
    ):
        same(optax.chain(rule(), tx), tx, **extra)
    with pytest.raises(TypeError):
        run(contrib.mechanize(optax.chain(rule(), optax.sgd(0.1))))


@row(
    "`lookahead`, `contrib.sam`",
    WORKS,
    "`lookahead` around the chain and `sam` behind the aggregator, for rules that need no inputs: "
    "both refuse `losses=`. Otherwise aggregate first and give them the result",
)
def _():
    ahead = optax.lookahead(optax.chain(rule(), optax.sgd(0.1)), 2, 0.5)
    synced = optax.LookaheadParams.init_synced(PARAMS)
    same(ahead, optax.lookahead(optax.sgd(0.1), 2, 0.5), params=synced)
    sharpness = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    sam = optax.contrib.sam(optax.sgd(0.1), sharpness, sync_period=2)
    same(optax.chain(rule(), sam), sam)
    losses, rows = losses_and_rows()
    for tx, params in ((ahead, synced), (optax.chain(rule(), sam), PARAMS)):
        with pytest.raises(TypeError, match="losses"):
            tx.update(rows, tx.init(params), params, losses=losses)


@row(
    "`MultiSteps`, `apply_every`",
    INSTEAD,
    "`jaxmtl.multi_steps(chain, k, num_tasks=m)`, which accumulates rows. `MultiSteps` around an "
    "aggregator fails; behind one both accumulate aggregated gradients, a different method; "
    "`apply_every` before one fails inside `scan`",
)
def _():
    rows = losses_and_rows()[1]
    with pytest.raises(ValueError, match=r"jaxmtl.multi_steps"):
        run(optax.MultiSteps(optax.chain(rule(), optax.sgd(0.1)), 2))
    with pytest.raises(TypeError, match="grad_acc"):
        run(optax.chain(optax.apply_every(2), rule()))
    other = jax.tree.map(lambda x: x.at[0].multiply(3), rows)
    batches = jax.tree.map(lambda x, y: jnp.stack([x, y]), rows, other)

    def last(tx):
        def step(state, rows):
            updates, state = tx.update(rows, state, PARAMS)
            return state, updates

        updates = jax.jit(lambda: jax.lax.scan(step, tx.init(PARAMS), batches)[1])()
        return jax.tree.map(lambda x: x[-1], updates)

    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), batches)
    right = last(jaxmtl.multi_steps(rule(), 2, num_tasks=2))
    chex.assert_trees_all_close(right, aggregate(mean), rtol=1e-6)
    behind = optax.chain(rule(), optax.MultiSteps(optax.identity(), 2).gradient_transformation())
    of_updates = jax.tree.map(lambda x, y: (x + y) / 2, aggregate(rows), aggregate(other))
    chex.assert_trees_all_close(last(behind), of_updates, rtol=1e-6)
    every = last(optax.chain(rule(), optax.apply_every(2)))
    chex.assert_trees_all_close(every, jax.tree.map(lambda x: 2 * x, of_updates), rtol=1e-6)
    assert float(jnp.max(jnp.abs(of_updates["w"] - right["w"]))) > 0.01


@row(
    "`microbatch`",
    WORKS,
    "around `value_and_jacobian(losses_fn)`, with the accumulator MEAN: the rows of a large batch "
    "in the memory of a small one",
)
def _():
    x = jnp.arange(12.0).reshape(6, 2) / 10

    def of_batch(params, x):
        return jnp.mean(jax.vmap(lambda x: losses_fn({**params, "w": params["w"] * x}))(x), axis=0)

    whole = jaxmtl.value_and_jacobian(of_batch)
    parts = optax.microbatch(
        whole, 1, microbatch_size=2, accumulator=optax.microbatching.AccumulationType.MEAN
    )
    got, expected = jax.jit(lambda: (parts(PARAMS, x), whole(PARAMS, x)))()
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


@row(
    "`apply_if_finite`",
    INSTEAD,
    "the guard inside: an aggregator answers a non-finite gradient with a zero update, keeps its "
    "state and counts in `mtl_skipped`. To hold the whole chain still (Adam moves on a zero), "
    "`jaxmtl.multi_steps(chain, 1, num_tasks=m)`. Around an aggregator it fails",
)
def _():
    rows = losses_and_rows()[1]
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    chain = optax.chain(rule(), optax.adam(0.1))
    with pytest.raises(TypeError, match="cond branches"):
        run(optax.apply_if_finite(chain, 3))
    guarded = jaxmtl.multi_steps(chain, 1, num_tasks=2)
    for tx, adam_moves in ((chain, True), (guarded, False)):
        _, state = once(tx, rows)
        updates, skipped = once(tx, bad, state)
        assert optax.tree.get(skipped, "mtl_skipped") == 1
        assert bool(np.any(updates["w"])) == adam_moves
        counts = [optax.tree.get(s, "count") for s in (state, skipped)]
        assert int(counts[1] - counts[0]) == adam_moves
    same(guarded, optax.adam(0.1))


@row(
    "`conditionally_transform`, `conditionally_mask`",
    INSTEAD,
    "behind the aggregator they work; `every_k(rule, k)` renews weights at every k-th step only. "
    "Around an aggregator they fail",
)
def _():
    def condition(step):
        return step % 2 == 0

    for wrapper in (optax.conditionally_transform, optax.conditionally_mask):
        with pytest.raises(TypeError, match="cond branches"):
            run(wrapper(optax.chain(rule(), optax.sgd(0.1)), condition))
        inner = wrapper(optax.sgd(0.1), condition)
        same(optax.chain(rule(), inner), inner)
    tx = jaxmtl.every_k(rule(), 2, num_tasks=2)
    rows = losses_and_rows()[1]
    _, first = once(tx, rows)
    _, second = once(tx, jax.tree.map(lambda x: x.at[0].multiply(3), rows), first)
    np.testing.assert_array_equal(first.mtl_weights, second.mtl_weights)


@row("`flatten`", INSTEAD, "behind the aggregator; around it is refused")
def _():
    with pytest.raises(ValueError, match=r"optax.flatten after the aggregator"):
        run(optax.flatten(optax.chain(rule(), optax.sgd(0.1))))
    same(optax.chain(rule(), optax.flatten(optax.adam(0.1))), optax.adam(0.1))


@row(
    "`ema`, `trace`, `scale_by_adam` before the aggregator",
    INSTEAD,
    "`track_gradients(1 - decay, num_tasks=m)`, which is `ema(decay, debias=False)` of rows. "
    "Before an aggregator they fail inside `scan` and change the shape of their state outside",
)
def _():
    for tx in (optax.ema(0.9), optax.trace(0.9), optax.scale_by_adam()):
        with pytest.raises(TypeError, match="scan body"):
            run(optax.chain(tx, rule()))
    ema = optax.chain(optax.ema(0.9, debias=False), rule())
    tracked, _ = run(optax.chain(jaxmtl.track_gradients(0.1, num_tasks=2), rule()))
    state = ema.init(PARAMS)
    for t in range(3):
        before = state
        updates, state = once(ema, losses_and_rows()[1], before)
        chex.assert_trees_all_close(jax.tree.map(lambda x, t=t: x[t], tracked), updates, rtol=1e-5)
        assert (jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, state)) == (t > 0)


@row(
    "`clip_by_global_norm`, `normalize_by_update_norm`, `clip_by_block_rms` before the aggregator",
    INSTEAD,
    "`clip_rows(max_norm)` per task, or they themselves behind the aggregator. Before it they take "
    "one norm of all tasks together, without a word",
)
def _():
    rows = losses_and_rows()[1]
    for tx in (
        optax.clip_by_global_norm(0.1),
        optax.normalize_by_update_norm(),
        optax.clip_by_block_rms(0.1),
    ):
        scaled, _ = tx.update(rows, tx.init(PARAMS), PARAMS)
        ratio = scaled["w"][1, 0, 1] / rows["w"][1, 0, 1]
        assert abs(ratio - 1) > 0.1
        np.testing.assert_allclose(scaled["w"], ratio * rows["w"], rtol=1e-5)
        same(optax.chain(rule(), tx), tx)
    clip = jaxmtl.clip_rows(0.1)
    clipped, _ = clip.update(rows, clip.init(PARAMS), PARAMS)
    norms = [optax.tree.norm(jax.tree.map(lambda x, i=i: x[i], clipped)) for i in range(2)]
    np.testing.assert_allclose(norms, [0.1, 0.1], rtol=1e-5)


@row(
    "`adaptive_grad_clip`, `centralize`, `add_decayed_weights` before the aggregator",
    INSTEAD,
    "they themselves behind it. Before it the first fails, the second takes the task axis for one "
    "of the parameters, and the third adds the decay to every row, so that conflicts are those of "
    "the decayed losses",
)
def _():
    rows = losses_and_rows()[1]
    for tx in (optax.adaptive_grad_clip(0.1), optax.centralize(), optax.add_decayed_weights(0.1)):
        same(optax.chain(rule(), tx), tx)
    with pytest.raises(ValueError, match="Shape mismatch"):
        run(optax.chain(optax.adaptive_grad_clip(0.1), rule()))
    bias = jnp.arange(3.0)
    centred, _ = optax.centralize().update(jnp.stack([bias, bias]), optax.EmptyState(), bias)
    alone, _ = optax.centralize().update(bias, optax.EmptyState(), bias)
    np.testing.assert_array_equal(alone, bias)
    assert float(jnp.max(jnp.abs(centred[0] - bias))) > 0.5
    decay = optax.add_decayed_weights(0.1)
    decayed, _ = decay.update(rows, decay.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda x, p: x + 0.1 * p, rows, PARAMS)
    chex.assert_trees_all_close(decayed, expected)


@row(
    "`clip`, `zero_nans` before the aggregator",
    WORKS,
    "entry by entry; after `zero_nans` the guard sees no NaN and counts none",
)
def _():
    rows = losses_and_rows()[1]
    updates, _ = run(optax.chain(optax.clip(0.2), rule()), steps=1)
    clipped = jax.tree.map(lambda x: jnp.clip(x, -0.2, 0.2), rows)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[0], updates), aggregate(clipped), rtol=1e-5
    )
    bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), rows)
    updates, state = run(optax.chain(optax.zero_nans(), jaxmtl.rgw(num_tasks=2)), rows=bad)
    assert np.any(updates["w"])
    assert optax.tree.get(state, "mtl_skipped") == 0


@row(
    "`experimental.aggregating.process`",
    INSTEAD,
    "`chain`: with `losses=` it fails on parts that take no extra arguments, unless each is "
    "wrapped in `with_extra_args_support`; without, it works",
)
def _():
    losses = losses_and_rows()[0]
    plain, support = optax.identity(), optax.with_extra_args_support
    with pytest.raises(TypeError, match="losses"):
        run(aggregating.process(plain, rule(), optax.adam(0.1)), losses=losses)
    with pytest.raises(TypeError, match="losses"):
        run(aggregating.process(support(plain), rule(), optax.scale(0.1)), losses=losses)
    same(
        aggregating.process(support(plain), rule(), support(optax.scale(0.1))),
        optax.scale(0.1),
        losses=losses,
    )
    same(aggregating.process(plain, rule(), optax.adam(0.1)), optax.adam(0.1))
    same(optax.chain(plain, rule(), optax.adam(0.1)), optax.adam(0.1), losses=losses)


def _train_state(tx, cls=None):
    from jaxmtl.flax import TrainState

    return (cls or TrainState).create(apply_fn=None, params=PARAMS, tx=tx)


@row(
    "Flax `TrainState`",
    INSTEAD,
    "`jaxmtl.flax.TrainState`, the same with `apply_gradients(grads=jacobian, losses=losses)`; "
    "Flax's own works for rules that need no inputs and passes none on",
)
def _():
    from flax.training import train_state

    losses, rows = losses_and_rows()
    tx = optax.chain(jaxmtl.scale_invariant(), optax.sgd(0.1))
    new = _train_state(tx).apply_gradients(grads=rows, losses=losses)
    updates, _ = tx.update(rows, tx.init(PARAMS), PARAMS, losses=losses)
    chex.assert_trees_all_close(new.params, optax.apply_updates(PARAMS, updates), rtol=1e-6)
    with pytest.raises(ValueError, match="scale_invariant reads losses"):
        _train_state(tx, train_state.TrainState).apply_gradients(grads=rows, losses=losses)
    of_flax = _train_state(optax.chain(rule(), optax.sgd(0.1)), train_state.TrainState)
    new = of_flax.apply_gradients(grads=rows)
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, PARAMS, aggregate(losses_and_rows()[1]))
    chex.assert_trees_all_close(new.params, expected, rtol=1e-6)


def _nnx(tx):
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.w, self.b = nnx.Param(PARAMS["w"]), nnx.Param(PARAMS["b"])

    model = Model()
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@row(
    "`nnx.Optimizer`, `nnx.jit`",
    WORKS,
    "`optimizer.update(model, jacobian, losses=losses)`, with the Jacobian with respect to "
    "`nnx.state(model, nnx.Param)`",
)
def _():
    from flax import nnx

    tx = optax.chain(jaxmtl.scale_invariant(num_tasks=2), optax.adam(0.1))
    model, optimizer = _nnx(tx)

    @nnx.jit
    def step(model, optimizer):
        graph, params = nnx.split(model)

        def of_params(params):
            model = nnx.merge(graph, params)
            return losses_fn({"w": model.w[...], "b": model.b[...]})

        losses, jacobian = jaxmtl.value_and_jacobian(of_params)(params)
        optimizer.update(model, jacobian, losses=losses)

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        step(model, optimizer)
        losses, rows = jax.jit(jaxmtl.value_and_jacobian(losses_fn))(params)
        updates, state = tx.update(rows, state, params, losses=losses)
        params = jaxmtl.apply_updates(params, updates)
    np.testing.assert_allclose(model.w[...], params["w"], rtol=1e-5)
    weights = optax.tree.get(optimizer.opt_state, "mtl_weights")
    np.testing.assert_allclose(weights[...], optax.tree.get(state, "mtl_weights"), rtol=1e-5)


@row(
    "Equinox",
    WORKS,
    "with respect to `eqx.filter(model, eqx.is_inexact_array)`; `eqx.apply_updates` adds to the "
    "model, without a check of shapes, `jaxmtl.apply_updates` to the filtered part",
)
def _():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.chain(jaxmtl.scale_invariant(), optax.sgd(0.1))

    def of_params(params):
        return eqx.combine(params, static)(jnp.ones(2)) ** 2 + 1

    losses, rows = jax.jit(jaxmtl.value_and_jacobian(of_params))(params)
    updates, _ = once(tx, rows, params=params, losses=losses)
    added = eqx.apply_updates(model, updates)
    checked = eqx.combine(jaxmtl.apply_updates(params, updates), static)
    chex.assert_trees_all_close(
        eqx.filter(added, eqx.is_array), eqx.filter(checked, eqx.is_array), rtol=1e-6
    )
    assert float(jnp.sum(jnp.abs(checked.weight - model.weight))) > 0
    assert eqx.apply_updates(params, rows).weight.shape == (3, 3, 2)
    refused(params, rows)


@row(
    "Orbax",
    WORKS,
    "states are pytrees of arrays without typed keys; `experiments/examples/checkpoint.py` resumes "
    "a run",
)
def _():
    import tempfile

    ocp = pytest.importorskip("orbax.checkpoint")
    tx = optax.chain(jaxmtl.famo(num_tasks=2), optax.adam(0.1))
    losses, rows = losses_and_rows()
    extra = {"losses": losses, "previous_batch_losses": losses}
    _, state = once(tx, rows, **extra)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(Path(folder) / "state", tx.init(PARAMS))
    chex.assert_trees_all_equal(restored, state)
    for x in jax.tree.leaves(state):
        assert not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@row(
    "`flax.serialization`",
    WORKS,
    "for states of this library; it fails on a typed PRNG key of your own: keep "
    "`jax.random.key_data(key)`",
)
def _():
    from flax import serialization

    tx = optax.chain(jaxmtl.pcgrad(num_tasks=2, seed=3), optax.adam(0.1))
    _, state = once(tx, losses_and_rows()[1])
    restored = serialization.from_bytes(tx.init(PARAMS), serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="key_data"):
        serialization.to_bytes({"key": key})
    data = {"key": jax.random.key_data(key)}
    restored = serialization.from_bytes(data, serialization.to_bytes(data))
    assert jax.random.wrap_key_data(restored["key"]) == key


# --- the tests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", some([(r,) for r in ROWS], 12), ids=lambda row: row.wrapper.replace("`", "")
)
def test_row(row):
    pytest.importorskip("flax")
    row.check()


def test_the_table_of_the_guide_is_the_one_checked_here():
    page = Path(__file__).parents[1] / "notebooks" / "guide" / "wrappers.md"
    assert table() in page.read_text()
    assert len({row.wrapper for row in ROWS}) == len(ROWS)


if __name__ == "__main__":
    print(table())
