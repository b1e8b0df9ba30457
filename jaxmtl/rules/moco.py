"""MoCo: multi-objective gradient descent with correction of the gradients' noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.transforms.track_gradients import (
    Schedule,
    TrackState,
    check_bound,
    check_schedule,
    init_tracking,
    rate_at,
    start_from,
    track,
)
from jaxmtl.types import Aggregator


class MoCoState(NamedTuple):
    """State of `moco`.

    Attributes:
      tracking: y and the step.
      coefficients: (m,) lambda, on the simplex; absent tasks keep theirs.
      mtl_weights: (m,) weights of the tracked gradients in the last step.
    """

    tracking: TrackState
    coefficients: jax.Array
    mtl_weights: jax.Array


@method(
    "tracked gradients, combined towards the least norm",
    "Fernando 2022",
    renamed={"normalise": "normalize"},
    logs_weights=True,
)
def moco(
    *,
    num_tasks: int,
    beta: Schedule = 0.99,
    gamma: Schedule = 0.1,
    rho: float = 0.0,
    order: str = "paper",
    projection: str = "simplex",
    initial: str = "zeros",
    normalize: str | None = None,
    max_norm: float | jax.Array | None = None,
) -> Aggregator:
    """Tracks the gradients and, one step at a time, their combination of least norm.

    With the tracked rows Y of `track_gradients`, ``lambda_{k+1} = proj_simplex(lambda_k - gamma_k
    (Y_k Y_k^T + rho I) lambda_k)`` and the update ``Y_k^T lambda_k``, then ``Y_{k+1}`` from the
    gradients of step k.

    Use it with noisy gradients where the weights must converge and m more gradients fit.

    Args:
      num_tasks: m, required.
      beta: Rate of Y: a number in [0, 1] or a schedule in k, from 1.
      gamma: Rate of lambda: a number, at least 0, or a schedule in k, from 1.
      rho: Regularization, at least 0.
      order: ``"paper"``: as above; ``"code"``: Y first, then lambda from the new Y, and the
        step with both new.
      projection: ``"simplex"``: exact; ``"softmax"``: the authors' replacement for it.
      initial: Y_0: ``"zeros"`` (the first step under ``"paper"`` is then zero), or ``"first"`` for
        the first gradients.
      normalize: Of the gradients, before they are tracked: None, ``"norm"``: by their norm,
        ``"norm_loss"``: by their norm, then times the loss (reads ``losses``).
      max_norm: Radius of the ball of Y's rows, one number or (m,); no projection if None.

    Returns:
      An `Aggregator` whose inner state is a `MoCoState`, lambda 1/m at the start; ``weighting`` is
      None.

    Raises:
      ValueError: ``num_tasks`` is missing, a number out of range, a word unknown.

    **Properties**: weighted in the tracked gradients, permutation-equivariant; conflicting. The
    steps of lambda are absolute: not scale-free unless the rows are normalized. Absent tasks leave
    the simplex and keep y and lambda. Zero rows stay zero under normalization.

    **Reference**: Fernando et al. 2023, algorithm 1, eq. 7, 10 and 11.

    **Differs from** the authors' code and LibMTL, which are ``order="code",
    projection="softmax", normalize="norm_loss"`` (the authors normalize for NYUv2 only), up to the
    1e-8 that they add to the norm. Rates there: 0.05/sqrt(k), 0.1/sqrt(k) on Cityscapes; 0.99,
    0.1 on NYUv2 (the defaults here).

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.moco(num_tasks=2, initial="first")
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 1. ]
    """
    check_schedule("beta", beta, 0, 1)
    check_schedule("gamma", gamma, 0, float("inf"))
    checks.check_range("rho", rho, 0)
    checks.check_choice("order", order, ("paper", "code"))
    checks.check_choice("projection", projection, ("simplex", "softmax"))
    checks.check_choice("initial", initial, ("zeros", "first"))
    checks.check_choice("normalize", normalize, (None, "norm", "norm_loss"))
    bound = check_bound(max_norm, num_tasks)

    def init(params: Any) -> MoCoState:
        return MoCoState(
            init_tracking(params, num_tasks), tasks.uniform(num_tasks), jnp.zeros((num_tasks,))
        )

    def normalized(jacobian: Any, losses: jax.Array | None) -> Any:
        if normalize is None:
            return jacobian
        norms = linalg.row_norms(jacobian)
        factors = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
        if losses is not None and normalize == "norm_loss":
            factors = factors * losses.astype(factors.dtype)
        return linalg.times_rows(factors, linalg.accumulable(jacobian))

    def aggregate(
        jacobian: Any,
        state: MoCoState,
        task_mask: jax.Array,
        losses: jax.Array | None = None,
    ) -> tuple[Any, MoCoState]:
        rows = normalized(jacobian, losses)
        old = start_from(state.tracking, rows, initial, task_mask)
        new = track(state.tracking, rows, beta, task_mask, initial=initial, max_norm=bound)
        y = tasks.zero_absent_rows(old if order == "paper" else new.tracked, task_mask)
        gramian, log2_scale = linalg.balanced_gramian(y)
        old_lambda = tasks.on_present(state.coefficients.astype(gramian.dtype), task_mask)
        rate = rate_at(gamma, state.tracking.mtl_step).astype(gramian.dtype)
        slope = linalg.ldexp(gramian @ old_lambda, 2 * log2_scale)
        largest = jnp.finfo(slope.dtype).max / 4  # rows whose squares overflow decay again
        slope = rate * (jnp.clip(slope, -largest, largest) + rho * old_lambda)
        moved = old_lambda - jnp.clip(slope, -largest, largest)  # eq. 10
        if projection == "simplex":
            new_lambda = tasks.project_finite(moved, task_mask)
        else:
            new_lambda = jax.nn.softmax(moved, where=task_mask)
        weights = old_lambda if order == "paper" else new_lambda
        update = jax.tree.map(lambda x, g: x.astype(g.dtype), linalg.combine(y, weights), jacobian)
        coefficients = jnp.where(task_mask, new_lambda, state.coefficients)
        return update, MoCoState(new, coefficients, weights)

    rule = base.requiring(aggregate, "losses") if normalize == "norm_loss" else aggregate
    return base.from_rows(rule, init=init, num_tasks=num_tasks)
