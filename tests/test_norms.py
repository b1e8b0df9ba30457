"""Norms, clipped sums and noise of per-example gradients against the explicit gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxmtl
from tests import test_engine, test_engine_random
from tests.problems import WIDE_FIRST, flat_rows
from tests.test_engine import compiled, normal

KINDS = ["mlp", "transposed_layouts", "sequence", "conv_net"]


def explicit(loss, params, *args, in_axes):
    jacobian = jax.vmap(jax.grad(loss), in_axes)(params, *args)
    return flat_rows(jacobian)


@WIDE_FIRST
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_clipped_sums_are_those_of_the_gradients(kind, precision):
    loss, params, args = getattr(test_engine, kind)()
    in_axes = (None,) + (0,) * len(args)

    def both(params, args):
        losses, norms, pullback = jaxmtl.per_example_norms(loss, in_axes=in_axes)(params, *args)
        weights = jnp.arange(1.0, len(norms) + 1)
        rows = explicit(loss, params, *args, in_axes=in_axes)
        lengths = jnp.linalg.norm(rows, axis=1)
        bound = jnp.median(lengths)  # so that some are clipped and some are not
        _, clipped = jaxmtl.clipped_sum(loss, bound, in_axes=in_axes)(params, *args)
        expected = jnp.minimum(1, bound / lengths) @ rows
        pairs = (flat_rows(pullback(weights), 0), weights @ rows), (flat_rows(clipped, 0), expected)
        return (losses, jax.vmap(loss, in_axes)(params, *args)), (norms, lengths), *pairs

    tolerance = 1e-12 if precision == "float64" else 3e-5
    for found, expected in compiled(both, params, args):
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(test_engine_random.step(), min_size=1, max_size=5), st.integers(0, 99))
def test_norms_of_random_programs(steps, seed):
    network, rng = test_engine_random.make_network(steps), np.random.default_rng(seed)
    params = test_engine_random.make_params(rng)
    x, index = rng.normal(size=(3, 2, 4)), rng.integers(0, 7, (3, 2))
    in_axes = (None, 0, 0)

    def loss(params, x, index):
        return jnp.sum(jnp.sin(network(params, x, index)))

    def both(params, x, index):
        _, norms, _ = jaxmtl.per_example_norms(loss, in_axes=in_axes)(params, x, index)
        rows = explicit(loss, params, x, index, in_axes=in_axes)
        return norms, jnp.linalg.norm(rows, axis=1)

    with jax.enable_x64(True):
        norms, expected = map(np.asarray, compiled(both, params, x, index))
    np.testing.assert_allclose(norms, expected, rtol=1e-11, atol=1e-7 * np.max(expected) + 1e-30)


def test_what_is_not_shared_does_not_count(x64):
    loss, params, (x,) = test_engine.mlp()
    shared = {"w1": True, "b1": True, "w2": False, "s": False}

    def both(params, x):
        evaluate = jaxmtl.per_example_norms(loss, in_axes=(None, 0), shared=shared)
        jacobian = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        counted = jnp.concatenate([jacobian[k].reshape(len(x), -1) for k in ("w1", "b1")], 1)
        return evaluate(params, x)[1], jnp.linalg.norm(counted, axis=1)

    np.testing.assert_allclose(*compiled(both, params, x), rtol=1e-12)


def test_slices_and_several_losses_of_an_example(x64):
    """A head for each example; two losses each, which count as two examples."""
    params = {"w": normal(1, 5, 4), "head": normal(2, 6, 4, 2)}
    in_axes = ({"w": None, "head": 0}, 0)

    def losses(params, x):
        return jnp.tanh(x @ params["w"]) @ params["head"]

    def both(params, x):
        _, norms, _ = jaxmtl.per_example_norms(losses, in_axes=in_axes)(params, x)
        _, gramian, _ = jaxmtl.value_and_gramian(losses, in_axes=in_axes)(params, x)
        return norms**2, jnp.diagonal(gramian)

    norms, expected = compiled(both, params, normal(3, 6, 5))
    assert norms.shape == (12,)
    np.testing.assert_allclose(norms, expected, rtol=1e-12)


def test_zero_gradients_are_not_clipped_and_aux_is_stacked():
    def loss(p, x):
        return jnp.vdot(p, x), x[0]

    x = jnp.array([[0.0, 0.0], [3.0, 4.0], [1e-20, 0.0], [3e18, 4e18]])
    evaluate = jaxmtl.clipped_sum(loss, 1.0, in_axes=(None, 0), has_aux=True)
    (losses, aux), total = jax.jit(evaluate)(jnp.ones(2), x)
    np.testing.assert_allclose(losses, x.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(aux, x[:, 0])
    np.testing.assert_allclose(total, [1.2, 1.6], rtol=1e-6)


def test_the_noise_is_that_of_the_covariance(x64):
    rows = np.random.default_rng(0).normal([1.0, 2.0, 0.0], size=(50, 3))
    norms, mean = np.linalg.norm(rows, axis=1), rows.mean(axis=0)
    noise = jaxmtl.gradient_noise(jnp.asarray(norms), {"a": jnp.asarray(mean)})
    variance = np.trace(np.cov(rows.T))
    np.testing.assert_allclose(noise.variance, variance, rtol=1e-12)
    square = mean @ mean - variance / 50
    np.testing.assert_allclose(noise.squared_norm, square, rtol=1e-12)
    np.testing.assert_allclose(noise.scale, variance / square, rtol=1e-12)
    hidden = jaxmtl.gradient_noise(jnp.ones(2), jnp.zeros(3))
    assert hidden.squared_norm < 0
    assert hidden.scale == np.inf


def test_norms_cost_about_as_much_as_a_gradient():
    """An MLP of 8 layers and 256 examples: compiled operations and memory, no rows."""
    params = [normal(i, 128, 128) / 11 for i in range(8)]

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    def mean(params, x):
        return jnp.sum(jax.vmap(loss, (None, 0))(params, x))

    def norms(params, x):
        return jaxmtl.per_example_norms(loss, in_axes=(None, 0))(params, x)[:2]

    def rows(params, x):
        return jnp.linalg.norm(explicit(loss, params, x, in_axes=(None, 0)), axis=1)

    x = normal(9, 256, 128)
    flops, memory = {}, {}
    for name, fun in (("grad", jax.grad(mean)), ("norms", norms), ("rows", rows)):
        program = jax.jit(fun).lower(params, x).compile()
        flops[name] = program.cost_analysis()["flops"]
        memory[name] = program.memory_analysis().temp_size_in_bytes
    assert flops["norms"] < 1.1 * flops["grad"]
    assert memory["norms"] < memory["rows"] / 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jax_privacy's own imports
def test_the_clipped_sum_is_that_of_jax_privacy(x64):
    clipping = pytest.importorskip("jax_privacy.clipping", reason="compared where it is installed")
    loss, params, (x,) = test_engine.mlp()
    theirs = clipping.clipped_grad(loss, l2_clip_norm=0.5, keep_batch_dim=False)(params, x)
    _, ours = jaxmtl.clipped_sum(loss, 0.5, in_axes=(None, 0))(params, x)
    np.testing.assert_allclose(flat_rows(ours, 0), flat_rows(theirs, 0), rtol=1e-10)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="expected in_axes"):
        jaxmtl.per_example_norms(lambda p: p, in_axes=None)
    with pytest.raises(ValueError, match="expected a positive max_norm, got 0"):
        jaxmtl.clipped_sum(lambda p, x: p @ x, 0.0, in_axes=(None, 0))
    with pytest.raises(ValueError, match="at least two examples"):
        jaxmtl.gradient_noise(jnp.ones(1), jnp.ones(1))
