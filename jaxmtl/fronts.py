"""Pareto fronts: train one in a single compiled run, filter it, measure it.

Points are objective vectors to be minimised, ``(k, m)``: k points, m objectives. Everything here
has static shapes, so that it runs inside ``jit``, ``vmap`` and ``scan``: a filter returns a mask,
and what measures a front takes one.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxmtl.engine import value_and_grad
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.loop import apply_updates
from jaxmtl.types import Aggregator

PyTree = Any

_BATCH = 256  # points that are compared with all others at a time


def _points(name: str, value: jax.Array) -> jax.Array:
    points = jnp.asarray(value)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(
            f"expected {name} of shape (k, m), a row of m objectives for each of k points, got "
            f"shape {points.shape}; stack the points along a leading axis"
        )
    if not jnp.issubdtype(points.dtype, jnp.floating):
        points = points.astype(jnp.result_type(float))
    return points


def _present(points: jax.Array, mask: jax.Array | None) -> jax.Array:
    if mask is None:
        return jnp.ones(points.shape[:1], bool)
    if jnp.shape(mask) != points.shape[:1]:
        raise ValueError(
            f"expected a mask of shape {points.shape[:1]}, one entry per point, got "
            f"{jnp.shape(mask)}; non_dominated returns one"
        )
    return jnp.asarray(mask, bool)


def non_dominated(points: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Finds the points that no other point dominates.

    One point dominates another if it is no larger in every objective and smaller in one. Equal
    points do not dominate each other: all of them stay, or none.

    Args:
      points: (k, m).
      mask: (k,) bool; points marked False neither dominate nor stay. All count if None.

    Returns:
      (k,) bool. A point with a NaN neither dominates nor stays. The cost is k^2 m comparisons.

    Raises:
      ValueError: A shape is wrong.

    **Properties**: exact; unchanged by increasing maps of each objective.

    >>> import jax.numpy as jnp
    >>> from jaxmtl import fronts
    >>> points = jnp.array([[0.0, 3.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0]])
    >>> print(fronts.non_dominated(points))
    [ True  True False  True]
    """
    points = _points("points", points)
    present = _present(points, mask) & ~jnp.any(jnp.isnan(points), axis=1)

    def stays(point: jax.Array) -> jax.Array:
        no_larger = jnp.all(points <= point[None, :], axis=1)
        smaller = jnp.any(points < point[None, :], axis=1)
        return ~jnp.any(present & no_larger & smaller)

    return present & lax.map(stays, points, batch_size=_BATCH)


def hypervolume(
    points: jax.Array, reference: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Computes the volume that the points dominate below a reference point, exactly.

    The volume of the union of the boxes between ``points[i]`` and ``reference``. Dominated points
    need not be removed. The boxes are swept along the last objective, each slice along the one
    before it, and the first two by a running minimum: k log k operations for two objectives,
    k^(m - 1) for m of them, which is meant for two, three or four.

    It is differentiable almost everywhere. The gradient is zero for dominated points and for those
    beyond the reference point.

    Args:
      points: (k, m).
      reference: (m,), the worst corner. Points that are not below it in every objective add
        nothing.
      mask: (k,) bool; points marked False add nothing. All count if None.

    Returns:
      Scalar, at least 0. A point with a NaN adds nothing.

    Raises:
      ValueError: A shape is wrong.

    **Properties**: exact up to rounding; grows with every point that is not dominated; multiplied
    by c if one objective and its reference are multiplied by c.

    **Reference**: the measure is of Zitzler and Thiele 1998, "Multiobjective optimization using
    evolutionary algorithms: a comparative case study" (the size of the space covered).

    >>> import jax.numpy as jnp
    >>> from jaxmtl import fronts
    >>> points = jnp.array([[0.0, 3.0], [1.0, 1.0], [2.0, 1.0], [3.0, 0.0]])
    >>> print(fronts.hypervolume(points, jnp.array([4.0, 4.0])))
    11.0
    """
    points = _points("points", points)
    m = points.shape[1]
    corner = jnp.asarray(reference)
    if corner.shape != (m,):
        raise ValueError(
            f"expected a reference of shape ({m},), one entry per objective, got {corner.shape}; "
            "it is the worst corner of the volume"
        )
    dtype = jnp.result_type(points, corner, jnp.float32)
    points, corner = points.astype(dtype), corner.astype(dtype)
    inside = _present(points, mask) & jnp.all(points < corner[None, :], axis=1)
    # Comparisons with NaN are False, so that such a point becomes the corner: a box without volume.
    points = jnp.where(inside[:, None], points, corner)
    if m == 1:
        return corner[0] - jnp.min(points)
    points = points[jnp.argsort(points[:, 0])]
    widths = jnp.diff(points[:, 0], append=corner[:1])

    def sweep(axis: int, inside: jax.Array) -> jax.Array:
        """Returns the volume of the first ``axis + 1`` objectives of the points inside."""
        if axis == 1:
            heights = corner[1] - lax.cummin(jnp.where(inside, points[:, 1], corner[1]))
            return jnp.sum(widths * heights)
        levels = jnp.sort(jnp.where(inside, points[:, axis], corner[axis]))

        def slab(volume: jax.Array, level: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            bottom, thickness = level
            area = sweep(axis - 1, inside & (points[:, axis] <= bottom))
            return volume + thickness * area, None

        thicknesses = jnp.diff(levels, append=corner[axis : axis + 1])
        return lax.scan(slab, jnp.zeros_like(corner[0]), (levels, thicknesses))[0]

    return sweep(m - 1, jnp.ones(points.shape[:1], bool))


def igd(
    points: jax.Array, front: jax.Array, *, plus: bool = False, mask: jax.Array | None = None
) -> jax.Array:
    """Computes the inverted generational distance: how far a known front is from the points.

    The mean over the points z of the front of ``min_i |points[i] - z|``. With ``plus=True`` the
    distance counts only where the point is worse, ``|max(points[i] - z, 0)|`` (IGD+), so that a
    point that dominates z is at distance 0 from it and a better set never scores worse.

    Args:
      points: (k, m).
      front: (f, m), points of the true front.
      plus: Whether to compute IGD+.
      mask: (k,) bool; points marked False do not count. All count if None.

    Returns:
      Scalar, at least 0; infinity if no point counts. Objectives of different units should be
      scaled before.

    Raises:
      ValueError: A shape is wrong.

    **Reference**: Coello Coello and Reyes Sierra 2004; IGD+: Ishibuchi et al. 2015, "Modified
    distance calculation in generational distance and inverted generational distance".

    >>> import jax.numpy as jnp
    >>> from jaxmtl import fronts
    >>> front = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> print(fronts.igd(jnp.array([[0.0, 1.0], [1.0, 0.5]]), front))
    0.25
    """
    points, front = _points("points", points), _points("front", front)
    if points.shape[1] != front.shape[1]:
        raise ValueError(
            f"expected points and front with the same number of objectives, got shapes "
            f"{points.shape} and {front.shape}"
        )
    present = _present(points, mask)

    def distance(z: jax.Array) -> jax.Array:
        gaps = points - z[None, :]
        gaps = jnp.maximum(gaps, 0) if plus else gaps
        squares = jnp.sum(gaps**2, axis=1)
        return jnp.sqrt(jnp.min(jnp.where(present, squares, jnp.inf)))

    return jnp.mean(lax.map(distance, front, batch_size=_BATCH))


def preferences(num_tasks: int, partitions: int, *, margin: float = 0.0) -> jax.Array:
    """Returns evenly spaced preferences: all vectors of multiples of 1/p that sum to one.

    Args:
      num_tasks: m, at least 1.
      partitions: p, at least 1.
      margin: The least entry, at least 0 and less than 1/m: entries are ``margin + (1 - m margin)
        n / p``. Weights of zero let a scalarization ignore an objective, so that it may end at a
        point that is dominated: take a small margin.

    Returns:
      (k, m) of the default float dtype, k = (p + m - 1)! / (p! (m - 1)!): p + 1 for two objectives.
      In lexicographic order.

    Raises:
      ValueError: A number is out of range.

    **Reference**: Das and Dennis 1998, "Normal-boundary intersection".

    >>> from jaxmtl import fronts
    >>> print(fronts.preferences(2, 4))
    [[0.   1.  ]
     [0.25 0.75]
     [0.5  0.5 ]
     [0.75 0.25]
     [1.   0.  ]]
    """
    for name, value in (("num_tasks", num_tasks), ("partitions", partitions)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
    if not 0 <= margin * num_tasks < 1:
        raise ValueError(
            f"expected a margin of at least 0 and below 1/{num_tasks}, got {margin}; the entries "
            "of a preference sum to one"
        )
    # Bars among stars: what lies between m - 1 bars at p + m - 1 places.
    places = partitions + num_tasks - 1
    bars = list(itertools.combinations(range(places), num_tasks - 1))
    edges = np.reshape(np.array(bars, int), (len(bars), num_tasks - 1))
    edges = np.pad(edges, ((0, 0), (1, 0)), constant_values=-1)
    counts = np.diff(edges, axis=1, append=places) - 1
    return jnp.asarray(margin + (1 - num_tasks * margin) * counts / partitions, float)


class Front(NamedTuple):
    """What `train` returns, for k preferences.

    Attributes:
      params: Pytree of leaves (k, *leaf.shape), the last parameters.
      losses: (k, m), the losses at ``params``, on the last batch if there are batches.
      history: (num_steps, k, m), the losses before each step.
      opt_state: The last state of the optimizer, with a leading axis k on every leaf.
    """

    params: PyTree
    losses: jax.Array
    history: jax.Array
    opt_state: PyTree


def train(
    losses_fn: Callable[..., jax.Array],
    optimizer: Any,
    params: PyTree,
    preferences: jax.Array,
    batches: PyTree = None,
    *,
    num_steps: int | None = None,
    project: Callable[[PyTree], PyTree] | None = None,
    stacked: bool = False,
) -> Front:
    """Trains one set of parameters for each preference, all in one `vmap` of one `scan`.

    Each run gets its preference as ``preference=`` of every update, which rules that have one
    understand: `stch`, `upgrad`, `dual_proj`, `cagrad`, `aligned_mtl` and others. For whatever else
    should differ between the runs, pass a function from the preference, a tracer, to the optimizer.
    Methods without preferences spread out over the front, if at all, by their starts: pass
    ``stacked=True``.

    Args:
      losses_fn: ``losses_fn(params) -> (m,)``, or ``losses_fn(params, batch) -> (m,)`` with
        ``batches``.
      optimizer: An optax transformation of the Jacobian, for instance ``optax.chain(jaxmtl.stch(),
        optax.adam(1e-2))``; or a pair of an aggregator that has a weighting and a transformation of
        its result, which never holds the Jacobian: one backward pass for rules of the losses. Or a
        function ``optimizer(preference)`` that returns either, which then gets no ``preference=``;
        all that it returns must be of one structure.
      params: Pytree; the start of every run, or with ``stacked`` leaves (k, *leaf.shape).
      preferences: (k, m), or (k, ...) of whatever ``optimizer`` understands.
      batches: Pytree of leaves (num_steps, ...), the same for every run; None if the losses need
        no data, or hold all of it.
      num_steps: The number of steps; by default that of the batches.
      project: ``project(params) -> params``, applied after each step, for bounds for instance.
      stacked: Whether each run has its own start.

    Returns:
      A `Front`.

    Raises:
      ValueError: Numbers of steps or runs disagree or are missing, or as the optimizer does.

    **Differs from** a loop over preferences in speed alone: the runs are independent.

    >>> import jax.numpy as jnp, jaxmtl, optax
    >>> from jaxmtl import fronts
    >>> def losses_fn(x):  # front: sqrt(f) + sqrt(g) = 1
    ...     return jnp.array([jnp.sum(x**2), jnp.sum((x - 1) ** 2)])
    >>> def optimizer(preference):
    ...     return optax.chain(jaxmtl.linear_scalarization(preference), optax.sgd(0.4))
    >>> front = fronts.train(
    ...     losses_fn, optimizer, jnp.zeros(1), fronts.preferences(2, 2), num_steps=20
    ... )
    >>> print(front.losses)
    [[1.   0.  ]
     [0.25 0.25]
     [0.   1.  ]]
    """
    preferences = jnp.asarray(preferences)
    if not preferences.ndim:
        raise ValueError("expected preferences with a leading axis, one for each run, got a scalar")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batches)}
    lengths |= {(num_steps,)} if num_steps is not None else set()
    if len(lengths) != 1 or lengths == {()}:
        found = "none" if not lengths else " and ".join(str(n) for n in sorted(lengths))
        raise ValueError(
            f"expected one number of steps, as num_steps= or the leading axis of batches, got "
            f"{found}; give every leaf of batches the leading axis of the steps"
        )
    if stacked:
        starts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
        if starts != {preferences.shape[:1]}:
            raise ValueError(
                f"expected stacked params with a leading axis of {preferences.shape[0]}, one start "
                f"for each preference, got {sorted(starts)}"
            )
    (steps,) = lengths.pop()

    def run(preference: jax.Array, params: PyTree) -> Front:
        made, extra = optimizer, {"preference": preference}
        if callable(optimizer):
            made, extra = optimizer(preference), {}
        if hasattr(made, "update"):
            init, update = _with_jacobian(losses_fn, made, extra)
        else:
            aggregator, inner = made
            init, update = _without_jacobian(losses_fn, aggregator, inner, extra)

        def advance(carry: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
            params, state = carry
            losses, updates, state = update(params, state, *_args(batch))
            params = apply_updates(params, updates)
            return (project(params) if project is not None else params, state), losses

        (params, state), history = lax.scan(advance, (params, init(params)), batches, length=steps)
        last = jax.tree.map(lambda x: x[-1], batches)
        losses = jnp.asarray(losses_fn(params, *_args(last)))
        return Front(params, losses, history, state)

    out_axes: Any = (0, 0, 1, 0)
    return jax.vmap(run, (0, 0 if stacked else None), Front(*out_axes))(preferences, params)


def _args(batch: PyTree) -> tuple[PyTree, ...]:
    return () if batch is None else (batch,)


_Step = tuple[Callable[..., PyTree], Callable[..., tuple[jax.Array, PyTree, PyTree]]]


def _with_jacobian(
    losses_fn: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    extra: dict[str, jax.Array],
) -> _Step:
    chain = optax.with_extra_args_support(optimizer)

    def update(params: PyTree, state: PyTree, *args: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
        losses, jacobian = value_and_jacobian(losses_fn)(params, *args)
        updates, state = chain.update(jacobian, state, params, losses=losses, **extra)
        return losses, updates, state

    return chain.init, update


def _without_jacobian(
    losses_fn: Callable[..., jax.Array],
    aggregator: Aggregator,
    optimizer: optax.GradientTransformation,
    extra: dict[str, jax.Array],
) -> _Step:
    evaluate = value_and_grad(losses_fn, aggregator)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        return aggregator.init(params), inner.init(params)

    def update(params: PyTree, state: PyTree, *args: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
        mtl_state, opt_state = state
        (losses, mtl_state), grads = evaluate(params, mtl_state, *args, **extra)
        updates, opt_state = inner.update(grads, opt_state, params)
        return losses, updates, (mtl_state, opt_state)

    return init, update
