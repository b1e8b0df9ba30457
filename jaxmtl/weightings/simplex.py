"""Weights that are kept on the simplex from step to step, also when tasks are absent."""

import jax
import jax.numpy as jnp

from jaxmtl.solvers import project_simplex


def uniform(num_tasks: int) -> jax.Array:
    """Returns (m,) weights 1/m, of a strong dtype: a weak one compiles a step twice."""
    return jnp.full((num_tasks,), 1 / num_tasks, jnp.result_type(float))


def on_present(weights: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Returns the weights of the present tasks scaled to sum 1 (uniform if all are 0)."""
    present = jnp.where(task_mask, weights, 0)
    total = jnp.sum(present)
    equal = task_mask / jnp.maximum(jnp.sum(task_mask), 1)
    return jnp.where(total > 0, present / jnp.where(total > 0, total, 1), equal)


def project_finite(x: jax.Array, task_mask: jax.Array) -> jax.Array:
    """Projects onto the simplex; NaN, for the guard to see, if an entry is not finite.

    Sorting would turn such an entry into an ordinary, wrong weight. The largest entry is
    subtracted first, which the projection does not see, lest 1 vanish beside large entries.
    """
    ok = jnp.all(jnp.isfinite(jnp.where(task_mask, x, 0)))
    largest = jnp.max(jnp.where(task_mask, x, -jnp.inf))
    shifted = jnp.where(task_mask & ok, x - largest, 0)
    return jnp.where(ok, project_simplex(shifted, task_mask), jnp.nan)


def read_cross_gramian(cross_gramian: jax.Array | None, task_mask: jax.Array) -> jax.Array:
    """Returns the checked cross-Gramian with zero rows and columns for absent tasks.

    Raises:
      ValueError: It is missing or not of shape (m, m).
    """
    m = task_mask.size
    got = None if cross_gramian is None else jnp.shape(cross_gramian)
    if cross_gramian is None or got != (m, m):
        raise ValueError(
            f"this method reads cross_gramian, J_1 J_2^T of two independent batches: expected "
            f"update(..., cross_gramian=...) of shape ({m}, {m}), got {got}; take it from "
            "jaxmtl.cross_gramian(losses_fn)(params, args1, args2)"
        )
    cross = jnp.asarray(cross_gramian)
    cross = cross.astype(jnp.result_type(jnp.float32, cross))
    return jnp.where(task_mask[:, None] & task_mask[None, :], cross, 0)
