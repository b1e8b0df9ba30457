"""Real multi-task tables: every rule of the library beside tuned scalarization and single tasks.

    python -m experiments.tabular                  # downloads from OpenML by scikit-learn
    python -m experiments.tabular --data-dir DIR   # reads the folder of `experiments.data.tables`

Results are JSON lines, one per method or weighting, in the folder `--out`; tables and figures are
made from them (`--report-only`), `--resume` goes on where a run stopped, `--smoke` takes seconds.

**Yeast** has 14 labels of 1,500 genes; a network of two shared layers of 32 and linear towers.
**Census-Income** has 199,523 rows and two labels, an income above 50,000 and never having married;
a shared bottom of 32 units, or 8 experts of 4 with a gate per task, and towers of 8. A rule
combines the gradients of the shared parameters; those of one task get their own gradient, or, by
rules that take one backward pass, the weighted one. Adam follows, with batches of 100 and 1,024.

The learning rate (Yeast: 0.003 or 0.01) and the number of epochs (Yeast: up to 24) are those of the
best validation mean of the areas under the curve, for every method alike; so are the weights of the
tuned scalarization. Rules run with their defaults and are not tuned further: one that loses here
might do better with parameters of its own. Census-Income gets one pass at one learning rate. Seeds
differ in initial parameters and minibatches, which all methods share. *Cost* is CPU time per step
beside that of equal weights, on a machine with much else to do.

**Yeast**, all rules, 5 seeds, test set in percent (the whole table: `--report-only`):

    method                  AUC             precision       delta_m         cost
    clip_rows_upgrad        69.03 +- 0.55   47.10 +- 0.51   -0.30 +- 0.85   8.7
    aligned_mtl             68.94 +- 0.29   46.97 +- 0.29   -0.19 +- 0.47   6.3
    famo                    68.86 +- 0.31   47.00 +- 0.32   -0.05 +- 0.49   1.3
    single_task             68.86 +- 0.23   47.45 +- 0.22    0.00 +- 0.38
    nash_mtl                68.77 +- 0.43   46.97 +- 0.40    0.15 +- 0.68   5.7
    upgrad                  68.68 +- 0.38   46.80 +- 0.46    0.23 +- 0.61   6.6
    equal weights           68.63 +- 0.41   46.79 +- 0.30    0.25 +- 0.63   1
    tuned weights           68.59 +- 0.24   46.92 +- 0.42    0.32 +- 0.39
    mgda                    68.24 +- 0.26   46.52 +- 0.31    0.81 +- 0.41   5.9
    scale_invariant         67.36 +- 0.38   46.11 +- 0.34    2.15 +- 0.61   1.0
    krum                    64.36 +- 0.34   42.18 +- 0.22    6.21 +- 0.49   6.0

Two of 37 rules gain more than two standard errors over equal weights, none significantly; seven are
worse than equal weights by more than 0.8. Validation data did not find better
weights than equal ones: a random vector that reaches -0.7 on the test set had the lower mean there.

**Census-Income**, test AUC in percent, income and never married: single-task networks 94.47 and
99.38 (errors 0.02 and 0.01), shared bottom with equal weights 94.41 and 99.38, with tuned ones
(0.9 : 0.1) 94.48 and 99.37. Of 35 rules 33 lie within 0.05 of equal weights on both; DB-MTL (94.05,
99.15) and ExcessMTL (92.05, 99.38) lose. Tuned weights are as good as the best rule; Nash-MTL and
scale_invariant lie beyond the front of the nine weightings, by 0.02. The input layer is most
of the work: a step costs about the same by every rule but those that evaluate a second minibatch.
The mixture of experts beats the shared bottom, by 0.08 and 0.03, and the single-task networks;
with it scale_invariant alone lies beyond the front, by 0.01 on the never married, and nothing else
changes.

**Reference**: Ma et al. 2018 (MMoE), section 6; Kurin et al. 2022 ("In defense of the unitary
scalarization"); Xin et al. 2022 ("Do current multi-task optimization methods even help?").

**Differs from** Ma et al.: one pass in place of a search over networks and learning rates, so their
areas under the curve are not set beside these. Education stays among the inputs. `sdmgrad` and
`modo` take the cross-Gramian from the halves of the next minibatch, and the step from the whole of
the current one: the batches are independent and the data per step are those of the other rules.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

import jaxmtl
from experiments._runs import Record, append_records, environment, make_console, read_records
from experiments.data.tables import (
    TASKS,
    Split,
    Table,
    features,
    load_census,
    load_yeast,
    make_up,
)
from experiments.models.tabular_networks import MixtureOfExperts, SharedBottom
from experiments.tabular_report import claims, report
from experiments.tabular_rules import EXTRAS, RULES, SINGLE, Batches, Params, Rule, make_direction

__all__ = ["COMMAND", "FIGURES", "claims", "main"]

# Nearly every program runs for seconds: XLA may compile three times faster and run as fast.
COMPILER_OPTIONS: dict[str, bool | int] = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

COMMAND = "python -m experiments.tabular --out experiments/results"
FIGURES = ("tabular_census.png", "tabular_yeast.png")


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
    # One pass over 199,523 rows. One learning rate for all rules, the best of {0.001, 0.003, 0.01}
    # for equal weights and the shared bottom: validation means 0.9658, 0.9686, 0.9687.
    "census": Options(
        "census", epochs=1, batch_size=1024, evaluate_every=1, learning_rates=(0.01,)
    ),
}

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


def draw_order(key: jax.Array, num_rows: int, steps: int, epochs: int) -> jax.Array:
    """Return the rows (epochs * steps, b) of the minibatches of some epochs."""
    keys = jax.random.split(key, epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_rows))(keys)
    return order[:, : num_rows // steps * steps].reshape(epochs * steps, num_rows // steps)


def make_training(
    options: Options, network: nn.Module, rule: Rule, split: Split
) -> tuple[Callable[[Params, Runs], Any], jax.stages.Wrapped]:
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

    all_runs = jax.vmap(advance, in_axes=(0, 0, None, None))
    return jax.vmap(start), jax.jit(all_runs, compiler_options=COMPILER_OPTIONS)


@cache  # one compilation for all rules
def make_init(network: nn.Module, num_inputs: int) -> Callable[[jax.Array], Params]:
    """Return a compiled function from seeds (runs,) to parameters."""

    def init(seed: jax.Array) -> Params:
        return network.init(jax.random.key(seed), jnp.zeros((1, num_inputs)))["params"]

    return jax.jit(jax.vmap(init), compiler_options=COMPILER_OPTIONS)


@cache
def make_scores(network: nn.Module, num_codes: int) -> Callable[[Params, Table], jax.Array]:
    """Return a compiled function to the logits (runs, rows, m) of a table."""

    def scores(params: Params, table: Table) -> jax.Array:
        def one_row(row: jax.Array) -> jax.Array:
            logits = network.apply({"params": params}, features(table, row[None], num_codes))
            return jnp.asarray(logits)[:, 0]

        return lax.map(one_row, jnp.arange(len(table.labels)), batch_size=2048)

    return jax.jit(jax.vmap(scores, in_axes=(0, None)), compiler_options=COMPILER_OPTIONS)


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
    compiled = advance.lower(carry, runs, jnp.int32(0), split.train).compile()
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
    shares = np.asarray(split.train.labels, np.float64).mean(axis=0)
    settings = rule.settings(shares) if rule.settings else None
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


# --- main ---------------------------------------------------------------------------------------

# A rule of each route.
SMOKE_METHODS = [SINGLE, "linear_scalarization", "upgrad", "famo", "modo", "swept_scalarization"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line; options that are not given come from the preset of the data set."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tabular")
    add = parser.add_argument
    methods = [SINGLE, *RULES]
    add("--datasets", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="DATASET")
    add("--data-dir", help="folder of the tables; by default they are downloaded from OpenML")
    add("--out", type=Path, default=Path("results"), help="folder of results and figures")
    add("--methods", nargs="+", choices=methods, metavar="METHOD", help="by default all")
    add("--models", nargs="+", choices=("shared_bottom", "mmoe"), help="all of the data set's")
    add("--seeds", type=int, default=5)
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--learning-rates", type=float, nargs="+")
    add("--resume", action="store_true", help="keep what the results file holds already")
    add("--report-only", action="store_true", help="tables and figures of existing results")
    add("--smoke", action="store_true", help="made-up tables, two seeds, a few steps and methods")
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
    args.methods = args.methods or (SMOKE_METHODS if args.smoke else [SINGLE, *RULES])
    if args.smoke:
        args.seeds = 2
    for dataset in args.datasets:
        results = args.out / f"tabular_{dataset}.jsonl"
        if not args.report_only:
            run(dataset, args, results, console)
    report(args.out, args.datasets, console)


if __name__ == "__main__":
    main()
