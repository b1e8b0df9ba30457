"""Gradient vaccine: gradients are turned until their cosines reach a running target."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class GradVacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      mtl_step: int32 scalar, the number of draws so far.
      target: (m, m) running means of the cosines, phi.
    """

    mtl_step: jax.Array
    target: jax.Array


def vaccinate_in_order(
    gramian: jax.Array,
    target: jax.Array,
    orders: jax.Array,
    beta: jax.Array | float,
    task_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes GradVac's weights and new targets for given orders.

    Args:
      gramian: (m, m).
      target: (m, m), phi.
      orders: Int (m, k); row i lists the tasks that gradient i meets, in order.
      beta: Rate of the running mean.
      task_mask: (m,) bool; absent tasks are not met and have weight 0.

    Returns:
      (m,) weights and the new (m, m) targets.
    """
    m, dtype = gramian.shape[0], gramian.dtype
    eps = jnp.finfo(dtype).eps
    tasks = jnp.arange(m)
    present = jnp.ones((m,), bool) if task_mask is None else task_mask
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))

    def meet(k: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        coefficients, target = carry
        j = orders[:, k]
        products = coefficients @ gramian
        square = jnp.sum(products * coefficients, axis=1)
        running = jnp.sqrt(jnp.maximum(square, 0))
        product = jnp.take_along_axis(products, j[:, None], axis=1)[:, 0]
        defined = (running > 0) & (norms[j] > 0) & (j != tasks) & present[j] & present
        cosine = jnp.where(defined, product / jnp.where(defined, running * norms[j], 1), 0)
        cosine = jnp.clip(cosine, -1, 1)
        phi = target[tasks, j]
        # A target of +-1 is met only by parallel gradients; no finite step reaches it.
        reachable = 1 - phi * phi > eps
        turn = defined & reachable & (cosine < phi)
        sine_phi = jnp.sqrt(jnp.where(turn, 1 - phi * phi, 1))
        sine = jnp.sqrt(jnp.maximum(1 - cosine * cosine, 0))
        # Wang et al. 2021, eq. 3
        amount = running * (phi * sine - cosine * sine_phi)
        amount /= jnp.where(norms[j] > 0, norms[j], 1) * sine_phi
        coefficients = coefficients.at[tasks, j].add(jnp.where(turn, amount, 0))
        step = jnp.where(defined, beta * (cosine - phi), 0)
        return coefficients, target.at[tasks, j].add(step.astype(target.dtype))

    start = (jnp.diag(present.astype(dtype)), target.astype(dtype))
    if not orders.shape[1]:  # m = 1: nobody to meet
        return jnp.sum(start[0], axis=0), start[1]
    coefficients, target = lax.fori_loop(0, orders.shape[1], meet, start)
    return jnp.sum(coefficients, axis=0), target


@method("sum of gradients turned to running target cosines", "Wang 2021", "scale-free")
def gradvac(beta: float = 0.5, *, num_tasks: int, seed: int = 0) -> Aggregator:
    """Turns each gradient until its cosine with the others reaches a running target; sums.

    For each task i, over the others in a fresh random order: with c the cosine of the
    *running* ``g_i`` and the raw ``g_j``, if ``c < phi_ij`` then ``g_i`` gains
    ``|g_i| (phi sqrt(1 - c^2) - c sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2)) g_j``; afterwards
    ``phi_ij <- (1 - beta) phi_ij + beta c``. The targets start at 0.

    Args:
      beta: Rate of the running mean, in [0, 1].
      num_tasks: m, required for the (m, m) targets; the state logs ``mtl_weights``.
      seed: Seed of the orders; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is a `GradVacState`.

    Raises:
      ValueError: ``beta`` lies outside [0, 1], or ``num_tasks`` is missing.

    **Properties**: weighted, of degree 1, permutation-equivariant in distribution;
    conflicting. Pairs with a zero gradient are passed over and keep their target.

    **Reference**: Wang et al. 2021, eq. 3 and algorithm 1.

    **Differs from** the paper in the default ``beta`` only, which is that of TorchJD and LibMTL.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> aggregator = jaxmtl.gradvac(num_tasks=2)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 1.5]
    """
    checks.check_range("beta", beta, 0, 1)
    m = num_tasks

    def init() -> GradVacState:
        return GradVacState(jnp.zeros((), jnp.int32), jnp.zeros((m, m)))

    def weigh(
        gramian: jax.Array,
        state: GradVacState,
        task_mask: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, GradVacState]:
        orders = tasks.draw_orders(tasks.draw_key(seed, state.mtl_step, key), gramian.shape[0])
        weights, target = vaccinate_in_order(gramian, state.target, orders, beta, task_mask)
        return weights, GradVacState(state.mtl_step + 1, target)

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)
