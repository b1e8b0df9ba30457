"""Multiple-gradient descent: the point of least norm in the hull of the gradients."""

import jax
import jax.numpy as jnp

from jaxmtl import base, checks, linalg, solvers
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("least norm in the convex hull", "Desideri 2012", "non-conflicting", "scale-free")
def mgda(*, rho: float | jax.Array = 0.0, num_tasks: int | None = None) -> Aggregator:
    """Takes the convex combination of gradients of least norm.

    ``w = argmin over the simplex of w^T G w + rho |w|^2``. Rows can be normalized first, as Sener
    and Koltun do, with ``scale_rows(mgda(), by="norm")``.

    Use it to reach some point of the Pareto front where no loss may rise on the way. It favors
    tasks with short gradients and stops at the first such point: slow where gradients differ in
    length.

    Args:
      rho: Regularization, at least 0, in the units of the squared gradients: it makes the weights
        unique and Lipschitz in the gradients. The fixed point of `moco`'s lambda. It may be traced.
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    Raises:
      ValueError: ``rho`` is negative.

    **Properties**: non-conflicting, weighted, permutation-equivariant, of degree 1; not linear
    under scaling. The update is 0 exactly where a convex combination of gradients vanishes,
    in particular where one gradient is zero: the weight is then shared by the zero rows. With a
    positive rho neither non-conflicting nor scale-free.

    **Reference**: Desideri 2012; Quinton and Rey 2024, eq. 19-20; Zhou et al. 2022, section 2; rho:
    Fernando et al. 2023, eq. 9 with both terms halved, whose gradient is that of their eq. 10 and
    for which their lemmas 5 and 6 hold.

    **Differs from** TorchJD, which stops after 100 Frank-Wolfe steps, and from Sener and
    Koltun's code, which does after 250: this is the exact solution.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    >>> aggregator = jaxmtl.mgda()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 0.5]
    """
    checks.check_range("rho", rho, 0)
    plain = isinstance(rho, int | float) and not rho

    def weigh(gramian: jax.Array, task_mask: jax.Array, log2_scale: jax.Array) -> solvers.Solution:
        if not plain:
            # In the units of the scaled Gramian; beyond the bound the weights are equal anyway.
            share = linalg.ldexp(jnp.asarray(rho, gramian.dtype), -2 * log2_scale)
            share = jnp.minimum(share, 1 / jnp.finfo(gramian.dtype).eps ** 2)
            gramian = gramian + jnp.diag(jnp.where(task_mask, share, 0))
        return solvers.min_norm(gramian, task_mask)

    return base.from_weighting(weigh, num_tasks=num_tasks, residual=True)
