"""The presets of the tables, their networks, and the command line."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import numpy as np

from experiments.study import Job, Part, Record, Results, Say, Study, config_of
from experiments.tabular.data import (
    NUM_INPUTS,
    TASKS,
    Split,
    load_arff,
    load_census,
    load_sarcos,
    load_yeast,
    make_up,
)
from experiments.tabular.methods import METHODS, SINGLE
from experiments.tabular.networks import MixtureOfExperts, SharedBottom
from experiments.tabular.report import claims, report
from experiments.tabular.train import Options, kind_of, records_of

PRESETS = {
    # 1,200 rows are soon learned by heart: the number of epochs decides.
    "yeast": Options(
        "yeast", epochs=24, batch_size=100, evaluate_every=2, learning_rates=(0.003, 0.01)
    ),
    # Not tuned.
    "sarcos": Options(
        "sarcos", epochs=60, batch_size=100, evaluate_every=6, learning_rates=(0.003, 0.01)
    ),
    "rf1": Options(
        "rf1", epochs=40, batch_size=100, evaluate_every=4, learning_rates=(0.003, 0.01)
    ),
    "water_quality": Options(
        "water_quality", epochs=24, batch_size=50, evaluate_every=2, learning_rates=(0.003, 0.01)
    ),
    # One pass over 199,523 rows. One learning rate for all rules, the best of {0.001, 0.003, 0.01}
    # for equal weights and the shared bottom: validation means 0.9658, 0.9686, 0.9687.
    "census": Options(
        "census", epochs=1, batch_size=1024, evaluate_every=1, learning_rates=(0.01,)
    ),
}

LOADERS: dict[str, Callable[[str | None], Split]] = {
    "census": load_census,
    "yeast": load_yeast,
    "sarcos": load_sarcos,
    "rf1": partial(load_arff, "rf1"),
    "water_quality": partial(load_arff, "water_quality"),
}

# The mixture has as many units as the shared bottom: 8 experts of 4.
NETWORKS: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "census": {
        "shared_bottom": lambda m: SharedBottom(m, (32,), tower_width=8),
        "mmoe": lambda m: MixtureOfExperts(m, num_experts=8, width=4, tower_width=8),
    },
    "yeast": {"shared_bottom": lambda m: SharedBottom(m, (32, 32), tower_width=0)},
    **{
        name: {"shared_bottom": lambda m: SharedBottom(m, (64, 64), tower_width=0)}
        for name in NUM_INPUTS
    },
}

# A method of each route.
SMOKE_METHODS = [SINGLE, "linear_scalarization", "upgrad", "famo", "modo", "swept_scalarization"]


def part_of(dataset: str, args: argparse.Namespace) -> Part:
    """Returns the runs on one data set, with what the command line changes of its preset."""
    fields = ("epochs", "batch_size", "learning_rates")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.smoke:
        given |= {"epochs": 2, "evaluate_every": 1, "batch_size": 32, "rows": 240}
    options = replace(PRESETS[dataset], **given)
    methods = args.methods or (SMOKE_METHODS if args.smoke else [SINGLE, *METHODS])
    seeds = range(2 if args.smoke else args.seeds or 5)
    tasks = TASKS[dataset]

    @cache
    def split() -> Split:
        if options.rows:
            return make_up(tasks, options.rows, regression=dataset in NUM_INPUTS)
        return LOADERS[dataset](args.data_dir)

    def run(model: str, method: str, say: Say) -> list[Record]:
        begin = time.perf_counter()
        network = NETWORKS[dataset][model]
        records = records_of(options, network, method, seeds, split())
        kind = kind_of(split())
        measure = next(iter(kind.measures))
        means = [np.mean(record[f"validation_{measure}"]) for record in records]
        best, seconds = kind.sign * max(kind.sign * np.array(means)), time.perf_counter() - begin
        say(f"{dataset} {model} {method}: validation {measure} {best:.4f} ({seconds:.0f} s)")
        return [{"model": model} | record for record in records]

    def jobs(results: Results) -> Iterator[Job]:
        done = {(record["model"], record["method"]) for record in results.records}
        models = [name for name in NETWORKS[dataset] if name in (args.models or [name])]
        for model in models:
            for method in methods:
                # One single-task baseline serves all models.
                wanted = (
                    model == models[0]
                    if method == SINGLE
                    else METHODS[method].min_tasks <= len(tasks)
                )
                if wanted and (model, method) not in done:
                    yield Job(f"{dataset} {model} {method}", partial(run, model, method))

    return Part(dataset, jobs, [config_of(options)])


study = Study(
    name="tabular",
    commands=(
        "--out experiments/results",
        "--datasets sarcos rf1 water_quality --data-dir DIR --out experiments/results",
    ),
    methods=(SINGLE, *METHODS),
    figures=("census.png", "yeast.png", "sarcos.png", "rf1.png", "water_quality.png"),
    plan=lambda args: [part_of(name, args) for name in args.datasets],
    report=report,
    claims=claims,
    options={
        "--datasets": {"nargs": "+", "choices": PRESETS, "default": ["yeast", "census"]},
        "--data-dir": {"help": "folder of the tables; by default they are downloaded from OpenML"},
        "--models": {"nargs": "+", "choices": ("shared_bottom", "mmoe"), "help": "by default all"},
        "--epochs": {"type": int},
        "--batch-size": {"type": int},
        "--learning-rates": {"type": float, "nargs": "+"},
    },
)

if __name__ == "__main__":
    study.main()
