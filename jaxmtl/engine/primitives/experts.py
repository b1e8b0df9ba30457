"""Matrices chosen from a table by an index, as in a mixture of experts.

The gradient is the outer product of the input with the output's cotangent, in the chosen place:
those of examples that chose different matrices have no inner product.
"""

import jax

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.primitives import lookup, matmul
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import Use

NAME = "lookup and dot_general"


def chosen_axis(use: Use) -> int | None:
    """Returns the axis of a table from which a use takes one slice, None for other uses."""
    rule = lookup.RULES.get(use.name)
    found = None if rule is None else rule.factors(use)
    if found is None or found.lookup is None:
        return None
    rest = [n for a, n in enumerate(use.ins[0].aval.shape) if a != found.lookup]
    return found.lookup if [n for n in use.outs[0].aval.shape if n != 1] == rest else None


def _factors(use: Use) -> Factors | None:
    """Returns the factors: inputs, cotangents, and which matrix was chosen."""
    inner = use.inner
    if inner is None or len(use.params) != 1:
        return None
    found = lookup.RULES[inner.name].factors(inner)
    if found is None or found.lookup is None:
        return None
    axis, ndim = found.lookup, len(use.params[0].aval.shape)
    rest = [a for a in range(ndim) if a != axis]
    side, depth = use.side, len(use.loops)
    data = use.ins[-1].aval
    dims = use.eqn.params["dimension_numbers"]
    shared, left, right = matmul.axes(dims, side, len(rest), len(data.shape))

    def compute(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, y = arrays[len(use.ins) - 1 :]
        index = arrays[[v is inner.data[0] for v in use.ins].index(True)]
        place = lookup.RULES[inner.name].left(inner, index[None], found).reshape(())
        return x, y, place

    return Factors(
        tuple((rest[a], depth + i, depth + j) for a, i, j in shared),
        tuple((rest[a], depth + i) for a, i in left),
        tuple((rest[a], depth + j) for a, j in right),
        choice=axis,
        compute=compute,
    )


RULES = {NAME: Primitive(factors=_factors)}
