"""Every rule on drawn gradients: pytrees, dtypes, scales, ranks, and numbers that are not finite.

Hypothesis draws values; shapes and dtypes come from a small fixed set, each compiled once a rule.
"""

import functools
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import methods
from tests.methods import BY_NAME, METHODS
from tests.problems import flat, params_of, rows_of, size_of, tasks_of

NAMES = [method.name for method in METHODS]
QUICK = ("upgrad", "nash_mtl", "config", "graddrop", "moco", "famo")
KINDS = (
    "generic",
    "conflict",
    "zero",
    "zero_row",
    "duplicate",
    "opposite",
    "rank_one",
    "rank_two",
    "stationary",
)


@dataclass(frozen=True)
class Form:
    """A pytree of parameters: a template of shapes, a dtype, and the scales that it can hold."""

    shapes: object
    dtype: object
    log2_scale: int = 40


FORMS = {
    "nested": Form({"a": [(2,), {"b": ()}], "c": ((0,), (1, 2))}, jnp.float32),
    "one leaf": Form((6,), jnp.float64),
    "scalars": Form([(), (), (), ()], jnp.bfloat16),
    "empty branches": Form([(3,), [], {}, {"x": (2, 0), "y": (2, 1)}], jnp.float16, 5),
    "one scalar": Form((), jnp.float32),
}


@functools.cache
def compiled(rule, form_name, m):
    form = FORMS[form_name]
    aggregator, params, traces = BY_NAME[rule].make(m), params_of(form.shapes, form.dtype), []

    def step(jacobian, state, inputs):
        traces.append(rule)
        return aggregator.update(jacobian, state, params, **inputs)

    return aggregator.init(params), jax.jit(step), traces


def matrix_of(m, form, draw):
    """A Jacobian (m, n) of the drawn kind, rows scaled by powers of two, as the dtype holds it."""
    rng = np.random.default_rng(draw["seed"])
    n = size_of(form.shapes)
    matrix = rng.standard_normal((m, n))
    kind = draw["kind"]
    if kind == "conflict":
        matrix -= 0.9 * matrix.mean(0)
    elif kind == "zero":
        matrix[:] = 0
    elif kind == "zero_row":
        matrix[draw["seed"] % m] = 0
    elif kind == "duplicate":
        matrix[-1] = matrix[0]
    elif kind == "opposite":
        matrix[-1] = -matrix[0]
    elif kind.startswith("rank"):
        rank = 1 if kind == "rank_one" else 2
        matrix = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    elif kind == "stationary":
        matrix[-1] = -matrix[:-1].sum(0)
    exponents = draw["scale"] + draw["spread"] * rng.uniform(-1, 1, m)
    exponents = np.round(np.clip(exponents, -1, 1) * form.log2_scale).astype(int)
    scaled = np.ldexp(matrix, exponents[:, None])
    return np.asarray(np.asarray(scaled, form.dtype), np.float64)


def nearly_dependent(matrix):
    norms = np.linalg.norm(matrix, axis=1)
    return not np.all(norms) or np.linalg.cond(matrix / norms[:, None]) > 256


def inputs_of(rule, m, draw):
    rng = np.random.default_rng(draw["seed"] + 1)
    inputs = {
        "losses": rng.uniform(0.5, 2, m),
        "previous_batch_losses": rng.uniform(0.5, 2, m),
        "cross_gramian": rng.standard_normal((m, m)),
    }
    return {
        key: inputs[key].astype(np.float32) for key in sorted({"losses", *BY_NAME[rule].inputs})
    }


DRAWS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "kind": st.sampled_from(KINDS),
        "scale": st.sampled_from([0.0, -1.0, 1.0]) | st.floats(-1, 1),
        "spread": st.sampled_from([0.0, 0.05, 1.0]),
        "bad": st.sampled_from([np.nan, np.inf, -np.inf]),
    }
)


def properties(rule, form_name, m, draw):
    method, form = BY_NAME[rule], FORMS[form_name]
    start, step, traces = compiled(rule, form_name, m)
    matrix, inputs = matrix_of(m, form, draw), inputs_of(rule, m, draw)
    update, state = step(rows_of(matrix, form.shapes, form.dtype), start, inputs)

    # Finite in, finite out, in the form of the parameters; the state keeps its own.
    got = flat(update)
    assert np.all(np.isfinite(got))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    skipped = int(optax.tree.get(state, "mtl_skipped", 0))
    if form.dtype == jnp.float16 and nearly_dependent(matrix):
        assert np.all(got == 0) or not skipped  # IMTL-G's update can leave this format
    else:
        assert not skipped
    params = params_of(form.shapes, form.dtype)
    assert jax.tree.structure(update) == jax.tree.structure(params)
    for x, p in zip(jax.tree.leaves(update), jax.tree.leaves(params), strict=True):
        assert (x.shape, x.dtype) == (p.shape, p.dtype)
    assert jax.tree.structure(state) == jax.tree.structure(start)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    if draw["kind"] == "zero":
        assert np.all(got == 0)

    # What cancels in J^T w is known to the rounding of its terms.
    eps = float(jnp.finfo(form.dtype).eps)
    norms = np.linalg.norm(matrix, axis=1)
    weights = np.ones(m)
    if method.logs:
        weights = np.asarray(optax.tree.get(state, "mtl_weights"), np.float64)
    terms = np.abs(weights) @ norms
    # Rows whose squares vanish beside the largest count as zero rows.
    if method.non_conflicting and np.all(norms >= norms.max() * 2.0**-60):
        assert np.all(matrix @ got >= -64 * m * eps * norms * terms)
    if method.equivariant and not method.random and draw["kind"] in ("generic", "conflict"):
        tolerance = 64 * m * eps * np.linalg.cond(matrix) ** 2 if m <= size_of(form.shapes) else 1
        if tolerance < 0.01:
            order = np.random.default_rng(draw["seed"]).permutation(m)
            moved = {
                key: value[order][:, order] if value.ndim == 2 else value[order]
                for key, value in inputs.items()
            }
            permuted, _ = step(rows_of(matrix[order], form.shapes, form.dtype), start, moved)
            size = terms * max(1, np.abs(weights).sum() if method.scale_free else 1)
            assert np.abs(flat(permuted) - got).max() <= tolerance * max(size, np.abs(got).max())

    # Anything that is not finite: no update, the state kept, the skip counted.
    poisoned = matrix.copy()
    poisoned[draw["seed"] % m, draw["seed"] % size_of(form.shapes)] = draw["bad"]
    nothing, kept = step(rows_of(poisoned, form.shapes, form.dtype), state, inputs)
    assert np.all(flat(nothing) == 0)
    if rule != "linear_scalarization":  # which has no state
        assert int(kept.mtl_skipped) == 1 + skipped
        kept = kept._replace(mtl_skipped=state.mtl_skipped)
        jax.tree.map(np.testing.assert_array_equal, kept, state)
    assert len(traces) == 1, "a second set of numbers was traced again"


def sweep(rule, form_name, m, examples):
    with jax.enable_x64(FORMS[form_name].dtype == jnp.float64):

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(DRAWS)
        def every(draw):
            properties(rule, form_name, m, draw)

        every()


@pytest.mark.parametrize("name", methods.sweep(NAMES, QUICK))
def test_drawn_gradients(name):
    """On a nested tree in float32, and on another form that depends on the rule."""
    others = [form for form in FORMS if form != "nested"]
    sweep(name, "nested", tasks_of(name), 15)
    sweep(name, others[zlib.crc32(name.encode()) % len(others)], tasks_of(name), 10)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_drawn_gradients_of_every_form(name, form):
    sweep(name, form, tasks_of(name), 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_drawn_gradients_of_many_tasks_and_of_one(name):
    """More tasks than coordinates; and one, where the rule allows it."""
    sweep(name, "nested", 5 + tasks_of(name), 30)
    if BY_NAME[name].min_tasks == 1:
        sweep(name, "nested", 1, 15)
