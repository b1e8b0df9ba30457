"""The choice among the routes."""

from typing import Any

import jax

from jaxmtl import separate
from jaxmtl.engine.encoder import PerFeature
from jaxmtl.engine.per_example import PerExample, over_examples
from jaxmtl.engine.per_task import PerTask
from jaxmtl.engine.route import Options, Route
from jaxmtl.engine.separate import Separate
from jaxmtl.types import PyTree


def evaluate(
    options: Options,
    params: PyTree,
    args: tuple[Any, ...],
    needs_gramian: bool = True,
    kwargs: dict[str, Any] | None = None,
) -> Route:
    """Runs the losses once and prepares the rest.

    Args:
      options: What the user asked for.
      params: The parameters.
      args: The arguments of the losses function after them.
      needs_gramian: False if only losses and pullback will be used, which then share no work with
        the Gramian.
      kwargs: Keywords of the losses function, never mapped.
    """
    kwargs = kwargs or {}
    if separate.is_several(options.losses_fn):
        return Separate(options, params, args, kwargs, needs_gramian)
    if options.encoder is not None:
        return PerFeature(options, params, args, kwargs, needs_gramian)

    def call(params: PyTree) -> tuple[jax.Array, Any]:
        return options.call(params, *args, **kwargs)

    if options.in_axes is None:
        data = jax.tree.leaves((args, kwargs))
        return PerTask(options, params, call, needs_gramian, data)
    if not needs_gramian:
        found = PerTask(options, params, over_examples(options, params, args, kwargs), False)
        if found.linear.is_linear:
            return found
    return PerExample(options, params, args, kwargs, needs_gramian)
