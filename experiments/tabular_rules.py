"""Every rule of the library as the driver of `experiments.tabular` takes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmtl

Params = Any  # {"shared": ..., "towers": ...[, "gates": ...]}
State = Any
Losses = Callable[..., jax.Array]  # (params, rows) -> (m,)


@dataclass(frozen=True)
class Rule:
    """A rule and what the driver has to know of it."""

    make: Callable[..., Any]  # (number of tasks, steps of an epoch[, setting]) -> aggregator
    extras: tuple[str, ...] = ()  # inputs of its update beyond losses and key: names in EXTRAS
    min_tasks: int = 1
    # Shares of positive labels (m,) -> (k, ...), trained side by side.
    settings: Callable[[np.ndarray], np.ndarray] | None = None


def swept_weights(shares: np.ndarray) -> np.ndarray:
    """Return weights of a scalarization (k, m), of sum 1.

    For two tasks a grid. For more, eight powers of the inverse variances of the labels, from nearly
    equal weights to nearly all on the rarest label, and eight vectors drawn at random.
    """
    m = len(shares)
    if m == 2:
        first = np.array([0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 0.98])
        return np.stack([first, 1 - first], axis=1)
    powers = np.array([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0])[:, None]
    logits = np.concatenate(
        [-powers * np.log(shares * (1 - shares)), np.random.default_rng(0).normal(size=(8, m)) / 2]
    )
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


mgda = jaxmtl.mgda

# Adam divides the update by its size: sums and means over tasks, which differ by a factor, are
# the same here, and one grid of learning rates serves all.
RULES: dict[str, Rule] = {
    "linear_scalarization": Rule(lambda m, steps: jaxmtl.linear_scalarization()),
    "rgw": Rule(lambda m, steps: jaxmtl.rgw()),
    "mgda": Rule(lambda m, steps: mgda()),
    "upgrad": Rule(lambda m, steps: jaxmtl.upgrad()),
    "dual_proj": Rule(lambda m, steps: jaxmtl.dual_proj()),
    "pcgrad": Rule(lambda m, steps: jaxmtl.pcgrad()),
    "gradvac": Rule(lambda m, steps: jaxmtl.gradvac(num_tasks=m)),
    "cagrad": Rule(lambda m, steps: jaxmtl.cagrad(0.4)),
    "imtl_g": Rule(lambda m, steps: jaxmtl.imtl_g()),
    "nash_mtl": Rule(lambda m, steps: jaxmtl.nash_mtl()),
    "fairgrad": Rule(lambda m, steps: jaxmtl.fairgrad(2.0)),
    "aligned_mtl": Rule(lambda m, steps: jaxmtl.aligned_mtl()),
    "config": Rule(lambda m, steps: jaxmtl.config()),
    "krum": Rule(lambda m, steps: jaxmtl.krum(1), min_tasks=5),
    "sdmgrad": Rule(lambda m, steps: jaxmtl.sdmgrad(num_tasks=m), ("cross_gramian",)),
    "modo": Rule(lambda m, steps: jaxmtl.modo(num_tasks=m), ("cross_gramian",)),
    "graddrop": Rule(lambda m, steps: jaxmtl.graddrop()),
    "trimmed_mean": Rule(lambda m, steps: jaxmtl.trimmed_mean(1), min_tasks=3),
    "moco": Rule(lambda m, steps: jaxmtl.moco(num_tasks=m, initial="first")),
    "excess_mtl": Rule(lambda m, steps: jaxmtl.excess_mtl(num_tasks=m)),
    "db_mtl": Rule(lambda m, steps: jaxmtl.db_mtl(num_tasks=m)),
    "scale_invariant": Rule(lambda m, steps: jaxmtl.scale_invariant()),
    "rlw": Rule(lambda m, steps: jaxmtl.rlw()),
    "dwa": Rule(lambda m, steps: jaxmtl.dwa(steps_per_epoch=steps, num_tasks=m)),
    "uncertainty_weighting": Rule(lambda m, steps: jaxmtl.uncertainty_weighting(num_tasks=m)),
    "imtl_l": Rule(lambda m, steps: jaxmtl.imtl_l(num_tasks=m)),
    "imtl": Rule(lambda m, steps: jaxmtl.imtl(num_tasks=m)),
    "gradnorm": Rule(lambda m, steps: jaxmtl.gradnorm(num_tasks=m)),
    "gls": Rule(lambda m, steps: jaxmtl.gls()),
    "stch": Rule(lambda m, steps: jaxmtl.stch()),
    "famo": Rule(lambda m, steps: jaxmtl.famo(num_tasks=m), ("previous_batch_losses",)),
    "go4align": Rule(lambda m, steps: jaxmtl.go4align(num_tasks=m)),
    # The form and the numbers that its authors use for CelebA, many binary labels as here.
    "ldc_mtl": Rule(
        lambda m, steps: jaxmtl.ldc_mtl(
            0.01, form="code", activation="sigmoid", weight_bounds=(0.2, 0.8), num_tasks=m
        )
    ),
    "cr_mogm_mgda": Rule(lambda m, steps: jaxmtl.cr_mogm(mgda(), num_tasks=m)),
    "every_k_mgda": Rule(lambda m, steps: jaxmtl.every_k(mgda(), 10, num_tasks=m)),
    "scale_rows_mgda": Rule(lambda m, steps: jaxmtl.scale_rows(mgda(), by="norm")),
    "track_gradients_pcgrad": Rule(
        lambda m, steps: optax.chain(
            jaxmtl.track_gradients(0.5, num_tasks=m, initial="first"), jaxmtl.pcgrad()
        )
    ),
    "clip_rows_upgrad": Rule(lambda m, steps: optax.chain(jaxmtl.clip_rows(0.1), jaxmtl.upgrad())),
    # The honest baseline: every weight vector is a training of its own, in the same program.
    "swept_scalarization": Rule(
        lambda m, steps, weights: jaxmtl.linear_scalarization(weights), settings=swept_weights
    ),
}
SINGLE = "single_task"  # a network per task; on the same footing as the rules in records


class Batches(NamedTuple):
    """Rows (b,) of three minibatches."""

    previous: jax.Array  # of the last step
    current: jax.Array
    ahead: jax.Array  # of the next step: not yet seen in this epoch


def is_shared(path: Any) -> bool:
    """Tell whether a parameter is one that all tasks share."""
    return path[0].key == "shared"


def previous_batch_losses(losses_fn: Losses, params: Params, batches: Batches) -> jax.Array:
    """Return the losses of the last minibatch at the parameters to which its step has led."""
    return losses_fn(params, batches.previous)


def cross_gramian(losses_fn: Losses, params: Params, batches: Batches) -> jax.Array:
    """Return `J_1 J_2^T` of the halves of the next minibatch.

    They are independent of each other and of the current one, from which the step is.
    """
    first, second = jnp.split(batches.ahead, 2)
    return jaxmtl.cross_gramian(losses_fn, shared=is_shared)(params, (first,), (second,))


EXTRAS: dict[str, Callable[[Losses, Params, Batches], jax.Array]] = {
    "previous_batch_losses": previous_batch_losses,
    "cross_gramian": cross_gramian,
}


def needs_of(aggregator: Any) -> str:
    """Return what a rule has to see of the gradients: coordinates, Gramian, or none."""
    weighting = getattr(aggregator, "weighting", None)  # a chain has none
    if weighting is None:
        return "coordinates"
    return "Gramian" if "gramian" in weighting.rule.needs else "none"


def make_direction(
    rule: Rule, m: int, steps: int, setting: tuple[jax.Array, ...]
) -> tuple[Callable[[Params], State], Callable[..., tuple[Params, State]]]:
    """Return init and update of a rule, by the quicker of the library's two routes.

    A rule that never looks at gradients takes one backward pass over everything. The others get
    the rows of the shared parameters; every task's own parameters get their own gradient.
    """
    aggregator = rule.make(m, steps, *setting)
    if needs_of(aggregator) == "none":

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
