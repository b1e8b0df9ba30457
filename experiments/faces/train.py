"""The training of one network by one method, and what is recorded of it."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmtl
from experiments.checkpoints import Checkpoint
from experiments.faces.data import ATTRIBUTES, SIZE, Faces, Split
from experiments.faces.methods import METHODS, SINGLE, Known
from experiments.faces.networks import Network
from experiments.images import minibatches
from experiments.methods import Entry, scaled_heads
from experiments.study import Record, Say, config_of

Params = Any  # {"shared": ..., "heads": ...}
Stats = Any  # running averages of BatchNorm
# Smoke runs are mostly compilation, which XLA can then do in half the time.
QUICK: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
DECAY = 0.3
COMPARED = 8  # tasks whose gradients are compared at the end, as in figure 7


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method and seed."""

    width: int = 64
    batch_size: int = 256
    epochs: int = 15
    learning_rate: float = 1e-3  # of Adam
    decay_epochs: int | None = 3  # after so many the rate is multiplied by 0.3, again and again
    penalty: float = 0.01  # lambda of LDC-MTL
    order: int | None = None  # seed of another order of the tasks
    num_tasks: int = 40  # the first attributes
    chunk_size: int | None = None  # gradients at a time; None: each by a call of its own
    max_steps: int | None = None  # per epoch, for trials
    made_up: int | None = None  # faces in place of the data set, for smoke runs
    size: int = SIZE  # height and width of made-up faces


class Batch(NamedTuple):
    """Images and labels as the data have them."""

    images: jax.Array | np.ndarray  # (b, h, w, 3) uint8
    labels: jax.Array | np.ndarray  # (b, 40) bool


class State(NamedTuple):
    """What a training carries from step to step."""

    params: Params
    stats: Stats
    rule: Any  # of the method
    optimizer: Any
    after: jax.Array  # (m,) losses of the last batch at the parameters to which its step led


# --- the losses of a batch ------------------------------------------------------------------------


def losses_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean binary cross-entropies (m,) of logits (b, m)."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)), axis=0)


class Model(NamedTuple):
    """A network as functions of parameters, statistics, a batch and the columns of its labels."""

    network: Network

    def _apply(self, params: Params, stats: Stats, batch: Batch, method: str) -> tuple[Any, Stats]:
        images = jnp.asarray(batch.images).astype(jnp.float32) / 255
        made, new = self.network.apply(
            {"params": params, "batch_stats": stats},
            images,
            True,
            method=method,
            mutable="batch_stats",
        )
        return made, new["batch_stats"]

    def losses(
        self, params: Params, stats: Stats, batch: Batch, columns: jax.Array
    ) -> tuple[jax.Array, Stats]:
        """Returns the losses (m,) and the new statistics."""
        logits, new = self._apply(params, stats, batch, "__call__")
        return losses_of(logits, jnp.asarray(batch.labels)[:, columns]), new

    def encode(self, params: Params, stats: Stats, batch: Batch, columns: jax.Array) -> jax.Array:
        """Returns z (b, d)."""
        del columns
        z: jax.Array = self._apply(params, stats, batch, "features")[0]
        return z

    def losses_of_features(
        self, params: Params, z: jax.Array, stats: Stats, batch: Batch, columns: jax.Array
    ) -> tuple[jax.Array, Stats]:
        """Returns the losses (m,) from z, and the new statistics."""
        # A pass forward more: an encoder returns z alone, without the statistics.
        _, new = self._apply(params, stats, batch, "features")
        logits: Any = self.network.apply({"params": params}, z, method="predict")
        labels = jnp.asarray(batch.labels)[:, columns]
        return losses_of(logits, labels), jax.lax.stop_gradient(new)


def compiled(options: Options, function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """Returns a function compiled quickly for made-up faces, and well for real ones."""
    return jax.jit(function, compiler_options=QUICK if options.made_up else None, **more)


def network_of(options: Options, m: int) -> Network:
    """Returns the network for so many tasks."""
    return Network(m, options.width)


@cache
def make_init(options: Options, m: int) -> Callable[[jax.Array], tuple[Params, Stats]]:
    """Returns a compiled function from a key to parameters and statistics."""
    network, blank = network_of(options, m), np.zeros((1, 16, 16, 3), np.float32)

    def init(key: jax.Array) -> tuple[Params, Stats]:
        variables = network.init(key, jnp.asarray(blank), False)
        return variables["params"], variables["batch_stats"]

    return compiled(options, init)


# --- gradients ------------------------------------------------------------------------------------


class Passes(NamedTuple):
    """One pass forward, and one backward for one cotangent of the losses, each compiled."""

    forward: Any  # (params, stats, batch, columns) -> (losses, statistics, pull)
    backward: Any  # (pull, (m,)) -> gradient


@cache
def make_passes(options: Options, m: int) -> Passes:
    """Returns the passes of a network."""
    model = Model(network_of(options, m))

    def forward(params: Params, stats: Stats, batch: Batch, columns: jax.Array) -> Any:
        losses, pull, new = jax.vjp(
            lambda params: model.losses(params, stats, batch, columns), params, has_aux=True
        )
        return losses, new, pull

    def backward(pull: Any, cotangent: jax.Array) -> Params:
        return pull(cotangent)[0]

    return Passes(compiled(options, forward), compiled(options, backward))


@jax.jit
def stacked(gradients: list[Params]) -> Params:
    """Returns gradients as rows."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)


def make_rows(options: Options, m: int) -> Callable[..., Any]:
    """Returns a function from parameters, statistics, a batch and columns to its gradients.

    It gives ``(losses, statistics, rows)``, the rows with a leading axis of tasks. Without a chunk
    size the compiled pass backwards is called once for each task: XLA's convolutions on a CPU take
    ten times as long inside a loop. With one, `jaxmtl.value_and_jacobian` is one program.
    """
    if options.chunk_size is None:
        passes = make_passes(options, m)

        def one_by_one(params: Params, stats: Stats, batch: Batch, columns: jax.Array) -> Any:
            losses, new, pull = passes.forward(params, stats, batch, columns)
            units = np.eye(m, dtype=losses.dtype)
            rows = [jax.block_until_ready(passes.backward(pull, unit)) for unit in units]
            return losses, new, stacked(rows)

        return one_by_one
    return _rows_at_once(options, m)


@cache
def _rows_at_once(options: Options, m: int) -> Callable[..., Any]:
    of_rows = jaxmtl.value_and_jacobian(
        Model(network_of(options, m)).losses, has_aux=True, chunk_size=options.chunk_size
    )

    def at_once(params: Params, stats: Stats, batch: Batch, columns: jax.Array) -> Any:
        (losses, new), rows = of_rows(params, stats, batch, columns)
        return losses, new, rows

    return compiled(options, at_once)


def rule_on_rows(aggregator: Any, m: int) -> optax.GradientTransformationExtraArgs:
    """Returns what a method by rows does: the trunk by the method, heads by their own gradients.

    Or by those times what the method gives heads.
    """
    both = optax.partition(
        {"shared": aggregator, "heads": jaxmtl.linear_scalarization(jnp.ones(m))},
        lambda params: {name: name for name in params},
    )

    def update(rows: Params, state: Any, params: Params = None, **extra: Any) -> Any:
        of_trunk = state.inner_states["shared"].inner_state
        scaled = rows | {"heads": scaled_heads(aggregator, of_trunk, rows["heads"])}
        return both.update(scaled, state, params, **extra)

    return optax.GradientTransformationExtraArgs(both.init, update)


def in_last_shared_layer(path: Sequence[Any]) -> bool:
    """Tells whether a parameter is in the last layer that all tasks share."""
    return path[0].key == "shared" and path[1].key == "dense_1"


def make_one_pass(model: Model, entry: Entry, aggregator: Any) -> Callable[..., Any]:
    """Returns a function to losses, statistics, gradients and state by one pass backwards."""
    if entry.route == "features":
        both = jaxmtl.value_and_grad(
            model.losses_of_features, aggregator, encoder=model.encode, has_aux=True
        )
    else:
        shared = in_last_shared_layer if entry.route == "layer" else None
        both = jaxmtl.value_and_grad(model.losses, aggregator, shared=shared, has_aux=True)

    def one_pass(
        params: Params, rule: Any, stats: Stats, batch: Batch, columns: jax.Array, **extra: Any
    ) -> Any:
        ((losses, new), rule), grads = both(params, rule, stats, batch, columns, **extra)
        return losses, new, grads, rule

    return one_pass


def init_rule(model: Model, entry: Entry, aggregator: Any, m: int, params: Params, b: int) -> Any:
    """Returns the state of a method; b is the size of a batch."""
    if entry.route == "rows":
        return rule_on_rows(aggregator, m).init(params)
    if entry.route == "features":
        return aggregator.init(jnp.zeros((b, 8 * model.network.width)))
    return aggregator.init(params)


# --- one step -------------------------------------------------------------------------------------


class Training(NamedTuple):
    """A compiled training."""

    init: Callable[[jax.Array], State]
    step: Callable[..., tuple[State, Record]]  # (state, batch, columns, key)


def rate_of(options: Options, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate by step: PyTorch's StepLR with a factor of 0.3, or a constant."""
    if options.decay_epochs is None:
        return optax.constant_schedule(options.learning_rate)
    ends = range(options.decay_epochs, options.epochs, options.decay_epochs)
    return optax.piecewise_constant_schedule(
        options.learning_rate, {end * steps_per_epoch: DECAY for end in ends}
    )


@cache  # the single tasks share one compiled program
def make_training(options: Options, method: str, m: int, steps_per_epoch: int) -> Training:
    """Returns the training of m tasks by a method."""
    entry = METHODS["linear_scalarization" if method == SINGLE else method]
    model = Model(network_of(options, m))
    rate = rate_of(options, steps_per_epoch)
    # As one vector: a kernel for each of the many small leaves compiles long and runs no faster.
    optimizer = optax.flatten(optax.adam(rate))
    aggregator = entry.build(m, Known(steps_per_epoch, rate, options.penalty))
    wants_after = "previous_batch_losses" in entry.method.inputs

    def init(key: jax.Array) -> State:
        params, stats = make_init(options, m)(key)
        rule = init_rule(model, entry, aggregator, m, params, options.batch_size)
        return State(params, stats, rule, optimizer.init(params), jnp.zeros(m))

    def finish(state: State, losses: jax.Array, new: Stats, grads: Params, rule: Any) -> Any:
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = jaxmtl.apply_updates(state.params, updates)
        log = {"train_loss": losses}
        if (weights := logged_weights(rule)) is not None:
            log["weights"] = weights
        return State(params, new, rule, opt_state, state.after), log

    if entry.route == "rows":
        rows_of, on_rows = make_rows(options, m), rule_on_rows(aggregator, m)

        def update(state: State, losses: jax.Array, new: Stats, rows: Params, key: Any) -> Any:
            grads, rule = on_rows.update(rows, state.rule, state.params, losses=losses, key=key)
            return finish(state, losses, new, grads, rule)

        compiled_update = compiled(options, update, donate_argnums=0)

        def step(state: State, batch: Batch, columns: Any, key: jax.Array) -> Any:
            found = rows_of(state.params, state.stats, batch, columns)
            return compiled_update(state, *found, key)

        return Training(init, step)

    one_pass = make_one_pass(model, entry, aggregator)

    def step_at_once(state: State, batch: Batch, columns: jax.Array, key: jax.Array) -> Any:
        extra = {"previous_batch_losses": state.after} if wants_after else {}
        args = state.stats, batch, columns
        found = one_pass(state.params, state.rule, *args, key=key, **extra)
        new_state, log = finish(state, *found)
        if wants_after:
            after, _ = model.losses(new_state.params, state.stats, batch, columns)
            new_state = new_state._replace(after=after)
        return new_state, log

    return Training(init, compiled(options, step_at_once, donate_argnums=0))


def logged_weights(state: Any) -> jax.Array | None:
    """Returns the weights that a method logs in its state, None if it has none."""
    found = optax.tree.get_all_with_path(state, "mtl_weights")
    return found[0][1] if len(found) == 1 else None


# --- what is measured -----------------------------------------------------------------------------


class Counts(NamedTuple):
    """What a batch adds to the metrics of each task; all (m,)."""

    hits: jax.Array | np.ndarray  # predicted and labelled
    false_alarms: jax.Array | np.ndarray
    misses: jax.Array | np.ndarray
    losses: jax.Array | np.ndarray  # sums


def count(logits: jax.Array, labels: jax.Array, kept: jax.Array) -> Counts:
    """Returns the counts of a batch at a threshold of 0.5.

    Args:
      logits: (b, m).
      labels: (b, m) bool.
      kept: (b,) bool: examples that count; the others fill up a last batch.
    """
    predicted, kept = logits > 0, kept[:, None]
    losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype))
    return Counts(
        jnp.sum(predicted & labels & kept, axis=0),
        jnp.sum(predicted & ~labels & kept, axis=0),
        jnp.sum(~predicted & labels & kept, axis=0),
        jnp.sum(jnp.where(kept, losses, 0), axis=0),
    )


def f1_of(counts: Counts) -> np.ndarray:
    """Returns F1 (m,): 2 hits / (2 hits + false alarms + misses), 0 where there is no hit.

    That is 0 too where nothing is labelled and nothing predicted.
    """
    hits = 2 * np.asarray(counts.hits, np.float64)
    total = hits + np.asarray(counts.false_alarms) + np.asarray(counts.misses)
    return np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)


@cache
def make_count(options: Options, m: int) -> Callable[..., Counts]:
    """Returns the compiled counts of a batch, by running averages."""
    network = network_of(options, m)

    def count_batch(
        params: Params, stats: Stats, batch: Batch, columns: jax.Array, kept: jax.Array
    ) -> Counts:
        images = jnp.asarray(batch.images).astype(jnp.float32) / 255
        logits: Any = network.apply({"params": params, "batch_stats": stats}, images, False)
        return count(logits, jnp.asarray(batch.labels)[:, columns], kept)

    return compiled(options, count_batch)


def evaluate(
    options: Options, state: State, faces: Faces, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns F1 (m,) and the mean losses (m,) on faces."""
    count_batch, b, size = make_count(options, len(columns)), options.batch_size, len(faces.labels)
    padded = np.arange(-(-size // b) * b).reshape(-1, b)
    total: Any = None
    for index, batch in zip(padded, read_ahead(faces, np.minimum(padded, size - 1)), strict=True):
        counted = count_batch(state.params, state.stats, batch, columns, index < size)
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), counted)
        total = found if total is None else jax.tree.map(np.add, total, found)
    return f1_of(total), total.losses / size


def cosines(
    options: Options, state: State, batch: Batch, columns: np.ndarray
) -> tuple[float, float]:
    """Returns mean and least cosine of the trunk's gradients, of tasks chosen once for all."""
    m = len(columns)
    chosen = np.random.default_rng(0).permutation(m)[:COMPARED]
    forward, backward = make_passes(options, m)
    *_, pull = forward(state.params, state.stats, batch, columns)
    units = np.eye(m, dtype=np.float32)[chosen]
    rows = stacked([backward(pull, unit)["shared"] for unit in units])
    found = np.asarray(jaxmtl.metrics.cosine_similarities(jaxmtl.gramian(rows)))
    pairs = found[np.triu_indices(len(chosen), 1)]
    return float(pairs.mean()), float(pairs.min())


# --- a run ----------------------------------------------------------------------------------------


def batches(number: int, options: Options, rng: np.random.Generator) -> np.ndarray:
    """Returns the faces (steps, b) of an epoch, in a batch in the order in which they lie."""
    order = minibatches(number, options.batch_size, rng, "faces")
    return np.sort(order[: options.max_steps], axis=1)


def read(faces: Faces, index: np.ndarray) -> Batch:
    """Returns a batch."""
    return Batch(np.asarray(faces.images[index]), faces.labels[index])


def read_ahead(faces: Faces, order: np.ndarray) -> Iterator[Batch]:
    """Yields the batches of an order (steps, b), the next one being read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, faces, order[0])
        for index in [*order[1:], None]:
            batch = ahead.result()
            if index is not None:
                ahead = pool.submit(read, faces, index)
            yield batch


def columns_of(options: Options, task: int | None) -> np.ndarray:
    """Returns the attributes (m,) that the outputs of the network stand for."""
    if task is not None:
        return np.array([task])
    columns = np.arange(options.num_tasks)
    if options.order is not None:
        columns = np.random.default_rng(options.order).permutation(columns)
    return columns


def train(
    options: Options,
    method: str,
    seed: int,
    split: Split,
    checkpoint: Checkpoint,
    say: Say,
    task: int | None = None,
) -> Record:
    """Trains a network and returns the record of it, values in the order of the attributes.

    Args:
      options: How.
      method: In ``METHODS``, or single_task with a task.
      seed: Decides initial parameters and minibatches, which all methods share.
      split: The faces.
      checkpoint: From which it goes on, and to which it writes after every epoch.
      say: Called after each epoch.
      task: The attribute of a single task.
    """
    columns = columns_of(options, task)
    m, back = len(columns), np.argsort(columns)
    number = len(split.train.labels)
    steps = len(batches(number, options, np.random.default_rng(0)))
    training = make_training(options, method, m, steps)
    state, history = checkpoint.load(training.init(jax.random.key(seed)))
    label = method if task is None else f"{method} ({ATTRIBUTES[task]})"
    if history:
        say(f"{label}, seed {seed}: resumed after {len(history)} epochs", len(history))
    for epoch in range(len(history), options.epochs):
        begin = time.perf_counter()
        order = batches(number, options, np.random.default_rng((seed, epoch)))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch + 1), len(order))
        logs = []
        for key, batch in zip(keys, read_ahead(split.train, order), strict=True):
            state, log = training.step(state, batch, columns, key)
            # Waited for: steps that are started ahead would each hold their memory.
            logs.append(jax.device_get(log))
        entry = jax.tree.map(lambda *xs: np.mean(xs, axis=0)[back], *logs)
        for name, faces in (("validation", split.validation), ("test", split.test)):
            f1, losses = evaluate(options, state, faces, columns)
            entry |= {f"{name}_f1": f1[back], f"{name}_loss": losses[back]}
        seconds = time.perf_counter() - begin
        history.append({name: rounded(values) for name, values in entry.items()})
        checkpoint.save(state, history)
        shown = float(np.mean(entry["validation_f1"]))
        say(
            f"{label}, seed {seed}, epoch {epoch + 1}/{options.epochs}: validation F1 {shown:.4f} "
            f"({seconds:.0f} s)"
        )
    best = int(np.argmax([np.mean(h["validation_f1"]) for h in history]))
    record = {
        "method": method,
        "seed": seed,
        "task": task,
        "config": config_of(options),
        "best_epoch": best + 1,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "history": {name: [h[name] for h in history] for name in history[0]},
    } | {name: history[best][name] for name in ("validation_f1", "test_f1", "test_loss")}
    if m > 1:
        probe = read(split.train, np.arange(min(options.batch_size, number)))
        record["cosines"] = rounded(np.array(cosines(options, state, probe, columns)))
    return record


def rounded(values: np.ndarray) -> list[float | None]:
    """Returns numbers of five digits, None where they are not finite."""
    return [float(f"{x:.5g}") if np.isfinite(x) else None for x in np.asarray(values, np.float64)]
