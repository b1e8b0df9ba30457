"""The methods of the paper's table and the library's others, each with the route that it takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Entry, Method, averaged, entry, uncertainty

SINGLE = "single_task"  # a network per task; on the same footing as the methods in records
LIBRARY = methods.METHODS


class Known(NamedTuple):
    """What only the training knows and some methods ask for."""

    steps_per_epoch: int
    learning_rate: optax.Schedule  # of the network's Adam
    penalty: float  # lambda of LDC-MTL


def _ldc(**more: Any) -> Callable[..., Any]:
    """Returns what makes LDC-MTL as in its authors' code for CelebA.

    ``g + lambda f`` with sigma = sigmoid(W), W_0 = 1, and the sum of sigma, by which g is divided,
    a constant; W by Adam at 1e-3.
    """

    def make(m: int, penalty: float) -> Any:
        return jaxmtl.ldc_mtl(penalty, num_tasks=m, form="code", activation="sigmoid", **more)

    return make


_ALIGNED = Method(lambda m: jaxmtl.aligned_mtl(preference=jnp.ones(m), num_tasks=m))
_BY_ROWS = ("mgda", "pcgrad", "cagrad", "imtl_g")
# The library's other rules, as they are; those that need the gradients of two batches are not here.
_OTHERS = (
    *("gls", "imtl_l", "rgw", "tchebycheff", "cosmos", "pbi", "hypervolume_scalarization"),
    *("imtl", "dual_proj", "gradvac", "conic_grad", "config", "dcgd", "dibs_mtl", "epo", "pcd"),
    *("pmgda", "krum", "trimmed_mean", "graddrop", "bloop", "excess_mtl", "db_mtl"),
)

METHODS: dict[str, Entry] = {
    # The sum of the losses.
    "linear_scalarization": entry(
        Method(lambda m: jaxmtl.linear_scalarization(jnp.ones(m), num_tasks=m))
    ),
    "scale_invariant": entry(LIBRARY["scale_invariant"]),
    "rlw": entry(LIBRARY["rlw"]),
    "dwa": entry(LIBRARY["dwa"]._replace(asks=("steps_per_epoch",))),
    "uncertainty_weighting": Entry(Method(uncertainty, asks=("learning_rate",)), "losses"),
    "famo": entry(LIBRARY["famo"]),
    "go4align": entry(LIBRARY["go4align"]),
    "ldc_mtl": Entry(Method(_ldc(), asks=("penalty",)), "losses"),
    # f compares the tasks in a new order at each step.
    "ldc_mtl_shuffle": Entry(Method(_ldc(shuffle=True), asks=("penalty",)), "losses"),
    **{name: entry(LIBRARY[name]) for name in _BY_ROWS},
    # The bounds of their authors' codes: the update does not vanish with J.
    "nash_mtl": entry(LIBRARY["nash_mtl"].using(max_norm=1.0)),
    "fairgrad": entry(LIBRARY["fairgrad"].using(max_norm=1.0)),
    # The sum of the balanced rows.
    "aligned_mtl": entry(_ALIGNED),
    "upgrad": entry(LIBRARY["upgrad"]),
    "moco": entry(LIBRARY["moco"]),
    **{f"cr_{name}": entry(averaged(LIBRARY[name])) for name in ("mgda", "pcgrad", "cagrad")},
    # At the features of the batch, which one pass backwards takes to the trunk.
    "mgda_ub": entry(LIBRARY["mgda"], "features"),
    "aligned_mtl_ub": entry(_ALIGNED, "features"),
    **{name: entry(LIBRARY[name]) for name in _OTHERS},
    # Its authors' code: four epochs of warm-up, a nadir from the one after.
    "stch": entry(LIBRARY["stch"].using(form="code")._replace(asks=("steps_per_epoch",))),
    # Norms of the gradients of the last shared layer.
    "gradnorm": entry(LIBRARY["gradnorm"], "layer"),
}
# In the order of the paper's table.
PAPER = (
    *("linear_scalarization", "scale_invariant", "rlw", "dwa", "uncertainty_weighting", "famo"),
    *("go4align", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "ldc_mtl"),
)
