"""DB-MTL: both the losses and the gradients are brought to one scale."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.transforms.track_gradients import TrackState, init_tracking, track
from jaxmtl.types import Aggregator

SHIFT = 1e-8  # added to losses before the logarithm, as the authors do


@method("tracked gradients of log losses, all of the largest norm", "Lin 2023")
def db_mtl(
    beta: float = 0.9, *, sigma: float = 0.0, reduction: str = "sum", num_tasks: int
) -> Aggregator:
    """Averages gradients of the logarithms of the losses and gives all the largest norm.

    With ``g_i`` the gradient of ``log(l_i + 1e-8)``: ``y_i <- g_i + (beta / k^sigma) (y_i - g_i)``,
    ``y_i = 0`` at the start, k from 1; update ``max_j |y_j| sum_i y_i / |y_i|``.

    Use it where losses and gradients differ by orders of magnitude and memory for m more gradients
    is at hand.

    Args:
      beta: In [0, 1).
      sigma: At least 0.
      reduction: ``"sum"``, or ``"mean"``: that over the number of present tasks.
      num_tasks: m, required.

    Returns:
      An `Aggregator` that reads ``losses``, whose inner state is a
      `jaxmtl.transforms.track_gradients.TrackState`; ``weighting`` is None.

    Raises:
      ValueError: ``num_tasks`` is missing, a number out of range, or ``reduction`` unknown; when
        tracing, ``losses`` are missing.

    **Properties**: permutation-equivariant; conflicting. Multiplying a loss and its gradient by a
    positive number changes nothing but for the 1e-8. A task whose ``l + 1e-8`` is at or below
    the least normal number is constant: gradient 0. Zero rows of y add nothing. Absent tasks keep
    their y and leave maximum and sum.

    **Reference**: Lin et al. 2023 ("Dual-balancing for multi-task learning"), algorithm 1.

    **Differs from** LibMTL, which adds 1e-8 to the norms too.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 8.0]])
    >>> aggregator = jaxmtl.db_mtl(0.5, num_tasks=2)
    >>> update, _ = aggregator.update(
    ...     jacobian, aggregator.init(params), params, losses=jnp.array([1.0, 2.0])
    ... )
    >>> print(update)
    [2. 2.]
    """
    checks.check_range("beta", beta, 0, 1, closed="left")
    checks.check_range("sigma", sigma, 0)
    checks.check_choice("reduction", reduction, ("sum", "mean"))

    def rate(k: jax.Array) -> jax.Array:
        return 1 - beta / k**sigma

    def aggregate(
        jacobian: Any, state: TrackState, task_mask: jax.Array, losses: jax.Array
    ) -> tuple[Any, TrackState]:
        dtype = linalg.accumulation_dtype(jacobian, losses)
        shifted, active = tasks.positive_part(losses.astype(dtype) + SHIFT)
        wide = linalg.accumulable(jacobian)
        log_rows = linalg.times_rows(jnp.where(active, 1 / shifted, 0), wide)
        new = track(state, log_rows, rate, task_mask)
        norms = jnp.where(task_mask, linalg.row_norms(new.tracked), 0)
        factors = jnp.where(norms > 0, jnp.max(norms) / jnp.where(norms > 0, norms, 1), 0)
        update = linalg.combine(new.tracked, tasks.reduced(factors, task_mask, reduction))
        return jax.tree.map(lambda x, g: x.astype(g.dtype), update, jacobian), new

    return base.from_rows(
        aggregate, init=lambda params: init_tracking(params, num_tasks), num_tasks=num_tasks
    )
