"""Rows of losses that end in a tower for each task."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmtl
from tests.problems import flat_rows, some

M, B, D = 4, 8, 16


def dense(key, *sizes):
    keys = jax.random.split(key, len(sizes))
    return [
        jax.random.normal(k, (a, b)) / a**0.5
        for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=False)
    ]


def layers(matrices, x):
    for w in matrices:
        x = jnp.tanh(x @ w)
    return x


@pytest.fixture(scope="module")
def problem():
    """A trunk, a tower per task, a matrix in two towers, others in losses alone."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), M + 3)
        params = {
            "trunk": dense(keys[0], D, D, D),
            "towers": [dense(k, D, D, D, 3) for k in keys[1 : M + 1]],
            "twice": dense(keys[-2], 3, 3)[0],
            "of losses": jnp.ones((2, 2)),
            "scale": jnp.array(0.5),
        }
        return params, jax.random.normal(keys[-1], (B, D))


def predictions(params, x):
    h = layers(params["trunk"][:1], x)
    deep = layers(params["trunk"][1:], h)
    found = {f"t{i}": layers(w, deep) for i, w in enumerate(params["towers"])}
    found["t0"] = found["t0"] @ params["twice"] + h[:, :3]
    found["t1"] = found["t1"] @ params["twice"]
    return found


def each(params, x):
    found = predictions(params, x)
    losses = {name: jnp.mean(y**2) for name, y in found.items()}
    # A loss that reads an integer of the trunk, and one with a parameter of its own.
    best = jnp.argmax(layers(params["trunk"], x), -1)
    losses["t2"] += jnp.mean(jnp.take_along_axis(found["t2"], best[:, None] % 3, 1))
    losses["t3"] *= jnp.exp(params["scale"])
    return losses


def with_aux(params, x):
    found = predictions(params, x)
    aux = {"of tower": found["t1"] > 0, "of trunk": layers(params["trunk"], x), "note": "text"}
    return each(params, x), aux


def jitted_apply(params, x):
    found = jax.jit(predictions)(params, x)
    return jnp.array([jnp.mean(y**2) for y in found.values()])


FORMS = {
    "dict": each,
    "stack": lambda p, x: jnp.stack(list(each(p, x).values())),
    "array": lambda p, x: jnp.array(list(each(p, x).values())),
    "concatenate": lambda p, x: jnp.concatenate([v[None] for v in each(p, x).values()]),
    "jit": jax.jit(each),
    "jit in jit": jax.jit(lambda p, x: jnp.stack(list(jax.jit(each)(p, x).values()))),
    "predictions by jit": jitted_apply,
}


def in_order(forms, *quick):
    return some(sorted(forms, key=lambda name: name not in quick), len(quick))


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


def one_by_one(fun, params, x):
    """The gradient of every loss by itself."""
    losses = fun(params, x)
    names = sorted(losses) if isinstance(losses, dict) else range(M)
    grads = [jax.grad(lambda p, name=name: fun(p, x)[name])(params) for name in names]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *grads)


@pytest.mark.parametrize("form", in_order(FORMS, "dict", "array", "predictions by jit"))
def test_rows_are_the_gradients_and_towers_are_passed_once(form, problem):
    with jax.enable_x64(True):
        params, x = problem
        fun = jaxmtl.value_and_jacobian(FORMS[form])
        losses, jacobian = jax.jit(fun)(params, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=0),
            losses,
            FORMS[form](params, x),
        )
        expected = one_by_one(FORMS[form], params, x)
        np.testing.assert_allclose(flat_rows(jacobian), flat_rows(expected), rtol=0, atol=1e-13)
        # In products of a batch with a matrix: the trunk of two layers is passed forward once and
        # back m times (twice for weights and inputs, the first layer for weights alone), a tower of
        # three layers three times in all.
        products = 2 * B * D * D
        trunk = products * (2 + 3 * M)
        towers = M * 3 * (2 * products + 2 * B * D * 3)
        assert flops(fun, params, x) < 1.15 * (trunk + towers)


def test_auxiliary_outputs_come_from_everywhere(problem):
    with jax.enable_x64(True):
        params, x = problem
        notes = []

        def evaluate(params, x):
            (losses, aux), jacobian = jaxmtl.value_and_jacobian(with_aux, has_aux=True)(params, x)
            notes.append(aux.pop("note"))
            return losses, aux, jacobian

        losses, aux, jacobian = jax.jit(evaluate)(params, x)
        expected_losses, expected = with_aux(params, x)
        assert notes == [expected.pop("note")]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), losses, expected_losses
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), aux, expected)
        np.testing.assert_allclose(
            flat_rows(jacobian), flat_rows(one_by_one(each, params, x)), rtol=0, atol=1e-13
        )


def test_all_transformations_go_through(problem):
    """Batched, in a scan, differentiated again, and eager, where nothing is split."""
    with jax.enable_x64(True):
        params, x = problem
        fun = jaxmtl.value_and_jacobian(each)
        eager = flat_rows(fun(params, x)[1])
        xs = jnp.stack([x, 2 * x])
        expected = [flat_rows(one_by_one(each, params, x)) for x in xs]
        batched = jax.vmap(fun, (None, 0))(params, xs)[1]
        scanned = jax.lax.scan(lambda c, x: (c, fun(params, x)[1]), None, xs)[1]
        for i in range(2):
            for found in (batched, scanned):
                rows = flat_rows(jax.tree.map(lambda leaf, i=i: leaf[i], found))
                np.testing.assert_allclose(rows, expected[i], rtol=0, atol=1e-13)
        np.testing.assert_allclose(eager, expected[0], rtol=0, atol=1e-13)

        def sharpness(rows):
            return lambda p: jnp.sum(jnp.sin(flat_rows(rows(p))))

        second = jax.jit(jax.grad(sharpness(lambda p: fun(p, x)[1])))(params)
        by_hand = jax.jit(jax.grad(sharpness(lambda p: one_by_one(each, p, x))))(params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), second, by_hand
        )


def test_python_may_decide_by_values_where_they_are_known(problem):
    params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), problem)

    def losses_fn(params, x):
        y = predictions(params, x)
        return jnp.stack([jnp.mean(y["t0"]), jnp.mean(y["t1"])]) * (2 if params["scale"] > 0 else 1)

    fun = jaxmtl.value_and_jacobian(losses_fn)
    rows = fun(params, x)[1]["scale"]
    assert rows.shape == (2,)
    again = jax.grad(lambda p: jnp.sum(flat_rows(fun(p, x)[1]) ** 2))(params)  # not compiled
    assert np.all(np.isfinite(flat_rows(again, 0)))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-2, 1e-2),))


@pytest.mark.parametrize(
    "wrap",
    [
        clipped,
        jax.checkpoint(jnp.tanh),
        lambda h: jax.lax.scan(lambda c, _: (jnp.tanh(c), None), h, None, length=2)[0],
        lambda h: jax.lax.cond(h[0, 0] > 0, jnp.sin, jnp.cos, h),
        jax.lax.stop_gradient,
    ],
    ids=["custom_vjp", "checkpoint", "scan", "cond", "stop_gradient"],
)
def test_what_stands_between_trunk_and_towers(wrap, problem):
    with jax.enable_x64(True):
        params, x = problem

        def losses_fn(params, x):
            h = wrap(layers(params["trunk"], x))
            return jnp.stack([jnp.mean(wrap(layers(w, h)) ** 2) for w in params["towers"]])

        rows = jax.jit(jaxmtl.value_and_jacobian(losses_fn))(params, x)[1]
        expected = one_by_one(losses_fn, params, x)
        np.testing.assert_allclose(flat_rows(rows), flat_rows(expected), rtol=0, atol=1e-13)


def test_statistics_of_towers(problem):
    """Flax: BatchNorm in the trunk and in every head, whose averages are auxiliary outputs."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=False)
            h = nn.relu(norm(nn.Dense(D)(x)))
            heads = [nn.BatchNorm(use_running_average=False)(nn.Dense(D)(h)) for _ in range(3)]
            return [nn.Dense(1)(nn.relu(y)) for y in heads]

    net = Network()
    x = jnp.asarray(problem[1], jnp.float32)
    variables = net.init(jax.random.key(0), x)

    def losses_fn(params, stats, x):
        found, new = net.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
        return jnp.stack([jnp.mean((y - i) ** 2) for i, y in enumerate(found)]), new["batch_stats"]

    fun = jax.jit(jaxmtl.value_and_jacobian(losses_fn, has_aux=True))
    (losses, stats), jacobian = fun(variables["params"], variables["batch_stats"], x)

    def gradient(params, i):
        return jax.grad(lambda p: losses_fn(p, variables["batch_stats"], x)[0][i])(params)

    expected_losses, expected_stats = losses_fn(*variables.values(), x)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, expected_stats
    )
    for i in range(3):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], jacobian)
        np.testing.assert_allclose(
            flat_rows(row, 0), flat_rows(gradient(variables["params"], i), 0), rtol=0, atol=1e-5
        )


def of_examples(params, x):
    """Losses of examples and tasks, as far as they are no means yet: (B, M)."""
    found = predictions(params, x)
    return jnp.stack([jnp.mean(found[f"t{i}"] ** 2, -1) for i in range(M)], -1)


STACKED_EARLY = {
    "scaled": lambda p, x: jnp.stack(list(each(p, x).values())) * jnp.arange(1.0, M + 1),
    "averaged": lambda p, x: jnp.mean(of_examples(p, x), 0),
    "masked": lambda p, x: (
        jnp.sum(jnp.where(x[:, :M] > 0, of_examples(p, x), 0), 0) / jnp.sum(x[:, :M] > 0, 0)
    ),
    "learned": lambda p, x: (
        jnp.log(jnp.mean(of_examples(p, x), 0)) * jnp.exp(-p["of losses"].ravel())
        + p["of losses"].ravel() * p["scale"]
    ),
    "compiled": jax.jit(lambda p, x: 2 * jax.jit(of_examples)(p, x).max(0).astype(x.dtype)),
    "weighted": lambda p, x: jnp.mean(of_examples(p, x) * x[:1, :M] * x[:, :1], 0),
    "one for all": lambda p, x: jnp.stack(list(each(p, x).values())) * x[0, 1:2],
    "over their sum": lambda p, x: (
        lambda l: l / jnp.sum(l, keepdims=True) + jax.nn.softmax(jax.lax.stop_gradient(l))
    )(jnp.stack(list(each(p, x).values()))),
    "variances": lambda p, x: jnp.var(of_examples(p, x), 0),
    "soft maxima": lambda p, x: jax.nn.logsumexp(of_examples(p, x).T, 1),
    "of two": lambda p, x: jnp.mean(of_examples(p, x), 0) + jnp.stack(list(each(p, x).values())),
}


@pytest.mark.parametrize(
    "form", in_order(STACKED_EARLY, "weighted", "one for all", "averaged", "compiled")
)
def test_losses_may_be_scaled_masked_and_averaged_after_they_are_stacked(form, problem):
    with jax.enable_x64(True):
        params, x = problem
        losses_fn = STACKED_EARLY[form]
        losses, jacobian = jax.jit(jaxmtl.value_and_jacobian(losses_fn))(params, x)
        np.testing.assert_allclose(losses, losses_fn(params, x), rtol=1e-12)
        rows = flat_rows(jax.jit(jax.jacrev(losses_fn))(params, x))
        size = np.max(np.abs(rows))
        np.testing.assert_allclose(flat_rows(jacobian), rows, rtol=0, atol=1e-12 * size)
        found, gramian, _ = jax.jit(jaxmtl.value_and_gramian(losses_fn))(params, x)
        np.testing.assert_allclose(found, losses, rtol=1e-12)
        np.testing.assert_allclose(gramian, rows @ rows.T, rtol=0, atol=1e-12 * size**2)
        if form in (
            "over their sum",
            "soft maxima",
        ):  # every loss reads all; a transpose is no step
            return
        whole = flops(jax.jacrev(losses_fn), params, x)
        assert flops(jaxmtl.value_and_jacobian(losses_fn), params, x) < 0.5 * whole


def test_long_chains_without_a_stack_are_traced_at_once():
    def logistic(p, steps):
        for _ in range(steps):
            p = 3.7 * p * (1 - p)
        return p

    def newton(p, steps):
        y = jnp.stack([jnp.sum(p), jnp.sum(p**2)])
        for _ in range(steps):
            y = y - (y * y - 2) / (2 * y)
        return y

    for fun in (logistic, newton):

        def equations(steps, fun=fun):
            rows = jaxmtl.value_and_jacobian(lambda p: fun(p, steps))
            return len(jax.make_jaxpr(rows)(jnp.full(3, 0.3)).eqns)

        few, more, most = (equations(n) for n in (10, 20, 40))
        assert most - more <= 2.1 * (more - few)


def reversed_by(rate):
    rule = jax.custom_vjp(lambda x: x)
    rule.defvjp(lambda x: (x, None), lambda _, g: (-rate * g,))
    return rule


def scaled_by(rate):
    rule = jax.custom_jvp(lambda x: x)
    rule.defjvp(lambda primals, tangents: (primals[0], rate * tangents[0]))
    return rule


@pytest.mark.parametrize("rule", [reversed_by, scaled_by])
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_rule_may_close_over_a_traced_value(rule, is_inside):
    """As gradient reversal by a schedule does: it cannot be traced before it is differentiated."""

    def losses_fn(params, x, step):
        h = jnp.tanh(x @ params["t"])
        rate = 2 / (1 + jnp.exp(-step)) - 1 if is_inside else step
        return {"a": jnp.mean((h @ params["a"]) ** 2), "b": jnp.mean(rule(rate)(h) @ params["b"])}

    params = {"t": jnp.eye(3) + 0.1, "a": jnp.ones((3, 2)), "b": jnp.full((3, 2), 0.3)}
    args = params, jnp.arange(12.0).reshape(4, 3), jnp.array(1.0)
    expected = flat_rows(
        jax.jacrev(lambda p: jnp.stack([*losses_fn(p, *args[1:]).values()]))(params)
    )
    rows = jax.jit(jaxmtl.value_and_jacobian(losses_fn))(*args)[1]
    np.testing.assert_allclose(flat_rows(rows), expected, rtol=0, atol=1e-6)

    def without_jacobian(*args):
        _, gramian, pullback = jaxmtl.value_and_gramian(losses_fn)(*args)
        return gramian, pullback(jnp.array([1.0, 2.0]))

    gramian, pulled = jax.jit(without_jacobian)(*args)
    np.testing.assert_allclose(gramian, expected @ expected.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat_rows(pulled, 0), [1, 2] @ expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "read",
    [
        lambda p, x: np.asarray(jnp.mean(x, 0))[0],
        lambda p, x: jnp.mean(x[x[:, 0] > 0]),
        lambda p, x: [0.5, 2.0][jnp.argmax(p["a"].sum(0)) % 2],
        lambda p, x: 2.0 if jnp.sum(p["a"]) > 0 else 1.0,
    ],
)
def test_values_that_python_reads_outside_jit(read):
    params, x = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}, jnp.arange(12.0).reshape(4, 3) - 5

    def losses_fn(params, x):
        return {name: read(params, x) * jnp.mean(jnp.tanh(x @ w)) for name, w in params.items()}

    def total(params):
        return jnp.sum(flat_rows(jaxmtl.value_and_jacobian(losses_fn)(params, x)[1]) ** 2)

    assert np.all(np.isfinite(flat_rows(jax.grad(total)(params), 0)))


def test_a_literal_among_the_losses():
    def losses_fn(p):
        return jnp.stack([p @ p, jnp.sum(p) ** 2, jnp.array(2.0)])

    p = jnp.array([1.0, 2.0, -1.0])
    rows = jax.jit(jaxmtl.value_and_jacobian(losses_fn))(p)[1]
    np.testing.assert_array_equal(rows, [2 * p, [4, 4, 4], [0, 0, 0]])
    gramian = jax.jit(lambda p: jaxmtl.value_and_gramian(losses_fn)(p)[1])(p)
    np.testing.assert_allclose(gramian, rows @ rows.T)
