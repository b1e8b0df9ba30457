"""Gradients as sums of outer products, and their inner products without forming them.

Many uses give example i the gradient ``sum_t X_i[t] (outer) Y_i[t]``: a dense layer with inputs X
and output cotangents Y at positions t, a table lookup with X the one-hot rows of its indices. Then

    <grad_i, grad_j> = sum_{t,s} (X_i[t] . X_j[s]) (Y_i[t] . Y_j[s]),

which for a single position is the elementwise product of two Gramians, whatever the layer's size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.linalg import after, replicated, whole

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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["array"],
    meta_fields=["num_shared", "num_own", "is_lookup"],
)
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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "y", "choice"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Outer:
    """The gradients of examples as sums of outer products.

    Attributes:
      x: The first factors.
      y: The second.
      choice: Which slice each chose, ``(examples, *the first positions)``.
    """

    x: Factor
    y: Factor
    choice: jax.Array | None = None


def every(x: jax.Array, blocks: int, k: jax.Array | int) -> jax.Array:
    """Returns every ``blocks``-th entry from the k-th on: of each device's, if they are split."""
    some = x.reshape(-1, blocks, *x.shape[1:])
    return lax.dynamic_index_in_dim(some, k, axis=1, keepdims=False)


def inner_products(a: Outer, b: Outer, pairing: str, dtype: jnp.dtype) -> jax.Array:
    """Returns ``<grad_i, grad'_j>`` of two uses of one parameter, ``(examples, examples')``.

    Tables of all positions are made for some examples i at a time, so that they take no more memory
    than the factors.
    """
    blocks = _num_blocks_of_examples(a, b)
    if blocks == 1:
        return _inner_products(a, b, pairing, dtype)

    def lines(k: jax.Array) -> jax.Array:
        some = jax.tree.map(lambda x: every(x, blocks, k), a)
        return _inner_products(some, b, pairing, dtype)

    found = lax.map(lines, jnp.arange(blocks))  # (blocks, examples of a block, examples')
    return jnp.swapaxes(found, 0, 1).reshape(-1, found.shape[2])


def _num_blocks_of_examples(a: Outer, b: Outer) -> int:
    if jax.sharding.get_abstract_mesh().size > 1:
        return 1
    n, of_b = (math.prod(o.y.array.shape[: o.y.array.ndim - o.y.num_own]) for o in (a, b))
    shared = math.prod(b.y.array.shape[1 : 1 + b.y.num_shared])
    tables = 2 * n * of_b // max(shared, 1)
    known = sum(f.array.size for f in (a.x, a.y, b.x, b.y)) // (2 if a is b else 1)
    m, k = a.y.array.shape[0], b.y.array.shape[0]
    counts = (c for c in range(1, m + 1) if m % c == 0)
    return next((c for c in counts if tables // c <= max(known, 2 * m * k)), max(m, 1))


def _inner_products(a: Outer, b: Outer, pairing: str, dtype: jnp.dtype) -> jax.Array:
    x, y = (b.x, b.y) if pairing == "straight" else (b.y, b.x)
    table = contract(a.x, x, dtype) * contract(a.y, y, dtype)
    num_shared = a.x.num_shared
    split = a.x.array.ndim - a.x.num_own  # = the second axis of examples
    if a.choice is not None and b.choice is not None:
        first, second = whole(a.choice), whole(b.choice)
        # Units for shared axes, for positions of which all have one choice, and for the other side.
        units, rest = split - num_shared - first.ndim, table.ndim - split - second.ndim
        before, after = (1,) * num_shared, (1,) * (table.ndim - split)
        first = first.reshape(*before, *first.shape, *(1,) * units, *after)
        second = second.reshape(*(1,) * split, *second.shape, *(1,) * rest)
        table = jnp.where((first == second) & (first >= 0), table, 0)
    axes = [i for i in range(table.ndim) if i not in (num_shared, split)]
    return jnp.sum(table, axis=axes) if axes else table


Scaled = Callable[[jax.Array, int, int], jax.Array]


def products_of_tasks(
    a: Outer, b: Outer, pairing: str, scaled: Scaled, dtype: jnp.dtype
) -> jax.Array:
    """Returns ``<grad_i, grad'_j>`` of losses over one batch, which share X: ``(tasks, tasks')``.

    With the inner products K of the inputs it is ``sum(Y_i * (K Y'_j))``, some columns at a time.

    Args:
      a: The gradients of one use, X with a leading axis of length one, Y with one of tasks.
      b: The gradients of another use of the same parameter, or ``a`` itself: then what is above
        blocks on the diagonal is undefined.
      pairing: As in `inner_products`.
      scaled: ``(rows, first, last) ->`` the rows of these tasks, as columns are made of them.
      dtype: In what to accumulate.
    """
    if pairing == "crossed":
        table = _paired(contract(a.y, b.x, dtype), a.y, b.x)[..., 0, :]  # (shared, tasks, t, s)

        def crossed(y: jax.Array, first: int, last: int) -> jax.Array:
            other = dataclasses.replace(b.y, array=scaled(y, first, last))
            return _paired(contract(a.x, other, dtype), a.x, other)[:, 0]  # (shared, t, tasks', s)

        return by_blocks(jnp.moveaxis(table, 1, 0), b.y.array, crossed, 2, a is b, dtype)
    times = _times(a.x, b.x, dtype)

    def straight(y: jax.Array, first: int, last: int) -> jax.Array:
        return times(scaled(y, first, last))  # (shared, positions, tasks', own)

    return by_blocks(_flat(a.y), _flat(b.y), straight, 2, a is b, dtype)


def by_blocks(
    rows: jax.Array,
    others: jax.Array,
    columns: Callable[[jax.Array, int, int], jax.Array],
    axis: int,
    is_symmetric: bool,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns a table of inner products, some columns at a time.

    Args:
      rows: ``(m, *s)``.
      others: ``(k, ...)``, what the columns are made of.
      columns: ``(some of others, first, last) ->`` an array of s with an axis of tasks.
      axis: The place of this axis.
      is_symmetric: Whether to leave out what lies above blocks on the diagonal.
      dtype: In what to accumulate.
    """

    def pieces(x: jax.Array) -> list[tuple[jax.Array, int, int]]:
        size = -(-len(x) // num_blocks(len(x)))
        bounds = [(i, min(i + size, len(x))) for i in range(0, len(x), size)]
        return [(x[first:last], first, last) for first, last in bounds]

    of_rows, found = pieces(rows), list[list[jax.Array]]()
    for piece, first, last in pieces(others):
        known = found[-1][-1] if found else None
        some = columns(after(known, piece), first, last)
        numbers = range(1, rows.ndim), [i for i in range(some.ndim) if i != axis]
        blocks = [
            product(x, some, numbers, ((), ()), dtype)
            if end > first or not is_symmetric
            else jnp.zeros((len(x), last - first), dtype)
            for x, _, end in of_rows
        ]
        found.append(blocks)
    return jnp.concatenate([jnp.concatenate(blocks) for blocks in found], axis=1)


def num_blocks(m: int) -> int:
    """Returns into how many blocks of columns a table is cut.

    The more there are, the less of a symmetric table is computed twice and the less memory is taken
    meanwhile; the fewer, the larger the products.
    """
    return max(1, min(4, m))


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
