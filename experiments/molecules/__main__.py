"""The presets of the molecules and their command line."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import chain

import numpy as np

from experiments.checkpoints import Checkpoint
from experiments.molecules.data import QM9_TASKS, RIMP2_TASKS, Split, load_rimp2, make_up
from experiments.molecules.methods import METHODS, SINGLE
from experiments.molecules.qm9 import load_qm9
from experiments.molecules.report import baselines_of, claims, report
from experiments.molecules.train import Options, train
from experiments.study import Job, Part, Record, Results, Say, Study, config_of

PRESETS = {
    # 20 epochs at half the width are two hours of one CPU core.
    "rimp2": Options("rimp2", width=32, epochs=20),
    "qm9": Options("qm9", width=64, epochs=300),
}
TASKS = {"rimp2": RIMP2_TASKS, "qm9": QM9_TASKS}
LOADERS: dict[str, Callable[[str | None, int], Split]] = {"rimp2": load_rimp2, "qm9": load_qm9}
# What is run where time is short: all that cost a gradient, and four that cost a gradient a task.
REDUCED = (
    *("linear_scalarization", "scale_invariant", "rlw", "dwa", "uncertainty_weighting"),
    *("famo", "go4align", "ldc_mtl", "cagrad", "imtl_g", "aligned_mtl", "upgrad"),
)
SMOKE_METHODS = ("linear_scalarization", "famo", "ldc_mtl", "upgrad")  # one of each way


def part_of(name: str, args: argparse.Namespace) -> Iterator[Part]:
    """Yields the runs on one source of molecules."""
    given = {
        key: value
        for key in ("epochs", "width", "batch_size")
        if (value := getattr(args, key)) is not None
    }
    if args.smoke:
        small = {"epochs": 2, "width": 4, "batch_size": 20, "strata": 1, "made_up": 100}
        given = small | given
    options = replace(PRESETS[name], **given)
    default = SMOKE_METHODS if args.smoke else REDUCED if name == "rimp2" else tuple(METHODS)
    methods = args.methods or (SINGLE, *default)
    seeds = range(args.seeds or 1)

    finished: list[Checkpoint] = []

    def checkpoint_of(method: str, seed: int, task: int | None) -> Checkpoint:
        label = f"{name}-{method}-{seed}" + ("" if task is None else f"-{task}")
        return Checkpoint(args.out / "molecules" / "checkpoints" / f"{label}.npz", options)

    @cache
    def split() -> Split:
        if options.made_up:
            return make_up(TASKS[name], options.made_up, options.strata)
        return LOADERS[name](args.data_dir, options.strata)

    def run(method: str, seed: int, task: int | None, results: Results, say: Say) -> list[Record]:
        baseline = None
        if method != SINGLE:
            found = baselines_of(results.records, len(TASKS[name]))
            if found is None:
                raise SystemExit(
                    f"expected the single tasks in {results.path}, which delta_m is measured "
                    f"against, got some or none; add {SINGLE} to --methods"
                )
            baseline = np.asarray(found["validation_mae"])
        checkpoint = checkpoint_of(method, seed, task)
        if not args.resume:
            checkpoint.remove()
        record = train(options, method, seed, split(), checkpoint, say, baseline, task)
        # The record is written before the checkpoint goes.
        finished.append(checkpoint)
        return [record]

    def jobs(results: Results) -> Iterator[Job]:
        done = {(r["method"], r["seed"], r["task"]) for r in results.records}
        # Single tasks first: the others are measured against them.
        for method in sorted(methods, key=lambda method: method != SINGLE):
            for seed in seeds:
                tasks = range(len(TASKS[name])) if method == SINGLE else (None,)
                for task in tasks:
                    if (method, seed, task) in done:
                        checkpoint_of(method, seed, task).remove()
                    else:
                        label = f"{name} {method}" + ("" if task is None else f" {task + 1}")
                        yield Job(label, partial(run, method, seed, task, results), options.epochs)

    yield Part(name, jobs, [config_of(options)])
    for checkpoint in finished:
        checkpoint.remove()


study = Study(
    name="molecules",
    commands=("--data-dir DIR --out experiments/results",),
    methods=(SINGLE, *METHODS),
    figures=("rimp2.png", "rimp2_weights.png"),
    plan=lambda args: chain.from_iterable(part_of(name, args) for name in args.datasets),
    report=report,
    claims=claims,
    options={
        "--datasets": {"nargs": "+", "choices": PRESETS, "default": ["rimp2"]},
        "--data-dir": {"help": "folder with the molecules; QM9 without it: TFDS, with download"},
        "--epochs": {"type": int},
        "--width": {"type": int},
        "--batch-size": {"type": int},
    },
)

if __name__ == "__main__":
    study.main()
