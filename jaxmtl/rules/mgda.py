"""Multiple-gradient descent: the point of least norm in the hull of the gradients."""

import jax

from jaxmtl import base, solvers
from jaxmtl.registry import method
from jaxmtl.types import Aggregator


@method("least norm in the convex hull", "Desideri 2012", "non-conflicting", "scale-free")
def mgda(*, num_tasks: int | None = None) -> Aggregator:
    """Takes the convex combination of gradients of least norm.

    ``w = argmin over the simplex of w^T G w``. Rows can be normalized first, as Sener and
    Koltun do, with ``scale_rows(mgda(), by="norm")``.

    Args:
      num_tasks: m; if given the state logs ``mtl_weights`` and ``mtl_residual``.

    Returns:
      An `Aggregator` without inner state.

    **Properties**: non-conflicting, weighted, permutation-equivariant, of degree 1; not linear
    under scaling. The update is 0 exactly where a convex combination of gradients vanishes,
    in particular where one gradient is zero: the weight is then shared by the zero rows.

    **Reference**: Desideri 2012; Quinton and Rey 2024, eq. 19-20; Zhou et al. 2022, section 2.

    **Differs from** TorchJD, which stops after 100 Frank-Wolfe steps, and from Sener and
    Koltun's code, which does after 250: this is the exact solution.

    >>> import jax.numpy as jnp, jaxmtl
    >>> params, jacobian = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    >>> aggregator = jaxmtl.mgda()
    >>> print(aggregator.update(jacobian, aggregator.init(params), params)[0])
    [0.5 0.5]
    """

    def weigh(gramian: jax.Array, task_mask: jax.Array) -> solvers.Solution:
        return solvers.min_norm(gramian, task_mask)

    return base.from_weighting(weigh, num_tasks=num_tasks, residual=True)
