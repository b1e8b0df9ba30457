"""Tchebycheff scalarization: the largest weighted loss."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("largest weighted loss", "Bowman 1976", "linear under scaling", "scale-free")
def tchebycheff(
    *,
    preference: jax.Array | None = None,
    ideal: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Descends the largest weighted loss.

    ``max_i p_i (l_i - z_i)``, so ``w_i = p_i`` for the task where the maximum is reached and 0 for
    the others; tasks that tie share evenly, ``w_i = p_i / k`` for k of them (a subgradient).

    Its minimum lies where the ray ``p_i (l_i - z_i) = const`` meets the Pareto front, convex or
    not. One backward pass; of all tasks but one the gradient is not used, and the steps jump
    between tasks near the ray: `stch` is the smooth form.

    Use it for exact statements on small problems; to train networks its smooth form `stch` is
    better.

    Args:
      preference: (m,) p, 1/m if None; ``update(..., preference=)`` overrides it.
      ideal: (m,) z, lower bounds of the losses, 0 if None.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    Raises:
      ValueError: A vector has another length or ``preference`` a wrong sign.

    **Properties**: weighted, permutation-equivariant (with the vectors permuted alike), linear
    under scaling of the gradients, conflicting. Absent tasks leave the maximum; the preference of
    the others is scaled to its total.

    **Reference**: Bowman 1976; Lin et al. 2024, eq. 5. Textbook formula.

    **Differs from** LibMOON, which finds the same task, the first of those that tie, but then
    descends its bare loss: weight 1.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.tchebycheff(preference=jnp.array([0.75, 0.25])).weighting
    >>> print(weighting.update(None, weighting.init(), losses=jnp.array([1.0, 2.0]))[0])
    [0.75 0.  ]
    """
    z = checks.check_vector("ideal", ideal, num_tasks, sign="any")

    def weigh(
        losses: jax.Array, preference: jax.Array | None, task_mask: jax.Array, m: int
    ) -> jax.Array:
        checks.check_tasks(m, None if z is None else z.size, "ideal")
        shares = tasks.shares(preference, task_mask, losses.dtype)
        lowest = 0 if z is None else z.astype(losses.dtype)

        def objective(values: jax.Array) -> jax.Array:
            return jnp.max(jnp.where(task_mask, shares * (values - lowest), -jnp.inf))

        # The slope of jnp.max is shared evenly by all entries that reach it.
        return jax.grad(objective)(losses)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
