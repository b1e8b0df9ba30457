"""Traced functions cut into pieces, and traced anew with parts of them written differently."""

import dataclasses
import gc
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxmtl.engine.program import as_function

CALLS = ("jit", "pjit")
_RULES = {"custom_jvp_call": ("jvp_jaxpr_fun",), "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd")}
_NO_CLOSURES = (type, types.ModuleType, str, bytes, int, float, complex, type(None))
Values = dict[Any, jax.Array]  # by the variable of the traced function


@dataclasses.dataclass(eq=False)
class Piece:
    """Some equations, in their order.

    Attributes:
      fun: ``ins -> outs``.
      ins: The variables that they read and do not make.
      outs: Those that they make and others read.
    """

    fun: Callable[..., Sequence[jax.Array]]
    ins: list[Any]
    outs: list[Any]

    def run(self, values: Values) -> Values:
        """Returns the outs."""
        found = self.fun(*(values[v] for v in self.ins))
        return dict(zip(self.outs, found, strict=True))

    def add_to(self, values: Values) -> None:
        """Adds the outs to the values that they are made of."""
        values.update(self.run(values))


def pieces_of(
    jaxpr: Any, groups: Sequence[Sequence[Any]], wanted: Iterable[Any] = ()
) -> list[Piece]:
    """Returns groups of equations as functions.

    Args:
      jaxpr: What they are from.
      groups: Of which each reads what others make, or the inputs.
      wanted: Variables that are needed beside those that other groups read and the outputs.
    """
    read = [{v for eqn in group for v in reads(eqn)} for group in groups]
    outputs = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}.union(wanted)
    found = []
    for k, group in enumerate(groups):
        made = dict.fromkeys(v for eqn in group for v in eqn.outvars)
        ins = [v for v in dict.fromkeys(v for eqn in group for v in reads(eqn)) if v not in made]
        elsewhere = outputs.union(*read[:k], *read[k + 1 :])
        outs = [v for v in made if v in elsewhere]
        effects = frozenset().union(*(eqn.effects for eqn in group))
        names = {"arg_names": ("",) * len(ins), "result_paths": ("",) * len(outs)}
        about = jaxpr.debug_info._replace(**names)
        piece = jex.Jaxpr([], ins, outs, list(group), effects, about)
        found.append(Piece(as_function(jex.ClosedJaxpr(piece, [])), ins, outs))
    return found


def reads(eqn: Any) -> Sequence[Any]:
    """Returns the variables that an equation reads."""
    return [v for v in eqn.invars if not isinstance(v, jex.Literal)]


def value_of(v: Any, values: Values) -> Any:
    """Returns the value of what an equation reads, a variable or a literal."""
    return v.val if isinstance(v, jex.Literal) else values[v]


def inputs_of(closed: Any, leaves: Sequence[jax.Array]) -> Values:
    """Returns the constants and the inputs of a traced function."""
    variables = (*closed.jaxpr.constvars, *closed.jaxpr.invars)
    arrays = (*map(jnp.asarray, closed.consts), *leaves)
    return dict(zip(variables, arrays, strict=True))


def outputs_of(jaxpr: Any, values: Values) -> list[jax.Array]:
    """Returns the outputs of a traced function of which all is known."""
    return [jnp.asarray(value_of(v, values)) for v in jaxpr.outvars]


def opened(closed: Any, leaves: Sequence[jax.Array], calls: Sequence[Any]) -> Any:
    """Returns a traced function with some compiled calls in it written out."""
    jaxpr = closed.jaxpr
    groups: list[list[Any]] = [[]]
    for eqn in jaxpr.eqns:
        if eqn in calls:
            groups += [[eqn], []]
        else:
            groups[-1].append(eqn)
    pieces = pieces_of(jaxpr, groups)

    def written_out(*leaves: jax.Array) -> list[jax.Array]:
        values = inputs_of(closed, leaves)
        for piece, eqns in zip(pieces, groups, strict=True):
            if eqns and eqns[0] in calls:
                (call,) = eqns
                given = [value_of(v, values) for v in call.invars]
                found = as_function(call.params["jaxpr"])(*given)
                values.update(zip(call.outvars, found, strict=True))
            else:
                piece.add_to(values)
        return outputs_of(jaxpr, values)

    return jax.make_jaxpr(written_out)(*leaves)


def has_open_rule(jaxpr: Any) -> bool:
    """Tells whether a custom rule of differentiation closes over a traced value.

    The rule runs when the function is differentiated. If the value was computed while the function
    was traced (gradient reversal at a scheduled rate), it no longer exists then.
    """
    for eqn in jaxpr.eqns:
        names = _RULES.get(eqn.primitive.name, ())
        if any(_closes_over_traced(eqn.params[name]) for name in names if name in eqn.params):
            return True
        bodies = jex.jaxprs_in_params(eqn.params)
        if any(has_open_rule(getattr(body, "jaxpr", body)) for body in bodies):
            return True
    return False


def _closes_over_traced(rule: Any) -> bool:
    seen: dict[int, Any] = {}
    stack = [rule]
    while stack:
        x = stack.pop()
        if id(x) in seen or isinstance(x, _NO_CLOSURES):
            continue
        seen[id(x)] = x
        if isinstance(x, jax.Array):
            if is_traced(x):
                return True
        elif isinstance(x, types.FunctionType):  # not its globals
            stack += [*(x.__closure__ or ()), *(x.__defaults__ or ())]
            stack += (x.__kwdefaults__ or {}).values()
        elif isinstance(x, dict):
            stack += x.values()
        else:
            stack += gc.get_referents(x)
    return False


def is_traced(x: Any) -> bool:
    """Tells whether an array is known only when the program runs."""
    try:
        x.devices()
    except jax.errors.ConcretizationTypeError:
        return True
    return False
