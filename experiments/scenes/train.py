"""The training of one network by one method, and what is recorded of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmtl
from experiments.checkpoints import Checkpoint
from experiments.images import minibatches
from experiments.methods import Entry
from experiments.scenes.benchmarks import (
    BENCHMARKS,
    LOSSES,
    Batch,
    Benchmark,
    Counted,
    count,
    measure,
    table_row,
)
from experiments.scenes.data import Source, prepare, read_ahead
from experiments.scenes.methods import METHODS, SINGLE, Known
from experiments.scenes.networks import Predictions, is_own, last_shared_layer, make_network
from experiments.study import Record, Say, config_of
from experiments.weights import Arrays, load_encoder

BLANK = np.zeros((1, 32, 32, 3), np.float32)  # an image of any size, to make parameters
Params = Any
Stats = Any  # running averages of BatchNorm


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method and seed."""

    dataset: str
    network: str
    size: tuple[int, int]
    width: int
    levels: int
    batch_size: int
    epochs: int
    learning_rate: float  # of Adam; halved after half the epochs
    average: int  # the last epochs, over whose metrics a result is the mean
    max_steps: int | None = None  # per epoch, for trials
    pretrained: bool = False  # whether PSPNet's encoder starts from weights of a file
    scenes: int | None = None  # made-up ones in place of the data set, for smoke runs


@dataclass(frozen=True)
class Variant(Options):
    """Options with another hyperparameter of a method than its authors', kept in files apart."""

    penalty: float | None = None  # lambda of LDC-MTL
    task_weights: tuple[float, ...] | None = None  # of linear scalarization


class State(NamedTuple):
    """What a training carries from step to step."""

    params: Params
    stats: Stats
    rule: Any  # of the method
    optimizer: Any
    after: jax.Array  # (m,) losses of the last batch at the parameters to which its step led


Step = Callable[[State, Batch, jax.Array], tuple[State, Record]]


class Training(NamedTuple):
    """A compiled training."""

    init: Callable[[jax.Array], State]
    step: Step
    aggregator: Any


@cache
def network_of(options: Options, tasks: tuple[str, ...]) -> nn.Module:
    """Returns the network for some of the tasks."""
    benchmark = BENCHMARKS[options.dataset]
    return make_network(
        options.network,
        tuple(output for output in benchmark.outputs if output.task in tasks),
        width=options.width,
        levels=options.levels,
        stride=benchmark.stride,
    )


# --- one step -----------------------------------------------------------------------------------


class Model:
    """A network as functions of parameters, statistics and a batch."""

    def __init__(self, network: nn.Module, tasks: tuple[str, ...]):
        """Binds a network."""
        self.network, self.tasks = network, tasks
        # ((losses (m,), new statistics), Jacobian) of parameters, statistics and a batch
        self.rows = jaxmtl.value_and_jacobian(self.losses, has_aux=True)

    def _apply(self, params: Params, stats: Stats, *args: Any, method: str) -> tuple[Any, Stats]:
        variables = {"params": params, "batch_stats": stats}
        made, new = self.network.apply(variables, *args, True, method=method, mutable="batch_stats")
        return made, new["batch_stats"]

    def stacked(self, predictions: Predictions, batch: Batch) -> jax.Array:
        """Returns the losses (m,) of predictions."""
        return jnp.stack([LOSSES[task](predictions[task], batch[task]) for task in self.tasks])

    def losses(self, params: Params, stats: Stats, batch: Batch) -> tuple[jax.Array, Stats]:
        """Returns the losses (m,) and the new statistics."""
        made, new = self._apply(params, stats, batch["image"], method="__call__")
        return self.stacked(made, batch), new

    def encode(self, params: Params, stats: Stats, batch: Batch) -> jax.Array:
        """Returns z."""
        z: jax.Array = self._apply(params, stats, batch["image"], method="features")[0]
        return z

    def losses_of_features(
        self, params: Params, z: jax.Array, stats: Stats, batch: Batch
    ) -> tuple[jax.Array, Stats]:
        """Returns the losses (m,) from z, and the new statistics."""
        # The encoder's statistics: its pass is that of ``encode``, once in the compiled program.
        _, new = self._apply(params, stats, batch["image"], method="features")
        made, new = self._apply(params, jax.lax.stop_gradient(new), z, method="predict")
        return self.stacked(made, batch), new


def make_direction(model: Model, entry: Entry, aggregator: Any) -> tuple[Callable[..., Any], Any]:
    """Returns init and a function to losses, statistics, gradients and the method's state."""
    m = len(model.tasks)
    if entry.route == "rows":
        rule = optax.partition(
            {"shared": aggregator, "own": jaxmtl.linear_scalarization(jnp.ones(m))},
            lambda params: jax.tree.map_with_path(
                lambda path, _: "own" if is_own(path) else "shared", params
            ),
        )

        def by_rows(params: Params, state: Any, stats: Stats, batch: Batch, **extra: Any) -> Any:
            (losses, new), jacobian = model.rows(params, stats, batch)
            grads, state = rule.update(jacobian, state, params, losses=losses, **extra)
            return losses, new, grads, state

        return (lambda params, stats, batch: rule.init(params)), by_rows

    if entry.route == "features":
        one_pass = jaxmtl.value_and_grad(
            model.losses_of_features, aggregator, encoder=model.encode, has_aux=True
        )
    elif entry.route == "layer":
        one_pass = jaxmtl.value_and_grad(
            model.losses,
            aggregator,
            has_aux=True,
            shared=last_shared_layer(model.network),
        )
    else:
        one_pass = jaxmtl.value_and_grad(model.losses, aggregator, has_aux=True)

    def by_weights(params: Params, state: Any, stats: Stats, batch: Batch, **extra: Any) -> Any:
        ((losses, new), state), grads = one_pass(params, state, stats, batch, **extra)
        return losses, new, grads, state

    def init(params: Params, stats: Stats, batch: Batch) -> Any:
        if entry.route == "features":
            z = jax.eval_shape(model.encode, params, stats, batch)
            return aggregator.init(jnp.zeros(z.shape, z.dtype))
        return aggregator.init(params)

    return init, by_weights


@cache
def make_init(network: nn.Module) -> Callable[[jax.Array], tuple[Params, Stats]]:
    """Returns a compiled function from a key to parameters and statistics."""

    def init(key: jax.Array) -> tuple[Params, Stats]:
        variables = network.init(key, jnp.asarray(BLANK), False)
        return variables["params"], variables["batch_stats"]

    # Draws for a hundred leaves, run once: not worth the time of an optimizing compiler.
    return jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})


def rate_of(options: Options, steps_per_epoch: int) -> optax.Schedule:
    """Returns Adam's rate by the step."""
    if options.dataset == "cityscapes3":  # of the authors' code, as the paper states none
        factors = dict.fromkeys(range(42, options.epochs, 3), 0.7)
    else:
        factors = {max(options.epochs // 2, 1): 0.5}
    return optax.piecewise_constant_schedule(
        options.learning_rate,
        {epoch * steps_per_epoch: factor for epoch, factor in factors.items()},
    )


def make_training(
    options: Options, tasks: tuple[str, ...], entry: Entry, steps_per_epoch: int, sample: Batch
) -> Training:
    """Returns the training of a method; ``sample`` is a raw batch, whose shapes count."""
    network = network_of(options, tasks)
    model, m = Model(network, tasks), len(tasks)
    rate = rate_of(options, steps_per_epoch)
    # As one vector: a kernel for each of the many small leaves compiles long and runs no faster.
    optimizer = optax.flatten(optax.adam(rate))
    batch_shapes = jax.eval_shape(prepare, sample)
    z = jax.eval_shape(
        lambda: network.init_with_output(jax.random.key(0), BLANK, False, method="features")[0]
    )
    variant = options if isinstance(options, Variant) else Variant(**vars(options))
    known = Known(options.dataset, z.shape[-1], rate, variant.penalty, variant.task_weights)
    aggregator = entry.build(m, known)
    init_rule, direction = make_direction(model, entry, aggregator)
    wants_after = "previous_batch_losses" in entry.method.inputs

    def init(key: jax.Array) -> State:
        params, stats = make_init(network)(key)
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch_shapes)
        rule = init_rule(params, stats, batch)
        return State(params, stats, rule, optimizer.init(params), jnp.zeros(m))

    def step(state: State, raw: Batch, keys: jax.Array) -> tuple[State, Record]:
        params, stats, rule, opt_state, after = state
        batch = prepare(raw, keys[0])
        extra = {"previous_batch_losses": after} if wants_after else {}
        losses, new, grads, rule = direction(params, rule, stats, batch, key=keys[1], **extra)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jaxmtl.apply_updates(params, updates)
        if wants_after:
            after, _ = model.losses(params, stats, batch)
        log = {"losses": losses}
        if (weights := logged_weights(rule)) is not None:
            log["weights"] = weights
        return State(params, new, rule, opt_state, after), log

    return Training(init, jax.jit(step, donate_argnums=0), aggregator)


def logged_weights(state: Any) -> jax.Array | None:
    """Returns the weights that a method logs in its state, None if it has none."""
    found = optax.tree.get_all_with_path(state, "mtl_weights")
    return found[0][1] if len(found) == 1 else None


# --- what is measured ---------------------------------------------------------------------------


@cache
def make_evaluate(network: nn.Module) -> Callable[..., Counted]:
    """Returns the compiled metrics of a raw batch."""

    def evaluate(params: Params, stats: Stats, raw: Batch, kept: jax.Array) -> Counted:
        batch = prepare(raw)
        variables = {"params": params, "batch_stats": stats}
        predictions: Any = network.apply(variables, batch["image"], False)
        return count(predictions, batch, kept)

    return jax.jit(evaluate)


@cache
def make_probe(network: nn.Module, tasks: tuple[str, ...]) -> Callable[..., Any]:
    """Returns the compiled losses and Gramian, heads left out, of a raw batch as it is."""
    model = Model(network, tasks)

    def probe(params: Params, stats: Stats, raw: Batch) -> tuple[jax.Array, jax.Array]:
        (losses, _), jacobian = model.rows(params, stats, prepare(raw))
        leaves = jax.tree.leaves_with_path(jacobian)
        return losses, jaxmtl.gramian([leaf for path, leaf in leaves if not is_own(path)])

    return jax.jit(probe)


# Methods whose weights are a function of the Gramian alone.
WEIGH_BY_GRAMIAN = ("mgda", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "upgrad")


def balanced(name: str, aggregator: Any, gramian: jax.Array, state: Any) -> jax.Array | None:
    """Returns the Gramian of the rows that a method makes of the gradients, None if it is unknown.

    Rows are w_i g_i for methods that weigh, with the weights for this Gramian where it alone
    decides them, else those of the last step; the projected rows of PCGrad for one draw; the
    orthogonal rows of Aligned-MTL.
    """
    coefficients: Any
    if name == "aligned_mtl":
        coefficients = jaxmtl.metrics.aligned_coefficients(gramian)
    elif name == "pcgrad":
        coefficients = jaxmtl.metrics.pcgrad_coefficients(gramian, jax.random.key(0))
    elif name in WEIGH_BY_GRAMIAN:
        coefficients, _ = aggregator.weighting.update(gramian, aggregator.weighting.init())
    else:
        coefficients = logged_weights(state)
    return None if coefficients is None else jaxmtl.metrics.balanced_gramian(gramian, coefficients)


def figures_of(gramian: jax.Array) -> dict[str, jax.Array]:
    """Returns the quantities of Aligned-MTL's figures 4 and 7, the least favorable pair's."""
    pairs = np.triu_indices(gramian.shape[0], 1)
    return {
        "condition": jaxmtl.metrics.condition_number(gramian, nonzero=True),
        "norm_ratio": jaxmtl.metrics.norm_ratio(gramian),
        "least_cosine": jnp.min(jaxmtl.metrics.cosine_similarities(gramian)[pairs]),
        "least_similarity": jnp.min(jaxmtl.metrics.gradient_magnitude_similarity(gramian)[pairs]),
    }


# --- a run --------------------------------------------------------------------------------------


def batches(size: int, options: Options, rng: np.random.Generator) -> np.ndarray:
    """Returns the scenes (steps, b) of an epoch."""
    return minibatches(size, options.batch_size, rng, "scenes")[: options.max_steps]


def evaluate(
    network: nn.Module, benchmark: Benchmark, state: State, source: Source, options: Options
) -> list[float]:
    """Returns the metrics of a split, in the order of the benchmark's columns."""
    compiled, b = make_evaluate(network), options.batch_size
    padded = np.arange(-(-source.size // b) * b).reshape(-1, b)
    counted = []
    for index, raw in zip(
        padded, read_ahead(source, np.minimum(padded, source.size - 1), None), strict=True
    ):
        part = compiled(state.params, state.stats, raw, jnp.asarray(index < source.size))
        counted.append(jax.device_get(part))
    return [round(value, 5) for value in table_row(benchmark, measure(counted))]


def train(
    options: Options,
    method: str,
    seed: int,
    tasks: tuple[str, ...],
    sources: tuple[Source, Source],
    checkpoint: Checkpoint,
    say: Say,
    weights: Arrays | None = None,
) -> Record:
    """Trains a network and returns the record of it.

    Args:
      options: Of the run.
      method: In ``METHODS``, or single_task with one task.
      seed: Decides initial parameters, minibatches and augmentation.
      tasks: What is learnt.
      sources: For training and validation.
      checkpoint: From which it goes on, and to which it writes after every epoch.
      say: Called after each epoch.
      weights: Of torchvision's ResNet-50, for the encoder of PSPNet.
    """
    benchmark, (train_split, held_out) = BENCHMARKS[options.dataset], sources
    network = network_of(options, tasks)
    steps = len(batches(train_split.size, options, np.random.default_rng(0)))
    probes = np.arange(2 * options.batch_size) % train_split.size
    probe_batches = [
        {k: v for k, v in train_split.read(index, None).items() if k in ("image", *tasks)}
        for index in np.split(probes, 2)
    ]
    entry = METHODS["linear_scalarization" if method == SINGLE else method]
    training = make_training(options, tasks, entry, steps, probe_batches[0])
    key = jax.random.key(seed)
    start = training.init(key)
    if weights is not None:
        params, stats = load_encoder(start.params, start.stats, weights, "resnet50")
        start = start._replace(params=params, stats=stats)
    state, history = checkpoint.load(start)
    gradients = make_gradients(method, network, tasks, training.aggregator)
    label = method if method != SINGLE else f"{method} ({tasks[0]})"
    if history:
        say(f"{label}, seed {seed}: resumed after {len(history)} epochs", len(history))
    for epoch in range(len(history), options.epochs):
        begin = time.perf_counter()
        state, log = run_epoch(training, options, train_split, tasks, state, seed, epoch)
        seconds = time.perf_counter() - begin
        row = evaluate(network, benchmark, state, held_out, options)
        log |= {"metrics": [None if np.isnan(x) else x for x in row], "seconds": round(seconds, 1)}
        if len(tasks) > 1:
            log |= gradients(state, probe_batches)
        history.append(log)
        checkpoint.save(state, history)
        shown = ", ".join(
            f"{metric.name} {value:.4g}"
            for metric, value in zip(benchmark.metrics, row, strict=True)
            if metric.task in tasks
        )
        say(f"{label}, seed {seed}, epoch {epoch + 1}/{options.epochs}: {shown} ({seconds:.0f} s)")
    last = [log["metrics"] for log in history[-options.average :]]
    result = [
        None if None in values else float(np.mean(values)) for values in zip(*last, strict=True)
    ]
    return {
        "method": method,
        "tasks": list(tasks),
        "seed": seed,
        "config": config_of(options),
        "result": result,  # None for the metrics of other tasks
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "history": history,
    }


def run_epoch(
    training: Training,
    options: Options,
    source: Source,
    tasks: tuple[str, ...],
    state: State,
    seed: int,
    epoch: int,
) -> tuple[State, Record]:
    """Returns the state after an epoch, and the means of what its steps logged."""
    rng = np.random.default_rng((seed, epoch))
    order = batches(source.size, options, rng)
    # Of every step a key for the augmentation and one for the method.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch + 1), (len(order), 2))
    logs = []
    for pair, raw in zip(keys, read_ahead(source, order, rng), strict=True):
        raw = {name: x for name, x in raw.items() if name in ("image", *tasks)}
        state, log = training.step(state, raw, pair)
        # Waited for: steps that are started ahead would each hold their memory.
        logs.append(jax.device_get(log))
    means = jax.tree.map(lambda *xs: np.mean(xs, axis=0), *logs)
    return state, {name: np.round(x.astype(np.float64), 6).tolist() for name, x in means.items()}


def make_gradients(
    method: str, network: nn.Module, tasks: tuple[str, ...], aggregator: Any
) -> Callable[[State, Sequence[Batch]], Record]:
    """Returns quantities of the raw and the balanced gradients, means over raw batches."""
    probe = make_probe(network, tasks)

    @jax.jit
    def quantities(gramian: jax.Array, rule: Any) -> dict[str, dict[str, jax.Array]]:
        rows = balanced(method, aggregator, gramian, rule)
        found = {"raw": figures_of(gramian)}
        return found if rows is None else found | {"balanced": figures_of(rows)}

    def written(value: np.floating) -> float | None:
        """Returns a number for JSON, which has no infinity: the ratio of norms where one is 0."""
        return round(float(value), 5) if np.isfinite(value) else None

    def gradients(state: State, raws: Sequence[Batch]) -> Record:
        found = [
            jax.device_get(quantities(probe(state.params, state.stats, raw)[1], state.rule))
            for raw in raws
        ]
        return jax.tree.map(lambda *xs: written(np.mean(xs)), *found)

    return gradients
