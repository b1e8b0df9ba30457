"""Table lookups: embeddings (``gather``) and single rows (``dynamic_slice``)."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import DATA, PARAM, Use


def _factors(use: Use) -> Factors | None:
    """Returns the factors of a lookup along one axis of a table; X are the indices.

    Other gathers (windows, several indexed axes) take the per-example gradient.
    """
    if not use.ins or use.ins[0].kind != PARAM or use.ins[0].loops or len(use.params) != 1:
        return None
    shape, depth = use.ins[0].aval.shape, len(use.loops)
    if use.name == "gather":
        numbers, sizes = use.eqn.params["dimension_numbers"], use.eqn.params["slice_sizes"]
        if len(use.ins) != 2 or use.ins[1].kind != DATA or numbers.operand_batching_dims:
            return None
        axes = numbers.start_index_map
        if len(axes) != 1 or tuple(numbers.collapsed_slice_dims) != tuple(axes):
            return None
        if any(n != m for a, (n, m) in enumerate(zip(shape, sizes, strict=True)) if a != axes[0]):
            return None
        others = [a for a in range(len(shape)) if a != axes[0]]
        right = list(zip(others, (depth + i for i in numbers.offset_dims), strict=True))
        return Factors((), (), tuple(right), lookup=axes[0])
    if use.name == "dynamic_slice":
        sizes = use.eqn.params["slice_sizes"]
        axes = [a for a, (n, m) in enumerate(zip(shape, sizes, strict=True)) if n != m]
        if len(axes) != 1 or sizes[axes[0]] != 1 or len(use.data) != 1:
            return None
        # Along axes that are taken whole the start does not matter: it is clamped to zero.
        start = use.eqn.invars[1 + axes[0]]
        read = list(dict.fromkeys(v for v in use.eqn.invars if not isinstance(v, jex.Literal)))
        if isinstance(start, jex.Literal) or use.ins[read.index(start)].kind != DATA:
            return None
        right = [(a, depth + a) for a in range(len(shape)) if a != axes[0]]
        return Factors((), (), tuple(right), lookup=axes[0])
    return None


def _indices(use: Use, residual: jax.Array, factors: Factors) -> jax.Array:
    """Returns the row that each lookup reads, -1 for none: ``(examples, *positions)``."""
    size = use.ins[0].aval.shape[factors.lookup or 0]
    if use.name == "dynamic_slice":
        # A position for the unit axis of the slice, as in the cotangent.
        return jnp.clip(residual, 0, size - 1)[..., None]
    index = residual[..., 0].astype(jnp.int32)
    if use.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        return jnp.clip(index, 0, size - 1)
    return jnp.where((index >= 0) & (index < size), index, -1)


RULES = dict.fromkeys(
    ("gather", "dynamic_slice"),
    Primitive(factors=_factors, left=_indices, is_linear=True, writes_rows=True),
)
