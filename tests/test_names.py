"""Tasks with names: dicts over tasks on every route."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmtl
from tests.problems import some

NAMES = ("task10", "task2", "x")  # sorted as strings
PARAMS = jnp.array([1.0, -2.0])
X = jnp.array([[1.0, 0.5], [2.0, -1.0], [0.5, 3.0], [1.0, 1.0]])


def vector(p, x):
    return jnp.stack([jnp.mean((x @ p) ** 2), jnp.sum(p**2), jnp.mean(jnp.abs(x @ p))])


def by_name(p, x):
    a, b, c = vector(p, x)
    return {"task2": b, "x": c, "task10": a}


def of_features(p, z, x):
    return by_name(z, x)


def of_vector(p, z, x):
    return vector(z, x)


def of_example(p, x):
    return jnp.stack([(x @ p) ** 2, jnp.sum(p**2), jnp.abs(x @ p)])


def of_example_by_name(p, x):
    a, b, c = of_example(p, x)
    return {"x": c, "task2": b, "task10": a}


ROUTES = {
    "tasks": (by_name, vector, {}),
    "encoder": (of_features, of_vector, {"encoder": lambda p, x: jnp.tanh(p)}),
    "examples": (of_example_by_name, of_example, {"in_axes": (None, 0)}),
    "separate": (
        {name: lambda p, x, name=name: by_name(p, x)[name] for name in NAMES},
        tuple(lambda p, x, i=i: vector(p, x)[i] for i in range(3)),
        {},
    ),
}


def batches(route, named):
    if route != "separate":
        return X
    return dict.fromkeys(NAMES, X) if named else (X,) * 3


def dict_of(losses):
    table = np.asarray(losses).reshape(-1, 3)
    return {name: np.squeeze(table[:, i]) for i, name in enumerate(NAMES)}


def same(found, expected):
    assert list(found) == list(NAMES)
    jax.tree.map(np.testing.assert_array_equal, dict(found), expected)


def with_aux(losses_fn):
    return lambda *args: (losses_fn(*args), args[0])


@pytest.mark.parametrize("has_aux", some([True, False]))
@pytest.mark.parametrize("route", ROUTES)
def test_losses_come_back_as_the_dict(route, has_aux):
    named, plain, options = ROUTES[route]
    if has_aux and route == "separate":
        return  # tested with the others of separate data
    if has_aux:
        named, plain = with_aux(named), with_aux(plain)
    rule = jaxmtl.from_weighting(lambda gramian: jnp.diagonal(gramian))

    def run(losses_fn, x):
        found, gramian, pullback = jaxmtl.value_and_gramian(losses_fn, has_aux=has_aux, **options)(
            PARAMS, x
        )
        step = jaxmtl.value_and_grad(losses_fn, rule, has_aux=has_aux, **options)
        (again, _), grads = step(PARAMS, rule.init(PARAMS), x)
        rest = [gramian, pullback(jnp.arange(float(len(gramian)))), grads]
        if "encoder" not in options:
            rows_of = jaxmtl.value_and_jacobian(losses_fn, has_aux=has_aux, **options)
            third, jacobian = rows_of(PARAMS, x)
            return [found, again, third], [*rest, jacobian]
        return [found, again], rest

    found, rest = jax.jit(lambda x: run(named, x))(batches(route, True))
    expected, of_vector = jax.jit(lambda x: run(plain, x))(batches(route, False))
    for losses, vector_of in zip(found, expected, strict=True):
        if has_aux:
            np.testing.assert_array_equal(losses[1], vector_of[1])
            losses, vector_of = losses[0], vector_of[0]
        same(losses, dict_of(vector_of))
    jax.tree.map(np.testing.assert_array_equal, rest, of_vector)


def every_input(gramian, losses, task_mask, preference, previous_batch_losses, m):
    # Each entry counts, and so does its place.
    found = losses + 10 * preference + 100 * previous_batch_losses
    return jnp.where(task_mask, found, 0)


INPUTS = {
    "task_mask": {"task10": True, "task2": False, "x": True},
    "preference": {"x": 3.0, "task2": 2.0, "task10": 1.0},
    "previous_batch_losses": {"task2": jnp.float32(5.0), "x": 6.0, "task10": 4.0},
}
AS_VECTORS = {
    "task_mask": jnp.array([True, False, True]),
    "preference": jnp.array([1.0, 2.0, 3.0]),
    "previous_batch_losses": jnp.array([4.0, 5.0, 6.0]),
}


@pytest.mark.parametrize("route", some(["tasks", "separate", "encoder"], 2))
def test_inputs_over_tasks_may_be_dicts(route):
    named, _, options = ROUTES[route]
    rule = jaxmtl.from_weighting(every_input, num_tasks=3)
    step = jax.jit(jaxmtl.value_and_grad(named, rule, **options))
    state, x = rule.init(PARAMS), batches(route, True)
    (losses, found), grads = step(PARAMS, state, x, **INPUTS)
    (_, expected), same_grads = step(PARAMS, state, x, **AS_VECTORS)
    np.testing.assert_array_equal(grads, same_grads)
    np.testing.assert_array_equal(found.mtl_weights, expected.mtl_weights)
    assert float(found.mtl_weights[1]) == 0
    np.testing.assert_allclose(found.mtl_weights[2], losses["x"] + 630, rtol=1e-6)
    if route == "encoder":
        return
    losses, jacobian = jaxmtl.value_and_jacobian(named, **options)(PARAMS, x)
    _, by_rows = rule.update(jacobian, state, PARAMS, losses=losses, **INPUTS)
    np.testing.assert_allclose(by_rows.mtl_weights, expected.mtl_weights, rtol=1e-6)


def test_inputs_of_examples_with_named_losses():
    rule = jaxmtl.linear_scalarization()
    step = jax.jit(jaxmtl.value_and_grad(of_example_by_name, rule, in_axes=(None, 0)))
    mask = {
        "task10": jnp.array([True, True, False, True]),
        "task2": jnp.array([True, False, False, False]),
        "x": jnp.array([True, True, True, True]),
    }
    _, found = step(PARAMS, rule.init(PARAMS), X, task_mask=mask)
    flat = jnp.stack([mask[name] for name in NAMES], axis=1).reshape(-1)
    _, expected = step(PARAMS, rule.init(PARAMS), X, task_mask=flat)
    np.testing.assert_array_equal(found, expected)


def test_vectors_at_construction_by_name():
    gramian = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    named = jaxmtl.upgrad(preference={"b": 3.0, "a": 1.0}).weighting
    plain = jaxmtl.upgrad(preference=jnp.array([1.0, 3.0])).weighting
    found, expected = (jax.jit(w.update)(gramian, w.init())[0] for w in (named, plain))
    np.testing.assert_array_equal(found, expected)


def test_the_names_at_construction_are_those_of_the_losses():
    rule = jaxmtl.cagrad(preference={"task2": 1.0, "task10": 3.0, "y": 2.0})
    for route in ("tasks", "separate"):
        step = jaxmtl.value_and_grad(ROUTES[route][0], rule)
        with pytest.raises(
            ValueError, match=r"the preference of cagrad, \['task10', 'task2', 'y'\]"
        ):
            step(PARAMS, rule.init(PARAMS), batches(route, True))
    with pytest.raises(ValueError, match="task_mask to have the task names of the preference at c"):
        rule.update(
            jnp.ones((3, 2)), rule.init(PARAMS), PARAMS, task_mask=dict.fromkeys(NAMES, True)
        )


@pytest.mark.parametrize("route", ["tasks", "separate"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"task_mask": {"task10": True, "task2": True}},
            r"task_mask .* names of the losses, \['ta",
        ),
        (
            {"task_mask": {"task10": True, "task2": True, "y": True}},
            r"got \['task10', 'task2', 'y'",
        ),
        ({"preference": {}}, r"preference to be a dict from task names, strings, .* keys \[\]"),
        (
            {"preference": {0: 1.0, 1: 1.0, 2: 1.0}},
            r"strings, to numbers, got the keys \[0, 1, 2\]",
        ),
        ({"preference": dict.fromkeys(NAMES, X)}, "one number per task name in preference"),
        ({"preference": dict.fromkeys(NAMES, "much")}, "one number per task name in preference"),
        ({"preference": dict.fromkeys(NAMES)}, "one number per task name in preference"),
        ({"preference": {"task10": 1.0, "task2": X[0], "x": 1.0}}, "one number per task name"),
    ],
)
def test_wrong_dicts_of_inputs_are_one_sentence(route, given, message):
    rule = jaxmtl.cagrad()
    step = jaxmtl.value_and_grad(ROUTES[route][0], rule)
    with pytest.raises(ValueError, match=message) as error:
        step(PARAMS, rule.init(PARAMS), batches(route, True), **given)
    assert str(error.value).startswith("expected")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({}, r"the losses to be a dict from task names, .* got the keys \[\]"),
        ({0: 1.0, 1: 2.0}, r"strings, to numbers, got the keys \[0, 1\]"),
        ({"a": jnp.ones(3)}, r"a scalar loss at 'a', got shape \(3,\); average over the batch"),
        ({"a": {"b": 1.0}}, "a scalar loss at 'a', got dict"),
        ({"a": None}, "a scalar loss at 'a', got NoneType"),
        ({"a": (1.0, 2.0)}, "a scalar loss at 'a', got tuple"),
        ({"a": jnp.int32(3)}, "a floating point loss at 'a', got int32"),
        ([1.0, 2.0], "as one array or as a dict of scalars"),
    ],
)
def test_wrong_named_losses_are_one_sentence(losses, message):
    rule = jaxmtl.mgda()
    for call in (
        lambda: jaxmtl.value_and_jacobian(lambda p: losses)(PARAMS),
        lambda: jaxmtl.value_and_gramian(lambda p: losses)(PARAMS),
        lambda: jaxmtl.value_and_grad(lambda p: losses, rule)(PARAMS, rule.init(PARAMS)),
        lambda: jaxmtl.explain(lambda p: losses, PARAMS),
        lambda: jaxmtl.value_and_gramian(lambda p, x: losses, in_axes=(None, 0))(PARAMS, X),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith("expected")


def test_named_returns_values_by_name():
    losses = by_name(PARAMS, X)
    weights = jnp.array([0.1, 0.2, 0.7])
    found = jaxmtl.named(losses, weights)
    same(found, dict(zip(NAMES, np.asarray(weights), strict=True)))
    same(jaxmtl.named(["task2", "x", "task10"], weights), found)
    same(jaxmtl.named(losses.keys(), weights), found)
    history = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jaxmtl.named(losses, history)["task2"], [1.0, 4.0])
    inside = jax.jit(lambda w: jaxmtl.named(losses, w))(weights)
    same(inside, dict(zip(NAMES, np.asarray(weights), strict=True)))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ("ab", jnp.ones(2), "the single string 'ab'"),
        (["a", "a"], jnp.ones(2), "every name once"),
        ([0, 1], jnp.ones(2), r"strings, to numbers, got the keys \[0, 1\]"),
        ({}, jnp.ones(0), r"got the keys \[\]"),
        (["a", "b"], jnp.ones(3), r"values of shape \(..., 2\), one per name, got \(3,\)"),
        (["a"], 1.0, r"values of shape \(..., 1\), one per name, got \(\)"),
    ],
)
def test_named_refuses_what_does_not_match(names, values, message):
    with pytest.raises(ValueError, match=message):
        jaxmtl.named(names, values)
