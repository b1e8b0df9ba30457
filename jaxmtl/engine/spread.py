"""Losses that are stacked early and then scaled, masked or averaged, one by one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmtl.engine.pieces import CALLS, Values, inputs_of, opened, outputs_of, pieces_of, value_of

_STACKED = ("stack", "concatenate")
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
# fmt: off
_ENTRYWISE = frozenset((
    "abs", "add", "add_any", "clamp", "convert_element_type", "copy", "cos", "cosh", "div", "erf",
    "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg",
    "pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tan", "tanh",
))
# fmt: on
Part = Callable[[Values, int], jax.Array]  # of task i


def stacked_last(closed: Any, leaves: Sequence[jax.Array]) -> Any:
    """Returns a traced function whose losses are stacked by its last step, where that is possible.

    ``jnp.mean(jnp.stack(per_example, -1), 0) * weights`` becomes the stack of what each task has of
    it, so that it can be seen which layers one task alone depends on.

    Args:
      closed: ``leaves -> ((m,) losses, *others)``, traced.
      leaves: Its inputs.
    """
    while not closed.jaxpr.effects:
        jaxpr = closed.jaxpr
        search = _Search({v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}, [], [])
        part = search.part(jaxpr.outvars[0], 0)
        if search.calls:
            closed = opened(closed, leaves, search.calls)
            continue
        if part is None or search.made[jaxpr.outvars[0]].primitive.name in _STACKED:
            break
        return _of_parts(closed, leaves, part, search.read)
    return closed


def _of_parts(closed: Any, leaves: Sequence[jax.Array], part: Part, read: list[Any]) -> Any:
    jaxpr = closed.jaxpr
    (whole,) = pieces_of(jaxpr, [jaxpr.eqns], read)

    def one_by_one(*leaves: jax.Array) -> list[jax.Array]:
        values = inputs_of(closed, leaves)
        whole.add_to(values)
        m = jaxpr.outvars[0].aval.shape[0]
        losses = jnp.stack([part(values, i) for i in range(m)])
        return [losses, *outputs_of(jaxpr, values)[1:]]

    return jax.make_jaxpr(one_by_one)(*leaves)


@dataclasses.dataclass
class _Search:
    """Looks for what an array is stacked of.

    Attributes:
      made: The equation that makes a variable.
      calls: Compiled calls that were met: what is in them is not known.
      read: The variables that the parts read.
    """

    made: dict[Any, Any]
    calls: list[Any]
    read: list[Any]

    def part(self, v: Any, axis: int) -> Part | None:
        """Returns what makes the slices of a variable along an axis, if it is stacked."""
        eqn = None if isinstance(v, jex.Literal) else self.made.get(v)
        if eqn is None:
            return None
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            self.calls.append(eqn)
        if name == "stack" and params["axis"] == axis:
            self.read += [x for x in eqn.invars if not isinstance(x, jex.Literal)]
            return lambda values, i: jnp.asarray(value_of(eqn.invars[i], values))
        if name == "concatenate" and params["dimension"] == axis:
            if any(x.aval.shape[axis] != 1 for x in eqn.invars):
                return None
            self.read += [x for x in eqn.invars if not isinstance(x, jex.Literal)]
            return lambda values, i: lax.squeeze(
                jnp.asarray(value_of(eqn.invars[i], values)), [axis]
            )
        if params.get("out_sharding") is not None or params.get("sharding") is not None:
            return None
        if name in _REDUCTIONS:
            axes = params["axes"]
            inner = [a for a in range(eqn.invars[0].aval.ndim) if a not in axes][axis]
            of_operand = self.part(eqn.invars[0], inner)
            if of_operand is None:
                return None
            fewer = tuple(a - (a > inner) for a in axes)
            return lambda values, i: eqn.primitive.bind(
                of_operand(values, i), **(params | {"axes": fewer})
            )
        return self._of_entries(eqn, axis) if name in _ENTRYWISE else None

    def _of_entries(self, eqn: Any, axis: int) -> Part | None:
        """Returns what makes the slices of a result that is computed entry by entry."""
        shape = eqn.outvars[0].aval.shape
        parts = [self.part(x, axis) if x.aval.shape == shape else None for x in eqn.invars]
        if not any(parts):
            return None
        others = [x for x, part in zip(eqn.invars, parts, strict=True) if part is None]
        self.read += [x for x in others if not isinstance(x, jex.Literal)]

        def part(values: Values, i: int) -> jax.Array:
            operands = []
            for x, known in zip(eqn.invars, parts, strict=True):
                if known is not None:
                    operands.append(known(values, i))
                    continue
                whole = value_of(x, values)
                is_sliced = x.aval.shape == shape
                operands.append(
                    lax.index_in_dim(whole, i, axis, keepdims=False) if is_sliced else whole
                )
            found: jax.Array = eqn.primitive.bind(*operands, **eqn.params)
            return found

        return part
