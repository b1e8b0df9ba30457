"""The task route: m losses over one batch, at most ``chunk_size`` gradients at a time."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxmtl import arguments, linalg
from jaxmtl.engine.route import Options, Pull

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["losses", "inputs", "push", "vjp"],
    meta_fields=["reason"],
)
@dataclasses.dataclass
class Linear:
    """Losses linearised at some inputs.

    Attributes:
      losses: ``(m,)``.
      inputs: What they were linearised in, a list of arrays.
      push: ``inputs -> [(m,)]``, the map J, or None where there is no forward mode.
      vjp: ``[(m,)] -> (inputs,)``, the map J^T, where ``push`` is None.
      reason: Why there is no ``push``.
    """

    losses: jax.Array
    inputs: list[jax.Array]
    push: Callable[..., Any] | None
    vjp: Callable[..., Any] | None
    reason: str | None = None

    def pull(self, weights: jax.Array) -> list[jax.Array]:
        """Returns ``J^T w``, one array per input."""
        weights = weights.astype(self.losses.dtype)
        pullback: Any = self.vjp
        if self.push is not None:
            pullback = jax.linear_transpose(self.push, self.inputs)
        (grads,) = pullback([weights])
        return list(grads)

    def rows(self) -> list[jax.Array]:
        """Returns J, one array ``(m, *shape)`` per input."""
        return jax.vmap(self.pull)(linalg.units(self.losses))


def linearise(
    fun: Callable[..., tuple[jax.Array, Any]], inputs: Sequence[jax.Array]
) -> tuple[Linear, Any]:
    """Linearises ``inputs -> (losses, aux)``.

    Args:
      fun: Function of a list of arrays.
      inputs: Where to linearise it.

    Returns:
      The `Linear`, and aux.
    """
    inputs = list(inputs)
    closed, (losses, aux) = jax.make_jaxpr(fun, return_shape=True)(inputs)
    arguments.check_task_losses(losses.shape)
    flat = jex.jaxpr_as_fun(closed)

    def split(inputs: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        first, *rest = flat(*inputs)
        return [first], rest

    reason = _obstacle(closed, inputs)
    if reason is None:
        (losses,), push, rest = jax.linearize(split, inputs, has_aux=True)
        linear = Linear(losses, inputs, push, None)
    else:
        linearised: Any = jax.vjp(split, inputs, has_aux=True)
        (losses,), vjp, rest = linearised
        linear = Linear(losses, inputs, None, vjp, reason)
    return linear, jax.tree.unflatten(jax.tree.structure(aux), rest)


def _obstacle(closed: Any, inputs: Sequence[jax.Array]) -> str | None:
    """Returns why rows cannot be pushed through the linearised losses, or None if they can."""
    if any(jnp.finfo(x.dtype).bits < 32 for x in inputs):
        return "parameters are narrower than float32 and their rows are accumulated in float32"
    return _first_obstacle(closed.jaxpr, closed.jaxpr.invars)


def _first_obstacle(jaxpr: Any, sources: Sequence[Any]) -> str | None:
    """Returns what is wrong with the first primitive without an exact forward mode."""
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


class Tasks:
    """The losses of m tasks, linearised in what their Gramian is taken with respect to.

    See `Route`; a subclass sets ``pullback``, and ``of`` to the name of what it is.
    """

    of = "the parameters"
    features: Any = None
    pullback: jax.tree_util.Partial

    def __init__(self, linear: Linear, aux: Any, chunk_size: int | None) -> None:
        self.linear = linear
        self.losses = linear.losses
        self.aux = aux
        self.chunk_size = chunk_size

    def gramian(self) -> jax.Array:
        """Returns the ``(m, m)`` Gramian, symmetric to the last bit."""
        return linalg.symmetric(self.cross(self))

    def cross(self, other: "Tasks") -> jax.Array:
        """Returns ``J_1 J_2^T``, one chunk of columns after the other."""
        a, b = self.linear, other.linear
        dtype = linalg.accumulation_dtype(a.inputs, a.losses)
        num_a, num_b = a.losses.shape[0], b.losses.shape[0]
        push = a.push
        if push is None:
            left = a.rows()
            right = left if a is b else b.rows()
            total = jnp.zeros((num_a, num_b), dtype)
            for x, y in zip(left, right, strict=True):
                total = total + linalg.row_products(x, y, dtype)
            return total
        size = min(self.chunk_size or 1, num_b)
        num_chunks = -(-num_b // size)
        unit = jnp.pad(linalg.units(b.losses), ((0, num_chunks * size - num_b), (0, 0)))

        def column(cotangent: jax.Array) -> jax.Array:
            (losses,) = push(b.pull(cotangent))
            return losses.astype(dtype)

        if num_chunks == 1:
            return jax.vmap(column, out_axes=1)(unit)
        if size == 1:
            return lax.map(column, unit).T
        table = lax.map(jax.vmap(column), unit.reshape(num_chunks, size, num_b))
        return table.reshape(num_chunks * size, num_a)[:num_b].T

    def explain(self) -> str:
        """Tells how rows are contracted."""
        if self.linear.push is None:
            return f"all gradients of {self.of} at once, row against row: {self.linear.reason}"
        size = min(self.chunk_size or 1, self.losses.shape[0])
        return f"gradients of {self.of}, {size} at a time, pushed through the linearised losses"


class PerTask(Tasks):
    """The losses of m tasks over one batch, their Gramian with respect to shared parameters."""

    def __init__(
        self, options: Options, params: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        leaves, treedef = arguments.parameters(params)
        shared = arguments.shared_leaves(options.shared, params)

        def of_leaves(wanted: Sequence[bool]) -> tuple[Linear, Any]:
            def losses(inputs: list[jax.Array]) -> tuple[jax.Array, Any]:
                found = iter(inputs)
                full = [next(found) if w else x for x, w in zip(leaves, wanted, strict=True)]
                return options.call(jax.tree.unflatten(treedef, full), *args, **kwargs)

            return linearise(losses, [x for x, w in zip(leaves, wanted, strict=True) if w])

        linear, aux = of_leaves(shared)
        super().__init__(linear, aux, options.chunk_size)
        residual = {"shared": linear}
        if not all(shared):
            residual["heads"], _ = of_leaves([not flag for flag in shared])
        pull = Pull(treedef, shared, functools.partial(_pull, shared))
        self.pullback = jax.tree_util.Partial(pull, residual)


def _pull(
    shared: tuple[bool, ...],
    residual: dict[str, Linear],
    weights: jax.Array,
    wanted: tuple[bool, ...],
) -> list[Any]:
    found = iter(residual["shared" if wanted == shared else "heads"].pull(weights))
    return [next(found) if flag else None for flag in wanted]
