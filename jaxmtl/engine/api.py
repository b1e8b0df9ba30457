"""The public functions of the engine: Gramian, weighted gradient, explanation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl import base, checks, keywords, linalg
from jaxmtl.engine import routes
from jaxmtl.engine.route import Options
from jaxmtl.separate import Losses
from jaxmtl.types import Aggregator, PyTree


def value_and_gramian(
    losses_fn: Losses,
    *,
    in_axes: Any = None,
    encoder: Callable[..., Any] | None = None,
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, jax.Array, jax.tree_util.Partial]]:
    """Makes a function that returns losses, their Gramian ``J J^T`` and the map ``w -> J^T w``.

    The Jacobian J of the m losses is never formed. With ``in_axes``, one objective per example, one
    backward pass gives the Gramian: each layer adds the inner products of its inputs times those of
    its output cotangents, and where that is dearer, or no such rule is known, the gradients of the
    examples with respect to this parameter alone (`explain` tells which). Without, m tasks over one
    batch, the losses are pulled back to the outputs of layers, about a third of a gradient for each
    task, and inner products are taken there likewise; or, with ``chunk_size``, that many gradients
    at a time are pulled back and pushed forward again, which takes less memory. For separate data,
    one function and one batch per task, each loss costs one forward and one backward pass; rows of
    parameters that it does not depend on are not formed.

    Args:
      losses_fn: ``losses_fn(params, *args, **kwargs) -> (m,)``; with ``in_axes``, the loss of one
        example, ``losses_fn(params, *example, **kwargs) -> ()``, or its losses of any shape, those
        of the first example first; with ``encoder``, ``losses_fn(params, z, *args, **kwargs) ->
        (m,)``. A dict of scalars in place of ``(m,)`` names the tasks; they are in the sorted order
        of the names. A dict or tuple of functions ``loss(params, batch, **kwargs) -> ()`` is one
        per task, called with one dict or tuple of batches; see `jaxmtl.value_and_jacobian`.
      in_axes: Which axes of ``(params, *args)`` run over examples, as in `jax.vmap`; keywords are
        never mapped. In the entry for params, None (or a tree with None) stands for what examples
        share, 0 for leaves ``(B, *s)`` of which each example has a slice: a head per task. Separate
        batches of equal shape, stacked, are such examples.
      encoder: ``encoder(params, *args) -> z``. The Gramian is then that of the gradients with
        respect to z, one pass through the encoder whatever m is.
      shared: A pytree prefix of booleans, or a function of a leaf's path: parameters marked False
        stay out of the Gramian, and the pullback gives them ``J^T h`` in place of ``J^T w``.
      has_aux: Whether ``losses_fn`` returns ``(losses, aux)``; see `jaxmtl.value_and_jacobian`.
      chunk_size: How many gradients exist at a time, without ``in_axes``. If None the cotangents of
        all tasks at one layer do in their place; one gradient after the other where this takes
        fewer operations, these cotangents more than 1 GiB, or the model has checkpoints, lies on
        several devices or is an ``encoder``; all m where there is no forward mode. For separate
        data all m if None; else ``chunk_size = c`` of them are kept at a time, beside the one that
        they are compared with, at the price of up to ``m (m / c + 1) / 2`` backward passes for the
        Gramian and m for the weighted sum, as `explain` tells.

    Returns:
      A function ``(params, *args, **kwargs) -> (losses, gramian, pullback)``, or ``((losses, aux),
      gramian, pullback)``. ``losses`` has shape ``(m,)``, or is a dict if they have names (with
      ``in_axes``, of arrays over examples); ``gramian`` has shape ``(m, m)`` in the
      widest dtype of the parameters, at least float32; ``pullback(weights, head_weights=None)`` is
      a `jax.tree_util.Partial` that returns a pytree like params. ``head_weights`` (h above) are
      ones if None. With ``in_axes``, aux is stacked over examples.

    Raises:
      ValueError: The losses have the wrong shape, ``in_axes``, keys or batch sizes do not match,
        parameters are not of floating point, options exclude each other, or no loss takes a
        keyword.

    **Reference**: P. Quinton, V. Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
    section 6 and algorithm 3.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.engine import value_and_gramian
    >>> def example_loss(params, x):
    ...     return jnp.vdot(params, x) ** 2 / 2
    >>> params, batch = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> fun = value_and_gramian(example_loss, in_axes=(None, 0))
    >>> losses, gramian, pullback = fun(params, batch)
    >>> print(losses)
    [0.5 4.5]
    >>> print(gramian)  # of the gradients (1, 0) and (3, 3)
    [[ 1.  3.]
     [ 3. 18.]]
    >>> print(pullback(jnp.array([1.0, 0.5])))
    [2.5 1.5]
    """
    options = Options(losses_fn, in_axes, encoder, shared, has_aux, chunk_size)

    def evaluate(
        params: PyTree, *args: Any, **kwargs: Any
    ) -> tuple[Any, jax.Array, jax.tree_util.Partial]:
        keywords.check(options.takes(len(args)), kwargs)
        found = routes.evaluate(options, params, args, kwargs=kwargs)
        value = found.aux.returned(found.losses, has_aux, in_axes is not None)
        return value, found.gramian(), found.pullback

    return evaluate


def value_and_grad(
    losses_fn: Losses,
    aggregator: Aggregator,
    *,
    in_axes: Any = None,
    encoder: Callable[..., Any] | None = None,
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[tuple[Any, PyTree], PyTree]]:
    """Makes a function that returns losses and the aggregated gradient, without the Jacobian.

    The same as `value_and_gramian`, then ``aggregator.weighting.update``, then ``pullback``. A rule
    that does not read the Gramian costs one forward and one backward pass. A step whose weights or
    gradients are not finite gives zero gradients, keeps the state and adds one to ``mtl_skipped``.

    Args:
      losses_fn: See `value_and_gramian`.
      aggregator: A `jaxmtl.Aggregator` that has a weighting; with ``encoder`` a coordinate rule
        too. That acts on the m gradients at z, in the place of parameters: its state comes from
        ``aggregator.init(z)``, its update goes back through the encoder, and what reaches the
        parameters past z is summed over the tasks.
      in_axes: See `value_and_gramian`.
      encoder: See `value_and_gramian`; z is passed to the rule as ``features``.
      shared: See `value_and_gramian`. The other parameters get ``J^T h``, with h ones for rules
        that read the Gramian, the weights themselves for those that do not, and
        ``aggregator.weighting.head_weights(state, task_mask=None)`` where there is such a function.
      has_aux: See `value_and_gramian`.
      chunk_size: See `value_and_gramian`.

    Returns:
      A function ``(params, state, *args, **extra) -> ((losses, state), grads)``, or ``(((losses,
      aux), state), grads)``, with grads like params. Positional arguments go to ``losses_fn``.
      Keywords go to the rule if it reads them (``preference``, ``key``, ``previous_batch_losses``,
      names of its own; ``task_mask`` always), else to ``losses_fn`` if it takes them (unmapped
      under ``in_axes``); inputs of other rules are ignored, as in optax. Inputs over tasks may be
      dicts with the names of the losses.

    Raises:
      ValueError: The aggregator has no weighting (and there is no encoder), the state is not its
        own, a keyword is read by both or taken by neither, or as in `value_and_gramian`.

    >>> import jax.numpy as jnp
    >>> from jaxmtl import base
    >>> from jaxmtl.engine import value_and_grad
    >>> mean = base.from_weighting(lambda m: jnp.full(m, 1 / m))
    >>> def losses_fn(params, targets):
    ...     return (params - targets) ** 2 / 2
    >>> params, state = jnp.zeros(2), mean.init(jnp.zeros(2))
    >>> step = value_and_grad(losses_fn, mean)
    >>> (losses, state), grads = step(params, state, jnp.array([1.0, 2.0]))
    >>> print(losses, grads)
    [0.5 2. ] [-0.5 -1. ]
    """
    options = Options(losses_fn, in_axes, encoder, shared, has_aux, chunk_size)
    of_rows = getattr(aggregator, "weighting", None) is None
    if encoder is not None and of_rows and getattr(aggregator, "rule", None) is not None:
        return _value_and_grad_of_features(options, aggregator)
    weighting = checks.check_weighting(aggregator)
    rule = getattr(weighting, "rule", None)
    reads_gramian = rule is None or "gramian" in rule.needs

    def evaluate(params: PyTree, state: PyTree = None, *args: Any, **extra: Any) -> Any:
        checks.check_state(rule, state)
        extra, kwargs = keywords.split(weighting, options.takes(len(args)), extra)
        found = routes.evaluate(options, params, args, reads_gramian, kwargs)
        if encoder is not None:
            extra.setdefault("features", found.features)
        checks.check_names(rule, found.aux.names)
        extra = checks.stack_named(extra, found.aux.names)
        losses = linalg.whole(lax.stop_gradient(found.losses))
        gramian = None
        if rule is None:
            gramian = lax.stop_gradient(found.gramian())
        elif reads_gramian:
            gramian, extra["log2_scale"] = lax.stop_gradient(found.balanced_gramian())
        if rule is not None:
            dtype = linalg.accumulation_dtype(losses, params)
            extra |= {"m": losses.shape[0], "dtype": dtype}
        weights, new_state = weighting.update(gramian, state, losses=losses, **extra)
        weights = lax.stop_gradient(weights)
        mask = extra.get("task_mask")
        heads = _head_weights(weighting, reads_gramian, weights, state, mask)
        pull: Any = found.pullback.func  # a Pull
        grads, ok = pull.checked(*found.pullback.args, weights, heads)
        grads, new_state = _skip_together(ok, grads, new_state, state)
        value = found.aux.returned(found.losses, has_aux, in_axes is not None)
        return (value, new_state), grads

    return evaluate


def _skip_together(
    ok: jax.Array, grads: PyTree, new_state: PyTree, state: PyTree
) -> tuple[PyTree, PyTree]:
    if hasattr(state, "mtl_skipped"):  # A step that the rule skips is one for heads too.
        ok &= new_state.mtl_skipped == state.mtl_skipped
    grads = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), grads)
    return grads, base.skip_unless(ok, new_state, state)


def _value_and_grad_of_features(options: Options, aggregator: Aggregator) -> Callable[..., Any]:
    """Makes `value_and_grad` of a coordinate rule on the gradients at the features."""
    rule: Any = aggregator.rule

    def evaluate(params: PyTree, state: PyTree = None, *args: Any, **extra: Any) -> Any:
        checks.check_state(rule._replace(num_tasks=None), state)  # it logs nothing
        extra, kwargs = keywords.split(aggregator, options.takes(len(args)), extra)
        found: Any = routes.evaluate(options, params, args, True, kwargs)
        extra.setdefault("features", found.features)
        checks.check_names(rule, found.aux.names)
        extra = checks.stack_named(extra, found.aux.names)
        losses = linalg.whole(lax.stop_gradient(found.losses))
        rows = lax.stop_gradient(found.feature_rows())
        update, new_state = aggregator.update(rows, state, found.features, losses=losses, **extra)
        mask = extra.get("task_mask")
        heads = jnp.ones_like(losses) if mask is None else jnp.where(mask, 1, 0)
        grads = found.pull_features(lax.stop_gradient(update), heads.astype(losses.dtype))
        ok = linalg.all_finite(grads)
        grads, new_state = _skip_together(ok, grads, new_state, state)
        value = found.aux.returned(found.losses, options.has_aux, False)
        return (value, new_state), grads

    return evaluate


def _head_weights(
    weighting: Any, reads_gramian: bool, weights: jax.Array, state: PyTree, task_mask: Any
) -> jax.Array:
    rule = getattr(weighting, "head_weights", None)
    if rule is not None:
        return lax.stop_gradient(rule(state, task_mask=task_mask))
    if not reads_gramian:
        return weights
    ones = jnp.ones_like(weights)
    return ones if task_mask is None else jnp.where(task_mask, ones, 0)


def cross_gramian(
    losses_fn: Losses,
    *,
    in_axes: Any = None,
    encoder: Callable[..., Any] | None = None,
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[[PyTree, tuple[Any, ...], tuple[Any, ...]], jax.Array]:
    """Makes a function that returns ``J_1 J_2^T`` for two batches, as stochastic rules need it.

    Args:
      losses_fn: See `value_and_gramian`, as all keywords.
      in_axes: See `value_and_gramian`.
      encoder: See `value_and_gramian`.
      shared: See `value_and_gramian`.
      has_aux: See `value_and_gramian`; aux is dropped.
      chunk_size: See `value_and_gramian`.

    Returns:
      A function ``(params, args1, args2, **kwargs) -> (m1, m2)``, where ``args1`` and ``args2`` are
      the tuples of arguments after params for the two batches. At least float32.

    Raises:
      ValueError: As in `value_and_gramian`, or if a tuple of arguments is not one.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.engine import cross_gramian
    >>> def losses_fn(params, batch):
    ...     return batch @ params
    >>> first, second = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[2.0, 3.0], [0.0, 1.0]])
    >>> print(cross_gramian(losses_fn)(jnp.ones(2), (first,), (second,)))
    [[2. 0.]
     [5. 1.]]
    """
    options = Options(losses_fn, in_axes, encoder, shared, has_aux, chunk_size)

    def evaluate(
        params: PyTree, args1: tuple[Any, ...], args2: tuple[Any, ...], **kwargs: Any
    ) -> jax.Array:
        for args in (args1, args2):
            if not isinstance(args, tuple):
                raise ValueError(
                    f"expected the arguments of each batch as a tuple, got {type(args).__name__}; "
                    "write cross_gramian(losses_fn)(params, (batch1,), (batch2,))"
                )
        for args in (args1, args2):
            keywords.check(options.takes(len(args)), kwargs)
        first, second = (
            routes.evaluate(options, params, args, kwargs=kwargs) for args in (args1, args2)
        )
        return first.cross(second)

    return evaluate


class Explanation(str):
    """Text that prints as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(
    losses_fn: Losses,
    params: PyTree,
    *args: Any,
    in_axes: Any = None,
    encoder: Callable[..., Any] | None = None,
    shared: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> Explanation:
    """Tells how the Gramian of a losses function is computed; nothing is run.

    Args:
      losses_fn: See `value_and_gramian`, as all keywords.
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.
      *args: The arguments of ``losses_fn``, likewise.
      in_axes: See `value_and_gramian`.
      encoder: See `value_and_gramian`.
      shared: See `value_and_gramian`.
      has_aux: See `value_and_gramian`.
      chunk_size: See `value_and_gramian`.
      **kwargs: Keywords of ``losses_fn``; inputs of rules that it does not take are ignored.

    Returns:
      Text that names for every parameter the path it takes and why, with the operations of its
      part of the Gramian and the memory of what they work on; or how whole gradients are compared
      and why.

    >>> import jax.numpy as jnp
    >>> from jaxmtl.engine import explain
    >>> def example_loss(params, x):
    ...     return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]))
    >>> params = {"w": jnp.ones((20, 30)), "b": jnp.ones(30)}
    >>> explain(example_loss, params, jnp.ones((8, 20)), in_axes=(None, 0))
    ['b']  float32[30]      per-example rows (3.84 kFLOP, 960 B): no larger than the operands and cotangents of add
    ['w']  float32[20, 30]  structured (6.4 kFLOP, 512 B): inner products of inputs and cotangents of dot_general
    """  # noqa: E501
    options = Options(losses_fn, in_axes, encoder, shared, has_aux, chunk_size)
    taken = options.takes(len(args))
    kwargs = keywords.without_inputs(taken, kwargs)
    keywords.check(taken, kwargs)
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]
    texts: list[str] = []  # what `eval_shape` would refuse as an output

    def traced(arrays: list[jax.Array]) -> None:
        found = iter(arrays)
        full = [next(found) if flag else x for x, flag in zip(leaves, is_array, strict=True)]
        params, args, kwargs = jax.tree.unflatten(treedef, full)
        texts.append(routes.evaluate(options, params, args, kwargs=kwargs).explain())

    jax.eval_shape(traced, [x for x, flag in zip(leaves, is_array, strict=True) if flag])
    return Explanation(texts[0])
