"""Gradient tracking: moving averages of the tasks' stochastic gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmtl import base, checks, linalg, tasks

PyTree = Any
Schedule = float | Callable[[jax.Array], Any]


class TrackState(NamedTuple):
    """State of `track_gradients`.

    Attributes:
      mtl_step: int32 scalar, the number of steps so far, k - 1.
      tracked: y, pytree of leaves (m, *leaf.shape) in the dtype of the parameter, at least
        float32.
      seen: (m,) bool, the tasks that have had a gradient.
    """

    mtl_step: jax.Array
    tracked: PyTree
    seen: jax.Array


def check_schedule(name: str, value: Schedule, low: float, high: float) -> None:
    """Raises a ValueError if a constant lies outside its range; schedules pass."""
    if not callable(value):
        checks.check_range(name, value, low, high)


def rate_at(schedule: Schedule, step: jax.Array) -> jax.Array:
    """Returns the rate of step k = step + 1; k is a float, so that ``c / k`` has its precision."""
    k = (step + 1).astype(jnp.result_type(float))
    return jnp.asarray(schedule(k) if callable(schedule) else schedule)


def init_tracking(params: PyTree, num_tasks: int) -> TrackState:
    """Returns y = 0."""
    tracked = linalg.zero_rows(params, num_tasks)
    return TrackState(jnp.zeros((), jnp.int32), tracked, jnp.zeros((num_tasks,), bool))


def start_from(state: TrackState, jacobian: PyTree, initial: str, task_mask: jax.Array) -> PyTree:
    """Returns y, with the first gradient in place of zero if ``initial`` says so."""
    if initial == "zeros":
        return state.tracked
    fresh = task_mask & ~state.seen
    return jax.tree.map(
        lambda y, g: jnp.where(linalg.column(fresh, y), g.astype(y.dtype), y),
        state.tracked,
        jacobian,
    )


def track(
    state: TrackState,
    jacobian: PyTree,
    beta: Schedule,
    task_mask: jax.Array,
    *,
    initial: str = "zeros",
    max_norm: jax.Array | None = None,
) -> TrackState:
    """Takes one step of Fernando et al. 2023, eq. 7; absent tasks keep their y."""
    old = start_from(state, jacobian, initial, task_mask)
    rate = rate_at(beta, state.mtl_step)

    def leaf(y: jax.Array, g: jax.Array) -> jax.Array:
        return y - rate.astype(y.dtype) * (y - g.astype(y.dtype))

    new = jax.tree.map(leaf, old, jacobian)
    if max_norm is not None:
        norms = linalg.row_norms(new)
        bound = jnp.broadcast_to(max_norm, norms.shape).astype(norms.dtype)
        new = linalg.times_rows(
            jnp.where(norms > bound, bound / jnp.where(norms > 0, norms, 1), 1), new
        )
    new = jax.tree.map(lambda x, y: jnp.where(linalg.column(task_mask, x), x, y), new, old)
    return TrackState(state.mtl_step + 1, new, state.seen | task_mask)


def track_gradients(
    beta: Schedule = 0.99,
    *,
    num_tasks: int | None = None,
    initial: str = "zeros",
    max_norm: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the stochastic gradients of the tasks by tracked ones, with less noise.

    ``y_i <- proj(y_i - beta_k (y_i - g_i))``, the projection onto the ball of radius C_i. A row
    transform, to be chained before any aggregator: "X + MoCo" of the paper's tables is
    ``optax.chain(track_gradients(0.99, num_tasks=m), pcgrad())``.

    Args:
      beta: A number in [0, 1], or a schedule in k, which counts from 1: for instance
        ``lambda k: 0.05 / jnp.sqrt(k)``.
      num_tasks: m, required.
      initial: y_0: ``"zeros"``, or ``"first"`` for the first gradient of each task.
      max_norm: C, positive, one number or (m,); no projection if None.

    Returns:
      A transformation of leaves ``(m, *leaf.shape)``, in dtypes no narrower than those of the
      parameters, with a `TrackState`. At a step
      with a non-finite gradient the state is kept and the rows become NaN, for the aggregator
      to skip and count. Absent tasks keep their y.

    Raises:
      ValueError: ``num_tasks`` is missing, a number out of range, ``initial`` unknown; when
        tracing, ``params`` is missing or the leaves have no task axis.

    **Reference**: Fernando et al. 2023 (MoCo), eq. 7; beta is 0.05/sqrt(k) on Cityscapes, 0.99
    on NYUv2, and for tables 4-6 also 0.5/sqrt(k) and 0.99/sqrt(k).

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> tracking = jaxmtl.track_gradients(lambda k: 0.5 / k, num_tasks=2)
    >>> print(tracking.update(jacobian, tracking.init(params), params)[0])
    [[0.5 1. ]
     [1.5 2. ]]
    """
    m = checks.require_num_tasks(num_tasks, "track_gradients")
    check_schedule("beta", beta, 0, 1)
    checks.check_choice("initial", initial, ("zeros", "first"))
    bound = check_bound(max_norm, num_tasks)

    def update(
        updates: Any,
        state: TrackState,
        params: Any = None,
        *,
        task_mask: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, TrackState]:
        del extra
        if not jax.tree.leaves(updates) and params is not None:
            return updates, state
        checks.check_jacobian(updates, params, m)
        updates = base.widen(updates, params)
        mask = checks.check_mask(task_mask, m)
        rows = tasks.zero_absent_rows(updates, None if task_mask is None else mask)
        new = track(state, rows, beta, mask, initial=initial, max_norm=bound)
        ok = linalg.all_finite(new.tracked)
        result = jax.tree.map(
            lambda y, g: jnp.where(ok, y, jnp.nan).astype(g.dtype), new.tracked, updates
        )
        return result, jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, state)

    return optax.GradientTransformationExtraArgs(lambda params: init_tracking(params, m), update)


def check_bound(max_norm: Any, num_tasks: int | None) -> jax.Array | None:
    """Returns the radius or radii of the balls as an array, or None."""
    if max_norm is None or jnp.ndim(max_norm):
        return checks.check_vector("max_norm", max_norm, num_tasks, sign="positive")
    checks.check_range("max_norm", max_norm, 0, closed="right")
    return jnp.asarray(max_norm)
