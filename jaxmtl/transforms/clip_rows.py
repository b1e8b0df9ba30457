"""Per-task gradient clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmtl import checks, linalg


def clip_rows(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scales down every task's gradient whose norm exceeds ``max_norm``.

    A row transform, to be chained before an aggregator:
    ``optax.chain(clip_rows(1.0), upgrad(), optax.adam(1e-3))``. (``optax.clip_by_global_norm``
    in that place clips the norm of all tasks together.)

    Args:
      max_norm: Positive bound on the Euclidean norm of each row over all leaves.

    Returns:
      A transformation of leaves ``(m, *leaf.shape)``, dtypes kept. A row with a non-finite entry
      stays non-finite, for the aggregator to skip.

    Raises:
      ValueError: ``max_norm`` is not positive; when tracing, ``params`` is missing or the
        leaves have no task axis.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[3.0, 4.0], [0.3, 0.4]])
    >>> clip = jaxmtl.clip_rows(1.0)
    >>> print(clip.update(jacobian, clip.init(params), params)[0])
    [[0.6 0.8]
     [0.3 0.4]]
    """
    checks.check_range("max_norm", max_norm, 0, closed="right")

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.EmptyState]:
        del extra
        if not jax.tree.leaves(updates) and params is not None:
            return updates, state
        checks.check_jacobian(updates, params, None)
        norms = linalg.row_norms(updates)
        bound = jnp.asarray(max_norm, norms.dtype)
        factors = jnp.where(norms > bound, bound / jnp.where(norms > 0, norms, 1), 1)
        return linalg.times_rows(factors, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
