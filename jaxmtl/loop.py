"""What a training loop calls beside its optimizer: checked updates, a check before it, logs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxmtl import checks, linalg, metrics
from jaxmtl.types import INPUTS, Aggregator, PyTree

OnSkip = str | Callable[[int], None] | None


def report_skips(before: PyTree, after: PyTree, on_skip: OnSkip) -> None:
    """Prints, raises or calls a function if a step between two states was skipped.

    Args:
      before: The state of an optimizer or aggregator before a step.
      after: The state after it.
      on_skip: None; ``"print"``; ``"raise"``, a FloatingPointError where the step is run (JAX
        passes it on when the result is waited for); or a function of the number of skipped steps.

    Raises:
      ValueError: ``on_skip`` is something else.
    """
    if on_skip is None:
        return
    if not callable(on_skip):
        checks.check_choice("on_skip", on_skip, ("print", "raise"))

    def count(state: PyTree) -> Any:
        return sum(n for _, n in optax.tree.get_all_with_path(state, "mtl_skipped"))

    def tell(now: Any, total: Any) -> None:
        if not np.any(now):
            return
        text = f"a step was skipped for a non-finite value ({int(np.max(total))} so far)"
        if callable(on_skip):
            on_skip(int(np.max(total)))
        elif on_skip == "raise":
            raise FloatingPointError(text)
        else:
            print(text)

    total = count(after)
    jax.debug.callback(tell, total - count(before), total)


def apply_updates(
    params: PyTree,
    updates: PyTree,
    *,
    state: tuple[PyTree, PyTree] | None = None,
    on_skip: OnSkip = None,
) -> PyTree:
    """Adds updates to parameters, as `optax.apply_updates`, after checking shapes.

    Args:
      params: Pytree of arrays.
      updates: Pytree of the same structure and shapes.
      state: The optimizer's state before and after the step, to check that its shapes stayed: they
        change where a stateful transformation stands before the aggregator.
      on_skip: With ``state``, what to do when the step was skipped for a non-finite value:
        ``"print"``, ``"raise"`` or a function of the number of skipped steps. Nothing if None.

    Returns:
      Pytree like ``params``, in its dtypes.

    Raises:
      ValueError: A shape differs, as when no aggregator is in the chain: plain optax
        would broadcast the parameters to ``(m, *shape)``.

    >>> import jax.numpy as jnp, jaxmtl
    >>> print(jaxmtl.apply_updates(jnp.ones(2), jnp.array([0.5, -1.0])))
    [1.5 0. ]
    """
    checks.check_updates(params, updates)
    if state is not None:
        checks.check_shapes_stay(*state)
        report_skips(*state, on_skip)
    elif on_skip is not None:
        raise ValueError(
            "expected state=(before, after) with on_skip=, got none; skipped steps are counted in "
            "the optimizer's state"
        )
    return optax.apply_updates(params, updates)


def check(
    optimizer: optax.GradientTransformation, params: PyTree, num_tasks: int, **inputs: Any
) -> None:
    """Checks an optimizer chain once, before the training: shapes only, nothing is run.

    ``chain(optax.adam(1e-3), jaxmtl.upgrad())`` trains without an error, by another method than the
    one intended: Adam's moments take the shape of the rows. Here it is refused.

    Args:
      optimizer: A chain with an aggregator.
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.
      num_tasks: m.
      **inputs: What ``update`` gets besides. Those over tasks (``losses`` and so on) and ``key``
        are made up where they are not given; give ``features``, ``value`` and names of your own.

    Returns:
      None.

    Raises:
      ValueError: The optimizer's state changes its shapes in a step, or the update is not shaped
        like ``params``.

    >>> import jax.numpy as jnp, jaxmtl, optax
    >>> params = {"w": jnp.zeros((3, 2))}
    >>> jaxmtl.check(optax.chain(jaxmtl.upgrad(), optax.adam(1e-3)), params, num_tasks=2)
    >>> try:
    ...     jaxmtl.check(optax.chain(optax.adam(1e-3), jaxmtl.upgrad()), params, num_tasks=2)
    ... except ValueError as error:
    ...     print(str(error).partition(",")[0])
    expected the optimizer's state to keep its shapes
    """
    checks.check_num_tasks(num_tasks)

    def rows(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((num_tasks, *jnp.shape(x)), jnp.result_type(x))

    made = {
        name: jax.ShapeDtypeStruct((num_tasks,) * known.task_axes, jnp.result_type(float))
        for name, known in INPUTS.items()
        if known.task_axes
    }
    made["key"] = jax.eval_shape(lambda: jax.random.key(0))
    chain = optax.with_extra_args_support(optimizer)

    def step(jacobian: PyTree, params: PyTree, given: dict[str, Any]) -> tuple[PyTree, ...]:
        state = chain.init(params)
        with jax.numpy_rank_promotion("allow"):  # it would hide the chain's fault behind its own
            update, new = chain.update(jacobian, state, params, **given)
        return update, state, new

    jacobian = jax.tree.map(rows, params)
    try:
        update, state, new = jax.eval_shape(step, jacobian, params, made | inputs)
    except TypeError as error:  # some wrappers of optax take no inputs of others
        if "unexpected keyword" not in str(error):
            raise
        update, state, new = jax.eval_shape(step, jacobian, params, inputs)
    checks.check_shapes_stay(state, new)
    checks.check_updates(params, update)


def frozen() -> Aggregator:
    """Makes the aggregator of a group of parameters that do not train.

    For `optax.partition`: ``partition({"train": jaxmtl.upgrad(), "frozen": jaxmtl.frozen()},
    labels)``. The group stays out of the Gramian, and its update is zero. (`optax.set_to_zero`
    leaves zero *rows* there, which nothing can tell from a missing aggregator.) Cheaper is not to
    differentiate: keep frozen parameters out of ``params``.

    Returns:
      An `Aggregator` with the empty state of optax; ``weighting`` is None.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.ones(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> print(jaxmtl.frozen().update(jacobian, jaxmtl.frozen().init(params), params)[0])
    [0. 0.]
    """

    def update(
        jacobian: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del extra
        if jax.tree.leaves(jacobian) or params is None:
            checks.check_jacobian(jacobian, params, None)
        return jax.tree.map(jnp.zeros_like, params), state

    return Aggregator(optax.init_empty_state, update, None)


def monitor(
    *,
    jacobian: PyTree | None = None,
    gramian: jax.Array | None = None,
    updates: PyTree | None = None,
    slopes: jax.Array | None = None,
    losses: Any = None,
    state: PyTree | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Gathers what is worth logging about one step, by task name.

    Usable in jit; every part is left out where its inputs are not given.

    Args:
      jacobian: Leaves (m, *leaf.shape). Without it, give ``gramian`` and ``slopes``.
      gramian: (m, m), of the Jacobian if None.
      updates: u, what is added to the parameters: after Adam or Muon, whose momentum can drown a
        rule. Shaped like one row.
      slopes: (m,), J u, where there is no Jacobian:
        ``jax.jvp(lambda p: losses_fn(p, batch), (params,), (updates,))[1]``.
      losses: (m,), or a dict by task name.
      state: An optimizer's state, with ``mtl_weights`` and ``mtl_residual`` if its aggregator was
        given ``num_tasks``.
      names: Of the tasks, in their order; those of ``losses`` if that is a dict.

    Returns:
      A dict with those of

      * ``losses``, ``weights``, ``norms`` (of the rows), ``progress`` (``<g_i, u>``, the change of
        loss i to first order: negative is better) and ``update_cosines`` (of each row with u): a
        dict by name, or (m,) without names;
      * ``cosines``: between rows, a dict by ``"a, b"`` for each pair, or (m, m) without names;
      * ``conflict_rate``, ``skipped``, ``residual``: scalars.

    Raises:
      ValueError: The number of names is not m.

    >>> import jax.numpy as jnp, jaxmtl
    >>> jacobian, updates = jnp.array([[3.0, 0.0], [0.0, 2.0]]), jnp.array([-0.1, 0.0])
    >>> log = jaxmtl.monitor(jacobian=jacobian, updates=updates, names=("depth", "normals"))
    >>> print(*(f"{name} {value:.1f}" for name, value in log["progress"].items()))
    depth -0.3 normals 0.0
    >>> print(log["update_cosines"]["depth"], log["conflict_rate"])
    -1.0 0.0
    """
    found: dict[str, Any] = {}
    if isinstance(losses, Mapping):
        names = names or checks.task_names("losses", losses)
        losses = jnp.stack([jnp.asarray(losses[name]) for name in names])
    if losses is not None:
        found["losses"] = losses
    if jacobian is not None:
        balanced, log2_scale = linalg.balanced_gramian(jacobian)
        found["norms"] = linalg.row_norms(jacobian)
    elif gramian is not None:
        balanced, log2_scale = linalg.normalize_gramian(gramian)
        squares = jnp.maximum(jnp.diagonal(balanced), 0)
        found["norms"] = linalg.ldexp(jnp.sqrt(squares), log2_scale)
    if "norms" in found:
        found["cosines"] = metrics.cosine_similarities(balanced)
        found["conflict_rate"] = metrics.conflict_rate(balanced)
    if updates is not None:
        one = jax.tree.map(lambda x: x[None], updates)
        if jacobian is not None:
            slopes = linalg.gramian(jacobian, one)[:, 0]
        if "norms" in found and slopes is not None:
            size = found["norms"] * linalg.row_norms(one)[0]
            cosines = jnp.where(size > 0, slopes / jnp.where(size > 0, size, 1), 0)
            found["update_cosines"] = jnp.clip(cosines, -1, 1)
    if slopes is not None:
        found["progress"] = slopes
    if state is not None:
        for name, key in (("weights", "mtl_weights"), ("residual", "mtl_residual")):
            parts = optax.tree.get_all_with_path(state, key)
            found |= {name: parts[0][1]} if len(parts) == 1 else {}
        counts = [n for _, n in optax.tree.get_all_with_path(state, "mtl_skipped")]
        found |= {"skipped": sum(counts)} if counts else {}
    found = jax.tree.map(lax.stop_gradient, found)
    return found if names is None else _by_name(found, tuple(names))


def _by_name(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    m, named = len(names), dict(found)
    for key, value in found.items():
        shape = jnp.shape(value)
        if shape and shape[0] != m:
            raise ValueError(
                f"expected one name per task, {shape[0]} as in {key}, got {list(names)}; give the "
                "names in the order of the tasks"
            )
        if len(shape) == 1:
            named[key] = {name: value[i] for i, name in enumerate(names)}
        elif len(shape) == 2:
            pairs = [(i, j) for j in range(m) for i in range(j)]
            named[key] = {f"{names[i]}, {names[j]}": value[i, j] for i, j in pairs}
    return named
