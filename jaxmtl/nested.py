"""Gradients of objectives that contain the solution of another problem."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg

from jaxmtl import checks
from jaxmtl.jacobian import value_and_jacobian
from jaxmtl.linalg import accumulation_dtype

PyTree = Any


def _batch(args: PyTree, index: Any) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), args)


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
      num_steps: T; 0 leaves z where it is.
      step_size: eta, a number or a schedule of t, from 1.
      solver: Of the linear systems with the Hessian: ``"cg"``: conjugate gradients; ``"neumann"``:
        ``a sum_{j<J} (I - a H)^j``, with a below ``2 / |H|``; ``"stochastic"``: ``J a`` times the
        product of ``I - a H_j`` over ``j < p`` independent batches, p uniform in 0 to J - 1. Its
        mean is the Neumann series of the mean Hessian: with noisy lower batches ``"stochastic"``
        alone has no bias but what the series lacks, ``(1 - a mu)^J`` of the inverse.
      solver_steps: Most iterations of ``"cg"``; J of the two others. The variance of
        ``"stochastic"`` is in proportion to J.
      solver_step_size: a; eta if None. For ``"stochastic"`` at most ``1 / |H_j|`` for every batch.
      tolerance: At which relative residual ``"cg"`` stops.
      lower_batches: Whether the leaves of ``lower_args`` carry independent batches on their
        leading axis: T, one per step, then one for the second derivatives; ``"stochastic"``, which
        requires them, takes J - 1 more for its factors, T + J in all.
      return_lower: Whether to return the new z too, where the next call starts.

    Returns:
      ``f(params, z, *args, lower_args=None, key=None) -> (losses, jacobian)``, or ``((losses, z),
      jacobian)`` with ``return_lower``; ``args`` go to ``upper``, and to ``lower`` unless
      ``lower_args`` (a tuple) is given; ``key``, another at each step, is for ``"stochastic"``.
      Losses are (m,), leaves ``(m, *leaf.shape)``. No second derivative is stored: m systems are
      solved by Hessian-vector products. Safe under jit, vmap and scan.

    Raises:
      ValueError: A number is out of range, ``solver`` unknown, ``"neumann"`` or ``"stochastic"``
        without a number for a, or ``"stochastic"`` without ``lower_batches``; when tracing,
        ``lower_args`` is not a tuple, holds another number of batches, or the key is missing.

    **Reference**: Fernando et al. 2023 (MoCo), eq. 12-15 and algorithm 2; the stochastic inverse:
    Ghadimi and Wang 2018, algorithm 3.

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
    steps = checks.check_int("num_steps", num_steps, 0)
    checks.check_int("solver_steps", solver_steps)
    checks.check_choice("solver", solver, ("cg", "neumann", "stochastic"))
    if not callable(step_size):
        checks.check_range("step_size", step_size, 0, closed="right")
    scale: Any = step_size if solver_step_size is None else solver_step_size
    if solver != "cg" and callable(scale):
        raise ValueError(
            "expected solver_step_size= with a schedule as step_size, got none; the Neumann series "
            "needs one number below 2 over the largest curvature"
        )
    if solver == "stochastic" and not lower_batches:
        raise ValueError(
            'expected lower_batches=True with solver="stochastic", got False; its factors take '
            "independent batches, num_steps + solver_steps on the leading axis of lower_args"
        )
    num_batches = steps + (solver_steps if solver == "stochastic" else 1)

    def total(params: PyTree, z: PyTree, *args: Any) -> jax.Array:
        return jnp.sum(lower(params, z, *args))

    slope = jax.grad(total, 1)

    def descend(params: PyTree, z: PyTree, args: tuple[Any, ...]) -> tuple[PyTree, tuple[Any, ...]]:
        batches, last = None, args
        if lower_batches:
            for leaf in jax.tree.leaves(args):
                if jnp.shape(leaf)[:1] != (num_batches,):
                    raise ValueError(
                        f"expected lower_args with {num_batches} independent batches on the "
                        f"leading axis, got a leaf of shape {jnp.shape(leaf)}; one per step, one "
                        "for the second derivatives, and solver_steps - 1 more for the factors "
                        'of solver="stochastic"'
                    )
            batches = jax.tree.map(lambda x: x[:steps], args)
            last = _batch(args, steps)

        def step(z: PyTree, inputs: tuple[jax.Array, Any]) -> tuple[PyTree, None]:
            t, batch = inputs
            eta = jnp.asarray(step_size(t) if callable(step_size) else step_size)
            gradient = slope(params, z, *(args if batch is None else batch))
            return jax.tree.map(lambda x, g: x - eta.astype(x.dtype) * g, z, gradient), None

        times = jnp.arange(1, steps + 1, dtype=jnp.result_type(float))
        return lax.scan(step, z, (times, batches))[0], last

    def evaluate(
        params: PyTree,
        z: PyTree,
        *args: Any,
        lower_args: tuple[Any, ...] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Any, PyTree]:
        if lower_args is not None and not isinstance(lower_args, tuple):
            raise ValueError(
                f"expected lower_args to be a tuple of arguments, got {type(lower_args).__name__}; "
                "write (batch,)"
            )
        if solver == "stochastic" and key is None:
            raise ValueError(
                'expected key= with solver="stochastic", got none; pass another key at each step'
            )
        samples = args if lower_args is None else lower_args
        z, batch = descend(params, z, samples)

        dtype = accumulation_dtype(z)  # one for all leaves, as conjugate gradients needs

        def like(tree: PyTree, dtypes: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, dtypes)

        def hessian_times(v: PyTree, batch: tuple[Any, ...] = batch) -> PyTree:
            product = jax.jvp(lambda z: slope(params, z, *batch), (z,), (like(v, z),))[1]
            return jax.tree.map(lambda x: x.astype(dtype), product)

        def less_curved(v: PyTree, batch: tuple[Any, ...] = batch) -> PyTree:
            return jax.tree.map(lambda x, h: x - scale * h, v, hessian_times(v, batch))

        def neumann(b: PyTree) -> PyTree:
            def term(_: int, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
                power, series = carry
                power = less_curved(power)
                return power, jax.tree.map(jnp.add, series, power)

            _, series = lax.fori_loop(1, solver_steps, term, (b, b))
            return jax.tree.map(lambda s: scale * s, series)

        def random_product(b: PyTree) -> PyTree:
            # Ghadimi and Wang 2018, algorithm 3, with 1 / L = a and b = J.
            count = jax.random.randint(cast(jax.Array, key), (), 0, solver_steps)

            def factor(j: jax.Array, v: PyTree) -> PyTree:
                return less_curved(v, _batch(samples, steps + 1 + j))

            product = lax.fori_loop(0, count, factor, b)
            return jax.tree.map(lambda x: solver_steps * scale * x, product)

        def solve(b: PyTree) -> PyTree:
            b = jax.tree.map(lambda x: x.astype(dtype), b)
            if solver != "cg":
                return like(neumann(b) if solver == "neumann" else random_product(b), z)
            return like(cg(hessian_times, b, tol=tolerance, maxiter=solver_steps)[0], z)

        def both(pair: tuple[PyTree, PyTree], *args: Any) -> jax.Array:
            return upper(*pair, *args)

        losses, (direct, through) = value_and_jacobian(both)((params, z), *args)
        _, mixed = jax.vjp(lambda x: slope(x, z, *batch), params)
        indirect = jax.vmap(lambda b: mixed(solve(b))[0])(through)
        jacobian = jax.tree.map(jnp.subtract, direct, indirect)
        return ((losses, z) if return_lower else losses), jacobian

    return evaluate
