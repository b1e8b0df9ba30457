"""What the engine can know of a primitive, and what it assumes of others."""

import dataclasses
from collections.abc import Callable

import jax

from jaxmtl.engine.factors import Factors
from jaxmtl.engine.program import Use


def _first(use: Use, x: jax.Array, factors: Factors) -> jax.Array:
    return x


def _none(use: Use) -> None:
    return None


def _never(use: Use) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Primitive:
    """The knowledge of one primitive, as far as a use with PARAM operands needs it.

    Attributes:
      factors: ``use -> Factors``: how its gradient is made of outer products; None where it is not.
      left: ``(use, residual, factors) -> X``, the first factor.
      has_gradients: ``use -> bool``: whether ``gradients`` knows this use.
      gradients: ``(use, residual, cotangent, summed)``: the gradient of its PARAM operand for each
        example, or their sum, where that is better than the transpose of the primitive.
      reason: Why rows are formed where ``gradients`` forms them.
      is_linear: Whether it is linear in its PARAM operand if there is one only: it then transposes
        without a forward pass.
      writes_rows: Whether a row is written rather than multiplied out.
    """

    factors: Callable[[Use], Factors | None] = _none
    left: Callable[[Use, jax.Array, Factors], jax.Array] = _first
    has_gradients: Callable[[Use], bool] = _never
    gradients: Callable[..., jax.Array] | None = None
    reason: str = ""
    is_linear: bool = False
    writes_rows: bool = False
