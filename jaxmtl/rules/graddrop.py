"""GradDrop: per coordinate, the gradients of one sign."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, tasks
from jaxmtl.registry import method
from jaxmtl.types import Aggregator, RandomState


def drop_signs(
    jacobian: Any,
    uniforms: Any,
    leak: jax.Array | None = None,
    f: Callable[[jax.Array], jax.Array] | None = None,
) -> Any:
    """Computes GradDrop's update for given uniform draws.

    Args:
      jacobian: Pytree of leaves ``(m, *leaf.shape)``.
      uniforms: Pytree of numbers in [0, 1) of shape ``leaf.shape``; the positive parts are kept
        where ``f(P) > u``.
      leak: (m,) shares of each gradient that pass whatever its sign, or None for 0.
      f: Function of the purity, or None for the identity.

    Returns:
      Pytree of leaves of shape ``leaf.shape`` in the dtype of the rows.
    """
    dtype = linalg.accumulation_dtype(jacobian)

    def leaf(rows: jax.Array, u: jax.Array) -> jax.Array:
        g = rows.astype(dtype)
        magnitude = jnp.sum(jnp.abs(g), 0)
        defined = magnitude > 0
        # Chen et al. 2020, eq. 1; 0/0 is taken as no preference.
        purity = jnp.where(defined, jnp.sum(g, 0) / jnp.where(defined, magnitude, 1), 0)
        chance = (1 + purity) / 2
        chance = chance if f is None else f(chance)
        kept = jnp.where(chance > u, g > 0, g < 0).astype(dtype)
        if leak is not None:
            share = linalg.column(leak.astype(dtype), g)
            kept = share + (1 - share) * kept
        return jnp.sum(kept * g, 0).astype(rows.dtype)

    return jax.tree.map(leaf, jacobian, uniforms)


@method("per coordinate, gradients of one random sign", "Chen 2020", "scale-free")
def graddrop(
    *,
    leak: jax.Array | None = None,
    f: Callable[[jax.Array], jax.Array] | None = None,
    reduction: str = "sum",
    num_tasks: int | None = None,
    seed: int = 0,
) -> Aggregator:
    """Keeps, per coordinate, the positive or the negative gradients at random.

    ``P = (1 + sum_i g_i / sum_i |g_i|) / 2`` per coordinate; with probability f(P) the positive
    entries are summed, else the negative ones: ``sum_i (leak_i + (1 - leak_i) M_i) g_i`` with M
    the mask.

    Args:
      leak: (m,) shares in [0, 1] of each gradient that pass unmasked, or None for 0.
      f: Increasing function from [0, 1] to [0, 1], elementwise; None for the identity.
      reduction: ``"sum"``, or ``"mean"``: that over the number of present tasks.
      num_tasks: m, only to check against.
      seed: Seed of the draws; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is `jaxmtl.types.RandomState`; ``weighting`` is None.

    Raises:
      ValueError: ``leak`` has a wrong shape or lies outside [0, 1], or ``reduction`` is unknown.

    **Properties**: of degree 1, permutation-equivariant; conflicting, neither weighted nor
    linear under scaling. Coordinates where all gradients vanish stay 0.

    **Reference**: Chen et al. 2020, algorithm 1; Quinton and Rey 2024, eq. 27 (leak 0).

    **Differs from** the paper in that it acts on gradients of parameters, as in TorchJD, and
    not on those of an activation.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 2.0]])
    >>> aggregator = jaxmtl.graddrop()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [4. 4.]
    """
    checks.check_choice("reduction", reduction, ("sum", "mean"))
    shares = checks.check_vector("leak", leak, num_tasks, sign="any")
    if shares is not None:
        checks.check_range("the smallest leak", jnp.min(shares), 0, 1)
        checks.check_range("the largest leak", jnp.max(shares), 0, 1)

    def aggregate(
        jacobian: Any,
        state: RandomState,
        task_mask: jax.Array,
        key: jax.Array | None,
    ) -> tuple[Any, RandomState]:
        checks.check_tasks(linalg.num_rows(jacobian), None if shares is None else shares.size)
        leaves, structure = jax.tree.flatten(jacobian)
        keys = jax.random.split(tasks.draw_key(seed, state.mtl_step, key), len(leaves))
        dtype = linalg.accumulation_dtype(jacobian)
        draws = [linalg.uniform_like_row(k, x, dtype) for k, x in zip(keys, leaves, strict=True)]
        update = drop_signs(jacobian, jax.tree.unflatten(structure, draws), shares, f)
        if reduction == "mean":
            count = jnp.maximum(jnp.sum(task_mask), 1)
            update = jax.tree.map(lambda x: x / count.astype(x.dtype), update)
        return update, RandomState(state.mtl_step + 1)

    return base.from_rows(aggregate, init=lambda params: tasks.init_random(), num_tasks=num_tasks)
