"""The training of one network by one method, and what is recorded of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmtl
from experiments.checkpoints import Checkpoint
from experiments.domains.data import (
    BENCHMARKS,
    Batch,
    Domain,
    Split,
    check_batches,
    in_order,
    prepare,
    read_ahead,
)
from experiments.domains.methods import METHODS, Params, make_direction
from experiments.domains.networks import Trunk, init_heads, make_head
from experiments.methods import Method
from experiments.resnet import MOMENTUM
from experiments.study import Record, Say, config_of
from experiments.weights import Arrays, load_encoder

Stats = Any  # running averages of BatchNorm
# Smoke runs are mostly compilation, which XLA can then do in half the time.
QUICK: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method and seed."""

    dataset: str
    size: int = 224  # height and width of the images
    width: int = 64
    depth: int = 18
    batch_size: int = 64  # of each domain
    epochs: int = 100
    learning_rate: float = 1e-4  # of Adam
    weight_decay: float = 1e-5  # LibMTL's default: times the parameters, added to the gradient
    pretrained: bool = False  # whether ResNet-18 starts from weights of a file
    max_steps: int | None = None  # per epoch, for trials
    made_up: int | None = None  # classes of made-up images in place of the data set


class State(NamedTuple):
    """What a training carries from step to step."""

    params: Params
    stats: Stats
    rule: Any  # of the method
    optimizer: Any
    after: jax.Array  # (m,) losses of the last batches at the parameters to which their step led


class Task(NamedTuple):
    """What a domain's loss reads besides the parameters."""

    stats: Stats  # as the step found them
    batch: Batch
    key: jax.Array  # of dropout


class Training(NamedTuple):
    """A compiled training."""

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, Record]]  # (state, batches by domain, keys (2,))


# --- one step -------------------------------------------------------------------------------------


def make_losses(
    trunk: Trunk, domains: Sequence[str], classes: int
) -> dict[str, Callable[..., Any]]:
    """Returns by domain ``(params, task) -> (cross-entropy (), new statistics)``."""
    head = make_head(classes, 8 * trunk.width)

    def loss_of(domain: str) -> Callable[..., Any]:
        def loss(params: Params, task: Task) -> tuple[jax.Array, Stats]:
            variables = {"params": params["shared"], "batch_stats": task.stats}
            images, rngs = prepare(task.batch.images), {"dropout": task.key}
            z, new = trunk.apply(variables, images, True, rngs=rngs, mutable="batch_stats")
            logits: Any = head.apply({"params": params["heads"][domain]}, z)
            labels = jnp.asarray(task.batch.labels)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), new["batch_stats"]

        return loss

    return {domain: loss_of(domain) for domain in domains}


def merged(old: Stats, new: Sequence[Stats]) -> Stats:
    """Returns the running averages after the batches of all domains, one after the other.

    A batch with statistics s takes the average r to ``.9 r + .1 s``. Every domain starts from the
    same r here, so that its part is ``.1 s = r_i - .9 r``; a network that sees m batches in turn,
    as LibMTL's does, ends with ``.9^m r + sum_i .9^(m - i) .1 s_i``, the last domain's batch with
    the largest part. What a batch is normalized by does not depend on r, so that losses and
    gradients are the same either way.
    """
    current = old
    for after in new:
        current = jax.tree.map(
            lambda c, a, r: MOMENTUM * c + (a - MOMENTUM * r), current, after, old
        )
    return current


def tasks_of(stats: Stats, batches: Mapping[str, Batch], key: jax.Array) -> dict[str, Task]:
    """Returns what the losses read; dropout draws for each domain alone."""
    keys = jax.random.split(key, len(batches))
    return {
        name: Task(stats, batch, k) for (name, batch), k in zip(batches.items(), keys, strict=True)
    }


@cache
def make_init(trunk: Trunk, domains: tuple[str, ...], classes: int) -> Callable[[jax.Array], Any]:
    """Returns a compiled function from a key to parameters and statistics."""

    def init(key: jax.Array) -> tuple[Params, Stats]:
        body, heads = jax.random.split(key)
        variables = trunk.init(body, jnp.zeros((1, 32, 32, 3)), False)
        made = init_heads(heads, domains, classes, 8 * trunk.width)
        return {"shared": variables["params"], "heads": made}, variables["batch_stats"]

    # Draws for sixty leaves, run once: not worth the time of an optimizing compiler.
    return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})


def make_training(options: Options, method: Method, steps_per_epoch: int) -> Training:
    """Returns the training of a method."""
    benchmark = BENCHMARKS[options.dataset]
    domains = benchmark.domains
    trunk = Trunk(options.width, options.depth)
    losses = make_losses(trunk, domains, benchmark.classes)
    init_rule, direction = make_direction(method, losses, steps_per_epoch)
    # As one vector: a kernel for each of the many small leaves compiles long and runs no faster.
    optimizer = optax.flatten(
        optax.chain(
            optax.add_decayed_weights(options.weight_decay), optax.adam(options.learning_rate)
        )
    )
    wants_after = "previous_batch_losses" in method.inputs

    def init(key: jax.Array) -> State:
        params, stats = make_init(trunk, domains, benchmark.classes)(key)
        after = jnp.zeros(len(domains))
        return State(params, stats, init_rule(params), optimizer.init(params), after)

    def step(state: State, batches: Mapping[str, Batch], keys: jax.Array) -> tuple[State, Record]:
        params, stats, rule, moments, after = state
        extra = {"previous_batch_losses": after} if wants_after else {}
        tasks = tasks_of(stats, batches, keys[0])
        found, new, grads, rule = direction(params, rule, tasks, key=keys[1], **extra)
        updates, moments = optimizer.update(grads, moments, params)
        params = jaxmtl.apply_updates(params, updates)
        if wants_after:  # with other draws of dropout, as in LibMTL
            again = tasks_of(stats, batches, jax.random.fold_in(keys[0], 1))
            after = jnp.stack([losses[name](params, again[name])[0] for name in domains])
        log = {"losses": found}
        if (weights := logged_weights(rule)) is not None:
            log["weights"] = weights
        stats = merged(stats, [new[name] for name in domains])
        return State(params, stats, rule, moments, after), log

    compiler = QUICK if options.made_up else None
    return Training(init, jax.jit(step, donate_argnums=0, compiler_options=compiler))


def logged_weights(state: Any) -> jax.Array | None:
    """Returns the weights that a method logs in its state, None if it has none."""
    found = optax.tree.get_all_with_path(state, "mtl_weights")
    return found[0][1] if len(found) == 1 else None


# --- what is measured -----------------------------------------------------------------------------


@cache
def make_count(trunk: Trunk, classes: int) -> Callable[..., jax.Array]:
    """Returns the compiled number of right answers in a batch; one program for all domains."""
    head = make_head(classes, 8 * trunk.width)

    def count(
        shared: Params, own: Params, stats: Stats, batch: Batch, kept: jax.Array
    ) -> jax.Array:
        variables = {"params": shared, "batch_stats": stats}
        z = trunk.apply(variables, prepare(batch.images), False)
        logits: Any = head.apply({"params": own}, z)
        return jnp.sum(kept & (jnp.argmax(logits, axis=-1) == batch.labels))

    return jax.jit(count)


def accuracy(options: Options, state: State, name: str, domain: Domain) -> float:
    """Returns the share of a domain's images that are told right, in percent."""
    trunk = Trunk(options.width, options.depth)
    count = make_count(trunk, BENCHMARKS[options.dataset].classes)
    shared, own = state.params["shared"], state.params["heads"][name]
    right = [
        count(shared, own, state.stats, batch, kept)
        for batch, kept in in_order(domain, options.batch_size)
    ]
    return round(100 * sum(map(int, right)) / len(domain.labels), 4)


def steps_of(options: Options, split: Split) -> int:
    """Returns the steps of an epoch."""
    steps = check_batches(split, options.batch_size)
    return min(steps, options.max_steps or steps)


def run_epoch(
    training: Training, options: Options, split: Split, state: State, seed: int, epoch: int
) -> tuple[State, Record]:
    """Returns the state after an epoch, and the means of what its steps logged."""
    steps = steps_of(options, split)
    # Of every step a key for dropout and one for the method.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch + 1), (steps, 2))
    numbers = range(epoch * steps, (epoch + 1) * steps)
    logs = []
    for pair, batches in zip(
        keys, read_ahead(split, options.batch_size, numbers, seed), strict=True
    ):
        state, log = training.step(state, batches, pair)
        # Waited for: steps that are started ahead would each hold their memory.
        logs.append(jax.device_get(log))
    means = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *logs)
    return state, {name: np.round(x.astype(np.float64), 6).tolist() for name, x in means.items()}


def best_epoch(history: Sequence[Record]) -> int:
    """Returns the first epoch, from 0, of the best mean validation accuracy over domains."""
    return int(np.argmax([np.mean(log["validation"]) for log in history]))


def train(
    options: Options,
    method: str,
    seed: int,
    splits: Mapping[str, Split],
    checkpoint: Checkpoint,
    say: Say,
    weights: Arrays | None = None,
) -> Record:
    """Trains a network and returns the record of it.

    Args:
      options: Of the run.
      method: In ``METHODS``.
      seed: Decides initial parameters, minibatches and dropout.
      splits: The images.
      checkpoint: From which it goes on, and to which it writes after every epoch.
      say: Called after each epoch.
      weights: Of torchvision's ResNet-18.
    """
    training = make_training(options, METHODS[method], steps_of(options, splits["train"]))
    start = training.init(jax.random.key(seed))
    if weights is not None:
        shared, stats = load_encoder(start.params["shared"], start.stats, weights, "resnet18")
        start = start._replace(params=start.params | {"shared": shared}, stats=stats)
    state, history = checkpoint.load(start)
    if history:
        say(f"{method}, seed {seed}: resumed after {len(history)} epochs", len(history))
    for epoch in range(len(history), options.epochs):
        begin = time.perf_counter()
        state, log = run_epoch(training, options, splits["train"], state, seed, epoch)
        log["seconds"] = round(time.perf_counter() - begin, 1)
        for part, split in (("validation", "val"), ("test", "test")):
            found = splits[split].items()
            log[part] = [accuracy(options, state, name, domain) for name, domain in found]
        history.append(log)
        checkpoint.save(state, history)
        shown = ", ".join(
            f"{name} {value:.1f}"
            for name, value in zip(splits["val"], log["validation"], strict=True)
        )
        say(
            f"{method}, seed {seed}, epoch {epoch + 1}/{options.epochs}: validation {shown} "
            f"({log['seconds']:.0f} s)"
        )
    best = best_epoch(history)
    return {
        "method": method,
        "seed": seed,
        "config": config_of(options),
        "best_epoch": best + 1,
        "validation_accuracy": history[best]["validation"],
        "test_accuracy": history[best]["test"],
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "history": history,
    }
