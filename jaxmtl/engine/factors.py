"""Gradients as sums of outer products, and their inner products without forming them.

Many uses give example i the gradient ``sum_t X_i[t] (outer) Y_i[t]``: a dense layer with inputs X
and output cotangents Y at positions t, a table lookup with X the one-hot rows of its indices. Then

    <grad_i, grad_j> = sum_{t,s} (X_i[t] . X_j[s]) (Y_i[t] . Y_j[s]),

which for a single position is the elementwise product of two Gramians, whatever the layer's size.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.program import Use
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
    """

    shared: tuple[tuple[int, int, int], ...]
    left: tuple[tuple[int, int], ...]
    right: tuple[tuple[int, int], ...]
    lookup: int | None = None


@dataclasses.dataclass(frozen=True)
class Factor:
    """X or Y as an array ``(examples, *shared, *positions, *own)``, axes in the order of names."""

    array: jax.Array
    num_shared: int
    num_own: int
    is_lookup: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A use with its factors, and the name of each axis of its PARAM operand.

    Uses with axes of one name run over the same axis of one parameter.
    """

    use: Use
    factors: Factors
    names: AxisNames

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its operand outside all loops."""
        return self.use.params[0].shape

    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the names of the shared, left and right axes, those of length one left out."""
        left = self.factors.left
        if self.factors.lookup is not None:
            left = ((self.factors.lookup, 0),)
        sides: list[tuple[int, ...]] = []
        for side in (self.factors.shared, left, self.factors.right):
            found = (self.names[axis] for axis, *_ in side if self.shape[axis] != 1)
            sides.append(tuple(sorted(name for name in found if name is not None)))
        return tuple(sides)

    def num_positions(self) -> int:
        """Returns the number of positions per example and shared index."""
        use = self.use
        out = use.outs[use.tapped[0]].aval.shape
        total = math.prod(loop.length for loop in use.loops) * math.prod(out)
        inner = math.prod(self.shape[a] for a, *_ in (*self.factors.shared, *self.factors.right))
        return total // max(inner, 1)

    def arrange(self, x: jax.Array, y: jax.Array) -> tuple[Factor, Factor]:
        """Brings X and Y, ``(examples, ...)``, into the order that `Factor` states."""
        shared = self.factors.shared
        left = self._in_order(x, [(a, i) for a, i, _ in shared], self.factors.left)
        right = self._in_order(y, [(a, i) for a, _, i in shared], self.factors.right)
        return dataclasses.replace(left, is_lookup=self.factors.lookup is not None), right

    def _in_order(
        self, array: jax.Array, shared: Sequence[tuple[int, int]], own: Sequence[tuple[int, int]]
    ) -> Factor:
        units = [axis + 1 for a, axis in (*shared, *own) if self.shape[a] == 1]

        def ordered(entries: Sequence[tuple[int, int]]) -> list[int]:
            kept = [(self.names[a], axis + 1) for a, axis in entries if self.shape[a] != 1]
            return [axis for _, axis in sorted(kept)]

        first, last = ordered(shared), ordered(own)
        middle = [i for i in range(1, array.ndim) if i not in (*units, *first, *last)]
        array = lax.transpose(array, [0, *first, *middle, *last, *units])
        array = lax.squeeze(array, range(array.ndim - len(units), array.ndim))
        return Factor(array, len(first), len(last))


def pairing(a: Part, b: Part) -> str | None:
    """Returns "straight" if X meets X, "crossed" if X meets the other's Y, None if neither."""
    (shared, left, right), (other_shared, other_left, other_right) = a.axes(), b.axes()
    if shared == other_shared:
        if (left, right) == (other_left, other_right):
            return "straight"
        if (left, right) == (other_right, other_left):
            return "crossed"
    return None


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
        a = a.reshape(a.shape + (1,) * b.ndim)
        return ((a == b) & (a >= 0)).astype(dtype)
    if q.is_lookup:
        half = p.array.ndim - p.num_own
        flipped = contract(q, p, dtype)
        size = flipped.ndim - half
        return lax.transpose(flipped, [*range(size, flipped.ndim), *range(size)])
    if p.is_lookup:
        index, rows = whole(p.array), whole(q.array).astype(dtype)
        taken = jnp.take(rows, index, axis=-1, mode="fill", fill_value=0)
        taken = jnp.where(index >= 0, taken, 0)
        rest = rows.ndim - 1
        return lax.transpose(taken, [*range(rest, taken.ndim), *range(rest)])
    shared = range(1, 1 + p.num_shared)
    own_p = range(p.array.ndim - p.num_own, p.array.ndim)
    own_q = range(q.array.ndim - q.num_own, q.array.ndim)
    return product(p.array, q.array, (own_p, own_q), (shared, shared), dtype)


def inner_products(
    a: tuple[Factor, Factor], b: tuple[Factor, Factor], pairing: str, dtype: jnp.dtype
) -> jax.Array:
    """Returns ``<grad_i, grad'_j>`` of two uses of one parameter, ``(examples, examples')``."""
    other = b if pairing == "straight" else (b[1], b[0])
    table = contract(a[0], other[0], dtype) * contract(a[1], other[1], dtype)
    num_shared = a[0].num_shared
    split = a[0].array.ndim - a[0].num_own  # = the second axis of examples
    axes = [i for i in range(table.ndim) if i not in (num_shared, split)]
    return jnp.sum(table, axis=axes) if axes else table
