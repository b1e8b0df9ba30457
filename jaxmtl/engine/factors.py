"""Gradients as sums of outer products, and their inner products without forming them.

Many uses give example i the gradient ``sum_t X_i[t] (outer) Y_i[t]``: a dense layer with inputs X
and output cotangents Y at positions t, a table lookup with X the one-hot rows of its indices. Then

    <grad_i, grad_j> = sum_{t,s} (X_i[t] . X_j[s]) (Y_i[t] . Y_j[s]),

which for a single position is the elementwise product of two Gramians, whatever the layer's size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.linalg import replicated, whole

AxisNames = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Factors:
    """How a use's gradient is made of its residual X and its output cotangent Y.

    Axes of X and Y are counted without the leading axis of examples. Each axis of the PARAM operand
    is in exactly one of ``shared``, ``left``, ``right``; axes of X and Y in none of them are
    positions, in the same order in both.

    Attributes:
      shared: ``(operand axis, X axis, Y axis)`` of axes that X and Y have in common.
      left: ``(operand axis, X axis)``.
      right: ``(operand axis, Y axis)``.
      lookup: For a table lookup, the operand axis that is indexed: X then holds indices in place of
        one-hot rows, negative ones for lookups that read nothing, and ``left`` is empty.
      choice: The operand axis along which each example chooses one slice, in none of the others.
      positions: How many positions there are, where this is not seen from the use's output.
      compute: ``(*operands, *cotangents) -> (X, Y)`` of one example, or with a choice ``(X, Y,
        index)``, where they are not the residual and the cotangent themselves.
    """

    shared: tuple[tuple[int, int, int], ...]
    left: tuple[tuple[int, int], ...]
    right: tuple[tuple[int, int], ...]
    lookup: int | None = None
    choice: int | None = None
    positions: int | None = None
    compute: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Factor:
    """X or Y as an array ``(examples, *shared, *positions, *own)``, axes in the order of names."""

    array: jax.Array
    num_shared: int
    num_own: int
    is_lookup: bool = False


def product(x: jax.Array, y: jax.Array, contract: Any, batch: Any, dtype: jnp.dtype) -> jax.Array:
    """Multiplies at the highest precision, with a result that every device holds in full."""
    ndim = x.ndim + y.ndim - 2 * len(contract[0]) - len(batch[0])
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (contract, batch),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=replicated(x, ndim),
    )


def contract(p: Factor, q: Factor, dtype: jnp.dtype) -> jax.Array:
    """Returns inner products over own axes, ``(*shared, examples, *positions, examples', ...)``."""
    if p.is_lookup and q.is_lookup:
        a, b = whole(p.array), whole(q.array)
        a, b = a.reshape(a.shape + (1,) * b.ndim), b.reshape((1,) * a.ndim + b.shape)
        return ((a == b) & (a >= 0)).astype(dtype)
    if q.is_lookup:
        half = p.array.ndim - p.num_own
        flipped = contract(q, p, dtype)
        size = flipped.ndim - half
        return lax.transpose(flipped, [*range(size, flipped.ndim), *range(size)])
    if p.is_lookup:
        index, rows = whole(p.array), whole(q.array).astype(dtype)
        taken = jnp.take(rows, index, axis=-1, mode="fill", fill_value=0)
        rest = rows.ndim - 1
        taken = jnp.where((index >= 0).reshape((1,) * rest + index.shape), taken, 0)
        return lax.transpose(taken, [*range(rest, taken.ndim), *range(rest)])
    shared = range(1, 1 + p.num_shared)
    own_p = range(p.array.ndim - p.num_own, p.array.ndim)
    own_q = range(q.array.ndim - q.num_own, q.array.ndim)
    return product(p.array, q.array, (own_p, own_q), (shared, shared), dtype)


@dataclasses.dataclass(frozen=True)
class Outer:
    """The gradients of examples as sums of outer products; ``choice`` is which slice each chose."""

    x: Factor
    y: Factor
    choice: jax.Array | None = None


def inner_products(a: Outer, b: Outer, pairing: str, dtype: jnp.dtype) -> jax.Array:
    """Returns ``<grad_i, grad'_j>`` of two uses of one parameter, ``(examples, examples')``."""
    x, y = (b.x, b.y) if pairing == "straight" else (b.y, b.x)
    table = contract(a.x, x, dtype) * contract(a.y, y, dtype)
    num_shared = a.x.num_shared
    split = a.x.array.ndim - a.x.num_own  # = the second axis of examples
    axes = [i for i in range(table.ndim) if i not in (num_shared, split)]
    block = jnp.sum(table, axis=axes) if axes else table
    if a.choice is None or b.choice is None:
        return block
    first, second = whole(a.choice)[:, None], whole(b.choice)[None, :]
    return jnp.where((first == second) & (first >= 0), block, 0)
