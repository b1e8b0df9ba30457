"""NNX modules with layers that have state: updated once, on every route."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

nnx = pytest.importorskip("flax.nnx")

import jaxmtl  # noqa: E402
from jaxmtl import flax  # noqa: E402


class Network(nnx.Module):
    """A convolution-free stand-in with every kind of state: statistics, dropout, two heads."""

    def __init__(self, rngs):
        self.trunk = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.heads = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.heads(self.dropout(jax.nn.relu(self.norm(self.trunk(x)))))


class Plain(nnx.Module):
    """Without statistics: what one example can train."""

    def __init__(self, rngs):
        self.trunk = nnx.Linear(3, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jnp.tanh(self.trunk(x))))


X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jax.random.normal(jax.random.key(1), (16, 2))


def losses_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2, axis=0)


def fresh(kind=Network):
    model = kind(nnx.Rngs(0))
    model.train()
    return model


def state_of(model):
    rest = nnx.split(model, nnx.Param, ...)[2]

    def leaf(x):
        return np.asarray(jax.random.key_data(x) if is_key(x) else x)

    def is_key(x):
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    return jax.tree.map(leaf, rest)


def by_nnx():
    """Flax's own gradient of each loss, each on a copy of the module."""
    rows, after = [], None
    for task in range(2):
        model = fresh()
        rows.append(nnx.grad(lambda model, task=task: losses_fn(model, X, Y)[task])(model))
        after = state_of(model)
    return jax.tree.map(lambda *x: jnp.stack(x), *rows), after


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_rows_are_flax_gradients_and_state_moves_once():
    rows, after = by_nnx()
    model = fresh()
    losses, jacobian = nnx.jit(flax.value_and_jacobian(losses_fn))(model, X, Y)
    assert losses.shape == (2,)
    assert_close(jacobian, rows)
    assert_close(state_of(model), after)
    weights = jnp.array([2.0, -1.0])
    model = fresh()
    losses_2, gramian, pullback = flax.value_and_gramian(losses_fn)(model, X, Y)
    assert_close(losses_2, losses)
    assert_close(gramian, jaxmtl.gramian(rows))
    assert_close(pullback(weights), jaxmtl.combine(rows, weights))
    assert_close(state_of(model), after)
    model, aggregator = fresh(), jaxmtl.upgrad(num_tasks=2)
    state = aggregator.init(nnx.state(model, nnx.Param))
    (_, state), grads = nnx.jit(flax.value_and_grad(losses_fn, aggregator))(model, state, X, Y)
    assert_close(grads, jaxmtl.combine(rows, state.mtl_weights))
    assert_close(state_of(model), after)


def test_it_trains_as_short_as_flax_itself():
    model = fresh()
    chain = optax.chain(jaxmtl.upgrad(num_tasks=2), optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        losses, jacobian = flax.value_and_jacobian(losses_fn)(model, X, Y)
        optimizer.update(model, jacobian, losses=losses)
        return losses

    def evaluated():
        model.eval()
        losses = losses_fn(model, X, Y)
        model.train()
        return losses

    step(model, optimizer)  # the statistics of evaluation start far from the batch's
    first = evaluated()
    for _ in range(29):
        step(model, optimizer)
    assert jnp.all(evaluated() < first)
    assert int(model.dropout.rngs.count[...]) == 30


@pytest.mark.slow
def test_examples_draw_dropout_of_their_own():
    def loss(model, x):
        return jnp.sum(model(x) ** 2)

    same = jnp.broadcast_to(X[0], X.shape)
    model, aggregator = fresh(Plain), jaxmtl.upgrad(num_tasks=16)
    losses, jacobian = flax.value_and_jacobian(loss, in_axes=(None, 0))(model, same)
    assert len(np.unique(np.asarray(losses))) > 8
    assert int(model.dropout.rngs.count[...]) == 1
    again = fresh(Plain)
    state = aggregator.init(nnx.state(again, nnx.Param))
    route = flax.value_and_grad(loss, aggregator, in_axes=(None, 0))
    (losses_2, state), grads = route(again, state, same)
    assert_close(losses_2, losses)
    assert_close(grads, jaxmtl.combine(jacobian, state.mtl_weights))


def test_statistics_of_one_example_are_refused():
    def loss(model, x, y):
        return jnp.mean((model(x[None])[0] - y) ** 2)

    route = flax.value_and_jacobian(loss, in_axes=(None, 0, 0))
    with pytest.raises(ValueError, match="BatchNorm"):
        route(fresh(), X, Y)
    model = fresh()
    model.eval()
    before = state_of(model)
    losses, _ = route(model, X, Y)
    assert losses.shape == (16,)
    assert_close(state_of(model), before)


def test_aux_and_sown_values():
    model = fresh()
    (_, aux), _ = flax.value_and_jacobian(
        lambda model, x, y: (losses_fn(model, x, y), x.shape[0] * jnp.ones(())), has_aux=True
    )(model, X, Y)
    assert aux == 16

    def keeping(model, x, y):
        model.seen = nnx.Variable(x)
        return losses_fn(model, x, y)

    with pytest.raises(ValueError, match="has_aux"):
        flax.value_and_jacobian(keeping)(fresh(), X, Y)


@pytest.mark.slow
def test_keywords_go_to_the_losses_function():
    def scaled(model, x, y, scale=1.0):
        return scale * losses_fn(model, x, y)

    plain, _ = flax.value_and_jacobian(losses_fn)(fresh(), X, Y)
    double, _ = flax.value_and_jacobian(scaled)(fresh(), X, Y, scale=2.0)
    assert_close(double, 2 * plain)
    model, aggregator = fresh(), jaxmtl.upgrad()
    route = flax.value_and_grad(scaled, aggregator)
    (losses, _), _ = route(
        model,
        aggregator.init(nnx.state(model, nnx.Param)),
        X,
        Y,
        scale=2.0,
        task_mask=jnp.ones(2, bool),
    )
    assert_close(losses, double)
