"""DiBS-MTL: bargaining with directions alone."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, linalg, solvers
from jaxmtl.compiled import compiled
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@compiled("num_steps")
def _bargain(
    unit: jax.Array, usable: jax.Array, step_size: jax.Array | float, num_steps: int
) -> jax.Array:
    """Returns the (m,) coefficients of ``-delta`` in the unit rows, from their (m, m) cosines."""
    m, dtype = unit.shape[0], unit.dtype

    def pull(_: int, amounts: jax.Array) -> jax.Array:  # delta = -sum_i amounts_i u_i
        wishes = jnp.eye(m, dtype=dtype) - amounts[None, :]
        squares = jnp.sum((wishes @ unit) * wishes, 1)
        distances = jnp.sqrt(jnp.maximum(squares, 0))
        amounts = amounts + jnp.where(usable, step_size * distances, 0)
        square = amounts @ unit @ amounts
        return amounts / jnp.sqrt(jnp.maximum(square, 1))

    return lax.fori_loop(0, num_steps, pull, jnp.zeros((m,), dtype))


@method("a few steps of bargaining on the cosines of the gradients", "Murthy 2025")
def dibs_mtl(
    step_size: float = 0.01, *, num_steps: int = 5, num_tasks: int | None = None
) -> Aggregator:
    """Bargains over a step in the unit ball in which each task wants to go along its gradient.

    With ``u_i = g_i / |g_i|`` and delta = 0 at first, ``num_steps`` times
    ``delta <- P(delta - step_size sum_i |delta + u_i| u_i)``, P the projection onto the unit ball;
    the update is ``-delta``. A task pulls the harder the farther delta is from its own wish,
    ``-u_i``.

    Only the directions of the gradients count. Use it where the losses have no common unit, even up
    to monotone maps. All steps run on the (m, m) cosines.

    Args:
      step_size: Positive.
      num_steps: Positive.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: A number is out of range.

    **Properties**: weighted, permutation-equivariant, of degree 0; conflicting, not linear under
    scaling. Multiplying any row by a positive number, as a monotone map of a loss does, changes
    nothing. The norm is at most 1 and grows with ``step_size``. Zero rows have no wish.

    **Reference**: Murthy et al. 2025 (arXiv:2509.23948). The steps were read in the authors' code
    (``dibs_update``), whose defaults these are.

    **Differs from** the authors' code in three points. There a step that leaves the ball is
    dropped and ends the loop; here it is projected. The radius of the ball, which multiplies the
    update, is left to the learning rate. Their trainers mostly run with one step: weights
    ``step_size / |g_i|``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 400.0]])
    >>> aggregator = jaxmtl.dibs_mtl(0.5, num_steps=1)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 0.5]
    """
    checks.check_range("step_size", step_size, 0, closed="right")
    checks.check_int("num_steps", num_steps)

    def weigh(gramian: jax.Array, task_mask: jax.Array, log2_scale: jax.Array) -> jax.Array:
        unit, norms, zero = solvers.row_normalized(gramian)
        usable = task_mask & ~zero
        amounts = _bargain(unit, usable, step_size, num_steps)
        return linalg.ldexp(jnp.where(usable, amounts / norms, 0), -log2_scale)

    return base.from_weighting(weigh, num_tasks=num_tasks)
