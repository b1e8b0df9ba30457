"""The methods under study, and a step by the cheapest of three ways."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxmtl
from experiments import methods
from experiments.methods import Entry, entry, scaled_heads
from jaxmtl.learned import LearnedState

Params = Any  # {"shared": ..., "heads": ...}
State = Any

LIBRARY = methods.METHODS
SINGLE = "single_task"  # a network per task; on the same footing as the methods in records


class Known(NamedTuple):
    """What only the training knows and some methods ask for."""

    steps_per_epoch: int


# Balance losses, at the price of one gradient, or little more.
LOSS_BALANCING: dict[str, Entry] = {
    "linear_scalarization": entry(LIBRARY["linear_scalarization"]),
    "scale_invariant": entry(LIBRARY["scale_invariant"]),
    "rlw": entry(LIBRARY["rlw"]),
    "dwa": entry(LIBRARY["dwa"]._replace(asks=("steps_per_epoch",))),
    "uncertainty_weighting": entry(LIBRARY["uncertainty_weighting"]),
    "famo": entry(LIBRARY["famo"]),
    "go4align": entry(LIBRARY["go4align"]),
    # Its authors' code for QM9.
    "ldc_mtl": entry(
        LIBRARY["ldc_mtl"]
        .using(penalty=0.05, form="code", activation="relu_sigmoid", normalize="log")
        ._replace(asks=("steps_per_epoch",))
    ),
    "gls": entry(LIBRARY["gls"]),
    "imtl_l": entry(LIBRARY["imtl_l"]),
    # Its authors' code: four epochs of warm-up, a nadir from the one after.
    "stch": entry(LIBRARY["stch"].using(form="code")._replace(asks=("steps_per_epoch",))),
    "gradnorm": entry(LIBRARY["gradnorm"], "layer"),
}
# Read the Gramian of the gradients, or the gradients themselves.
GRADIENT_BALANCING: dict[str, Entry] = {
    "mgda": entry(LIBRARY["mgda"]),
    "pcgrad": entry(LIBRARY["pcgrad"]),
    "cagrad": entry(LIBRARY["cagrad"]),
    "imtl_g": entry(LIBRARY["imtl_g"]),
    # Their authors' codes bound the norm of the update by 1.
    "nash_mtl": entry(LIBRARY["nash_mtl"].using(max_norm=1.0)),
    "fairgrad": entry(LIBRARY["fairgrad"].using(max_norm=1.0)),
    "aligned_mtl": entry(LIBRARY["aligned_mtl"]),
    "upgrad": entry(LIBRARY["upgrad"]),
    "imtl": entry(LIBRARY["imtl"]),
    "db_mtl": entry(LIBRARY["db_mtl"]),
}
METHODS = LOSS_BALANCING | GRADIENT_BALANCING


def in_last_shared_layer(path: Sequence[Any]) -> bool:
    """Tells whether a parameter is in the last layer that all tasks share."""
    return path[0].key == "shared" and path[1].key == "features"


def make_direction(
    entry: Entry, m: int, steps_per_epoch: int
) -> tuple[Callable[[Params], State], Callable[..., Any]]:
    """Returns ``init`` and ``(losses_fn, params, state, **inputs) -> (losses, update, state)``.

    A method that never looks at gradients takes one backward pass over everything, and so does one
    that looks at the last shared layer alone. The others get the rows of the shared parameters,
    and every head its own gradient, or what the method says. With as few parameters as here rows
    are cheaper than to push every gradient forward again; on CPU one at a time, which stays in its
    caches.
    """
    aggregator = entry.build(m, Known(steps_per_epoch))
    chunk_size = 1 if jax.default_backend() == "cpu" else None
    if entry.route != "rows":
        shared = in_last_shared_layer if entry.route == "layer" else None

        def one_pass(losses_fn: Any, params: Params, state: State, **inputs: Any) -> Any:
            step = jaxmtl.value_and_grad(losses_fn, aggregator, shared=shared)
            (losses, state), grads = step(params, state, **inputs)
            return losses, grads, state

        return aggregator.init, one_pass

    own = jaxmtl.linear_scalarization(jnp.ones(m))

    def init(params: Params) -> State:
        return aggregator.init(params["shared"]), own.init(params["heads"])

    def by_rows(losses_fn: Any, params: Params, state: State, **inputs: Any) -> Any:
        rows_of = jaxmtl.value_and_jacobian(losses_fn, chunk_size=chunk_size)
        losses, rows = rows_of(params)
        shared, first = aggregator.update(
            rows["shared"], state[0], params["shared"], losses=losses, **inputs
        )
        of_heads = scaled_heads(aggregator, state[0], rows["heads"])
        heads, second = own.update(of_heads, state[1], params["heads"], losses=losses)
        return losses, {"shared": shared, "heads": heads}, (first, second)

    return init, by_rows


def weights_of(state: State) -> dict[str, jax.Array]:
    """Returns the weights (m,) of the last step, and those of LDC-MTL's router, of sum 1.

    Nothing of a method that has no weights.
    """
    state = state[0] if type(state) is tuple else state
    found = {"weights": state.mtl_weights} if hasattr(state, "mtl_weights") else {}
    if isinstance(router := getattr(state.inner, "router", None), LearnedState):
        sigma = jax.nn.sigmoid(jax.nn.relu(router.values["logits"]))
        found["router"] = sigma / jnp.sum(sigma)
    return found
