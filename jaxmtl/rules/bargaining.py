"""Bargaining over the update: Nash-MTL and FairGrad."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


def _bounded(aggregator: Aggregator, max_norm: float | None) -> Aggregator:
    """Scales the update down to the norm at every step, under `every_k` too."""
    if max_norm is None:
        return aggregator
    checks.check_range("max_norm", max_norm, 0, closed="right")

    def clip(weights: jax.Array, inputs: Mapping[str, Any]) -> jax.Array:
        gramian = inputs["gramian"]
        size = jnp.exp2(inputs["log2_scale"].astype(gramian.dtype))
        norm = jnp.sqrt(jnp.maximum(weights @ gramian @ weights, 0)) * size
        return weights * jnp.where(norm > max_norm, max_norm / jnp.where(norm > 0, norm, 1), 1)

    return base.from_rule(base.inner_rule(aggregator, "max_norm")._replace(finish=clip))


@method(
    "Nash bargaining, G a = 1/a",
    "Navon 2022",
    "non-conflicting",
    renamed={"normalise": "normalize"},
)
def nash_mtl(
    *,
    normalize: bool = False,
    max_norm: float | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Takes the Nash bargaining solution, ``G a = 1/a`` with ``a > 0``.

    Each task's improvement is weighed against its own; the solution does not depend on the
    scale of any gradient, and ``|J^T a|^2 = m`` always.

    Use it where the result must not depend on the scale of any loss: the relative progress of all
    tasks counts.

    Args:
      normalize: Solve on ``G / |G|_F``, which makes the update of degree 1 in J.
      max_norm: Bound on the norm of the update, by scaling it down at every step, those between
        the renewals of `every_k` included; None for none.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``max_norm`` is not positive.

    **Properties**: non-conflicting, weighted, permutation-equivariant; of degree 0 in J (1 if
    normalized); not linear under scaling. At Pareto-stationary points no solution exists;
    the answer is the limit in which the tasks of a vanishing combination gain nothing and the
    others bargain over the rest (see `jaxmtl.solvers.bargaining`). Zero rows have weight 0.

    **Reference**: Navon et al. 2022, eq. 3 and claim 3.2.

    **Differs from** LibMTL and TorchJD, which follow the official code: they solve an
    approximation with a conic solver every few steps and clip updates at norm 1, which is
    ``every_k(nash_mtl(max_norm=1.0), k)`` up to that approximation. (The norm by which they divide
    G comes back in their constraints, so that ``normalize`` is not theirs.)

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.nash_mtl()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [1. 1.]
    """

    def weigh(gramian: jax.Array, task_mask: jax.Array, log2_scale: jax.Array) -> solvers.Solution:
        weights, residual = solvers.bargaining(gramian, 1.0, task_mask)
        if normalize:
            weights = weights * jnp.sqrt(jnp.linalg.norm(gramian))
        else:
            weights = weights * jnp.exp2(-log2_scale.astype(gramian.dtype))
        return solvers.Solution(weights, residual)

    return _bounded(base.from_weighting(weigh, num_tasks=num_tasks, residual=True), max_norm)


@method("alpha-fairness, G w = w^(-1/alpha)", "Ban and Ji 2024", "non-conflicting")
def fairgrad(
    alpha: float = 1.0,
    *,
    max_norm: float | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Takes the alpha-fair update, ``G w = w^(-1/alpha)`` with ``w > 0``.

    alpha = 1 is proportional fairness (`nash_mtl`), 2 minimises potential delay, large alpha
    approaches max-min fairness (`mgda`, up to scale).

    Use it to choose the degree of fairness: ``alpha`` from 0, the mean, by 1, Nash bargaining, to
    large values, where the worst improvement counts.

    Args:
      alpha: Fairness, at least 0. At 0 the weights are 1/m, the mean (the limit of the
        equations is the sum, m times the mean).
      max_norm: Bound on the norm of the update, by scaling it down at every step, those between
        the renewals of `every_k` included; None for none.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``alpha`` is negative or ``max_norm`` is not positive.

    **Properties**: non-conflicting for alpha > 0, weighted, permutation-equivariant; of degree
    ``(1 - alpha) / (1 + alpha)`` in J; not linear under scaling. Zero rows have weight 0 for
    alpha > 0; Pareto-stationary points as for `nash_mtl`. The weights grow as ``|g|^(-2 alpha /
    (1 + alpha))``: where they leave the format (float32, alpha = 2: rows below 2^-90) the step is
    skipped.

    **Reference**: Ban and Ji 2024, eq. 6.

    **Differs from** the official code, which finds w by a least-squares routine, multiplies
    the update by m and clips its norm at 1.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[4.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.fairgrad(2.0)
    >>> print(*aggregator.update(jacobian, aggregator.init(params), params)[0])
    0.62996 1.0
    """
    checks.check_range("alpha", alpha, 0)

    def weigh(gramian: jax.Array, task_mask: jax.Array, log2_scale: jax.Array) -> solvers.Solution:
        fairness = jnp.asarray(alpha, gramian.dtype)
        mean = fairness == 0
        exponent = 1 / jnp.where(mean, 1, fairness)
        weights, residual = solvers.bargaining(gramian, exponent, task_mask)
        # G = 4^s G' and w = t w' solve the equations if t^(1 + 1/alpha) = 4^-s.
        weights *= jnp.exp2(-2 * log2_scale / (1 + exponent)).astype(gramian.dtype)
        uniform = tasks.equal_shares(task_mask, gramian.dtype)
        weights = jnp.where(mean, uniform, weights)
        residual = jnp.where(mean, 0, residual)
        return solvers.Solution(weights, residual)

    return _bounded(base.from_weighting(weigh, num_tasks=num_tasks, residual=True), max_norm)
