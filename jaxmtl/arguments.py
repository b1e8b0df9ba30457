"""How all routes from losses to gradients read their arguments: as `jax.vmap` does."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmtl.checks import check_int
from jaxmtl.names import Aux, stack_losses
from jaxmtl.types import PyTree


def check_callable(fun: Any, what: str) -> None:
    """Raises a ValueError unless a function was passed."""
    if not callable(fun):
        raise ValueError(f"expected {what}, got {type(fun).__name__}; pass the function itself")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises a ValueError unless ``chunk_size`` is a positive int or None."""
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, fix="it is how many gradients exist at a time")


def parameters(params: PyTree) -> tuple[list[jax.Array], Any]:
    """Returns the leaves of the parameters and their structure.

    Raises:
      ValueError: There are none, or one is not of floating point.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not paths:
        raise ValueError(
            "expected parameters to differentiate, got an empty pytree; pass them as the first "
            "argument"
        )
    for path, leaf in paths:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"expected floating point parameters, got {dtype} at "
                f"{jax.tree_util.keystr(path) or 'params'}; pass it among the other arguments, or "
                "split the tree (nnx.split, eqx.partition)"
            )
    return [jnp.asarray(leaf) for _, leaf in paths], treedef


def shared_leaves(shared: Any, params: PyTree) -> tuple[bool, ...]:
    """Returns for each leaf of ``params`` whether it is part of the Gramian.

    Args:
      shared: None for all, a pytree prefix of booleans, or a function of the leaf's path.
      params: The parameters.

    Raises:
      ValueError: It does not match the parameters, is not boolean, or leaves nothing.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if shared is None:
        return (True,) * len(paths)
    if callable(shared):
        flags = [shared(path) for path in paths]
    else:
        try:
            flags = jax.tree.leaves(jax.tree.broadcast(shared, params))
        except ValueError as error:
            raise ValueError(
                "expected shared to be a prefix of the structure of params, or a function of the "
                f"path of a leaf, got {shared}"
            ) from error
    for path, flag in zip(paths, flags, strict=True):
        if not isinstance(flag, bool):
            raise ValueError(
                f"expected True or False for {jax.tree_util.keystr(path)} in shared, got {flag!r};"
                " the choice is static"
            )
    if not any(flags):
        raise ValueError(
            "expected at least one shared parameter, got none; the Gramian would be zero"
        )
    return tuple(flags)


def call_losses(losses_fn: Any, has_aux: bool, *args: Any, **kwargs: Any) -> tuple[jax.Array, Aux]:
    """Calls a losses function; returns the losses as one array, and aux with their names.

    Raises:
      ValueError: It returns neither one floating point array nor a dict of scalars, or no pair
        with ``has_aux``.
    """
    losses, aux = losses_fn(*args, **kwargs), None
    if has_aux:
        if not isinstance(losses, tuple) or len(losses) != 2:
            raise ValueError(
                f"expected (losses, aux) with has_aux=True, got {type(losses).__name__}; return a "
                "pair, or drop has_aux"
            )
        losses, aux = losses
    if isinstance(losses, Mapping):
        losses, names = stack_losses(losses)
        return losses, Aux(aux, names)
    if not jax.tree_util.all_leaves([losses]):
        raise ValueError(
            f"expected losses_fn to return the losses as one array or as a dict of scalars, got "
            f"{jax.tree.structure(losses)}; stack them with jnp.stack, name them in a dict, and "
            "with auxiliary outputs pass has_aux=True"
        )
    losses = jnp.asarray(losses)
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"expected floating point losses, got {losses.dtype}; return real numbers")
    return losses, Aux(aux)


def check_task_losses(shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless ``shape`` is that of m task losses."""
    if len(shape) != 1:
        fix = "stack one scalar per task with jnp.stack"
        if len(shape) == 2:
            fix = "average over the batch, jnp.mean(losses, axis=0)"
        raise ValueError(
            f"expected losses_fn to return the (m,) vector of the m task losses, got shape "
            f"{shape}; {fix}, or pass in_axes= if the function takes one example"
        )
    if not shape[0]:
        raise ValueError("expected at least one task, got losses of shape (0,) (m = 0)")


def check_example_losses(shape: tuple[int, ...]) -> None:
    """Raises a ValueError if an example has no loss."""
    if 0 in shape:
        raise ValueError(
            f"expected at least one loss per example, got shape {shape} (m = 0); return a scalar "
            "or an array of losses"
        )


@dataclasses.dataclass(frozen=True)
class Examples:
    """Parameters and arguments, matched with ``in_axes``.

    Attributes:
      size: The number of examples.
      own: For each leaf of the parameters, whether each example has a slice of its own.
      mapped: The mapped leaves of the arguments, with examples on their leading axis.
      leaves: All leaves of the arguments.
      is_mapped: For each of them, whether it is mapped; the others are passed as they are.
      treedef: The structure of the arguments.
    """

    size: int
    own: tuple[bool, ...]
    mapped: list[jax.Array]
    leaves: list[Any]
    is_mapped: list[bool]
    treedef: Any

    def arguments(self, mapped: Sequence[jax.Array]) -> tuple[Any, ...]:
        """Returns the arguments of one example, given its mapped leaves."""
        found = iter(mapped)
        pairs = zip(self.leaves, self.is_mapped, strict=True)
        return jax.tree.unflatten(self.treedef, [next(found) if m else x for x, m in pairs])

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Splits leaves of the parameters into those that examples share and those they own."""
        pairs = list(zip(leaves, self.own, strict=True))
        return [x for x, own in pairs if not own], [x for x, own in pairs if own]

    def join(self, common: Sequence[Any], own: Sequence[Any]) -> list[Any]:
        """Puts together what `split` took apart."""
        sides = iter(common), iter(own)
        return [next(sides[flag]) for flag in self.own]


def match(in_axes: Any, params: PyTree, args: tuple[Any, ...]) -> Examples:
    """Matches ``in_axes`` with parameters and arguments, as `jax.vmap` does.

    Args:
      in_axes: For ``(params, *args)``; in the entry for params 0 stands for leaves that are stacked
        over examples, each of which has a slice of its own.
      params: The parameters.
      args: The arguments after them.

    Raises:
      ValueError: They do not match, batch sizes differ, or nothing is mapped.
    """
    example = f"in_axes={(None,) + (0,) * len(args)}"
    if not isinstance(in_axes, tuple | list) or len(in_axes) != 1 + len(args):
        raise ValueError(
            f"expected in_axes with {1 + len(args)} entries, one entry for params and one per "
            f"argument ({len(args)}), got {in_axes!r}; write for instance {example}"
        )
    sizes: dict[str, int] = {}
    param_axes = _axes(in_axes[0], params, "params", sizes)
    if any(axis not in (0, None) for axis in param_axes):
        raise ValueError(
            f"expected None or 0 for params in in_axes, got {in_axes[0]!r}; examples share the "
            f"parameters ({example}), or own slices along their leading axis"
        )
    axes = _axes(tuple(in_axes[1:]), args, "args", sizes)
    if not sizes:
        raise ValueError(
            f"expected in_axes to map at least one array, got no batched argument in "
            f"{tuple(in_axes)}; give the axis of examples of the data, for instance {example}"
        )
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        got = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        empty = " (m = 0)" if 0 in sizes.values() else ""
        raise ValueError(
            f"expected all batched arguments to have one positive batch size, got: {got}{empty}; "
            "correct in_axes or the data"
        )
    leaves, treedef = jax.tree.flatten(args)
    mapped = [
        x if axis == 0 else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(leaves, axes, strict=True)
        if axis is not None
    ]
    return Examples(
        next(iter(sizes.values())),
        tuple(axis == 0 for axis in param_axes),
        mapped,
        leaves,
        [axis is not None for axis in axes],
        treedef,
    )


def _axes(prefix: Any, tree: PyTree, what: str, sizes: dict[str, int]) -> list[int | None]:
    """Returns the axis of each leaf, or None; adds the lengths of these axes to ``sizes``."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    axes: list[Any] = []
    try:
        jax.tree.map(
            lambda axis, sub: axes.extend([axis] * len(jax.tree.leaves(sub))),
            prefix,
            tree,
            is_leaf=lambda x: x is None,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"expected in_axes that match the arguments as in jax.vmap, got {prefix!r} for {what} "
            f"of structure {treedef}; use an int or None per argument, or a prefix of its structure"
        ) from error
    for i, ((path, leaf), axis) in enumerate(zip(paths, axes, strict=True)):
        if axis is None:
            continue
        name, shape = what + jax.tree_util.keystr(path), np.shape(leaf)
        if type(axis) is not int or not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"expected an axis {axis!r} of examples in {name}, got "
                f"{type(leaf).__name__} of shape {shape}; put None in in_axes for what examples "
                "share"
            )
        axes[i] = axis % len(shape)
        sizes[name] = shape[axes[i]]
    return axes
