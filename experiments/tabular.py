"""Real multi-task tables: every rule of the library beside tuned scalarization and single tasks.

TODO docstring
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table as TextTable
from scipy.stats import rankdata, ttest_1samp
from sklearn.metrics import average_precision_score

import jaxmtl
from experiments._runs import (
    Claim,
    Record,
    append_records,
    environment,
    judge,
    make_console,
    mean_and_error,
    read_records,
    show,
)
from experiments.data.tables import (
    CENSUS_TASKS,
    YEAST_TASKS,
    Split,
    Table,
    features,
    load_census,
    load_yeast,
    make_up,
)
from experiments.models.tabular_networks import MixtureOfExperts, SharedBottom

COMMAND = "python -m experiments.tabular --out experiments/results"
FIGURES = ("tabular_census.png", "tabular_yeast.png")

Params = Any  # {"shared": ..., "towers": ...[, "gates": ...]}
State = Any
Losses = Callable[..., jax.Array]  # (params, rows) -> (m,)


# --- the rules ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A rule and what the driver has to know of it."""

    make: Callable[..., Any]  # (number of tasks, steps of an epoch[, setting]) -> aggregator
    extras: tuple[str, ...] = ()  # inputs of its update beyond losses and key: names in EXTRAS
    min_tasks: int = 1
    settings: Callable[[int], np.ndarray] | None = None  # m -> (k, ...), trained side by side


def swept_weights(m: int) -> np.ndarray:
    """Return weights of a scalarization (k, m), sum 1: a grid for two tasks, else random ones."""
    if m == 2:
        first = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98])
        return np.stack([first, 1 - first], axis=1)
    spread = np.repeat([0.5, 1.0], 8)[:, None]
    logits = spread * np.random.default_rng(0).normal(size=(16, m))
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


# --- options ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides model, rule and seed."""

    dataset: str
    epochs: int
    batch_size: int
    evaluate_every: int  # epochs; the number of epochs is chosen among these on validation data
    learning_rates: tuple[float, ...]  # of Adam; chosen on validation data for every rule
    rows: int | None = None  # of made-up tables in place of the real ones, for smoke runs


PRESETS = {
    # 1,200 rows are soon learned by heart: the number of epochs decides.
    "yeast": Options(
        "yeast", epochs=24, batch_size=100, evaluate_every=2, learning_rates=(0.003, 0.01)
    ),
    # One learning rate for all rules, the best of {0.001, 0.003, 0.01} for equal weights.
    "census": Options(
        "census", epochs=2, batch_size=1024, evaluate_every=1, learning_rates=(0.003,)
    ),
}

TASKS = {"census": CENSUS_TASKS, "yeast": YEAST_TASKS}
LOADERS: dict[str, Callable[[str | None], Split]] = {"census": load_census, "yeast": load_yeast}

# The mixture has as many units as the shared bottom: 8 experts of 4.
NETWORKS: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "census": {
        "shared_bottom": lambda m: SharedBottom(m, (32,), tower_width=8),
        "mmoe": lambda m: MixtureOfExperts(m, num_experts=8, width=4, tower_width=8),
    },
    "yeast": {"shared_bottom": lambda m: SharedBottom(m, (32, 32), tower_width=0)},
}


# --- training -----------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Trainings side by side: leaves have a leading axis of runs."""

    seed: jax.Array  # decides initial parameters and minibatches
    learning_rate: jax.Array
    columns: jax.Array  # (m,) the labels to learn
    setting: tuple[jax.Array, ...]  # the setting of the rule, if it has any


class Trained(NamedTuple):
    """What one rule's runs have come to."""

    validation: np.ndarray  # (checkpoints, runs, m) areas under the curve
    scores: np.ndarray  # (checkpoints, runs, rows, m) of the test rows
    seconds: float  # of CPU time per step and run, without compilation


def needs_of(aggregator: Any) -> str:
    """Return what a rule has to see of the gradients: coordinates, Gramian, or none."""
    weighting = getattr(aggregator, "weighting", None)  # a chain has none
    if weighting is None:
        return "coordinates"
    return "Gramian" if "gramian" in weighting.rule.reads else "none"


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


def draw_order(key: jax.Array, num_rows: int, steps: int, epochs: int) -> jax.Array:
    """Return the rows (epochs * steps, b) of the minibatches of some epochs."""
    keys = jax.random.split(key, epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_rows))(keys)
    return order[:, : num_rows // steps * steps].reshape(epochs * steps, num_rows // steps)


def make_training(
    options: Options, network: nn.Module, rule: Rule, split: Split
) -> tuple[Callable[[Params, Runs], Any], Callable[..., Any]]:
    """Return functions of all runs: their first carry, and `evaluate_every` epochs as one scan."""
    num_rows = len(split.train.labels)
    steps = max(num_rows // options.batch_size, 1)
    size = num_rows // steps // 2 * 2  # even, for halves

    def start(params: Params, run: Runs) -> Any:
        init, _ = make_direction(rule, run.columns.size, steps, run.setting)
        state = init(params), optax.adam(run.learning_rate).init(params)
        return params, state, jnp.zeros(size, jnp.int32)

    def advance(carry: Any, run: Runs, part: jax.Array, train: Table) -> Any:
        def losses_fn(params: Params, rows: jax.Array) -> jax.Array:
            logits = network.apply({"params": params}, features(train, rows, split.num_codes))
            labels = train.labels[rows][:, run.columns].T
            return optax.sigmoid_binary_cross_entropy(logits, labels).mean(axis=1)  # (m,)

        _, direction = make_direction(rule, run.columns.size, steps, run.setting)
        optimizer = optax.adam(run.learning_rate)

        def step(carry: Any, inputs: Any) -> tuple[Any, None]:
            params, (state, opt_state), previous = carry
            current, ahead, key = inputs
            batches = Batches(previous, current, ahead)
            extra = {name: EXTRAS[name](losses_fn, params, batches) for name in rule.extras}
            update, state = direction(
                lambda params: losses_fn(params, current), params, state, key=key, **extra
            )
            updates, opt_state = optimizer.update(update, opt_state, params)
            return (jaxmtl.apply_updates(params, updates), (state, opt_state), current), None

        order_key, step_key = jax.random.split(
            jax.random.fold_in(jax.random.key(run.seed), part + 1)
        )
        order = draw_order(order_key, num_rows, steps, options.evaluate_every)[:, :size]
        keys = jax.random.split(step_key, len(order))
        carry, _ = lax.scan(step, carry, (order, jnp.roll(order, -1, axis=0), keys))
        return carry

    return jax.vmap(start), jax.jit(jax.vmap(advance, in_axes=(0, 0, None, None)))


@cache  # one compilation for all rules
def make_init(network: nn.Module, num_inputs: int) -> Callable[[jax.Array], Params]:
    """Return a compiled function from seeds (runs,) to parameters."""

    def init(seed: jax.Array) -> Params:
        return network.init(jax.random.key(seed), jnp.zeros((1, num_inputs)))["params"]

    return jax.jit(jax.vmap(init))


@cache
def make_scores(network: nn.Module, num_codes: int) -> Callable[[Params, Table], jax.Array]:
    """Return a compiled function to the logits (runs, rows, m) of a table."""

    def scores(params: Params, table: Table) -> jax.Array:
        def one_row(row: jax.Array) -> jax.Array:
            logits = network.apply({"params": params}, features(table, row[None], num_codes))
            return jnp.asarray(logits)[:, 0]

        return lax.map(one_row, jnp.arange(len(table.labels)), batch_size=2048)

    return jax.jit(jax.vmap(scores, in_axes=(0, None)))


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the areas under the ROC curves (..., m) of scores (..., n, m) and labels (n, m).

    By ranks: the share of pairs of a positive and a negative row in right order, ties half.
    """
    labels = np.asarray(labels, np.float64)
    positives = labels.sum(axis=0)
    ranks = np.sum(rankdata(scores, axis=-2) * labels, axis=-2)
    pairs = positives * (len(labels) - positives)
    return (ranks - positives * (positives + 1) / 2) / pairs


def train(
    options: Options,
    network: nn.Module,
    rule: Rule,
    runs: Runs,
    split: Split,
) -> Trained:
    """Train all runs and evaluate them after every part."""
    start, advance = make_training(options, network, rule, split)
    scores_of = make_scores(network, split.num_codes)
    num_inputs = split.num_codes + split.train.numbers.shape[1]
    carry = start(make_init(network, num_inputs)(runs.seed), runs)
    compiled = advance.lower(carry, runs, jnp.int32(0), split.train).compile()  # type: ignore[attr-defined]
    columns = np.asarray(runs.columns)
    labels = np.asarray(split.validation.labels)
    seconds, validation, test = 0.0, [], []
    parts = options.epochs // options.evaluate_every
    for part in range(parts):
        begin = time.process_time()
        carry = jax.block_until_ready(compiled(carry, runs, jnp.int32(part), split.train))
        seconds += time.process_time() - begin
        scores = np.asarray(scores_of(carry[0], split.validation))
        validation.append(
            np.stack(
                [area_under_curve(s, labels[:, c]) for s, c in zip(scores, columns, strict=True)]
            )
        )
        test.append(np.asarray(scores_of(carry[0], split.test)))
    steps = options.epochs * max(len(split.train.labels) // options.batch_size, 1)
    return Trained(np.stack(validation), np.stack(test), seconds / steps / len(columns))


# --- from runs to records -----------------------------------------------------------------------


def make_runs(
    learning_rates: Sequence[float], seeds: Sequence[int], columns: np.ndarray, settings: Any
) -> Runs:
    """Return the runs of a grid: groups (a setting or a set of columns), rates, seeds.

    Args:
      learning_rates: (l,).
      seeds: (s,).
      columns: (g, m) labels of each group.
      settings: (g, ...) or None.

    Returns:
      `Runs` with a leading axis of g * l * s.
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
        () if settings is None else (jnp.asarray(settings[group], jnp.float32),),
    )


def choose(
    trained: Trained, runs: Runs, shape: tuple[int, int, int], options: Options, split: Split
) -> list[Record]:
    """Return for each group what the learning rate and epochs of best validation mean give."""
    areas = trained.validation.reshape(len(trained.validation), *shape, -1)
    means = areas.mean(axis=(3, 4))  # (checkpoints, groups, rates), over seeds and tasks
    chosen = []
    for group in range(shape[0]):
        part, rate = np.unravel_index(means[:, group].argmax(), means[:, group].shape)
        first = (group * shape[1] + rate) * shape[2]
        scores = trained.scores[part, first : first + shape[2]]
        labels = np.asarray(split.test.labels)[:, np.asarray(runs.columns[first])]
        precision = [
            [average_precision_score(labels[:, i], s[:, i]) for i in range(labels.shape[1])]
            for s in scores
        ]
        chosen.append(
            {
                "learning_rate": options.learning_rates[rate],
                "epochs": int(part + 1) * options.evaluate_every,
                "validation_means": rounded(means[:, group]),
                "validation_auc": rounded(areas[part, group, rate]),
                "test_auc": rounded(area_under_curve(scores, labels)),
                "test_average_precision": rounded(precision),
            }
        )
    return chosen


def rounded(values: Any) -> list[Any]:
    """Return nested lists of five digits."""
    return np.round(np.asarray(values, np.float64), 5).tolist()


def records_of(
    options: Options,
    model: str,
    method: str,
    seeds: Sequence[int],
    split: Split,
) -> list[Record]:
    """Train one method and return its records: one, or one per setting."""
    m = len(split.tasks)
    single = method == SINGLE
    rule = RULES["linear_scalarization" if single else method]
    settings = rule.settings(m) if rule.settings else None
    groups = 1 if settings is None else len(settings)
    columns = np.arange(m)[:, None] if single else np.tile(np.arange(m), (groups, 1))
    network = NETWORKS[options.dataset][model](columns.shape[1])
    runs = make_runs(options.learning_rates, seeds, columns, settings)
    trained = train(options, network, rule, runs, split)
    shape = (len(columns), len(options.learning_rates), len(seeds))
    chosen = choose(trained, runs, shape, options, split)
    if single:
        chosen = [merge_tasks(chosen)]
    shared = {
        "method": method,
        "model": model,
        "config": asdict(options),
        "seeds": list(seeds),
        **environment(),
        "microseconds_per_step": round(1e6 * trained.seconds, 1),
    }
    return [
        shared | {"setting": None if settings is None else rounded(settings[i])} | record
        for i, record in enumerate(chosen)
    ]


def merge_tasks(records: Sequence[Record]) -> Record:
    """Return one record of the single-task records."""
    merged: Record = {}
    for name in records[0]:
        values = [record[name] for record in records]
        if name in ("learning_rate", "epochs", "validation_means"):
            merged[name] = values
        else:
            merged[name] = np.concatenate(values, axis=1).tolist()
    return merged


def train_all(
    options: Options,
    models: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    split: Split,
    results: Path,
    console: Console,
) -> None:
    """Train what the results file does not hold yet; append the records of each method."""
    m = len(split.tasks)
    done = {(record["model"], record["method"]) for record in read_records(results)}
    work = [
        (model, method)
        for i, model in enumerate(models)
        for method in methods
        # One single-task baseline serves all models.
        if (method != SINGLE or not i) and (method == SINGLE or RULES[method].min_tasks <= m)
    ]
    bars = Progress(
        SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), console=console
    )
    with bars:
        bar = bars.add_task("", total=len(work))
        for model, method in work:
            bars.update(bar, description=f"{options.dataset} {model} {method}")
            if (model, method) not in done:
                begin = time.perf_counter()
                records = records_of(options, model, method, seeds, split)
                append_records(results, records)
                if not console.is_terminal:  # a log file shows no bar
                    best = max(np.mean(record["validation_auc"]) for record in records)
                    console.print(
                        f"{options.dataset} {model} {method}: validation AUC {best:.4f} "
                        f"({time.perf_counter() - begin:.0f} s)"
                    )
            bars.advance(bar)


# --- report: from the results files alone --------------------------------------------------------

Results = dict[str, Record]  # of one model: by the name of the method; swept ones by their weights


def read_results(folder: Path, dataset: str) -> dict[str, Results]:
    """Return the records of a data set by model and method."""
    results: dict[str, Results] = {}
    for record in read_records(folder / f"tabular_{dataset}.jsonl"):
        results.setdefault(record["model"], {})[label_of(record)] = record
    return results


def label_of(record: Record) -> str:
    """Return the name of a method with its setting."""
    if record["setting"] is None:
        return str(record["method"])
    if len(record["setting"]) == 2:
        return "weights " + " : ".join(f"{weight:.2f}" for weight in record["setting"])
    return "weights #" + str(np.round(100 * np.asarray(record["setting"])).astype(int).tolist())


def is_swept(record: Record) -> bool:
    """Tell whether a record belongs to the sweep of a rule's settings."""
    return record["setting"] is not None


def rules_of(results: Results) -> Results:
    """Return the records of rules: neither single tasks nor scalarizations."""
    baselines = (SINGLE, "linear_scalarization")
    return {k: v for k, v in results.items() if k not in baselines and not is_swept(v)}


def tuned_of(results: Results) -> Record:
    """Return the scalarization, equal weights included, of the best validation mean."""
    swept = [r for k, r in results.items() if is_swept(r) or k == "linear_scalarization"]
    return max(swept, key=lambda record: np.mean(record["validation_auc"]))


def drops(record: Record, single: Record) -> np.ndarray:
    """Return delta_m (seeds,) in percent against the mean of the single-task networks."""
    baseline = jnp.asarray(single["test_auc"]).mean(axis=0)
    higher = jnp.ones(baseline.shape, bool)
    one = partial(jaxmtl.metrics.delta_m, baselines=baseline, higher_is_better=higher)
    return np.asarray(jax.vmap(one)(jnp.asarray(record["test_auc"])))


def mean_ranks(results: Results) -> dict[str, float]:
    """Return the rank of each method's mean test AUC, averaged over tasks; 1 is best."""
    means = np.stack([np.mean(record["test_auc"], axis=0) for record in results.values()])
    return dict(zip(results, rankdata(-means, axis=0).mean(axis=1), strict=True))


class Rival(NamedTuple):
    """The rule that gains most over a scalarization, seed by seed."""

    name: str
    gains: np.ndarray  # (seeds,) of delta_m, in percent: positive is better than scalarization
    beyond: int  # rules whose mean gain exceeds two standard errors
    significant: int  # rules that are better by a one-sided paired t-test, 5 % in all (Bonferroni)
    rules: int


def best_rival(results: Results, single: Record, reference: Record) -> Rival:
    """Compare all rules with one scalarization on the test set."""
    rules = rules_of(results)
    base = drops(reference, single)
    gains = {name: base - drops(record, single) for name, record in rules.items()}
    best = max(gains, key=lambda name: gains[name].mean())
    beyond = significant = 0
    for gain in gains.values():
        mean, error = mean_and_error(gain.tolist())
        beyond += mean > 2 * error
        p = ttest_1samp(gain, 0, alternative="greater").pvalue if gain.std() else 1.0
        significant += p < 0.05 / len(gains)
    return Rival(best, gains[best], beyond, significant, len(gains))


def beyond_front(results: Results) -> list[str]:
    """Return the rules that no scalarization matches on all tasks within two standard errors."""
    front = [r for k, r in results.items() if is_swept(r) or k == "linear_scalarization"]
    found = []
    for name, record in rules_of(results).items():
        test = np.asarray(record["test_auc"])
        gaps = [test - np.asarray(other["test_auc"]) for other in front]  # (seeds, m), paired
        errors = [gap.std(axis=0, ddof=1) / np.sqrt(len(gap)) for gap in gaps]
        if all((g.mean(axis=0) > 2 * e).any() for g, e in zip(gaps, errors, strict=True)):
            found.append(name)
    return found


def setups(folder: Path) -> dict[str, tuple[Results, Record]]:
    """Return, for every data set and model at hand, its results and the single-task record."""
    found = {}
    for dataset in PRESETS:
        results = read_results(folder, dataset)
        singles = [models[SINGLE] for models in results.values() if SINGLE in models]
        for model, records in results.items():
            complete = "linear_scalarization" in records and rules_of(records)
            if singles and complete:
                found[f"{dataset}, {model}"] = records, singles[0]
    return found


def claims(folder: Path) -> list[Claim]:
    """Return what the papers claim beside what the records say.

    A scalarization *matches* the rules of a set-up if none has a better delta_m by a one-sided
    t-test, paired by seed, at 5 % for all of them together (Bonferroni). Shown are the rule that
    gains most, and how many gain more than two standard errors, uncorrected.
    """
    found = setups(folder)
    if not found:
        return []

    def against(pick: Callable[[Results], Record]) -> tuple[str, str]:
        rivals = {
            name: best_rival(results, single, pick(results))
            for name, (results, single) in found.items()
        }
        text = "; ".join(
            f"{name}: best of {r.rules} {r.name} {show(r.gains.tolist(), digits=2)} %, "
            f"{r.beyond} beyond 2 errors, {r.significant} significant"
            for name, r in rivals.items()
        )
        return text, judge(r.significant == 0 for r in rivals.values())

    equal, equal_verdict = against(lambda results: results["linear_scalarization"])
    tuned, tuned_verdict = against(tuned_of)
    made = [
        Claim(
            "Equal weights match every multi-task optimizer",
            "Kurin 2022, section 4",
            "",
            f"gain in delta_m over equal weights: {equal}",
            equal_verdict,
        ),
        Claim(
            "Scalarization with weights tuned on validation data matches every optimizer",
            "Xin 2022, section 4",
            "",
            f"gain in delta_m over tuned weights: {tuned}",
            tuned_verdict,
        ),
    ]
    planes = {n: beyond_front(r) for n, (r, _) in found.items() if n.startswith("census")}
    if planes:
        text = "; ".join(
            f"{name}: {len(rules)} rules beyond" + (f" ({', '.join(rules)})" if rules else "")
            for name, rules in planes.items()
        )
        made.append(
            Claim(
                "No optimizer leaves the front that swept weights trace",
                "Xin 2022, figure 1",
                "",
                f"better than each weighting on some task by 2 errors, {text}",
                judge(not rules for rules in planes.values()),
            )
        )
    pair = [found.get(f"census, {model}") for model in NETWORKS["census"]]
    if pair[0] and pair[1]:
        bottom, mixture = (np.asarray(p[0]["linear_scalarization"]["test_auc"]) for p in pair if p)
        gaps = 100 * (mixture - bottom).T
        points = [mean_and_error(gap.tolist()) for gap in gaps]
        made.append(
            Claim(
                "Multi-gate mixture of experts beats the shared bottom on Census-Income",
                "Ma 2018, section 6.2",
                "",
                "AUC in percent, difference with equal weights: "
                + ", ".join(
                    f"{task} {show(gap.tolist(), digits=3)}"
                    for task, gap in zip(CENSUS_TASKS, gaps, strict=True)
                ),
                judge(mean > 2 * error for mean, error in points),
            )
        )
    made += cost_claim(found)
    return made


def cost_claim(found: dict[str, tuple[Results, Record]]) -> list[Claim]:
    """Return the claim on costs, from the data set with many tasks."""
    results = found.get("yeast, shared_bottom", ({}, {}))[0]
    names = ("ldc_mtl", "famo", "go4align", "nash_mtl")
    if not all(name in results for name in names):
        return []
    ratio = {name: cost_ratio(results, name) for name in names}
    nash = ratio["nash_mtl"] / ratio["ldc_mtl"]
    return [
        Claim(
            "LDC-MTL, FAMO and GO4Align cost about one gradient, Nash-MTL many times LDC-MTL",
            "Xiao 2025, section 5 and figure 4",
            "at most 1.11 times scalarization; Nash-MTL 12 times LDC-MTL (CelebA, 40 tasks)",
            ", ".join(f"{name} {value:.2f}" for name, value in ratio.items())
            + f" times scalarization; Nash-MTL {nash:.1f} times LDC-MTL (14 tasks)",
            judge([max(ratio[name] for name in names[:3]) <= 1.11, nash >= 2]),
        )
    ]


def cost_ratio(results: Results, name: str) -> float:
    """Return the CPU time of a step relative to linear scalarization."""
    base = results["linear_scalarization"]["microseconds_per_step"]
    return float(results[name]["microseconds_per_step"] / base)


def make_table(name: str, results: Results, single: Record) -> TextTable:
    """Return the table of a data set and model, best delta_m first."""
    dataset = name.split(",")[0]
    tasks = TASKS[dataset]
    table = TextTable(title=f"{name}: test set, mean ± standard error over seeds")
    table.add_column("method", no_wrap=True)
    per_task = len(tasks) == 2
    headers = [f"{task} AUC %" for task in tasks] if per_task else ["AUC %", "precision %"]
    for header in (*headers, "delta_m %", "rank", "cost", "rate", "epochs"):
        table.add_column(header, justify="right")
    shown = {k: r for k, r in results.items() if not is_swept(r)}
    tuned = tuned_of(results)
    shown[f"tuned: {label_of(tuned)}" if per_task else "tuned weights"] = tuned
    ranks = mean_ranks({k: r for k, r in shown.items() if k != SINGLE})
    shown.setdefault(SINGLE, single)
    for method, record in sorted(shown.items(), key=lambda item: drops(item[1], single).mean()):
        auc = 100 * np.asarray(record["test_auc"])
        if per_task:
            cells = [show(column.tolist(), digits=2) for column in auc.T]
        else:
            precision = 100 * np.asarray(record["test_average_precision"])
            cells = [show(x.mean(axis=1).tolist(), digits=2) for x in (auc, precision)]
        alone = method == SINGLE
        fixed = is_swept(record) or alone
        table.add_row(
            method,
            *cells,
            show(drops(record, single).tolist(), digits=2),
            "" if alone else f"{ranks[method]:.1f}",
            "" if fixed else f"{cost_ratio(results, method):.2f}",
            "" if alone else f"{record['learning_rate']:g}",
            "" if alone else str(record["epochs"]),
        )
    return table


COLOURS = {"none": "tab:green", "Gramian": "tab:blue", "coordinates": "tab:orange"}


def colour_of(method: str, num_tasks: int) -> str:
    """Return the colour of what a rule has to see of the gradients."""
    return COLOURS[needs_of(RULES[method].make(num_tasks, 1))]


def colour_legend(figure: Figure, extra: Sequence[Any] = ()) -> None:
    """Add the legend of colours below."""
    dots = [
        Line2D([], [], marker="o", ls="", color=colour, label=f"rules that see: {needs}")
        for needs, colour in COLOURS.items()
    ]
    figure.legend(handles=[*dots, *extra], loc="outside lower center", ncols=4, frameon=False)


def draw_plane(found: dict[str, tuple[Results, Record]], path: Path) -> None:
    """Save the plane of the two areas under the curve, one panel per network."""
    figure = Figure(figsize=(7.5 * len(found), 7.5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (name, (results, single)) in zip(panels, found.items(), strict=True):
        draw_panel(axis, results, single)
        axis.set_title(name.split(", ")[1].replace("_", " "))
        axis.set_xlabel(f"{CENSUS_TASKS[0]}: test AUC (%)")
        axis.set_ylabel(f"{CENSUS_TASKS[1]}: test AUC (%)")
        axis.grid(alpha=0.3)
    seeds = len(next(iter(found.values()))[1]["seeds"])
    figure.suptitle(f"Census-Income: every rule beside swept weights (mean ± error, {seeds} seeds)")
    curve = Line2D([], [], color="black", marker="s", ms=4, label="scalarization, swept weights")
    alone = Line2D([], [], color="tab:red", ls="--", label="single-task networks")
    colour_legend(figure, [curve, alone])
    figure.savefig(path, dpi=120)


def draw_panel(axis: Axes, results: Results, single: Record) -> None:
    """Draw one panel: numbered rules, the curve of weights, the single-task networks."""

    def point(record: Record) -> tuple[np.ndarray, np.ndarray]:
        columns = 100 * np.asarray(record["test_auc"]).T
        mean, error = np.transpose([mean_and_error(column.tolist()) for column in columns])
        return mean, error

    swept = sorted((r for r in results.values() if is_swept(r)), key=lambda r: r["setting"][0])
    if swept:
        means = np.stack([point(record)[0] for record in swept])
        axis.plot(*means.T, "s-", color="black", ms=4, lw=1)
        for record, mean in zip(swept, means, strict=True):
            axis.annotate(
                f"{record['setting'][0]:g}", mean, (4, -9), textcoords="offset points", fontsize=7
            )
    for line, value in zip((axis.axvline, axis.axhline), point(single)[0], strict=True):
        line(value, color="tab:red", ls="--", lw=1)
    rules = rules_of(results)
    for number, (method, record) in enumerate(rules.items(), 1):
        (x, y), (dx, dy) = point(record)
        colour = colour_of(method, 2)
        axis.errorbar(x, y, xerr=dx, yerr=dy, color=colour, lw=0.7, alpha=0.5)
        axis.plot(x, y, "o", color=colour, ms=11, alpha=0.6, label=f"{number} {method}")
        axis.annotate(str(number), (x, y), ha="center", va="center", fontsize=7, color="white")
    axis.legend(fontsize=6.5, ncols=2, handlelength=0.5, loc="lower left", framealpha=0.6)


def draw_bars(found: dict[str, tuple[Results, Record]], path: Path) -> None:
    """Save delta_m of every rule as bars with errors."""
    results, single = next(iter(found.values()))
    rules = rules_of(results)
    values = {name: mean_and_error(drops(r, single).tolist()) for name, r in rules.items()}
    names = sorted(values, key=lambda name: values[name][0])
    figure = Figure(figsize=(8, 1.8 + 0.22 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(
        names,
        [values[name][0] for name in names],
        xerr=[values[name][1] for name in names],
        color=[colour_of(name, len(YEAST_TASKS)) for name in names],
        error_kw={"lw": 1},
    )
    axis.invert_yaxis()
    axis.margins(y=0.01)
    lines = []
    baselines = {
        "equal weights": (results["linear_scalarization"], "black"),
        "weights tuned on validation data": (tuned_of(results), "tab:purple"),
    }
    for label, (record, colour) in baselines.items():
        mean, error = mean_and_error(drops(record, single).tolist())
        lines.append(axis.axvline(mean, color=colour, lw=1.2, label=label))
        axis.axvspan(mean - error, mean + error, color=colour, alpha=0.12)
    axis.set_xlabel("delta_m (%) against single-task networks; negative is better")
    axis.grid(axis="x", alpha=0.3)
    seeds = len(single["seeds"])
    figure.suptitle(f"Yeast, 14 labels: mean ± standard error over {seeds} seeds")
    colour_legend(figure, lines)
    figure.savefig(path, dpi=120)


def report(folder: Path, datasets: Sequence[str], console: Console) -> None:
    """Print tables and save figures of what the results files hold."""
    found = {k: v for k, v in setups(folder).items() if k.split(",")[0] in datasets}
    if not found:
        names = " or ".join(f"tabular_{dataset}.jsonl" for dataset in datasets)
        raise SystemExit(
            f"expected results in {folder / names}, single_task, linear_scalarization and a rule "
            "among them; run without --report-only first"
        )
    for name, (results, single) in found.items():
        console.print(make_table(name, results, single))
    for dataset, draw in {"census": draw_plane, "yeast": draw_bars}.items():
        mine = {k: v for k, v in found.items() if k.startswith(dataset)}
        if mine:
            figure = folder / f"tabular_{dataset}.png"
            draw(mine, figure)
            console.print(f"{folder / f'tabular_{dataset}.jsonl'} -> {figure}")


# --- main ---------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line; options that are not given come from the preset of the data set."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tabular")
    add = parser.add_argument
    methods = [SINGLE, *RULES]
    add("--datasets", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="DATASET")
    add("--data-dir", help="folder of the tables; by default they are downloaded from OpenML")
    add("--out", type=Path, default=Path("results"), help="folder of results and figures")
    add("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    add("--models", nargs="+", choices=("shared_bottom", "mmoe"), help="all of the data set's")
    add("--seeds", type=int, default=5)
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rates", type=float, nargs="+")
    add("--resume", action="store_true", help="keep what the results file holds already")
    add("--report-only", action="store_true", help="tables and figures of existing results")
    add("--smoke", action="store_true", help="made-up tables, two seeds, a few steps")
    return parser.parse_args(argv)


def options_of(dataset: str, args: argparse.Namespace) -> Options:
    """Return the preset of a data set with what the command line changes."""
    fields = ("epochs", "batch_size", "learning_rates")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.learning_rates:
        given["learning_rates"] = tuple(args.learning_rates)
    if args.smoke:
        given |= {"epochs": 2, "evaluate_every": 1, "batch_size": 32, "rows": 240}
    return replace(PRESETS[dataset], **given)


def run(dataset: str, args: argparse.Namespace, results: Path, console: Console) -> None:
    """Train on one data set."""
    options = options_of(dataset, args)
    if not args.resume:
        results.unlink(missing_ok=True)
    wanted = json.loads(json.dumps(asdict(options)))
    if any(record["config"] != wanted for record in read_records(results)):
        raise SystemExit(f"expected the options of {results}, got {options}; drop --resume")
    tasks = TASKS[dataset]
    split = make_up(tasks, options.rows) if options.rows else LOADERS[dataset](args.data_dir)
    models = [model for model in NETWORKS[dataset] if model in (args.models or NETWORKS[dataset])]
    train_all(options, models, args.methods, range(args.seeds), split, results, console)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report."""
    args = parse(argv)
    console = make_console()
    if args.smoke:
        args.seeds = 2
    for dataset in args.datasets:
        results = args.out / f"tabular_{dataset}.jsonl"
        if not args.report_only:
            run(dataset, args, results, console)
    report(args.out, args.datasets, console)


if __name__ == "__main__":
    main()
