"""What is worth logging about the gradients and the results of a multi-task training.

Functions of the ``(m, m)`` Gramian where that is enough, so that they cost nothing beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmtl import linalg, solvers, tasks
from jaxmtl.rules.pcgrad import projected_rows
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


def condition_number(
    gramian: jax.Array, task_mask: jax.Array | None = None, *, nonzero: bool = False
) -> jax.Array:
    """Computes the ratio of the largest to the smallest singular value of the Jacobian.

    Small singular values are as accurate as large ones (see `jaxmtl.solvers.singular_system`):
    gradients of very different norm give a large number, dependent ones infinity.

    Args:
      gramian: (m, m).
      task_mask: (m,) bool; absent tasks are left out.
      nonzero: Whether to divide by the smallest singular value that is not zero: the condition of
        the system that Aligned-MTL equalizes where gradients are dependent or zero.

    Returns:
      Scalar, at least 1; infinity for dependent gradients unless ``nonzero``, and 1 with
      ``nonzero`` where all gradients are zero.

    **Reference**: Senushkin et al. 2023, eq. 2 and the remark of section 5.1.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import condition_number
    >>> print(condition_number(jnp.diag(jnp.array([1.0, 9.0]))))
    3.0
    >>> print(condition_number(jnp.ones((2, 2))), condition_number(jnp.ones((2, 2)), nonzero=True))
    inf 1.0
    """
    present = _present(gramian, task_mask)
    values = solvers.singular_system(gramian, present).values
    rank = jnp.sum(values > 0)
    last = values[jnp.maximum(rank - 1, 0)]
    ratio = jnp.where(rank > 0, values[0] / jnp.where(rank > 0, last, 1), 1)
    if nonzero:
        return ratio
    return jnp.where(rank == jnp.maximum(jnp.sum(present), 1), ratio, jnp.inf)


def norm_ratio(gramian: jax.Array, task_mask: jax.Array | None = None) -> jax.Array:
    """Computes the largest ratio of the norms of two gradients, ``max |g_i| / |g_j|``.

    Args:
      gramian: (m, m).
      task_mask: (m,) bool; absent tasks are left out.

    Returns:
      Scalar, at least 1; infinity beside a zero gradient, 1 where all are zero.

    **Reference**: Senushkin et al. 2023, figures 4 and 7.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import norm_ratio
    >>> print(norm_ratio(jnp.diag(jnp.array([1.0, 9.0]))))
    3.0
    """
    present = _present(gramian, task_mask)
    squares = jnp.diagonal(linalg.normalize_gramian(_removed(gramian, present))[0])
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    largest = jnp.max(norms)
    least = jnp.min(jnp.where(present, norms, largest))
    # 0 / 0 where all gradients are zero: they are equal.
    return jnp.where(largest > 0, largest / jnp.where(largest > 0, least, 1), 1)


def balanced_gramian(gramian: jax.Array, coefficients: jax.Array) -> jax.Array:
    """Computes the Gramian of the rows that a method makes of the gradients.

    Every metric of this module then tells what the method did: whether its rows still conflict,
    how different their norms are, how well conditioned they are.

    Args:
      gramian: (m, m), G.
      coefficients: (m,) weights w, for the rows ``w_i g_i``; or (k, m), C, for the rows of
        ``C J``, as of `aligned_coefficients` and `pcgrad_coefficients`.

    Returns:
      (m, m) or (k, k), ``C G C^T``, symmetric to the last bit.

    Raises:
      ValueError: The coefficients do not fit the Gramian.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import balanced_gramian, norm_ratio
    >>> gramian = jnp.diag(jnp.array([1.0, 9.0]))
    >>> print(norm_ratio(balanced_gramian(gramian, jnp.array([0.75, 0.25]))))
    1.0
    """
    m, shape = gramian.shape[0], jnp.shape(coefficients)
    if len(shape) not in (1, 2) or shape[-1] != m:
        raise ValueError(
            f"expected coefficients of shape ({m},) or (k, {m}), one per gradient, got {shape}; "
            "pass the weights of a method, or the rows of coefficients of its balanced gradients"
        )
    if len(shape) == 1:
        return coefficients[:, None] * gramian * coefficients[None, :]
    left = jnp.matmul(coefficients, gramian, precision=jax.lax.Precision.HIGHEST)
    product = jnp.matmul(left, coefficients.T, precision=jax.lax.Precision.HIGHEST)
    return (product + product.T) / 2


def aligned_coefficients(gramian: jax.Array, task_mask: jax.Array | None = None) -> jax.Array:
    """Computes B of Aligned-MTL's balanced rows ``B J``, the nearest orthogonal system to J.

    ``B = sigma_R U Sigma^-1 U^T`` over the R non-zero singular values: all those of ``B J`` are
    equal to the smallest of J. With p the preference, ``B p`` are the weights of
    `jaxmtl.aligned_mtl`, so that its update is ``p^T (B J)``.

    Args:
      gramian: (m, m).
      task_mask: (m,) bool; absent tasks are left out.

    Returns:
      (m, m), symmetric; rows and columns of absent and zero gradients are 0.

    **Reference**: Senushkin et al. 2023, eq. 5 and algorithm 1 ("balance transformation").

    >>> import jax.numpy as jnp
    >>> from jaxmtl.metrics import aligned_coefficients
    >>> print(aligned_coefficients(jnp.diag(jnp.array([1.0, 16.0]))))
    [[1.   0.  ]
     [0.   0.25]]
    """
    values, vectors, _ = solvers.singular_system(gramian, task_mask)
    least = jnp.min(jnp.where(values > 0, values, jnp.inf))
    stretch = jnp.where(values > 0, least / jnp.where(values > 0, values, 1), 0)
    product = jnp.matmul(vectors * stretch[None, :], vectors.T, precision=jax.lax.Precision.HIGHEST)
    return (product + product.T) / 2


def pcgrad_coefficients(
    gramian: jax.Array, key: jax.Array, task_mask: jax.Array | None = None
) -> jax.Array:
    """Computes the coefficients of the projected gradients of `jaxmtl.pcgrad`, for one draw.

    Args:
      gramian: (m, m).
      key: Draws the orders in which each gradient meets the others.
      task_mask: (m,) bool; absent tasks are left out.

    Returns:
      (m, m) C: row i of ``C J`` is ``g_i`` less its projections, and the sum of the rows of C are
      the weights of `jaxmtl.pcgrad` for ``key``. Rows and columns of absent tasks are 0.

    **Reference**: Yu et al. 2020, algorithm 1.

    >>> import jax, jax.numpy as jnp
    >>> from jaxmtl.metrics import balanced_gramian, pcgrad_coefficients
    >>> coefficients = pcgrad_coefficients(jnp.array([[1.0, -1.0], [-1.0, 2.0]]), jax.random.key(0))
    >>> print(coefficients)
    [[1.  0.5]
     [1.  1. ]]
    """
    present = _present(gramian, task_mask)
    scaled = linalg.normalize_gramian(_removed(gramian, present))[0]
    return projected_rows(scaled, tasks.draw_orders(key, gramian.shape[0]), present)


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
