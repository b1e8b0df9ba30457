"""What rules share: absent tasks, preferences, weights on the simplex, random draws."""

import jax
import jax.numpy as jnp

from jaxmtl import linalg
from jaxmtl.solvers import project_simplex
from jaxmtl.types import Jacobian, PyTree, RandomState


def all_present(m: int, task_mask: jax.Array | None = None) -> jax.Array:
    """Returns the mask, or the one of m present tasks where there is none."""
    return jnp.ones((m,), bool) if task_mask is None else jnp.asarray(task_mask)


def pairs(task_mask: jax.Array) -> jax.Array:
    """Returns (m, m) bool: where both tasks are present."""
    return task_mask[:, None] & task_mask[None, :]


def uniform(num_tasks: int) -> jax.Array:
    """Returns (m,) weights 1/m, of a strong dtype: a weak one compiles a step twice."""
    return jnp.full((num_tasks,), 1 / num_tasks, jnp.result_type(float))


def equal_shares(task_mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns 1/m over the present tasks, with m their number; 0 elsewhere."""
    present = task_mask.astype(dtype)
    return present / jnp.maximum(jnp.sum(present), 1)


def shares(preference: jax.Array | None, task_mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the preference restricted to the present tasks, their total kept; 1/m if None."""
    if preference is None:
        return equal_shares(task_mask, dtype)
    total = jnp.asarray(preference, dtype)
    kept = jnp.where(task_mask, total, 0)
    share = jnp.sum(kept)
    scale = jnp.where(share > 0, jnp.sum(total) / jnp.where(share > 0, share, 1), 0)
    return jnp.where(jnp.all(task_mask), total, kept * scale)


def reduced(weights: jax.Array, task_mask: jax.Array, reduction: str) -> jax.Array:
    """Returns the weights of a sum over tasks, divided by their number if it is to be a mean."""
    if reduction == "sum":
        return weights
    return weights / jnp.maximum(jnp.sum(task_mask), 1).astype(weights.dtype)


def on_present(weights: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Returns the weights of the present tasks scaled to sum 1 (uniform if all are 0)."""
    present = jnp.where(task_mask, weights, 0)
    total = jnp.sum(present)
    equal = task_mask / jnp.maximum(jnp.sum(task_mask), 1)
    return jnp.where(total > 0, present / jnp.where(total > 0, total, 1), equal)


def scale_to_count(weights: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Returns the weights of the present tasks, scaled to sum to their number (ones if all 0)."""
    present = jnp.where(task_mask, weights, 0)
    total, count = jnp.sum(present), jnp.sum(task_mask)
    scaled = present * (count / jnp.where(total > 0, total, 1))
    return jnp.where(total > 0, scaled, task_mask.astype(weights.dtype))


def project_finite(x: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Projects onto the simplex.

    Non-finite input gives NaN, which the guard then skips: sorting would make an ordinary, wrong
    weight of it. The largest entry is subtracted first, which does not change the projection:
    added to huge entries, the 1 of the simplex would be lost to rounding.
    """
    ok = jnp.all(jnp.isfinite(jnp.where(task_mask, x, 0)))
    largest = jnp.max(jnp.where(task_mask, x, -jnp.inf))
    shifted = jnp.where(task_mask & ok, x - largest, 0)
    return jnp.where(ok, project_simplex(shifted, task_mask), jnp.nan)


def keep_absent(new: PyTree, old: PyTree, task_mask: jax.Array) -> PyTree:
    """Returns the new tree with the old entries of absent tasks in its (m,) leaves."""
    return jax.tree.map(
        lambda x, y: jnp.where(task_mask, x, y) if jnp.shape(x) == task_mask.shape else x, new, old
    )


def zero_absent_rows(jacobian: Jacobian, task_mask: jax.Array | None) -> Jacobian:
    """Puts zeros in the rows of absent tasks, whatever they hold."""
    if task_mask is None:
        return jacobian
    return jax.tree.map(
        lambda x: jnp.where(linalg.column(task_mask, x), x, jnp.zeros_like(x)), jacobian
    )


def positive_part(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``max(l, tiny)``, whose logarithm is finite, and where that is l itself.

    ``tiny`` is the least normal number of the dtype. A task at or below it is constant to a
    rule that takes logarithms: its weight is 0.
    """
    least = jnp.finfo(losses.dtype).tiny
    return jnp.maximum(losses, least), losses > least


def own_buffers(state: PyTree) -> PyTree:
    """Returns a fresh state with every array in a buffer of its own, so that it can be donated.

    Arrays that a rule made once, such as a vector given at construction, are not given away.
    """
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)


def init_random() -> RandomState:
    """Returns the state of a rule that has drawn nothing yet."""
    return RandomState(jnp.zeros((), jnp.int32))


def draw_key(seed: int, step: jax.Array, key: jax.Array | None) -> jax.Array:
    """Returns the key of this step: ``key`` if given, else one made of seed and step."""
    return jax.random.fold_in(jax.random.key(seed), step) if key is None else key


def draw_orders(key: jax.Array, m: int) -> jax.Array:
    """Draws, for each task i, a uniform order of the m - 1 others; int (m, m - 1)."""
    places = jnp.arange(m - 1)[None, :]
    others = places + (places >= jnp.arange(m)[:, None])
    return jax.random.permutation(key, others, axis=1, independent=True)
