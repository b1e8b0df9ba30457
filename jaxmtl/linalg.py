"""Inner products and combinations of stacked per-task gradients.

A *Jacobian* is a pytree whose leaves have shape ``(m, *leaf.shape)``: row i of
every leaf belongs to task i. Precision, dtype, scaling and sharding are decided
here and nowhere else: products are accumulated in at least float32 at the
highest matmul precision, leaf by leaf, without ever concatenating leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any
# The entries of an array from which on a branch costs less than reading its terms twice.
_WRITTEN = 2**12
# The number of leaves from which on a maximum over all of them is computed once.
_MANY = 16


def accumulation_dtype(*trees: PyTree) -> jnp.dtype:
    """Returns the dtype of inner products: the leaves' own, at least float32."""
    # Weakly typed leaves count in full: their products are no less wide.
    return jnp.result_type(jnp.float32, *(getattr(x, "dtype", x) for x in jax.tree.leaves(trees)))


def accumulable(tree: PyTree) -> PyTree:
    """Returns every leaf in the dtype in which its products are accumulated."""
    return jax.tree.map(lambda x: x.astype(accumulation_dtype(x)), tree)


def column(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns (m,) values in a shape that broadcasts against rows (m, *s)."""
    return values.reshape((-1,) + (1,) * (rows.ndim - 1))


def times_rows(values: jax.Array, rows: PyTree) -> PyTree:
    """Multiplies row i of every leaf by ``values[i]``; rounds once, to the leaf's dtype."""

    def leaf(x: jax.Array) -> jax.Array:
        dtype = accumulation_dtype(x)
        return (column(values, x).astype(dtype) * x.astype(dtype)).astype(x.dtype)

    return jax.tree.map(leaf, rows)


def replicated(x: jax.Array, ndim: int) -> NamedSharding | None:
    """Returns the sharding of a result that every device holds in full, None without a mesh.

    Explicit axes refuse a contraction of a sharded axis without a sharding for the result;
    automatic axes take the same answer.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else NamedSharding(mesh, PartitionSpec(*(None,) * ndim))


def whole(x: jax.Array) -> jax.Array:
    """Brings an array to every device in full, where its sharding is explicit."""
    if explicit_sharding(jax.typeof(x)) is None:
        return x
    return jax.sharding.reshard(x, replicated(x, x.ndim))


def explicit_sharding(aval: Any, lead: int = 0) -> NamedSharding | None:
    """Returns how explicit axes split a type, with ``lead`` whole axes put in front; else None."""
    mesh, spec = aval.sharding.mesh, aval.sharding.spec
    split = not mesh.empty and any(axis is not None for axis in spec)
    return NamedSharding(mesh, PartitionSpec(*(None,) * lead, *spec)) if split else None


def _row_sharding(rows: jax.Array) -> NamedSharding | None:
    sharding = explicit_sharding(jax.typeof(rows))
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def zero_rows(params: PyTree, m: int) -> PyTree:
    """Returns m rows of zeros in at least float32, split over devices as the parameters are."""

    def leaf(x: jax.Array) -> jax.Array:
        one = jnp.zeros_like(x, dtype=accumulation_dtype(x))
        return jnp.broadcast_to(one, (m, *one.shape))

    return jax.tree.map(leaf, params)


def uniform_like_row(key: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Draws numbers in [0, 1) in the shape of one row; each device draws its part alone."""
    return jax.random.uniform(key, rows.shape[1:], dtype, out_sharding=_row_sharding(rows))


def units(losses: jax.Array) -> jax.Array:
    """Returns the (m, m) identity as cotangents of (m,) losses, varying over devices as they do."""
    return jnp.where(jnp.eye(losses.shape[0], dtype=bool), jnp.ones_like(losses), 0)


def row_products(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the ``(m, k)`` inner products of the rows of ``x`` (m, *s) and ``y`` (k, *s)."""
    axes = tuple(range(1, x.ndim))
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        ((axes, axes), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=replicated(x, 2),
    )


def symmetric(product: jax.Array) -> jax.Array:
    """Returns a Gramian with both sides of the diagonal rounded alike."""
    # Fused into its own transpose, a sum of products would not round alike on both sides.
    product = written(lax.optimization_barrier(product))
    return (product + product.T) / 2


def mirrored(table: jax.Array) -> jax.Array:
    """Returns a symmetric table (m, m) of which the half below the diagonal is known."""
    table = written(table)
    return jnp.where(jnp.tri(len(table), dtype=bool), table, table.T)


def written(tree: PyTree) -> PyTree:
    """Returns a tree of arrays that are in memory before anything reads them.

    On CPUs XLA fuses sums and transposes into each of their readers, barriers or not; what is read
    several times, or along the wrong side, then costs more than the products it is made of. What
    goes through a branch it writes once.
    """
    leaves = [x for x in jax.tree.leaves(tree) if jnp.size(x) >= _WRITTEN]
    if not leaves or any(explicit_sharding(jax.typeof(x)) for x in leaves):
        return tree
    return _through_a_branch(tree, leaves[0][(0,) * leaves[0].ndim])


@jax.jit
def _through_a_branch(tree: PyTree, any_number: jax.Array) -> PyTree:
    """Returns the tree, of which XLA's CPU compiler cannot know; elsewhere barriers do."""

    def equal(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.where(x == x, x, jnp.nan), tree)

    def branch(tree: PyTree) -> PyTree:
        return lax.cond(any_number == any_number, lambda tree: tree, equal, tree)

    return lax.platform_dependent(tree, cpu=branch, default=lax.optimization_barrier)


def after(known: jax.Array | None, arrays: PyTree) -> PyTree:
    """Returns the arrays as they are, but not before another one is known.

    Compilers drop an optimization barrier before they order what is computed, so that all
    cotangents would wait in memory for products that need one after the other.
    """
    if known is None:
        return arrays
    first = known.reshape(-1)[0]
    never = jnp.isnan(first) & (first == first)
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), arrays)


def num_rows(jacobian: PyTree) -> int:
    """Returns m, the length that the leading axis of every leaf must share.

    Raises:
      ValueError: A leaf is a scalar, not of floating point, or disagrees on m.
    """
    paths = jax.tree_util.tree_leaves_with_path(jacobian)
    if not paths:
        raise ValueError(
            "expected a Jacobian with at least one leaf of shape (m, *leaf.shape), got an empty "
            "pytree; pass the stacked per-task gradients, for instance from value_and_jacobian"
        )
    m = None
    for path, leaf in paths:
        name = jax.tree_util.keystr(path) or "the Jacobian"
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"expected floating point gradients, got {dtype} at {name}; differentiate with "
                "respect to floating point parameters only (see optax.masked or eqx.partition)"
            )
        if not shape:
            raise ValueError(
                f"expected a leading task axis, got a scalar at {name}; stack the gradients of "
                "the m tasks, as value_and_jacobian does"
            )
        m = shape[0] if m is None else m
        if shape[0] != m:
            raise ValueError(
                f"expected every leaf to have the same number of tasks, got {m} and, at {name}, "
                f"{shape[0]}; stack the gradients of all tasks in every leaf"
            )
    if not m:
        raise ValueError("expected at least one task, got a Jacobian with no rows (m = 0)")
    return m


def gramian(jacobian: PyTree, other: PyTree | None = None) -> jax.Array:
    """Computes the inner products of per-task gradients, ``J J^T`` or ``J K^T``.

    Args:
      jacobian: Pytree of floating point leaves of shape ``(m, *leaf.shape)``.
      other: A second pytree of the same structure with leaves ``(k, *leaf.shape)``;
        the first again if None.

    Returns:
      Array of shape ``(m, k)`` in the widest dtype of the leaves, at least float32.
      Symmetric to the last bit if ``other`` is None.

    Raises:
      ValueError: Leaves disagree on m, are not of floating point, or ``other`` does
        not have the structure and the trailing shapes of ``jacobian``.

    >>> import jax.numpy as jnp
    >>> from jaxmtl import gramian
    >>> print(gramian({"w": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "b": jnp.array([1.0, -1.0])}))
    [[6. 1.]
     [1. 2.]]
    """
    m = num_rows(jacobian)
    dtype = accumulation_dtype(jacobian, other)
    if other is None:
        product = _sum_of_products(jacobian, jacobian, (m, m), dtype)
        # A matmul need not round x.y and y.x alike.
        return (product + product.T) / 2
    k = num_rows(other)
    left: Any = jax.tree.structure(jacobian)
    right: Any = jax.tree.structure(other)
    if left != right:
        raise ValueError(
            f"expected two Jacobians of one structure, got {left} and {right}; "
            "take both from the same parameters"
        )
    for x, y in zip(jax.tree.leaves(jacobian), jax.tree.leaves(other), strict=True):
        if x.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"expected leaves of equal shape after the task axis, got {x.shape} and {y.shape}; "
                "take both Jacobians from the same parameters"
            )
    return _sum_of_products(jacobian, other, (m, k), dtype)


def _sum_of_products(
    jacobian: PyTree, other: PyTree, shape: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    total = jnp.zeros(shape, dtype)
    for x, y in zip(jax.tree.leaves(jacobian), jax.tree.leaves(other), strict=True):
        total = total + row_products(x, y, dtype)
    return total


def combine(jacobian: PyTree, weights: jax.Array) -> PyTree:
    """Computes ``J^T w``, the weighted sum of the rows.

    Args:
      jacobian: Pytree of leaves ``(m, *leaf.shape)``.
      weights: Array ``(m,)``.

    Returns:
      Pytree of leaves of shape ``leaf.shape`` in each leaf's own dtype, accumulated
      in at least float32.

    Raises:
      ValueError: ``weights`` does not have shape ``(m,)``.

    >>> import jax.numpy as jnp
    >>> from jaxmtl import combine
    >>> print(combine(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([1.0, 10.0])))
    [ 1. 12.]
    """
    m = num_rows(jacobian)
    if jnp.shape(weights) != (m,):
        raise ValueError(
            f"expected weights of shape ({m},), one per row of the Jacobian, "
            f"got {jnp.shape(weights)}; pass one weight per task"
        )
    dtype = accumulation_dtype(jacobian, weights)
    return jax.tree.map(lambda x: sum_of_rows(weights, x, dtype).astype(x.dtype), jacobian)


def sum_of_rows(weights: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the sum of rows (m, *s) with weights (m,), split over devices as one row is."""
    return lax.dot_general(
        weights.astype(dtype),
        rows.astype(dtype),
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
        out_sharding=_row_sharding(rows),
    )


def combine_rows(rows: PyTree, coefficients: jax.Array) -> PyTree:
    """Returns the rows ``C J`` (k, *s), in at least float32, of rows (m, *s) and C (k, m)."""

    def leaf(x: jax.Array) -> jax.Array:
        dtype = accumulation_dtype(x, coefficients)
        sharding = explicit_sharding(jax.typeof(x))
        return lax.dot_general(
            coefficients.astype(dtype),
            x.astype(dtype),
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
            out_sharding=sharding
            and NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])),
        )

    return jax.tree.map(leaf, rows)


def power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns ``2**exponent`` exactly, clipped to the normal numbers of ``dtype``.

    Built from the bits of the format: ``exp2`` is inexact on some backends.
    """
    info = jnp.finfo(dtype)
    integer = {32: jnp.int32, 64: jnp.int64}[info.bits]
    biased = jnp.clip(exponent, info.minexp, info.maxexp - 1).astype(integer) + (info.maxexp - 1)
    return lax.bitcast_convert_type(biased << info.nmant, dtype)


def powers_of_two(exponent: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns two factors of ``2**exponent``, which may lie outside the format as a whole."""
    # XLA computes the factors anew for each entry that they scale: a division would cost most.
    half = exponent >> 1
    return power_of_two(half, dtype), power_of_two(exponent - half, dtype)


def ldexp(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Computes ``x * 2**exponent`` without rounding, for every representable result."""
    first, second = powers_of_two(exponent, x.dtype)
    return x * first * second


def row_exponents(jacobian: PyTree, m: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns per row whether it has a non-zero entry, and e: 2^(e-1) <= |largest entry| < 2^e."""
    maxima = [
        whole(jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim))))
        for x in jax.tree.leaves(jacobian)
        if x.size
    ]
    largest = _largest(maxima, (m,), dtype)
    return largest > 0, jnp.frexp(largest)[1]


def _largest(maxima: list[jax.Array], shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Returns the largest of what was found in each leaf.

    XLA repeats a chain of maxima in the program of each leaf that is compared with the result: of
    150 leaves these were two thirds of all code. What goes through a branch it computes once.
    """
    if not maxima:
        return jnp.zeros(shape, dtype)
    largest = jnp.max(jnp.stack([x.astype(dtype) for x in maxima]), axis=0)
    if len(maxima) < _MANY:
        return largest
    return _through_a_branch(largest, largest.reshape(-1)[0])


def _largest_exponent(nonzero: jax.Array, exponent: jax.Array) -> jax.Array:
    # A zero row has no scale of its own.
    lowest = jnp.iinfo(exponent.dtype).min // 4
    top = jnp.max(jnp.where(nonzero, exponent, lowest))
    return jnp.where(top == lowest, 0, top)


def scale_rows(jacobian: PyTree, exponent: jax.Array, dtype: jnp.dtype) -> PyTree:
    """Multiplies row i of every leaf by ``2**exponent[i]``, in ``dtype``."""
    first, second = powers_of_two(exponent, dtype)
    return jax.tree.map(lambda x: x.astype(dtype) * column(first, x) * column(second, x), jacobian)


def row_norms(jacobian: PyTree) -> jax.Array:
    """Returns the (m,) Euclidean norms of the rows, without overflow on the way."""
    m, dtype = num_rows(jacobian), accumulation_dtype(jacobian)
    _, exponent = row_exponents(jacobian, m, dtype)
    total = jnp.zeros((m,), dtype)
    for x in jax.tree.leaves(scale_rows(jacobian, -exponent, dtype)):
        total = total + jnp.sum(x * x, axis=tuple(range(1, x.ndim)))
    return ldexp(jnp.sqrt(whole(total)), exponent)


def balanced_gramian(jacobian: PyTree) -> tuple[jax.Array, jax.Array]:
    """Computes the Gramian in units in which it can neither overflow nor vanish.

    Each row is first scaled by an exact power of two of its largest entry, so that
    multiplying all rows by a power of two changes no bit of the result as long as
    their entries stay normal numbers.

    Args:
      jacobian: Pytree of leaves ``(m, *leaf.shape)``.

    Returns:
      A pair of the scaled ``(m, m)`` Gramian and an int32 scalar ``log2_scale``; the
      Gramian of the rows themselves is ``gramian * 4**log2_scale``. A row more than 2^62
      (float64: 2^510) times smaller than the largest counts as a zero row: its square
      lies outside the format.
    """
    m = num_rows(jacobian)
    dtype = accumulation_dtype(jacobian)
    nonzero, exponent = row_exponents(jacobian, m, dtype)
    product, last = jnp.zeros((m, m), dtype), None
    for x in jax.tree.leaves(jacobian):  # one scaled copy at a time
        scaled = scale_rows(after(last, x), -exponent, dtype)
        last = row_products(scaled, scaled, dtype)
        product = product + last
    return in_one_scale((product + product.T) / 2, nonzero, exponent)


def in_one_scale(
    product: jax.Array, nonzero: jax.Array, exponent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `balanced_gramian`, given the Gramian of rows that are each in a scale of its own.

    Args:
      product: The ``(m, m)`` Gramian of the rows times ``2**-exponent``.
      nonzero: ``(m,)``, whether a row has an entry that is not zero.
      exponent: ``(m,)``.
    """
    dtype = product.dtype
    top = _largest_exponent(nonzero, exponent)
    below = jnp.minimum(exponent - top, 0)
    # Its products with other rows would stay when its square is gone.
    vanishes = below <= jnp.finfo(dtype).minexp // 2
    shift = jnp.where(vanishes, 0, power_of_two(below, dtype))
    return product * shift[:, None] * shift[None, :], top.astype(jnp.int32)


def without_rounding(update: PyTree, jacobian: PyTree, weights: jax.Array) -> PyTree:
    """Puts zeros for an update ``J^T w`` that is nothing but rounding.

    Weights that a solver found are known to a few units of rounding, so that a sum whose
    entries all lie below ``8 eps sum_i |w_i| max_j |g_ij|`` (with the maxima rounded up to
    powers of two) has no correct digit. Optimizers that normalise would take full steps in
    its direction; at a Pareto-stationary point the answer is 0.
    """
    m, dtype = num_rows(jacobian), accumulation_dtype(jacobian)
    nonzero, exponent = row_exponents(jacobian, m, dtype)
    top = _largest_exponent(nonzero, exponent)
    sizes = jnp.where(nonzero, power_of_two(jnp.minimum(exponent - top, 0), dtype), 0)
    bound = 8 * jnp.finfo(dtype).eps * jnp.sum(jnp.abs(weights).astype(dtype) * sizes)
    largest = _largest([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(update) if x.size], (), dtype)
    noise = ldexp(largest, -top) <= bound
    return jax.tree.map(lambda x: jnp.where(noise, jnp.zeros_like(x), x), update)


def normalize_gramian(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scales a Gramian by an exact power of four so that its largest diagonal entry is near 1.

    Returns:
      A pair of the scaled Gramian, its largest diagonal entry in [1/2, 2), and an
      int32 scalar ``log2_scale``; the input is the Gramian times ``4**log2_scale``.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.diagonal(gramian)))
    half = exponent // 2  # a power of four, so that square roots scale exactly too
    return ldexp(gramian, -2 * half), half.astype(jnp.int32)


def all_finite(tree: PyTree) -> jax.Array:
    """Tells whether every floating point leaf of ``tree`` is finite, as a scalar bool."""
    # The maximum passes NaN on; a bool per entry would be written out first.
    maxima = [
        jnp.max(jnp.abs(x))
        for x in jax.tree.leaves(tree)
        if jnp.size(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]
    return jnp.isfinite(_largest(maxima, (), accumulation_dtype(maxima)))
