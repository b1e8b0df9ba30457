"""Gauss-Newton on residuals, in the space of the samples: the engine's Gramian solved once a step.

For a loss ``|r|^2 / (2 B)`` of B residuals with Jacobian J the damped Gauss-Newton direction is
``(J'J / B + lambda I)^-1 J' r / B``, a system as large as the parameters. The same direction is
``J' w`` with ``(J J' + B lambda I) w = r``, a system as large as the batch, whose matrix is the
Gramian that `value_and_gramian` computes without J.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxmtl import linalg
from jaxmtl.engine import value_and_gramian
from jaxmtl.jacobian import value_and_jacobian

PyTree = Any

# A trial step that realises less of the decrease that the linear model predicts is not taken.
_ACCEPT = 1e-3
# Where it realises less than the first share the damping grows, more than the second, it shrinks:
# the radii of Nocedal and Wright 2006, algorithm 4.1.
_POOR, _GOOD = 0.25, 0.75
_FACTOR = 4.0


class GaussNewtonState(NamedTuple):
    """State of `gauss_newton`.

    Attributes:
      mtl_skipped: int32 scalar, the number of steps skipped for a value that is not finite.
      mtl_rejected: int32 scalar, the number of trial steps that were not taken; 0 unless adaptive.
      mtl_damping: Scalar, the damping of the next step.
      previous: The direction of the last step, like the parameters and at least float32; ``()``
        without momentum.
    """

    mtl_skipped: jax.Array
    mtl_rejected: jax.Array
    mtl_damping: jax.Array
    previous: PyTree


class GaussNewton(NamedTuple):
    """What `gauss_newton` returns.

    Attributes:
      init: ``init(params) -> state``.
      value_and_grad: ``value_and_grad(params, state, *args) -> ((value, state), direction)``, with
        ``value`` the loss ``mean(r^2) / 2`` at ``params`` and ``direction`` like ``params``, to be
        subtracted: the gradient that optax takes.
    """

    init: Callable[[PyTree], GaussNewtonState]
    value_and_grad: Callable[..., tuple[tuple[jax.Array, GaussNewtonState], PyTree]]


def gauss_newton(
    residual_fn: Callable[..., jax.Array],
    *,
    in_axes: Any = None,
    damping: float = 1e-3,
    momentum: float = 0.0,
    adaptive: bool = False,
    chunk_size: int | None = None,
) -> GaussNewton:
    """Minimises half the mean square of residuals by Gauss-Newton steps.

    With r the B residuals at the parameters, J their Jacobian and ``phi_0 = 0``::

        phi = mu phi_prev + J' (J J' + B lambda I)^-1 (r - mu J phi_prev)

    and the step is ``params - phi``: the damped Gauss-Newton step for ``mu = 0`` (minSR is the same
    for wave functions), SPRING with momentum. ``J J'`` is the Gramian of the engine, so that J is
    never held; ``J phi_prev`` is one forward pass of tangents. Where there are no fewer residuals
    than parameters J is smaller than the Gramian: it is then formed, and ``[J; sqrt(B lambda) I]``
    is solved by QR.

    ``adaptive=True`` is the method of Levenberg and Marquardt: the step is tried on the same
    residuals, at the price of one more forward pass. With rho the decrease of the loss over that
    of the linear model, the step is taken if ``rho > 1e-3``, else the direction is zero; the
    damping is multiplied by 4 if ``rho < 1/4`` and divided by 4 if ``rho > 3/4``. A rejected step
    also forgets the momentum. The test is of the full step: follow with ``optax.sgd(1.0)``.

    Args:
      residual_fn: ``residual_fn(params, *args) -> (B,)``; with ``in_axes``, the residuals of one
        example, ``residual_fn(params, *example)``, of any shape: q numbers count as q of the B.
      in_axes: Which axes of ``(params, *args)`` run over examples, as in `jax.vmap`; None for
        params.
      damping: lambda, at least 0; at the start if adaptive. It is in units of the squared row norms
        of J. Whatever it is, ``B lambda`` is at least 4 machine epsilons of the trace of the
        Gramian (QR: a few of the trace's root, squared), so that rounding does not make the system
        indefinite.
      momentum: mu in [0, 1).
      adaptive: Whether the damping follows the success of the steps.
      chunk_size: As in `value_and_gramian`, without ``in_axes``.

    Returns:
      A `GaussNewton`. Its state has ``mtl_damping``, ``mtl_rejected`` and ``mtl_skipped``: read
      them with `optax.tree.get`. A step whose direction is not finite is zero and keeps the state.

    Raises:
      ValueError: A number is out of range, or as in `value_and_gramian`.

    **When to use it**: full batches or large ones, residuals that can be driven to near zero, and
    a network that is small beside what it is asked for: curve fitting, physics-informed networks.
    The system costs B^2 n / 2 products (fewer where a layer is structured) and B^3 / 3 to solve.
    Where the sum of squares needs 1e-6 of its start or less, take float64: ``J J'`` squares the
    condition number. Where rows can be dependent keep ``B lambda`` well above a machine epsilon of
    the trace: their ratio is the relative error of the direction.

    **Properties**: exact for a linear model in one step as lambda goes to 0; unchanged by an
    orthogonal change of parameters; residuals times c with damping times c^2 give the same step.
    Without momentum and adaptation it is ``pullback(solve(gramian + B damping I, residuals))`` of
    what `value_and_gramian` returns.

    **Reference**: Chen and Heyl 2024, "Empowering deep neural quantum states through efficient
    optimization" (minSR); Goldshlager, Abrahamsen and Lin 2024, "A Kaczmarz-inspired approach to
    accelerate the optimization of neural network wavefunctions" (SPRING); Marquardt 1963.

    **Differs from** SPRING, which centres the residuals of a wave function, adds a term for that,
    and bounds the norm of the step (here: ``optax.clip_by_global_norm`` behind it).

    >>> import jax, jax.numpy as jnp, jaxmtl, optax
    >>> x = jnp.linspace(0.0, 1.0, 8)
    >>> y = 2 * jnp.exp(-3 * x)
    >>> def residual(params, x, y):
    ...     return params["a"] * jnp.exp(params["b"] * x) - y
    >>> method = jaxmtl.gauss_newton(residual, in_axes=(None, 0, 0), adaptive=True)
    >>> @jax.jit
    ... def step(params, state):
    ...     (value, state), direction = method.value_and_grad(params, state, x, y)
    ...     return jax.tree.map(lambda p, d: p - d, params, direction), state
    >>> params = {"a": jnp.array(1.0), "b": jnp.array(0.0)}
    >>> state = method.init(params)
    >>> for _ in range(12):
    ...     params, state = step(params, state)
    >>> print(f"{params['a']:.3f} {params['b']:.3f}")
    2.000 -3.000
    """
    _check_range("damping", damping, 0)
    _check_range("momentum", momentum, 0, 1)

    def init(params: PyTree) -> GaussNewtonState:
        dtype = linalg.accumulation_dtype(*map(jnp.asarray, jax.tree.leaves(params)))
        wide = jax.tree.map(lambda x: jnp.zeros_like(x, linalg.accumulation_dtype(x)), params)
        zero = jnp.zeros((), jnp.int32)
        return GaussNewtonState(zero, zero, jnp.asarray(damping, dtype), wide if momentum else ())

    def value_and_grad(
        params: PyTree, state: GaussNewtonState, *args: Any
    ) -> tuple[tuple[jax.Array, GaussNewtonState], PyTree]:
        def residuals_at(p: PyTree) -> jax.Array:
            if in_axes is None:
                return residual_fn(p, *args)
            return jax.vmap(residual_fn, in_axes)(p, *args).reshape(-1)

        count = jax.eval_shape(residuals_at, params).size
        system = _by_rows if count >= _size(params) else _by_samples
        solve, residuals = system(residual_fn, in_axes, chunk_size, params, args)
        residuals = residuals.astype(linalg.accumulation_dtype(residuals))
        carried = jnp.zeros_like(residuals)  # mu J phi_prev
        if momentum:
            tangent = jax.tree.map(lambda x, p: x.astype(p.dtype), state.previous, params)
            carried = momentum * jax.jvp(residuals_at, (params,), (tangent,))[1]
        damped = state.mtl_damping.astype(residuals.dtype) * count
        direction, moved = solve(residuals - carried, damped)
        if momentum:
            direction = jax.tree.map(lambda d, x: d + momentum * x, direction, state.previous)
        value = jnp.mean(residuals**2) / 2
        ok = linalg.all_finite(direction) & jnp.isfinite(value)
        direction = jax.tree.map(lambda d: jnp.where(ok, d, 0), direction)
        new = state._replace(previous=direction if momentum else ())
        if adaptive:
            moved_params = jax.tree.map(lambda p, d: p - d.astype(p.dtype), params, direction)
            after = residuals_at(moved_params).astype(residuals.dtype)
            model = residuals - (carried + moved)
            decrease = jnp.sum((residuals - after) * (residuals + after))
            predicted = jnp.sum((residuals - model) * (residuals + model))
            # A NaN compares as a failure: the step left the domain of the residuals.
            taken = ok & (decrease > _ACCEPT * predicted) & (predicted > 0)
            poor = ~(decrease >= _POOR * predicted)
            factor = jnp.where(
                poor, _FACTOR, jnp.where(decrease > _GOOD * predicted, 1 / _FACTOR, 1)
            )
            bounds = jnp.finfo(state.mtl_damping.dtype)
            grown = jnp.clip(state.mtl_damping * factor, bounds.tiny, bounds.max)
            direction = jax.tree.map(lambda d: jnp.where(taken, d, 0), direction)
            new = GaussNewtonState(
                state.mtl_skipped,
                state.mtl_rejected + (ok & ~taken),
                grown.astype(state.mtl_damping.dtype),
                direction if momentum else (),
            )
        skipped = state._replace(mtl_skipped=state.mtl_skipped + 1)
        new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, skipped)
        return (value, new), jax.tree.map(lambda d, p: d.astype(p.dtype), direction, params)

    return GaussNewton(init, value_and_grad)


_Solve = Callable[[jax.Array, jax.Array], tuple[PyTree, jax.Array]]


def _by_samples(
    residual_fn: Callable[..., jax.Array],
    in_axes: Any,
    chunk_size: int | None,
    params: PyTree,
    args: tuple[Any, ...],
) -> tuple[_Solve, jax.Array]:
    """Returns how to solve in the space of the samples, and the residuals."""
    evaluate = value_and_gramian(residual_fn, in_axes=in_axes, chunk_size=chunk_size)
    residuals, gramian, pullback = evaluate(params, *args)

    def solve(target: jax.Array, damping: jax.Array) -> tuple[PyTree, jax.Array]:
        epsilon = 4 * jnp.finfo(gramian.dtype).eps
        added = jnp.maximum(damping.astype(gramian.dtype), epsilon * jnp.trace(gramian))
        # A Gramian of zeros is solved as the identity: its direction is zero whatever is added.
        added = jnp.where(added > 0, added, 1)
        factor = jax.scipy.linalg.cho_factor(gramian + added * jnp.eye(len(gramian)))
        weights = jax.scipy.linalg.cho_solve(factor, target.astype(gramian.dtype))
        direction = jax.tree.map(
            lambda x: x.astype(linalg.accumulation_dtype(x)), pullback(weights)
        )
        return direction, jnp.dot(gramian, weights, precision=lax.Precision.HIGHEST)

    return solve, residuals


def _by_rows(
    residual_fn: Callable[..., jax.Array],
    in_axes: Any,
    chunk_size: int | None,
    params: PyTree,
    args: tuple[Any, ...],
) -> tuple[_Solve, jax.Array]:
    """Returns how to solve in the space of the parameters, and the residuals."""
    evaluate = value_and_jacobian(residual_fn, in_axes=in_axes, chunk_size=chunk_size)
    residuals, jacobian = evaluate(params, *args)
    rows = jax.vmap(lambda row: ravel_pytree(linalg.accumulable(row))[0])(jacobian)
    unravel = ravel_pytree(linalg.accumulable(params))[1]
    count, n = rows.shape

    def solve(target: jax.Array, damping: jax.Array) -> tuple[PyTree, jax.Array]:
        epsilon = 4 * jnp.finfo(rows.dtype).eps * jnp.linalg.norm(rows)
        root = jnp.maximum(jnp.sqrt(damping.astype(rows.dtype)), epsilon)
        root = jnp.where(root > 0, root, 1)
        q, r = jnp.linalg.qr(jnp.concatenate([rows, root * jnp.eye(n, dtype=rows.dtype)]))
        with jax.default_matmul_precision("highest"):
            flat = jax.scipy.linalg.solve_triangular(r, target.astype(rows.dtype) @ q[:count])
            return unravel(flat), rows @ flat

    return solve, residuals


def _size(params: PyTree) -> int:
    return int(sum(np.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)))


def _check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    try:
        number = float(value)
    except jax.errors.ConcretizationTypeError:
        return
    if not low <= number < high:
        raise ValueError(f"expected {name} in [{low:g}, {high:g}), got {number:g}")
