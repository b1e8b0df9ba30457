"""The methods of the papers' tables, each with the route that it takes through the library."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Entry, Method, corollary_1, entry, uncertainty

SINGLE = "single_task"  # a network per task; on the same footing as the methods in records


class Known(NamedTuple):
    """What only the training knows and some methods ask for."""

    dataset: str
    feature_size: int  # channels of z
    learning_rate: optax.Schedule  # of the network's Adam
    penalty: float | None = None  # lambda of LDC-MTL; None: its authors'
    task_weights: tuple[float, ...] | None = None  # of linear scalarization; None: 1 each


def _scalarization(m: int, task_weights: tuple[float, ...] | None = None) -> Any:
    weights = jnp.ones(m) if task_weights is None else jnp.asarray(task_weights)
    return jaxmtl.linear_scalarization(weights, num_tasks=m)


def _gradnorm(m: int, learning_rate: optax.Schedule) -> Any:
    return jaxmtl.gradnorm(2.0, num_tasks=m, optimizer=optax.adam(learning_rate))


def _famo(m: int, dataset: str) -> Any:
    return jaxmtl.famo(num_tasks=m, weight_decay=0.01 if dataset == "nyuv2" else 0.001)


def _ldc(
    m: int,
    dataset: str,
    learning_rate: optax.Schedule,
    penalty: float | None,
    feature_size: int | None = None,
) -> Any:
    # The authors' trainers: NYUv2 with losses over those of the first batch, Cityscapes without.
    own: dict[str, Any] = {"penalty": 0.1, "tau": "ones"}
    if dataset == "nyuv2":
        own = {"penalty": 0.05, "normalize": "ratio_min", "divide_weights": True}
    if penalty is not None:
        own["penalty"] = penalty
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


_LIBRARY = methods.METHODS


def _moco_pcgrad(m: int) -> Any:
    return _tracked(_LIBRARY["pcgrad"], m, 0.99)


def _moco_cagrad(m: int, dataset: str) -> Any:
    beta: Any = (lambda k: 0.99 / jnp.sqrt(k)) if dataset == "nyuv2" else 0.99
    return _tracked(_LIBRARY["cagrad"], m, beta)


def _tracked(rule: Method, m: int, beta: Any) -> Any:
    """Returns a rule on tracked gradients, with the rates of MoCo's appendix F."""
    tracker = jaxmtl.track_gradients(beta, num_tasks=m, initial="first")
    return optax.chain(tracker, rule.make(m))


def _averaged(name: str) -> Entry:
    """Returns the CR- form of a rule, whose alpha follows Adam's rate as corollary 1 says."""

    def make(m: int, learning_rate: optax.Schedule) -> Any:
        return corollary_1(learning_rate)(_LIBRARY[name].make(m), m)

    return Entry(Method(make, asks=("learning_rate",)), "rows")


_BY_LOSSES = ("scale_invariant", "rlw", "go4align")
_BY_ROWS = ("mgda", "pcgrad", "gradvac", "cagrad", "imtl_g", "graddrop", "upgrad")

METHODS: dict[str, Entry] = {
    # The sum of the losses.
    "linear_scalarization": entry(Method(_scalarization, asks=("task_weights",))),
    **{name: entry(_LIBRARY[name]) for name in _BY_LOSSES},
    "dwa": entry(_LIBRARY["dwa"].using(window=25)),
    "uncertainty_weighting": Entry(Method(uncertainty, asks=("learning_rate",)), "losses"),
    "famo": Entry(Method(_famo, ("previous_batch_losses",), asks=("dataset",)), "losses"),
    # Logits of its own in place of the paper's router, which reads the features.
    "ldc_mtl": Entry(Method(_ldc, asks=("dataset", "learning_rate", "penalty")), "losses"),
    "ldc_mtl_router": Entry(
        Method(_ldc, asks=("dataset", "learning_rate", "penalty", "feature_size")), "features"
    ),
    "gradnorm": Entry(Method(_gradnorm, asks=("learning_rate",)), "layer"),
    **{name: entry(_LIBRARY[name]) for name in _BY_ROWS},
    # The bounds of their authors' codes: the update does not vanish with J.
    "nash_mtl": entry(_LIBRARY["nash_mtl"].using(max_norm=1.0)),
    "fairgrad": entry(_LIBRARY["fairgrad"].using(max_norm=1.0)),
    # The sum of the balanced rows.
    "aligned_mtl": entry(Method(lambda m: jaxmtl.aligned_mtl(preference=jnp.ones(m), num_tasks=m))),
    "moco": Entry(Method(_moco, asks=("dataset",)), "rows"),
    "moco_pcgrad": Entry(Method(_moco_pcgrad), "rows"),
    "moco_cagrad": Entry(Method(_moco_cagrad, asks=("dataset",)), "rows"),
    **{f"cr_{name}": _averaged(name) for name in ("mgda", "pcgrad", "cagrad")},
    # At the features. On MTAN and Cross-Stitch every loss reads its own: the Gramian is diagonal,
    # so that these weigh by norms alone, and GradDrop drops nothing. Senushkin et al. ran GradDrop
    # so with PSPNet; the rows of MTAN are those of CAGrad's paper, by gradients of parameters.
    "mgda_ub": entry(_LIBRARY["mgda"], "features"),
    "aligned_mtl_ub": entry(
        Method(lambda m: jaxmtl.aligned_mtl(preference=jnp.ones(m), num_tasks=m)), "features"
    ),
    "graddrop_ub": entry(
        Method(lambda m: jaxmtl.graddrop(activations=True, leak=jnp.full(m, 0.5), num_tasks=m)),
        "features",
    ),
}
