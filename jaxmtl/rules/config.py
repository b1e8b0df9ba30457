"""ConFIG: an update with equal cosines to every gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

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
      An `Aggregator` without inner state. With the Jacobian at hand the problem is solved in
      coordinates, by two products of m rows; with a Gramian alone by the normal equations, where
      the condition of U counts squared.

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
        unit = jnp.where(tasks.pairs(usable), unit, 0)
        if jacobian is None:
            v, reached, rounding = _normal_equations(unit, cosines)
            square = v @ reached
        else:
            rows = _unit_rows(jacobian, jnp.where(usable, norms, 1), log2_scale, gramian.dtype)
            v, reached, square = _least_norm(rows, unit, cosines)
            rounding = jnp.asarray(64 * unit.shape[0] * jnp.finfo(unit.dtype).eps)
        total = jnp.where(usable, norms, 0) @ reached  # sum_i g_i . x
        # U x is the projection of p onto the range of U.
        vanishes = jnp.linalg.norm(reached) <= rounding * jnp.linalg.norm(cosines)
        vanishes |= square <= 0
        length = jnp.where(vanishes, 0, total / jnp.where(vanishes, 1, square))
        return jnp.where(usable, length * v / norms, 0)

    return base.from_weighting(weigh, num_tasks=num_tasks, preference=preference)


def _normal_equations(
    unit: jax.Array, cosines: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns v with ``U^T v = pinv(U) p``, U x, and the relative size of rounding in them."""
    inverse, _, rounding = pseudo_inverse(unit)
    v = inverse @ cosines
    return v, unit @ v, rounding


def _least_norm(
    rows: Any, unit: jax.Array, cosines: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Solves as `_normal_equations`, from coordinates: the errors grow with the condition of U.

    Shifted Cholesky QR (Fukaya et al. 2020): the rows are combined into nearly orthonormal ones,
    ``U = L Q``, whose own Gramian is well conditioned. In the Gramian of U the square of its
    condition would count.

    Returns:
      v (m,), U x (m,) and ``|x|^2``.
    """
    m, eps = unit.shape[0], jnp.finfo(unit.dtype).eps
    shift = 2 * m * eps * jnp.trace(unit)
    lower = jnp.linalg.cholesky(unit + jnp.maximum(shift, eps) * jnp.eye(m, dtype=unit.dtype))
    inverse = solve_triangular(lower, jnp.eye(m, dtype=unit.dtype), lower=True)
    second = linalg.gramian(linalg.combine_rows(rows, inverse))
    values, vectors = jnp.linalg.eigh(second)
    kept = values > 8 * m * eps * values[-1]
    # Left vectors that U^T annuls: their part of p cannot be reached.
    null = _matmul(inverse.T, jnp.where(kept, 0, vectors))
    sizes, directions = jnp.linalg.eigh(_matmul(null, null.T))
    directions = jnp.where((sizes > eps**0.5 * sizes[-1]) & ~jnp.all(kept), directions, 0)
    reached = cosines - _matmul(directions, _matmul(directions.T, cosines))
    along = _matmul(vectors.T, _matmul(inverse, reached))
    scaled = jnp.where(kept, along / jnp.where(kept, values, 1), 0)
    v = _matmul(inverse.T, _matmul(vectors, scaled))
    return v, reached, jnp.sum(along * scaled)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


def _unit_rows(jacobian: Any, norms: jax.Array, log2_scale: jax.Array, dtype: jnp.dtype) -> Any:
    def leaf(x: jax.Array) -> jax.Array:
        return linalg.ldexp(x.astype(dtype), -log2_scale) / linalg.column(norms, x)

    return jax.tree.map(leaf, jacobian)
