"""GO4Align: tasks of similar weight move as one group."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, tasks
from jaxmtl.compiled import compiled
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@compiled("num_groups")
def group_means(values: jax.Array, num_groups: int, task_mask: jax.Array) -> jax.Array:
    """Replaces numbers by the means of their groups under the best grouping of a line.

    Exact k-means in one dimension: groups are intervals of the sorted numbers, found by dynamic
    programming (Wang and Song 2011) in O(k m^2).

    Args:
      values: (m,) non-negative.
      num_groups: k.
      task_mask: (m,) bool; absent entries belong to no group and return 0.

    Returns:
      (m,) means.
    """
    m = values.size
    values = jnp.where(task_mask, values, 0)
    order = jnp.argsort(values)
    mass = task_mask[order].astype(values.dtype)
    top = jnp.max(values)
    x = values[order] / jnp.where(top > 0, top, 1)
    place = jnp.arange(m)
    later = place[:, None] < place[None, :]
    pairs = jnp.where(later, (x[:, None] - x[None, :]) ** 2 * mass[:, None] * mass[None, :], 0)
    # Sums of squares within x[i..j], as sums over pairs: no cancellation.
    spread = jnp.cumsum(jnp.cumsum(pairs[::-1], 0)[::-1], 1)
    sums = jnp.cumsum(mass)
    number = sums[None, :] - sums[:, None] + mass[:, None]
    cost = jnp.where(place[:, None] <= place[None, :], spread / jnp.maximum(number, 1), jnp.inf)

    def add_group(best: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        # best[i]: least cost of x[:i] so far; one more group x[i..j] ends at j.
        total = best[:-1, None] + cost
        start = jnp.argmin(total, 0)
        grown = jnp.concatenate([best[:1], jnp.min(total, 0)])
        return jnp.minimum(best, grown), jnp.where(grown[1:] < best[1:], start, -1)

    empty = jnp.full((m + 1,), jnp.inf, x.dtype).at[0].set(0)
    _, starts = lax.scan(add_group, empty, None, min(num_groups, m))

    def cut(end: jax.Array, start_of: jax.Array) -> tuple[jax.Array, jax.Array]:
        # end: how many numbers are left. A group that did not lower the cost is passed over.
        start = jnp.where(end > 0, start_of[jnp.maximum(end - 1, 0)], 0)
        start = jnp.where(start < 0, end, start)
        return start, (place >= start) & (place < end)

    _, members = lax.scan(cut, jnp.asarray(m), starts, reverse=True)
    members = members.astype(x.dtype) * mass[None, :]  # (k, m)
    means = members @ values[order] / jnp.maximum(jnp.sum(members, 1), 1)
    return jnp.zeros_like(values).at[order].set(means @ members)


class GO4AlignState(NamedTuple):
    """State of `go4align`.

    Attributes:
      shares: (m,) p, on the simplex.
    """

    shares: jax.Array


@method("groups of tasks that lag together", "Shen 2024", "linear under scaling", "scale-free")
def go4align(num_groups: int = 2, *, step_size: float = 1e-4, num_tasks: int) -> Aggregator:
    """Weighs tasks by their risk, groups them by weight, and gives each its group's mean.

    ``sum_i w_i l_i`` with ``p <- p exp(-eta l) / Z``, ``v_i = p_i sum_j l_j / l_i`` and ``w_i``
    the mean of the group of ``v_i`` under k-means on the line. The means do not enter p.
    ``max(l_i, tiny)`` stands for ``l_i``, tiny the least normal number: a task whose loss is zero
    or negative has v = 0.

    Use it at the budget of one gradient for many tasks of which some belong together.

    Args:
      num_groups: k, at least 1; the authors choose it for each data set.
      step_size: eta, at least 0.
      num_tasks: m, required; the state logs ``mtl_weights``.

    Returns:
      An `Aggregator` that reads ``losses``, whose inner state is a `GO4AlignState`.

    Raises:
      ValueError: ``num_tasks`` is missing, or a number is out of range.

    **Properties**: weighted, permutation-equivariant but for ties, linear under scaling of the
    gradients, conflicting. Absent tasks leave sums and groups and keep p.

    **Reference**: Shen et al. 2024, algorithm 1.

    **Differs from** the authors' code, whose k-means is Lloyd's from random centres: this one is
    the best grouping, found exactly, and the same at every call.

    >>> import jax.numpy as jnp, jaxmtl
    >>> weighting = jaxmtl.go4align(2, num_tasks=3).weighting
    >>> losses = jnp.array([1.0, 1.1, 5.0])
    >>> weights, _ = weighting.update(None, weighting.init(), losses=losses)
    >>> print((weights[0] == weights[1]) & (weights[2] < weights[1]))
    True
    """
    checks.check_int("num_groups", num_groups)
    checks.check_range("step_size", step_size, 0)

    def init() -> GO4AlignState:
        return GO4AlignState(tasks.uniform(num_tasks))

    def weigh(
        losses: jax.Array, state: GO4AlignState, task_mask: jax.Array
    ) -> tuple[jax.Array, GO4AlignState]:
        clamped, active = tasks.positive_part(losses)
        logits = jnp.log(tasks.positive_part(state.shares)[0]) - step_size * jnp.where(
            active, losses, 0
        )
        shares = jax.nn.softmax(logits, where=task_mask)
        # sum_j l_j / l_i in factors that do not overflow for losses of 1e30 and 1e-30.
        largest = jnp.max(jnp.where(task_mask, clamped, 0))
        sum_ratio = jnp.sum(jnp.where(task_mask, clamped / largest, 0))
        ratio = jnp.minimum(largest / clamped, jnp.finfo(losses.dtype).max / losses.size**2)
        values = jnp.where(active, shares * sum_ratio * ratio, 0)
        weights = group_means(values, num_groups, task_mask)
        return weights, GO4AlignState(jnp.where(task_mask, shares, state.shares))

    return base.from_weighting(weigh, init=init, num_tasks=num_tasks)
