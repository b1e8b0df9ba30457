"""The route through an encoder: m losses on one representation, whose gradients are compared."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import arguments
from jaxmtl.engine import per_task
from jaxmtl.engine.route import Options, Pull

PyTree = Any


class PerFeature(per_task.Tasks):
    """The losses of m tasks, their Gramian with respect to the encoder's features."""

    of = "the features of the encoder"

    def __init__(
        self, options: Options, params: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        leaves, treedef = arguments.parameters(params)
        shared = arguments.shared_leaves(options.shared, params)
        encoder: Any = options.encoder

        def encode(leaves: list[jax.Array]) -> Any:
            return encoder(jax.tree.unflatten(treedef, leaves), *args)

        self.features, pull_encoder = jax.vjp(encode, leaves)
        flat, features_tree = jax.tree.flatten(self.features)
        if not flat or not all(jnp.issubdtype(z.dtype, jnp.floating) for z in flat):
            raise ValueError(
                f"expected floating point features from the encoder, got "
                f"{[str(z.dtype) for z in flat]}; return other outputs elsewhere"
            )

        def losses(leaves: Sequence[jax.Array], flat: Sequence[jax.Array]) -> tuple[Any, Any]:
            z = jax.tree.unflatten(features_tree, flat)
            return options.call(jax.tree.unflatten(treedef, leaves), z, *args, **kwargs)

        linear, aux = per_task.linearise(lambda flat: losses(leaves, flat), flat)
        super().__init__(linear, aux, options.chunk_size)
        _, pull_losses, _ = jax.vjp(losses, leaves, flat, has_aux=True)
        residual = {"losses": pull_losses, "encoder": pull_encoder, "like": linear.losses}
        pull = Pull(treedef, shared, functools.partial(_pull, features_tree))
        self.pullback = jax.tree_util.Partial(pull, residual)


def _pull(
    features_tree: Any, residual: dict[str, Any], weights: jax.Array, wanted: Sequence[bool]
) -> list[jax.Array]:
    direct, flat = residual["losses"](weights.astype(residual["like"].dtype))
    (through,) = residual["encoder"](jax.tree.unflatten(features_tree, flat))
    return [x + y for x, y in zip(direct, through, strict=True)]
