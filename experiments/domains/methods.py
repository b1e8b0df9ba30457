"""The methods under study, and the direction that one makes of the losses of all domains."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Method, needs

Params = Any  # {"shared": ..., "heads": {domain: ...}}
State = Any
BASELINE = "linear_scalarization"  # the paper's "Mean"
LIBRARY = methods.METHODS


def _root(start: float) -> Callable[[jax.Array], jax.Array]:
    return lambda k: start / jnp.sqrt(k)


def _averaged(name: str) -> Method:
    return LIBRARY[name].then(lambda rule, m: jaxmtl.cr_mogm(rule, num_tasks=m))


# The sum of the losses, as LibMTL has it; Adam steps the same by their mean.
_SUM = Method(lambda m: jaxmtl.linear_scalarization(jnp.ones(m), num_tasks=m))
# Of the paper's tables.
PAPER: dict[str, Method] = {
    BASELINE: _SUM,
    "mgda": LIBRARY["mgda"],
    "pcgrad": LIBRARY["pcgrad"],
    "graddrop": LIBRARY["graddrop"],
    "cagrad": LIBRARY["cagrad"].using(c=0.5),  # LibMTL's default
    "moco": LIBRARY["moco"].using(  # LibMTL's form, the paper's rates
        beta=_root(0.5),
        gamma=_root(0.1),
        order="code",
        projection="softmax",
        normalize="norm_loss",
    ),
}
OTHERS: dict[str, Method] = {
    "upgrad": LIBRARY["upgrad"],
    "aligned_mtl": LIBRARY["aligned_mtl"],
    # The bound of the authors' code: the update does not vanish with J.
    "nash_mtl": LIBRARY["nash_mtl"].using(max_norm=1.0),
    "imtl_g": LIBRARY["imtl_g"],
    "fairgrad": LIBRARY["fairgrad"].using(max_norm=1.0),
    "gradvac": LIBRARY["gradvac"],
    **{f"cr_{name}": _averaged(name) for name in ("mgda", "pcgrad", "cagrad")},
}
LOSS_BALANCING: dict[str, Method] = {
    **{name: LIBRARY[name] for name in ("scale_invariant", "rlw", "famo", "go4align")},
    "dwa": LIBRARY["dwa"]._replace(asks=("steps_per_epoch",)),
    "uncertainty_weighting": LIBRARY["uncertainty_weighting"].using(kind="classification"),
    "ldc_mtl": LIBRARY["ldc_mtl"],
}
METHODS = PAPER | OTHERS | LOSS_BALANCING


def make_direction(
    method: Method, losses: Mapping[str, Callable[..., Any]], steps_per_epoch: int
) -> tuple[Callable[[Params], State], Callable[..., Any]]:
    """Makes the direction of a method by the library's route of separate data.

    Every loss is differentiated once, on its own batch. A method without a look at gradients takes
    the sum of the weighted ones; one that weighs by the Gramian of the shared part lets last layers
    have the gradient of their own loss; one that needs coordinates gets the rows.

    Args:
      method: Of ``METHODS``.
      losses: By domain, ``(params, batch) -> ((), aux)``.
      steps_per_epoch: Some methods ask for it.

    Returns:
      ``init(params) -> state`` and ``(params, state, batches, **inputs) -> (losses (m,), aux by
      domain, grads, state)``.
    """
    m = len(losses)
    aggregator = method.build(m, steps_per_epoch=steps_per_epoch)
    if needs(method) != "coordinates":
        shared = None if needs(method) == "none" else {"shared": True, "heads": False}
        step = jaxmtl.value_and_grad(losses, aggregator, shared=shared, has_aux=True)

        def by_weights(params: Params, state: State, batches: Any, **inputs: Any) -> Any:
            ((found, aux), state), grads = step(params, state, batches, **inputs)
            return jnp.stack(list(found.values())), aux, grads, state

        return aggregator.init, by_weights

    own = jaxmtl.linear_scalarization(jnp.ones(m))
    rule = optax.partition({"shared": aggregator, "own": own}, {"shared": "shared", "heads": "own"})
    rows_of = jaxmtl.value_and_jacobian(losses, has_aux=True)

    def by_rows(params: Params, state: State, batches: Any, **inputs: Any) -> Any:
        (found, aux), jacobian = rows_of(params, batches)
        grads, state = rule.update(jacobian, state, params, losses=found, **inputs)
        return jnp.stack(list(found.values())), aux, grads, state

    return rule.init, by_rows
