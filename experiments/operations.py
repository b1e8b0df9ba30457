"""Counts multiplications and additions of products, read off a jaxpr, times trip counts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import partial_eval


def count(fun: Callable[..., Any], *args: Any) -> int:
    """Returns the operations of all products and convolutions of ``fun(*args)``.

    The body of a loop that ends by a condition, a solver's, counts once.
    """
    jaxpr = jax.make_jaxpr(fun)(*args).jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            size = math.prod(eqn.invars[0].aval.shape[a] for a in contract)
            total += 2 * size * math.prod(eqn.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel, outputs = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
            per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(outputs) * per_output // math.prod(params["lhs_dilation"])
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        else:
            bodies = jex.jaxprs_in_params(params)
            total += sum(_count(getattr(body, "jaxpr", body)) for body in bodies)
    return total
