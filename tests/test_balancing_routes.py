"""Rules on the losses through the engine: heads, features of the encoder, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmtl.engine import value_and_grad
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.rules.famo import famo
from jaxmtl.rules.go4align import go4align
from jaxmtl.rules.gradnorm import gradnorm
from jaxmtl.rules.imtl import imtl
from jaxmtl.rules.ldc_mtl import ldc_mtl
from jaxmtl.rules.learned_scale import imtl_l

RNG = np.random.default_rng(0)
PARAMS = {
    "shared": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32),
    "heads": jnp.ones((3, 3)),
}
X = jnp.asarray(RNG.standard_normal((5, 4)), jnp.float32)


def encode(params, x):
    return jnp.tanh(x @ params["shared"])


def of_features(params, z, x):
    return jnp.mean((z @ params["heads"] - jnp.array([0.0, 1.0, 2.0])) ** 2, axis=0)


def losses_fn(params, x):
    return of_features(params, encode(params, x), x)


@pytest.mark.parametrize("make", [imtl, gradnorm])
def test_heads_get_the_weights_of_the_losses(make):
    rule = make(num_tasks=3, optimizer=optax.sgd(0.1))
    shared = {"shared": True, "heads": False}
    step = jax.jit(value_and_grad(losses_fn, rule, shared=shared))
    state = rule.init(PARAMS)
    losses, jacobian = value_and_jacobian(losses_fn)(PARAMS, X)
    alone = {"shared": jacobian["shared"]}
    reference = make(num_tasks=3, optimizer=optax.sgd(0.1))
    expected_state = reference.init({"shared": PARAMS["shared"]})
    for _ in range(2):
        weights = rule.weighting.head_weights(state)
        expected, expected_state = reference.update(
            alone, expected_state, {"shared": PARAMS["shared"]}, losses=losses
        )
        (_, state), grads = step(PARAMS, state, X)
        np.testing.assert_allclose(grads["shared"], expected["shared"], rtol=2e-4, atol=1e-5)
        heads = jnp.tensordot(weights, jacobian["heads"], 1)
        np.testing.assert_allclose(grads["heads"], heads, rtol=2e-4, atol=1e-5)


def test_imtl_under_partition_keeps_one_scale():
    labels = {"shared": "shared", "heads": "heads"}
    parts = {"shared": imtl(num_tasks=3), "heads": imtl_l(num_tasks=3)}
    rule = optax.partition(parts, labels)
    state = rule.init(PARAMS)
    losses, jacobian = value_and_jacobian(losses_fn)(PARAMS, X)
    update = jax.jit(lambda j, s: rule.update(j, s, PARAMS, losses=losses))
    for _ in range(2):
        _, state = update(jacobian, state)
    scales = optax.tree.get_all_with_path(state, "values")
    np.testing.assert_array_equal(scales[0][1], scales[1][1])


def test_the_router_reads_the_features_of_the_encoder():
    rule = ldc_mtl(num_tasks=3, feature_size=3)
    function = value_and_grad(of_features, rule, encoder=encode)
    (losses, state), _ = jax.jit(function)(PARAMS, rule.init(PARAMS), X)
    expected, _ = rule.weighting.update(
        None, rule.weighting.init(), losses=losses, features=encode(PARAMS, X)
    )
    np.testing.assert_allclose(state.mtl_weights, expected, rtol=1e-5)


@pytest.mark.parametrize("make", [famo, go4align, ldc_mtl])
def test_under_vmap(make):
    weighting = make(num_tasks=3).weighting
    losses = jnp.asarray(RNG.uniform(0.5, 2, (2, 3)), jnp.float32)

    def one(losses):
        return weighting.update(
            None, weighting.init(), losses=losses, previous_batch_losses=losses
        )[0]

    both = jax.jit(jax.vmap(one))(losses)
    np.testing.assert_allclose(both[1], one(losses[1]), rtol=1e-5)
