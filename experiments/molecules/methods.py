"""The methods under study, and a step by the cheaper of two ways."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxmtl
from experiments import methods
from experiments.methods import Method, needs
from jaxmtl.learned import LearnedState

Params = Any  # {"shared": ..., "heads": ...}
State = Any

LIBRARY = methods.METHODS
SINGLE = "single_task"  # a network per task; on the same footing as the methods in records
# Balance losses, at the price of one gradient.
LOSS_BALANCING: dict[str, Method] = {
    "linear_scalarization": LIBRARY["linear_scalarization"],
    "scale_invariant": LIBRARY["scale_invariant"],
    "rlw": LIBRARY["rlw"],
    "dwa": LIBRARY["dwa"]._replace(asks=("steps_per_epoch",)),
    "uncertainty_weighting": LIBRARY["uncertainty_weighting"],
    "famo": LIBRARY["famo"],
    "go4align": LIBRARY["go4align"],
    # Its authors' code for QM9.
    "ldc_mtl": LIBRARY["ldc_mtl"]
    .using(penalty=0.05, form="code", activation="relu_sigmoid", normalize="log")
    ._replace(asks=("steps_per_epoch",)),
}
# Read the Gramian of the gradients.
GRADIENT_BALANCING: dict[str, Method] = {
    "mgda": LIBRARY["mgda"],
    "pcgrad": LIBRARY["pcgrad"],
    "cagrad": LIBRARY["cagrad"],
    "imtl_g": LIBRARY["imtl_g"],
    # Their authors' codes bound the norm of the update by 1.
    "nash_mtl": LIBRARY["nash_mtl"].using(max_norm=1.0),
    "fairgrad": LIBRARY["fairgrad"].using(max_norm=1.0),
    "aligned_mtl": LIBRARY["aligned_mtl"],
    "upgrad": LIBRARY["upgrad"],
}
METHODS = LOSS_BALANCING | GRADIENT_BALANCING


def make_direction(
    method: Method, m: int, steps_per_epoch: int
) -> tuple[Callable[[Params], State], Callable[..., Any]]:
    """Returns ``init`` and ``(losses_fn, params, state, **inputs) -> (losses, update, state)``.

    A method that never looks at gradients takes one backward pass over everything. The others get
    the rows of the shared parameters, and every head its own gradient. With as few parameters as
    here rows are cheaper than to push every gradient forward again; on CPU one at a time, which
    stays in its caches.
    """
    aggregator = method.build(m, steps_per_epoch=steps_per_epoch)
    if needs(method) == "none":

        def one_pass(losses_fn: Any, params: Params, state: State, **inputs: Any) -> Any:
            step = jaxmtl.value_and_grad(losses_fn, aggregator)
            (losses, state), grads = step(params, state, **inputs)
            return losses, grads, state

        return aggregator.init, one_pass

    own = jaxmtl.linear_scalarization(jnp.ones(m))
    chunk_size = 1 if jax.default_backend() == "cpu" else None

    def init(params: Params) -> State:
        return aggregator.init(params["shared"]), own.init(params["heads"])

    def by_rows(losses_fn: Any, params: Params, state: State, **inputs: Any) -> Any:
        rows_of = jaxmtl.value_and_jacobian(losses_fn, chunk_size=chunk_size)
        losses, rows = rows_of(params)
        shared, first = aggregator.update(
            rows["shared"], state[0], params["shared"], losses=losses, **inputs
        )
        heads, second = own.update(rows["heads"], state[1], params["heads"], losses=losses)
        return losses, {"shared": shared, "heads": heads}, (first, second)

    return init, by_rows


def weights_of(state: State) -> dict[str, jax.Array]:
    """Returns the weights (m,) of the last step, and those of LDC-MTL's router, of sum 1."""
    state = state if hasattr(state, "mtl_weights") else state[0]
    found = {"weights": state.mtl_weights}
    if isinstance(router := getattr(state.inner, "router", None), LearnedState):
        sigma = jax.nn.sigmoid(jax.nn.relu(router.values["logits"]))
        found["router"] = sigma / jnp.sum(sigma)
    return found
