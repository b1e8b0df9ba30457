"""The training of a table by one method, all runs at once, and the records of it."""

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
from jax import lax
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

import jaxmtl
from experiments.methods import Method
from experiments.study import Record, config_of
from experiments.tabular.data import Split, Table, features
from experiments.tabular.methods import (
    INPUTS,
    METHODS,
    SINGLE,
    SWEEPS,
    Batches,
    Params,
    make_direction,
)

# Nearly every program runs for seconds: XLA may compile three times faster and run as fast.
COMPILER_OPTIONS: dict[str, bool | int] = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides model, method and seed."""

    dataset: str
    epochs: int
    batch_size: int
    evaluate_every: int  # epochs; the number of epochs is chosen among these on validation data
    learning_rates: tuple[float, ...]  # of Adam; chosen on validation data for every method
    rows: int | None = None  # of made-up tables in place of the real ones, for smoke runs


# --- training -----------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Trainings side by side: leaves have a leading axis of runs."""

    seed: jax.Array  # decides initial parameters and minibatches
    learning_rate: jax.Array
    columns: jax.Array  # (m,) the labels to learn
    weights: jax.Array | None  # (m,) of a sweep


class Trained(NamedTuple):
    """What one method's runs have come to."""

    validation: np.ndarray  # (checkpoints, runs, m) of the first measure of their kind
    scores: np.ndarray  # (checkpoints, runs, rows, m) of the test rows
    seconds: float  # of CPU time per step and run, without compilation


def draw_order(key: jax.Array, num_examples: int, steps: int, epochs: int) -> jax.Array:
    """Returns the examples (epochs * steps, b) of the minibatches of some epochs."""
    keys = jax.random.split(key, epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_examples))(keys)
    return order[:, : num_examples // steps * steps].reshape(epochs * steps, num_examples // steps)


def make_training(
    options: Options, network: nn.Module, method: Method, split: Split
) -> tuple[Callable[[Params, Runs], Any], jax.stages.Wrapped]:
    """Returns functions of all runs: first carry, ``evaluate_every`` epochs as one scan."""
    num_examples = len(split.train.labels)
    steps = max(num_examples // options.batch_size, 1)
    size = num_examples // steps // 2 * 2  # even, for halves

    def start(params: Params, run: Runs) -> Any:
        init, _ = make_direction(method, run.columns.size, steps, run.weights)
        state = init(params), optax.adam(run.learning_rate).init(params)
        return params, state, jnp.zeros(size, jnp.int32)

    def advance(carry: Any, run: Runs, stretch: jax.Array, train: Table) -> Any:
        def losses_fn(params: Params, examples: jax.Array) -> jax.Array:
            outputs = network.apply({"params": params}, features(train, examples, split.num_codes))
            labels = train.labels[examples][:, run.columns].T
            return kind_of(split).loss(outputs, labels).mean(axis=1)  # (m,)

        _, direction = make_direction(method, run.columns.size, steps, run.weights)
        optimizer = optax.adam(run.learning_rate)

        def step(carry: Any, inputs: Any) -> tuple[Any, None]:
            params, (state, opt_state), previous = carry
            current, ahead, key = inputs
            batches = Batches(previous, current, ahead)
            extra = {name: INPUTS[name](losses_fn, params, batches) for name in method.inputs}
            update, state = direction(
                lambda params: losses_fn(params, current), params, state, key=key, **extra
            )
            updates, opt_state = optimizer.update(update, opt_state, params)
            return (jaxmtl.apply_updates(params, updates), (state, opt_state), current), None

        order_key, step_key = jax.random.split(
            jax.random.fold_in(jax.random.key(run.seed), stretch + 1)
        )
        order = draw_order(order_key, num_examples, steps, options.evaluate_every)[:, :size]
        keys = jax.random.split(step_key, len(order))
        carry, _ = lax.scan(step, carry, (order, jnp.roll(order, -1, axis=0), keys))
        return carry

    all_runs = jax.vmap(advance, in_axes=(0, 0, None, None))
    return jax.vmap(start), jax.jit(all_runs, compiler_options=COMPILER_OPTIONS)


@cache  # one compilation for all methods
def make_init(network: nn.Module, num_inputs: int) -> Callable[[jax.Array], Params]:
    """Returns a compiled function from seeds (runs,) to parameters."""

    def init(seed: jax.Array) -> Params:
        return network.init(jax.random.key(seed), jnp.zeros((1, num_inputs)))["params"]

    return jax.jit(jax.vmap(init), compiler_options=COMPILER_OPTIONS)


@cache
def make_scores(network: nn.Module, num_codes: int) -> Callable[[Params, Table], jax.Array]:
    """Returns a compiled function to the logits (runs, examples, m) of a table."""

    def scores(params: Params, table: Table) -> jax.Array:
        def one(example: jax.Array) -> jax.Array:
            logits = network.apply({"params": params}, features(table, example[None], num_codes))
            return jnp.asarray(logits)[:, 0]

        return lax.map(one, jnp.arange(len(table.labels)), batch_size=2048)

    return jax.jit(jax.vmap(scores, in_axes=(0, None)), compiler_options=COMPILER_OPTIONS)


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the areas under the ROC curves (..., m) of scores (..., n, m) and labels (n, m).

    By ranks: the share of pairs of a positive and a negative row in right order, ties half.
    """
    labels = np.asarray(labels, np.float64)
    positives = labels.sum(axis=0)
    ranks = np.sum(rankdata(scores, axis=-2) * labels, axis=-2)
    pairs = positives * (len(labels) - positives)
    return (ranks - positives * (positives + 1) / 2) / pairs


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the average precisions (runs, m) of scores (runs, n, m) and labels (n, m)."""
    tasks = range(labels.shape[1])
    return np.array(
        [[average_precision_score(labels[:, i], run[:, i]) for i in tasks] for run in scores]
    )


def relative_error(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the RRMSE (..., m) of outputs (..., n, m): 1 is that of the mean of training.

    Targets (n, m) are standardized by the training rows, whose mean is then 0.
    """
    return np.sqrt(np.mean((outputs - targets) ** 2, axis=-2) / np.mean(targets**2, axis=-2))


class Kind(NamedTuple):
    """What is learnt from a table, and by what it is measured."""

    loss: Callable[..., jax.Array]  # of outputs and labels, entry by entry
    measures: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]  # the first one chooses
    sign: int  # 1 if larger is better, else -1


BINARY = Kind(
    optax.sigmoid_binary_cross_entropy,
    {"auc": area_under_curve, "average_precision": average_precision},
    sign=1,
)
REGRESSION = Kind(optax.l2_loss, {"rrmse": relative_error}, sign=-1)


def kind_of(split: Split) -> Kind:
    """Returns the kind of a table."""
    return REGRESSION if split.regression else BINARY


def train(
    options: Options, network: nn.Module, method: Method, runs: Runs, split: Split
) -> Trained:
    """Trains all runs and evaluates them after every stretch of epochs."""
    start, advance = make_training(options, network, method, split)
    scores_of = make_scores(network, split.num_codes)
    num_inputs = split.num_codes + split.train.numbers.shape[1]
    carry = start(make_init(network, num_inputs)(runs.seed), runs)
    compiled = advance.lower(carry, runs, jnp.int32(0), split.train).compile()
    columns = np.asarray(runs.columns)
    labels = np.asarray(split.validation.labels)
    measure = next(iter(kind_of(split).measures.values()))
    seconds, validation, test = 0.0, [], []
    for stretch in range(options.epochs // options.evaluate_every):
        begin = time.process_time()
        carry = jax.block_until_ready(compiled(carry, runs, jnp.int32(stretch), split.train))
        seconds += time.process_time() - begin
        scores = np.asarray(scores_of(carry[0], split.validation))
        validation.append(
            np.stack([measure(s, labels[:, c]) for s, c in zip(scores, columns, strict=True)])
        )
        test.append(np.asarray(scores_of(carry[0], split.test)))
    steps = options.epochs * max(len(split.train.labels) // options.batch_size, 1)
    return Trained(np.stack(validation), np.stack(test), seconds / steps / len(columns))


# --- from runs to records -----------------------------------------------------------------------


def make_runs(
    learning_rates: Sequence[float], seeds: Sequence[int], columns: np.ndarray, weights: Any
) -> Runs:
    """Returns the runs of a grid: groups (weights or a set of columns), rates, seeds.

    Args:
      learning_rates: (l,).
      seeds: (s,).
      columns: (g, m) labels of each group.
      weights: (g, m) or None.

    Returns:
      ``Runs`` with a leading axis of g * l * s.
    """
    group, rate, seed = (
        index.ravel()
        for index in np.meshgrid(
            *(np.arange(len(x)) for x in (columns, learning_rates, seeds)), indexing="ij"
        )
    )
    return Runs(
        jnp.asarray(np.asarray(seeds)[seed]),
        jnp.asarray(np.asarray(learning_rates, np.float32)[rate]),
        jnp.asarray(columns[group]),
        None if weights is None else jnp.asarray(weights[group], jnp.float32),
    )


def choose(
    trained: Trained, runs: Runs, shape: tuple[int, int, int], options: Options, split: Split
) -> list[Record]:
    """Returns for each group what the learning rate and epochs of best validation mean give."""
    kind = kind_of(split)
    values = trained.validation.reshape(len(trained.validation), *shape, -1)
    means = values.mean(axis=(3, 4))  # (checkpoints, groups, rates), over seeds and tasks
    chosen = []
    for group in range(shape[0]):
        best = (kind.sign * means[:, group]).argmax()
        stretch, rate = np.unravel_index(best, means[:, group].shape)
        first = (group * shape[1] + rate) * shape[2]
        scores = trained.scores[stretch, first : first + shape[2]]
        labels = np.asarray(split.test.labels)[:, np.asarray(runs.columns[first])]
        chosen.append(
            {
                "learning_rate": options.learning_rates[rate],
                "epochs": int(stretch + 1) * options.evaluate_every,
                "validation_means": rounded(means[:, group]),
                f"validation_{next(iter(kind.measures))}": rounded(values[stretch, group, rate]),
            }
            | {f"test_{name}": rounded(of(scores, labels)) for name, of in kind.measures.items()}
        )
    return chosen


def rounded(values: Any) -> list[Any]:
    """Returns nested lists of five digits."""
    return np.round(np.asarray(values, np.float64), 5).tolist()


def records_of(
    options: Options,
    network: Callable[[int], nn.Module],
    name: str,
    seeds: Sequence[int],
    split: Split,
) -> list[Record]:
    """Trains one method and returns its records: one, or one per weights of a sweep."""
    m = len(split.tasks)
    single = name == SINGLE
    method = METHODS["linear_scalarization" if single else name]
    labels = np.asarray(split.train.labels, np.float64)
    shares = None if split.regression else labels.mean(axis=0)
    weights = SWEEPS[name](m, shares) if name in SWEEPS else None
    groups = 1 if weights is None else len(weights)
    columns = np.arange(m)[:, None] if single else np.tile(np.arange(m), (groups, 1))
    runs = make_runs(options.learning_rates, seeds, columns, weights)
    trained = train(options, network(columns.shape[1]), method, runs, split)
    shape = (len(columns), len(options.learning_rates), len(seeds))
    chosen = choose(trained, runs, shape, options, split)
    if single:
        chosen = [merge_tasks(chosen)]
    shared = {
        "method": name,
        "config": config_of(options),
        "seeds": list(seeds),
        "microseconds_per_step": round(1e6 * trained.seconds, 1),
    }
    return [
        shared | {"setting": None if weights is None else rounded(weights[i])} | record
        for i, record in enumerate(chosen)
    ]


def merge_tasks(records: Sequence[Record]) -> Record:
    """Returns one record of the single-task records."""
    merged: Record = {}
    for name in records[0]:
        values = [record[name] for record in records]
        if name in ("learning_rate", "epochs", "validation_means"):
            merged[name] = values
        else:
            merged[name] = np.concatenate(values, axis=1).tolist()
    return merged
