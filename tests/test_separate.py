"""Separate data: one loss function and one batch per task, on every route."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from jaxmtl import separate
from tests.problems import flat_rows, some

WIDTH = 6


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def hidden(params, x):
    return jnp.tanh(x @ params["trunk"] + params["bias"])


def loss_depth(params, batch, scale=1.0):
    x, y = batch
    return scale * jnp.mean((hidden(params, x) @ params["heads"]["depth"] - y) ** 2)


def loss_edges(params, batch):
    return jnp.mean((hidden(params, batch) @ params["heads"]["edges"]) ** 2)


def loss_prior(params, batch, *, floor=0.0):
    return jnp.sum(params["bias"] ** 2) + floor + jnp.mean(batch["target"])


LOSSES = {"prior": loss_prior, "depth": loss_depth, "edges": loss_edges}
NAMES = ("depth", "edges", "prior")


def problem():
    params = {
        "trunk": normal(0, 4, WIDTH),
        "bias": normal(1, WIDTH),
        "heads": {"depth": normal(2, WIDTH), "edges": normal(3, WIDTH, 2)},
        "unused": normal(4, 3),
    }
    batches = {
        "depth": (normal(5, 7, 4), normal(6, 7)),
        "edges": normal(7, 3, 5, 4),
        "prior": {"target": normal(8, 2)},
    }
    return params, batches


def stacked(params, batches, scale=1.0):
    """The same losses as one function of all batches."""
    return jnp.stack(
        [
            loss_depth(params, batches["depth"], scale),
            loss_edges(params, batches["edges"]),
            loss_prior(params, batches["prior"]),
        ]
    )


def independent():
    """Losses and Jacobian by `jax.jacrev` of the one function."""
    params, batches = problem()
    return stacked(params, batches), jax.jacrev(stacked)(params, batches)


def close(found, expected, rtol=1e-12):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol), found, expected
    )


# --- every function ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapping", "tuple"])
def test_the_jacobian_is_that_of_one_function(kind, x64):
    params, batches = problem()
    losses, jacobian = independent()
    functions = LOSSES
    if kind == "tuple":
        functions = tuple(LOSSES[name] for name in NAMES)
        batches = tuple(batches[name] for name in NAMES)
    found, rows = jax.jit(jaxmtl.value_and_jacobian(functions))(params, batches)
    close(rows, jacobian)
    close(found, losses if kind == "tuple" else dict(zip(NAMES, losses, strict=True)))


@pytest.mark.parametrize("chunk_size", some([None, 2, 1, 3, 100], 2))
def test_gramian_and_pullback_are_those_of_the_jacobian(chunk_size, x64):
    params, batches = problem()
    losses, jacobian = independent()
    rows, weights = flat_rows(jacobian), normal(9, 3)
    for functions in (LOSSES, {name: jax.jit(f) for name, f in LOSSES.items()}):
        fun = jaxmtl.value_and_gramian(functions, chunk_size=chunk_size)
        found, gramian, pullback = jax.jit(fun)(params, batches)
        close(found, dict(zip(NAMES, losses, strict=True)))
        close(gramian, rows @ rows.T)
        assert (gramian == gramian.T).all()
        close(
            jax.jit(pullback)(weights),
            jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), jacobian),
        )


@pytest.mark.parametrize("chunk_size", some([None, 1, 2]))
def test_cross_gramian_of_batches_of_different_sizes(chunk_size, x64):
    params, first = problem()
    second = {
        "depth": (normal(11, 2, 4), normal(12, 2)),
        "edges": normal(13, 4, 4),
        "prior": first["prior"],
    }
    rows = [flat_rows(jax.jacrev(stacked)(params, batches)) for batches in (first, second)]
    fun = jax.jit(jaxmtl.cross_gramian(LOSSES, chunk_size=chunk_size))
    close(fun(params, (first,), (second,)), rows[0] @ rows[1].T)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("shared", [{"trunk": True, "bias": True, "heads": False, "unused": True}])
def test_shared_leaves_and_heads(chunk_size, shared, x64):
    params, batches = problem()
    _, jacobian = independent()
    fun = jaxmtl.value_and_gramian(LOSSES, shared=shared, chunk_size=chunk_size)
    _, gramian, pullback = jax.jit(fun)(params, batches)
    rows = flat_rows([jacobian["trunk"], jacobian["bias"]])
    close(gramian, rows @ rows.T)
    weights, others = normal(9, 3), normal(10, 3)
    for heads in (None, others):
        grads = pullback(weights, heads)
        of_heads = jnp.ones(3) if heads is None else heads
        for name in params:
            w = of_heads if name == "heads" else weights
            close(grads[name], jax.tree.map(lambda x, w=w: jnp.tensordot(w, x, 1), jacobian[name]))


def shares(gramian):
    """A rule without a solver."""
    return jnp.diagonal(gramian) / jnp.trace(gramian)


RULES = {
    "mgda": lambda: jaxmtl.mgda(num_tasks=3),
    "dwa": lambda: jaxmtl.dwa(num_tasks=3),
    "every_k": lambda: jaxmtl.every_k(jaxmtl.imtl_g(num_tasks=3), 2, num_tasks=3),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk_size", some([1, None]))
def test_value_and_grad_is_the_jacobian_route(rule, chunk_size, x64):
    params, batches = problem()
    aggregator = RULES[rule]()
    step = jax.jit(jaxmtl.value_and_grad(LOSSES, aggregator, chunk_size=chunk_size))
    jacobian_of, update_of = jax.jit(jaxmtl.value_and_jacobian(LOSSES)), jax.jit(aggregator.update)
    one, other = aggregator.init(params), aggregator.init(params)
    for _ in range(3):
        (losses, one), grads = step(params, one, batches)
        found, jacobian = jacobian_of(params, batches)
        update, other = update_of(jacobian, other, params, losses=found)
        close(grads, update, 1e-9)
        close(one, other, 1e-9)
        assert tuple(losses) == NAMES
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert step._cache_size() == 1


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_in_float32_at_extreme_scales(scale):
    params, batches = jax.tree.map(jnp.float32, problem())
    functions = {name: lambda p, b, f=f: jnp.float32(scale) * f(p, b) for name, f in LOSSES.items()}
    with jax.enable_x64(True):
        expected = flat_rows(independent()[1])
        expected = expected @ expected.T
    _, gramian, pullback = jax.jit(jaxmtl.value_and_gramian(functions))(params, batches)
    assert gramian.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(gramian) / scale**2, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal_dtypes(pullback(jnp.ones(3)), params)


@pytest.mark.parametrize(("chunk_size", "log2"), some([(None, 90), (1, -90), (1, 90)], 2))
def test_a_step_in_float32_is_the_same_at_every_scale(chunk_size, log2):
    """Squares of the gradient of one task lie outside the format."""
    params, batches = jax.tree.map(jnp.float32, problem())
    scale, rule = jnp.float32(2.0**log2), jaxmtl.from_weighting(shares)
    functions = LOSSES | {"depth": lambda p, b: scale * loss_depth(p, b)}
    step = jax.jit(jaxmtl.value_and_grad(functions, rule, chunk_size=chunk_size))
    (_, state), grads = step(params, rule.init(params), batches)
    _, jacobian = jax.jit(jaxmtl.value_and_jacobian(functions))(params, batches)
    expected, other = jax.jit(rule.update)(jacobian, rule.init(params), params)
    assert int(state.mtl_skipped) == int(other.mtl_skipped) == 0
    top = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * top)


@pytest.mark.slow
def test_parameters_narrower_than_float32():
    params, batches = jax.tree.map(jnp.bfloat16, problem())
    _, gramian, pullback = jax.jit(jaxmtl.value_and_gramian(LOSSES))(params, batches)
    _, jacobian = jax.jit(jaxmtl.value_and_jacobian(LOSSES))(params, batches)
    rows = flat_rows(jax.tree.map(jnp.float32, jacobian))
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(pullback(jnp.ones(3)), params)


def test_aux_of_each_loss(x64):
    params, batches = problem()

    def with_aux(name):
        return lambda p, b: (
            LOSSES[name](p, b),
            {"of": jnp.size(jax.tree.leaves(b)[0]), "p": p["bias"]},
        )

    functions = {name: with_aux(name) for name in NAMES}
    rows_of = jax.jit(jaxmtl.value_and_jacobian(functions, has_aux=True))
    gramian_of = jax.jit(jaxmtl.value_and_gramian(functions, has_aux=True))
    (losses, aux), _ = rows_of(params, batches)
    (again, same), _, _ = gramian_of(params, batches)
    assert {name: int(aux[name]["of"]) for name in NAMES} == {"depth": 28, "edges": 60, "prior": 2}
    close(same, aux)
    close(again, losses)
    rule = jaxmtl.from_weighting(shares)
    step = jax.jit(jaxmtl.value_and_grad(tuple(functions.values()), rule, has_aux=True))
    ((losses, aux), _), _ = step(params, rule.init(params), tuple(batches[n] for n in NAMES))
    assert losses.shape == (3,)
    assert isinstance(aux, tuple)
    assert int(aux[1]["of"]) == 60


def test_a_loss_without_parameters_and_parameters_without_a_loss(x64):
    functions = {"a": lambda p, b: jnp.sum(p["x"] * b), "b": lambda p, b: jnp.sum(b)}
    params, batches = {"x": normal(0, 3), "y": normal(1, 2)}, {"a": normal(2, 3), "b": normal(3, 2)}
    _, jacobian = jaxmtl.value_and_jacobian(functions)(params, batches)
    close(jacobian, {"x": jnp.stack([batches["a"], jnp.zeros(3)]), "y": jnp.zeros((2, 2))})
    for chunk_size in (None, 1):
        fun = jaxmtl.value_and_gramian(functions, chunk_size=chunk_size)
        _, gramian, pullback = fun(params, batches)
        close(gramian, jnp.diag(jnp.array([jnp.sum(batches["a"] ** 2), 0.0])))
        close(pullback(jnp.array([2.0, 5.0])), {"x": 2 * batches["a"], "y": jnp.zeros(2)})


def test_under_vmap_and_scan(x64):
    params, batches = problem()
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), batches)
    for chunk_size in (None, 2):
        fun = jaxmtl.value_and_gramian(LOSSES, chunk_size=chunk_size)

        def gramian(batches, fun=fun):
            return fun(params, batches)[1]

        alone = jax.jit(gramian)
        expected = jnp.stack([alone(jax.tree.map(lambda x, i=i: x[i], many)) for i in range(2)])
        close(jax.jit(jax.vmap(gramian))(many), expected)
        close(jax.jit(lambda b, g=gramian: jax.lax.map(g, b))(many), expected)


# --- what a loss depends on -------------------------------------------------------------------


@jax.custom_vjp
def straight_through(x, y):
    return jnp.round(x)


straight_through.defvjp(
    lambda x, y: (jnp.round(x), None),
    lambda _, g: (g, g),  # a gradient to what was not read
)


def of_scan(p):
    # c moves into b and b into a, one step after the other: all reach the result of three steps.
    def body(carry, x):
        a, b, c = carry
        return (a + b, b + c * x, c), a

    carry, rows = jax.lax.scan(body, (p["a"], p["b"], p["c"]), p["xs"])
    return jnp.sum(carry[0]) + 0 * jnp.sum(rows)


def of_while(p):
    def body(carry):
        i, a, b = carry
        return i + 1, a * p["c"] + b, b

    return jnp.sum(jax.lax.while_loop(lambda c: c[0] < 2, body, (0, p["a"], p["b"]))[1])


def of_reference(p):
    r = jax.new_ref(p["a"])
    r[...] = r[...] * p["b"]
    return jnp.sum(r[...])


DEPENDS = {
    "plain": (lambda p: jnp.sum(p["a"] * p["c"]), "ac"),
    "jit": (lambda p: jax.jit(lambda q: jnp.sum(jnp.exp(q["b"])))(p), "b"),
    "remat": (lambda p: jax.checkpoint(lambda q: jnp.sum(jnp.exp(q["b"])))(p), "b"),
    "stop": (lambda p: jnp.sum(p["a"] * jax.lax.stop_gradient(p["b"])), "a"),
    "integers": (lambda p: p["a"][jnp.argmax(p["b"])], "a"),
    "branches": (
        lambda p: jax.lax.cond(p["c"][0] > 0, lambda q: q["a"][0], lambda q: q["b"][0], p),
        "ab",
    ),
    "scan": (of_scan, ["a", "b", "c", "xs"]),
    "while": (of_while, "abc"),
    "relu": (lambda p: jnp.sum(jax.nn.relu(p["a"])), "a"),
    "custom_vjp": (lambda p: jnp.sum(straight_through(p["a"], p["b"])), "ab"),
    "aux": (lambda p: (jnp.sum(p["a"]), jnp.sum(p["b"]))[0], "a"),
}


@pytest.mark.parametrize("case", DEPENDS)
def test_which_leaves_a_loss_depends_on(case):
    fun, expected = DEPENDS[case]
    params = {name: jnp.arange(1.0, 4.0) for name in ("a", "b", "c", "xs")}
    jaxpr = jax.make_jaxpr(lambda *x: fun(dict(zip(params, x, strict=True))))(*params.values())
    used = dict(zip(params, separate._used_by_loss(jaxpr.jaxpr), strict=True))
    assert [name for name in params if used[name]] == list(expected)


@pytest.mark.parametrize("case", [*DEPENDS, "reference"])
def test_no_derivative_is_lost(case):
    fun = of_reference if case == "reference" else DEPENDS[case][0]
    params = {name: jnp.arange(1.0, 4.0) for name in ("a", "b", "c", "xs")}
    functions = {"one": lambda p, b: fun(p), "other": lambda p, b: jnp.sum(p["c"] ** 2)}
    jacobian_of = jaxmtl.value_and_jacobian(functions)
    if case == "while":  # has no reverse mode, here as elsewhere
        with pytest.raises(ValueError, match="while_loop"):
            jacobian_of(params, {"one": None, "other": None})
        return
    _, jacobian = jacobian_of(params, {"one": None, "other": None})
    close(jax.tree.map(lambda x: x[0], jacobian), jax.grad(fun)(params), 1e-6)


# --- cost -------------------------------------------------------------------------------------


def compiled(fun, *args):
    return jax.jit(fun).lower(*args).compile()


def flops(fun, *args):
    return compiled(fun, *args).cost_analysis()["flops"]


def trunk_and_heads(m, equal, width=48, size=32):
    params = {
        "w1": normal(0, width, width),
        "w2": normal(1, width, width),
        "heads": [normal(2 + i, width) for i in range(m)],
    }

    def loss(i):
        def of_batch(params, batch):
            h = jnp.tanh(batch[0] @ params["w1"])
            return jnp.mean((jnp.tanh(h @ params["w2"]) @ params["heads"][i] - batch[1]) ** 2)

        return of_batch

    sizes = [size if equal or i % 2 else size + 12 for i in range(m)]
    batches = tuple((jnp.ones((n, width)), jnp.ones(n)) for n in sizes)
    return jax.tree.map(jnp.float32, params), tuple(map(loss, range(m))), batches


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("m", some([2, 10, 4]))
def test_a_step_costs_the_gradients_and_the_gramian(m, equal):
    params, functions, batches = trunk_and_heads(m, equal)
    n = sum(x.size for x in jax.tree.leaves(params))
    pairs = list(zip(functions, batches, strict=True))[:2]  # and so on in turn
    singles = sum(flops(jax.value_and_grad(f), params, b) for f, b in pairs) * m / 2
    rule = jaxmtl.from_weighting(shares)
    step = flops(jaxmtl.value_and_grad(functions, rule), params, rule.init(params), batches)
    assert step <= 1.1 * singles + 2 * m**2 * n + 2 * m * n
    assert flops(jaxmtl.value_and_jacobian(functions), params, batches) <= 1.01 * singles
    scalar = jaxmtl.linear_scalarization()
    step = flops(jaxmtl.value_and_grad(functions, scalar), params, scalar.init(params), batches)
    assert step <= 1.1 * singles


def test_rows_known_to_be_zero_are_neither_formed_nor_multiplied():
    m, size = 4, 1000
    functions = tuple(
        lambda p, b, i=i: jnp.vdot(p["heads"][i], b) + p["common"] ** 2 for i in range(m)
    )
    params = {"common": jnp.float32(1.0), "heads": [jnp.ones(size)] * m}
    batches = (jnp.ones(size),) * m
    fun = jaxmtl.value_and_gramian(functions)
    jaxpr = jax.make_jaxpr(fun)(params, batches)
    shapes = [v.aval.shape for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars]
    assert max(np.prod(shape, dtype=int) for shape in shapes) == size
    assert flops(lambda p, b: fun(p, b)[1], params, batches) < 3 * m * 2 * size
    weighted = flops(lambda p, b: fun(p, b)[2](jnp.ones(m)), params, batches)
    assert weighted < 6 * m * size  # every head once


def test_chunks_bound_memory_and_explain_names_their_pulls():
    m = 8
    params, functions, batches = trunk_and_heads(m, True, width=96, size=2)
    n = sum(x.size for x in jax.tree.leaves(params))
    needed = {}
    for size in (None, 2):
        fun = jaxmtl.value_and_gramian(functions, chunk_size=size)

        def step(params, batches, fun=fun):
            _, gramian, pullback = fun(params, batches)
            return pullback(jnp.diagonal(gramian))

        needed[size] = compiled(step, params, batches).memory_analysis().temp_size_in_bytes / 4 / n
    assert needed[2] <= 2 + 1 + 1 + 1  # kept, compared, summed, and what the batches left behind
    assert needed[None] >= m

    def explained(size):
        return str(jaxmtl.explain(functions, params, batches, chunk_size=size)).splitlines()[0]

    assert f"all {m} gradients at once, {m} pulls" in explained(None)
    for size in (1, 2, 4):
        pulls = m * (m // size + 1) // 2
        assert f"{pulls} pulls for the Gramian" in explained(size)


def test_losses_that_share_nothing_are_not_compared():
    functions = tuple(lambda p, b, i=i: jnp.sum(p[i] * b) for i in range(4))
    args = ([jnp.ones(3)] * 4, (jnp.ones(3),) * 4)
    assert "4 pulls for the Gramian" in jaxmtl.explain(functions, *args, chunk_size=1)
    gramian = jaxmtl.value_and_gramian(functions, chunk_size=1)(*args)[1]
    np.testing.assert_array_equal(gramian, 3 * np.eye(4))


def test_explain_names_the_losses_of_each_parameter():
    params, batches = problem()
    shared = {"trunk": True, "bias": True, "heads": {"depth": True, "edges": False}, "unused": True}
    lines = str(jaxmtl.explain(LOSSES, params, batches, shared=shared)).splitlines()
    assert lines[0].startswith("3 losses on separate batches")
    ends = {line.split("]  ")[0] + "]": line.rpartition("]  ")[2].strip() for line in lines[1:]}
    assert ends == {
        "['bias']": "rows of all losses",
        "['heads']['depth']": "rows of depth",
        "['heads']['edges']": "not shared: left out of the Gramian; used by edges",
        "['trunk']": "rows of depth, edges",
        "['unused']": "unused: no loss depends on it",
    }


# --- keywords and wrong input -----------------------------------------------------------------


def test_keywords_go_to_every_loss_that_names_them(x64):
    params, batches = problem()
    expected = stacked(params, batches, 3.0) + jnp.array([0.0, 0.0, 2.0])
    expected = dict(zip(NAMES, expected, strict=True))
    options = {"scale": 3.0, "floor": 2.0}
    close(jaxmtl.value_and_jacobian(LOSSES)(params, batches, **options)[0], expected)
    close(jaxmtl.value_and_gramian(LOSSES)(params, batches, **options)[0], expected)
    rule = jaxmtl.linear_scalarization()
    step = jaxmtl.value_and_grad(LOSSES, rule)
    close(step(params, rule.init(params), batches, **options)[0][0], expected)
    jaxmtl.explain(LOSSES, params, batches, **options)
    jaxmtl.cross_gramian(LOSSES)(params, (batches,), (batches,), **options)
    for call in (
        lambda: jaxmtl.value_and_jacobian(LOSSES)(params, batches, scall=1.0),
        lambda: jaxmtl.value_and_gramian(LOSSES)(params, batches, scall=1.0),
        lambda: step(params, rule.init(params), batches, scall=1.0),
        lambda: jaxmtl.explain(LOSSES, params, batches, scall=1.0),
        lambda: jaxmtl.cross_gramian(LOSSES)(params, (batches,), (batches,), scall=1.0),
    ):
        with pytest.raises(ValueError, match=r"got scall=.*is scale meant"):
            call()


def one(p, b):
    return jnp.sum(p * b)


ONES = jnp.ones(2)


@pytest.mark.parametrize(
    ("functions", "args", "options", "message"),
    [
        ({"a": one}, ({"a": ONES},), {"in_axes": (None, 0)}, "no in_axes= with several"),
        ((one,), ((ONES,),), {"in_axes": (None, 0)}, "no in_axes= with several"),
        ({}, ({},), {}, r"at least one loss function, got \{\} \(m = 0\)"),
        ((), ((),), {}, r"at least one loss function, got \(\) \(m = 0\)"),
        ({1: one}, ({1: ONES},), {}, "the loss functions to be a dict from task names"),
        ({"a": 3}, ({"a": ONES},), {}, "a loss function at 'a', got int"),
        ((one, {"b": one}), ((ONES, ONES),), {}, "a loss function at 1, got dict"),
        ({"a": one, "b": one}, (ONES, ONES), {}, "one argument after the parameters .*, got 2"),
        ({"a": one, "b": one}, (), {}, "one argument after the parameters .*, got 0"),
        ({"a": one, "b": one}, (ONES,), {}, r"a dict of batches with the keys .* got \w+;"),
        ({"a": one, "b": one}, ((ONES, ONES),), {}, "a dict of batches .* got tuple"),
        ({"a": one, "b": one}, ({"a": ONES},), {}, r"\['a', 'b'\], got \['a'\]"),
        ({"a": one}, ({"a": ONES, "c": ONES},), {}, r"\['a'\], got \['a', 'c'\]"),
        ((one, one), ((ONES,),), {}, "a tuple of 2 batches, one per loss function, got 1"),
        ((one, one), ({"a": ONES, "b": ONES},), {}, "a tuple of 2 batches, .* got dict"),
        ({"a": lambda p, b: p}, ({"a": ONES},), {}, r"the loss 'a' to return a scalar, got shape"),
        ({"a": lambda p, b: 1}, ({"a": ONES},), {}, "a floating point loss of 'a', got int32"),
        ({"a": lambda p, b: (1.0, b)}, ({"a": ONES},), {}, "the loss 'a' to return a scalar, got"),
        ({"a": one}, ({"a": ONES},), {"has_aux": True}, r"\(loss, aux\) of the loss 'a'"),
        ({"a": one}, ({"a": ONES},), {"chunk_size": 0}, "chunk_size to be a positive int, got 0"),
    ],
)
def test_wrong_input_is_one_sentence(functions, args, options, message):
    calls = [
        lambda: jaxmtl.value_and_jacobian(functions, **options)(ONES, *args),
        lambda: jaxmtl.value_and_gramian(functions, **options)(ONES, *args),
        lambda: jaxmtl.explain(functions, ONES, *args, **options),
        lambda: jaxmtl.value_and_grad(functions, jaxmtl.mgda(), **options)(
            ONES, jaxmtl.mgda().init(ONES), *args
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith("expected")
        assert str(error.value).count(". ") == 0


def test_an_encoder_with_several_functions_is_refused():
    with pytest.raises(ValueError, match="no encoder= with several loss functions"):
        jaxmtl.value_and_gramian({"a": one}, encoder=lambda p, x: p)


# --- what surrounds the rules -----------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", some([None, 1]))
def test_absent_tasks_by_name_whatever_their_batch_holds(chunk_size, x64):
    params, batches = problem()
    mask = {"depth": True, "edges": False, "prior": True}
    broken = batches | {"edges": jnp.full_like(batches["edges"], jnp.nan)}
    rest = {name: LOSSES[name] for name in ("depth", "prior")}
    for make in (jaxmtl.mgda, jaxmtl.linear_scalarization):
        rule = make()
        step = jaxmtl.value_and_grad(LOSSES, rule, chunk_size=chunk_size)
        step = jax.jit(step)
        (_, state), grads = step(params, rule.init(params), broken, task_mask=mask)
        of_rest = jax.jit(jaxmtl.value_and_grad(rest, rule))
        (_, same), expected = of_rest(params, rule.init(params), {n: batches[n] for n in rest})
        close(grads, expected, 1e-9)
        close(state, same)
    with pytest.raises(ValueError, match=r"task_mask to have the task names of the losses"):
        step(params, rule.init(params), batches, task_mask={"depth": True, "edges": True})


@pytest.mark.slow
def test_buffers_can_be_donated(x64):
    params, batches = problem()
    rule = jaxmtl.cr_mogm(jaxmtl.mgda(), num_tasks=3)
    step = jaxmtl.value_and_grad(LOSSES, rule)

    def train(params, state, batches):
        (losses, state), grads = step(params, state, batches)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state, losses

    kept, state = params, rule.init(params)
    expected = jax.jit(train)(kept, state, batches)
    copies = jax.tree.map(jnp.copy, (params, state))
    found = jax.jit(train, donate_argnums=(0, 1))(*copies, batches)
    close(found, expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(copies[0]))


def test_accumulation_over_micro_batches(x64):
    params, batches = problem()
    halves = [jax.tree.map(lambda x, i=i: x + i, batches) for i in range(2)]
    jacobian_of = jax.jit(jaxmtl.value_and_jacobian(LOSSES))
    inner = optax.chain(jaxmtl.mgda(), optax.sgd(0.1))
    tx = jaxmtl.multi_steps(inner, 2, num_tasks=3)
    state, rows, update = tx.init(params), [], jax.jit(tx.update)
    for half in halves:
        losses, jacobian = jacobian_of(params, half)
        mask = dict.fromkeys(NAMES, True)
        updates, state = update(jacobian, state, params, losses=losses, task_mask=mask)
        rows.append(jacobian)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *rows)
    expected, _ = inner.update(mean, inner.init(params), params)
    close(updates, expected, 1e-9)


def test_a_run_is_resumed_from_a_checkpoint(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, batches = jax.tree.map(jnp.float32, problem())
    rule = jaxmtl.dwa(num_tasks=3)
    step = jax.jit(jaxmtl.value_and_grad(LOSSES, rule))

    def run(params, state, steps):
        for _ in range(steps):
            (losses, state), grads = step(params, state, batches)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return {"params": params, "state": state, "losses": losses}

    whole = run(params, rule.init(params), 4)
    half = run(params, rule.init(params), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", half)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.tree.map(jnp.zeros_like, half))
    chex.assert_trees_all_equal(run(restored["params"], restored["state"], 2), whole)


def test_modules_of_the_frameworks():
    nn = pytest.importorskip("flax.linen")
    eqx = pytest.importorskip("equinox")
    nnx = pytest.importorskip("flax.nnx")
    batches = {"a": jnp.ones((3, 4)), "b": jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)}

    dense = nn.Dense(2)
    linen = dense.init(jax.random.key(0), batches["a"]), dense.apply
    module = eqx.nn.Linear(4, 2, key=jax.random.key(0))
    equinox = (eqx.filter(module, eqx.is_array), lambda p, x: jax.vmap(eqx.combine(p, module))(x))
    graph, state = nnx.split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    for params, apply in (linen, equinox, (state, lambda p, x: nnx.merge(graph, p)(x))):
        functions = {
            "a": lambda p, x, apply=apply: jnp.mean(apply(p, x) ** 2),
            "b": lambda p, x, apply=apply: jnp.mean(jnp.abs(apply(p, x))),
        }
        rule = jaxmtl.from_weighting(shares)
        step = jax.jit(jaxmtl.value_and_grad(functions, rule))
        (losses, _), grads = step(params, rule.init(params), batches)
        _, jacobian = jax.jit(jaxmtl.value_and_jacobian(functions))(params, batches)
        expected = jax.jit(lambda j: jaxmtl.combine(j, shares(jaxmtl.gramian(j))))(jacobian)
        close(jax.tree.leaves(grads), jax.tree.leaves(expected), 1e-4)
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        assert sorted(losses) == ["a", "b"]


# --- batches of equal shape -------------------------------------------------------------------


@pytest.mark.slow
def test_batches_of_equal_shape_by_in_axes_over_tasks(x64):
    """A head per task, stacked: the same as one function and one batch per task, on all routes."""
    m = 4
    params = {"trunk": normal(0, 3, 5), "heads": normal(1, m, 5)}
    x, y = normal(2, m, 7, 3), normal(3, m, 7)

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["trunk"]) @ params["heads"] - y) ** 2)

    def of_task(i):
        return lambda p, batch: loss({"trunk": p["trunk"], "heads": p["heads"][i]}, *batch)

    in_axes = ({"trunk": None, "heads": 0}, 0, 0)
    functions = tuple(map(of_task, range(m)))
    batches = tuple(zip(x, y, strict=True))
    rule = jaxmtl.mgda(num_tasks=m)

    def all_routes(functions, options, *args):
        fun = jaxmtl.value_and_gramian(functions, **options)
        step = jaxmtl.value_and_grad(functions, rule, **options)
        return (
            jaxmtl.value_and_jacobian(functions, **options)(params, *args),
            fun(params, *args)[:2],
            step(params, rule.init(params), *args),
        )

    stacked = jax.jit(functools.partial(all_routes, loss, {"in_axes": in_axes}))(x, y)
    close(stacked, jax.jit(functools.partial(all_routes, functions, {}))(batches), 1e-9)
