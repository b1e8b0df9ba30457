"""Advantages of several rewards for policy gradients with groups of samples."""

import jax
import jax.numpy as jnp

from jaxmtl import checks


def _check_rewards(rewards: jax.Array) -> jax.Array:
    array = jnp.asarray(rewards)
    if array.ndim != 3:
        raise ValueError(
            f"expected rewards of shape (groups, samples, m), got {array.shape}; put the samples "
            "of one prompt in one row, and the rewards last"
        )
    if array.shape[1] < 2:
        raise ValueError(
            f"expected at least two samples per group, got {array.shape[1]}; a single sample has "
            "nothing to be compared with"
        )
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _standardize(x: jax.Array, axis: int | None, eps: float) -> jax.Array:
    centered = x - jnp.mean(x, axis, keepdims=True)
    deviation = jnp.std(x, axis, ddof=1, keepdims=True) + eps
    return jnp.where(deviation > 0, centered / jnp.where(deviation > 0, deviation, 1), 0)


def standardize_rewards(rewards: jax.Array, *, eps: float = 1e-4) -> jax.Array:
    """Standardizes each reward within each group: one advantage per reward.

    ``A_k = (r_k - mean) / (std + eps)``, mean and standard deviation (over ``samples - 1``) within
    the group. As ``-mean(A_k log pi)`` they give one loss per reward, for any method of this
    library. Advantages carry no gradient.

    Args:
      rewards: (groups, samples, m).
      eps: At least 0; with 0, rewards in any unit give the same, and a constant one gives 0.

    Returns:
      (groups, samples, m), of floating point.

    Raises:
      ValueError: The shape is another, a group has a single sample, or ``eps`` is negative.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.rewards import standardize_rewards
    >>> print(standardize_rewards(jnp.array([[[0.0, 5.0], [4.0, 5.0], [2.0, 5.0]]]), eps=0)[0])
    [[-1.  0.]
     [ 1.  0.]
     [ 0.  0.]]
    """
    checks.check_range("eps", eps, 0)
    return jax.lax.stop_gradient(_standardize(_check_rewards(rewards), 1, eps))


def gdpo_advantages(
    rewards: jax.Array, *, weights: jax.Array | None = None, eps: float = 1e-4
) -> jax.Array:
    """Computes GDPO's advantages: standardize per reward and group, add, whiten over the batch.

    ``B = sum_k w_k A_k`` with A of `standardize_rewards`, then ``(B - mean) / (std + eps)`` over
    all groups and samples. Where the sum of rewards is standardized instead (`grpo_advantages`),
    different rewards of equal sum have one advantage, and a reward of small scale has none.

    Args:
      rewards: (groups, samples, m).
      weights: (m,) w, non-negative, or None for ones.
      eps: At least 0, of both divisions.

    Returns:
      (groups, samples), without gradient.

    Raises:
      ValueError: The shape is another, a group has a single sample, or a number is out of range.

    **Reference**: Liu et al. 2026, "GDPO: group reward-decoupled normalization policy optimization"
    (arXiv:2601.05242). The formula was read in the authors' code (the TRL variant).

    **Differs from** the authors' code in that missing rewards are not replaced by 0.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.rewards import gdpo_advantages, grpo_advantages
    >>> rewards = jnp.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    >>> print(grpo_advantages(rewards).round(2))
    [[-0.71  0.71]
     [-0.71  0.71]]
    >>> print(gdpo_advantages(rewards).round(2))
    [[-0.55  0.55]
     [-1.1   1.1 ]]
    """
    each = standardize_rewards(rewards, eps=eps)
    return jax.lax.stop_gradient(_standardize(_weigh(each, weights), None, eps))


def grpo_advantages(
    rewards: jax.Array, *, weights: jax.Array | None = None, eps: float = 1e-4
) -> jax.Array:
    """Computes GRPO's advantages: the weighted sum of rewards, standardized within each group.

    Args:
      rewards: (groups, samples, m).
      weights: (m,), non-negative, or None for ones.
      eps: At least 0, added to the standard deviation.

    Returns:
      (groups, samples), without gradient.

    Raises:
      ValueError: The shape is another, a group has a single sample, or a number is out of range.

    **Reference**: Shao et al. 2024; as in the code of GDPO's authors.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.rewards import grpo_advantages
    >>> print(grpo_advantages(jnp.array([[[0.0, 4.0], [6.0, 0.0]]]), eps=0).round(3))
    [[-0.707  0.707]]
    """
    checks.check_range("eps", eps, 0)
    return jax.lax.stop_gradient(_standardize(_weigh(_check_rewards(rewards), weights), 1, eps))


def _weigh(each: jax.Array, weights: jax.Array | None) -> jax.Array:
    vector = checks.check_vector("weights", weights, each.shape[-1])
    return jnp.sum(each, -1) if vector is None else each @ vector.astype(each.dtype)
