"""The contract of a rule's author: a function gets the inputs it names."""

import contextlib
import copy
import dataclasses
import doctest
import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmtl
from tests.methods import INPUTS, METHODS, Method

M = 3
ROWS = jnp.array([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [-1.0, 1.0, 0.0]])
PARAMS = jnp.zeros(3)


def step(aggregator, **inputs):
    return aggregator.update(ROWS, aggregator.init(PARAMS), PARAMS, **inputs)


def test_what_is_always_supplied_is_there_on_both_routes():
    seen = []

    def weigh(state, task_mask, m, dtype, log2_scale, key, preference):
        seen.append((state, task_mask.shape, m, dtype, jnp.shape(log2_scale), key, preference))
        return jnp.ones(m, dtype)

    aggregator = jaxmtl.from_weighting(weigh, num_tasks=M)
    step(aggregator)
    aggregator.weighting.update(None, aggregator.weighting.init())
    assert seen == [((), (M,), M, jnp.dtype("float32"), (), None, None)] * 2


def test_the_gramian_is_computed_only_for_a_rule_that_names_it():
    def products(aggregator):
        text = str(jax.make_jaxpr(lambda: step(aggregator, losses=jnp.ones(M))[0])())
        return text.count("dot_general")

    without = jaxmtl.from_weighting(lambda losses: 1 / losses)
    optional = jaxmtl.from_weighting(lambda losses, gramian=None: 1 / losses)
    assert products(without) == products(optional) == 1  # J^T w
    assert products(jaxmtl.from_weighting(lambda gramian: gramian[0])) == 2


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (lambda losses: losses, "losses"),
        (lambda cross_gramian: cross_gramian[0], "cross_gramian"),
        (lambda m, features: features[:m], "features"),
        (lambda gramian, temperature: gramian[0] * temperature, "temperature"),
    ],
)
def test_what_is_missing_is_reported_with_the_name_of_the_rule(function, missing):
    function.__qualname__ = "my_rule"
    with pytest.raises(ValueError, match=rf"my_rule reads {missing}: expected update"):
        step(jaxmtl.from_weighting(function))


def test_a_near_name_is_pointed_out():
    with pytest.raises(ValueError, match="the input losses"):
        step(jaxmtl.from_weighting(lambda gramian, loss: gramian[0]))


@pytest.mark.parametrize("function", [lambda g: g, lambda a, b: a, lambda *gramian: 1])
def test_a_function_that_names_no_input_is_refused(function):
    for wrap in (jaxmtl.from_weighting, jaxmtl.from_rows):
        with pytest.raises(ValueError, match="inputs"):
            wrap(function)


def test_keywords_bound_by_partial_are_not_inputs():
    def weigh(gramian, losses, temperature):
        return losses * temperature

    bound = functools.partial(weigh, temperature=2.0, losses=jnp.ones(M))
    aggregator = jaxmtl.from_weighting(bound)
    update, _ = step(aggregator, temperature=100.0, losses=jnp.zeros(M))
    np.testing.assert_allclose(update, 2 * ROWS.sum(0))
    assert aggregator.rule.needs == {"gramian"}


def test_coordinates_need_from_rows():
    with pytest.raises(ValueError, match="from_rows"):
        jaxmtl.from_weighting(lambda jacobian: jnp.ones(M))
    update, _ = step(jaxmtl.from_rows(lambda jacobian, m: jacobian.sum(0) / m))
    np.testing.assert_allclose(update, ROWS.mean(0), rtol=1e-6)


def test_a_coordinate_rule_gets_a_gramian_that_it_names():
    def normed(jacobian, gramian, log2_scale):
        norms = jnp.sqrt(jnp.diagonal(gramian)) * 2.0**log2_scale
        return (jacobian / norms[:, None]).sum(0)

    expected = (ROWS / jnp.linalg.norm(ROWS, axis=1, keepdims=True)).sum(0)
    np.testing.assert_allclose(step(jaxmtl.from_rows(normed))[0], expected, rtol=1e-6)


def test_a_preference_of_the_step_overrides_the_one_of_the_construction():
    def weigh(preference, task_mask, dtype):
        return jnp.where(task_mask, preference, 0).astype(dtype)

    aggregator = jaxmtl.from_weighting(weigh, preference=[1.0, 2.0, 3.0])
    np.testing.assert_allclose(step(aggregator)[0], jnp.array([1.0, 2.0, 3.0]) @ ROWS)
    later = jnp.array([0.0, 1.0, 0.0])
    np.testing.assert_allclose(step(aggregator, preference=later)[0], ROWS[1])
    with pytest.raises(ValueError, match="nonnegative"):
        jaxmtl.from_weighting(weigh, preference=[1.0, -1.0])
    with pytest.raises(ValueError, match="preference"):
        step(jaxmtl.from_weighting(weigh, preference=[1.0, 1.0]))


def test_dicts_by_task_name_are_vectors_in_sorted_order():
    rule = jaxmtl.from_weighting(lambda losses, task_mask: jnp.where(task_mask, losses, 0))
    losses = {"b": jnp.array(2.0), "a": jnp.array(1.0), "c": jnp.array(3.0)}
    mask = {"a": True, "b": False, "c": True}
    expected = jnp.array([1.0, 0.0, 3.0]) @ ROWS
    np.testing.assert_allclose(step(rule, losses=losses, task_mask=mask)[0], expected)
    with pytest.raises(ValueError, match="task names of"):
        step(rule, losses=losses, task_mask={"a": True, "b": True, "d": True})
    with pytest.raises(ValueError, match="strings"):
        step(rule, losses={0: 1.0, 1: 2.0, 2: 3.0})


def test_a_weighting_without_a_gramian_knows_m_from_what_it_reads():
    cross = jnp.diag(jnp.array([0.0, 5.0]))
    weighting = jaxmtl.modo(0.2, num_tasks=2).weighting
    weights, _ = weighting.update(None, weighting.init(), cross_gramian=cross)
    np.testing.assert_allclose(weights, [0.75, 0.25])
    with pytest.raises(ValueError, match="number of tasks"):
        jaxmtl.rgw().weighting.update(None, jaxmtl.rgw().weighting.init())


def test_replacing_a_field_keeps_the_weighting():
    aggregator = jaxmtl.mgda()
    changed = aggregator._replace(init=aggregator.init)
    assert changed.weighting is aggregator.weighting
    assert changed.rule is copy.copy(aggregator).rule is aggregator.rule


def test_state_and_its_absence_are_told_apart():
    with pytest.raises(ValueError, match="init="):
        step(jaxmtl.from_weighting(lambda gramian, state: (gramian[0], state)))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        step(jaxmtl.from_weighting(lambda gramian: gramian))
    with pytest.raises(ValueError, match="takes no reads="):
        jaxmtl.from_weighting(lambda gramian: gramian[0], reads=("gramian",))


def test_every_k_holds_heads_together_with_weights():
    bare = jaxmtl.gradnorm(num_tasks=2)
    held = jaxmtl.every_k(bare, 2)
    gramian, losses = jnp.diag(jnp.array([1.0, 9.0])), jnp.ones(2)
    state, own = held.weighting.init(), bare.weighting.init()
    for k in range(4):
        heads = held.weighting.head_weights(state)
        if k % 2 == 0:
            expected, (weights, own) = (
                bare.weighting.head_weights(own),
                bare.weighting.update(gramian, own, losses=losses),
            )
        np.testing.assert_array_equal(heads, expected)
        found, state = held.weighting.update(gramian, state, losses=losses)
        np.testing.assert_array_equal(found, weights)


def test_methods_and_make():
    methods = jaxmtl.methods()
    assert set(methods) <= set(jaxmtl.__all__)
    aggregator = jaxmtl.make("cagrad", num_tasks=2, c=0.4)
    assert aggregator.rule.num_tasks == 2
    with pytest.raises(ValueError, match="cagrad"):
        jaxmtl.make("cagard")
    with pytest.raises(ValueError, match=r"c=0\.5"):
        jaxmtl.make("cagrad", alpha=1)
    with pytest.raises(ValueError, match="needs aggregator"):
        jaxmtl.make("cr_mogm", num_tasks=2)
    with pytest.raises(ValueError, match="num_tasks"):
        jaxmtl.make("famo")
    with pytest.raises(ValueError, match="normalize="):
        jaxmtl.nash_mtl(normalise=True)


def test_every_method_is_in_the_list():
    """Whatever public factory returns an aggregator of its own is listed, and nothing else."""
    others = {"from_rows", "from_weighting", "multi_steps", "make", "frozen", "Aggregator"}
    found = {
        name
        for name in jaxmtl.__all__
        if getattr(getattr(jaxmtl, name), "__annotations__", {}).get("return") is jaxmtl.Aggregator
    }
    assert found - others == set(jaxmtl.methods())


@contextlib.contextmanager
def strict():
    """The two flags under which JAX refuses what it otherwise lets pass."""
    with jax.numpy_rank_promotion("raise"), jax.enable_checks(True):
        yield


@pytest.mark.parametrize("method", [*METHODS, Method("dwa", {"window": 4})], ids=lambda m: m.name)
def test_no_method_relies_on_rank_promotion(method):
    """Users' flags hold in the library too: nothing of it broadcasts ranks silently."""
    m = max(4, method.min_tasks)
    rows, params = jnp.ones((m, 6)), jnp.zeros(6)
    aggregator = method.make(m)
    inputs = {read: INPUTS[read](m) for read in method.inputs}

    def update(rows, mask):
        state = aggregator.init(params)
        return aggregator.update(rows, state, params, task_mask=mask, **inputs)

    with strict():
        found, _ = jax.eval_shape(update, rows, jnp.ones(m, bool))
    assert found.shape == (6,)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["fronts", "loop", "metrics", "solvers.pseudo_inverse"])
def test_no_tool_relies_on_rank_promotion(module):
    with strict():
        failed, attempted = doctest.testmod(importlib.import_module(f"jaxmtl.{module}"))
    assert attempted
    assert not failed


def held(root):
    """Yields the paths to all arrays that functions hold, however deep."""
    seen, stack = set(), [("", root)]
    while stack:
        path, x = stack.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        inner = {}
        if isinstance(x, jax.Array):
            yield path
        elif isinstance(x, types.FunctionType):
            cells = [cell.cell_contents for cell in x.__closure__ or ()]
            inner = dict(zip(x.__code__.co_freevars, cells, strict=True))
            inner |= dict(enumerate(x.__defaults__ or ())) | (x.__kwdefaults__ or {})
        elif isinstance(x, functools.partial):
            inner = {"function": x.func, "arguments": x.args, **x.keywords}
        elif isinstance(x, dict):
            inner = x
        elif isinstance(x, tuple | list):
            inner = dict(enumerate(x))
        elif dataclasses.is_dataclass(x) and not isinstance(x, type):
            inner = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        stack += [(f"{path}/{key}", value) for key, value in inner.items()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_methods_hold_no_arrays_of_their_own(method):
    """An array made at construction has the precision and the mesh of that place."""
    one = jnp.ones(())
    assert list(held(jaxmtl.from_weighting(lambda gramian: gramian[0] * one)))
    assert not list(held(method.make(max(4, method.min_tasks))))
