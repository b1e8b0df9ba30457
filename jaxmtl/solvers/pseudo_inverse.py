"""The pseudo-inverse of a Gramian."""

import jax
import jax.numpy as jnp


def pseudo_inverse(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inverts a positive semi-definite (m, m) matrix on its range.

    Eigenvalues up to m machine epsilons times the largest count as zero.

    Args:
      matrix: (m, m), symmetric positive semi-definite.

    Returns:
      The pseudo-inverse (m, m), the rank, and the relative size below which a sum over its
      columns is rounding: a multiple of the machine epsilon and the condition number.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import pseudo_inverse
    >>> print(pseudo_inverse(jnp.diag(jnp.array([4.0, 0.0])))[0])
    [[0.25 0.  ]
     [0.   0.  ]]
    """
    values, vectors = jnp.linalg.eigh(matrix)
    tolerance = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * values[-1]
    kept = values > tolerance
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    rounding = 16 * tolerance * jnp.max(inverse)
    return (vectors * inverse[None, :]) @ vectors.T, jnp.sum(kept), rounding
