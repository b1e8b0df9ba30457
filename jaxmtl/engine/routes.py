"""The three ways to losses, Gramian and pullback: per example, per task, through an encoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import linalg
from jaxmtl.engine import checks, instance, tasks

Array = Any
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options:
    """What `value_and_gramian` and its relatives are told; see there."""

    losses_fn: Callable[..., Any]
    in_axes: Any = None
    encoder: Callable[..., Any] | None = None
    shared: Any = None
    has_aux: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        checks.named(self.losses_fn, "a losses function")
        if self.encoder is not None:
            checks.named(self.encoder, "an encoder function encode(params, *args) -> z")
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
        size = self.chunk_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(
                f"expected a chunk_size of at least 1, got {size!r}; it is the number of "
                "gradients that exist at a time"
            )

    def call(self, *args: Any) -> tuple[Array, Any]:
        """Return `(losses, aux)`, aux None if there is none."""
        out = self.losses_fn(*args)
        if not self.has_aux:
            return _array(out), None
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(
                f"expected (losses, aux) with has_aux=True, got {type(out).__name__}; return a "
                "pair, or drop has_aux"
            )
        return _array(out[0]), out[1]


def _array(losses: Any) -> Array:
    if len(jax.tree.leaves(losses)) != 1 or not jax.tree_util.all_leaves([losses]):
        raise ValueError(
            f"expected the losses as one array, got {jax.tree.structure(losses)}; stack them with "
            "jnp.stack, and with auxiliary outputs pass has_aux=True"
        )
    return jnp.asarray(losses)


@dataclasses.dataclass
class Evaluated:
    """The losses, and what can be asked for next.

    Attributes:
      losses: `(m,)`.
      aux: the auxiliary output.
      gramian: `() -> (m, m)`, computed only if called.
      pullback: `(weights, head_weights=None) -> grads`.
      features: z of the encoder.
      trace: what `cross` compares two of.
    """

    losses: Array
    aux: Any
    gramian: Callable[[], Array]
    pullback: jax.tree_util.Partial
    features: Any = None
    trace: Any = None


@dataclasses.dataclass(frozen=True)
class Pull:
    """`J^T w` for every leaf; leaves that are not shared take the head weights instead.

    Attributes:
      treedef: the structure of the parameters.
      shared: per leaf, whether it is shared.
      leaves: `(residual, weights, wanted) -> leaves`, right for the leaves that are wanted.
    """

    treedef: Any
    shared: tuple[bool, ...]
    leaves: Callable[..., list[Array]]

    def __call__(self, residual: Any, weights: Array, head_weights: Array | None = None) -> PyTree:
        """Return a pytree like the parameters."""
        weights = jnp.asarray(weights)
        grads = self.scaled(residual, weights, self.shared)
        if not all(self.shared):
            if head_weights is None:
                head_weights = jnp.ones_like(weights)
            heads = tuple(not flag for flag in self.shared)
            of_heads = self.scaled(residual, jnp.asarray(head_weights), heads)
            pairs = zip(grads, of_heads, self.shared, strict=True)
            grads = [grad if flag else head for grad, head, flag in pairs]
        return jax.tree.unflatten(self.treedef, grads)

    def scaled(self, residual: Any, weights: Array, wanted: Sequence[bool]) -> list[Array]:
        """Return `leaves` in units in which no cotangent overflows where no row does."""
        weights = weights.astype(linalg.accumulation_dtype(weights))
        _, exponent = jnp.frexp(jnp.max(jnp.abs(weights)))
        grads = self.leaves(residual, linalg.ldexp(weights, -exponent), wanted)

        def back(grad: Array) -> Array:
            wide = grad.astype(linalg.accumulation_dtype(grad))
            return linalg.ldexp(wide, exponent).astype(grad.dtype)

        return [back(grad) if flag else grad for grad, flag in zip(grads, wanted, strict=True)]


def evaluate(
    options: Options, params: PyTree, args: tuple[Any, ...], needs_gramian: bool = True
) -> Evaluated:
    """Run the losses once and prepare the rest.

    Args:
      options: what the user asked for.
      params: the parameters.
      args: the arguments of the losses function after them.
      needs_gramian: False if only losses and pullback will be used, which then share no work with
        the Gramian.

    Returns:
      The losses and the rest.
    """
    if options.in_axes is not None:
        return by_example(options, params, args, needs_gramian)
    if options.encoder is not None:
        return by_encoder(options, params, args)
    return by_task(options, params, args)


# --- one loss per example ---------------------------------------------------------------------


def by_example(
    options: Options, params: PyTree, args: tuple[Any, ...], needs_gramian: bool = True
) -> Evaluated:
    """Evaluate one loss per example."""
    leaves, treedef, _ = checks.parameters(params)
    shared = tuple(checks.shared_leaves(options.shared, params))
    flat, args_tree, axes, n = checks.batch_axes(options.in_axes, args)

    def one_example(leaves: list[Array], flat: list[Array]) -> tuple[Array, Any]:
        inputs = jax.tree.unflatten(args_tree, flat)
        loss, aux = options.call(jax.tree.unflatten(treedef, leaves), *inputs)
        checks.example_loss(loss.shape, loss.dtype)
        return loss, aux

    losses, aux, done = instance.forward_backward(one_example, leaves, flat, axes, n, shared)
    rows = functools.cache(lambda: instance.all_rows(done))
    kept = instance.kept_rows(done, rows) if needs_gramian else {}
    pull = Pull(treedef, shared, functools.partial(_pull_examples, done.plan))
    residual = (done.leaves, done.constants, done.residuals, done.cotangents, kept)
    return Evaluated(
        losses,
        aux,
        lambda: instance.gramian(done, rows(), n),
        jax.tree_util.Partial(pull, residual),
        trace=(done, rows, n),
    )


def _pull_examples(plan: Any, residual: Any, weights: Array, wanted: Sequence[bool]) -> list[Array]:
    *arrays, kept = residual
    return instance.weighted_gradient(instance.Pass(plan, *arrays), kept, weights, wanted)


# --- one loss per task ------------------------------------------------------------------------


def by_task(options: Options, params: PyTree, args: tuple[Any, ...]) -> Evaluated:
    """Evaluate one loss per task, the Gramian with respect to the shared parameters."""
    leaves, treedef, _ = checks.parameters(params)
    shared = tuple(checks.shared_leaves(options.shared, params))

    def of_leaves(wanted: Sequence[bool]) -> tuple[tasks.Linear, Any]:
        def losses(inputs: list[Array]) -> tuple[Array, Any]:
            found = iter(inputs)
            full = [next(found) if w else x for x, w in zip(leaves, wanted, strict=True)]
            return options.call(jax.tree.unflatten(treedef, full), *args)

        return tasks.linearise(losses, [x for x, w in zip(leaves, wanted, strict=True) if w])

    linear, aux_tree = of_leaves(shared)
    residuals = {True: linear.residual(), False: None}
    if not all(shared):
        residuals[False] = of_leaves([not flag for flag in shared])[0].residual()
    pull = Pull(treedef, shared, functools.partial(_pull_tasks, shared))
    return Evaluated(
        linear.losses,
        jax.tree.unflatten(aux_tree, linear.aux),
        lambda: tasks.gramian(linear, options.chunk_size),
        jax.tree_util.Partial(pull, residuals),
        trace=linear,
    )


def _pull_tasks(
    shared: Sequence[bool], residual: Any, weights: Array, wanted: Sequence[bool]
) -> list[Array]:
    found = iter(tasks.transpose(residual[tuple(wanted) == tuple(shared)], weights))
    return [next(found) if flag else None for flag in wanted]


# --- one loss per task, on a shared representation --------------------------------------------


def by_encoder(options: Options, params: PyTree, args: tuple[Any, ...]) -> Evaluated:
    """Evaluate one loss per task, the Gramian with respect to the encoder's features."""
    leaves, treedef, _ = checks.parameters(params)
    shared = tuple(checks.shared_leaves(options.shared, params))
    encoder = options.encoder
    assert encoder is not None

    def encode(leaves: list[Array]) -> Any:
        return encoder(jax.tree.unflatten(treedef, leaves), *args)

    features, pull_encoder = jax.vjp(encode, leaves)
    flat, features_tree = jax.tree.flatten(features)
    if not flat or not all(jnp.issubdtype(z.dtype, jnp.floating) for z in flat):
        raise ValueError(
            f"expected floating point features from the encoder, got "
            f"{[str(z.dtype) for z in flat]}; return other outputs elsewhere"
        )

    def losses(leaves: Sequence[Array], flat: Sequence[Array]) -> tuple[Array, Any]:
        z = jax.tree.unflatten(features_tree, flat)
        return options.call(jax.tree.unflatten(treedef, leaves), z, *args)

    linear, aux_tree = tasks.linearise(lambda flat: losses(leaves, flat), flat)
    _, pull_losses, _ = jax.vjp(losses, leaves, flat, has_aux=True)
    like = jnp.zeros((), linear.losses.dtype)
    residual = (pull_losses, pull_encoder, like)
    pull = Pull(treedef, shared, functools.partial(_pull_encoder, features_tree))
    return Evaluated(
        linear.losses,
        jax.tree.unflatten(aux_tree, linear.aux),
        lambda: tasks.gramian(linear, options.chunk_size),
        jax.tree_util.Partial(pull, residual),
        features=features,
        trace=linear,
    )


def _pull_encoder(
    features_tree: Any, residual: Any, weights: Array, wanted: Sequence[bool]
) -> list[Array]:
    pull_losses, pull_encoder, like = residual
    direct, flat = pull_losses(weights.astype(like.dtype))
    (through,) = pull_encoder(jax.tree.unflatten(features_tree, flat))
    return [x + y for x, y in zip(direct, through, strict=True)]


# --- two batches ------------------------------------------------------------------------------


def cross(options: Options, params: PyTree, args: tuple[Any, ...], others: tuple[Any, ...]) -> Any:
    """Return `J_1 J_2^T` of two batches."""
    a, b = evaluate(options, params, args), evaluate(options, params, others)
    if options.in_axes is None:
        return tasks.cross_gramian(a.trace, b.trace, options.chunk_size)
    (pass_a, rows_a, n_a), (pass_b, rows_b, n_b) = a.trace, b.trace
    return instance.cross_gramian(pass_a, pass_b, rows_a(), rows_b(), (n_a, n_b))
