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
    # The eleven above are as defined. These have a ridge on the Gramian's diagonal: 1e-4 of its
    # largest eigenvalue, as in the paper's experiments, or of its trace, as in TorchJD since 0.6.
    # Examples whose gradients are a hundredth of the others' then count for nothing.
    "dual_proj_ridge_largest": LIBRARY["dual_proj"].using(ridge=1e-4, ridge_of="largest"),
    "upgrad_ridge_largest": LIBRARY["upgrad"].using(ridge=1e-4, ridge_of="largest"),
    "dual_proj_ridge": LIBRARY["dual_proj"].using(ridge=1e-4),
    "upgrad_ridge": LIBRARY["upgrad"].using(ridge=1e-4),
}
OPTIMIZERS = {"sgd": optax.identity, "adam": optax.scale_by_adam}  # with PyTorch's defaults
