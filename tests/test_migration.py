"""The migration notes: listings run, calls exist, and numbers are what they say.

What the other projects compute is written out here as their code states it, in NumPy and with
their constants, so that their column of the notes is tested as ours is. (Where a table says "same",
parity with TorchJD 0.18.0 is that of `test_golden`, `test_stochastic` and `test_balancing`.)
"""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmtl
from tests.problems import some

ROOT = Path(__file__).parents[1]
NOTES = ROOT / "experiments" / "examples" / "MIGRATION.md"
if not NOTES.exists():
    pytest.skip("the notes are part of the repository alone", allow_module_level=True)
TEXT = NOTES.read_text()

pytestmark = pytest.mark.xdist_group("migration")


def tables():
    """Returns the rows of every table, by the header of its first column."""
    found, header = {}, None
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            header = None
        elif header is None:
            header = cells[0]
            found[header] = []
        elif set("".join(cells)) != {"-"}:
            found[header].append(cells)
    return found


@pytest.mark.slow
def test_listings_run():
    namespace = {}
    listings = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(listings) == TEXT.count("```python") >= 8
    for listing in listings:
        exec(compile(listing, NOTES.name, "exec"), namespace)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *params_of(namespace))
    assert all(0 < step < 2e-3 for step in moved.values())  # one step of Adam at 1e-3
    assert namespace["weights"].shape == (2,)
    assert all(x.shape == namespace["params"][k].shape for k, x in namespace["grads"].items())


def params_of(namespace):
    return namespace["params"], namespace["new_params"]


def calls(table):
    return [
        pytest.param(call, id=call[:40])
        for row in tables()[table]
        for call in re.findall(r"`([a-z_]+\(.*?\))`(?:,|$|;)", row[1])
    ]


@pytest.mark.parametrize(
    "call", calls("TorchJD") + calls("LibMTL, default arguments") + calls("RL code")
)
def test_calls_of_the_tables_exist(call):
    m, k = 3, 2
    made = eval(
        call, {**vars(jaxmtl), "jnp": jnp, "optax": optax, "m": m, "k": k, "w": jnp.ones(m)}
    )
    assert isinstance(made, jaxmtl.Aggregator)
    made.init({"p": jnp.zeros(2)})


def test_all_rows_of_the_tables_are_read():
    found = tables()
    assert set(found) == {"TorchJD", "Jacobian", "LibMTL, default arguments", "copy", "RL code"}
    assert all(re.search(r"`[a-z_]+\(", row[1]) for row in found["TorchJD"])
    assert len(calls("TorchJD")) > len(found["TorchJD"]) > 15


# --- TorchJD's numbers --------------------------------------------------------------------------


def dual_cone_weights(gramian, start):
    """argmin_{v >= start} v^T G v by trying every active set."""
    m = len(gramian)
    best = None
    for free in itertools.product([False, True], repeat=m):
        free, v = np.array(free), start.copy()
        if free.any():
            rhs = -gramian[np.ix_(free, ~free)] @ start[~free]
            v[free] = np.linalg.lstsq(gramian[np.ix_(free, free)], rhs, rcond=None)[0]
        if (v >= start - 1e-12).all() and (best is None or v @ gramian @ v < best[0]):
            best = v @ gramian @ v, v
    return best[1]


def normalised(gramian):
    trace = np.trace(gramian)
    return np.zeros_like(gramian) if trace < 1e-4 else gramian / trace


def torchjd(call, rows):
    """What TorchJD 0.18.0 computes for a call of the table."""
    m, gramian = len(rows), rows @ rows.T
    if call == "upgrad()":
        ridged = normalised(gramian) + 1e-4 * np.eye(m)
        return sum(dual_cone_weights(ridged, e / m) for e in np.eye(m)) @ rows
    if call == "dual_proj()":
        ridged = normalised(gramian) + 1e-4 * np.eye(m)
        return dual_cone_weights(ridged, np.full(m, 1 / m)) @ rows
    if call == "mgda()":
        alpha = np.full(m, 1 / m)
        for _ in range(100):
            e = np.eye(m)[np.argmin(gramian @ alpha)]
            a, b, c = alpha @ gramian @ e, alpha @ gramian @ alpha, e @ gramian @ e
            gamma = 1.0 if c <= a else 0.0 if b <= a else (b - a) / (b + c - 2 * a)
            alpha = (1 - gamma) * alpha + gamma * e
            if gamma < 1e-3:
                break
        return alpha @ rows
    if call == "cagrad(0.5)":  # two tasks: minimise over the segment
        scaled = normalised(gramian)
        points = np.linspace(0, 1, 200_001)
        w = np.stack([points, 1 - points], 1)
        norms = np.sqrt(np.maximum(np.einsum("ki,ij,kj->k", w, scaled, w), 0))
        radius = 0.5 * np.sqrt(scaled.mean())
        k = np.argmin(w @ scaled.mean(1) + radius * norms)
        return (0.5 + radius / norms[k] * w[k]) @ rows if norms[k] >= 1e-4 else 0 * rows[0]
    if call == "nash_mtl(max_norm=1.0)":  # of two tasks: the unit rows' sum, cut to norm 1
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return units.sum(0) / np.linalg.norm(units.sum(0))
    raise ValueError(call)


def numbers(cell):
    return [float(x) for x in cell.split()]


@pytest.mark.parametrize(
    "row", some([(r,) for r in tables()["Jacobian"]], 4), ids=lambda row: " ".join(row[:2])
)
def test_numbers_of_the_table(row, x64):
    matrix, call, theirs, ours = (cell.strip("`") for cell in row)
    a = np.array([[-4.0, 1, 1], [6, 1, 1]])
    inner = re.fullmatch(r"1000 \* \((.*)\)", matrix)
    factor = 1000 if inner else 1
    rows = np.array(eval(inner[1] if inner else matrix, {"A": a}), float)
    aggregator, params = eval(call, vars(jaxmtl)), jnp.zeros(rows.shape[1])
    update = jax.jit(aggregator.update)(jnp.asarray(rows), aggregator.init(params), params)[0]
    np.testing.assert_allclose(factor * update, numbers(ours), atol=1e-5)
    if call == "fairgrad(2.0)":  # their solver's answer, against the equation G w = w^(-1/2)
        w = np.linalg.lstsq(rows.T, np.array(numbers(theirs)), rcond=None)[0]
        np.testing.assert_allclose(rows @ rows.T @ w, w**-0.5, rtol=1e-3)
    elif np.linalg.norm(rows) < 0.01 and call == "nash_mtl(max_norm=1.0)":
        # A recorded run: their loop ends after 20 rounds, and w * (G w) is far from constant.
        w = np.linalg.solve(rows.T, numbers(theirs))
        assert np.ptp(w * (rows @ rows.T @ w)) > 0.9
    else:
        np.testing.assert_allclose(factor * torchjd(call, rows), numbers(theirs), atol=2e-5)


def test_cr_mogm_from_the_first_weights(x64):
    """alpha w_{k-1} + (1 - alpha) w^_k, with w_0 the first w^; MGDA of orthogonal rows is known."""
    rule = jaxmtl.cr_mogm(jaxmtl.mgda(), alpha=0.9, initial_weights="first", num_tasks=2).weighting
    update, state = jax.jit(rule.update), rule.init()
    for square, expected in ((4.0, 0.8), (1.0, 0.9 * 0.8 + 0.1 * 0.5)):
        weights, state = update(jnp.diag(jnp.array([1.0, square])), state)
        np.testing.assert_allclose(weights[0], expected, rtol=1e-12)


# --- LibMTL -------------------------------------------------------------------------------------

ROWS = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [-2.0, 0.5, 1.0]])
LOSSES = np.array([0.5, 2.0, 4.0])


def update_of(aggregator, rows=ROWS, **extra):
    params = jnp.zeros(rows.shape[1])
    step = jax.jit(aggregator.update)
    return np.asarray(step(jnp.asarray(rows), aggregator.init(params), params, **extra)[0])


def test_equal_weighting_is_the_sum(x64):
    np.testing.assert_allclose(
        update_of(jaxmtl.linear_scalarization(jnp.ones(3))), ROWS.sum(0), rtol=1e-12
    )


@pytest.mark.slow
def test_cagrad_is_shorter_by_1_25(x64):
    theirs = update_of(jaxmtl.cagrad(0.5, rescale="1/(1+c^2)"))
    np.testing.assert_allclose(1.25 * theirs, update_of(jaxmtl.cagrad(0.5)), rtol=1e-12)


def test_aligned_mtl_with_ones(x64):
    values, vectors = np.linalg.eigh(ROWS @ ROWS.T)
    b = np.sqrt(values[0]) * vectors / np.sqrt(values) @ vectors.T
    theirs = update_of(jaxmtl.aligned_mtl(preference=jnp.ones(3)))
    np.testing.assert_allclose(theirs, b.sum(0) @ ROWS, rtol=1e-10)
    np.testing.assert_allclose(theirs, 3 * update_of(jaxmtl.aligned_mtl()), rtol=1e-12)


@pytest.mark.parametrize(
    ("by", "divisors"),
    [
        ("norm", np.linalg.norm(ROWS, axis=1)),
        ("loss", LOSSES),
        ("loss_norm", LOSSES * np.linalg.norm(ROWS, axis=1)),
    ],
)
def test_mgda_on_normalised_rows(by, divisors, x64):
    rule = jaxmtl.scale_rows(jaxmtl.mgda(), by=by, apply_to="scaled")
    theirs = update_of(jaxmtl.mgda(), ROWS / divisors[:, None])
    np.testing.assert_allclose(update_of(rule, losses=jnp.asarray(LOSSES)), theirs, rtol=1e-10)


def test_mgda_of_two_tasks_keeps_a_thousandth(x64):
    """For g_1 . g_2 >= |g_1|^2 the answer is g_1; LibMTL's is 0.999 g_1 + 0.001 g_2."""
    rows = np.array([[1.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(update_of(jaxmtl.mgda(), rows), [1.0, 0.0], rtol=1e-12)
    assert "[0.001, 0.999]" in TEXT
    np.testing.assert_allclose(np.array([0.999, 0.001]) @ rows, [1.002, 0.0])


def test_uncertainty_weighting_starts_at_0_824(x64):
    rule = jaxmtl.uncertainty_weighting(initial=-0.5, optimizer=optax.adam(1e-4), num_tasks=2)
    weights, state = rule.weighting.update(None, rule.weighting.init(), losses=jnp.ones(2))
    np.testing.assert_allclose(weights, 1 / (2 * np.exp(-0.5)), rtol=1e-12)
    np.testing.assert_allclose(weights, 0.824, atol=5e-4)
    # d/ds (e^-s l / 2 + s / 2) < 0, and Adam's first step is its rate.
    weights, _ = rule.weighting.update(None, state, losses=jnp.ones(2))
    np.testing.assert_allclose(weights, 1 / (2 * np.exp(-0.4999)), rtol=1e-6)


def test_imtl_is_stepped_by_the_optimizer_that_is_passed(x64):
    """s' = e^s l - 1; alpha of the scaled gradients."""
    rule = jaxmtl.imtl(optimizer=optax.sgd(0.1), num_tasks=3)
    params, state = jnp.zeros(3), rule.init(jnp.zeros(3))
    step, s = jax.jit(rule.update), np.zeros(3)
    for _ in range(2):
        rows = np.exp(s)[:, None] * ROWS
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        d, u = rows[:1] - rows[1:], units[:1] - units[1:]
        alpha = rows[0] @ u.T @ np.linalg.inv(d @ u.T)
        theirs = np.concatenate([[1 - alpha.sum()], alpha]) @ rows
        ours, state = step(jnp.asarray(ROWS), state, params, losses=jnp.asarray(LOSSES))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        s = s - 0.1 * (np.exp(s) * LOSSES - 1)


def test_heads_weighed_as_the_trunk():
    """`pullback(w, w)` is the gradient of the weighted loss, with respect to all parameters."""
    params = {"trunk": jnp.ones((2, 2)), "heads": jnp.array([[1.0, 2.0], [0.5, -1.0]])}

    def losses_fn(params):
        return jnp.sum(jnp.tanh(params["trunk"] @ params["heads"].T), axis=0) ** 2

    shared = {"trunk": True, "heads": False}
    _, _, pullback = jaxmtl.value_and_gramian(losses_fn, shared=shared)(params)
    w = jnp.array([0.3, 2.0])
    expected = jax.grad(lambda p: w @ losses_fn(p))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), pullback(w, w), expected)


# --- copies of PCGrad -----------------------------------------------------------------------------


def surgery(rows, orders, *, with_itself, eps):
    """Returns the projected gradients, as the copies loop."""
    out = rows.astype(float).copy()
    for i, order in enumerate(orders):
        for j in order:
            if i != j or with_itself:
                share = min(out[i] @ rows[j] / (rows[j] @ rows[j] + eps), 0)
                out[i] = out[i] - share * rows[j]
    return out


def test_two_tasks_are_the_mean_of_ours(x64):
    rows = np.array([[3.0, 1.0, 0.0], [-2.0, 0.5, 1.0]])
    ours = update_of(optax.chain(jaxmtl.pcgrad(), optax.scale(1 / 2)), rows)
    for order in ((0, 1), (1, 0)):
        theirs = surgery(rows, [order] * 2, with_itself=True, eps=0).mean(0)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    theirs = surgery(rows, [(0, 1)] * 2, with_itself=True, eps=1e-8).mean(0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-7)


def test_a_gradient_projected_on_itself(x64):
    rows = np.array([[3.0, 2.0], [-2.0, -1.0], [0.0, -2.0]])
    orders = [(1, 2, 0)] * 3
    theirs = surgery(rows, orders, with_itself=True, eps=0).sum(0)
    without = surgery(rows, orders, with_itself=False, eps=0).sum(0)
    weights = jaxmtl.rules.pcgrad.project_in_order(jnp.asarray(rows @ rows.T), jnp.asarray(orders))
    np.testing.assert_allclose(weights @ rows, without, rtol=1e-12)
    cell = next(row[2] for row in tables()["copy"] if "projected on itself" in row[0])
    stated = re.search(r"all: (\S+) (\S+) there, (\S+) (\S+) here", cell).groups()
    np.testing.assert_allclose([*theirs, *without], [float(x) for x in stated], atol=6e-6)


def test_shared_orders_have_the_same_mean_over_orders():
    rows = np.array([[3.0, 2.0], [-2.0, -1.0], [0.0, -2.0]])
    orders = list(itertools.permutations(range(3)))
    shared = [surgery(rows, [o] * 3, with_itself=False, eps=0).sum(0) for o in orders]
    own = [
        surgery(rows, chosen, with_itself=False, eps=0).sum(0)
        for chosen in itertools.product(orders, repeat=3)
    ]
    np.testing.assert_allclose(np.mean(shared, 0), np.mean(own, 0), rtol=1e-12)
    assert not np.allclose(np.std(shared, 0), np.std(own, 0))


def test_the_constant_beside_the_squared_norm(x64):
    rows = 1e-4 * np.array([[1.0, 0.0], [-0.8, 0.6]])
    theirs = surgery(rows, [(0, 1)] * 2, with_itself=False, eps=1e-8)
    np.testing.assert_allclose(theirs[0], rows[0] + 0.4 * rows[1], rtol=1e-12)
    np.testing.assert_allclose(update_of(jaxmtl.pcgrad(), rows), 1.8 * rows.sum(0), rtol=1e-12)


def test_a_zero_row_without_a_constant(x64):
    rows = np.array([[1.0, 0.0], [0.0, 0.0]])
    with np.errstate(invalid="ignore"):
        assert np.isnan(surgery(rows, [(0, 1)] * 2, with_itself=True, eps=0)).any()
    np.testing.assert_array_equal(update_of(jaxmtl.pcgrad(), rows), rows[0])


def test_rows_of_a_running_mean_over_the_calls_of_all_tasks():
    """optax's running mean is acc + (g - acc) / (n + 1), and PCGrax's n counts all tasks."""
    rows, kept = np.array([[3.0, 1.0], [-2.0, 0.5]]), np.zeros((2, 2))
    for n in range(2):
        kept[n] += (rows[n] - kept[n]) / (n + 1)
    np.testing.assert_array_equal(kept, [rows[0], rows[1] / 2])


def test_what_the_factor_m_does_to_the_optimizers_behind():
    rows = np.array([[3.0, 1.0], [-2.0, 0.5]])
    for optimizer, factor in ((optax.adam(1e-3), 1.0), (optax.sgd(1e-3), 2.0)):
        total = update_of(optax.chain(jaxmtl.pcgrad(), optimizer), rows)
        mean = update_of(optax.chain(jaxmtl.pcgrad(), optax.scale(1 / 2), optimizer), rows)
        np.testing.assert_allclose(total, factor * mean, rtol=1e-5)


# --- reinforcement learning -----------------------------------------------------------------------

# Gradients of a critic as the study of Meta-World recorded them (three tasks, 30,150 steps): rows
# of these norms and cosines.
NORMS = np.array([1685.564, 1001.13, 2549.207])
COSINES = np.array([[1.0, 0.1802, 0.1078], [0.1802, 1.0, 0.08253], [0.1078, 0.08253, 1.0]])
RECORDED = NORMS[:, None] * np.linalg.cholesky(COSINES)
# The same with the first task turned, so that it conflicts with both others.
TURNED = RECORDED * np.array([[-1.0], [1.0], [1.0]])


@pytest.mark.parametrize("rows", some([RECORDED, TURNED]), ids=["recorded", "turned"])
def test_pcgrad_of_mtrl_is_the_mean_of_ours(rows, x64):
    """By unit gradients with 1e-8 beside the norm, the others in an order for each task."""
    units = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8)
    found = []
    others = [[j for j in range(3) if j != i] for i in range(3)]
    for orders in itertools.product(*(list(itertools.permutations(o)) for o in others)):
        out = rows.copy()
        for i, order in enumerate(orders):
            for j in order:
                out[i] -= min(out[i] @ units[j], 0) * units[j]
        whole = jnp.asarray([(*order, i) for i, order in enumerate(orders)])
        weights = jaxmtl.rules.pcgrad.project_in_order(jnp.asarray(rows @ rows.T), whole)
        np.testing.assert_allclose(weights @ rows / 3, out.mean(0), rtol=1e-8)
        found.append(out.mean(0))
    ours = update_of(jaxmtl.pcgrad(reduction="mean"), rows, key=jax.random.key(0))
    assert min(np.abs(ours / x - 1).max() for x in found) < 1e-8
    assert (np.ptp(found, axis=0).max() > 0) == (rows is TURNED)


def cagrad_for_mtrl(rows, c):
    """Twenty steps of SGD with momentum on logits, the best of them, and their constants."""
    m, gramian = len(rows), rows @ rows.T
    gramian = gramian / np.sqrt(np.diag(gramian) + 1e-4).mean() ** 2
    products = gramian.mean(1)
    radius = c * np.sqrt(products.mean() + 1e-4)
    logits, velocity, best = np.zeros(m), np.zeros(m), (np.inf, None)
    for _ in range(21):
        w = np.exp(logits - logits.max())
        w /= w.sum()
        length = np.sqrt(w @ gramian @ w + 1e-4)
        best = min(best, (w @ products + radius * length, tuple(w)))
        slope = products + radius * gramian @ w / length
        velocity = 0.5 * velocity + w * (slope - w @ slope)
        logits = logits - 25 * velocity
    w = np.array(best[1])
    length = np.sqrt(w @ gramian @ w + 1e-4)
    return (1 / m + radius / (length + 1e-4) * w) @ rows / (1 + c**2)


@pytest.mark.parametrize("rows", some([RECORDED, TURNED]), ids=["recorded", "turned"])
def test_cagrad_for_mtrl(rows, x64):
    ours = update_of(jaxmtl.cagrad(0.9, rescale="1/(1+c^2)"), rows)
    theirs = cagrad_for_mtrl(rows, 0.9)
    # At the recorded gradients one weight is 0, which twenty steps of a softmax do not reach.
    apart = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    assert apart < (0.01 if rows is RECORDED else 2e-4)
    assert "0.8 % apart" in TEXT
    # Exact: (g_0 + l g_w) / (1 + l) with l = c |g_0| / |g_w|, a positive multiple of ours.
    g0 = rows.mean(0)
    plain = update_of(jaxmtl.cagrad(0.9), rows)
    step = plain - g0
    assert np.isclose(np.linalg.norm(step), 0.9 * np.linalg.norm(g0))
    weights = np.linalg.solve(rows.T, step)
    weights = np.maximum(weights, 0) / weights.sum()
    share = 0.9 * np.linalg.norm(g0) / np.linalg.norm(weights @ rows)
    exact = (g0 + share * weights @ rows) / (1 + share)
    np.testing.assert_allclose(exact * (1 + share), plain, rtol=1e-6)


def first_weights(rule, rows, losses, steps=1):
    """Returns the weights after so many steps on the same gradients."""
    weighting = rule.weighting
    state, gramian = weighting.init(), jnp.asarray(rows @ rows.T)
    for _ in range(steps + 1):
        weights, state = weighting.update(gramian, state, losses=jnp.asarray(losses))
    return np.asarray(weights)


@pytest.mark.slow
def test_gradnorm_of_mtrl_is_that_of_alpha_0(x64):
    """L1 of the norms to their mean, whatever the losses: l_0 is that of the step itself."""
    rate, m = 1e-6, 3
    norms = NORMS
    signs = np.sign(norms - norms.mean())  # at weights 1
    theirs = 1 - rate * np.sign(signs * norms / m)  # Adam's first step
    ours = first_weights(
        jaxmtl.gradnorm(0.0, optimizer=optax.adam(rate), num_tasks=3), RECORDED, np.ones(3)
    )
    np.testing.assert_allclose(ours, m * theirs / theirs.sum(), rtol=1e-12)
    assert np.ptp(ours) > rate


def gradnorm_of_metaworld(weights, norms, ratios, alpha):
    """The derivative of their objective, through the target, by central differences."""

    def objective(w):
        target = np.mean(w * norms) * ratios**alpha
        return np.abs(w * norms - target).sum()

    return np.array(
        [
            (objective(weights + d) - objective(weights - d)) / 2e-6
            for d in 1e-6 * np.eye(len(norms))
        ]
    )


def test_gradnorm_of_metaworld_algorithms(x64):
    rate, alpha = 0.01, 0.12
    rule = jaxmtl.gradnorm(alpha, optimizer=optax.sgd(rate / NORMS.max()), num_tasks=2)
    rows, norms = RECORDED[:2], NORMS[:2]
    theirs = 1 - rate / NORMS.max() * gradnorm_of_metaworld(np.ones(2), norms, np.ones(2), alpha)
    theirs *= 2 / theirs.sum()  # used at once; here from the next step on
    np.testing.assert_allclose(first_weights(rule, rows, np.ones(2)), theirs, rtol=1e-6)
    np.testing.assert_array_equal(first_weights(rule, rows, np.ones(2), steps=0), np.ones(2))

    # With ratios other than 1, or three tasks, the derivative of the target does not vanish.
    def stopped(norms, ratios):
        return np.sign(norms - norms.mean() * ratios**alpha) * norms

    for norms, ratios in ((NORMS[:2], np.array([0.5, 1.5])), (NORMS, np.ones(3))):
        found = gradnorm_of_metaworld(np.ones(len(norms)), norms, ratios, alpha)
        assert np.abs(found - stopped(norms, ratios)).max() > 0.01 * norms.max()
