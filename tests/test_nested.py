"""Nested objectives: the formula, its solvers, and the bias that its lemmas bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmtl.nested import hypergradient

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
A = RNG.standard_normal((4, 3))
H = np.diag([1.0, 2.0, 3.0, 4.0])
B, C = RNG.standard_normal((2, 4)), RNG.standard_normal((2, 3))
X = RNG.standard_normal(3)
START = np.zeros(4)


def lower(x, z):
    """Solved by z = A x, with curvature between 1 and 4."""
    return (z - A @ x) @ H @ (z - A @ x) / 2


def upper(x, z):
    return (jnp.sum((z - B) ** 2, 1) + jnp.sum((x - C) ** 2, 1)) / 2


def exact(x):
    z = A @ np.asarray(x)
    return (z - B) @ A + np.asarray(x) - C


@pytest.mark.parametrize(
    "solver",
    [{"solver": "cg"}, {"solver": "neumann", "solver_steps": 200, "solver_step_size": 0.25}],
    ids=str,
)
def test_the_answer_on_a_quadratic(solver):
    nested = hypergradient(
        upper, lower, num_steps=200, step_size=0.25, tolerance=1e-12, return_lower=True, **solver
    )
    (losses, z), jacobian = jax.jit(nested)(X, START)
    np.testing.assert_allclose(z, A @ X, rtol=1e-9)
    np.testing.assert_allclose(losses, upper(X, A @ X), rtol=1e-9)
    np.testing.assert_allclose(jacobian, exact(X), rtol=1e-8)


def test_the_bias_of_more_lower_steps():
    """Lemma 2: with z within (1 - eta mu)^T of the solution, so is the gradient."""

    def bias(steps):
        _, jacobian = jax.jit(hypergradient(upper, lower, num_steps=steps, step_size=0.25))(
            X, START
        )
        return np.linalg.norm(jacobian - exact(X), axis=1)

    ratio = bias(16) / bias(8)
    np.testing.assert_allclose(ratio, 0.75**8, rtol=0.2)


def test_the_bias_of_a_single_lower_step():
    """Lemma 1: with T = 1 and a warm start the bias is in proportion to alpha / beta."""

    def bias(alpha, beta):
        nested = hypergradient(upper, lower, step_size=beta, return_lower=True)

        def step(carry, _):
            x, z = carry
            (_, z), jacobian = nested(x, z)
            true = jnp.asarray(A).T @ (A @ x - B[0]) + x - C[0]
            gap = jnp.linalg.norm(jacobian[0] - true)
            # Walks on a line at constant speed, so that z keeps lagging behind.
            return (x + alpha, z), gap

        _, gaps = jax.lax.scan(step, (jnp.asarray(X), jnp.asarray(A @ X)), None, 800)
        return gaps[-1]

    run = jax.jit(jax.vmap(bias))
    a, half, slow = run(jnp.array([0.01, 0.005, 0.01]), jnp.array([0.02, 0.02, 0.01]))
    np.testing.assert_allclose(a / half, 2, rtol=1e-6)
    assert 1.9 < slow / a < 2.2


def test_against_differentiation_through_the_solution():
    """A lower problem that is not quadratic: Newton's solution, differentiated by hand."""

    def lower(x, z, shift):
        return jnp.sum(jnp.cosh(z - shift * x["a"])) + jnp.sum(z**2) + z[0] * z[1] * x["b"] / 9

    def upper(x, z, shift):
        return jnp.stack([jnp.sum(jnp.sin(z)) * x["b"], jnp.vdot(z, x["a"]) + shift])

    x = {"a": jnp.array([0.3, -0.5]), "b": jnp.array(0.7)}

    def solution(x):
        z = jnp.zeros(2)
        for _ in range(6):
            slope, curvature = jax.grad(lower, 1), jax.hessian(lower, 1)
            z = z - jnp.linalg.solve(curvature(x, z, 1.5), slope(x, z, 1.5))
        return z

    nested = hypergradient(upper, lower, num_steps=100, step_size=0.3, tolerance=1e-12)
    losses, jacobian = jax.jit(nested)(x, jnp.zeros(2), 1.5)
    expected = jax.jit(jax.jacrev(lambda x: upper(x, solution(x), 1.5)))(x)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-8), jacobian, expected)
    assert losses.shape == (2,)


def test_one_lower_problem_per_objective():
    """z as a tuple and a vector of lower losses: each row is the gradient of its own problem."""

    def lowers(x, z):
        return jnp.stack([lower(x, z[0]), jnp.sum((z[1] - x) ** 2)])

    def uppers(x, z):
        return jnp.stack([upper(x, z[0])[0], jnp.sum((z[1] - 1) ** 2) / 2])

    nested = hypergradient(uppers, lowers, num_steps=200, step_size=0.25, tolerance=1e-12)
    _, jacobian = jax.jit(nested)(X, (START, np.zeros(3)))
    np.testing.assert_allclose(jacobian, [exact(X)[0], X - 1], rtol=1e-8)


def test_batches_and_vmap():
    """T + 1 lower batches: one per step, the last for the second derivatives."""

    def noisy(x, z, target):
        return jnp.sum((z - x * target) ** 2) / 2

    def plain(x, z, weight):
        return weight * jnp.sum(z)[None] / 2

    nested = hypergradient(
        plain, noisy, num_steps=2, step_size=lambda t: 1 / t, lower_batches=True, return_lower=True
    )
    targets = jnp.array([1.0, 2.0, 5.0])
    x, z = jnp.array([2.0, 4.0]), jnp.zeros((2, 1))

    def one(x, z):
        return nested(x, z, 3.0, lower_args=(targets,))

    (_, z), jacobian = jax.vmap(one)(x, z)
    np.testing.assert_allclose(z[:, 0], x * 1.5)  # the mean of 1 and 2
    np.testing.assert_allclose(jacobian[:, 0], [7.5, 7.5])


def noisy_lower(x, z, a, b):
    """With (a, b) one of SAMPLES alike, the mean has curvature 2, and z*(x) = x / 2."""
    return a * z**2 / 2 - b * x * z


SAMPLES = np.array([[1.0, 1.0], [3.0, 1.0]])


def stochastic(upper, steps, terms, **options):
    """Rows of many independent draws at (x, z); 1 / 3 is the step that the algorithm asks for."""
    nested = hypergradient(
        upper,
        noisy_lower,
        num_steps=steps,
        solver="stochastic",
        solver_steps=terms,
        solver_step_size=1 / 3,
        lower_batches=True,
        **options,
    )

    @jax.jit
    def draws(key, x, z):
        def one(key):
            choice, key = jax.random.split(key)
            picked = jnp.asarray(SAMPLES)[jax.random.randint(choice, (steps + terms,), 0, 2)]
            return nested(x, z, lower_args=(picked[:, 0], picked[:, 1]), key=key)[1][0]

        return jax.vmap(one)(jax.random.split(key, 20_000))

    return draws


def test_noisy_hessians_leave_no_bias():
    """E[1 / a] = .667 is not 1 / E[a] = .5: the mean needs independent samples."""

    def upper(x, z, *batch):
        del x, batch
        return z[None]

    rows = stochastic(upper, 0, 12)(jax.random.key(0), 1.0, 0.3)
    error = np.std(rows) / np.sqrt(rows.size)
    assert error < 0.01
    assert abs(np.mean(rows) - 0.5) < 4 * error  # the series lacks 3^-12 of it
    plain = hypergradient(upper, noisy_lower, num_steps=0, lower_batches=True)
    one = jax.jit(jax.vmap(lambda ab: plain(1.0, 0.3, lower_args=(ab[:1], ab[1:]))[1][0]))
    np.testing.assert_allclose(np.mean(one(SAMPLES)), 2 / 3)


def test_mean_and_variance_of_the_stochastic_rows():
    """Lemma 2: the bias is that of the mean problem, the second moment is bounded.

    f = z^2 / 2, so that a row is b H z_T: of independent factors, whose moments are known.
    """

    def upper(x, z, *batch):
        del x, batch
        return z[None] ** 2 / 2

    steps, terms, eta, x, z = 3, 4, 0.2, 2.0, 0.5
    rows = stochastic(upper, steps, terms, step_size=eta)(jax.random.key(1), x, z)
    first, second = z, z**2  # moments of z_t
    for _ in range(steps):
        shrink = np.array([1 - eta * a for a, _ in SAMPLES])
        second = (
            np.mean(shrink**2) * second + 2 * np.mean(shrink) * eta * x * first + (eta * x) ** 2
        )
        first = np.mean(shrink) * first + eta * x
    factor = np.array([1 - a / 3 for a, _ in SAMPLES])
    powers = np.arange(terms)
    mean = np.mean(factor) ** powers @ np.full(terms, 1 / 3) * first
    bound = terms / 9 * np.sum(np.mean(factor**2) ** powers) * second
    deviation = np.std(rows)
    assert abs(np.mean(rows) - mean) < 4 * deviation / np.sqrt(rows.size)
    np.testing.assert_allclose(np.mean(rows**2), bound, rtol=0.05)
    # Of the true gradient, x / 4, the ends of the two series are missing.
    np.testing.assert_allclose(mean, x / 4 * (1 - 3.0**-terms) * (1 - 0.5 * 0.6**steps))


@pytest.mark.slow
def test_the_variance_of_a_run_stays_bounded():
    """Lemma 1: with T = 1 and a warm start, bias as without noise, variance that does not grow."""

    def upper(x, z, *batch):
        del batch
        return (x * z)[None]

    terms, alpha, beta = 6, 0.01, 0.1
    nested = hypergradient(
        upper,
        noisy_lower,
        step_size=beta,
        solver="stochastic",
        solver_steps=terms,
        solver_step_size=1 / 3,
        lower_batches=True,
        return_lower=True,
    )

    @jax.jit
    @jax.vmap
    def run(key):
        def step(carry, key):
            x, z = carry
            choice, key = jax.random.split(key)
            picked = jnp.asarray(SAMPLES)[jax.random.randint(choice, (1 + terms,), 0, 2)]
            (_, z), row = nested(x, z, lower_args=(picked[:, 0], picked[:, 1]), key=key)
            return (x + alpha, z), row[0]

        return jax.lax.scan(step, (1.0, 0.5), jax.random.split(key, 200))[1]

    rows = np.asarray(run(jax.random.split(jax.random.key(2), 3000)))
    x = 1 + alpha * np.arange(200)
    z, expected = 0.5, []
    for value in x:  # the mean of z_k, and of z + x dz/dx with the series of 6 terms
        z = z - beta * (2 * z - value)
        expected.append(z + value * 0.5 * (1 - 3.0**-terms))
    error = rows.std(0) / np.sqrt(len(rows))
    assert np.max(np.abs(rows.mean(0) - expected) / error) < 5
    # z follows x / 2 at a distance of alpha / (4 beta), which is the bias: the gradient is x.
    np.testing.assert_allclose(expected[-1] - x[-1], -alpha / (4 * beta), rtol=0.3)
    relative = rows.std(0) / x
    assert relative[-1] < 1.1 * relative[20]


def test_stochastic_rows_want_a_key_and_their_batches():
    def upper(x, z, *batch):
        del x, batch
        return z[None]

    nested = hypergradient(
        upper, noisy_lower, solver="stochastic", solver_steps=3, lower_batches=True
    )
    batches = (np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="key"):
        nested(1.0, 0.0, lower_args=batches)
    with pytest.raises(ValueError, match="4 independent batches"):
        nested(1.0, 0.0, lower_args=(np.ones(3), np.ones(3)), key=jax.random.key(0))


def test_no_lower_steps():
    """T = 0 takes the gradient at the z that is passed in."""
    nested = hypergradient(upper, lower, num_steps=0, tolerance=1e-12, return_lower=True)
    (losses, z), jacobian = jax.jit(nested)(X, A @ X)
    np.testing.assert_array_equal(z, A @ X)
    np.testing.assert_allclose(losses, upper(X, A @ X))
    np.testing.assert_allclose(jacobian, exact(X), rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_steps": -1}, "num_steps"),
        ({"solver": "lu"}, "solver"),
        ({"step_size": -1.0}, "step_size"),
        ({"solver": "neumann", "step_size": lambda t: 1 / t}, "solver_step_size"),
        ({"solver": "stochastic"}, "lower_batches"),
    ],
)
def test_refuses_wrong_options(options, word):
    with pytest.raises(ValueError, match=word):
        hypergradient(upper, lower, **options)
    with pytest.raises(ValueError, match="tuple"):
        hypergradient(upper, lower)(X, START, lower_args=[1])
