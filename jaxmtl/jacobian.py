"""Stacked per-task gradients of a losses function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import linalg

PyTree = Any


def check_params(params: PyTree) -> None:
    """Raises a ValueError if a parameter cannot be differentiated with respect to."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"expected floating point parameters, got {jnp.result_type(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'params'}; keep other leaves out of params, for "
                "instance by closing over them"
            )


def _check_one_array(losses: Any, what: str) -> None:
    if not jax.tree_util.all_leaves([losses]):
        raise ValueError(
            f"expected losses_fn to return {what} as one array, got "
            f"{jax.tree.structure(losses)}; stack named losses in an order that you fix, "
            "jnp.stack([losses[name] for name in names]), and with auxiliary outputs pass "
            "has_aux=True"
        )


def _check_losses(losses: jax.Array) -> None:
    _check_one_array(losses, "the m task losses")
    if jnp.ndim(losses) != 1 or not jnp.size(losses):
        raise ValueError(
            f"expected losses_fn to return the vector of the m task losses, got shape "
            f"{jnp.shape(losses)}; stack them with jnp.stack, or pass in_axes= for a function of "
            "one example that returns a scalar"
        )
    if not jnp.issubdtype(jnp.result_type(losses), jnp.floating):
        raise ValueError(f"expected floating point losses, got {jnp.result_type(losses)}")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises a ValueError unless ``chunk_size`` is a positive int or None."""
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(f"expected chunk_size to be a positive int or None, got {chunk_size!r}")


def value_and_jacobian(
    losses_fn: Callable[..., Any],
    *,
    in_axes: tuple[Any, ...] | None = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes a function that computes the losses and the stacked per-task gradients.

    Args:
      losses_fn: ``losses_fn(params, *args, **kwargs) -> (m,)`` losses. With ``in_axes``:
        ``losses_fn(params, *example) -> ()``, the loss of ONE example; the tasks are then the
        examples, independent by construction.
      in_axes: None, or a tuple like that of `jax.vmap` over ``(params, *args)``, with None for
        ``params``; keyword arguments are not batched.
      has_aux: Whether ``losses_fn`` returns ``(losses, aux)``. With ``in_axes``, aux is stacked.
      chunk_size: How many gradients are computed at a time; all if None. Bounds the memory of
        the computation (not that of the result); the result does not depend on it.

    Returns:
      ``f(params, *args, **kwargs) -> (losses, jacobian)``, or ``((losses, aux), jacobian)``,
      with losses of shape ``(m,)`` and leaves ``(m, *leaf.shape)`` in the dtype of the
      parameters. Safe under jit, vmap and scan.

    Raises:
      ValueError: When tracing: losses of a wrong shape, parameters that are not of floating
        point, ``in_axes`` that do not match, ``chunk_size`` that is not positive.

    >>> import jax.numpy as jnp, jaxmtl
    >>> losses_fn = lambda params, x: jnp.stack([jnp.sum(params**2), jnp.sum(x * params)])
    >>> losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(jnp.array([1.0, 2.0]), 3.0)
    >>> print(losses)
    [5. 9.]
    >>> print(jacobian)
    [[2. 4.]
     [3. 3.]]
    """
    check_chunk_size(chunk_size)
    if in_axes is not None:
        return _by_example(losses_fn, in_axes, has_aux, chunk_size)

    def value_and_jacobian_fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        check_params(params)

        def closed(p: PyTree) -> Any:
            return losses_fn(p, *args, **kwargs)

        if has_aux:
            losses, pull, aux = jax.vjp(closed, params, has_aux=True)
        else:
            losses, pull = jax.vjp(closed, params)
        _check_losses(losses)
        units = linalg.units(losses)

        def row(unit: jax.Array) -> PyTree:
            return pull(unit)[0]

        if chunk_size is None or chunk_size >= losses.size:
            jacobian = jax.vmap(row)(units)
        else:
            jacobian = jax.lax.map(row, units, batch_size=chunk_size)
        return ((losses, aux), jacobian) if has_aux else (losses, jacobian)

    return value_and_jacobian_fn


def batch_size(in_axes: tuple[Any, ...], args: tuple[Any, ...]) -> int:
    """Checks ``in_axes`` (for ``(params, *args)``) against ``args`` and returns the batch size."""
    if not isinstance(in_axes, tuple | list) or len(in_axes) != len(args) + 1:
        raise ValueError(
            f"expected in_axes to be a tuple with one entry for params and one per argument "
            f"({len(args) + 1} in all), got {in_axes!r}; write for instance (None, 0)"
        )
    if in_axes[0] is not None:
        raise ValueError(
            f"expected in_axes[0] to be None, since examples share the parameters, got "
            f"{in_axes[0]!r}; write (None, ...)"
        )
    sizes = set()
    for axes, arg in zip(in_axes[1:], args, strict=True):
        if axes is None:
            continue
        try:
            flat = jax.tree.map(
                lambda axis, sub: [(axis, leaf) for leaf in jax.tree.leaves(sub)],
                axes,
                arg,
                is_leaf=lambda x: x is None,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"expected in_axes to be a prefix of the arguments' structure, got {axes!r}; use "
                "an int, None, or a pytree that matches the argument"
            ) from error
        pairs = jax.tree.leaves(flat, is_leaf=lambda x: isinstance(x, tuple))
        for axis, leaf in pairs:
            if axis is None:
                continue
            shape = jnp.shape(leaf)
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"expected an argument with axis {axis} to batch over, got shape {shape}; "
                    "correct in_axes or the argument"
                )
            sizes.add(shape[axis])
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"expected all batched arguments to have one positive batch size, got "
            f"{sorted(sizes) or 'no batched argument'}; correct in_axes={in_axes!r} or the data"
        )
    return sizes.pop()


def check_example_loss(loss: jax.Array) -> jax.Array:
    """Returns the loss of one example after checking that it is a floating point scalar."""
    _check_one_array(loss, "the loss of one example")
    if jnp.ndim(loss) != 0 or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"with in_axes the function sees ONE example: expected a floating point scalar loss, "
            f"got shape {jnp.shape(loss)} of {jnp.result_type(loss)}; return the example's loss, "
            "and let in_axes do the batching"
        )
    return loss


def _by_example(
    example_loss_fn: Callable[..., Any],
    in_axes: tuple[Any, ...],
    has_aux: bool,
    chunk_size: int | None,
) -> Callable[..., tuple[Any, PyTree]]:
    def value_and_jacobian_fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        check_params(params)
        m = batch_size(in_axes, args)

        def loss_fn(p: PyTree, *example: Any) -> Any:
            result = example_loss_fn(p, *example, **kwargs)
            if has_aux:
                loss, aux = result
                return check_example_loss(loss), aux
            return check_example_loss(result)

        one = jax.value_and_grad(loss_fn, has_aux=has_aux)
        if chunk_size is None or chunk_size >= m:
            return jax.vmap(one, in_axes=tuple(in_axes))(params, *args)

        def at(index: jax.Array) -> tuple[Any, PyTree]:
            def take(axis: int | None, sub: Any) -> Any:
                if axis is None:
                    return sub
                return jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False), sub
                )

            example = jax.tree.map(take, tuple(in_axes[1:]), args, is_leaf=lambda x: x is None)
            return one(params, *example)

        return jax.lax.map(at, jnp.arange(m), batch_size=chunk_size)

    return value_and_jacobian_fn
