"""Products of rows, Jacobians on both routes, and apply_updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from jaxmtl import linalg


def test_gramian_of_a_pytree(x64):
    rng = np.random.default_rng(0)
    rows = {
        "a": rng.standard_normal((3, 2, 4)),
        "b": rng.standard_normal((3,)),
        "c": np.zeros((3, 0)),
    }
    full = np.concatenate([rows["a"].reshape(3, 8), rows["b"][:, None]], axis=1)
    rows = jax.tree.map(jnp.asarray, rows)
    np.testing.assert_allclose(jaxmtl.gramian(rows), full @ full.T, rtol=1e-14)
    other = jax.tree.map(lambda x: x[:2] + 1, rows)
    full_other = np.concatenate([full[:2, :8] + 1, full[:2, 8:] + 1], axis=1)
    np.testing.assert_allclose(jaxmtl.gramian(rows, other), full @ full_other.T, rtol=1e-13)
    weights = jnp.array([1.0, -2.0, 0.5])
    combined = jaxmtl.combine(rows, weights)
    np.testing.assert_allclose(np.ravel(combined["a"]), full[:, :8].T @ weights, rtol=1e-13)
    assert combined["c"].shape == (0,)
    with pytest.raises(ValueError, match="weights of shape"):
        jaxmtl.combine(rows, jnp.ones(2))
    with pytest.raises(ValueError, match="one structure"):
        jaxmtl.gramian(rows, {"a": rows["a"]})


def test_gramian_accumulates_half_precision_in_float32():
    rows = jnp.full((2, 4096), 1.0, jnp.bfloat16)
    gram = jaxmtl.gramian(rows)
    assert gram.dtype == jnp.float32
    np.testing.assert_array_equal(gram, 4096)
    assert jaxmtl.gramian(jnp.full((2, 64), 300.0, jnp.float16))[0, 0] == 64 * 300.0**2
    assert jaxmtl.combine(rows, jnp.ones(2)).dtype == jnp.bfloat16


def test_powers_of_two_are_exact(precision):
    dtype = jnp.dtype(precision)
    exponents = np.arange(jnp.finfo(dtype).minexp, jnp.finfo(dtype).maxexp)
    powers = jax.jit(lambda e: linalg.power_of_two(e, dtype))(jnp.asarray(exponents))
    np.testing.assert_array_equal(powers, np.ldexp(np.ones(len(exponents), dtype), exponents))
    x = jnp.asarray([1.3, -0.7], dtype)
    for e in (-200, -1, 0, 5, 130) if precision == "float64" else (-100, -1, 0, 5, 100):
        got = jax.jit(linalg.ldexp)(x, jnp.asarray(e))
        np.testing.assert_array_equal(got, np.ldexp(np.asarray(x), e))


def test_balanced_gramian_holds_where_the_gramian_overflows():
    rows = np.array([[3e38, 1e38], [1e30, -2e30], [0.0, 0.0], [1e-30, 1e-30]], np.float32)
    gram, log2_scale = jax.jit(linalg.balanced_gramian)(jnp.asarray(rows))
    exact = rows.astype(np.float64) @ rows.T.astype(np.float64)
    assert np.all(np.isfinite(gram))
    np.testing.assert_allclose(
        np.asarray(gram, float)[:2, :2] * 4.0 ** int(log2_scale), exact[:2, :2], rtol=1e-6
    )
    np.testing.assert_allclose(
        linalg.row_norms(jnp.asarray(rows)), np.sqrt(np.diag(exact)), rtol=1e-6
    )


def test_an_update_of_rounding_alone_is_zero(precision):
    """Three rows that cancel, at any scale; a sum with correct digits is kept."""
    eps = float(jnp.finfo(precision).eps)
    rows = np.array([[0.1, 0.7], [0.3, -0.2], [-0.4, -0.5]])
    step = jax.jit(lambda rows: jaxmtl.mgda().update(rows, jaxmtl.mgda().init(rows[0]), rows[0])[0])
    for scale in (1e-25, 1.0, 1e25):
        assert np.all(np.asarray(step(jnp.asarray(rows * scale))) == 0)
        flat = np.array([[0.1, 0.0], [0.3, 0.0], [-0.4, 0.0]]) + np.array([0, 1e3 * eps])
        kept = step(jnp.asarray(flat * scale))
        np.testing.assert_allclose(kept[1], 1e3 * eps * scale, rtol=1e-5)


def losses_fn(params, x):
    hidden = jnp.tanh(params["w"] @ x)
    return jnp.stack(
        [jnp.sum(hidden), jnp.sum(hidden**2), params["b"] * hidden[0], x[0] * params["b"]]
    )


def model():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((3, 2))), "b": jnp.asarray(0.7)}
    return params, jnp.asarray(rng.standard_normal(2))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 4, 9])
def test_value_and_jacobian_of_tasks(chunk_size, x64):
    params, x = model()
    losses, jacobian = jax.jit(jaxmtl.value_and_jacobian(losses_fn, chunk_size=chunk_size))(
        params, x
    )
    np.testing.assert_allclose(losses, losses_fn(params, x))
    expected = jax.jacrev(losses_fn)(params, x)
    for name in params:
        np.testing.assert_allclose(jacobian[name], expected[name], rtol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 2, 5])
@pytest.mark.parametrize("has_aux", [False, True])
def test_value_and_jacobian_of_examples(chunk_size, has_aux, x64):
    params, _ = model()
    data = {"x": jnp.asarray(np.random.default_rng(1).standard_normal((2, 5)))}

    def example_loss(params, example, scale):
        loss = scale * jnp.sum(jnp.tanh(params["w"] @ example["x"])) * params["b"]
        return (loss, {"double": 2 * loss}) if has_aux else loss

    result, jacobian = jax.jit(
        jaxmtl.value_and_jacobian(
            example_loss, in_axes=(None, {"x": 1}, None), has_aux=has_aux, chunk_size=chunk_size
        )
    )(params, data, 2.0)
    losses = result[0] if has_aux else result
    assert losses.shape == (5,)
    if has_aux:
        np.testing.assert_allclose(result[1]["double"], 2 * losses)
    for i in range(5):
        one = jax.grad(lambda p, i=i: 2.0 * jnp.sum(jnp.tanh(p["w"] @ data["x"][:, i])) * p["b"])
        np.testing.assert_allclose(jacobian["w"][i], one(params)["w"], rtol=1e-12)


def test_value_and_jacobian_passes_aux_through():
    params, x = model()
    with_aux = jaxmtl.value_and_jacobian(lambda p, x: (losses_fn(p, x), x.sum()), has_aux=True)
    (losses, aux), jacobian = with_aux(params, x)
    assert losses.shape == (4,)
    assert aux == x.sum()
    assert jacobian["b"].shape == (4,)


def test_value_and_jacobian_refuses_wrong_input():
    params, x = model()
    with pytest.raises(ValueError, match="vector of the m task losses"):
        jaxmtl.value_and_jacobian(lambda p, x: jnp.sum(p["w"]))(params, x)
    with pytest.raises(ValueError, match="floating point parameters"):
        jaxmtl.value_and_jacobian(losses_fn)({**params, "b": 3}, x)
    with pytest.raises(ValueError, match="chunk_size"):
        jaxmtl.value_and_jacobian(losses_fn, chunk_size=0)
    one = lambda p, x, y: jnp.sum(p["w"] @ x) * y  # noqa: E731
    xs, ys = jnp.ones((4, 2)), jnp.ones(4)
    with pytest.raises(ValueError, match="one entry for params"):
        jaxmtl.value_and_jacobian(one, in_axes=(None, 0))(params, xs, ys)
    with pytest.raises(ValueError, match="axis 0 of examples in params"):
        jaxmtl.value_and_jacobian(one, in_axes=(0, 0, 0))(params, xs, ys)
    with pytest.raises(ValueError, match="one positive batch size"):
        jaxmtl.value_and_jacobian(one, in_axes=(None, 0, 0))(params, xs, jnp.ones(3))
    with pytest.raises(ValueError, match="no batched argument"):
        jaxmtl.value_and_jacobian(one, in_axes=(None, None, None))(params, xs, ys)
    with pytest.raises(ValueError, match="axis 2"):
        jaxmtl.value_and_jacobian(one, in_axes=(None, 2, 0))(params, xs, ys)


def test_a_step_by_the_jacobian_holds_one_scaled_copy_of_rows_at_a_time():
    """Beside them, as they come and as they are read; all leaves scaled would be another copy."""
    n, m, rule = 128, 6, jaxmtl.upgrad()

    def losses_fn(params, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["h"], axis=0)

    def step(params, state, x):
        _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, x)
        return rule.update(jacobian, state, params)

    params = {"a": jnp.ones((n, n)), "b": jnp.ones((n, n)), "h": jnp.ones((n, m))}
    lowered = jax.jit(step).lower(params, rule.init(params), jnp.ones((16, n)))
    rows = m * sum(x.nbytes for x in params.values())
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 2.7 * rows


def test_apply_updates_refuses_to_broadcast():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(())}
    good = jax.tree.map(jnp.ones_like, params)
    np.testing.assert_array_equal(jaxmtl.apply_updates(params, good)["w"], 2)
    with pytest.raises(ValueError, match="put an aggregator"):
        jaxmtl.apply_updates(params, jax.tree.map(lambda x: jnp.ones((4, *x.shape)), params))
    with pytest.raises(ValueError, match="structure"):
        jaxmtl.apply_updates(params, {"w": good["w"]})


def test_readme_loop_trains(x64):
    """The loop of the README, on a problem with a known answer."""
    targets = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    optimizer = optax.chain(jaxmtl.upgrad(), optax.sgd(0.2))
    params = jnp.array([3.0, 3.0])
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        losses, jacobian = jaxmtl.value_and_jacobian(lambda p: jnp.sum((p - targets) ** 2, axis=1))(
            params
        )
        updates, state = optimizer.update(jacobian, state, params, losses=losses)
        return jaxmtl.apply_updates(params, updates), state, losses

    for _ in range(100):
        params, state, _ = step(params, state)
    np.testing.assert_allclose(params, [0.5, 0.5], atol=1e-6)
