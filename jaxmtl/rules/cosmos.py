"""COSMOS: weighted losses, held near the direction of the preference."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method(
    "weighted losses less their cosine with the preference",
    "Ruchte 2021",
    "linear under scaling",
    "scale-free",
)
def cosmos(
    penalty: float = 1.0,
    *,
    preference: jax.Array | None = None,
    num_tasks: int | None = None,
) -> Aggregator:
    """Descends the weighted losses, minus a reward for losses in proportion to the preference.

    ``r . l - lambda (r . l) / (|r| |l|)``, so
    ``w = r - lambda (r / |r| - c l / |l|) / |l|`` with c the cosine of r and l.

    In the paper r is drawn from a Dirichlet distribution for every batch and fed to the network as
    well, so that one network covers the front: pass it to ``update`` as ``preference``. Larger
    penalties spread the front. One backward pass.

    Use it to train one network for all trade-offs, conditioned on the preference.

    Args:
      penalty: lambda, at least 0 (0 is `linear_scalarization`). The paper's values go from 0.01 to
        8, by data set.
      preference: (m,) r, 1/m if None; ``update(..., preference=)`` overrides it.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, without inner state.

    Raises:
      ValueError: ``penalty`` is negative or ``preference`` has a wrong shape or sign.

    **Properties**: weighted (weights can be negative), permutation-equivariant, linear under
    scaling of the gradients, conflicting. Where all losses are 0, ``w = r``. Absent tasks leave
    both terms; the preference of the others is scaled to its total.

    **Reference**: Ruchte and Grabocka 2021, eq. 4. The formula was read in TorchJD 0.18, not in the
    paper.

    **Differs from** TorchJD in that a loss vector of norm below 1e-8 is treated like any other.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.cosmos(0.5, preference=jnp.array([3.0, 4.0])).weighting
    >>> print(weighting.update(None, weighting.init(), losses=jnp.array([6.0, 8.0]))[0])
    [3. 4.]
    >>> print(weighting.update(None, weighting.init(), losses=jnp.array([2.0, 0.0]))[0])
    [3.  3.8]
    """
    checks.check_range("penalty", penalty, 0)

    def weigh(losses: jax.Array, preference: jax.Array | None, task_mask: jax.Array) -> jax.Array:
        shares = tasks.shares(preference, task_mask, losses.dtype)
        present = jnp.where(task_mask, losses, 0)
        size = jnp.max(jnp.abs(present))
        size = jnp.where(size > 0, size, 1)  # the cosine has no unit: no square can overflow
        norm = jnp.linalg.norm(shares)
        norm = jnp.where(norm > 0, norm, 1)

        def objective(values: jax.Array) -> jax.Array:
            scaled = jnp.where(task_mask, values, 0) / size
            square = scaled @ scaled
            length = jnp.sqrt(jnp.where(square > 0, square, 1)) * norm
            cosine = jnp.where(square > 0, shares @ scaled / length, 0)
            return shares @ values - penalty * cosine

        return jnp.where(jnp.any(present != 0), jax.grad(objective)(losses), shares)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)
