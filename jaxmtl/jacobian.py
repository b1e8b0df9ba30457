"""Stacked per-task gradients of a losses function."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmtl import arguments, keywords, linalg, separate
from jaxmtl.engine import pieces, program, towers
from jaxmtl.separate import Losses
from jaxmtl.types import PyTree

# What Python that decides by values raises where these are known to a derivative outside jit alone.
_BY_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def value_and_jacobian(
    losses_fn: Losses,
    *,
    in_axes: tuple[Any, ...] | None = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes a function that computes the losses and the stacked per-task gradients.

    Layers on which one task alone depends (a head, a tower, a pass on other inputs) are passed
    backwards once for all tasks, not once for each, under ``jit`` and without ``chunk_size``. For
    this, losses are named or stacked, and after that at most scaled, masked or averaged.

    Args:
      losses_fn: ``losses_fn(params, *args, **kwargs) -> (m,)`` losses, or a dict of m scalars by
        name, whose tasks are in the sorted order of the names. With ``in_axes``:
        ``losses_fn(params, *example, **kwargs) -> ()``, the loss of ONE example; the tasks are
        then the examples, independent by construction. A loss of shape ``(k,)`` per example makes
        ``m = B k`` tasks, those of the first example first.

        For separate data a dict or tuple of functions ``loss(params, batch, **kwargs) -> ()``, one
        per task; ``args`` is then one dict or tuple of batches of the same keys, of any shapes. A
        batch that is a tuple is one argument. Each loss costs one forward and one backward pass on
        its own batch; keywords go to every loss that names them.
      in_axes: None, or a tuple like that of `jax.vmap` over ``(params, *args)``; keyword arguments
        are not batched. In the entry for params, None (or a tree with None) stands for what
        examples share, 0 for leaves ``(B, *s)`` of which each example has a slice: a head per task.
        Separate batches of equal shape, stacked, are such examples, one per task: ``in_axes=
        ({"trunk": None, "heads": 0}, 0)``.
      has_aux: Whether ``losses_fn`` returns ``(losses, aux)``. With ``in_axes``, aux is stacked;
        of several functions each returns ``(loss, aux)``, and aux is a dict or tuple like theirs.
      chunk_size: How many gradients are computed at a time; all if None. Bounds the memory of
        the computation (not that of the result); the result does not depend on it. Several
        functions are differentiated one by one whatever it is.

    Returns:
      ``f(params, *args, **kwargs) -> (losses, jacobian)``, or ``((losses, aux), jacobian)``,
      with losses of shape ``(m,)``, or a dict if they have names, and leaves ``(m, *leaf.shape)``
      in the dtype of the parameters. Safe under jit, vmap and scan.

    Raises:
      ValueError: When tracing: losses of a wrong shape, parameters that are not of floating
        point, ``in_axes`` or keys that do not match, ``chunk_size`` that is not positive, a keyword
        that no loss takes, ``in_axes`` with several functions.

    >>> import jax.numpy as jnp, jaxmtl
    >>> losses_fn = lambda params, x: jnp.stack([jnp.sum(params**2), jnp.sum(x * params)])
    >>> losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(jnp.array([1.0, 2.0]), 3.0)
    >>> print(losses)
    [5. 9.]
    >>> print(jacobian)
    [[2. 4.]
     [3. 3.]]

    Two losses, each on a batch of its own:

    >>> losses_fns = {"fit": lambda p, xy: (p @ xy[0] - xy[1]) ** 2, "size": lambda p, c: c * p @ p}
    >>> batches = {"fit": (jnp.array([1.0, 0.0]), 3.0), "size": 0.5}
    >>> losses, jacobian = jaxmtl.value_and_jacobian(losses_fns)(jnp.array([1.0, 2.0]), batches)
    >>> print(losses["fit"], losses["size"])
    4.0 2.5
    >>> print(jacobian)
    [[-4.  0.]
     [ 1.  2.]]
    """
    several = separate.is_several(losses_fn)
    if several:
        separate.check_functions(losses_fn, in_axes)
    else:
        arguments.check_callable(losses_fn, "a losses function")
    arguments.check_chunk_size(chunk_size)

    def value_and_jacobian_fn(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        leaves, treedef = arguments.parameters(params)
        keywords.check(keywords.of_losses(losses_fn, 1 + len(args)), kwargs)

        def losses_of(leaves: Sequence[jax.Array], args: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            params = jax.tree.unflatten(treedef, leaves)
            return arguments.call_losses(losses_fn, has_aux, params, *args, **kwargs)

        if several:
            tasks, aux = separate.evaluate(losses_fn, has_aux, leaves, treedef, args, kwargs)
            losses = jnp.stack([task.loss for task in tasks])
            rows: Sequence[jax.Array] = separate.jacobian(tasks, leaves)
        elif in_axes is None:
            losses, aux, rows = _of_tasks(losses_of, leaves, args, chunk_size)
        else:
            examples = arguments.match(in_axes, params, args)
            losses, aux, rows = _of_examples(losses_of, leaves, examples, chunk_size)
        jacobian = jax.tree.unflatten(treedef, rows)
        return aux.returned(losses, has_aux, in_axes is not None), jacobian

    return value_and_jacobian_fn


def _rows(
    pull: Callable[..., Any], losses: jax.Array, chunk_size: int | None
) -> tuple[jax.Array, ...]:
    """Returns the gradients of (m,) losses, stacked."""
    units = linalg.units(losses)
    if chunk_size is None or chunk_size >= losses.size:
        return jax.vmap(pull)(units)[0]
    return jax.lax.map(pull, units, batch_size=chunk_size)[0]


def _of_tasks(
    losses_of: Callable[..., Any],
    leaves: Sequence[jax.Array],
    args: tuple[Any, ...],
    chunk_size: int | None,
) -> tuple[jax.Array, Any, Sequence[jax.Array]]:
    def of_leaves(leaves: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
        losses, aux = losses_of(leaves, args)
        arguments.check_task_losses(losses.shape)
        return losses, aux

    if chunk_size is None and any(map(pieces.is_traced, leaves)):
        found = _traced_first(of_leaves, leaves)
        if found is not None:
            return found
    losses, pull, aux = jax.vjp(of_leaves, leaves, has_aux=True)
    return losses, aux, _rows(pull, losses, chunk_size)


def _traced_first(
    losses_of: Callable[..., Any], leaves: Sequence[jax.Array]
) -> tuple[jax.Array, Any, Sequence[jax.Array]] | None:
    """Returns the losses, aux and the rows, layers of one task passed once; None if it cannot."""
    structure: list[Any] = []

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        losses, aux = losses_of(leaves)
        others, treedef = jax.tree.flatten(aux)
        is_array = [isinstance(x, jax.Array) for x in others]
        kept = [None if flag else x for x, flag in zip(others, is_array, strict=True)]
        structure.append((treedef, kept, is_array))
        return [losses, *(x for x, flag in zip(others, is_array, strict=True) if flag)]

    try:
        closed = jax.make_jaxpr(flat)(*leaves)
    except _BY_VALUES:
        return None
    if closed.jaxpr.effects or pieces.has_open_rule(closed.jaxpr):
        return None
    losses, arrays, rows = _of_traced(closed, leaves)
    treedef, others, is_array = structure[0]
    left = iter(arrays)
    others = [next(left) if flag else x for x, flag in zip(others, is_array, strict=True)]
    return losses, jax.tree.unflatten(treedef, others), rows


def _of_traced(
    closed: Any, leaves: Sequence[jax.Array]
) -> tuple[jax.Array, list[jax.Array], Sequence[jax.Array]]:
    """Returns the outputs of a traced function ``leaves -> (losses, *others)``, and the rows."""
    found = towers.towers_of(closed, leaves)
    if found is not None:
        (losses, *arrays), rows = found.rows(leaves)
        return losses, arrays, rows
    run = program.as_function(closed)

    def split(leaves: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        losses, *arrays = run(*leaves)
        return losses, arrays

    losses, pull, arrays = jax.vjp(split, leaves, has_aux=True)
    return losses, arrays, _rows(pull, losses, None)


def _of_examples(
    losses_of: Callable[..., Any],
    leaves: Sequence[jax.Array],
    examples: arguments.Examples,
    chunk_size: int | None,
) -> tuple[jax.Array, Any, Sequence[jax.Array]]:
    common, stacked = examples.split(leaves)

    def one(example: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        slices, mapped = example

        def losses_of_one(leaves: list[jax.Array]) -> tuple[jax.Array, Any]:
            losses, aux = losses_of(leaves, examples.arguments(mapped))
            arguments.check_example_losses(losses.shape)
            return losses.reshape(-1), aux

        losses, pull, aux = jax.vjp(losses_of_one, examples.join(common, slices), has_aux=True)
        return losses, aux, _rows(pull, losses, chunk_size)

    data = (stacked, examples.mapped)
    if chunk_size is None or chunk_size >= examples.size:
        losses, aux, rows = jax.vmap(one)(data)
    else:
        first = jax.eval_shape(lambda data: one(jax.tree.map(lambda x: x[0], data))[0], data)
        at_a_time = max(chunk_size // first.size, 1)
        losses, aux, rows = jax.lax.map(one, data, batch_size=at_a_time)

    def merged(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    rows = [merged(_apart(x) if own else x) for x, own in zip(rows, examples.own, strict=True)]
    return merged(losses), aux, rows


def _apart(rows: jax.Array) -> jax.Array:
    """Puts the rows (B, k, *s) of slices that examples own into zeros (B, k, B, *s)."""
    diagonal = jnp.eye(rows.shape[0], dtype=bool)
    diagonal = diagonal.reshape(len(diagonal), 1, len(diagonal), *(1,) * (rows.ndim - 2))
    return jnp.where(diagonal, rows[:, :, None], 0)
