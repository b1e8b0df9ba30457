"""Frozen backbones and low-rank adapters: what does not train is not differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl

X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jax.random.normal(jax.random.key(1), (16, 2))


def losses_of(outputs):
    return jnp.mean((outputs - Y) ** 2, axis=0)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_lora_in_nnx():
    nnx = pytest.importorskip("flax.nnx")
    from jaxmtl import flax

    model = nnx.LoRALinear(4, 2, lora_rank=2, rngs=nnx.Rngs(0))
    chain = optax.chain(jaxmtl.upgrad(num_tasks=2), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.LoRAParam)
    before = leaves(nnx.split(model, nnx.LoRAParam, ...)[2])

    @nnx.jit
    def step(model, optimizer):
        route = flax.value_and_jacobian(lambda model: losses_of(model(X)), wrt=nnx.LoRAParam)
        losses, jacobian = route(model)
        optimizer.update(model, jacobian, losses=losses)
        return losses, jacobian

    first, jacobian = step(model, optimizer)
    assert sum(x.size for x in jax.tree.leaves(jacobian)) == 2 * (4 * 2 + 2 * 2)
    for _ in range(20):
        last, _ = step(model, optimizer)
    assert jnp.all(last < first)
    for x, y in zip(before, leaves(nnx.split(model, nnx.LoRAParam, ...)[2]), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_frozen_backbone_in_linen():
    """The cheap way first: differentiate the head alone; a frozen group is the same update."""
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(8, name="backbone")(x)))

    network = Network()
    params = network.init(jax.random.key(0), X)["params"]

    def losses_fn(head, backbone):
        outputs = network.apply({"params": {"backbone": backbone, "head": head}}, X)
        return losses_of(outputs[:, :1])  # one output, two targets: a conflict

    rule = jaxmtl.mgda()
    _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params["head"], params["backbone"])
    cheap, _ = rule.update(jacobian, rule.init(params["head"]), params["head"])
    groups = {"train": jaxmtl.mgda(), "frozen": jaxmtl.frozen()}
    labels = {"head": "train", "backbone": "frozen"}
    optimizer = optax.partition(groups, labels)
    jaxmtl.check(optimizer, params, num_tasks=2)
    _, rows = jaxmtl.value_and_jacobian(lambda p: losses_fn(p["head"], p["backbone"]))(params)
    update, _ = optimizer.update(rows, optimizer.init(params), params)
    assert not any(np.any(x) for x in leaves(update["backbone"]))
    for x, y in zip(leaves(update["head"]), leaves(cheap), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    # optax's freeze: first in the chain it keeps frozen leaves out of the Gramian, last it does not
    freeze = optax.transforms.freeze({"head": False, "backbone": True})
    first = optax.chain(freeze, jaxmtl.mgda())
    same, _ = first.update(rows, first.init(params), params)
    for x, y in zip(leaves(same["head"]), leaves(cheap), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    last = optax.chain(jaxmtl.mgda(), freeze)
    other, _ = last.update(rows, last.init(params), params)
    assert not any(np.any(x) for x in leaves(other["backbone"]))
    assert max(np.abs(x - y).max() for x, y in zip(leaves(other), leaves(same), strict=True)) > 1e-6


def test_an_adapter_in_equinox():
    eqx = pytest.importorskip("equinox")

    class Adapted(eqx.Module):
        linear: eqx.nn.Linear
        a: jax.Array
        b: jax.Array

        def __call__(self, x):
            return self.linear(x) + self.b @ (self.a @ x)

    key = jax.random.key(0)
    model = Adapted(eqx.nn.Linear(4, 2, key=key), jax.random.normal(key, (2, 4)), jnp.zeros((2, 2)))
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda tree: (tree.a, tree.b), spec, replace=(True, True))
    trained, fixed = eqx.partition(model, spec)

    def losses_fn(trained):
        return losses_of(jax.vmap(eqx.combine(trained, fixed))(X))

    optimizer = optax.chain(jaxmtl.upgrad(), optax.sgd(0.1))
    jaxmtl.check(optimizer, trained, num_tasks=2)
    state, first = optimizer.init(trained), losses_fn(trained)

    @jax.jit
    def step(trained, state):
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(trained)
        updates, state = optimizer.update(jacobian, state, trained, losses=losses)
        return jaxmtl.apply_updates(trained, updates), state

    for _ in range(20):
        trained, state = step(trained, state)
    assert jnp.all(losses_fn(trained) < first)
    assert len(jax.tree.leaves(trained)) == 2


def test_selective_transform_is_told_where_it_leaves_rows():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    chain = optax.transforms.selective_transform(jaxmtl.mgda(), freeze_mask={"a": False, "b": True})
    with pytest.raises(ValueError, match="expected"):
        jaxmtl.check(chain, params, num_tasks=2)
