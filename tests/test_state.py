"""Promises about state, for every rule that keeps one: resuming, absent tasks, bad numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxmtl.combinators import cr_mogm, every_k
from jaxmtl.rules.db_mtl import db_mtl
from jaxmtl.rules.dwa import dwa
from jaxmtl.rules.excess_mtl import excess_mtl
from jaxmtl.rules.famo import famo
from jaxmtl.rules.go4align import go4align
from jaxmtl.rules.graddrop import graddrop
from jaxmtl.rules.gradnorm import gradnorm
from jaxmtl.rules.gradvac import gradvac
from jaxmtl.rules.imtl import imtl
from jaxmtl.rules.ldc_mtl import ldc_mtl
from jaxmtl.rules.learned_scale import imtl_l, uncertainty_weighting
from jaxmtl.rules.mgda import mgda
from jaxmtl.rules.moco import moco
from jaxmtl.rules.modo import modo
from jaxmtl.rules.pcgrad import pcgrad
from jaxmtl.rules.rlw import rlw
from jaxmtl.rules.scale_invariant import gls, scale_invariant
from jaxmtl.rules.sdmgrad import sdmgrad
from jaxmtl.rules.stch import stch
from jaxmtl.transforms.track_gradients import track_gradients

# One worker, which compiles each rule once.
pytestmark = pytest.mark.xdist_group("state")

RULES = {
    "scale_invariant": lambda m: scale_invariant(num_tasks=m),
    "gls": lambda m: gls(num_tasks=m),
    "rlw": lambda m: rlw(num_tasks=m),
    "dwa": lambda m: dwa(num_tasks=m, steps_per_epoch=2),
    "uncertainty_weighting": lambda m: uncertainty_weighting(num_tasks=m),
    "imtl_l": lambda m: imtl_l(num_tasks=m),
    "stch": lambda m: stch(num_tasks=m),
    "stch_code": lambda m: stch(form="code", num_tasks=m, warmup_epochs=0),
    "famo": lambda m: famo(num_tasks=m),
    "go4align": lambda m: go4align(num_tasks=m),
    "ldc_mtl": lambda m: ldc_mtl(num_tasks=m, normalize="ratio", steps_per_epoch=3),
    "ldc_mtl_log": lambda m: ldc_mtl(num_tasks=m, normalize="log", smooth=0.01, double_loop=True),
    "ldc_mtl_features": lambda m: ldc_mtl(num_tasks=m, feature_size=2, hidden=(m,)),
    "gradnorm": lambda m: gradnorm(num_tasks=m),
    "imtl": lambda m: imtl(num_tasks=m),
    "moco": lambda m: moco(num_tasks=m, beta=0.5, initial="first"),
    "moco_code": lambda m: moco(
        num_tasks=m, beta=0.5, order="code", projection="softmax", normalize="norm_loss"
    ),
    "track": lambda m: optax.chain(track_gradients(0.5, num_tasks=m), mgda(num_tasks=m)),
    "excess_mtl": lambda m: excess_mtl(num_tasks=m),
    "db_mtl": lambda m: db_mtl(num_tasks=m, sigma=0.5),
    "modo": lambda m: modo(num_tasks=m),
    "sdmgrad": lambda m: sdmgrad(num_tasks=m),
}
# One of each kind of state; those of all rules are saved in a slow test.
QUICK = ("dwa", "famo", "ldc_mtl", "moco", "track", "graddrop", "cr_mogm", "every_k")
# Rules of other files whose state must survive a checkpoint too.
ELSEWHERE = {
    "gradvac": lambda m: gradvac(num_tasks=m),
    "pcgrad": lambda m: pcgrad(num_tasks=m),
    "graddrop": lambda m: graddrop(num_tasks=m),
    "cr_mogm": lambda m: cr_mogm(famo(num_tasks=m), num_tasks=m),
    "every_k": lambda m: every_k(mgda(num_tasks=m), 2),
}
NO_LOSSES = {"moco", "track", "excess_mtl", "modo", "sdmgrad"}
PARAMS = {"a": jnp.zeros(2), "b": jnp.zeros((2, 1))}
MASK = np.array([True, False, True])


@functools.cache
def compiled(name, m):
    """The rule and its step, compiled once for all tests; the trace is counted."""
    aggregator, traces = (RULES | ELSEWHERE)[name](m), []

    def step(jacobian, state, inputs):
        traces.append(name)
        return aggregator.update(jacobian, state, PARAMS, **inputs)

    return jax.jit(aggregator.init), jax.jit(step), traces


def data(t, m=3):
    """Gradients and every extra argument of step t."""
    rng = np.random.default_rng(t)
    jacobian = {
        name: rng.standard_normal((m, *x.shape)).astype(np.float32) for name, x in PARAMS.items()
    }
    inputs = {
        "losses": rng.uniform(0.5, 2, m).astype(np.float32),
        "previous_batch_losses": rng.uniform(0.5, 2, m).astype(np.float32),
        "lower_losses": rng.uniform(0.5, 2, m).astype(np.float32),
        "cross_gramian": rng.standard_normal((m, m)).astype(np.float32),
        "features": rng.standard_normal((4, 2)).astype(np.float32),
        "task_mask": np.ones(m, bool),
    }
    return jacobian, inputs


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def skipped(state):
    return int(optax.tree.get(state, "mtl_skipped"))


@functools.cache
def three_steps(name):
    """The states of a rule after 0, 1, 2 and 3 steps, and the last update."""
    init, step, _ = compiled(name, 3)
    states = [init(PARAMS)]
    for t in range(3):
        jacobian, inputs = data(t)
        update, state = step(jacobian, states[-1], inputs)
        states.append(state)
    return states, update


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(QUICK, id="few"),
        pytest.param(tuple(RULES | ELSEWHERE), marks=pytest.mark.slow, id="all"),
    ],
)
def test_a_restored_run_is_the_run_that_was_not_stopped(rules, tmp_path):
    saved = {name: three_steps(name)[0][2] for name in rules}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", saved)
        checkpointer.wait_until_finished()
        targets = {name: compiled(name, 3)[0](PARAMS) for name in saved}
        restored = checkpointer.restore(tmp_path / "states", targets)
    for name in rules:
        states, update = three_steps(name)
        assert jax.tree.structure(restored[name]) == jax.tree.structure(states[2])
        jacobian, inputs = data(2)
        resumed = compiled(name, 3)[1](jacobian, restored[name], inputs)
        assert_same(resumed, (update, states[3]))


@pytest.mark.parametrize("rule", RULES)
def test_state_keeps_its_form_and_compiles_once(rule):
    states, update = three_steps(rule)
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states]
    assert forms[0] == forms[1] == forms[3]
    assert finite(states)
    assert finite(update)
    assert skipped(states[3]) == 0
    assert len(compiled(rule, 3)[2]) == 1
    for name in ("count", "ready"):
        assert not optax.tree.get_all_with_path(states[0], name)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"rlw", "ldc_mtl_features"}))
def test_an_absent_task_is_removed_exactly(rule):
    """As if it did not exist, whatever its row and its losses hold."""
    (init, step, _), (init_2, step_2, _) = compiled(rule, 3), compiled(rule, 2)
    state, small = init(PARAMS), init_2(PARAMS)
    for t in range(3):
        jacobian, inputs = data(t)
        of_two = {k: v[MASK] if v.shape[0] == 3 else v for k, v in inputs.items()}
        of_two["cross_gramian"] = of_two["cross_gramian"][:, MASK]
        expected, small = step_2({k: v[MASK] for k, v in jacobian.items()}, small, of_two)
        of_tasks = ("losses", "previous_batch_losses", "lower_losses")
        for x in (*jacobian.values(), *(inputs[name] for name in of_tasks)):
            x[1] = np.nan
        inputs["cross_gramian"][1], inputs["cross_gramian"][:, 1] = np.nan, np.nan
        update, state = step(jacobian, state, inputs | {"task_mask": MASK})
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), update, expected
        )
    assert skipped(state) == 0
    assert finite(state)
    # It comes back without a second compilation.
    jacobian, inputs = data(3)
    update, state = step(jacobian, state, inputs)
    assert finite((update, state))
    assert len(compiled(rule, 3)[2]) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["losses", "gradients"])
def test_a_nan_never_enters_the_state(rule, where):
    if where == "losses" and rule in NO_LOSSES:
        pytest.skip("does not read losses")
    before = three_steps(rule)[0][2]
    jacobian, inputs = data(2)
    (inputs["losses"] if where == "losses" else jacobian["a"][1])[...] = np.nan
    update, after = compiled(rule, 3)[1](jacobian, before, inputs)
    assert_same(update, jax.tree.map(jnp.zeros_like, update))
    assert skipped(after) == skipped(before) + 1
    assert_same(optax.tree.set(after, mtl_skipped=jnp.int32(0)), before)


@pytest.mark.parametrize("rule", sorted(set(RULES) - NO_LOSSES))
@pytest.mark.parametrize(
    "losses", [[0, -1, 1], [0, 0, 0], [-1, -2, -3], [1e30, 1e-30, 1], [1e-30, 1e-30, 1e30]]
)
def test_extreme_losses(rule, losses):
    """State and update stay finite and the next ordinary step is taken."""
    init, step, _ = compiled(rule, 3)
    state = init(PARAMS)
    jacobian, inputs = data(0)
    extreme = np.array(losses, np.float32)
    for _ in range(2):
        update, state = step(
            jacobian, state, inputs | {"losses": extreme, "previous_batch_losses": extreme}
        )
        assert finite(update)
        assert finite(state)
    before = skipped(state)
    update, state = step(jacobian, state, inputs)
    assert finite((update, state))
    if not (rule == "ldc_mtl" and max(losses) == 1e30):  # divided by l_0 until the epoch's end
        assert skipped(state) == before
