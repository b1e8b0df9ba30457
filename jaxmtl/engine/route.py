"""What the routes have in common: what they are told, and the pullback."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import arguments, keywords, linalg, separate
from jaxmtl.names import Aux
from jaxmtl.types import PyTree

# Two factors of a power of two; None for one.
Power = tuple[jax.Array, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """What `value_and_gramian` and its relatives are told; see there."""

    losses_fn: Any
    in_axes: Any = None
    encoder: Callable[..., Any] | None = None
    shared: Any = None
    has_aux: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if separate.is_several(self.losses_fn):
            separate.check_functions(self.losses_fn, self.in_axes, self.encoder)
        else:
            arguments.check_callable(self.losses_fn, "a losses function")
        arguments.check_chunk_size(self.chunk_size)
        if self.encoder is not None:
            arguments.check_callable(self.encoder, "an encoder function encode(params, *args) -> z")
        if self.encoder is not None and self.in_axes is not None:
            raise ValueError(
                "expected encoder= or in_axes=, got both; an encoder maps one batch to z for m "
                "task losses, in_axes is for one loss per example: drop one of them"
            )
        if self.chunk_size is not None and self.in_axes is not None:
            raise ValueError(
                f"expected no chunk_size with in_axes, got {self.chunk_size}; examples are not "
                "processed in chunks, as their gradients are not formed: drop it"
            )

    def takes(self, num_args: int) -> keywords.Names:
        """Returns the keywords of the losses function beside ``num_args`` arguments."""
        lead = 1 if self.encoder is None else 2  # the parameters, and z
        return keywords.of_losses(self.losses_fn, lead + num_args)

    def call(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, Aux]:
        """Returns ``(losses, aux)``; see `arguments.call_losses`."""
        return arguments.call_losses(self.losses_fn, self.has_aux, *args, **kwargs)


class Route(Protocol):
    """The losses, and what can be asked for next.

    Attributes:
      losses: ``(m,)``.
      aux: The auxiliary output and the names of the losses.
      features: z of the encoder, or None.
      pullback: ``(weights, head_weights=None) -> grads``.
    """

    losses: jax.Array
    aux: Aux
    features: Any
    pullback: jax.tree_util.Partial

    def gramian(self) -> jax.Array:
        """Returns the ``(m, m)`` Gramian, symmetric to the last bit; computed only if called."""

    def balanced_gramian(self) -> tuple[jax.Array, jax.Array]:
        """Returns the Gramian as `linalg.balanced_gramian` does, safe from overflow."""

    def cross(self, other: Any) -> jax.Array:
        """Returns ``J_1 J_2^T``, with J_2 that of the same function on another batch."""

    def explain(self) -> str:
        """Tells how the Gramian is computed."""


@dataclasses.dataclass(frozen=True)
class Pull:
    """``J^T w`` for every leaf; leaves that are not shared take the head weights instead.

    Attributes:
      treedef: The structure of the parameters.
      shared: For each leaf, whether it is shared.
      pull: ``(residual, weights, wanted) -> grads``; entries of leaves that are not wanted are
        undefined.
      scales: Whether weights of any size may come, as those of a Gramian may.
    """

    treedef: Any
    shared: tuple[bool, ...]
    pull: Callable[..., list[jax.Array]]
    scales: bool = True

    def __call__(
        self, residual: Any, weights: jax.Array, head_weights: jax.Array | None = None
    ) -> PyTree:
        """Returns a pytree like the parameters."""
        pulled = self._pulled(residual, weights, head_weights)
        return jax.tree.unflatten(self.treedef, [_in_scale(x, power) for x, power in pulled])

    def checked(
        self, residual: Any, weights: jax.Array, head_weights: jax.Array | None = None
    ) -> tuple[PyTree, jax.Array]:
        """Returns the same, and whether all of it is finite."""
        pulled = self._pulled(residual, weights, head_weights)
        # Before the scale: its product with a whole leaf need not be written for this alone.
        largest = [_in_scale(jnp.max(jnp.abs(x)), power) for x, power in pulled if x.size]
        grads = [_in_scale(x, power) for x, power in pulled]
        return jax.tree.unflatten(self.treedef, grads), linalg.all_finite(largest)

    def _pulled(
        self, residual: Any, weights: jax.Array, head_weights: jax.Array | None
    ) -> list[tuple[jax.Array, Power]]:
        weights = jnp.asarray(weights)
        if head_weights is None:
            head_weights = jnp.ones_like(weights)
        if all(self.shared) or head_weights is weights:
            return self._scaled(residual, weights, (True,) * len(self.shared))
        pulled = self._scaled(residual, weights, self.shared)
        heads = tuple(not flag for flag in self.shared)
        of_heads = self._scaled(residual, jnp.asarray(head_weights), heads)
        pairs = zip(pulled, of_heads, self.shared, strict=True)
        return [grad if flag else head for grad, head, flag in pairs]

    def _scaled(
        self, residual: Any, weights: jax.Array, wanted: Sequence[bool]
    ) -> list[tuple[jax.Array, Power]]:
        """Returns ``pull`` in units in which no cotangent overflows where no row does.

        Each wanted leaf comes with the factors of a power of two that it is yet to be scaled by.
        """
        weights = weights.astype(linalg.accumulation_dtype(weights))
        if not self.scales:
            grads = self.pull(residual, lax.optimization_barrier(weights), wanted)
            return [(grad, None) for grad in grads]
        _, exponent = jnp.frexp(jnp.max(jnp.abs(weights)))
        grads = self.pull(residual, linalg.ldexp(weights, -exponent), wanted)
        dtypes = {
            linalg.accumulation_dtype(x) for x, flag in zip(grads, wanted, strict=True) if flag
        }
        powers = {dtype: linalg.powers_of_two(exponent, dtype) for dtype in dtypes}
        return [
            (grad, powers[linalg.accumulation_dtype(grad)] if flag else None)
            for grad, flag in zip(grads, wanted, strict=True)
        ]


def _in_scale(x: jax.Array, power: Power) -> jax.Array:
    """Multiplies by a power of two, given as two factors."""
    if power is None:
        return x
    first, second = power
    return (x.astype(first.dtype) * first * second).astype(x.dtype)
