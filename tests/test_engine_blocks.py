"""Rows, and tables of all positions, for some examples at a time, so that memory is bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmtl import explain, per_example_norms
from jaxmtl.engine import cross_gramian, plan, value_and_gramian
from tests.problems import flat_rows, normal
from tests.test_engine_paths import compare

WIDTH = 12
MASKS = jnp.sign(normal(0, 2, WIDTH, WIDTH))
AXES = (None, 0)


def masked(p, x):
    """Each entry of a matrix has a factor of its own; the last one is of two parameters."""
    for w, mask in zip(p["w"], MASKS, strict=True):
        x = jnp.tanh(x @ (w * mask))
    return jnp.sum((x @ (jnp.sin(p["u"]) * p["v"])) ** 2)


def parameters():
    return {name: normal(i, *s) for i, (name, s) in enumerate(SHAPES.items(), 1)}


SHAPES = {"w": (2, WIDTH, WIDTH), "u": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Rows for three examples at a time, however small they are."""
    monkeypatch.setattr(plan, "_MOST_BYTES", 1)
    monkeypatch.setattr(plan, "_FEWEST_EXAMPLES", 3)


def test_rows_in_blocks_equal_the_jacobian(few_at_a_time, x64):
    params, x = parameters(), normal(5, 6, WIDTH)
    text = explain(masked, params, x, in_axes=AXES)
    assert text.count("3 of 6 examples at a time") == 3  # w in one group
    compare(masked, params, (x,))


def test_norms_and_products_with_another_batch(few_at_a_time, x64):
    """The other batch has another number of blocks, or none."""
    params = parameters()
    some, others, three = normal(5, 6, WIDTH), normal(6, 9, WIDTH), normal(7, 3, WIDTH)

    @jax.jit
    def all_of_it(params):
        _, norms, _ = per_example_norms(masked, in_axes=AXES)(params, some)
        cross = cross_gramian(masked, in_axes=AXES)
        pairs = ((some, others), (some, three), (three, others))
        return norms, [cross(params, (x,), (y,)) for x, y in pairs]

    norms, products = all_of_it(params)
    rows, more, few = (
        flat_rows(jax.jit(jax.vmap(jax.grad(masked), AXES))(params, x))
        for x in (some, others, three)
    )
    np.testing.assert_allclose(norms, np.linalg.norm(rows, axis=1), rtol=1e-12)
    for found, (a, b) in zip(products, ((rows, more), (rows, few), (few, more)), strict=True):
        np.testing.assert_allclose(found, a @ b.T, rtol=0, atol=1e-12 * np.max(np.abs(a @ b.T)))


def test_parameters_that_are_not_shared_stay_out_of_blocks(few_at_a_time, x64):
    params, x = parameters(), normal(5, 6, WIDTH)
    shared = {"w": True, "u": False, "v": True}
    found = jax.jit(lambda *a: value_and_gramian(masked, in_axes=AXES, shared=shared)(*a)[1])
    rows = jax.vmap(jax.grad(masked), AXES)(params, x)
    rows = flat_rows({name: rows[name] for name in "wv"})
    expected = rows @ rows.T
    np.testing.assert_allclose(found(params, x), expected, atol=1e-12 * np.max(expected), rtol=0)


def test_several_losses_per_example_in_blocks(few_at_a_time, x64):
    def two(p, x):
        return jnp.stack([masked(p, x), masked(p, 2 * x) + jnp.sum(p["u"] * x)])

    params, x = parameters(), normal(5, 3, WIDTH)
    gramian = jax.jit(lambda *a: value_and_gramian(two, in_axes=AXES)(*a)[1])(params, x)
    rows = jax.vmap(jax.jacrev(two), AXES)(params, x)
    rows = flat_rows(jax.tree.map(lambda r: r.reshape(6, *r.shape[2:]), rows))
    expected = rows @ rows.T
    np.testing.assert_allclose(gramian, expected, atol=1e-12 * np.max(expected), rtol=0)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_weights_of_rows_of_extreme_size_in_blocks(few_at_a_time, size):
    """Their squares leave float32: norms and the balanced Gramian do not."""
    params, x = parameters(), normal(5, 6, WIDTH)
    params, x = jax.tree.map(lambda z: z.astype(jnp.float32), (params, x))

    @jax.jit
    def norms(size):
        return per_example_norms(lambda p, x: size * masked(p, x), in_axes=AXES)(params, x)[1]

    np.testing.assert_allclose(norms(size), norms(1.0) * np.float32(size), rtol=1e-4)


def sequence(p, x):
    for w in p:
        x = x + jnp.tanh(x @ w)
    return jnp.sum(x**2)


def chosen(p, words, values):
    """A table of words, and a matrix that each position chooses."""
    h = jnp.tanh(p["t"][words] + values)
    experts = p["e"][words % 4]
    return jnp.sum(jnp.tanh(jnp.einsum("tij,ti->tj", experts, h) @ p["w"]) ** 2)


def is_in_blocks(loss, params, *args):
    """Tells whether every parameter is structured, and some tables are made in a loop."""
    in_axes = (None, *(0 for _ in args))
    lines = explain(loss, params, *args, in_axes=in_axes).splitlines()
    fun = value_and_gramian(loss, in_axes=in_axes)
    jaxpr = jax.make_jaxpr(lambda *a: fun(*a)[1])(params, *args)
    return all("structured" in line for line in lines) and "scan[" in str(jaxpr)


def test_tables_of_positions_in_blocks_equal_the_jacobian(x64):
    params, x = [normal(i, 24, 24) for i in range(2)], normal(5, 24, 3, 24)
    assert is_in_blocks(sequence, params, x)
    compare(sequence, params, (x,))


def test_tables_of_lookups_and_choices_in_blocks(x64):
    params = {"t": normal(0, 500, 16), "e": normal(1, 4, 16, 16), "w": normal(2, 16, 16)}
    words = jax.random.randint(jax.random.key(3), (20, 2), 0, 500)
    args = words, normal(4, 20, 2, 16)
    assert is_in_blocks(chosen, params, *args)
    compare(chosen, params, args)


def test_products_of_batches_of_which_one_has_rows(x64):
    """With four examples the matrices are structured, with 128 rows are cheaper."""
    params = [normal(i, 16, 16) for i in range(2)]
    batches = [normal(n, n, 3, 16) for n in (4, 128)]
    texts = [explain(sequence, params, x, in_axes=AXES) for x in batches]
    assert ["rows" in text for text in texts] == [False, True]
    rows = [flat_rows(jax.jit(jax.vmap(jax.grad(sequence), AXES))(params, x)) for x in batches]
    fun = jax.jit(lambda *z: cross_gramian(sequence, in_axes=AXES)(params, *z))
    for i, j in ((0, 1), (1, 0)):
        expected = rows[i] @ rows[j].T
        found = fun((batches[i],), (batches[j],))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.max(np.abs(expected)))


def memory(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


def memories(loss, params, x):
    """Returns the temporary bytes of SGD's step and of the instance-wise one."""

    def sgd(params, x):
        return jax.grad(lambda p: jnp.sum(jax.vmap(loss, AXES)(p, x)))(params)

    def step(params, x):
        _, gramian, pullback = value_and_gramian(loss, in_axes=AXES)(params, x)
        return gramian, pullback(jnp.diagonal(gramian))

    return memory(sgd, params, x), memory(step, params, x)


def test_memory_of_rows_does_not_grow_with_the_batch():
    width = 512
    masks = jnp.sign(normal(0, 2, width, width))
    params = jax.tree.map(lambda w: w.astype(jnp.float32), [normal(1, width, width)] * 2)

    def loss(p, x):
        for w, mask in zip(p, masks, strict=True):
            x = jnp.tanh(x @ (w * mask))
        return jnp.sum(x**2)

    found = [memories(loss, params, jnp.ones((n, width)))[1] for n in (32, 256)]
    of_block = 8 * width**2 * 4
    assert found[0] <= 10 * of_block  # some copies of two blocks, where all rows are 8 and 64
    assert found[1] <= 1.1 * found[0]


def test_memory_of_tables_is_that_of_a_gradient():
    params, x = [jnp.ones((64, 64))] * 3, jnp.ones((256, 4, 64))
    sgd, step = memories(sequence, params, x)
    assert step <= 1.5 * sgd
