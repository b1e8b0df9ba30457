"""The aggregators of the Jacobian-descent paper, as defined and as in the paper's experiments."""

import optax

from experiments import methods
from experiments.methods import Method

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
    # The eleven above are as defined. These two have a ridge, as those of the paper's experiments:
    # there 1e-4 of the Gramian's largest eigenvalue, here of its trace, as in TorchJD since 0.6.
    # Examples whose gradients are a hundredth of the others' then count for nothing.
    "dual_proj_ridge": LIBRARY["dual_proj"].using(ridge=1e-4),
    "upgrad_ridge": LIBRARY["upgrad"].using(ridge=1e-4),
}
OPTIMIZERS = {"sgd": optax.identity, "adam": optax.scale_by_adam}  # with PyTorch's defaults
