"""Gradients as sums of outer products, and their inner products without forming them.

Many uses give example i the gradient ``sum_t X_i[t] (outer) Y_i[t]``: a dense layer with inputs X
and output cotangents Y at positions t, a table lookup with X the one-hot rows of its indices. Then

    <grad_i, grad_j> = sum_{t,s} (X_i[t] . X_j[s]) (Y_i[t] . Y_j[s]),

which for a single position is the elementwise product of two Gramians, whatever the layer's size.
"""

import dataclasses
import math
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


def products_of_tasks(
    a: Outer, b: Outer, pairing: str, scaled: Callable[..., jax.Array], dtype: jnp.dtype
) -> jax.Array:
    """Returns ``<grad_i, grad'_j>`` of losses over one batch, which share X: ``(tasks, tasks')``.

    With the inner products K of the inputs it is ``sum(Y_i * (K Y'_j))``, some columns at a time.

    Args:
      a: The gradients of one use, X with a leading axis of length one, Y with one of tasks.
      b: The gradients of another use of the same parameter, or ``a`` itself.
      pairing: As in `inner_products`.
      scaled: ``(array, first, last, axis)`` -> what columns of the table are multiplied by.
      dtype: In what to accumulate.
    """
    rows = _flat(a.y)  # (tasks, shared, positions, own)
    if pairing == "crossed":
        table = _paired(contract(a.y, b.x, dtype), a.y, b.x)[..., 0, :]  # (shared, tasks, t, s)

        def columns(first: int, last: int) -> jax.Array:
            y = dataclasses.replace(b.y, array=scaled(b.y.array, first, last))
            other = _paired(contract(a.x, y, dtype), a.x, y)[:, 0]  # (shared, t, tasks', s)
            start = first if a is b else 0
            return product(table[:, start:], other, ((0, 2, 3), (0, 1, 3)), ((), ()), dtype)

    else:
        times = _times(a.x, b.x, dtype)

        def columns(first: int, last: int) -> jax.Array:
            y = _flat(dataclasses.replace(b.y, array=scaled(b.y.array, first, last)))
            start = first if a is b else 0
            numbers = ((1, 2, 3), (0, 1, 3)), ((), ())
            return product(rows[start:], times(y), *numbers, dtype)

    return by_columns(b.y.array.shape[0], columns, a is b)


def by_columns(m: int, columns: Callable[[int, int], jax.Array], is_symmetric: bool) -> jax.Array:
    """Returns a table from some columns at a time; of a symmetric one, what is not above blocks.

    Args:
      m: The number of columns.
      columns: ``(first, last) ->`` those columns, from row ``first`` on if it is symmetric.
      is_symmetric: Whether the other half is known.
    """
    size = -(-m // num_blocks(m))
    blocks = [(i, min(i + size, m)) for i in range(0, m, size)]
    found = [columns(first, last) for first, last in blocks]
    if is_symmetric:
        found = [jnp.pad(x, ((m - len(x), 0), (0, 0))) for x in found]
    return jnp.concatenate(found, axis=1)


def num_blocks(m: int) -> int:
    """Returns into how many blocks of columns a table is cut.

    The more there are, the less of a symmetric table is computed twice and the less memory is taken
    meanwhile; the fewer, the larger the products.
    """
    return max(1, min(4, m // 2))


def _flat(factor: Factor) -> jax.Array:
    """Returns ``(examples, shared, positions, own)``."""
    array = factor.array
    split = array.ndim - factor.num_own
    sides = array.shape[1 : 1 + factor.num_shared], array.shape[1 + factor.num_shared : split]
    shape = [math.prod(s) for s in (*sides, array.shape[split:])]
    return array.reshape(array.shape[0], *shape)


def _paired(table: jax.Array, p: Factor, q: Factor) -> jax.Array:
    """Returns what `contract` returns as ``(shared, examples, positions, examples', ...)``."""
    sizes = [_flat(f).shape for f in (p, q)]
    return table.reshape(sizes[0][1], sizes[0][0], sizes[0][2], sizes[1][0], sizes[1][2])


def _times(x: Factor, other: Factor, dtype: jnp.dtype) -> Callable[[jax.Array], jax.Array]:
    """Returns the map that multiplies by the inner products of two factors.

    It takes ``(tasks, shared, positions', own)`` to ``(shared, positions, tasks, own)``.
    """
    if x.is_lookup and other.is_lookup:
        to, source = (whole(f.array).reshape(-1) for f in (x, other))
        # What is looked up in the same row is summed: K has a one for each such pair.
        found = jnp.unique(source, size=source.shape[0], fill_value=jnp.iinfo(source.dtype).max)
        of_source, of_to = jnp.searchsorted(found, source), jnp.searchsorted(found, to)
        of_to = jnp.minimum(of_to, source.shape[0] - 1)
        is_met = (to >= 0) & (found[of_to] == to)

        def sums(y: jax.Array) -> jax.Array:
            y = jnp.moveaxis(y[:, 0], 1, 0).astype(dtype)  # (positions', tasks, own)
            total = jnp.zeros_like(y).at[of_source].add(y)
            return jnp.where(is_met[:, None, None], total[of_to], 0)[None]

        return sums
    table = _paired(contract(x, other, dtype), x, other)[:, 0, :, 0]  # (shared, positions, ...)
    return lambda y: product(table, y, ((2,), (2,)), ((0,), (1,)), dtype)
