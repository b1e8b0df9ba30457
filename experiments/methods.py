"""The one table of methods; studies select from it and override.

Every method of the library is in it under its own name, with what the studies agree on where the
library leaves a number open.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxmtl


class Method(NamedTuple):
    """A method as a study takes it."""

    make: Callable[..., Any]  # (number of tasks, **hyperparameters that the study sets)
    inputs: tuple[str, ...] = ()  # of its update, beyond the gradients, ``losses`` and ``key``
    min_tasks: int = 1
    asks: tuple[str, ...] = ()  # hyperparameters that only the driver of a study knows

    def build(self, num_tasks: int, **known: Any) -> Any:
        """Returns what ``make`` makes with those of the known hyperparameters that it asks for."""
        return self.make(num_tasks, **{name: known[name] for name in self.asks})

    def using(self, **hyperparameters: Any) -> "Method":
        """Returns the method with other hyperparameters."""
        return self._replace(make=partial(self.make, **hyperparameters))

    def then(self, change: Callable[[Any, int], Any]) -> "Method":
        """Returns the method with a change of what is made: ``(made, number of tasks)``."""
        return self._replace(make=lambda m, **more: change(self.make(m, **more), m))


def needs(method: Method) -> str:
    """Returns what a method has to see of the gradients: coordinates, Gramian, or none."""
    weighting = getattr(method.make(max(method.min_tasks, 2)), "weighting", None)  # a chain: none
    if weighting is None:
        return "coordinates"
    return "Gramian" if "gramian" in weighting.rule.needs else "none"


class Entry(NamedTuple):
    """A method and its route through a network with a trunk.

    Routes: ``"losses"``, one backward pass of the weighted loss; ``"rows"``, the gradients of all
    parameters that are not heads; ``"features"``, gradients at z; ``"layer"``, the Gramian of the
    last shared layer alone.
    """

    method: Method
    route: str

    def build(self, num_tasks: int, known: Any) -> Any:
        """Returns the aggregator, given a NamedTuple of what only the training knows."""
        return self.method.build(num_tasks, **known._asdict())


def entry(method: Method, route: str = "") -> Entry:
    """Returns a method with its route, which is by losses or rows if not given."""
    return Entry(method, route or ("losses" if needs(method) == "none" else "rows"))


def scaled_heads(aggregator: Any, state: Any, rows: Any) -> Any:
    """Returns the rows (m, ...) of the heads, each times the weight that a method gives its loss.

    Few methods give any, from their state before the step: others leave heads their own gradients.
    """
    weigh = getattr(getattr(aggregator, "weighting", None), "head_weights", None)
    if weigh is None:
        return rows
    weights = weigh(state)
    return jax.tree.map(lambda x: jax.vmap(jnp.multiply)(weights, x), rows)


def averaged(rule: Method) -> Method:
    """Returns the CR- form of a rule, with a constant alpha."""
    return rule.then(lambda aggregator, m: jaxmtl.cr_mogm(aggregator, num_tasks=m))


def uncertainty(m: int, learning_rate: optax.Schedule) -> Any:
    """Returns uncertainty weighting whose log variances the network's optimizer steps."""
    return jaxmtl.uncertainty_weighting(
        "classification", num_tasks=m, optimizer=optax.adam(learning_rate)
    )


def corollary_1(shape: optax.Schedule) -> Callable[[Any, int], Any]:
    """Returns the CR- form of Zhou 2022, whose alpha needs the learning rate up to a factor."""
    return lambda aggregator, m: jaxmtl.cr_mogm(
        aggregator, alpha="corollary1", learning_rate=shape, num_tasks=m
    )


def mean(aggregator: Any, num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Divides a sum over tasks by m: one learning rate then suits sums and means."""
    return optax.chain(aggregator, optax.scale(1 / num_tasks))


_MIN_TASKS = {"krum": 5, "trimmed_mean": 3}
_HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "cagrad": {"c": 0.4},
    "fairgrad": {"alpha": 2.0},
    "hypervolume_scalarization": {"reference": 2.0},  # above cross-entropies of two classes
}

METHODS: dict[str, Method] = {
    name: Method(
        lambda m, name=name, **more: jaxmtl.make(
            name, num_tasks=m, **(_HYPERPARAMETERS.get(name, {}) | more)
        ),
        tuple(n for n in description.needs if n not in ("gramian", "jacobian", "losses")),
        _MIN_TASKS.get(name, 1),
    )
    for name, description in jaxmtl.methods().items()
    if description.needs != ("rule",)
}
