"""The methods of the papers' tables, each with the route that it takes through the library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Entry, Method, averaged, entry, uncertainty

SINGLE = "single_task"  # a network per task; on the same footing as the methods in records


class Known(NamedTuple):
    """What only the training knows and some methods ask for."""

    dataset: str
    feature_size: int  # channels of z
    learning_rate: optax.Schedule  # of the network's Adam


def _gradnorm(m: int, learning_rate: optax.Schedule) -> Any:
    return jaxmtl.gradnorm(2.0, num_tasks=m, optimizer=optax.adam(learning_rate))


def _famo(m: int, dataset: str) -> Any:
    return jaxmtl.famo(num_tasks=m, weight_decay=0.01 if dataset == "nyuv2" else 0.001)


def _ldc(
    m: int, dataset: str, learning_rate: optax.Schedule, feature_size: int | None = None
) -> Any:
    # The authors' trainers: NYUv2 with losses over those of the first batch, Cityscapes without.
    own: dict[str, Any] = {"penalty": 0.1, "tau": "ones"}
    if dataset == "nyuv2":
        own = {"penalty": 0.05, "normalize": "ratio_min", "divide_weights": True}
    return jaxmtl.ldc_mtl(
        **own,
        num_tasks=m,
        form="code",
        weight_bounds=(0.2, 0.8),
        feature_size=feature_size,
        optimizer=optax.adam(learning_rate),
    )


def _rates(dataset: str) -> tuple[Any, Any]:
    """Returns beta and gamma of MoCo's authors."""
    if dataset == "nyuv2":
        return 0.99, 0.1
    return (lambda k: 0.05 / jnp.sqrt(k)), (lambda k: 0.1 / jnp.sqrt(k))


def _moco(m: int, dataset: str) -> Any:
    beta, gamma = _rates(dataset)
    return jaxmtl.moco(
        num_tasks=m,
        beta=beta,
        gamma=gamma,
        order="code",
        projection="softmax",
        normalize="norm_loss" if dataset == "nyuv2" else None,
    )


def _tracked(rule: Callable[..., Any]) -> Callable[..., Any]:
    def make(m: int, dataset: str) -> Any:
        tracker = jaxmtl.track_gradients(_rates(dataset)[0], num_tasks=m, initial="first")
        return optax.chain(tracker, rule(num_tasks=m))

    return make


_LIBRARY = methods.METHODS
_CAGRAD = {"c": 0.4}
_BY_LOSSES = ("scale_invariant", "rlw", "go4align")
_BY_ROWS = ("mgda", "pcgrad", "gradvac", "cagrad", "imtl_g", "fairgrad", "graddrop", "upgrad")

METHODS: dict[str, Entry] = {
    # The sum of the losses.
    "linear_scalarization": entry(
        Method(lambda m: jaxmtl.linear_scalarization(jnp.ones(m), num_tasks=m))
    ),
    **{name: entry(_LIBRARY[name]) for name in _BY_LOSSES},
    "dwa": entry(_LIBRARY["dwa"].using(window=25)),
    "uncertainty_weighting": Entry(Method(uncertainty, asks=("learning_rate",)), "losses"),
    "famo": Entry(Method(_famo, ("previous_batch_losses",), asks=("dataset",)), "losses"),
    "ldc_mtl": Entry(Method(_ldc, asks=("dataset", "learning_rate")), "losses"),
    "ldc_mtl_router": Entry(
        Method(_ldc, asks=("dataset", "learning_rate", "feature_size")), "features"
    ),
    "gradnorm": Entry(Method(_gradnorm, asks=("learning_rate",)), "layer"),
    **{name: entry(_LIBRARY[name]) for name in _BY_ROWS},
    # The bound of the authors' codes: the update does not vanish with J.
    "nash_mtl": entry(_LIBRARY["nash_mtl"].using(max_norm=1.0)),
    # The sum of the balanced rows.
    "aligned_mtl": entry(Method(lambda m: jaxmtl.aligned_mtl(preference=jnp.ones(m), num_tasks=m))),
    "moco": Entry(Method(_moco, asks=("dataset",)), "rows"),
    "moco_pcgrad": Entry(Method(_tracked(jaxmtl.pcgrad), asks=("dataset",)), "rows"),
    "moco_cagrad": Entry(
        Method(
            _tracked(lambda num_tasks: jaxmtl.cagrad(0.4, num_tasks=num_tasks)), asks=("dataset",)
        ),
        "rows",
    ),
    **{f"cr_{name}": entry(averaged(_LIBRARY[name])) for name in ("mgda", "pcgrad", "cagrad")},
    # At the features. On MTAN and Cross-Stitch every loss reads its own: the Gramian is diagonal,
    # so that these weigh by norms alone, and GradDrop drops nothing.
    "mgda_ub": entry(_LIBRARY["mgda"], "features"),
    "aligned_mtl_ub": entry(
        Method(lambda m: jaxmtl.aligned_mtl(preference=jnp.ones(m), num_tasks=m)), "features"
    ),
    "graddrop_ub": entry(
        Method(lambda m: jaxmtl.graddrop(activations=True, leak=jnp.full(m, 0.5), num_tasks=m)),
        "features",
    ),
}
