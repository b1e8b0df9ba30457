"""Wrong input, in one sentence: expected, got, how to fix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def parameters(params: PyTree) -> tuple[list[Any], Any, list[str]]:
    """Return the leaves of the parameters, their structure and their names.

    Raises:
      ValueError: There are none, or one is not of floating point.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not paths:
        raise ValueError(
            "expected parameters to differentiate, got an empty pytree; pass them as the first "
            "argument"
        )
    names = [jax.tree_util.keystr(path) or "params" for path, _ in paths]
    for name, (_, leaf) in zip(names, paths, strict=True):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"expected floating point parameters, got {dtype} at {name}; pass it among the "
                "other arguments, or split the tree (nnx.split, eqx.partition)"
            )
    return [jnp.asarray(leaf) for _, leaf in paths], treedef, names


def batch_axes(in_axes: Any, args: tuple[Any, ...]) -> tuple[list[Any], Any, list[Any], int]:
    """Match `in_axes` with the arguments, as `jax.vmap` does.

    Args:
      in_axes: for `(params, *args)`.
      args: the arguments after the parameters.

    Returns:
      The leaves of `args`, their structure, the axis or None of each leaf, and the batch size.

    Raises:
      ValueError: They do not match, batch sizes differ, or nothing is batched.
    """
    if isinstance(in_axes, int):
        raise ValueError(
            f"expected in_axes with an entry for params and one per argument, got {in_axes}; "
            "params are not batched, so write for instance in_axes=(None, 0)"
        )
    if len(in_axes) != 1 + len(args):
        raise ValueError(
            f"expected in_axes with {1 + len(args)} entries, for params and {len(args)} "
            f"argument(s), got {tuple(in_axes)}; write for instance in_axes="
            f"{(None,) + (0,) * len(args)}"
        )
    if jax.tree.leaves(in_axes[0]):
        raise ValueError(
            f"expected None for params in in_axes, got {in_axes[0]}; all examples share the "
            "parameters, so write for instance in_axes=(None, 0)"
        )
    leaves, treedef = jax.tree.flatten(args)
    try:
        axes_tree = jax.tree.broadcast(tuple(in_axes[1:]), args, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"expected in_axes that match the arguments as in jax.vmap, got {tuple(in_axes)} for "
            f"arguments of structure {treedef}; use an int or None per argument, or a prefix of "
            "its structure"
        ) from error
    axes = jax.tree.leaves(axes_tree, is_leaf=lambda x: x is None)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(args)]
    sizes: dict[str, int] = {}
    for i, (name, leaf, axis) in enumerate(zip(paths, leaves, axes, strict=True)):
        if axis is None:
            continue
        ndim = jnp.ndim(leaf)
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"expected an axis {axis} of examples in args{name}, got shape "
                f"{jnp.shape(leaf)}; put None in in_axes for arguments that examples share"
            )
        axes[i] = axis % ndim
        sizes[f"args{name}"] = jnp.shape(leaf)[axis]
    if not sizes:
        raise ValueError(
            f"expected in_axes to batch at least one array, got {tuple(in_axes)} for arguments "
            f"with {len(leaves)} array(s); give the axis of examples of the data, for instance 0"
        )
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(
            f"expected one number of examples in all batched arguments, got: {got}; check in_axes"
        )
    size = next(iter(sizes.values()))
    if not size:
        raise ValueError("expected at least one example, got a batch of size 0 (m = 0)")
    return leaves, treedef, axes, size


def example_loss(shape: tuple[int, ...], dtype: Any) -> None:
    """Check the loss of one example.

    Raises:
      ValueError: It is not a floating point scalar.
    """
    if shape != ():
        raise ValueError(
            f"expected the loss of one example, a scalar, got shape {shape}; with in_axes the "
            "function sees one example, without its batch axis: return its loss, or drop in_axes "
            "if this is a vector of task losses"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected a floating point loss, got {dtype}; return a real number")


def task_losses(shape: tuple[int, ...], dtype: Any) -> None:
    """Check the losses of all tasks.

    Raises:
      ValueError: They are not a floating point vector with at least one entry.
    """
    if len(shape) != 1:
        raise ValueError(
            f"expected the (m,) vector of task losses, got shape {shape}; stack one scalar per "
            "task with jnp.stack, or give in_axes if this is the loss of one example"
        )
    if not shape[0]:
        raise ValueError("expected at least one task, got losses of shape (0,) (m = 0)")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected floating point losses, got {dtype}; return real numbers")


def shared_leaves(shared: Any, params: PyTree) -> list[bool]:
    """Return for each leaf of `params` whether it is part of the Gramian.

    Args:
      shared: None for all, a pytree prefix of booleans, or a function of the leaf's path.
      params: the parameters.

    Raises:
      ValueError: It does not match the parameters, is not boolean, or leaves nothing.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if shared is None:
        return [True] * len(paths)
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
    return flags


def named(fun: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Check that a function was passed.

    Raises:
      ValueError: It is not callable.
    """
    if not callable(fun):
        raise ValueError(f"expected {what}, got {type(fun).__name__}; pass the function itself")
    return fun


__all__: Sequence[str] = [
    "batch_axes",
    "example_loss",
    "named",
    "parameters",
    "shared_leaves",
    "task_losses",
]
