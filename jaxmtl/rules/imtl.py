"""IMTL: IMTL-L on the losses, IMTL-G on the shared parameters."""

import jax
import jax.numpy as jnp
import optax

from jaxmtl import base, linalg
from jaxmtl.learned import LearnedState, init_learned
from jaxmtl.registry import method
from jaxmtl.rules.imtl_g import equal_projections
from jaxmtl.rules.learned_scale import check_bound, default_optimizer, step_log_scales
from jaxmtl.types import Aggregator


@method("`imtl_l`, then `imtl_g` on the shared part", "Liu 2021b", "scale-free")
def imtl(
    *,
    num_tasks: int,
    max_weight: float | None = 1e6,
    optimizer: optax.GradientTransformation | None = None,
) -> Aggregator:
    """Scales the losses to one size, then makes equal projections on the scaled gradients.

    With ``e = exp(s)`` of `imtl_l`, ``w_i = e_i v_i`` with v the weights of `imtl_g` for the
    gradients ``e_i g_i`` of the scaled losses.

    Use it where neither the scale of losses nor the length of gradients should matter, with heads.

    Args:
      num_tasks: m, required; the state logs ``mtl_weights``.
      max_weight: Bound on e, as in `imtl_l`.
      optimizer: Steps s as in `imtl_l`.

    Returns:
      An `Aggregator` that reads ``losses`` and the Gramian, whose inner state is a
      `jaxmtl.learned.LearnedState` with s. The task-specific parameters descend
      ``sum_i e_i l_i``: on the Jacobian-free route mark the shared ones in ``shared=``, and
      ``head_weights`` gives the others e; with the Jacobian,
      ``optax.partition({"shared": imtl(num_tasks=m), "head": imtl_l(num_tasks=m)}, labels)``,
      where both keep the same s.

    Raises:
      ValueError: ``num_tasks`` is missing, or ``max_weight`` is not positive.

    **Properties**: weighted, permutation-equivariant, of degree 1 in the gradients; not linear
    under scaling, conflicting if the gradients are linearly dependent. As for `imtl_l`, losses are
    meant to be positive. Absent tasks are removed and keep their s.

    **Reference**: Liu et al. 2021 ("Towards impartial multi-task learning"), algorithm 1.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.imtl(num_tasks=2).weighting
    >>> gramian, losses = jnp.diag(jnp.array([9.0, 1.0])), jnp.ones(2)
    >>> print(weighting.update(gramian, weighting.init(), losses=losses)[0])
    [0.25 0.75]
    """
    stepper = default_optimizer() if optimizer is None else optimizer
    check_bound(max_weight)

    def init() -> LearnedState:
        return init_learned(stepper, jnp.zeros((num_tasks,)))

    def weigh(
        gramian: jax.Array, state: LearnedState, losses: jax.Array, task_mask: jax.Array
    ) -> tuple[jax.Array, LearnedState]:
        scales, new = step_log_scales(stepper, losses, state, task_mask, max_weight)
        scales = scales.astype(gramian.dtype)
        # v does not depend on the unit of the scales: with the largest 1 nothing overflows.
        relative = jnp.exp(state.values - jnp.max(jnp.where(task_mask, state.values, -jnp.inf)))
        relative = relative.astype(gramian.dtype)
        scaled, _ = linalg.normalize_gramian(gramian * relative[:, None] * relative[None, :])
        return scales * equal_projections(scaled, task_mask), new

    def head_weights(state: LearnedState, task_mask: jax.Array | None) -> jax.Array:
        scales = jnp.exp(state.values)
        return scales if task_mask is None else jnp.where(task_mask, scales, 0)

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks, head_weights=head_weights)
