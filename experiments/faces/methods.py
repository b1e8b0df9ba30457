"""The methods of the paper's table and others, each with the route that it takes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Method, needs

SINGLE = "single_task"  # a network per task; on the same footing as the methods in records
LIBRARY = methods.METHODS


class Known(NamedTuple):
    """What only the training knows and some methods ask for."""

    steps_per_epoch: int
    learning_rate: optax.Schedule  # of the network's Adam
    penalty: float  # lambda of LDC-MTL


class Entry(NamedTuple):
    """A method and its route.

    Routes: ``"losses"``, one backward pass of the weighted loss; ``"rows"``, the gradients of the
    trunk by all tasks; ``"features"``, the gradients at z.
    """

    method: Method
    route: str

    def build(self, num_tasks: int, known: Known) -> Any:
        """Returns the aggregator."""
        return self.method.build(num_tasks, **known._asdict())


def _uncertainty(m: int, learning_rate: optax.Schedule) -> Any:
    # The log variances are stepped by the network's optimizer.
    return jaxmtl.uncertainty_weighting(
        "classification", num_tasks=m, optimizer=optax.adam(learning_rate)
    )


def _ldc(**more: Any) -> Callable[..., Any]:
    """Returns what makes LDC-MTL as in its authors' code for CelebA.

    ``g + lambda f`` with sigma = sigmoid(W), W_0 = 1, and the sum of sigma, by which g is divided,
    a constant; W by Adam at 1e-3.
    """

    def make(m: int, penalty: float) -> Any:
        return jaxmtl.ldc_mtl(penalty, num_tasks=m, form="code", activation="sigmoid", **more)

    return make


def _averaged(rule: Method) -> Method:
    return rule.then(lambda aggregator, m: jaxmtl.cr_mogm(aggregator, num_tasks=m))


def _entry(method: Method, route: str = "") -> Entry:
    return Entry(method, route or ("losses" if needs(method) == "none" else "rows"))


_ALIGNED = Method(lambda m: jaxmtl.aligned_mtl(preference=jnp.ones(m), num_tasks=m))
_BY_ROWS = ("mgda", "pcgrad", "cagrad", "imtl_g")

METHODS: dict[str, Entry] = {
    # The sum of the losses.
    "linear_scalarization": _entry(
        Method(lambda m: jaxmtl.linear_scalarization(jnp.ones(m), num_tasks=m))
    ),
    "scale_invariant": _entry(LIBRARY["scale_invariant"]),
    "rlw": _entry(LIBRARY["rlw"]),
    "dwa": _entry(LIBRARY["dwa"]._replace(asks=("steps_per_epoch",))),
    "uncertainty_weighting": Entry(Method(_uncertainty, asks=("learning_rate",)), "losses"),
    "famo": _entry(LIBRARY["famo"]),
    "go4align": _entry(LIBRARY["go4align"]),
    "ldc_mtl": Entry(Method(_ldc(), asks=("penalty",)), "losses"),
    # f compares the tasks in a new order at each step.
    "ldc_mtl_shuffle": Entry(Method(_ldc(shuffle=True), asks=("penalty",)), "losses"),
    **{name: _entry(LIBRARY[name]) for name in _BY_ROWS},
    # The bounds of their authors' codes: the update does not vanish with J.
    "nash_mtl": _entry(LIBRARY["nash_mtl"].using(max_norm=1.0)),
    "fairgrad": _entry(LIBRARY["fairgrad"].using(max_norm=1.0)),
    # The sum of the balanced rows.
    "aligned_mtl": _entry(_ALIGNED),
    "upgrad": _entry(LIBRARY["upgrad"]),
    "moco": _entry(LIBRARY["moco"]),
    **{f"cr_{name}": _entry(_averaged(LIBRARY[name])) for name in ("mgda", "pcgrad", "cagrad")},
    # At the features of the batch, which one pass backwards takes to the trunk.
    "mgda_ub": _entry(LIBRARY["mgda"], "features"),
    "aligned_mtl_ub": _entry(_ALIGNED, "features"),
}
# In the order of the paper's table.
PAPER = (
    *("linear_scalarization", "scale_invariant", "rlw", "dwa", "uncertainty_weighting", "famo"),
    *("go4align", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "ldc_mtl"),
)
