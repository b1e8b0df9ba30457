"""The equations of Nash bargaining and of alpha-fairness."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmtl.compiled import compiled
from jaxmtl.solvers.nonneg_qp import Solution
from jaxmtl.solvers.quadratic import row_normalized

_STEP_LENGTHS = tuple(0.5**k for k in range(8))


@compiled()
def bargaining(
    gramian: jax.Array, exponent: jax.Array | float, mask: jax.Array | None = None
) -> Solution:
    """Solves ``G w = w^-p`` with ``w > 0``, where p is ``exponent``.

    The solution minimises the convex ``w^T G w / 2 - sum_i w_i^(1-p) / (1-p)`` (``log w_i``
    at p = 1). Damped Newton steps in relative units ``dw_i / w_i``, on the row-normalised
    Gramian. There is no solution where a convex combination of gradients vanishes; a ridge
    of a few machine epsilons on the unit rows defines the limit: the weights of the
    vanishing combination grow large, its contribution to ``J^T w`` vanishes, and the other
    tasks bargain over what is left. Zero rows are left out, with weight 0.

    Args:
      gramian: (m, m).
      exponent: p > 0; 1 for Nash-MTL, 1/alpha for FairGrad.
      mask: (m,) bool, False for tasks that do not take part; all do if None.

    Returns:
      `Solution` with value (m,) and as residual the largest relative error of an equation
      (of the ridged ones).

    >>> import jax.numpy as jnp
    >>> from jaxmtl.solvers import bargaining
    >>> print(bargaining(jnp.diag(jnp.array([1.0, 4.0])), 1.0).value)
    [1.  0.5]
    """
    m, dtype = gramian.shape[0], gramian.dtype
    eps = jnp.finfo(dtype).eps
    p = jnp.asarray(exponent, dtype)
    unit, norms, zero = row_normalized(gramian)
    usable = ~zero if mask is None else mask & ~zero
    pair = usable[:, None] & usable[None, :]
    identity = jnp.eye(m, dtype=dtype)
    unit = jnp.where(pair, unit, 0) + jnp.where(usable, 2 * eps, 1)[:, None] * identity
    # In x = D w the equations are Q x = beta x^-p with beta = d^(p-1).
    log_beta = jnp.where(usable, (p - 1) * jnp.log(norms), 0)
    linear_utility = jnp.abs(p - 1) < 1e-6

    def utilities(x: jax.Array) -> jax.Array:
        log_x = jnp.log(x)
        power = jnp.exp(log_beta + (1 - p) * log_x) / jnp.where(linear_utility, 1, 1 - p)
        return jnp.where(usable, jnp.where(linear_utility, log_x, power), 0)

    def objective(x: jax.Array) -> jax.Array:
        return x @ unit @ x / 2 - jnp.sum(utilities(x))

    def imbalance(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        gained = x * (unit @ x)
        wanted = jnp.exp(log_beta + (1 - p) * jnp.log(x))
        gap = jnp.where(usable, gained - wanted, 0)
        return gap, wanted, jnp.max(jnp.abs(gap) / wanted)

    class Carry(NamedTuple):
        x: jax.Array  # (m,)
        residual: jax.Array
        done: jax.Array
        rounds: jax.Array

    def newton(c: Carry) -> Carry:
        gap, wanted, residual = imbalance(c.x)
        hessian = unit * c.x[:, None] * c.x[None, :]
        hessian += jnp.where(usable, p * wanted, 1)[:, None] * identity
        # Unit diagonal: the tasks' scales differ by orders of magnitude.
        scale = jax.lax.rsqrt(jnp.diagonal(hessian))
        factor = jnp.linalg.cholesky(hessian * scale[:, None] * scale[None, :])
        step = -scale * jax.scipy.linalg.cho_solve((factor, True), scale * gap)
        decrement = -gap @ step
        lengths = jnp.asarray(_STEP_LENGTHS, dtype)
        lowest = jnp.min(jnp.where(usable, step, 0))
        longest = jnp.where(lowest < -0.9, 0.9 / jnp.where(lowest < -0.9, -lowest, 1), 1)
        candidates = c.x[None] * (1 + (longest * lengths)[:, None] * step[None])
        best = jnp.argmin(jax.vmap(objective)(candidates))
        # Near the solution the objective is flat to rounding, and full steps are safe.
        size = jnp.sum(jnp.where(usable, wanted, 0))
        x = jnp.where(decrement < 0.01 * size, candidates[0], candidates[best])
        _, _, new_residual = imbalance(x)
        stalled = (new_residual >= residual) & (decrement < eps * size)
        keep = stalled | ~(new_residual < jnp.inf)
        done = keep | (new_residual <= eps)
        return Carry(
            jnp.where(keep, c.x, x), jnp.where(keep, residual, new_residual), done, c.rounds + 1
        )

    # As if every task were alone, then scaled to solve the equations on average.
    alone = jnp.where(usable, jnp.exp(log_beta / (1 + p)), 1)
    gap, wanted, _ = imbalance(alone)
    gained = jnp.sum(jnp.where(usable, gap + wanted, 0))
    ratio = jnp.sum(jnp.where(usable, wanted, 0)) / jnp.where(gained > 0, gained, 1)
    ratio = jnp.clip(ratio, eps, 1 / eps) ** (1 / (1 + p))
    start = jnp.where(usable, alone * ratio, 1)
    first = Carry(start, imbalance(start)[2], jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    last = lax.while_loop(lambda c: ~c.done & (c.rounds < 100), newton, first)
    return Solution(jnp.where(usable, last.x / norms, 0), last.residual)
