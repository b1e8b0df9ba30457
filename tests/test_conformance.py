"""Every method of the table against the promises that hold for all."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from tests.methods import BY_NAME, KINDS, METHODS, sweep
from tests.problems import flat, inputs_of, params_of, rows_of, tasks_of

NAMES = [method.name for method in METHODS]
WEIGHTED = [method.name for method in METHODS if method.weighted]


def matrix_of(m, seed=0, kind="generic"):
    rng = np.random.default_rng(seed)
    matrix = np.round(rng.standard_normal((m, 8)) * 256) / 256
    if kind == "conflict":
        matrix -= 0.9 * matrix.mean(0)
    return matrix


@functools.cache
def compiled(name, m, x64):
    """Both routes of a method, compiled once for all tests of a precision."""
    aggregator = BY_NAME[name].make(m)
    traces = []

    def step(jacobian, state, task_mask, inputs):
        traces.append(1)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), jacobian)
        return aggregator.update(jacobian, state, params, task_mask=task_mask, **inputs)

    def weigh(gramian, state):
        return aggregator.weighting.update(gramian, state, **inputs_of(name, m))

    return aggregator, jax.jit(step), jax.jit(weigh), traces


def get(name, m):
    return compiled(name, m, jax.config.jax_enable_x64)


def run(name, matrix, state=None, mask=None, inputs=None):
    m = len(matrix)
    aggregator, step, _, _ = get(name, m)
    state = aggregator.init(params_of()) if state is None else state
    mask = jnp.ones(m, bool) if mask is None else mask
    return step(rows_of(matrix), state, mask, inputs or inputs_of(name, m))


@pytest.mark.parametrize("name", sweep(NAMES))
def test_update_has_the_shape_of_params_and_state_never_changes_form(name, x64):
    matrix = matrix_of(tasks_of(name))
    aggregator, _, _, traces = get(name, len(matrix))
    state = aggregator.init(params_of())
    update, new = run(name, matrix)
    chex.assert_trees_all_equal_shapes_and_dtypes(update, params_of())
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite(update)
    before = len(traces)
    run(name, matrix_of(len(matrix), seed=1), new)
    assert len(traces) == before, "the second call with the same shapes was traced again"
    if aggregator.weighting is not None:
        weighting_state = aggregator.weighting.init()
        chex.assert_trees_all_equal_shapes_and_dtypes(weighting_state, state)


@pytest.mark.parametrize("name", sweep(NAMES, ("upgrad", "graddrop", "famo", "moco", "ldc_mtl")))
def test_trains_a_trunk_with_heads_under_scan_and_vmap_over_seeds(name):
    m = tasks_of(name)
    groups = {
        "shared": BY_NAME[name].make(m),
        "head": jaxmtl.linear_scalarization(jnp.ones(m)),
    }
    labels = {"trunk": "shared", "head": "head"}
    optimizer = optax.chain(optax.partition(groups, labels), optax.adam(0.1))
    start = {"trunk": jnp.zeros(6), "head": jnp.zeros(2)}
    targets = jnp.asarray(matrix_of(m))

    def losses_fn(p, shift):
        point = jnp.concatenate([p["trunk"], p["head"]])
        return jnp.sum((point - targets - shift) ** 2, axis=1)

    def train(seed):
        def step(carry, _):
            p, state = carry
            losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(p, seed)
            inputs = inputs_of(name, m) | {"losses": losses}
            updates, state = optimizer.update(jacobian, state, p, **inputs)
            return (jaxmtl.apply_updates(p, updates), state), losses

        (p, state), losses = jax.lax.scan(step, (start, optimizer.init(start)), None, length=5)
        return p, losses, state

    p, losses, state = jax.jit(jax.vmap(train))(jnp.array([0.0, 0.1]))
    chex.assert_tree_all_finite((p, losses, state))
    assert p["trunk"].shape == (2, 6)
    assert float(jnp.max(jnp.abs(p["trunk"][0] - p["trunk"][1]))) > 0
    assert int(jnp.max(optax.tree.get(state, "mtl_skipped", jnp.zeros(())))) == 0
    if BY_NAME[name].logs:
        assert optax.tree.get(state, "mtl_weights").shape == (2, m)


@pytest.mark.parametrize("name", sweep(NAMES))
@pytest.mark.parametrize("kind", ["zero", "zero_row", "duplicate", "stationary", "rank_one"])
def test_degenerate_jacobians_have_finite_updates(name, kind, x64):
    matrix = matrix_of(tasks_of(name))
    if kind == "zero":
        matrix[:] = 0
    elif kind == "zero_row":
        matrix[1] = 0
    elif kind == "duplicate":
        matrix[1] = matrix[0]
    elif kind == "stationary":
        matrix[-1] = -matrix[:-1].sum(0)
    else:
        matrix = np.outer(
            np.arange(1, len(matrix) + 1) * (-1.0) ** np.arange(len(matrix)), matrix[0]
        )
    update, state = run(name, matrix)
    chex.assert_tree_all_finite((update, state))
    assert int(optax.tree.get(state, "mtl_skipped", 0)) == 0
    if kind == "zero":
        assert np.all(flat(update) == 0)


@pytest.mark.parametrize("name", sweep(n for n in NAMES if BY_NAME[n].min_tasks == 1))
def test_one_task_gives_a_multiple_of_its_gradient(name, x64):
    matrix = matrix_of(1)
    update = flat(run(name, matrix)[0])
    scale = update @ matrix[0] / (matrix[0] @ matrix[0])
    assert scale > 0
    np.testing.assert_allclose(update, scale * matrix[0], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_is_skipped_and_counted(name, bad, x64):
    m = tasks_of(name)
    _, state = run(name, matrix_of(m))
    matrix = matrix_of(m, seed=1)
    matrix[1, 2] = bad
    update, new = run(name, matrix, state)
    assert np.all(flat(update) == 0)
    assert int(new.mtl_skipped) == 1
    chex.assert_trees_all_equal(new._replace(mtl_skipped=state.mtl_skipped), state)


def in_precisions(names, quick=None):
    """Every name in float64, those that iterate in float32 too; all but ``quick`` ones are slow."""
    pairs = [(name, "float64") for name in names]
    pairs += [(name, "float32") for name in names if BY_NAME[name].solver]
    late = [quick is not None and name not in quick for name, _ in pairs]
    return [
        pytest.param(*pair, marks=[pytest.mark.slow] * is_late)
        for pair, is_late in zip(pairs, late, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "precision"),
    in_precisions([n for n in NAMES if BY_NAME[n].degree is not None]),
    indirect=["precision"],
)
def test_powers_of_two(name, precision):
    """Degree 1 bit for bit: weights do not change, the update scales exactly."""
    method, m = BY_NAME[name], tasks_of(name)
    matrix = matrix_of(m, kind="conflict")
    update, state = run(name, matrix)
    largest = 300 if precision == "float64" else 60
    for k in (-largest, -13, 40, largest):
        scaled, scaled_state = run(name, np.ldexp(matrix, k))
        if not method.scale_free:
            expected = flat(update) * 2.0 ** (k * method.degree)
            np.testing.assert_allclose(
                flat(scaled), expected, rtol=1e-4 if precision == "float32" else 1e-10
            )
            continue
        np.testing.assert_array_equal(flat(scaled), np.ldexp(flat(update), k))
        if method.logs:
            np.testing.assert_array_equal(scaled_state.mtl_weights, state.mtl_weights)


@pytest.mark.parametrize(
    ("name", "precision"),
    in_precisions([n for n in WEIGHTED if BY_NAME[n].scale_free], KINDS),
    indirect=["precision"],
)
def test_powers_of_two_on_the_gramian_alone(name, precision):
    m = tasks_of(name)
    matrix = matrix_of(m, kind="conflict")
    gram = jnp.asarray(matrix @ matrix.T, float)
    aggregator, _, weigh, _ = get(name, m)
    weights, _ = weigh(gram, aggregator.weighting.init())
    largest = 60 if precision == "float64" else 40
    for k in (-largest, 7, largest):
        scaled, _ = weigh(jnp.ldexp(gram, 2 * k), aggregator.weighting.init())
        np.testing.assert_array_equal(scaled, weights)


@pytest.mark.parametrize("name", sweep(WEIGHTED))
def test_both_routes_agree(name, x64):
    m = tasks_of(name)
    matrix = matrix_of(m, kind="conflict")
    update, state = run(name, matrix)
    aggregator, _, weigh, _ = get(name, m)
    gram = jaxmtl.gramian(rows_of(matrix))
    weights, new = weigh(gram, aggregator.weighting.init())
    np.testing.assert_allclose(matrix.T @ np.asarray(weights), flat(update), rtol=1e-9, atol=1e-12)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if BY_NAME[n].equivariant and not BY_NAME[n].random]
)
def test_permutation_equivariance(name, x64):
    m = tasks_of(name)
    matrix = matrix_of(m, kind="conflict")
    order = np.roll(np.arange(m)[::-1], 1)
    permuted, _ = run(name, matrix[order], inputs=inputs_of(name, m, order))
    np.testing.assert_allclose(flat(permuted), flat(run(name, matrix)[0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in NAMES if BY_NAME[n].non_conflicting])
@pytest.mark.parametrize("m", [3, 8])
def test_non_conflicting(name, m, x64):
    for seed in range(5):
        matrix = matrix_of(m, seed, kind="conflict")
        matrix *= np.logspace(0, -4, m)[:, None]
        for scale in (1, 1e-9, 1e9):
            update = flat(run(name, matrix * scale)[0])
            norms = np.linalg.norm(matrix * scale, axis=1) * np.linalg.norm(update)
            cosines = (matrix * scale) @ update / np.where(norms > 0, norms, 1)
            assert cosines.min() >= -1e-9


@pytest.mark.parametrize("name", [n for n in NAMES if BY_NAME[n].linear_under_scaling])
def test_linear_under_scaling(name, x64):
    """A(diag(c) J) is linear in c > 0, for one draw of the random rules."""
    m = tasks_of(name)
    matrix = matrix_of(m, kind="conflict")
    rng = np.random.default_rng(1)
    first, second = rng.uniform(0.1, 3, (2, m))

    def of(c):
        return flat(run(name, matrix * c[:, None])[0])

    np.testing.assert_allclose(of(first + second), of(first) + of(second), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sweep(NAMES))
def test_masked_tasks_are_removed_exactly(name, x64):
    """A mask equals the smaller problem, whatever the absent row holds; nothing recompiles."""
    method, m = BY_NAME[name], tasks_of(name) + 1
    matrix = matrix_of(m, kind="conflict")
    mask = np.ones(m, bool)
    mask[1] = False
    dirty = matrix.copy()
    dirty[1] = np.nan
    masked, state = run(name, dirty, mask=mask)
    assert int(optax.tree.get(state, "mtl_skipped", 0)) == 0
    traces = get(name, m)[3]
    before = len(traces)
    other = np.roll(mask, 1)
    assert np.all(np.isfinite(flat(run(name, matrix, mask=other)[0])))
    assert len(traces) == before, "another mask was traced again"
    if method.logs:
        assert optax.tree.get(state, "mtl_weights")[1] == 0
    # The smaller problem draws other numbers.
    if not method.random:
        small, _ = run(name, matrix[mask], inputs=inputs_of(name, m, np.flatnonzero(mask)))
        np.testing.assert_allclose(flat(masked), flat(small), rtol=1e-9, atol=1e-12)
    else:
        matrix[1] = 0
        np.testing.assert_array_equal(flat(masked), flat(run(name, matrix, mask=mask)[0]))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_input_is_a_sentence(name):
    m = tasks_of(name)
    aggregator = BY_NAME[name].make(m)
    params, rows = params_of(), rows_of(matrix_of(m))
    state = aggregator.init(params)
    losses = jnp.ones(m)
    with pytest.raises(ValueError, match="without a task axis"):
        aggregator.update({**params, "a": jnp.zeros((2, 3))}, state, params, losses=losses)
    with pytest.raises(ValueError, match="params=None"):
        aggregator.update(rows, state, losses=losses)
    with pytest.raises(ValueError, match="same number of tasks"):
        aggregator.update({**rows, "b": jnp.zeros(m + 1)}, state, params, losses=losses)
    with pytest.raises(ValueError, match="floating point"):
        aggregator.update({**rows, "b": jnp.zeros(m, int)}, state, params, losses=losses)
    with pytest.raises(ValueError, match="structure"):
        aggregator.update({"a": rows["a"]}, state, params, losses=losses)
    with pytest.raises(ValueError, match="losses"):
        aggregator.update(rows, state, params, losses=jnp.ones(m + 1))
    with pytest.raises(ValueError, match="bool task_mask"):
        aggregator.update(rows, state, params, losses=losses, task_mask=jnp.ones(m))
    if BY_NAME[name].logs:
        with pytest.raises(ValueError, match="num_tasks"):
            aggregator.update(rows_of(matrix_of(m + 1)), state, params, losses=jnp.ones(m + 1))
    weighting = aggregator.weighting
    if weighting is not None:
        with pytest.raises(ValueError, match=r"\(m, m\)"):
            weighting.update(jnp.ones((m, m + 1)), weighting.init(), losses=losses)


# The rules on losses share one wrapper: one of them stands for all.
@pytest.mark.parametrize(
    "name", sweep(n for n in NAMES if n == "famo" or BY_NAME[n].inputs[:1] != ("losses",))
)
def test_weights_carry_no_gradient_and_compose_with_grad(name):
    """grad of something around a step works, with the weights held fixed."""
    m = tasks_of(name)
    matrix = jnp.asarray(matrix_of(m), jnp.float32)
    aggregator = BY_NAME[name].make(m)

    def norm(scale):
        update, _ = aggregator.update(
            matrix * scale, aggregator.init(jnp.zeros(8)), jnp.zeros(8), **inputs_of(name, m)
        )
        return jnp.sum(update)

    value, slope = jax.jit(jax.value_and_grad(norm))(1.0)
    np.testing.assert_allclose(slope, value, rtol=1e-3, atol=1e-4)  # J^T w is linear in J


def test_fixed_weights_without_num_tasks_have_no_state():
    mean = jaxmtl.linear_scalarization()
    bad = jnp.array([[1.0, jnp.inf], [0.0, 1.0]])
    update, state = mean.update(bad, mean.init(jnp.zeros(2)), jnp.zeros(2))
    assert state == optax.EmptyState()
    np.testing.assert_array_equal(update, 0)


# Programs with nine copies of a solver compile for long; combinators see no difference in them.
@pytest.mark.parametrize(
    "name", sweep(WEIGHTED, ("linear_scalarization", "pcgrad", "famo", "ldc_mtl"))
)
def test_combinators_in_their_neutral_form_are_the_bare_rule(name, x64):
    """On every route, heads included: with the Jacobian, with the Gramian alone, without either."""
    m = tasks_of(name)
    matrix = jnp.asarray(matrix_of(m, kind="conflict"))
    bare = BY_NAME[name].make(m)
    forms = [bare, jaxmtl.every_k(bare, 1), jaxmtl.cr_mogm(bare, alpha=0)]
    params = {"trunk": jnp.zeros(8), "head": jnp.ones(())}
    inputs = inputs_of(name, m)
    given = {key: value for key, value in inputs.items() if key != "losses"}

    def losses_fn(p):
        return inputs["losses"] * p["head"] + matrix @ p["trunk"]

    def run_form(aggregator):
        route = jaxmtl.value_and_grad(losses_fn, aggregator, shared={"trunk": True, "head": False})
        rows, weighting = {"trunk": matrix, "head": inputs["losses"]}, aggregator.weighting

        def step(states, _):
            update, first = aggregator.update(rows, states[0], params, **inputs)
            weights, second = weighting.update(matrix @ matrix.T, states[1], **inputs)
            (_, third), grads = route(params, states[2], **given)
            return (first, second, third), (update, weights, grads, first.mtl_weights)

        return jax.lax.scan(step, (aggregator.init(params),) * 3, length=2)[1]

    expected, *others = jax.jit(lambda: [run_form(form) for form in forms])()
    for other in others:
        chex.assert_trees_all_close(other, expected, rtol=1e-12, atol=1e-13)


def test_partition_leaves_other_groups_alone():
    optimizer = optax.partition(
        {"shared": jaxmtl.mgda(), "head": jaxmtl.linear_scalarization(jnp.ones(3))},
        {"a": "shared", "b": "head", "c": "shared", "d": "head"},
    )
    params, rows = params_of(), rows_of(matrix_of(3))
    update, _ = jax.jit(optimizer.update)(rows, optimizer.init(params), params)
    chex.assert_trees_all_equal_shapes(update, params)
    np.testing.assert_allclose(update["b"], jnp.sum(rows["b"]), rtol=1e-5)
    shared, _ = jaxmtl.mgda().update(rows["a"], jaxmtl.mgda().init(params["a"]), params["a"])
    np.testing.assert_allclose(update["a"], shared, rtol=1e-5, atol=1e-6)
