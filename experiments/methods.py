"""The one table of methods; studies select from it and override.

Every method of the library is in it under its own name, with what the studies agree on where the
library leaves a number open.
"""

from collections.abc import Callable, Iterable
from functools import partial
from inspect import isfunction, signature
from typing import Any, NamedTuple

import jax
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


def make(name: str, num_tasks: int, **hyperparameters: Any) -> jaxmtl.Aggregator:
    """Returns a method of the library for so many tasks."""
    factory = getattr(jaxmtl, name)
    if "num_tasks" in signature(factory).parameters:
        hyperparameters["num_tasks"] = num_tasks
    aggregator: jaxmtl.Aggregator = factory(**hyperparameters)
    return aggregator


def library_names() -> Iterable[str]:
    """Yields what makes an aggregator of nothing but hyperparameters."""
    for name in jaxmtl.__all__:
        thing = getattr(jaxmtl, name)
        if not isfunction(thing) or signature(thing).return_annotation is not jaxmtl.Aggregator:
            continue
        if not {"aggregator", "inner", "weigh"} & set(signature(thing).parameters):
            yield name


def needs(method: Method) -> str:
    """Returns what a method has to see of the gradients: coordinates, Gramian, or none."""
    weighting = getattr(method.make(max(method.min_tasks, 2)), "weighting", None)  # a chain: none
    if weighting is None:
        return "coordinates"
    return "Gramian" if "gramian" in weighting.rule.reads else "none"


def corollary_1(shape: optax.Schedule) -> Callable[[Any, int], Any]:
    """Returns the CR- form of Zhou 2022, whose alpha needs the learning rate up to a factor."""
    return lambda aggregator, m: jaxmtl.cr_mogm(
        aggregator, alpha="corollary1", learning_rate=shape, num_tasks=m
    )


def mean(aggregator: Any, num_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Divides a sum over tasks by m: one learning rate then suits sums and means."""
    return optax.chain(aggregator, optax.scale(1 / num_tasks))


def pcgrad_mean(num_tasks: int) -> jaxmtl.Aggregator:
    """Returns PCGrad as Zhou 2022 writes it, the mean of the projected gradients.

    It is a rule of its own and not ``pcgrad`` scaled afterwards: corollary 1 measures how far the
    weights move, and starts them at 1/m.
    """
    inner = jaxmtl.pcgrad().weighting

    def weigh(
        gramian: jax.Array, state: Any, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        weights, state = inner.update(gramian, state, key=key)
        return weights / len(weights), state

    return jaxmtl.from_weighting(weigh, init=inner.init, num_tasks=num_tasks)


_INPUTS = {
    "famo": ("previous_batch_losses",),
    "modo": ("cross_gramian",),
    "sdmgrad": ("cross_gramian",),
}
_MIN_TASKS = {"krum": 5, "trimmed_mean": 3}
_HYPERPARAMETERS: dict[str, dict[str, Any]] = {"cagrad": {"c": 0.4}, "fairgrad": {"alpha": 2.0}}

METHODS: dict[str, Method] = {
    name: Method(
        partial(make, name, **_HYPERPARAMETERS.get(name, {})),
        _INPUTS.get(name, ()),
        _MIN_TASKS.get(name, 1),
    )
    for name in library_names()
} | {"pcgrad_mean": Method(pcgrad_mean)}
