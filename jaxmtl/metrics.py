"""What is worth logging about the gradients and the results of a multi-task training.

Functions of the ``(m, m)`` Gramian where that is enough, so that they cost nothing beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmtl import linalg, solvers
from jaxmtl.solvers import row_normalized

PyTree = Any


def _present(gramian: jax.Array, task_mask: jax.Array | None) -> jax.Array:
    return jnp.ones(gramian.shape[:1], bool) if task_mask is None else task_mask


def _removed(gramian: jax.Array, present: jax.Array) -> jax.Array:
    return jnp.where(present[:, None] & present[None, :], gramian, 0)


def cosine_similarities(gramian: jax.Array) -> jax.Array:
    """Computes the cosines between the gradients.

    Args:
      gramian: (m, m).

    Returns:
      (m, m) in [-1, 1] with unit diagonal; 0 beside the diagonal for a zero gradient.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import cosine_similarities
    >>> print(cosine_similarities(jnp.array([[4.0, -1.0], [-1.0, 1.0]])))
    [[ 1.  -0.5]
     [-0.5  1. ]]
    """
    return jnp.clip(row_normalized(linalg.normalize_gramian(gramian)[0])[0], -1, 1)


def conflict_rate(gramian: jax.Array, task_mask: jax.Array | None = None) -> jax.Array:
    """Computes the share of pairs of gradients with a negative inner product.

    Args:
      gramian: (m, m).
      task_mask: (m,) bool; pairs with absent tasks do not count.

    Returns:
      Scalar in [0, 1]; 0 for one task.

    **Reference**: Yu et al. 2020, definition 1.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import conflict_rate
    >>> print(conflict_rate(jnp.array([[1.0, -1.0], [-1.0, 2.0]])))
    1.0
    """
    present = _present(gramian, task_mask)
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    return jnp.sum(pairs & (gramian < 0)) / jnp.maximum(jnp.sum(pairs), 1).astype(gramian.dtype)


def gradient_magnitude_similarity(gramian: jax.Array) -> jax.Array:
    """Computes ``2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)``.

    Args:
      gramian: (m, m).

    Returns:
      (m, m) in [0, 1]; 1 for equal norms, two zero gradients among them.

    **Reference**: Yu et al. 2020, definition 2.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import gradient_magnitude_similarity
    >>> print(gradient_magnitude_similarity(jnp.diag(jnp.array([1.0, 9.0]))))
    [[1.  0.6]
     [0.6 1. ]]
    """
    squares = jnp.maximum(jnp.diagonal(linalg.normalize_gramian(gramian)[0]), 0)
    norms = jnp.sqrt(squares)
    total = squares[:, None] + squares[None, :]
    similarity = 2 * norms[:, None] * norms[None, :] / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, jnp.minimum(similarity, 1), 1)


def condition_number(gramian: jax.Array, task_mask: jax.Array | None = None) -> jax.Array:
    """Computes the ratio of the largest to the smallest singular value of the Jacobian.

    Args:
      gramian: (m, m); its eigenvalues are the squares, so that beyond one over the root of the
        machine epsilon (about 3,000 in float32) the answer is infinity.
      task_mask: (m,) bool; absent tasks are left out.

    Returns:
      Scalar, at least 1; infinity for dependent gradients.

    **Reference**: Senushkin et al. 2023, section 4.1.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import condition_number
    >>> print(condition_number(jnp.diag(jnp.array([1.0, 9.0]))))
    3.0
    """
    present = _present(gramian, task_mask)
    scaled = linalg.normalize_gramian(_removed(gramian, present))[0]
    # An absent task becomes an eigenvalue among the others: their mean changes no extreme.
    mean = jnp.trace(scaled) / jnp.maximum(jnp.sum(present), 1)
    values = jnp.linalg.eigvalsh(scaled + jnp.diag(jnp.where(present, 0, mean)))
    least = values[0] > gramian.shape[0] * jnp.finfo(gramian.dtype).eps * values[-1]
    return jnp.where(least, jnp.sqrt(values[-1] / jnp.where(least, values[0], 1)), jnp.inf)


def pareto_stationarity(gramian: jax.Array, task_mask: jax.Array | None = None) -> jax.Array:
    """Computes the least norm of a convex combination of the gradients.

    Args:
      gramian: (m, m).
      task_mask: (m,) bool; absent tasks are left out.

    Returns:
      Scalar, 0 exactly at Pareto-stationary points.

    **Reference**: Desideri 2012; Fernando et al. 2023, section 2.1.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import pareto_stationarity
    >>> print(pareto_stationarity(jnp.diag(jnp.array([8.0, 8.0]))))
    2.0
    """
    present = _present(gramian, task_mask)
    scaled, log2_scale = linalg.normalize_gramian(_removed(gramian, present))
    weights = solvers.min_norm(scaled, present).value
    return linalg.ldexp(jnp.sqrt(jnp.maximum(weights @ scaled @ weights, 0)), log2_scale)


def multi_gradient_bias(updates: PyTree, reference: PyTree) -> jax.Array:
    """Computes the norm of the difference between a mean of stochastic updates and the true one.

    Args:
      updates: Pytree of leaves ``(k, *leaf.shape)``: the updates of a method for k batches at one
        point (the paper: 10).
      reference: Pytree of leaves ``leaf.shape``: the update from the true gradients.

    Returns:
      Scalar.

    **Reference**: Fernando et al. 2023, figure 3 and appendix F.1.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import multi_gradient_bias
    >>> print(multi_gradient_bias(jnp.array([[3.0, 0.0], [3.0, 8.0]]), jnp.zeros(2)))
    5.0
    """

    def gap(samples: jax.Array, true: jax.Array) -> jax.Array:
        return (jnp.mean(samples, axis=0) - true)[None]

    return linalg.row_norms(jax.tree.map(gap, updates, reference))[0]


def delta_m(
    values: jax.Array,
    baselines: jax.Array,
    higher_is_better: jax.Array,
    *,
    tasks: jax.Array | None = None,
    reduce: str = "mean",
) -> jax.Array:
    """Computes the mean relative drop against single-task results, in percent.

    ``(-1)^{d_k} (M_k - B_k) / B_k * 100`` per metric, with ``d_k`` 1 where higher is better:
    negative numbers are gains.

    Args:
      values: (k,) the metrics M.
      baselines: (k,) those of single-task models B, of any sign but not 0.
      higher_is_better: (k,) bool.
      tasks: (k,) the task of each metric, integers from 0 that are known when tracing: metrics
        are then averaged within tasks first (Maninis et al. 2019). None: every metric counts
        alike, as in the tables of Navon et al. 2022 and after.
      reduce: ``"mean"``; ``"task"``: one number per task (needs ``tasks``); ``"none"``: one per
        metric.

    Returns:
      Scalar, or an array of one number per task or metric.

    Raises:
      ValueError: Shapes disagree, ``reduce`` is unknown, or ``"task"`` without ``tasks``.

    **Reference**: Maninis et al. 2019, eq. 4; Xiao et al. 2025, section 5.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import delta_m
    >>> print(delta_m(jnp.array([80.0, 0.5]), jnp.array([100.0, 1.0]), jnp.array([True, False])))
    -15.0
    """
    values, baselines = jnp.asarray(values), jnp.asarray(baselines)
    higher = jnp.asarray(higher_is_better, bool)
    if values.ndim != 1 or not values.shape == baselines.shape == higher.shape:
        raise ValueError(
            f"expected values, baselines and higher_is_better of one shape (k,), got "
            f"{values.shape}, {baselines.shape} and {higher.shape}; pass one entry per metric"
        )
    if reduce not in ("mean", "task", "none") or (reduce == "task" and tasks is None):
        raise ValueError(
            f'expected reduce to be "mean", "none", or "task" with tasks=, got {reduce!r}'
        )
    # Relative to |B|, so that the sign says better or worse for negative metrics too.
    change = 100 * (values - baselines) / jnp.abs(baselines)
    per_metric = jnp.where(higher, -change, change)
    if reduce == "none" or (reduce == "mean" and tasks is None):
        return per_metric if reduce == "none" else jnp.mean(per_metric)
    index = np.asarray(tasks)
    if index.shape != values.shape:
        raise ValueError(f"expected tasks of shape {values.shape}, got {index.shape}")
    number = int(np.max(index)) + 1
    counts = jnp.zeros(number).at[index].add(1)
    per_task = jnp.zeros(number, per_metric.dtype).at[index].add(per_metric) / counts
    return per_task if reduce == "task" else jnp.mean(per_task)
