"""The task route: m losses over one batch, at most `chunk_size` gradients at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmtl import linalg
from jaxmtl.engine import checks
from jaxmtl.engine.factors import gramian_dtype, rows_block

Array = Any


@dataclasses.dataclass
class Linear:
    """Losses linearised at some inputs.

    Attributes:
      losses: `(m,)`.
      aux: whatever the function returned beside them, flat.
      inputs: what they were linearised in, a list of arrays.
      push: `inputs -> [(m,)]`, the map J, or None where there is no forward mode.
      vjp: `[(m,)] -> (inputs,)`, the map J^T, where `push` is None.
      reason: why there is no `push`.
    """

    losses: Array
    aux: list[Array]
    inputs: list[Array]
    push: Callable[..., Any] | None
    vjp: Callable[..., Any] | None
    reason: str | None = None

    def pull(self, weights: Array) -> list[Array]:
        """Return `J^T w`, one array per input."""
        return transpose(self.residual(), weights)

    def residual(self) -> Any:
        """Return what `transpose` needs, as a pytree."""
        like = [jnp.zeros((), x.dtype) for x in (self.losses,)]
        return (self.push, self.vjp, self.inputs, like)


def transpose(residual: Any, weights: Array) -> list[Array]:
    """Apply `J^T`, given `Linear.residual`."""
    push, vjp, inputs, (like,) = residual
    weights = weights.astype(like.dtype)
    pullback = vjp if push is None else jax.linear_transpose(push, inputs)
    (grads,) = pullback([weights])
    return list(grads)


def linearise(fun: Callable[..., tuple[Array, Any]], inputs: Sequence[Array]) -> tuple[Linear, Any]:
    """Linearise `inputs -> (losses, aux)`.

    Args:
      fun: function of a list of arrays.
      inputs: where to linearise it.

    Returns:
      The `Linear`, and the structure of aux.
    """
    inputs = list(inputs)
    closed, (losses, aux) = jax.make_jaxpr(fun, return_shape=True)(inputs)
    checks.task_losses(losses.shape, losses.dtype)
    flat = jex.jaxpr_as_fun(closed)

    def split(inputs: list[Array]) -> tuple[list[Array], list[Array]]:
        first, *rest = flat(*inputs)
        return [first], rest

    reason = obstacle(closed, inputs)
    pullback: Callable[..., Any]
    if reason is None:
        (losses,), push, rest = jax.linearize(split, inputs, has_aux=True)
        linear = Linear(losses, rest, inputs, push, None)
    else:
        # The stub of vjp has no overload for a function that returns a list and has aux.
        (losses,), pullback, rest = jax.vjp(split, inputs, has_aux=True)  # type: ignore[call-overload]
        linear = Linear(losses, rest, inputs, None, pullback, reason)
    return linear, jax.tree.structure(aux)


def obstacle(closed: Any, inputs: Sequence[Array]) -> str | None:
    """Return why rows cannot be pushed through the linearised losses, or None if they can."""
    if any(jnp.finfo(x.dtype).bits < 32 for x in inputs):
        return "parameters are narrower than float32 and their rows are accumulated in float32"
    return _first_obstacle(closed.jaxpr, closed.jaxpr.invars)


def _first_obstacle(jaxpr: Any, sources: Sequence[Any]) -> str | None:
    """Return what is wrong with the first primitive without an exact forward mode."""
    reached = set(sources)
    for eqn in jaxpr.eqns:
        if not any(not isinstance(v, jex.Literal) and v in reached for v in eqn.invars):
            continue
        reached.update(eqn.outvars)
        for v in eqn.outvars:
            dtype = getattr(v.aval, "dtype", bool)
            # A pushed tangent would be rounded at every step, and small eigenvalues lost.
            if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
                return f"{eqn.primitive.name} computes in {dtype}, and Gramians in float32"
        if eqn.primitive.name == "custom_vjp_call":
            return f"{eqn.primitive.name} has no forward mode"
        if eqn.primitive.name == "custom_jvp_call":
            continue
        for inner in jex.jaxprs_in_params(eqn.params):
            body = getattr(inner, "jaxpr", inner)
            found = _first_obstacle(body, body.invars)
            if found:
                return found
    return None


def cross_gramian(a: Linear, b: Linear, chunk_size: int | None) -> Array:
    """Return `J_a J_b^T`, one chunk of columns after the other.

    Args:
      a: linearised losses.
      b: linearised losses with the same inputs.
      chunk_size: how many gradients exist at a time; one if None.

    Returns:
      Array `(m_a, m_b)` of at least float32.
    """
    dtype = gramian_dtype(*a.inputs, a.losses)
    num_a, num_b = a.losses.shape[0], b.losses.shape[0]
    push = a.push
    if push is None:
        return _by_rows(a, b, dtype)
    size = min(chunk_size or 1, num_b)
    num_chunks = -(-num_b // size)
    unit = jnp.pad(linalg.units(b.losses), ((0, num_chunks * size - num_b), (0, 0)))

    def column(cotangent: Array) -> Array:
        (losses,) = push(b.pull(cotangent))
        return losses.astype(dtype)

    if num_chunks == 1:
        return jax.vmap(column, out_axes=1)(unit)
    if size == 1:
        return lax.map(column, unit).T
    table = lax.map(jax.vmap(column), unit.reshape(num_chunks, size, num_b))
    return table.reshape(num_chunks * size, num_a)[:num_b].T


def _by_rows(a: Linear, b: Linear, dtype: Any) -> Array:
    def rows(side: Linear) -> list[Array]:
        return jax.vmap(side.pull)(linalg.units(side.losses))

    left = rows(a)
    right = left if a is b else rows(b)
    total = jnp.zeros((a.losses.shape[0], b.losses.shape[0]), dtype)
    for x, y in zip(left, right, strict=True):
        total = total + rows_block(x, y, dtype)
    return total


def gramian(linear: Linear, chunk_size: int | None) -> Array:
    """Return the `(m, m)` Gramian, symmetric to the last bit."""
    total = lax.optimization_barrier(cross_gramian(linear, linear, chunk_size))
    return (total + total.T) / 2
