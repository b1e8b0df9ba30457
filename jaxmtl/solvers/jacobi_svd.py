"""Singular values and left vectors of a gradient system, from its Gramian.

The eigenvalues of a Gramian are squares: an ordinary eigensolver loses every singular value
below the root of the machine epsilon times the largest. Most of that loss comes from rows of
different norm, and is not necessary: the correlations of the rows are known to rounding, whatever
the norms are. Factored with its scaling kept apart, ``G = (D L)(D L)^T``, and orthogonalised
column by column, the system gives its small values as accurately as its large ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.compiled import compiled
from jaxmtl.solvers.quadratic import row_normalized


class SingularSystem(NamedTuple):
    """Singular values and left vectors of a Jacobian, the largest first.

    Attributes:
      values: (m,) in descending order, exactly 0 beyond the rank.
      vectors: (m, m), one unit vector per column; columns beyond the rank are 0.
      residual: Scalar, the largest cosine between two columns of ``D L V``; a small multiple of
        the machine epsilon.
    """

    values: jax.Array
    vectors: jax.Array
    residual: jax.Array


@compiled()
def singular_system(gramian: jax.Array, mask: jax.Array | None = None) -> SingularSystem:
    """Computes U and sigma of ``J = U diag(sigma) V^T`` from ``G = J J^T``.

    With D the norms of the rows, ``G = D A D`` where A has unit diagonal. A pivoted Cholesky
    factorisation ``A = L L^T`` reveals the rank; one-sided Jacobi rotations then make the columns
    of ``D L`` orthogonal, whose norms are sigma and whose directions are U. The relative errors
    of sigma depend on the condition of A, not of G: rows may differ by 1e18 in float32.

    Args:
      gramian: (m, m), of floating point, the product of the rows in their own units.
      mask: (m,) bool, False for tasks that do not take part; all do if None.

    Returns:
      `SingularSystem`, with values (m,), vectors (m, m) and residual () in the dtype of the
      Gramian. Zero and absent rows are zero in every vector. A row whose part orthogonal to the
      others is less than ``sqrt(8 m eps)`` of its norm counts as dependent on them: what is left
      of it in the Gramian is rounding.

    **Properties**: scale-free: the Gramian times ``4^k`` has the values times ``2^k`` and the same
    vectors, bit for bit. Safe under jit and vmap; about eight sweeps of ``m (m - 1) / 2``
    rotations for m = 64, ``m / 2`` of them at once; fewer where the norms differ much.

    **Reference**: Demmel and Veselic 1992 (accuracy); Veselic and Hari 1989 (the Cholesky factor
    and its left vectors); Brent and Luk 1985 (the order of the pairs).

    **Differs from** ``jnp.linalg.eigh(gramian)``, whose smallest eigenvalues are wrong by the
    machine epsilon times the *largest*.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import singular_system
    >>> print(singular_system(jnp.diag(jnp.array([1e-16, 4.0]))).values)
    [2.e+00 1.e-08]
    """
    m, dtype = gramian.shape[0], gramian.dtype
    if mask is not None:
        gramian = jnp.where(mask[:, None] & mask[None, :], gramian, 0)
    gramian, log2_scale = linalg.normalize_gramian(gramian)
    unit, norms, zero = row_normalized(gramian)
    columns = _cholesky_columns(unit, norms, ~zero)
    padded = jnp.pad(columns, ((0, m % 2), (0, 0)))
    columns, residual = _orthogonal_rows(padded * norms[None, :])
    _, exponent = jnp.frexp(jnp.max(jnp.abs(columns), axis=1))
    scaled = linalg.ldexp(columns, -exponent[:, None])
    sizes = jnp.sqrt(jnp.sum(scaled * scaled, axis=1))
    values = linalg.ldexp(sizes, exponent)
    order = jnp.argsort(-values)[:m]
    vectors = (scaled / jnp.where(sizes > 0, sizes, 1)[:, None])[order].T
    return SingularSystem(linalg.ldexp(values[order], log2_scale), vectors, residual.astype(dtype))


def _cholesky_columns(unit: jax.Array, norms: jax.Array, usable: jax.Array) -> jax.Array:
    """Returns the columns of L as rows (m, m), zero beyond the rank.

    The pivot is the row with most left of it in its own units, ``d_i^2 S_ii``: then the columns of
    ``D L`` come in descending order, nearly orthogonal where the norms differ much.
    """
    m, dtype = unit.shape[0], unit.dtype
    tolerance = 8 * m * jnp.finfo(dtype).eps

    def step(
        k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        rest, columns, open_rows = carry
        left = jnp.diagonal(rest)
        # Of roots: squares of the norms could leave the format.
        size = norms * jnp.sqrt(jnp.where(open_rows & (left > tolerance), left, 0))
        pivot = jnp.argmax(size)
        found = size[pivot] > 0
        here = jnp.arange(m) == pivot
        root = jnp.sqrt(jnp.where(found, left[pivot], 1))
        column = jnp.where(here, root, jnp.where(open_rows, rest[pivot] / root, 0))
        column = jnp.where(found, column, 0)
        rest = rest - column[:, None] * column[None, :]
        return rest, columns.at[k].set(column), open_rows & ~here

    start = (unit, jnp.zeros((m, m), dtype), usable)
    return lax.fori_loop(0, m, step, start)[1]


def _orthogonal_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotates an even number of rows into orthogonal ones of the same product ``R^T R``.

    Returns:
      The rows in an order of no meaning, and the largest cosine left.
    """
    half, dtype = rows.shape[0] // 2, rows.dtype
    eps = jnp.finfo(dtype).eps
    level = 2 * eps * rows.shape[0] ** 0.5  # cosines below are rounding
    floor = jnp.finfo(dtype).tiny / eps  # sums below have lost digits at the end of the format

    # Each row is a unit-sized array times a power of two, lest squares leave the format.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(rows), axis=1))
    rows = linalg.ldexp(rows, -exponent[:, None])
    scale = jnp.where(jnp.any(rows != 0, axis=1), linalg.power_of_two(exponent, dtype), 1)

    def rotate(
        _: int, carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        top, bottom, top_scale, bottom_scale, largest = carry
        a, b = jnp.sum(top * top, 1), jnp.sum(bottom * bottom, 1)
        product = jnp.sum(top * bottom, 1)
        both = (a > 0) & (b > 0)
        relative = bottom_scale / top_scale
        x, y = jnp.sqrt(jnp.where(both, a, 1)), jnp.sqrt(jnp.where(both, b, 1))
        cosine = jnp.where(both, product, 0) / x / y
        ratio = y * relative / x
        first = ratio <= 1  # the top row is the longer one
        ratio = jnp.where(first, ratio, x / (y * relative))
        gap = (1 - ratio) * (1 + ratio)
        # Between rows of different norm the smallest cosine counts: it is all that the vector of
        # the one has of the task of the other. Between equal ones it would turn them for nothing.
        turned = (jnp.abs(cosine) > level) | (gap > 0.5)
        cosine = jnp.where(turned, cosine, 0)
        # The tangent is ratio * slope; together with the scales it stays inside the format.
        root = jnp.sqrt(gap * gap + (2 * ratio * cosine) ** 2)
        slope = 2 * cosine / jnp.where(turned, gap + root, 1)
        tangent = ratio * slope
        length = lax.rsqrt(1 + tangent * tangent)[:, None]
        up = jnp.where(first, tangent * relative, -slope * x / y)
        down = jnp.where(first, slope * y / x, -tangent / relative)
        new_top = length * (top + up[:, None] * bottom)
        new_bottom = length * (bottom - down[:, None] * top)
        # How far from orthogonal, in proportion to the terms of the product: in a graded system a
        # tiny product of tiny terms is not yet zero.
        terms = jnp.sum(jnp.abs(top * bottom), 1)
        share = jnp.where(terms > floor, jnp.abs(product) / jnp.where(terms > 0, terms, 1), 0)
        left = jnp.where(turned, jnp.maximum(jnp.abs(slope), share), 0)
        largest = jnp.maximum(largest, jnp.max(left))
        top, bottom = _next_pairs(new_top, new_bottom)
        top_scale, bottom_scale = _next_pairs(top_scale, bottom_scale)
        return top, bottom, top_scale, bottom_scale, largest

    def sweep(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        *arrays, _, count = carry
        turned = lax.fori_loop(0, 2 * half - 1, rotate, (*arrays, jnp.zeros((), dtype)))
        return *turned, count + 1

    def unfinished(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> jax.Array:
        *_, largest, count = carry
        # Convergence is quadratic: a sweep of small turns has left cosines of their square.
        return (largest > (eps / half) ** 0.5) & (count < 24)

    start = (rows[:half], rows[half:], scale[:half], scale[half:], jnp.ones((), dtype))
    top, bottom, top_scale, bottom_scale, _, _ = lax.while_loop(
        unfinished, sweep, (*start, jnp.zeros((), jnp.int32))
    )
    rows, scale = jnp.concatenate([top, bottom]), jnp.concatenate([top_scale, bottom_scale])
    squares = jnp.sum(rows * rows, axis=1)
    units = rows * lax.rsqrt(jnp.where(squares > 0, squares, 1))[:, None]
    cosines = jnp.matmul(units, units.T, precision=lax.Precision.HIGHEST)
    left = jnp.max(jnp.where(jnp.eye(2 * half, dtype=bool), 0, jnp.abs(cosines)))
    return rows * scale[:, None], left


def _next_pairs(top: jax.Array, bottom: jax.Array) -> tuple[jax.Array, jax.Array]:
    # A round robin: the first stays, the others go round, each meets each once in 2 h - 1 turns.
    if top.shape[0] == 1:
        return top, bottom
    return (
        jnp.concatenate([top[:1], bottom[:1], top[1:-1]]),
        jnp.concatenate([bottom[1:], top[-1:]]),
    )
