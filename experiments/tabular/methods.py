"""The methods under study, their inputs, and a step by the quicker of the library's routes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmtl
from experiments import methods
from experiments.methods import Method, needs

Params = Any  # {"shared": ..., "towers": ...[, "gates": ...]}
State = Any
Losses = Callable[..., jax.Array]  # (params, examples) -> (m,)


def swept_weights(m: int, shares: np.ndarray | None = None) -> np.ndarray:
    """Returns weights of a scalarization (k, m), of sum 1.

    For two tasks a grid. For more, eight powers of the inverse variances of binary labels with
    these shares of positive ones, from nearly equal weights to nearly all on the rarest label, and
    eight vectors drawn at random; in a regression, where variances are 1, sixteen of these.
    """
    if m == 2:
        first = np.array([0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 0.98])
        return np.stack([first, 1 - first], axis=1)
    powers = np.array([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0])[:, None]
    drawn = np.random.default_rng(0).normal(size=(8 if shares is not None else 16, m)) / 2
    logits = drawn
    if shares is not None:
        logits = np.concatenate([-powers * np.log(shares * (1 - shares)), drawn])
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


LIBRARY = methods.METHODS
SINGLE = "single_task"  # a network per task; on the same footing as the methods in records
# Adam divides the update by its size: sums and means over tasks, which differ by a factor, are
# the same here, and one grid of learning rates serves all.
METHODS: dict[str, Method] = LIBRARY | {
    "dwa": LIBRARY["dwa"]._replace(asks=("steps_per_epoch",)),
    "moco": LIBRARY["moco"].using(initial="first"),
    # The form and the numbers that its authors use for CelebA, many binary labels as here.
    "ldc_mtl": LIBRARY["ldc_mtl"].using(
        penalty=0.01, form="code", activation="sigmoid", weight_bounds=(0.2, 0.8)
    ),
    "cr_mogm_mgda": LIBRARY["mgda"].then(lambda rule, m: jaxmtl.cr_mogm(rule, num_tasks=m)),
    "every_k_mgda": LIBRARY["mgda"].then(lambda rule, m: jaxmtl.every_k(rule, 10, num_tasks=m)),
    "scale_rows_mgda": LIBRARY["mgda"].then(lambda rule, m: jaxmtl.scale_rows(rule, by="norm")),
    "track_gradients_pcgrad": LIBRARY["pcgrad"].then(
        lambda rule, m: optax.chain(jaxmtl.track_gradients(0.5, num_tasks=m, initial="first"), rule)
    ),
    "clip_rows_upgrad": LIBRARY["upgrad"].then(
        lambda rule, m: optax.chain(jaxmtl.clip_rows(0.1), rule)
    ),
    # The honest baseline: every weight vector is a training of its own, in the same program.
    "swept_scalarization": LIBRARY["linear_scalarization"]._replace(asks=("weights",)),
}
# Of methods that ask for weights: (m, shares of positive labels if binary) -> weights (k, m).
SWEEPS: dict[str, Callable[..., np.ndarray]] = {"swept_scalarization": swept_weights}


class Batches(NamedTuple):
    """Numbers (b,) of the examples of three minibatches."""

    previous: jax.Array  # of the last step
    current: jax.Array
    ahead: jax.Array  # of the next step: not yet seen in this epoch


def is_shared(path: Any) -> bool:
    """Tells whether a parameter is one that all tasks share."""
    return path[0].key == "shared"


def previous_batch_losses(losses_fn: Losses, params: Params, batches: Batches) -> jax.Array:
    """Returns the losses of the last minibatch at the parameters to which its step has led."""
    return losses_fn(params, batches.previous)


def cross_gramian(losses_fn: Losses, params: Params, batches: Batches) -> jax.Array:
    """Returns ``J_1 J_2^T`` of the halves of the next minibatch.

    They are independent of each other and of the current one, from which the step is.
    """
    first, second = jnp.split(batches.ahead, 2)
    return jaxmtl.cross_gramian(losses_fn, shared=is_shared)(params, (first,), (second,))


INPUTS: dict[str, Callable[[Losses, Params, Batches], jax.Array]] = {
    "previous_batch_losses": previous_batch_losses,
    "cross_gramian": cross_gramian,
}


def make_direction(
    method: Method, m: int, steps: int, weights: jax.Array | None
) -> tuple[Callable[[Params], State], Callable[..., tuple[Params, State]]]:
    """Returns init and update of a method, by the quicker of the library's two routes.

    A method that never looks at gradients takes one backward pass over everything. The others get
    the rows of the shared parameters; every task's own parameters get their own gradient.
    """
    aggregator = method.build(m, steps_per_epoch=steps, weights=weights)
    if needs(method) == "none":

        def one_pass(
            losses_fn: Callable[[Params], jax.Array], params: Params, state: State, **extra: Any
        ) -> tuple[Params, State]:
            (_, state), grads = jaxmtl.value_and_grad(losses_fn, aggregator)(params, state, **extra)
            return grads, state

        return aggregator.init, one_pass

    split = optax.partition(
        {"shared": aggregator, "own": jaxmtl.linear_scalarization(jnp.ones(m))},
        lambda params: {
            key: jax.tree.map(lambda _, key=key: "shared" if key == "shared" else "own", tree)
            for key, tree in params.items()
        },
    )

    def by_rows(
        losses_fn: Callable[[Params], jax.Array], params: Params, state: State, **extra: Any
    ) -> tuple[Params, State]:
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params)
        update, state = split.update(jacobian, state, params, losses=losses, **extra)
        return update, state

    return split.init, by_rows
