"""Projections onto the dual cone of the gradients: UPGrad and DualProj."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


def _check_ridge(ridge: float | jax.Array | None, ridge_of: str) -> None:
    checks.check_choice("ridge_of", ridge_of, ("trace", "largest"))
    if ridge is not None:
        checks.check_range("ridge", ridge, 0)


def add_ridge(
    gramian: jax.Array, ridge: float | jax.Array | None, ridge_of: str, task_mask: jax.Array
) -> jax.Array:
    """Adds a share of the trace, or of the largest eigenvalue, to the present tasks' diagonal."""
    if ridge is None:
        return gramian
    size = jnp.trace(gramian) if ridge_of == "trace" else jnp.linalg.eigvalsh(gramian)[-1]
    share = jnp.asarray(ridge, gramian.dtype) * size
    return gramian + jnp.diag(jnp.where(task_mask, share, 0))


@method(
    "mean of the gradients projected onto their dual cone",
    "Quinton and Rey 2024",
    "non-conflicting",
    "linear under scaling",
    "scale-free",
)
def upgrad(
    *,
    preference: jax.Array | None = None,
    ridge: float | jax.Array | None = None,
    ridge_of: str = "trace",
    num_tasks: int | None = None,
) -> Aggregator:
    """Projects each gradient onto the dual cone of all, then averages.

    ``w = sum_i p_i w_i`` with ``w_i = argmin_{v >= e_i} v^T G v`` and p = ``preference`` or
    1/m. The m problems share one matrix and are solved together.

    Use it first where gradients conflict: it has nothing to tune, harms no task to first order, and
    tasks with long gradients count more, as with the mean.

    Args:
      preference: (m,) non-negative weights p of the projected gradients, or None.
      ridge: Share of ``ridge_of`` that is added to the diagonal of G, of the present tasks, before
        the problem is solved; None (and 0) for none. TorchJD adds 1e-4 (``reg_eps``), which lets
        gradients shorter than about a hundredth of the longest go unheard. It may be traced.
      ridge_of: ``"trace"`` (TorchJD since 0.6) or ``"largest"``: the largest eigenvalue (TorchJD at
        the time of the paper).
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``preference`` has a wrong shape or sign, ``ridge`` is negative, or ``ridge_of``
        unknown.

    **Properties**: non-conflicting, linear under scaling, weighted, permutation-equivariant,
    of degree 1. Zero rows keep the weight p_i and change nothing. The update is 0 if and only
    if the point is strongly stationary (or every ``p_i g_i`` projects to 0). With a ridge neither
    non-conflicting nor linear under scaling, both but nearly.

    **Reference**: Quinton and Rey 2024, eq. 4-6 and proposition 1.

    **Differs from** TorchJD, whose absolute ``norm_eps`` makes this the mean for gradients of
    norm below 0.01 and whose ``reg_eps`` ignores tasks of small gradient: here the first does not
    exist, the second is ``ridge=1e-4`` on demand, and the problem is solved on unit rows.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> aggregator = jaxmtl.upgrad()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0].round(3))
    [0.25 0.75]
    """
    _check_ridge(ridge, ridge_of)

    def weigh(
        gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        m = gramian.shape[0]
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        gramian = add_ridge(gramian, ridge, ridge_of, task_mask)
        each = solvers.project_dual_cone(gramian, jnp.eye(m, dtype=gramian.dtype), task_mask)
        return solvers.Solution(shares @ each.value, jnp.max(each.residual))

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)


@method(
    "mean gradient projected onto the dual cone", "Lopez-Paz 2017", "non-conflicting", "scale-free"
)
def dual_proj(
    *,
    preference: jax.Array | None = None,
    ridge: float | jax.Array | None = None,
    ridge_of: str = "trace",
    num_tasks: int | None = None,
) -> Aggregator:
    """Projects the mean gradient onto the dual cone of all gradients.

    ``w = argmin_{v >= p} v^T G v`` with p = ``preference`` or 1/m.

    Use it where a sum is wanted and must harm no task: a new task beside old ones that must not be
    forgotten.

    Args:
      preference: (m,) non-negative weights p of the projected sum, or None.
      ridge: As for `upgrad`.
      ridge_of: As for `upgrad`.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``preference`` has a wrong shape or sign, ``ridge`` is negative, or ``ridge_of``
        unknown.

    **Properties**: non-conflicting, weighted, permutation-equivariant, of degree 1; not linear
    under scaling. Zero rows keep the weight p_i and change nothing.

    **Reference**: Lopez-Paz and Ranzato 2017; Quinton and Rey 2024, eq. 22.

    **Differs from** TorchJD in the same ways as `upgrad`.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [-2.0, 2.0]])
    >>> aggregator = jaxmtl.dual_proj()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0. 1.]
    """
    _check_ridge(ridge, ridge_of)

    def weigh(
        gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        gramian = add_ridge(gramian, ridge, ridge_of, task_mask)
        return solvers.project_dual_cone(gramian, shares, task_mask)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)
