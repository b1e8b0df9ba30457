"""The training of the molecules by one method, and the record of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxmtl
from experiments.checkpoints import Checkpoint
from experiments.molecules.data import Molecules, Split
from experiments.molecules.methods import (
    METHODS,
    SINGLE,
    Params,
    State,
    make_direction,
    weights_of,
)
from experiments.molecules.networks import Graphs, Network
from experiments.study import Record, Say, config_of

Parts = tuple[Molecules, ...]
# Smoke runs are mostly compilation, which XLA can then do in half the time.
QUICK: dict[str, bool | int] = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
# ReduceLROnPlateau(factor=0.7, patience=5) of PyTorch lets five epochs without a better value pass
# and acts on the sixth; optax counts that one too.
PLATEAU = {"factor": 0.7, "patience": 6, "rtol": 1e-4}
LEAST_RATE = 1e-5


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method and seed."""

    dataset: str
    width: int
    epochs: int
    batch_size: int = 120
    strata: int = 4  # parts of the molecules by size; a minibatch has as many of each
    learning_rate: float = 1e-3  # of Adam, at the start
    made_up: int | None = None  # molecules in place of the real ones, for smoke runs


class Carry(NamedTuple):
    """What goes from step to step."""

    params: Params
    state: State  # of the method
    moments: Any  # of Adam
    previous: tuple[jax.Array, ...]  # the last minibatch


def graphs_of(molecules: Molecules, index: jax.Array) -> Graphs:
    """Returns some molecules as the network takes them."""
    nodes, positions, bonds, sizes = (values[index] for values in molecules[:4])
    return Graphs(nodes.astype(positions.dtype), positions, bonds, sizes)


def steps_per_epoch(options: Options, train: Parts) -> int:
    """Returns the number of full minibatches."""
    return int(len(train[0].sizes) // (options.batch_size // options.strata))


def make_losses(network: Network) -> Callable[..., jax.Array]:
    """Returns the mean squared errors (m,) of a minibatch, which has an index of every stratum."""

    def losses_of(
        params: Params, train: Parts, batch: Sequence[jax.Array], columns: jax.Array
    ) -> jax.Array:
        errors = []
        for molecules, index in zip(train, batch, strict=True):
            outputs = network.apply({"params": params}, graphs_of(molecules, index))
            errors.append(outputs - molecules.targets[index][:, columns].T)
        return jnp.mean(jnp.concatenate(errors, axis=1) ** 2, axis=1)

    return losses_of


def compiled(options: Options, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function compiled quickly for made-up molecules, and well for real ones."""
    return jax.jit(function, compiler_options=QUICK if options.made_up else None)


@cache
def make_init(options: Options, m: int) -> Callable[[jax.Array, Graphs], Params]:
    """Returns a compiled function from a key and one molecule to parameters."""
    network = Network(m, options.width)
    return compiled(options, lambda key, graphs: network.init(key, graphs)["params"])


@cache  # the single tasks share one compiled program
def make_epoch(options: Options, name: str, m: int, steps: int) -> tuple[Any, Any]:
    """Returns ``start(params) -> carry`` and one compiled epoch, a ``scan``."""
    entry = METHODS["linear_scalarization" if name == SINGLE else name]
    init, direction = make_direction(entry, m, steps)
    losses_of, adam = make_losses(Network(m, options.width)), optax.scale_by_adam()
    size = options.batch_size // options.strata

    def start(params: Params) -> Carry:
        blank = tuple(jnp.zeros(size, jnp.int32) for _ in range(options.strata))
        return Carry(params, init(params), adam.init(params), blank)

    def epoch(
        carry: Carry, rate: jax.Array, key: jax.Array, columns: jax.Array, train: Parts
    ) -> tuple[Carry, Record]:
        def step(carry: Carry, inputs: Any) -> tuple[Carry, Record]:
            batch, key = inputs
            extra = {}
            if "previous_batch_losses" in entry.method.inputs:
                again = losses_of(carry.params, train, carry.previous, columns)
                extra["previous_batch_losses"] = again
            losses, grads, state = direction(
                lambda params: losses_of(params, train, batch, columns),
                carry.params,
                carry.state,
                key=key,
                **extra,
            )
            update, moments = adam.update(grads, carry.moments)
            update = jax.tree.map(lambda u: -rate * u, update)
            params = jaxmtl.apply_updates(carry.params, update)
            metrics = {"train_loss": losses} | weights_of(state)
            return Carry(params, state, moments, batch), metrics

        order_key, step_key = jax.random.split(key)
        batches = []
        for key, molecules in zip(jax.random.split(order_key, len(train)), train, strict=True):
            order = jax.random.permutation(key, len(molecules.sizes))[: steps * size]
            batches.append(order.reshape(steps, size).astype(jnp.int32))
        keys = jax.random.split(step_key, steps)
        carry, metrics = lax.scan(step, carry, (tuple(batches), keys))
        return carry, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    return jax.jit(start), compiled(options, epoch)


@cache
def make_evaluate(options: Options, m: int) -> Callable[[Params, jax.Array, Parts], jax.Array]:
    """Returns a compiled function to the mean absolute errors (m,) of standardized targets."""
    network = Network(m, options.width)

    def evaluate(params: Params, columns: jax.Array, parts: Parts) -> jax.Array:
        errors = []
        for molecules in parts:

            def one(index: jax.Array, molecules: Molecules = molecules) -> jax.Array:
                graphs = graphs_of(molecules, index[None])
                outputs = jnp.asarray(network.apply({"params": params}, graphs))
                return jnp.abs(outputs[:, 0] - molecules.targets[index][columns])

            number = len(molecules.sizes)
            errors.append(lax.map(one, jnp.arange(number), batch_size=min(number, 50)))
        return jnp.concatenate(errors).mean(axis=0)

    return compiled(options, evaluate)


def next_rate(plateau: Any, state: Any, value: float) -> tuple[float, Any]:
    """Returns the factor of the learning rate after an epoch of this validation value."""
    _, state = plateau.update({}, state, value=value)
    return float(state.scale), state


def train(
    options: Options,
    name: str,
    seed: int,
    split: Split,
    checkpoint: Checkpoint,
    say: Say,
    baseline: np.ndarray | None = None,
    task: int | None = None,
) -> Record:
    """Trains one network and returns its record.

    Args:
      options: How.
      name: The method.
      seed: Decides initial parameters and minibatches, which all methods share.
      split: The molecules.
      checkpoint: From which it goes on, and to which it writes after every epoch.
      say: Told after each epoch.
      baseline: (m,) validation errors of the single tasks, for delta_m. None: of one task alone.
      task: Its number.
    """
    columns = np.arange(len(split.tasks)) if task is None else np.array([task])
    m, scale = len(columns), split.scale[columns]
    parts: list[Any] = [jax.tree.map(jnp.asarray, part) for part in split[:3]]
    steps = steps_per_epoch(options, split.train)
    start, epoch = make_epoch(options, name, m, steps)
    evaluate = make_evaluate(options, m)
    init_key, epoch_key = jax.random.split(jax.random.key(seed))
    first = graphs_of(parts[0][0], jnp.arange(1))
    params = make_init(options, m)(init_key, first)
    plateau = optax.contrib.reduce_on_plateau(
        **PLATEAU, min_scale=LEAST_RATE / options.learning_rate
    )
    fresh = start(params), plateau.init({"": jnp.zeros(())})
    (carry, plateau_state), history = checkpoint.load(fresh)
    label = name if task is None else f"{name}, {split.tasks[task].name}"
    what = "delta_m" if baseline is not None else "error"
    if history:
        say(f"{label}: resumed after {len(history)} epochs", len(history))
    resumed = len(history)
    for number in range(resumed, options.epochs):
        begin, since = time.perf_counter(), time.process_time()
        rate = options.learning_rate * float(plateau_state.scale)
        key = jax.random.fold_in(epoch_key, number)
        carry, metrics = epoch(carry, jnp.float32(rate), key, jnp.asarray(columns), parts[0])
        carry = jax.block_until_ready(carry)
        cpu = time.process_time() - since
        of_part = (evaluate(carry.params, jnp.asarray(columns), part) for part in parts[1:])
        validation, test = (scale * np.asarray(errors, np.float64) for errors in of_part)
        value = float(validation[0]) if baseline is None else delta_m(validation, baseline)
        history.append(
            {name: np.asarray(values).tolist() for name, values in metrics.items()}
            | {"validation_mae": validation.tolist(), "test_mae": test.tolist()}
            | {"value": value, "rate": rate, "seconds": time.perf_counter() - begin}
            | {"cpu_seconds": cpu if number > resumed else None}  # the first one compiles
        )
        _, plateau_state = next_rate(plateau, plateau_state, value)
        checkpoint.save((carry, plateau_state), history)
        say(f"{label}, epoch {number + 1}/{options.epochs}: validation {what} {value:.4g}")
    best = int(np.argmin([h["value"] if np.isfinite(h["value"]) else np.inf for h in history]))
    cpus = [h["cpu_seconds"] for h in history if h["cpu_seconds"] is not None]
    kept = [key for key in history[0] if key not in ("seconds", "cpu_seconds")]
    return {
        "method": name,
        "seed": seed,
        "config": config_of(options),
        "task": task,
        "best_epoch": best + 1,
        "validation_mae": rounded(history[best]["validation_mae"]),
        "test_mae": rounded(history[best]["test_mae"]),
        "seconds": round(sum(h["seconds"] for h in history), 1),
        "cpu_seconds_per_step": rounded(sum(cpus) / max(len(cpus) * steps, 1)),
        "history": {key: [rounded(h[key]) for h in history] for key in kept},
    }


def delta_m(errors: np.ndarray, baseline: np.ndarray) -> float:
    """Returns the mean relative drop in percent against single tasks."""
    values, base = jnp.asarray(errors), jnp.asarray(baseline)
    lower = jnp.zeros(len(base), bool)
    return float(jaxmtl.metrics.delta_m(values, baselines=base, higher_is_better=lower))


def rounded(values: Any) -> Any:
    """Returns numbers of five digits, None where they are not finite."""
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.5g}") if np.isfinite(values) else None
