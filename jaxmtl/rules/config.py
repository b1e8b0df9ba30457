"""ConFIG: an update with equal cosines to every gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import base, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.solvers import pseudo_inverse, row_normalized
from jaxmtl.types import Aggregator


@method("equal cosines with every gradient", "Liu 2024", "scale-free")
def config(*, preference: jax.Array | None = None, num_tasks: int | None = None) -> Aggregator:
    """Takes the direction with equal cosines to all gradients.

    Its length is the sum of the gradients' projections on it.

    With U the unit gradients: ``x = pinv(U) p``, ``u = x / |x|``, update ``(sum_i g_i . u) u``.

    Args:
      preference: (m,) non-negative cosines p that are asked for, up to scale, or None for
        equal ones.
      num_tasks: m; if given the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` without inner state. With the Jacobian at hand the normal equations are
      refined in coordinates (Bjorck 1987), since the Gramian squares the conditioning; with a
      Gramian alone they are not.

    Raises:
      ValueError: ``preference`` has a wrong shape or sign.

    **Properties**: weighted, permutation-equivariant, of degree 1; non-conflicting if the
    gradients are linearly independent, not linear under scaling. Zero rows have weight 0; where
    x vanishes the update is 0.

    **Reference**: Liu, Chu and Thuerey 2024, eq. 4-7.

    **Differs from** TorchJD in the last digits of ill-conditioned cases only.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> aggregator = jaxmtl.config()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [2. 2.]
    """

    def weigh(
        gramian: jax.Array,
        preference: jax.Array | None,
        task_mask: jax.Array,
        log2_scale: jax.Array,
        jacobian: Any = None,
    ) -> jax.Array:
        unit, norms, zero = row_normalized(gramian)
        usable = task_mask & ~zero
        shares = tasks.shares(preference, task_mask, gramian.dtype)
        cosines = jnp.where(usable, shares / jnp.max(shares), 0)
        inverse, _, rounding = pseudo_inverse(jnp.where(usable[:, None] & usable[None, :], unit, 0))
        v = inverse @ cosines
        reached = unit @ v
        square = v @ reached
        if jacobian is not None:
            rows = _unit_rows(jacobian, norms, log2_scale, gramian.dtype)
            for _ in range(2):
                v = v + inverse @ (cosines - _products(rows, linalg.combine(rows, v)))
            x = linalg.combine(rows, v)
            reached, square = _products(rows, x), linalg.gramian(_one_row(x))[0, 0]
        total = jnp.where(usable, norms, 0) @ reached  # sum_i g_i . x
        # U x is the projection of p onto the range of U.
        vanishes = jnp.linalg.norm(reached) <= rounding * jnp.linalg.norm(cosines)
        length = jnp.where(vanishes, 0, total / jnp.where(vanishes, 1, square))
        return jnp.where(usable, length * v / norms, 0)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)


def _unit_rows(jacobian: Any, norms: jax.Array, log2_scale: jax.Array, dtype: jnp.dtype) -> Any:
    def leaf(x: jax.Array) -> jax.Array:
        return linalg.ldexp(x.astype(dtype), -log2_scale) / linalg.column(norms, x)

    return jax.tree.map(leaf, jacobian)


def _one_row(x: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], x)


def _products(rows: Any, x: Any) -> jax.Array:
    return linalg.gramian(rows, _one_row(x))[:, 0]
