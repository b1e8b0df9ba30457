"""``dot_general`` with one PARAM operand: dense layers, attention projections, einsum."""

from typing import Any

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import PARAM, Use


def _factors(use: Use) -> Factors | None:
    """Returns the factors of a matrix product: X is the other operand, Y the output's cotangent."""
    if use.name != "dot_general" or len(use.ins) != 2 or len(use.data) != 1:
        return None
    side = 0 if use.ins[0].kind == PARAM else 1
    param, data = use.ins[side], use.ins[1 - side]
    dims = use.eqn.params["dimension_numbers"]
    shared, left, right = axes(dims, side, len(param.aval.shape), len(data.aval.shape))
    depth, prefix = len(use.loops), len(param.loops)
    loops = [(axis, use.loops.index(loop)) for axis, loop in enumerate(param.loops)]
    return Factors(
        (
            *((prefix + a, depth + i, depth + j) for a, i, j in shared),
            *((axis, place, place) for axis, place in loops),
        ),
        tuple((prefix + a, depth + i) for a, i in left),
        tuple((prefix + a, depth + j) for a, j in right),
    )


def axes(
    dims: Any, side: int, param_ndim: int, data_ndim: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns where the axes of one operand are in the other, X, and in the output, Y."""
    contract, batch = dims
    param_free = _free(param_ndim, contract[side], batch[side])
    data_free = _free(data_ndim, contract[1 - side], batch[1 - side])
    # Output axes: batch, free axes of the first operand, free axes of the second.
    start = len(batch[0]) + (0 if side == 0 else len(data_free))
    shared = [(a, i, j) for j, (a, i) in enumerate(_pairs(batch, side))]
    return shared, _pairs(contract, side), [(a, start + j) for j, a in enumerate(param_free)]


def _free(ndim: int, *taken: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(ndim) if not any(axis in axes for axes in taken)]


def _pairs(axes: tuple[tuple[int, ...], tuple[int, ...]], side: int) -> list[tuple[int, int]]:
    return list(zip(axes[side], axes[1 - side], strict=True))


RULES = {"dot_general": Primitive(factors=_factors, is_linear=True)}
