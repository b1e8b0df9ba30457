"""The aggregators of the Jacobian-descent paper, as defined and as in the paper's experiments."""

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Method

RIDGE = 1e-4  # of the Gramian's trace


def with_ridge(aggregator: jaxmtl.Aggregator, num_tasks: int) -> jaxmtl.Aggregator:
    """Returns a rule on ``G + RIDGE trace(G) I``, as TorchJD, the paper's code, computes it.

    Constraints of examples whose gradients are a hundredth of the others' then count for nothing.
    """

    def weigh(gramian: jax.Array) -> jax.Array:
        identity = jnp.eye(len(gramian), dtype=gramian.dtype)
        regular = gramian + RIDGE * jnp.trace(gramian) * identity
        return aggregator.weighting.update(regular, aggregator.weighting.init())[0]

    return jaxmtl.from_weighting(weigh, num_tasks=num_tasks)


LIBRARY = methods.METHODS
# Appendix B.
METHODS: dict[str, Method] = {
    "mean": LIBRARY["linear_scalarization"],
    "mgda": LIBRARY["mgda"],
    "dual_proj": LIBRARY["dual_proj"],
    "pcgrad": LIBRARY["pcgrad"],
    "graddrop": LIBRARY["graddrop"],
    "imtl_g": LIBRARY["imtl_g"],
    # The paper leaves c open; 0.5 is its authors' example.
    "cagrad": LIBRARY["cagrad"].using(c=0.5),
    "rgw": LIBRARY["rgw"],
    # The paper runs its authors' code, which bounds the step.
    "nash_mtl": LIBRARY["nash_mtl"].using(max_norm=1.0),
    "aligned_mtl": LIBRARY["aligned_mtl"],
    "upgrad": LIBRARY["upgrad"],
    # The eleven above are as defined; these two are those of the paper's experiments.
    "dual_proj_ridge": LIBRARY["dual_proj"].then(with_ridge),
    "upgrad_ridge": LIBRARY["upgrad"].then(with_ridge),
}
OPTIMIZERS = {"sgd": optax.identity, "adam": optax.scale_by_adam}  # with PyTorch's defaults
