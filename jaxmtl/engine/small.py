"""Parameters that are used through small values: the norm of a weight, its largest entry, a mean.

With ``W / norm(W)`` taken apart (`scales`), the gradient of W is a sum of outer products and of
what the norms give back: an array T, the same for all examples, times a few numbers c of each.
Neither is formed, since

    <X (outer) Y, T * c> = sum_k c_k r_k    with    r_k = sum over the other axes of T X Y,
    <T * c, T' * c'> = sum_k c_k c'_k D_k    with    D_k = sum over the other axes of T T'.

For a squared norm T is 2 W, and r is known from the output of the layer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.engine.factors import AxisNames, Outer
from jaxmtl.engine.paths import Part
from jaxmtl.engine.program import Use, Value

_EXAMPLES, _POSITIONS = 51, 26  # labels of axes that are none of a parameter

# ``(value, some others) ->`` a value that all examples share, given those others.
Resolve = Callable[[Value, dict[Value, jax.Array]], jax.Array]
# ``(part, whether its output) ->`` its output with its cotangent, or its input with its cotangent.
Known = Callable[[Part, bool], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A small value each of whose entries depends on entries of its own of a parameter.

    Attributes:
      source: The small value.
      value: The selection of parameters behind it.
      names: The names of the axes of that, as of a `Part`.
      kept: The axes of the source that are not of length one, in the order of their names.
      own: These names.
      is_square: Whether it is a sum of squares.
    """

    source: Value
    value: Value
    names: AxisNames
    kept: tuple[int, ...]
    own: tuple[int, ...]
    is_square: bool

    def labels(self) -> list[int]:
        """Returns the names of the axes of T."""
        return [
            a for a, n in zip(self.names, self.value.shape, strict=True) if n != 1 and a is not None
        ]

    def coefficients(self, resolve: Resolve) -> jax.Array:
        """Returns T, without axes of length one."""

        def of_value(w: jax.Array) -> jax.Array:
            return resolve(self.source, {self.value: w})

        found, pull = jax.vjp(of_value, resolve(self.value, {}))
        return jnp.squeeze(pull(jnp.ones_like(found))[0])

    def arrange(self, rows: jax.Array) -> jax.Array:
        """Returns rows ``(examples, *shape of the source)`` as ``(examples, *own)``."""
        units = [i for i in range(1, rows.ndim) if i - 1 not in self.kept]
        rows = lax.transpose(rows, [0, *(1 + i for i in self.kept), *units])
        return lax.squeeze(rows, range(rows.ndim - len(units), rows.ndim))


@dataclasses.dataclass(frozen=True)
class Meeting:
    """An outer product that meets what a small value gives back.

    Attributes:
      part: Position of the outer product among the parts of the group.
      spread: Position of the other.
      side: 0 if all axes of the small value are those of X, 1 if they are those of Y.
      is_known: Whether T times the other factor is twice an output, or a cotangent of an input.
    """

    part: int
    spread: int
    side: int
    is_known: bool


@dataclasses.dataclass(frozen=True)
class Small:
    """The small values of a group, and what their gradients are.

    Attributes:
      uses: The uses of small values.
      values: The values used.
      inputs: Where their rows end: the sources of parts and spreads, and selections.
      selections: Small parameters, which have rows of their own.
      sums: What makes a small value by a sum or a product with constants, as a use: its cotangent
        is outer products of its rows and these constants.
      spreads: What else is given back to large parameters.
      meetings: Of spreads with outer products.
      products: Pairs of spreads with entries in common.
    """

    uses: tuple[Use, ...]
    values: tuple[Value, ...]
    inputs: tuple[Value, ...]
    selections: tuple[Value, ...]
    sums: tuple[Use, ...]
    spreads: tuple[Spread, ...]
    meetings: tuple[Meeting, ...]
    products: tuple[tuple[int, int], ...]

    def restricted(self, counts: dict[Value, bool]) -> "Small":
        """Returns the same without inner products over parameters that do not count."""

        def kept(position: int) -> bool:
            return counts[self.spreads[position].value]

        return dataclasses.replace(
            self,
            selections=tuple(v for v in self.selections if counts[v]),
            meetings=tuple(m for m in self.meetings if kept(m.spread)),
            products=tuple(pair for pair in self.products if kept(pair[0])),
        )

    def operations(self, parts: Sequence[Part], n: int, products: int) -> int:
        """Returns the operations of its inner products, of which ``products`` are wanted."""
        tables = [parts[m.part] for m in self.meetings if not m.is_known]
        rows = [*self.selections, *(spread.source for spread in self.spreads)]
        of_tables = sum(2 * n * p.num_positions() * math.prod(p.value.shape) for p in tables)
        return of_tables + sum(2 * products * math.prod(v.shape) for v in rows)

    def pull(self, rows: Sequence[jax.Array], resolve: Resolve) -> dict[Value, jax.Array]:
        """Carries rows of the values back to the inputs."""

        def of_inputs(inputs: list[jax.Array]) -> list[jax.Array]:
            known = dict(zip(self.inputs, inputs, strict=True))
            return [resolve(v, known) for v in self.values]

        _, pull = jax.vjp(of_inputs, [resolve(v, {}) for v in self.inputs])
        found = jax.vmap(lambda rows: pull(rows)[0])(list(rows))
        return dict(zip(self.inputs, found, strict=True))

    def products_of(
        self,
        rows: dict[Value, jax.Array],
        parts: Sequence[Part],
        outers: Sequence[Outer],
        known: Known,
        resolve: Resolve,
        dtype: jnp.dtype,
    ) -> "Products":
        """Returns arrays of whose products inner products are sums, but for those of ``outers``.

        Args:
          rows: Of the inputs.
          parts: The parts of the group.
          outers: Their outer products.
          known: See `Known`.
          resolve: See `Resolve`.
          dtype: In what to accumulate.
        """
        tables = [s.coefficients(resolve) for s in self.spreads]
        given = [s.arrange(rows[s.source]) for s in self.spreads]
        met = [jnp.zeros_like(x, dtype) for x in given]  # sums r, and D times other numbers c
        for i, j in self.products:
            a, b = self.spreads[i], self.spreads[j]
            both = sorted({*a.own, *b.own})
            table = _einsum([(tables[i], a.labels()), (tables[j], b.labels())], both, dtype)
            own = [_EXAMPLES, *a.own]
            sums = _einsum([(given[i], own), (table, both)], [_EXAMPLES, *b.own], dtype)
            # Each pair is counted twice, once for each of its sides.
            met[j] = met[j] + (sums / 2 if i == j else sums)
        for m in self.meetings:
            part, spread = parts[m.part], self.spreads[m.spread]
            if m.is_known:
                sums = _of_known(part, spread, known(part, m.side == 1), m.side, dtype)
            else:
                sums = _of_factors(part, outers[m.part], spread, tables[m.spread], m.side, dtype)
            met[m.spread] = met[m.spread] + sums
        squares = [rows[v] for v in self.selections]
        counted = [i for i, j in self.products if i == j]
        pairs = [(met[i], given[i]) for i in counted]
        return Products(squares, pairs)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["squares", "pairs"], meta_fields=[]
)
@dataclasses.dataclass
class Products:
    """Arrays ``(examples, ...)`` of whose products inner products are sums.

    Attributes:
      squares: Each meets itself.
      pairs: Of each, the first meets the second, and the second the first.
    """

    squares: list[jax.Array]
    pairs: list[tuple[jax.Array, jax.Array]]

    def table(self, other: "Products", dtype: jnp.dtype) -> jax.Array:
        """Returns the sum of the products, ``(examples, examples')``."""
        total = jnp.zeros((), dtype)
        for x, y in zip(self.squares, other.squares, strict=True):
            total = total + linalg.row_products(x, y, dtype)
        for (a, b), (c, d) in zip(self.pairs, other.pairs, strict=True):
            block = linalg.row_products(a, d, dtype)
            rest = block.T if self is other else linalg.row_products(b, c, dtype)
            total = total + block + rest
        return total


def constants(part: Part, known: Callable[[Value], jax.Array]) -> jax.Array:
    """Returns X of one of the sums of `Small`, without a leading axis of examples."""
    use = part.use
    if use.name == "dot_general":
        return known(next(v for v in use.ins if v is not use.params[0]))
    prefix, shape = len(use.loops), use.params[0].shape
    reduced = [shape[prefix + a] for a in use.eqn.params["axes"]]
    return jnp.ones((*shape[:prefix], *reduced))


def _einsum(
    operands: Sequence[tuple[jax.Array, Sequence[int]]], wanted: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
    given = [x for array, labels in operands for x in (array.astype(dtype), list(labels))]
    return jnp.einsum(*given, list(wanted), precision=lax.Precision.HIGHEST)


def _of_known(
    part: Part,
    spread: Spread,
    found: tuple[jax.Array, jax.Array],
    side: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns the sums r of a squared norm, from outputs or from cotangents of inputs."""
    own: Sequence[tuple[int, ...]] = part.factors.right if side else part.factors.left
    entries = [(part.names[a], at[-side]) for a, *at in (*part.factors.shared, *own)]
    places = {1 + i: name for name, i in entries if name in spread.own}
    x, y = (z.astype(dtype) for z in found)
    sums = 2 * jnp.sum(x * y, axis=[i for i in range(1, x.ndim) if i not in places])
    names = [places[i] for i in sorted(places)]
    return lax.transpose(sums, [0, *(1 + names.index(name) for name in spread.own)])


def _of_factors(
    part: Part, outer: Outer, spread: Spread, table: jax.Array, side: int, dtype: jnp.dtype
) -> jax.Array:
    """Returns the sums r: T times one factor, then times the other."""
    shared, *own, _ = part.axes()
    positions = range(_POSITIONS, _POSITIONS + outer.y.array.ndim - 1 - len(shared) - len(own[1]))
    labels = [[_EXAMPLES, *shared, *positions, *side] for side in own]
    first, last = (outer.x, outer.y) if side else (outer.y, outer.x)
    of_first, of_last = labels if side else labels[::-1]
    product = _einsum([(first.array, of_first), (table, spread.labels())], of_last, dtype)
    return _einsum([(product, of_last), (last.array, of_last)], [_EXAMPLES, *spread.own], dtype)
