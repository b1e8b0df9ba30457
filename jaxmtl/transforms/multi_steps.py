"""Accumulation of rows over micro-batches, the counterpart of `optax.MultiSteps`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxmtl import checks, linalg, tasks
from jaxmtl.types import INPUTS, Aggregator

PyTree = Any


class Mean(NamedTuple):
    """A running mean.

    Attributes:
      value: Pytree of arrays, at least float32; 0 where nothing has been seen.
      seen: int32, of the leading axes of ``value``: how many values each entry is the mean of.
    """

    value: PyTree
    seen: jax.Array


class CountedState(NamedTuple):
    """State of an inner chain that counts no skipped steps itself.

    Attributes:
      mtl_skipped: int32 scalar, the number of micro-batches skipped for a non-finite value.
      inner: The chain's own state.
    """

    mtl_skipped: jax.Array
    inner: PyTree


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
      mini_step: int32 scalar, micro-batches accumulated since the last step.
      gradient_step: int32 scalar, steps so far.
      rows: `Mean` of leaves (m, *leaf.shape), with seen (m,).
      inputs: `Mean` of each averaged input, by name.
      inner: The chain's own state, in a `CountedState` if it has no ``mtl_skipped``.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    rows: Mean
    inputs: dict[str, Mean]
    inner: PyTree


def _is_counter(path: tuple[Any, ...]) -> bool:
    return bool(path) and getattr(path[-1], "name", None) == "mtl_skipped"


def _count_skip(inner: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda p, x: x + 1 if _is_counter(p) else x, inner)


def _accumulate(mean: Mean, value: PyTree, valid: jax.Array) -> Mean:
    def leaf(old: jax.Array, x: jax.Array) -> jax.Array:
        shape = valid.shape + (1,) * (old.ndim - valid.ndim)
        # Not a sum: it could overflow where the mean does not.
        moved = (x.astype(old.dtype) - old) / (mean.seen + 1).reshape(shape)
        return old + jnp.where(valid.reshape(shape), moved, 0)

    return Mean(jax.tree.map(leaf, mean.value, value), mean.seen + valid)


def _has_floats(value: Any) -> bool:
    return any(
        isinstance(x, float) or jnp.issubdtype(getattr(x, "dtype", int), jnp.floating)
        for x in jax.tree.leaves(value)
    )


def multi_steps(
    inner: optax.GradientTransformation,
    k: int | Callable[[jax.Array], Any],
    *,
    num_tasks: int | None = None,
    averaged: Mapping[str, tuple[int, ...]] | None = None,
) -> Aggregator:
    """Accumulates the rows of k micro-batches, then takes one step on their mean.

    The step is that of the concatenated batch (of micro-batches of one size). In between, updates
    are zero and the state of ``inner`` is untouched. Wrap the whole chain:
    ``multi_steps(optax.chain(upgrad(), optax.adam(1e-3)), 4, num_tasks=m)``.

    Args:
      inner: A chain with an aggregator in it.
      k: Micro-batches per step, at least 1; or a schedule, a function of the number of steps so
        far, from 0.
      num_tasks: m, required.
      averaged: Shapes, by name, of further floating point inputs of ``update`` to average, such
        as ``{"features": (32, 8)}``.

    Returns:
      An `Aggregator` without ``weighting`` whose state is a `MultiStepsState`. Of the inputs,
      those over tasks (``losses``, ``cross_gramian``, ``preference`` and so on), ``value`` and
      those in ``averaged`` are averaged over the micro-batches; of ``key`` and all that is not
      floating point the last is passed on. Pass the same inputs with every micro-batch.

    Raises:
      ValueError: ``num_tasks`` is missing, ``k`` is not at least 1; when tracing, the leaves have
        no task axis, ``inner`` has no aggregator, or a floating point input is neither listed
        above nor in ``averaged``.

    **Properties**: with ``task_mask`` row i, its loss and its entries of ``cross_gramian`` are
    averaged over the micro-batches where task i is present (an entry of two tasks that never met
    is 0), and ``inner`` sees as present the tasks that were present in any. A micro-batch with a
    non-finite value, in a row or an averaged input, is dropped: every ``mtl_skipped`` of the state
    grows by one, and the step waits for one more micro-batch. In ``previous_batch_losses``,
    which belong to other batches with other masks, a non-finite entry means not known and is left
    out. The mean of cross-Gramians is as unbiased as each, but is not the cross-Gramian of the
    concatenated batches. The accumulators take m times the parameters' memory in at least float32,
    in which ``inner`` sees the mean.

    Compile the step: outside ``jit``, to choose whether to take one compiles ``inner`` each time.

    Without the Jacobian there is nothing to accumulate: the Gramian of the mean rows is not a mean
    of Gramians. Let the losses function loop over the micro-batches instead, as
    ``jnp.mean(lax.map(jax.checkpoint(micro_losses), batches), axis=0)``.

    **Differs from** `optax.MultiSteps`, which fails around an aggregator; behind one it averages
    aggregated gradients, a different method.

    >>> import jax.numpy as jnp, optax, jaxmtl
    >>> params = jnp.zeros(2)
    >>> tx = jaxmtl.multi_steps(optax.chain(jaxmtl.mgda(), optax.sgd(1.0)), 2, num_tasks=2)
    >>> state = tx.init(params)
    >>> for scale in (0.0, 2.0):
    ...     jacobian = jnp.diag(jnp.array([scale, 3.0]))
    ...     updates, state = tx.update(jacobian, state, params)
    ...     print(*updates, state.mini_step)
    0.0 0.0 1
    -0.9 -0.3 0
    """
    m = checks.require_num_tasks(num_tasks, "multi_steps")
    if not callable(k) and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"expected k to be an int of at least 1 or a schedule, got {k!r}")
    chain = optax.with_extra_args_support(inner)
    of_tasks = {name: known for name, known in INPUTS.items() if known.task_axes}
    shapes: dict[str, tuple[int, ...]] = {"value": ()}
    shapes |= {name: (m,) * known.task_axes for name, known in of_tasks.items()}
    own = {name: tuple(shape) for name, shape in (averaged or {}).items()}
    shapes |= own

    def init(params: PyTree) -> MultiStepsState:
        def mean(name: str) -> Mean:
            value = jnp.zeros(shapes[name], jnp.result_type(float))
            seen = () if name in own else shapes[name]
            return Mean(value, jnp.zeros(seen, jnp.int32))

        state = chain.init(params)
        if not any(_is_counter(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)):
            state = CountedState(jnp.zeros((), jnp.int32), state)
        step = jnp.zeros((), jnp.int32)
        means = {name: mean(name) for name in shapes}
        rows = Mean(linalg.zero_rows(params, m), jnp.zeros((m,), jnp.int32))
        return tasks.own_buffers(MultiStepsState(step, step, rows, means, state))

    def read(extra: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        inputs, last = {}, {}
        for name, value in extra.items():
            if name in shapes and value is not None:
                inputs[name] = jnp.asarray(value)
                if inputs[name].shape != shapes[name]:
                    raise ValueError(
                        f"expected {name} of shape {shapes[name]}, got {inputs[name].shape}; pass "
                        "what its rule reads, of every micro-batch alike, or correct averaged="
                    )
            elif _has_floats(value):
                shape = getattr(value, "shape", ())
                raise ValueError(
                    f"multi_steps averages floating point inputs of known shape: expected {name} "
                    f'in averaged, got none; pass averaged={{"{name}": {shape}}} to multi_steps'
                )
            else:
                last[name] = value
        return inputs, last

    def update(
        updates: PyTree,
        state: MultiStepsState,
        params: PyTree = None,
        *,
        task_mask: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, MultiStepsState]:
        if not jax.tree.leaves(updates) and params is not None:
            return updates, state
        checks.check_jacobian(updates, params, m)
        given = checks.stack_named(dict(extra, task_mask=task_mask))
        task_mask = given.pop("task_mask")
        mask = checks.check_mask(task_mask, m)
        rows = tasks.zero_absent_rows(updates, None if task_mask is None else mask)
        inputs, last = read(given)
        valid = dict.fromkeys(inputs, jnp.asarray(True))
        for name in inputs.keys() & of_tasks.keys():
            if not of_tasks[name].guarded:  # not finite: not known
                valid[name] = jnp.isfinite(inputs[name])
            else:
                valid[name] = tasks.pairs(mask) if of_tasks[name].task_axes == 2 else mask
        inputs = {name: jnp.where(valid[name], x, 0) for name, x in inputs.items()}

        new_rows = _accumulate(state.rows, rows, mask)
        means = {
            name: _accumulate(state.inputs[name], x, valid[name]) for name, x in inputs.items()
        }
        ok = linalg.all_finite((new_rows, means))  # not finite where a new value is not
        new_inputs = state.inputs | means
        counted = isinstance(state.inner, CountedState)

        def step(params: PyTree) -> tuple[PyTree, PyTree]:
            passed = {name: mean.value for name, mean in means.items()}
            for name in passed.keys() & of_tasks.keys():
                if not of_tasks[name].guarded:
                    passed[name] = jnp.where(means[name].seen > 0, passed[name], jnp.nan)
            if task_mask is not None:
                passed["task_mask"] = new_rows.seen > 0
            old = state.inner.inner if counted else state.inner
            result, new = chain.update(new_rows.value, old, params, **passed, **last)
            checks.check_shapes_stay(old, new)
            checks.check_updates(params, result)
            new = state.inner._replace(inner=new) if counted else new
            return result, jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), new, state.inner)

        def hold(params: PyTree) -> tuple[PyTree, PyTree]:
            zeros = jax.tree.map(lambda x, like: jnp.zeros_like(x, like.dtype), params, result)
            return zeros, state.inner

        result, _ = jax.eval_shape(step, params)
        period = jnp.maximum(k(state.gradient_step), 1) if callable(k) else k
        emit = ok & (state.mini_step + 1 >= period)
        result, new_inner = lax.cond(emit, step, hold, params)
        accumulated = jax.tree.map(
            lambda x: jnp.where(emit, jnp.zeros_like(x), x),
            (state.mini_step + 1, new_rows, new_inputs),
        )
        kept = (state.mini_step, state.rows, state.inputs)
        mini_step, new_rows, new_inputs = jax.tree.map(
            lambda x, y: jnp.where(ok, x, y), accumulated, kept
        )
        new_inner = jax.tree.map(
            lambda x, y: jnp.where(ok, x, y), new_inner, _count_skip(state.inner)
        )
        done = state.gradient_step + emit
        return result, MultiStepsState(mini_step, done, new_rows, new_inputs, new_inner)

    return Aggregator(init, update, None)
