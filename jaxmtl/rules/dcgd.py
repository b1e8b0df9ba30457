"""Dual cone gradient descent: the averaged form."""

import jax
import jax.numpy as jnp

from jaxmtl import base, solvers
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method(
    "the sum; outside the dual cone the mean of its projections off each gradient",
    "Hwang and Lim 2024",
    "scale-free",
)
def dcgd(*, num_tasks: int | None = None) -> Aggregator:
    """Takes the sum of the gradients where it suits all, else the mean of its projections.

    With ``s = sum_i g_i``: the update is s if ``s . g_i >= 0`` for all i, else the mean over i of
    ``s - (s . g_i / |g_i|^2) g_i``, its projections onto the complements of the gradients.

    This is the "average" form of the paper, made for two rows: the residual of a differential
    equation and the sum of its boundary terms. The paper's other forms are in the library: on two
    rows "center" is `config`, and "projection" is `dual_proj` times 2 (of the sum, not the mean).
    The price is that of the Gramian.

    Use it for physics-informed networks of two terms, a residual and a boundary.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state.

    **Properties**: weighted, permutation-equivariant, of degree 1; not linear under scaling. For
    two tasks it is non-conflicting, and 0 only for opposite directions. It jumps where s enters the
    dual cone. Zero rows are passed over.

    **Reference**: Hwang and Lim 2024, algorithm for PINNs. The formula was read in the authors'
    code (``dcgd.py``, ``step_avg``).

    **Differs from** the authors' code, which adds 1e-8 to norms and knows two rows only. For more
    than two the mean over all rows is an extension of this library, and can conflict; `upgrad` is a
    projection for any number of rows.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [-1.0, 1.0]])
    >>> aggregator = jaxmtl.dcgd()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [1. 1.]
    >>> conflicting = jnp.array([[4.0, 0.0], [-1.0, 1.0]])
    >>> print(aggregator.update(conflicting, aggregator.init(params), params)[0])
    [1.  1.5]
    """

    def weigh(gramian: jax.Array, task_mask: jax.Array) -> jax.Array:
        unit, norms, zero = solvers.row_normalized(gramian)
        usable = task_mask & ~zero
        slopes = unit @ jnp.where(usable, norms, 0)  # s . g_i / |g_i|
        inside = jnp.all((slopes >= 0) | ~usable)
        count = jnp.maximum(jnp.sum(usable), 1)
        weights = jnp.where(inside, 1, 1 - slopes / norms / count)
        return jnp.where(usable, weights, 0)

    return base.from_weighting(weigh, num_tasks=num_tasks)
