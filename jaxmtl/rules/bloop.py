"""Bloop: auxiliary gradients, projected off a running mean of the main one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


class BloopState(NamedTuple):
    """State of `bloop`.

    Attributes:
      seen: Bool scalar, whether there has been a main gradient.
      mean: e, the running mean of the main gradient, a pytree like the parameters in at least
        float32.
    """

    seen: jax.Array
    mean: Any


def project_off(rows: Any, direction: Any) -> Any:
    """Removes from every row its part along one direction.

    Args:
      rows: Pytree of leaves ``(m, *leaf.shape)``.
      direction: Pytree of leaves ``leaf.shape``; 0 removes nothing.

    Returns:
      Pytree like ``rows``: ``g_i - (g_i . e / |e|^2) e``, in at least float32.
    """
    rows = linalg.accumulable(rows)
    one = jax.tree.map(lambda e: e[None], linalg.accumulable(direction))
    norm = linalg.row_norms(one)
    # A unit vector, so that no product can leave the range of the rows.
    unit = linalg.times_rows(jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0), one)
    parts = linalg.gramian(rows, unit)[:, 0]

    def leaf(g: jax.Array, e: jax.Array) -> jax.Array:
        return g - linalg.column(parts.astype(g.dtype), g) * e.astype(g.dtype)

    return jax.tree.map(leaf, rows, unit)


@method("main gradient plus the others projected off its running mean", "Hsieh 2024", "scale-free")
def bloop(
    scale: float | jax.Array = 0.1, *, rate: float = 0.1, num_tasks: int | None = None
) -> Aggregator:
    """Follows the main gradient and, orthogonally to its running mean, the auxiliary ones.

    ``g_0 + sum_{j > 0} lambda_j (g_j - (g_j . e / |e|^2) e)`` with ``e <- e + rate (g_0 - e)``, e
    the first ``g_0`` at first. To first order the main loss falls as it would alone, and the
    auxiliary ones are minimised among its minimisers. With mini-batches, a projection off the
    mean keeps this where one off the noisy gradient would not.

    Use it for auxiliary objectives that must not cost the main one. It keeps one vector of the size
    of the parameters, and needs one pass over the rows.

    Args:
      scale: lambda, at least 0; a number, or (m - 1,) for the tasks after the first.
      rate: Of the running mean, in (0, 1]; 1 projects off the gradient itself.
      num_tasks: m, only to check against.

    Returns:
      An `Aggregator` whose inner state is a `BloopState`; ``weighting`` is None. Task 0 is the main
      one (of named tasks, the first in sorted order).

    Raises:
      ValueError: A number is out of range, or ``scale`` has another length.

    **Properties**: of degree 1; not permutation-equivariant (task 0 is special), conflicting, not
    weighted. The projected rows are orthogonal to e. Absent auxiliary tasks leave the sum; without
    task 0, e stays and the others are projected off it.

    **Reference**: Hsieh et al. 2024 (arXiv:2402.02998), eq. of section 2; the formula and the
    defaults were read in the authors' code (``ml-bloop``, ``optim.py``).

    **Differs from** the authors' code in that it adds 1e-7 to ``|e|^2``, knows one auxiliary
    loss, and can start e at zeros or at random.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [-8.0, 1.0]])
    >>> aggregator = jaxmtl.bloop(0.5)
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [2.  0.5]
    """
    checks.check_range("rate", rate, 0, 1, closed="right")
    # No array is made here: it would belong to the precision and the mesh of this place.
    count = jnp.size(scale) if jnp.ndim(scale) else None
    if count is not None:
        length = None if num_tasks is None else num_tasks - 1
        checks.check_vector("scale", scale, length, sign="any")
        checks.check_range("the smallest scale", jnp.min(jnp.asarray(scale)), 0)
    else:
        checks.check_range("scale", scale, 0)

    def init(params: Any) -> BloopState:
        zeros = jax.tree.map(lambda x: x[0], linalg.zero_rows(params, 1))
        return BloopState(jnp.zeros((), bool), zeros)

    def aggregate(
        jacobian: Any, state: BloopState, task_mask: jax.Array, m: int
    ) -> tuple[Any, BloopState]:
        checks.check_tasks(m, None if count is None else count + 1, "scale")

        def move(e: jax.Array, g: jax.Array) -> jax.Array:
            main = g[0].astype(e.dtype)
            moved = jnp.where(state.seen, e + rate * (main - e), main)
            return jnp.where(task_mask[0], moved, e)

        mean = jax.tree.map(move, state.mean, jacobian)
        projected = project_off(jacobian, mean)
        present = task_mask[1:].astype(linalg.accumulation_dtype(jacobian))
        factors = jnp.asarray(scale, present.dtype)
        weights = jnp.concatenate([jnp.zeros(1, present.dtype), factors * present])
        extra = linalg.combine(projected, weights)
        update = jax.tree.map(lambda g, x: g[0].astype(x.dtype) + x, jacobian, extra)
        update = jax.tree.map(lambda x, g: x.astype(g.dtype), update, jacobian)
        return update, BloopState(state.seen | task_mask[0], mean)

    return base.from_rows(aggregate, init=init, num_tasks=num_tasks)
