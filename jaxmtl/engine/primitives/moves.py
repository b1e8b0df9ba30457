"""Primitives that are linear in their parameter and have no other rule."""

from jaxmtl.engine.primitives.primitive import Primitive

RULES = dict.fromkeys(("mul", "identity", "reshape", "transpose"), Primitive(is_linear=True))
