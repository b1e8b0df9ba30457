"""GradDrop: per coordinate, the gradients of one sign."""

import functools
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
    decisive: Any = None,
) -> Any:
    """Computes GradDrop's update for given uniform draws.

    Args:
      jacobian: Pytree of leaves ``(m, *leaf.shape)``.
      uniforms: Pytree of numbers in [0, 1) of shape ``leaf.shape``; the positive parts are kept
        where ``f(P) > u``.
      leak: (m,) shares of each gradient that pass whatever its sign, or None for 0.
      f: Function of the purity, or None for the identity.
      decisive: Pytree like ``jacobian`` (broadcast against it) of the numbers whose signs are
        picked, or None for the rows themselves.

    Returns:
      Pytree of leaves of shape ``leaf.shape`` in the dtype of the rows.
    """
    dtype = linalg.accumulation_dtype(jacobian)

    def leaf(rows: jax.Array, u: jax.Array, signed: jax.Array) -> jax.Array:
        g = signed.astype(dtype)
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
        return jnp.sum(kept * rows.astype(dtype), 0).astype(rows.dtype)

    return jax.tree.map(leaf, jacobian, uniforms, jacobian if decisive is None else decisive)


@method("per coordinate, gradients of one random sign", "Chen 2020", "scale-free")
def graddrop(
    *,
    leak: jax.Array | None = None,
    f: Callable[[jax.Array], jax.Array] | None = None,
    reduction: str = "sum",
    activations: bool = False,
    batch_axis: int | None = 0,
    num_tasks: int | None = None,
    seed: int = 0,
) -> Aggregator:
    """Keeps, per coordinate, the positive or the negative gradients at random.

    ``P = (1 + sum_i g_i / sum_i |g_i|) / 2`` per coordinate; with probability f(P) the positive
    entries are summed, else the negative ones: ``sum_i (leak_i + (1 - leak_i) M_i) g_i`` with M
    the mask.

    Use it where tasks disagree coordinate by coordinate and noise in the updates does no harm.

    Args:
      leak: (m,) shares in [0, 1] of each gradient that pass unmasked, or None for 0.
      f: Increasing function from [0, 1] to [0, 1], elementwise; None for the identity.
      reduction: ``"sum"``, or ``"mean"``: that over the number of present tasks.
      activations: Whether the rows are the gradients at an activation z, as in the paper, which
        the rule then reads as ``features``: signs are those of ``sgn(z) g_i``, summed over the
        batch, so that all examples of a batch keep the same tasks in a channel.
        ``value_and_grad(..., encoder=)`` passes the rows at z and z itself.
      batch_axis: The axis of z that runs over the batch; None if there is none.
      num_tasks: m, only to check against.
      seed: Seed of the draws; ``update(..., key=)`` overrides a draw.

    Returns:
      An `Aggregator` whose inner state is `jaxmtl.types.RandomState`; ``weighting`` is None.

    Raises:
      ValueError: ``leak`` has a wrong shape or lies outside [0, 1], or ``reduction`` is unknown.

    **Properties**: of degree 1, permutation-equivariant; conflicting, neither weighted nor
    linear under scaling. Coordinates where all gradients vanish stay 0.

    **Reference**: Chen et al. 2020, algorithm 1; Quinton and Rey 2024, eq. 27 (leak 0).

    **Differs from** the paper in that it acts by default on gradients of parameters, as in TorchJD,
    and not on those of an activation (``activations=True``, as in LibMTL).

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
        features: Any = None,
    ) -> tuple[Any, RandomState]:
        checks.check_tasks(linalg.num_rows(jacobian), None if shares is None else shares.size)
        decisive = signed_by(jacobian, features, batch_axis) if activations else jacobian
        leaves, structure = jax.tree.flatten(decisive)
        keys = jax.random.split(tasks.draw_key(seed, state.mtl_step, key), len(leaves))
        dtype = linalg.accumulation_dtype(jacobian)
        draws = [linalg.uniform_like_row(k, x, dtype) for k, x in zip(keys, leaves, strict=True)]
        update = drop_signs(jacobian, jax.tree.unflatten(structure, draws), shares, f, decisive)
        if reduction == "mean":
            count = jnp.maximum(jnp.sum(task_mask), 1)
            update = jax.tree.map(lambda x: x / count.astype(x.dtype), update)
        return update, RandomState(state.mtl_step + 1)

    rule: Any = (
        base.requiring(aggregate, "features")
        if activations
        else functools.partial(aggregate, features=None)
    )
    return base.from_rows(rule, init=lambda params: tasks.init_random(), num_tasks=num_tasks)


def signed_by(jacobian: Any, features: Any, batch_axis: int | None) -> Any:
    """Returns ``sgn(z) g_i`` summed over the batch, with an axis of length 1 in its place."""
    got: Any = [jnp.shape(z) for z in jax.tree.leaves(features)]
    expected: Any = [x.shape[1:] for x in jax.tree.leaves(jacobian)]
    if got != expected:
        raise ValueError(
            f"graddrop(activations=True) acts on gradients at the features: expected features of "
            f"shapes {expected}, like the rows, got {got}; use value_and_grad(..., encoder=)"
        )

    def leaf(rows: jax.Array, z: jax.Array) -> jax.Array:
        dtype = linalg.accumulation_dtype(rows)
        signed = rows.astype(dtype) * jnp.sign(z).astype(dtype)[None]
        if batch_axis is None:
            return signed
        axis = batch_axis + 1 if batch_axis >= 0 else batch_axis
        return jnp.sum(signed, axis=axis, keepdims=True)

    return jax.tree.unflatten(
        jax.tree.structure(jacobian),
        [
            leaf(x, jnp.asarray(z))
            for x, z in zip(jax.tree.leaves(jacobian), jax.tree.leaves(features), strict=True)
        ],
    )
