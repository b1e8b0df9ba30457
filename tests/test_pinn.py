"""The equations of the physics-informed examples: derivatives, residuals, and their one form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("scipy", reason="the extra `experiments` is not installed")

from experiments.examples import _pinn
from tests.problems import some

COUNTS = {
    "Burgers": {"equation": 5, "initial": 3, "boundary": 2},
    "cavity": {"equation": 5, "lid": 3, "walls": 4},
}


@pytest.mark.parametrize("make", some([_pinn.burgers, _pinn.cavity]))
def test_one_function_of_all_points_has_the_same_loss(make, x64):
    equation = make()._replace(weights=dict.fromkeys(make().conditions, 2.5))
    params = _pinn.initial_params(jax.random.key(0), equation.sizes)
    batch = equation.draw(jax.random.key(1), COUNTS[equation.name])

    @jax.jit
    def both(params, batch):
        points = equation.points(batch)
        residuals = jax.vmap(equation.one_residual, (None, 0, 0, 0, 0))(params, *points)
        together = jnp.mean(jnp.sum(residuals**2, axis=1))
        return together, jnp.sum(equation.losses_fn(params, batch))

    np.testing.assert_allclose(*both(params, batch), rtol=1e-12)


def test_burgers_residual_is_that_of_finite_differences(x64):
    equation = _pinn.burgers()
    params = _pinn.initial_params(jax.random.key(0), equation.sizes)
    z, h = jnp.array([0.3, 0.4]), 1e-4
    x, t = jnp.array([h, 0.0]), jnp.array([0.0, h])

    def u(z):
        return _pinn.network(params, z)

    slope = (u(z + x) - u(z - x)) / (2 * h)
    bend = (u(z + x) - 2 * u(z) + u(z - x)) / h**2
    expected = (u(z + t) - u(z - t)) / (2 * h) + u(z) * slope - 0.01 / np.pi * bend
    found = equation.residuals("equation", params, z, jnp.zeros(1))
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_cavity_residuals_vanish_for_a_flow_between_plates(x64):
    """Poiseuille: u = y (1 - y), v = 0, p = -2 nu x solves all three equations."""
    equation = _pinn.cavity()

    def flow(params, z):
        x, y = z
        return jnp.stack([y * (1 - y), 0 * x, -0.02 * x])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pinn, "network", flow)
        found = equation.residuals("equation", None, jnp.array([0.3, 0.7]), jnp.zeros(3))
    np.testing.assert_allclose(found, np.zeros(3), atol=1e-14)
