"""Gradient surgery: PCGrad's sequential projections, in coefficient space."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, tasks
from jaxmtl.compiled import compiled
from jaxmtl.registry import method
from jaxmtl.types import Aggregator, RandomState


@compiled()
def projected_rows(
    gramian: jax.Array, orders: jax.Array, task_mask: jax.Array | None = None
) -> jax.Array:
    """Computes the coefficients of PCGrad's projected gradients for given orders.

    Row i of the coefficients C holds ``g_i^PC = sum_j C_ij g_j``, so that an inner product
    with g_j costs m operations and no pass over the parameters.

    Args:
      gramian: (m, m).
      orders: Int (m, k); row i lists the tasks that gradient i meets, in order. Meeting
        itself is skipped.
      task_mask: (m,) bool; absent tasks are not met and have weight 0.

    Returns:
      (m, m) C; the rows of absent tasks are 0.
    """
    m = gramian.shape[0]
    tasks = jnp.arange(m)
    present = jnp.ones((m,), bool) if task_mask is None else task_mask
    squares = jnp.diagonal(gramian)

    def meet(k: int, coefficients: jax.Array) -> jax.Array:
        j = orders[:, k]
        product = jnp.sum(coefficients * gramian[j], axis=1)  # g_i^PC . g_j
        # Quinton and Rey 2024, eq. 24; a zero g_j conflicts with nothing.
        conflict = (product < 0) & (squares[j] > 0) & (j != tasks) & present[j]
        share = jnp.where(conflict, product / jnp.where(squares[j] > 0, squares[j], 1), 0)
        return coefficients.at[tasks, j].add(-share)

    start = jnp.diag(present.astype(gramian.dtype))
    if not orders.shape[1]:  # m = 1: nobody to meet
        return start
    return lax.fori_loop(0, orders.shape[1], meet, start)


def project_in_order(
    gramian: jax.Array, orders: jax.Array, task_mask: jax.Array | None = None
) -> jax.Array:
    """Computes PCGrad's weights (m,) for given orders: the sum of `projected_rows`."""
    return jnp.sum(projected_rows(gramian, orders, task_mask), axis=0)


@method(
    "sum of gradients projected off those in conflict, in random order",
    "Yu 2020",
    "linear under scaling",
    "scale-free",
)
def pcgrad(*, reduction: str = "sum", num_tasks: int | None = None, seed: int = 0) -> Aggregator:
    """Projects each gradient off those it conflicts with, in random order; sums.

    For each task i, in an order of the other tasks drawn for i alone: while the running
    ``v_i`` has a negative inner product with the raw ``g_j``, its projection on ``g_j`` is
    subtracted. The update is ``sum_i v_i``. Exact in coefficient space, O(m^3).

    Use it as a cheap remedy for conflicts of few tasks: no solver. With two tasks it has the
    direction of `upgrad`, which is half as long.

    Args:
      reduction: ``"sum"``: the update is ``sum_i v_i``; ``"mean"``: that over the number of present
        tasks, as Zhou et al. 2022 print it and as their corollary 1 needs it.
      num_tasks: m; if given the state logs ``mtl_weights``.
      seed: Seed of the orders; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is `jaxmtl.types.RandomState`.

    Raises:
      ValueError: ``reduction`` is unknown.

    **Properties**: linear under scaling, weighted, of degree 1; permutation-equivariant in
    distribution; non-conflicting for m <= 2 only, where it is m times `upgrad`. Zero rows
    keep the weight 1.

    **Reference**: Yu et al. 2020, algorithm 1; Quinton and Rey 2024, eq. 23-26.

    **Differs from** most public code (LibMTL, nash-mtl, the copies in JAX), which also
    projects a gradient on itself, or shares one order among tasks, or returns the mean.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> aggregator = jaxmtl.pcgrad()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 1.5]
    """
    checks.check_choice("reduction", reduction, ("sum", "mean"))

    def weigh(
        gramian: jax.Array,
        state: RandomState,
        task_mask: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, RandomState]:
        orders = tasks.draw_orders(tasks.draw_key(seed, state.mtl_step, key), gramian.shape[0])
        weights = project_in_order(gramian, orders, task_mask)
        return tasks.reduced(weights, task_mask, reduction), RandomState(state.mtl_step + 1)

    return base.from_weighting(weigh, init=tasks.init_random, num_tasks=num_tasks)
