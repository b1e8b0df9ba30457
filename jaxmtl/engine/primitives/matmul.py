"""``dot_general`` with one PARAM operand: dense layers, attention projections, einsum."""

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import PARAM, Use


def _factors(use: Use) -> Factors | None:
    """Returns the factors of a matrix product: X is the other operand, Y the output's cotangent."""
    if use.name != "dot_general" or len(use.ins) != 2 or len(use.data) != 1:
        return None
    side = 0 if use.ins[0].kind == PARAM else 1
    contract, batch = use.eqn.params["dimension_numbers"]
    param, data = use.ins[side], use.ins[1 - side]
    param_free = _free(len(param.aval.shape), contract[side], batch[side])
    data_free = _free(len(data.aval.shape), contract[1 - side], batch[1 - side])

    # Output axes: batch, free axes of the first operand, free axes of the second.
    depth, prefix = len(use.loops), len(param.loops)
    right_start = depth + len(batch[0]) + (0 if side == 0 else len(data_free))
    shared = [(prefix + b, depth + c, depth + i) for i, (b, c) in enumerate(_pairs(batch, side))]
    for axis, loop in enumerate(param.loops):
        shared.append((axis, use.loops.index(loop), use.loops.index(loop)))
    left = [(prefix + p, depth + d) for p, d in _pairs(contract, side)]
    right = [(prefix + axis, right_start + i) for i, axis in enumerate(param_free)]
    return Factors(tuple(shared), tuple(left), tuple(right))


def _free(ndim: int, *taken: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(ndim) if not any(axis in axes for axes in taken)]


def _pairs(axes: tuple[tuple[int, ...], tuple[int, ...]], side: int) -> list[tuple[int, int]]:
    return list(zip(axes[side], axes[1 - side], strict=True))


RULES = {"dot_general": Primitive(factors=_factors, is_linear=True)}
