"""What is known of each primitive, by its name: one file per family.

A new family is a module here with a ``RULES``, and its name in the tuple below. Whatever has no
rule is differentiated as JAX does it, one row per example.
"""

from jaxmtl.engine.primitives import conv, custom, experts, lookup, matmul, moves
from jaxmtl.engine.primitives.primitive import Primitive
from jaxmtl.engine.program import Use

_RULES = {
    name: rule
    for family in (matmul, lookup, experts, conv, custom, moves)
    for name, rule in family.RULES.items()
}
_UNKNOWN = Primitive()


def rule_of(use: Use) -> Primitive:
    """Returns what is known of the primitive of a use."""
    return _RULES.get(use.name, _UNKNOWN)
