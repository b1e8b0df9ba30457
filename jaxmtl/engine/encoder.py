"""The route through an encoder: m losses on one representation, whose gradients are compared."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import arguments
from jaxmtl.engine import linearity, per_task
from jaxmtl.engine.program import as_function
from jaxmtl.engine.route import Options, Pull
from jaxmtl.types import PyTree


class PerFeature(per_task.Tasks):
    """The losses of m tasks, their Gramian with respect to the encoder's features."""

    of = "the features of the encoder"

    def __init__(
        self,
        options: Options,
        params: PyTree,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        needs_gramian: bool = True,
    ) -> None:
        leaves, treedef = arguments.parameters(params)
        shared = arguments.shared_leaves(options.shared, params)
        encoder: Any = options.encoder

        def of_leaves(leaves: list[jax.Array]) -> Any:
            return encoder(jax.tree.unflatten(treedef, leaves), *args)

        encode, of_encoder = _traced(of_leaves, leaves)
        self.features, pull_encoder = jax.vjp(encode, leaves)
        flat, features_tree = jax.tree.flatten(self.features)
        if not flat or not all(jnp.issubdtype(z.dtype, jnp.floating) for z in flat):
            raise ValueError(
                f"expected floating point features from the encoder, got "
                f"{[str(z.dtype) for z in flat]}; return other outputs elsewhere"
            )

        def of_features(leaves: Sequence[jax.Array], flat: Sequence[jax.Array]) -> tuple[Any, Any]:
            z = jax.tree.unflatten(features_tree, flat)
            return options.call(jax.tree.unflatten(treedef, leaves), z, *args, **kwargs)

        losses, of_losses = _traced(of_features, leaves, flat)
        linear, aux = per_task.linearize(
            lambda flat: losses(leaves, flat), flat, options.chunk_size
        )
        super().__init__(linear, aux)
        _, pull_losses, _ = jax.vjp(losses, leaves, flat, has_aux=True)
        residual = {"losses": pull_losses, "encoder": pull_encoder, "like": linear.losses}
        chunk_size = None
        if of_encoder or of_losses:
            one = functools.partial(_pull_once, features_tree, residual)
            if not linearity.is_linear(jax.make_jaxpr(one)(linear.losses)):
                chunk_size = options.chunk_size or linear.losses.shape[0]
        pull = Pull(
            treedef, shared, functools.partial(_pull, features_tree, chunk_size), needs_gramian
        )
        self.pullback = jax.tree_util.Partial(pull, residual)
        self.features_tree, self.treedef, self.shared = features_tree, treedef, shared
        self.pull_losses, self.pull_encoder = pull_losses, pull_encoder

    def feature_rows(self) -> PyTree:
        """Returns the gradients with respect to the features, leaves ``(m, *z.shape)``."""
        return jax.tree.unflatten(self.features_tree, self.linear.rows())

    def pull_features(self, update: PyTree, head_weights: jax.Array) -> PyTree:
        """Returns the gradients for an update of the features, and weights for all beside them.

        Leaves that are not shared get ``J^T h`` on every path; the others the update through the
        encoder, and ``J^T h`` on the paths that do not lead through the features.
        """
        direct, _ = self.pull_losses(head_weights.astype(self.losses.dtype))
        (through,) = self.pull_encoder(update)
        grads = [x + y for x, y in zip(direct, through, strict=True)]
        if not all(self.shared):
            heads = jax.tree.leaves(self.pullback(head_weights, head_weights))
            grads = [g if flag else h for g, h, flag in zip(grads, heads, self.shared, strict=True)]
        return jax.tree.unflatten(self.treedef, grads)


def _traced(fun: Callable[..., Any], *inputs: Any) -> tuple[Callable[..., Any], str | None]:
    """Returns a function as traced, and what custom derivative it holds."""
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*inputs)
    flat, tree = as_function(closed), jax.tree.structure(shapes)

    def again(*inputs: Any) -> Any:
        return jax.tree.unflatten(tree, flat(*jax.tree.leaves(inputs)))

    return again, per_task.first_custom(closed.jaxpr)


def _pull_once(
    features_tree: Any, residual: dict[str, Any], cotangent: jax.Array
) -> list[jax.Array]:
    direct, flat = residual["losses"](cotangent.astype(residual["like"].dtype))
    (through,) = residual["encoder"](jax.tree.unflatten(features_tree, flat))
    return [x + y for x, y in zip(direct, through, strict=True)]


def _pull(
    features_tree: Any,
    chunk_size: int | None,
    residual: dict[str, Any],
    weights: jax.Array,
    wanted: Sequence[bool],
) -> list[jax.Array]:
    one = functools.partial(_pull_once, features_tree, residual)
    if chunk_size is None:
        return one(weights)
    return per_task.weighted_rows(one, residual["like"], weights, chunk_size)
