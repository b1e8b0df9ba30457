"""Gradients of objectives that contain the solution of another problem."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg

from jaxmtl import checks
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.linalg import accumulation_dtype

PyTree = Any


def hypergradient(
    upper: Callable[..., jax.Array],
    lower: Callable[..., jax.Array],
    *,
    num_steps: int = 1,
    step_size: float | Callable[[jax.Array], Any] = 0.1,
    solver: str = "cg",
    solver_steps: int = 20,
    solver_step_size: float | None = None,
    tolerance: float = 1e-6,
    lower_batches: bool = False,
    return_lower: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """Makes a function that returns nested losses and their stacked gradients.

    For ``F_i(x) = f_i(x, z*(x))``, ``z*(x) = argmin_z l(x, z)``: T steps
    ``z <- z - eta_t grad_z l(x, z)`` from the z that is passed in, then at the new z
    ``h_i = grad_x f_i - grad_xz l [grad_zz l]^{-1} grad_z f_i``, the rows for any aggregator.

    Args:
      upper: ``upper(params, z, *args) -> (m,)``, the f_i.
      lower: ``lower(params, z, *args) -> ()``, strongly convex in z, or ``(m,)`` with sum l. Where
        each objective has its own z_i and l_i, let z be the tuple of all z_i and return all
        l_i: as none of them shares a z_i, this is the formula for each.
      num_steps: T.
      step_size: eta, a number or a schedule of t, from 1.
      solver: Of the linear systems with the Hessian: ``"cg"``: conjugate gradients; ``"neumann"``:
        ``a sum_{j<J} (I - a H)^j``, with a below ``2 / |H|``.
      solver_steps: Most iterations of ``"cg"``; J of ``"neumann"``.
      solver_step_size: a; eta if None.
      tolerance: At which relative residual ``"cg"`` stops.
      lower_batches: Whether the leaves of ``lower_args`` carry T + 1 independent batches on their
        leading axis, one per step and the last for the second derivatives.
      return_lower: Whether to return the new z too, where the next call starts.

    Returns:
      ``f(params, z, *args, lower_args=None) -> (losses, jacobian)``, or ``((losses, z), jacobian)``
      with ``return_lower``; ``args`` go to ``upper``, and to ``lower`` unless ``lower_args`` (a
      tuple) is given. Losses are (m,), leaves ``(m, *leaf.shape)``. No second derivative is
      stored: m systems are solved by Hessian-vector products. Safe under jit, vmap and scan.

    Raises:
      ValueError: A number is out of range, ``solver`` unknown, or ``"neumann"`` without a number
        for a; when tracing, ``lower_args`` is not a tuple.

    **Reference**: Fernando et al. 2023 (MoCo), eq. 12-15 and algorithm 2.

    **Differs from** the text of algorithm 2, where ``z_k := z_{T,k}``, one step before the last: at
    T = 1 it would never move. This takes ``z_{T+1,k}``, after T steps.

    >>> import jax.numpy as jnp, jaxmtl
    >>> upper = lambda x, z: jnp.stack([(z - 1) ** 2 / 2, (x - z) ** 2])
    >>> lower = lambda x, z: (z - 2 * x) ** 2 / 2  # solved by z = 2 x
    >>> nested = jaxmtl.hypergradient(upper, lower, num_steps=1, step_size=1.0)
    >>> losses, jacobian = nested(jnp.array(1.0), jnp.array(0.0))
    >>> print(losses, jacobian)
    [0.5 1. ] [2. 2.]
    """
    steps = checks.check_int("num_steps", num_steps)
    checks.check_int("solver_steps", solver_steps)
    checks.check_choice("solver", solver, ("cg", "neumann"))
    if not callable(step_size):
        checks.check_range("step_size", step_size, 0, closed="right")
    scale: Any = step_size if solver_step_size is None else solver_step_size
    if solver == "neumann" and callable(scale):
        raise ValueError(
            "expected solver_step_size= with a schedule as step_size, got none; the Neumann series "
            "needs one number below 2 over the largest curvature"
        )

    def total(params: PyTree, z: PyTree, *args: Any) -> jax.Array:
        return jnp.sum(lower(params, z, *args))

    slope = jax.grad(total, 1)

    def descend(params: PyTree, z: PyTree, args: tuple[Any, ...]) -> tuple[PyTree, tuple[Any, ...]]:
        batches, last = None, args
        if lower_batches:
            batches = jax.tree.map(lambda x: x[:steps], args)
            last = jax.tree.map(lambda x: x[steps], args)

        def step(z: PyTree, inputs: tuple[jax.Array, Any]) -> tuple[PyTree, None]:
            t, batch = inputs
            eta = jnp.asarray(step_size(t) if callable(step_size) else step_size)
            gradient = slope(params, z, *(args if batch is None else batch))
            return jax.tree.map(lambda x, g: x - eta.astype(x.dtype) * g, z, gradient), None

        times = jnp.arange(1, steps + 1, dtype=jnp.result_type(float))
        return lax.scan(step, z, (times, batches))[0], last

    def evaluate(
        params: PyTree, z: PyTree, *args: Any, lower_args: tuple[Any, ...] | None = None
    ) -> tuple[Any, PyTree]:
        if lower_args is not None and not isinstance(lower_args, tuple):
            raise ValueError(
                f"expected lower_args to be a tuple of arguments, got {type(lower_args).__name__}; "
                "write (batch,)"
            )
        z, batch = descend(params, z, args if lower_args is None else lower_args)

        dtype = accumulation_dtype(z)  # one for all leaves, as conjugate gradients needs

        def like(tree: PyTree, dtypes: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, dtypes)

        def hessian_times(v: PyTree) -> PyTree:
            product = jax.jvp(lambda z: slope(params, z, *batch), (z,), (like(v, z),))[1]
            return jax.tree.map(lambda x: x.astype(dtype), product)

        def neumann(b: PyTree) -> PyTree:
            def term(_: int, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                power, series = carry
                power = jax.tree.map(lambda p, h: p - scale * h, power, hessian_times(power))
                return power, jax.tree.map(jnp.add, series, power)

            _, series = lax.fori_loop(1, solver_steps, term, (b, b))
            return jax.tree.map(lambda s: scale * s, series)

        def solve(b: PyTree) -> PyTree:
            b = jax.tree.map(lambda x: x.astype(dtype), b)
            if solver == "neumann":
                return like(neumann(b), z)
            return like(cg(hessian_times, b, tol=tolerance, maxiter=solver_steps)[0], z)

        def both(pair: tuple[PyTree, PyTree], *args: Any) -> jax.Array:
            return upper(*pair, *args)

        losses, (direct, through) = value_and_jacobian(both)((params, z), *args)
        _, mixed = jax.vjp(lambda x: slope(x, z, *batch), params)
        indirect = jax.vmap(lambda b: mixed(solve(b))[0])(through)
        jacobian = jax.tree.map(jnp.subtract, direct, indirect)
        return ((losses, z) if return_lower else losses), jacobian

    return evaluate
