"""Who gets a keyword of `value_and_grad`, and what else it is told wrongly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl

PARAMS = jnp.array([1.0, -2.0])
X = jnp.array([[1.0, 0.5], [2.0, -1.0], [0.5, 3.0]])


def tasks(p, x, scale=1.0):
    return scale * jnp.mean((x @ p)[:, None] * jnp.array([1.0, 2.0]), axis=0)


def features(p, z, x, scale=1.0):
    return tasks(z, x, scale)


def example(p, x, scale=1.0):
    return scale * (x @ p) ** 2


def of_a(p, x, scale=1.0):
    return scale * jnp.mean(x @ p)


def of_b(p, x):
    return jnp.mean(x @ p) ** 2


ROUTES = {
    "tasks": (tasks, {}, X),
    "encoder": (features, {"encoder": lambda p, x: jnp.tanh(p)}, X),
    "examples": (example, {"in_axes": (None, 0)}, X),
    "separate": ({"a": of_a, "b": of_b}, {}, {"a": X, "b": X}),
}


def call(route, rule=None, losses_fn=None, **extra):
    """Returns the losses of one step as a vector; all functions of a route are called."""
    own, options, x = ROUTES[route]
    losses_fn = losses_fn or own
    rule = rule or jaxmtl.linear_scalarization()
    jaxmtl.explain(losses_fn, PARAMS, x, **options, **extra)
    step = jaxmtl.value_and_grad(losses_fn, rule, **options)
    (losses, _), _ = step(PARAMS, rule.init(PARAMS), x, **extra)
    return np.asarray(jax.tree.leaves(losses)).reshape(-1)


@pytest.mark.parametrize("route", ROUTES)
def test_a_keyword_that_the_rule_does_not_read_goes_to_the_losses(route):
    plain = call(route)
    scaled = call(route, scale=10.0)
    factor = np.array([10.0, 1.0]) if route == "separate" else 10.0
    np.testing.assert_allclose(scaled, factor * plain, rtol=1e-6)


def test_it_is_not_mapped_over_examples():
    def loss(p, x, table):
        return jnp.sum(table) * (x @ p)

    losses = call("examples", losses_fn=loss, table=jnp.ones((3, 5)))
    np.testing.assert_allclose(losses, 15 * (X @ PARAMS), rtol=1e-6)


def reads_scale(losses, scale=1.0):
    return losses * scale


def reads_key(losses, key):
    assert key is not None
    return losses


@pytest.mark.parametrize("route", ROUTES)
def test_a_keyword_that_both_would_read_is_refused(route):
    rule = jaxmtl.from_weighting(reads_scale)
    with pytest.raises(ValueError, match=r"that either reads_scale or the losses .* got scale="):
        call(route, rule, scale=2.0)


@pytest.mark.parametrize("route", ROUTES)
def test_a_keyword_that_neither_takes_is_refused(route):
    with pytest.raises(ValueError, match=r"got scall=.*is scale meant"):
        call(route, scall=2.0)
    own, options, x = ROUTES[route]
    rule = jaxmtl.linear_scalarization()
    step = jaxmtl.value_and_grad(own, rule, **options)
    with pytest.raises(
        ValueError, match=r"that linear_scalarization or the losses function takes, got other=;"
    ):
        step(PARAMS, rule.init(PARAMS), x, other=2.0)


@pytest.mark.parametrize("route", ROUTES)
def test_an_input_of_other_rules_is_ignored(route):
    m = 3 if route == "examples" else 2
    given = {"previous_batch_losses": jnp.ones(m), "preference": jnp.ones(m)}
    given |= {"task_mask": jnp.ones(m, bool), "key": jax.random.key(0)}
    np.testing.assert_array_equal(call(route, **given), call(route))


@pytest.mark.parametrize("route", ROUTES)
def test_an_input_of_the_rule_goes_to_the_rule(route):
    rule = jaxmtl.from_weighting(reads_key)
    own, options, x = ROUTES[route]
    step = jaxmtl.value_and_grad(own, rule, **options)
    step(PARAMS, rule.init(PARAMS), x, key=jax.random.key(0))


def test_an_input_that_the_rule_does_not_read_is_the_losses_own():
    def loss(p, x, key):
        return tasks(p, x) * jax.random.uniform(key)

    key = jax.random.key(0)
    expected = tasks(PARAMS, X) * jax.random.uniform(key)
    np.testing.assert_allclose(call("tasks", losses_fn=loss, key=key), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="which both do"):
        call("tasks", jaxmtl.from_weighting(reads_key), losses_fn=loss, key=key)


def test_a_parameter_that_is_filled_by_position_is_no_keyword():
    def loss(p, key):  # the batch, whatever it is called
        return tasks(p, key)

    call("tasks", jaxmtl.from_weighting(reads_key), losses_fn=loss, key=jax.random.key(0))


def test_what_partial_has_bound_is_not_the_losses_own():
    def loss(p, x, key):
        return tasks(p, x) * jax.random.uniform(key)

    bound = functools.partial(loss, key=jax.random.key(1))
    call("tasks", jaxmtl.from_weighting(reads_key), losses_fn=bound, key=jax.random.key(0))


def test_losses_with_any_keywords_take_what_the_rule_does_not_read():
    seen = []

    def loss(p, x, **options):
        seen.append(sorted(options))
        return tasks(p, x)

    rule = jaxmtl.from_weighting(reads_scale)
    step = jaxmtl.value_and_grad(loss, rule)
    mask = jnp.ones(2, bool)
    step(PARAMS, rule.init(PARAMS), X, scale=2.0, rate=3.0, key=jax.random.key(0))
    assert seen == [["key", "rate"]]
    mean = jaxmtl.linear_scalarization()
    jaxmtl.value_and_grad(loss, mean)(PARAMS, mean.init(PARAMS), X, task_mask=mask, rate=1.0)
    assert seen[1] == ["rate"]

    def weigh(losses, **others):
        return losses

    both = jaxmtl.from_weighting(weigh)
    with pytest.raises(ValueError, match="got rate=, which both do"):
        jaxmtl.value_and_grad(loss, both)(PARAMS, both.init(PARAMS), X, rate=1.0)
    jaxmtl.value_and_grad(tasks, both)(PARAMS, both.init(PARAMS), X, rate=1.0, scale=2.0)


def test_a_weighting_from_elsewhere():
    def update(gramian, state, *, losses=None, temperature=1.0):
        return losses * temperature, state

    weighting = jaxmtl.Weighting(init=tuple, update=update)
    rule = jaxmtl.Aggregator(lambda params: (), None, weighting)
    step = jaxmtl.value_and_grad(tasks, rule)
    _, plain = step(PARAMS, (), X)
    _, hot = step(PARAMS, (), X, temperature=2.0)
    np.testing.assert_allclose(hot, 2 * plain, rtol=1e-6)
    (losses, _), _ = step(PARAMS, (), X, scale=3.0)
    np.testing.assert_allclose(losses, 3 * tasks(PARAMS, X), rtol=1e-6)


def test_what_value_and_grad_hands_to_the_rule_itself():
    with pytest.raises(ValueError, match="value_and_grad hands losses to the rule itself"):
        call("tasks", losses=jnp.ones(2))

    def loss(p, x, m):
        return tasks(p, x) * m

    np.testing.assert_allclose(
        call("tasks", losses_fn=loss, m=3.0), 3 * tasks(PARAMS, X), rtol=1e-6
    )


def test_a_rule_without_masks_still_refuses_one():
    with pytest.raises(ValueError, match="reads_scale does not take a task_mask"):
        call("tasks", jaxmtl.from_weighting(reads_scale), task_mask=jnp.ones(2, bool))


@pytest.mark.parametrize("route", ROUTES)
def test_the_preference_reaches_the_rule_on_every_route(route):
    own, options, x = ROUTES[route]
    m = 3 if route == "examples" else 2
    rule = jaxmtl.from_weighting(lambda losses, preference: preference * jnp.ones_like(losses))
    value_and_grad = jaxmtl.value_and_grad(own, rule, **options)

    def step(preference):
        return value_and_grad(PARAMS, rule.init(PARAMS), x, preference=preference)[1]

    _, _, pullback = jax.jit(jaxmtl.value_and_gramian(own, **options))(PARAMS, x)
    # A whole front in one compiled run.
    front = jnp.concatenate([jnp.eye(m), jnp.full((1, m), 1 / m)])
    found, expected = jax.jit(jax.vmap(step))(front), jax.vmap(pullback)(front)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- the aggregator and its state -------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregator", "message"),
    [
        (jaxmtl.upgrad, r"got the function upgrad; call it, as in upgrad\(\)"),
        (functools.partial(jaxmtl.upgrad), r"got the function partial; call it"),
        (None, "an aggregator, got NoneType"),
        ("upgrad", "an aggregator, got str"),
        (jaxmtl.graddrop(), "with a weighting, got one that needs the Jacobian"),
        (optax.chain(jaxmtl.upgrad(), optax.sgd(0.1)), "with a weighting, got one that needs"),
        (optax.adam(0.1), "with a weighting, got one that needs"),
    ],
)
def test_what_is_no_aggregator_with_a_weighting(aggregator, message):
    with pytest.raises(ValueError, match=message):
        jaxmtl.value_and_grad(tasks, aggregator)


CHAIN = optax.chain(jaxmtl.upgrad(), optax.adam(0.1)).init(PARAMS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((PARAMS, CHAIN, X), "state of upgrad, AggregatorState, .* got that of a chain; keep"),
        ((PARAMS, X), "as the second argument, got Array.*; the state comes second"),
        ((PARAMS,), r"got none; call it as f\(params, aggregator.init\(params\), \*args\)"),
        ((PARAMS, None, X), "got none"),
        ((PARAMS, {}, X), "got dict"),
        ((PARAMS, jaxmtl.upgrad(num_tasks=2).init(PARAMS), X), "got SolverState; construct both"),
        ((PARAMS, optax.EmptyState(), X), "got EmptyState; pass aggregator.init"),
    ],
)
def test_what_is_not_the_state_of_the_aggregator(args, message):
    with pytest.raises(ValueError, match=message) as error:
        jaxmtl.value_and_grad(tasks, jaxmtl.upgrad())(*args)
    assert str(error.value).startswith("expected the state of upgrad")


def test_losses_of_examples_and_tasks_are_to_be_averaged():
    def loss(p, x):
        return (x @ p)[:, None] * jnp.array([1.0, 2.0])

    with pytest.raises(ValueError, match=r"got shape \(3, 2\); average over the batch, jnp.mean"):
        call("tasks", losses_fn=loss)
    rule = jaxmtl.dwa(num_tasks=2)
    with pytest.raises(ValueError, match=r"average over the examples, losses.mean\(0\)"):
        rule.update(jnp.ones((2, 2)), rule.init(PARAMS), PARAMS, losses=loss(PARAMS, X))
