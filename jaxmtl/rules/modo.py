"""MoDo: double sampling for weights whose expected update is unbiased."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class MoDoState(NamedTuple):
    """State of `modo`.

    Attributes:
      simplex_weights: (m,) w, on the simplex; absent tasks keep theirs.
    """

    simplex_weights: jax.Array


@method("one step a call towards the least norm, from independent batches", "Chen 2023")
def modo(gamma: float = 0.1, *, rho: float = 0.0, num_tasks: int) -> Aggregator:
    """Takes one projected step per call on the min-norm problem, with two independent batches.

    ``w <- proj_simplex(w - gamma (G12 w + rho w))`` with ``G12 = J_1 J_2^T`` from two independent
    batches, then the update ``J^T w``. Which rows J, is up to the caller: those of a third
    batch (Chen et al. 2023) or ``(J_1 + J_2) / 2`` (the two-batch form of the journal version).
    The documentation's training steps show both.

    Use it with noisy gradients where two or three independent batches a step can be had.

    Args:
      gamma: Step size, positive.
      rho: Regularization, at least 0.
      num_tasks: m, required; the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``cross_gramian`` (m, m), from `jaxmtl.cross_gramian`, and not the
      Gramian; its inner state is a `MoDoState`, 1/m at the start.

    Raises:
      ValueError: ``num_tasks`` is missing, a number out of range; when tracing, ``cross_gramian``
        is missing or of a wrong shape.

    **Properties**: weighted, permutation-equivariant; conflicting. The step is absolute: not
    scale-free. Absent tasks leave the simplex and keep their weight for their return.

    **Reference**: Chen et al. 2023 ("Three-way trade-off in multi-objective learning"),
    algorithm 2; its journal version, eq. 2.9, for two batches.

    **Differs from** TorchJD and LibMTL in nothing but the default of rho, 0.1 there.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.modo(0.2, num_tasks=2).weighting
    >>> cross = jnp.diag(jnp.array([0.0, 5.0]))
    >>> print(weighting.update(None, weighting.init(), cross_gramian=cross)[0])
    [0.75 0.25]
    """
    checks.check_range("gamma", gamma, 0, closed="right")
    checks.check_range("rho", rho, 0)

    def init() -> MoDoState:
        return MoDoState(tasks.uniform(num_tasks))

    def weigh(
        state: MoDoState,
        task_mask: jax.Array,
        cross_gramian: jax.Array,
    ) -> tuple[jax.Array, MoDoState]:
        w = tasks.on_present(state.simplex_weights.astype(cross_gramian.dtype), task_mask)
        w = tasks.project_finite(w - gamma * (cross_gramian @ w + rho * w), task_mask)
        return w, MoDoState(jnp.where(task_mask, w, state.simplex_weights))

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)
