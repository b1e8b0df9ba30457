"""Priority-constrained descent: the primary gradient, with progress guaranteed to the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, solvers
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class PCDState(NamedTuple):
    """State of `pcd`.

    Attributes:
      mtl_steps: (m,) int32, the number of steps at which each task was present.
      norms: (m,) root of the bias-corrected running mean of ``|g_i|^2``.
    """

    mtl_steps: jax.Array
    norms: jax.Array


def _running_norms(
    state: PCDState, norms: jax.Array, beta: jax.Array | float, task_mask: jax.Array
) -> PCDState:
    steps = state.mtl_steps + task_mask.astype(jnp.int32)
    log_decay = jnp.log(jnp.asarray(beta, norms.dtype))
    # The bias-corrected mean moves by this rate; as a root, it has the range of the norms.
    rate = jnp.expm1(log_decay) / jnp.expm1(jnp.maximum(steps, 1) * log_decay)
    rate = jnp.minimum(rate, 1)
    old = state.norms.astype(norms.dtype)
    moved = jnp.hypot(jnp.sqrt(1 - rate) * old, jnp.sqrt(rate) * norms)
    return PCDState(steps, jnp.where(task_mask, moved, old))


def _infeasible(unit: jax.Array, targets: jax.Array, secondary: jax.Array) -> jax.Array:
    """Tells whether no d has ``u_j . d >= targets_j`` for all unit rows ``u_j``.

    By Farkas' lemma, a non-negative combination of the rows is then 0 and that of the targets is
    positive. The combination of least norm with ``targets . y = 1`` solves a bounded problem.
    """
    eps = jnp.finfo(unit.dtype).eps
    largest = jnp.max(targets)
    h = targets / jnp.where(largest > 0, largest, 1)
    y = solvers.nonneg_qp(unit + h[:, None] * h[None, :], h[None], allowed=secondary).value[0]
    square, cancelled = y @ unit @ y, y @ jnp.abs(unit) @ y
    return (h @ y > 0) & (square <= 10 * unit.shape[0] * eps * cancelled)


@method("primary gradient, with a share of progress guaranteed to the others", "Varam 2026")
def pcd(
    tau: float | jax.Array = 0.02,
    *,
    beta: float = 0.999,
    eps: float = 1e-8,
    num_tasks: int,
) -> Aggregator:
    """Follows the first task as closely as the others' guaranteed progress allows.

    Rows are scaled by ``s_i = (v_i + eps)^(-1/2)``, with v the bias-corrected running mean of
    ``|g_i|^2``. ``d = argmin |d - s_1 g_1|^2`` subject to ``s_j g_j . d >= tau_j |s_j g_j|^2`` for
    j > 1; the update is d scaled to the norm of ``g_1``. In weights on the scaled rows,
    ``(1, y)`` with ``y = argmin_{y >= 0} y^T S y / 2 - b^T y``, S their Gramian and
    ``b_j = tau_j S_jj - S_1j``.

    Use it where one objective is what counts and the others are conditions. It costs two
    non-negative quadratic programs of m variables.

    Args:
      tau: Share in [0, 1] of the progress that a step along a secondary gradient alone would
        give it; a number, or (m - 1,) for the tasks after the first.
      beta: Decay of the running mean, in [0, 1).
      eps: At least 0; added to the running mean.
      num_tasks: m, required; the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` whose inner state is a `PCDState`. Task 0 is the primary one (of named
      tasks, the first in sorted order).

    Raises:
      ValueError: ``num_tasks`` is missing, a number is out of range, or ``tau`` has another length.

    **Properties**: weighted; not permutation-equivariant (task 0 is special), not linear under
    scaling. The update has the norm of ``g_1``. Of degree 1 and invariant to a constant factor on a
    secondary task with ``eps=0``, else up to eps. Where ``g_1`` or d is 0 the update is 0; where
    no d meets all conditions it is ``g_1``. Zero secondary rows set no condition. Absent tasks
    keep their running mean and set no condition; without task 0 the update is 0.

    **Reference**: Varam and AlHajri 2026, "Not all objectives are born equal". The formulas were
    read in TorchJD 0.18, not in the paper.

    **Differs from** TorchJD in the test of what is feasible or 0 in floating point only; its
    result is reproduced to 1e-6.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [-1.0, 0.0]])
    >>> aggregator = jaxmtl.pcd(num_tasks=2)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0].round(3))
    [-2.  0.]
    >>> aligned = jnp.array([[2.0, 0.0], [1.0, 5.0]])
    >>> print(aggregator.update(aligned, aggregator.init(params), params)[0].round(3))
    [2. 0.]
    """
    checks.check_range("beta", beta, 0, 1, closed="left")
    checks.check_range("eps", eps, 0)
    if jnp.ndim(tau):
        checks.check_vector("tau", tau, num_tasks - 1, sign="any")
        checks.check_range("the smallest tau", jnp.min(jnp.asarray(tau)), 0, 1)
        checks.check_range("the largest tau", jnp.max(jnp.asarray(tau)), 0, 1)
    else:
        checks.check_range("tau", tau, 0, 1)

    def init() -> PCDState:
        return PCDState(jnp.zeros((num_tasks,), jnp.int32), jnp.zeros((num_tasks,)))

    def weigh(
        gramian: jax.Array, state: PCDState, task_mask: jax.Array, log2_scale: jax.Array
    ) -> tuple[solvers.Solution, PCDState]:
        m, dtype = gramian.shape[0], gramian.dtype
        checks.check_tasks(m, num_tasks)
        unit, norms, zero = solvers.row_normalized(gramian)
        usable, first = task_mask & ~zero, jnp.arange(m) == 0
        true_norms = linalg.ldexp(jnp.where(usable, norms, 0), log2_scale)
        new = _running_norms(state, true_norms, beta, task_mask)
        scales = jnp.hypot(new.norms, jnp.sqrt(jnp.asarray(eps, dtype)))
        lengths = true_norms / jnp.where(scales > 0, scales, 1)  # |s_i g_i|
        largest = jnp.max(lengths)
        lengths = lengths / jnp.where(largest > 0, largest, 1)
        secondary = usable & ~first
        shares = jnp.broadcast_to(jnp.asarray(tau, dtype), m - 1)
        targets = jnp.concatenate([jnp.zeros(1, dtype), shares])
        targets = jnp.where(secondary, targets * lengths, 0)
        infeasible = _infeasible(unit, targets, secondary)
        bound = targets - lengths[0] * unit[0]
        y, residual = solvers.nonneg_qp(
            unit, jnp.where(infeasible, 0, bound)[None], allowed=secondary
        )
        weights = jnp.where(first, lengths[0], y[0])  # of the unit rows
        square = weights @ unit @ weights
        vanishes = square <= 10 * jnp.finfo(dtype).eps * jnp.sum(jnp.abs(weights)) ** 2
        vanishes |= ~usable[0]
        ratio = jnp.where(vanishes, 0, norms[0] / jnp.sqrt(jnp.where(vanishes, 1, square)))
        return solvers.Solution(jnp.where(usable, ratio * weights / norms, 0), residual[0]), new

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks, residual=True)
