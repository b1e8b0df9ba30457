"""Conflict-averse gradient descent."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, solvers, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator

_RESCALES = (None, "1/(1+c^2)", "1/(1+c)")


def _clip_dual(
    gramian: jax.Array, weights: jax.Array, radius: jax.Array, reference: jax.Array
) -> jax.Array:
    # The solution is g_0 + J^T x with x proportional to the dual weights.
    dual = jnp.maximum(weights - reference, 0)
    total, shares = jnp.sum(dual), jnp.sum(reference)
    dual = dual / jnp.where(total > 0, total, 1)
    clipped = jnp.minimum(dual, reference / jnp.where(shares > 0, shares, 1))
    square = clipped @ gramian @ clipped
    noise = 10 * jnp.finfo(gramian.dtype).eps * (clipped @ jnp.abs(gramian) @ clipped)
    defined = square > noise
    size = jnp.sqrt(jnp.maximum(reference @ gramian @ reference, 0))
    length = radius * size / jnp.sqrt(jnp.where(defined, square, 1))
    return reference + jnp.where(defined, length, 0) * clipped


@method("best worst improvement in a ball around the mean", "Liu 2021a", "scale-free")
def cagrad(
    c: float = 0.5,
    *,
    preference: jax.Array | None = None,
    rescale: str | None = None,
    clip: bool = False,
    num_tasks: int | None = None,
) -> Aggregator:
    """Maximises the worst improvement in a ball around the mean gradient.

    ``d = argmax min_i g_i . d`` over ``|d - g_0| <= c |g_0|``, ``g_0`` the mean: ``g_0 + c
    |g_0| g_w / |g_w|``, with w minimising ``g_w . g_0 + c |g_0| |g_w|`` over the simplex and
    ``g_w = J^T w``.

    Use it for a compromise that stays near the mean: as fast as the mean where gradients agree,
    with the worst task helped where they do not. ``c`` sets how far it may leave the mean.

    Args:
      c: Radius relative to the mean gradient, at least 0; 0 is the mean, and the direction goes to
        that of `mgda` for large c. The default is the paper's choice; 0.4 is the common setting of
        the benchmarks.
      preference: (m,) non-negative weights of ``g_0`` in place of 1/m, or None.
      rescale: Factor on the update: None, ``"1/(1+c^2)"`` or ``"1/(1+c)"``.
      clip: Whether w is clipped at the shares of the preference (CAGrad-Clip): ``min(w_i, p_i)``
        in its place, of which ``g_w / |g_w|`` sees the proportions alone. A task then has no more
        part in the correction than the user gave it.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``c`` is negative, ``rescale`` is unknown or ``preference`` has a
        wrong shape or sign.

    **Properties**: weighted, permutation-equivariant, of degree 1; conflicting for c < 1,
    non-conflicting from c = 1 on, where the ball holds 0; not linear under scaling. Where the
    optimum has ``g_w = 0`` (Pareto-stationary points whose dual cone the ball reaches, such as
    those with a zero row) every point of the ball in the dual cone is a maximiser; the one nearest
    to ``g_0``, which is `dual_proj`, is returned. With ``clip`` the worst improvement is no longer
    the best, and c >= 1 no longer keeps conflicts out; where nothing is left of ``g_w`` the update
    is ``g_0``.

    **Reference**: Liu et al. 2021, eq. 3 and algorithm 1; Quinton and Rey 2024, eq. 31. ``clip``:
    Chen et al. 2026 (arXiv:2602.02495), of which the abstract was read, not the algorithm.

    **Differs from** the official code and LibMTL, whose default is ``rescale="1/(1+c^2)"`` and
    which minimise inexactly, and from TorchJD, which returns 0 where ``g_w = 0`` and where the
    Frobenius norm of J is below 0.01.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 2.0]])
    >>> aggregator = jaxmtl.cagrad(0.5)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [1.5 1.5]
    """
    checks.check_range("c", c, 0)
    checks.check_choice("rescale", rescale, _RESCALES)

    def weigh(
        gramian: jax.Array, preference: jax.Array | None, task_mask: jax.Array
    ) -> solvers.Solution:
        reference = tasks.shares(preference, task_mask, gramian.dtype)
        radius = jnp.asarray(c, gramian.dtype)
        weights, residual = solvers.worst_improvement(gramian, radius, reference, task_mask)
        if clip:
            weights = _clip_dual(gramian, weights, radius, reference)
        if rescale == "1/(1+c^2)":
            weights = weights / (1 + radius**2)
        elif rescale == "1/(1+c)":
            weights = weights / (1 + radius)
        return solvers.Solution(weights, residual)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference, residual=True)
