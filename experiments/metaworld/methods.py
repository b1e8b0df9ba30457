"""The rules under study, and the direction that a rule makes of the gradients of all tasks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Method, needs

Params = Any
State = Any
SINGLE = "single_task"  # an agent per task; on the same footing as the rules in records
BASELINE = "linear_scalarization"  # the mean
LIBRARY = methods.METHODS

_CHANGED = {
    "cagrad": LIBRARY["cagrad"].using(c=0.9),
    "moco": LIBRARY["moco"].using(beta=0.99, gamma=10.0),
    "cagrad_moco": LIBRARY["cagrad"]
    .using(c=0.9)
    .then(lambda rule, m: optax.chain(jaxmtl.track_gradients(0.99, num_tasks=m), rule)),
    # Adam divides by the size of the update: sum and mean over tasks are the same here.
    "pcgrad": LIBRARY["pcgrad"].using(reduction="mean"),
    "nash_mtl": LIBRARY["nash_mtl"].using(max_norm=1.0),
}
_PAPERS = (BASELINE, "pcgrad", "cagrad", "moco", "cagrad_moco", "nash_mtl", "aligned_mtl", "upgrad")
_OF_GRADIENTS = {
    name
    for name, description in jaxmtl.methods().items()
    if set(description.needs) <= {"gramian", "jacobian"}
}
# Those of the papers first, then every other rule of the library that reads gradients alone.
METHODS: dict[str, Method] = {
    name: _CHANGED.get(name) or LIBRARY[name]
    for name in (*_PAPERS, *sorted(_OF_GRADIENTS.difference(_PAPERS)))
}
REFUSED = tuple(sorted(set(LIBRARY).difference(METHODS)))


def check_method(name: str, num_tasks: int) -> None:
    """Raises a ValueError where a rule does not suit actors, or so few tasks."""
    if name in REFUSED:
        inputs = ", ".join(n for n in jaxmtl.methods()[name].needs if n not in ("gramian",))
        raise ValueError(
            f"expected a rule that reads gradients alone, got {name!r}, which reads {inputs}: the "
            "losses of an actor change their sign, so that their logarithms and ratios mean "
            f"nothing; take one of {', '.join(METHODS)}"
        )
    if name != SINGLE and num_tasks < METHODS[name].min_tasks:
        raise ValueError(
            f"expected at least {METHODS[name].min_tasks} tasks for {name!r}, got {num_tasks}; "
            "name more tasks, or take another rule"
        )


class Direction(NamedTuple):
    """What a rule makes of the losses of all tasks, each on its own batch.

    Both updates are ``(params, state, data, key) -> (losses, aux, update, state, log)``, with
    ``data`` a tuple of trees that have a leading axis of tasks but where ``axes`` say None.
    """

    init: Callable[[Params], State]
    update: Callable[..., Any]  # its log is empty
    monitored: Callable[..., Any]  # with the rows' norms and cosines, and the rule's weights


def make_direction(
    name: str, num_tasks: int, loss: Callable[..., Any], axes: tuple[Any, ...]
) -> Direction:
    """Makes the direction of a rule by the library's route of separate batches.

    Every gradient is computed once, on the batch of its own task. Parameters of one task alone
    (``"heads"``) get their own gradient; the rule acts on the trunk. A rule with weights takes the
    route without rows, but where it is monitored.

    Args:
      name: Of a method, or `SINGLE`, for parameters without a trunk.
      num_tasks: m.
      loss: ``(params, *data) -> ((), aux)`` of one task.
      axes: Those of the parameters and of the data over tasks.

    Returns:
      Its functions.
    """
    of_all = jax.vmap(loss, axes)

    def one_pass(params: Params, state: State, data: Any, key: jax.Array) -> Any:
        del key

        def total(params: Params) -> Any:
            losses, aux = of_all(params, *data)
            return losses.sum(), (losses, aux)

        (_, (losses, aux)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return losses, aux, grads, state, {}

    if name == SINGLE:
        return Direction(lambda params: optax.EmptyState(), one_pass, one_pass)

    aggregator = METHODS[name].make(num_tasks)
    own = jaxmtl.linear_scalarization(jnp.ones(num_tasks))
    rule: optax.GradientTransformationExtraArgs = aggregator
    if "heads" in axes[0]:
        rule = optax.partition(
            {"trunk": aggregator, "heads": own}, lambda params: {p: p for p in params}
        )
    of_rows = jaxmtl.value_and_jacobian(loss, in_axes=axes, has_aux=True)

    def by_rows(params: Params, state: State, data: Any, key: jax.Array) -> Any:
        (losses, aux), jacobian = of_rows(params, *data)
        update, state = rule.update(jacobian, state, params, losses=losses, key=key)
        return losses, aux, update, state, jacobian

    def unwatched(params: Params, state: State, data: Any, key: jax.Array) -> Any:
        return *by_rows(params, state, data, key)[:-1], {}

    def monitored(params: Params, state: State, data: Any, key: jax.Array) -> Any:
        *found, state, jacobian = by_rows(params, state, data, key)
        log = jaxmtl.monitor(jacobian=jacobian["trunk"], state=state)
        kept = ("weights", "norms", "cosines", "conflict_rate")
        return *found, state, {part: log[part] for part in kept if part in log}

    if needs(METHODS[name]) == "coordinates" or "heads" in axes[0]:
        return Direction(rule.init, unwatched, monitored)

    # The weights of the rule, without its rows where they are not logged: less to read and write.
    value_and_grad = jaxmtl.value_and_grad(loss, aggregator, in_axes=axes, has_aux=True)

    def by_weights(params: Params, state: State, data: Any, key: jax.Array) -> Any:
        ((losses, aux), state), grads = value_and_grad(params, state, *data, key=key)
        return losses, aux, grads, state, {}

    return Direction(rule.init, by_weights, monitored)
