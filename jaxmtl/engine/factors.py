"""Gradients as sums of outer products, and their inner products without forming them.

Many uses give example i the gradient `sum_t X_i[t] (outer) Y_i[t]`: a dense layer with inputs X and
output cotangents Y at positions t, a table lookup with X the one-hot rows of its indices. Then

    <grad_i, grad_j> = sum_{t,s} (X_i[t] . X_j[s]) (Y_i[t] . Y_j[s]),

which for a single position is the elementwise product of two Gramians, whatever the layer's size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.program import Use
from jaxmtl.linalg import accumulation_dtype, replicated, whole

Array = Any
Names = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factors:
    """How a use's gradient is made of its residual X and its output cotangent Y.

    Axes of X and Y are counted without the leading axis of examples. Each axis of the PARAM operand
    is in exactly one of `shared`, `left`, `right`; axes of X and Y in none of them are positions,
    in the same order in both.

    Attributes:
      shared: `(operand axis, X axis, Y axis)` of axes that X and Y have in common.
      left: `(operand axis, X axis)`.
      right: `(operand axis, Y axis)`.
      lookup: for a table lookup, the operand axis that is indexed: X then holds indices in place of
        one-hot rows, negative ones for lookups that read nothing, and `left` is empty.
    """

    shared: tuple[tuple[int, int, int], ...]
    left: tuple[tuple[int, int], ...]
    right: tuple[tuple[int, int], ...]
    lookup: int | None = None

    def num_positions(self, use: Use) -> int:
        """Return the number of positions per example and shared index."""
        out = use.outs[use.tapped[0]].aval.shape
        total = math.prod(loop.length for loop in use.loops) * math.prod(out)
        shape = use.params[0].shape
        inner = math.prod(shape[a] for a, *_ in (*self.shared, *self.right))
        return total // max(inner, 1)


@dataclasses.dataclass(frozen=True)
class Structure:
    """The parameter axes that the two factors of a gradient run over, by name, units left out."""

    shared: Names
    left: Names
    right: Names

    def pairing(self, other: Structure) -> str | None:
        """Return "straight" if X meets X, "crossed" if X meets the other's Y, else None."""
        if self.shared == other.shared:
            if (self.left, self.right) == (other.left, other.right):
                return "straight"
            if (self.left, self.right) == (other.right, other.left):
                return "crossed"
        return None


def structure(
    factors: Factors, names: Sequence[int | None], shape: Sequence[int]
) -> Structure | None:
    """Return the structure of a use, given a name for each axis of its operand."""

    def named(entries: Sequence[tuple[int, ...]]) -> Names:
        found = (names[entry[0]] for entry in entries if shape[entry[0]] != 1)
        return tuple(sorted(name for name in found if name is not None))

    left = named(factors.left)
    if factors.lookup is not None:
        if names[factors.lookup] is None or factors.shared:
            return None
        left = named(((factors.lookup,),))
    return Structure(named(factors.shared), left, named(factors.right))


@dataclasses.dataclass(frozen=True)
class Factor:
    """X or Y as an array `(examples, *shared, *positions, *own)`, axes in the order of names."""

    array: Array
    num_shared: int
    num_own: int
    lookup: bool = False


def arrange(
    factors: Factors,
    names: Sequence[int | None],
    shape: Sequence[int],
    x: Array,
    y: Array,
) -> tuple[Factor, Factor]:
    """Bring X and Y, `(examples, ...)`, into the order that `Factor` states."""

    def factor(array: Array, shared: list[tuple[int, int]], own: list[tuple[int, int]]) -> Factor:
        units = [axis + 1 for a, axis in (*shared, *own) if shape[a] == 1]

        def ordered(entries: list[tuple[int, int]]) -> list[int]:
            kept = [(names[a], axis + 1) for a, axis in entries if shape[a] != 1]
            return [axis for _, axis in sorted(kept)]

        first, last = ordered(shared), ordered(own)
        middle = [i for i in range(1, array.ndim) if i not in (*units, *first, *last)]
        array = lax.transpose(array, [0, *first, *middle, *last, *units])
        array = lax.squeeze(array, range(array.ndim - len(units), array.ndim))
        return Factor(array, len(first), len(last))

    left = factor(x, [(a, i) for a, i, _ in factors.shared], list(factors.left))
    right = factor(y, [(a, i) for a, _, i in factors.shared], list(factors.right))
    if factors.lookup is not None:
        left = dataclasses.replace(left, lookup=True)
    return left, right


def gramian_dtype(*arrays: Array) -> Any:
    """Return the widest dtype, at least float32; Python scalars among parameters count in full."""
    return accumulation_dtype(arrays)


def product(x: Array, y: Array, contract: Any, batch: Any, dtype: Any) -> Array:
    """Multiply at the highest precision, with a result that every device holds in full."""
    ndim = x.ndim + y.ndim - 2 * len(contract[0]) - len(batch[0])
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (contract, batch),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=replicated(x, ndim),
    )


def meet(p: Factor, q: Factor, dtype: Any) -> Array:
    """Return inner products over own axes, `(*shared, examples, *positions, examples', ...)`."""
    if p.lookup and q.lookup:
        a, b = whole(p.array), whole(q.array)
        a = a.reshape(a.shape + (1,) * b.ndim)
        return ((a == b) & (a >= 0)).astype(dtype)
    if q.lookup:
        half = p.array.ndim - p.num_own
        flipped = meet(q, p, dtype)
        size = flipped.ndim - half
        return lax.transpose(flipped, [*range(size, flipped.ndim), *range(size)])
    if p.lookup:
        index, rows = whole(p.array), whole(q.array).astype(dtype)
        taken = jnp.take(rows, index, axis=-1, mode="fill", fill_value=0)
        taken = jnp.where(index >= 0, taken, 0)
        rest = rows.ndim - 1
        return lax.transpose(taken, [*range(rest, taken.ndim), *range(rest)])
    shared = range(1, 1 + p.num_shared)
    own_p = range(p.array.ndim - p.num_own, p.array.ndim)
    own_q = range(q.array.ndim - q.num_own, q.array.ndim)
    return product(p.array, q.array, (own_p, own_q), (shared, shared), dtype)


def cross_block(
    a: tuple[Factor, Factor], b: tuple[Factor, Factor], pairing: str, dtype: Any
) -> Array:
    """Return `<grad_i, grad'_j>` of two uses of one parameter, `(examples, examples')`."""
    other = b if pairing == "straight" else (b[1], b[0])
    table = meet(a[0], other[0], dtype) * meet(a[1], other[1], dtype)
    num_shared = a[0].num_shared
    split = a[0].array.ndim - a[0].num_own  # = the second axis of examples
    axes = [i for i in range(table.ndim) if i not in (num_shared, split)]
    return jnp.sum(table, axis=axes) if axes else table


def rows_block(x: Array, y: Array, dtype: Any) -> Array:
    """Return the inner products of rows `(examples, *shape)`."""
    axes = range(1, x.ndim)
    return product(x, y, (axes, axes), ((), ()), dtype)
