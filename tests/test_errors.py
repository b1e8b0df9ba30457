"""Wrong input across all public functions: each is a ValueError with a sentence that helps."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmtl

M = 3
P = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}
ROWS = jax.tree.map(lambda x: jnp.ones((M, *x.shape)), P)
X = jnp.ones((5, 4))
G = jnp.eye(M)
LOSSES = jnp.ones(M)


def losses_fn(params, x):
    z = x @ params["w"] + params["b"]
    return jnp.stack([jnp.mean(z[:, 0]), jnp.mean(z[:, 1]), jnp.mean(z**2)])


def one(params, x):
    return jnp.sum(x @ params["w"] + params["b"])


def both(params, x):
    z = x @ params["w"]
    return {"a": jnp.mean(z), "b": jnp.mean(z**2)}


def update(aggregator, rows=ROWS, params=P, **inputs):
    return aggregator.update(rows, aggregator.init(P), params, **inputs)


def weigh(aggregator, gramian=G, **inputs):
    return aggregator.weighting.update(gramian, aggregator.weighting.init(), **inputs)


def route(losses=losses_fn, rule=None, state=..., args=(X,), options=None, **extra):
    rule = jaxmtl.upgrad() if rule is None else rule
    state = rule.init(P) if state is ... else state
    return jaxmtl.value_and_grad(losses, rule, **(options or {}))(P, state, *args, **extra)


def by_adam():
    return optax.chain(jaxmtl.upgrad(), optax.adam(1e-3)).init(P)


WRONG = {
    # methods: their construction
    "c below 0": (lambda: jaxmtl.cagrad(-1.0), r"expected c in \[0"),
    "c of another type": (lambda: jaxmtl.cagrad("much"), "c to be a number"),
    "rescale unknown": (lambda: jaxmtl.cagrad(rescale="half"), "rescale to be one of"),
    "state without num_tasks": (lambda: jaxmtl.gradvac(), "num_tasks=m"),
    "num_tasks of 0": (lambda: jaxmtl.mgda(num_tasks=0), "positive int"),
    "num_tasks of 2.0": (lambda: jaxmtl.famo(num_tasks=2.0), "positive int"),
    "num_tasks True": (lambda: jaxmtl.upgrad(num_tasks=True), "positive int"),
    "preference negative": (lambda: jaxmtl.upgrad(preference=[1.0, -1.0]), "nonnegative"),
    "preference zero": (lambda: jaxmtl.upgrad(preference=[0.0, 0.0]), "not all zero"),
    "preference square": (lambda: jaxmtl.upgrad(preference=jnp.eye(2)), r"shape \(m,\)"),
    "preference of other m": (
        lambda: jaxmtl.upgrad(preference=[1.0, 2.0], num_tasks=3),
        "agree with num_tasks",
    ),
    "preference infinite": (lambda: jaxmtl.aligned_mtl(preference=[1.0, jnp.inf]), "finite"),
    "preference by number": (lambda: jaxmtl.upgrad(preference={0: 1.0, 1: 2.0}), "strings"),
    "scale unknown": (lambda: jaxmtl.aligned_mtl(scale="max"), "scale to be one of"),
    "krum with f of 1.5": (lambda: jaxmtl.krum(1.5), "num_byzantine"),
    "trim below 0": (lambda: jaxmtl.trimmed_mean(-1), "trim"),
    "leak above 1": (lambda: jaxmtl.graddrop(leak=[2.0]), "leak"),
    "beta above 1": (lambda: jaxmtl.track_gradients(1.5, num_tasks=2), "beta"),
    "clip at 0": (lambda: jaxmtl.clip_rows(0.0), "max_norm"),
    "temperature 0": (lambda: jaxmtl.dwa(0.0, num_tasks=2), "temperature"),
    "steps of 0 epochs": (lambda: jaxmtl.dwa(num_tasks=2, steps_per_epoch=0), "steps_per_epoch"),
    "mu of 0": (lambda: jaxmtl.stch(0.0), "mu"),
    "a British keyword": (lambda: jaxmtl.nash_mtl(normalise=True), "normalize="),
    "k of 0": (lambda: jaxmtl.every_k(jaxmtl.mgda(), 0), "expected k"),
    "alpha of 2": (lambda: jaxmtl.cr_mogm(jaxmtl.mgda(), alpha=2.0, num_tasks=2), "alpha"),
    "alpha unknown": (lambda: jaxmtl.cr_mogm(jaxmtl.mgda(), alpha="x", num_tasks=2), "alpha"),
    "corollary 1 without a rate": (
        lambda: jaxmtl.cr_mogm(jaxmtl.mgda(), alpha="corollary1", num_tasks=2),
        "learning_rate",
    ),
    "averaging coordinates": (lambda: jaxmtl.cr_mogm(jaxmtl.graddrop()), "value_and_jacobian"),
    "averaging a chain": (
        lambda: jaxmtl.every_k(optax.chain(jaxmtl.mgda()), 2),
        "before chaining",
    ),
    "averaging a factory": (lambda: jaxmtl.scale_rows(jaxmtl.mgda), "weighting"),
    "scale_rows by size": (lambda: jaxmtl.scale_rows(jaxmtl.mgda(), by="size"), "by to be one of"),
    "accumulation of 0": (lambda: jaxmtl.multi_steps(jaxmtl.mgda(), 0, num_tasks=2), "expected k"),
    "accumulation for no m": (lambda: jaxmtl.multi_steps(jaxmtl.mgda(), 2), "num_tasks=m"),
    "a method that is none": (lambda: jaxmtl.make("upgrid"), "upgrad"),
    "a hyperparameter that is none": (lambda: jaxmtl.make("mgda", c=1.0), "got c="),
    "a rule of no inputs": (lambda: jaxmtl.from_weighting(lambda g: g), "lambda gramian"),
    "a rule on coordinates": (lambda: jaxmtl.from_weighting(lambda jacobian: 1), "from_rows"),
    # methods: their steps
    "gradients without tasks": (lambda: update(jaxmtl.mgda(), P), "without a task axis"),
    "no params": (lambda: update(jaxmtl.mgda(), params=None), "params=None"),
    "another structure": (lambda: update(jaxmtl.mgda(), {"w": ROWS["w"]}), "structure"),
    "tasks on the last axis": (
        lambda: update(jaxmtl.mgda(), jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), ROWS)),
        "task axis",
    ),
    "two numbers of tasks": (
        lambda: update(jaxmtl.mgda(), {**ROWS, "b": jnp.ones((M + 1, 2))}),
        "same number of tasks",
    ),
    "whole numbers": (
        lambda: update(jaxmtl.mgda(), jax.tree.map(lambda x: x.astype(int), ROWS)),
        "floating point",
    ),
    "another m": (lambda: update(jaxmtl.mgda(num_tasks=M + 1)), "num_tasks"),
    "no losses": (lambda: update(jaxmtl.scale_invariant()), "scale_invariant reads losses"),
    "losses of other m": (
        lambda: update(jaxmtl.gls(), losses=jnp.ones(M + 1)),
        r"losses of shape \(3,\)",
    ),
    "losses of examples": (
        lambda: update(jaxmtl.gls(), losses=jnp.ones((5, M))),
        r"average over the examples",
    ),
    "losses of other names": (
        lambda: update(
            jaxmtl.gls(),
            losses=dict.fromkeys("abc", 1.0),
            task_mask=dict.fromkeys("abd", True),
        ),
        "task names of",
    ),
    "a mask of numbers": (lambda: update(jaxmtl.mgda(), task_mask=jnp.ones(M)), "bool task_mask"),
    "a mask of other m": (
        lambda: update(jaxmtl.mgda(), task_mask=jnp.ones(M + 1, bool)),
        r"task_mask of shape \(3,\)",
    ),
    "a mask for a rule without": (
        lambda: update(
            jaxmtl.from_weighting(lambda gramian: gramian[0]), task_mask=jnp.ones(M, bool)
        ),
        "names task_mask",
    ),
    "no cross-Gramian": (lambda: update(jaxmtl.modo(num_tasks=M)), r"jaxmtl\.cross_gramian"),
    "a cross-Gramian of other m": (
        lambda: update(jaxmtl.modo(num_tasks=M), cross_gramian=jnp.eye(M + 1)),
        "tasks by tasks",
    ),
    "no losses of the batch before": (
        lambda: update(jaxmtl.famo(num_tasks=M), losses=LOSSES),
        "zeros at first",
    ),
    "no features": (
        lambda: update(jaxmtl.ldc_mtl(num_tasks=M, feature_size=2), losses=LOSSES),
        "features",
    ),
    "features of other size": (
        lambda: update(
            jaxmtl.ldc_mtl(num_tasks=M, feature_size=2), losses=LOSSES, features=jnp.ones(3)
        ),
        "channels last",
    ),
    "too few tasks for krum": (lambda: update(jaxmtl.krum(1)), "krum needs"),
    "too few tasks to trim": (lambda: update(jaxmtl.trimmed_mean(2)), "lower trim"),
    "a Gramian that is no square": (lambda: weigh(jaxmtl.mgda(), jnp.ones((2, 3))), r"\(m, m\)"),
    "no Gramian": (lambda: weigh(jaxmtl.mgda(), None), "value_and_gramian"),
    "an m that nobody knows": (lambda: weigh(jaxmtl.rgw(), None), "number of tasks"),
    "a preference of other m at run time": (
        lambda: update(jaxmtl.upgrad(), preference=jnp.ones(2)),
        r"preference of shape \(3,\)",
    ),
    "a preference of other m for the mean": (
        lambda: update(jaxmtl.linear_scalarization(), preference=jnp.ones(2)),
        r"preference of shape \(3,\)",
    ),
    # routes
    "no function": (lambda: jaxmtl.value_and_gramian(3), "pass the function itself"),
    "a scalar loss": (lambda: route(one), "jnp.stack"),
    "losses of a batch": (lambda: route(lambda p, x: x @ p["w"]), "average over the batch"),
    "whole losses": (lambda: route(lambda p, x: jnp.arange(3)), "floating point losses"),
    "a list of losses": (lambda: route(lambda p, x: [1.0, 2.0]), "stack"),
    "named losses that are vectors": (lambda: route(lambda p, x: {"a": x @ p["w"]}), "scalar"),
    "losses named by numbers": (lambda: route(lambda p, x: {0: 1.0, 1: 2.0}), "string"),
    "no aux": (lambda: route(options={"has_aux": True}), "has_aux"),
    "whole parameters": (
        lambda: jaxmtl.value_and_gramian(losses_fn)({"w": jnp.ones(3, int)}, X),
        "floating point parameters",
    ),
    "no parameters": (lambda: jaxmtl.value_and_gramian(losses_fn)({}, X), "empty pytree"),
    "in_axes of one entry": (lambda: route(one, options={"in_axes": 0}), r"\(None, 0\)"),
    "in_axes of other length": (
        lambda: route(one, args=(X, X), options={"in_axes": (None, 0)}),
        r"\(None, 0, 0\)",
    ),
    "in_axes that map nothing": (lambda: route(one, options={"in_axes": (None, None)}), "map"),
    "batches of two sizes": (
        lambda: route(one, args=(X, X[:2]), options={"in_axes": (None, 0, 0)}),
        "one positive batch size",
    ),
    "an axis that is not there": (lambda: route(one, options={"in_axes": (None, 2)}), "axis 2"),
    "encoder with in_axes": (
        lambda: route(one, options={"in_axes": (None, 0), "encoder": one}),
        "drop one of them",
    ),
    "chunks of 0": (lambda: route(options={"chunk_size": 0}), "chunk_size"),
    "chunks of 1.5": (
        lambda: jaxmtl.value_and_jacobian(losses_fn, chunk_size=1.5),
        "chunk_size",
    ),
    "nothing shared": (lambda: route(options={"shared": False}), "at least one shared"),
    "shared that fits nothing": (lambda: route(options={"shared": {"v": True}}), "prefix"),
    "a rule on coordinates without them": (lambda: route(rule=jaxmtl.graddrop()), "Jacobian route"),
    "a factory for a rule": (lambda: route(rule=jaxmtl.upgrad, state=()), r"upgrad\(\)|call"),
    "a chain's state": (lambda: route(state=by_adam()), "chain"),
    "no state": (lambda: jaxmtl.value_and_grad(losses_fn, jaxmtl.upgrad())(P, X), "state"),
    "a keyword of nobody": (lambda: route(scale=2.0), "scale="),
    "a batch missing": (
        lambda: jaxmtl.value_and_jacobian({"a": one, "b": one})(P, {"a": X[0]}),
        "keys|names|batches",
    ),
    "several functions and in_axes": (
        lambda: jaxmtl.value_and_jacobian({"a": one, "b": one}, in_axes=(None, 0)),
        "in_axes",
    ),
    "several batches and a vector": (
        lambda: jaxmtl.value_and_jacobian({"a": losses_fn})(P, {"a": X}),
        "scalar",
    ),
    "batches not in tuples": (
        lambda: jaxmtl.cross_gramian(losses_fn)(P, X, X),
        r"\(batch1,\)",
    ),
    "names of other number": (lambda: jaxmtl.named(("a", "b"), LOSSES), "name"),
    # arrays, updates, logs
    "weights of other m": (lambda: jaxmtl.combine(ROWS, jnp.ones(2)), "one per row"),
    "an empty Jacobian": (lambda: jaxmtl.gramian({}), "at least one leaf"),
    "two structures": (lambda: jaxmtl.gramian(ROWS, {"w": ROWS["w"]}), "one structure"),
    "rows for an update": (lambda: jaxmtl.apply_updates(P, ROWS), "first in the chain"),
    "Adam first": (
        lambda: jaxmtl.check(optax.chain(optax.adam(1e-3), jaxmtl.mgda()), P, M),
        "first in the chain",
    ),
    "frozen by zeros": (
        lambda: jaxmtl.check(
            optax.partition({"a": jaxmtl.mgda(), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
            P,
            M,
        ),
        r"jaxmtl\.frozen\(\)",
    ),
    "three names for two tasks": (
        lambda: jaxmtl.monitor(gramian=jnp.eye(2), names=("a", "b", "c")),
        "one name per task",
    ),
    "metrics of two shapes": (
        lambda: jaxmtl.metrics.delta_m(jnp.ones(2), jnp.ones(3), jnp.ones(2, bool)),
        "one shape",
    ),
    "no lower steps below 0": (
        lambda: jaxmtl.hypergradient(losses_fn, one, num_steps=-1),
        "num_steps",
    ),
    "an unknown solver": (lambda: jaxmtl.hypergradient(losses_fn, one, solver="lu"), "solver"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_a_sentence(name):
    call, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert "expected" in text or "needs" in text
    assert len(text.split()) > 5


def test_the_table_is_long():
    assert len(WRONG) >= 60
