"""The presets of Meta-World and their command line."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments.metaworld.learner import Options
from experiments.metaworld.methods import METHODS, REFUSED, SINGLE, check_method
from experiments.metaworld.report import LEARNER, claims, part_name, report
from experiments.metaworld.timing import SIZES, measure
from experiments.metaworld.train import MADE_UP, check_options, train
from experiments.metaworld.worlds import TASKS
from experiments.study import Job, Part, Record, Results, Say, Study, config_of

# 667 episodes of 150 steps: 100,050 steps of every task, evaluated after every 67th.
PRESETS = {
    name: Options(name, tasks, steps=100_050, evaluate_every=10_050, episodes=10)
    for name, tasks in TASKS.items()
}
DEFAULT_METHODS = {
    "MT3": ("linear_scalarization", "pcgrad", "cagrad", "upgrad"),
    "MT10": ("linear_scalarization", "cagrad", "upgrad"),
    LEARNER: (SINGLE, *list(METHODS)[:8]),
}
# A few steps in a made-up world, where a point is driven to a goal.
SMOKE: dict[str, Any] = {
    "benchmark": MADE_UP,
    "steps": 60,
    "evaluate_every": 30,
    "episodes": 2,
    "widths": (16, 16),
    "batch_size": 8,
    "random_steps": 15,
    "horizon": 15,
    "monitor_every": 1,
}
SMOKE_METHODS = ("linear_scalarization", "cagrad_moco")


def options_of(args: argparse.Namespace) -> Options:
    """Returns the options of the command line."""
    fields = ("steps", "evaluate_every", "episodes", "network", "batch_size", "reward_version")
    given: dict[str, Any] = {f: getattr(args, f) for f in fields if getattr(args, f) is not None}
    if args.tasks:
        given |= {"tasks": tuple(args.tasks), "benchmark": "tasks"}
    if args.widths:
        given["widths"] = tuple(args.widths)
    if args.raw_rewards:
        given["reward_scale"] = False
    preset = PRESETS["MT10" if args.benchmark == LEARNER else args.benchmark]
    changes: dict[str, Any] = (SMOKE if args.smoke else {}) | given
    return replace(preset, **changes)


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the runs of a benchmark, or the measurement of the learner alone."""
    options = options_of(args)
    smoke = () if not args.smoke else SMOKE_METHODS
    methods = tuple(args.methods or smoke or DEFAULT_METHODS[args.benchmark])
    try:
        check_options(options)
        for method in methods:
            check_method(method, len(options.tasks))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.benchmark == LEARNER and not args.smoke:
        yield Part(LEARNER, partial(learner_jobs, options, methods))
        return
    seeds = range(args.seeds or (1 if args.smoke else 2))
    name, folder = part_name(args), args.out / study.name / "checkpoints"

    def run(
        method: str, seed: int, path: Path, history: list[Record], results: Results, say: Say
    ) -> list[Record]:
        def add(record: Record) -> None:
            results.add([record])  # at once: a run takes an hour

        train(options, method, seed, path, history, add, say, args.processes)
        return []

    def jobs(results: Results) -> Iterator[Job]:
        for seed, method in product(seeds, methods):
            path = folder / f"{name}_{method}_{seed}.msgpack"
            if not args.resume:
                path.unlink(missing_ok=True)
            history = [r for r in results.records if (r["method"], r["seed"]) == (method, seed)]
            if all(record["step"] < options.steps for record in history):
                one = partial(run, method, seed, path, history, results)
                yield Job(f"{method:<20} seed {seed}", one, options.steps // options.horizon)

    yield Part(name, jobs, [config_of(options)])


def learner_jobs(options: Options, methods: tuple[str, ...], results: Results) -> Iterator[Job]:
    """Yields the measurement of the learner alone at each size."""
    done = {record["size"] for record in results.records}
    for size in SIZES:
        if size not in done:
            yield Job(size, partial(measure, options, methods, size), len(methods))


study = Study(
    name="metaworld",
    commands=(
        "--out experiments/results",
        "--out experiments/results --benchmark MT10 --seeds 1",
        "--out experiments/results --benchmark learner",
    ),
    methods=(SINGLE, *METHODS, *REFUSED),
    figures=("mt3.png", "mt10.png"),
    plan=plan,
    report=report,
    claims=claims,
    options={
        "--benchmark": {"choices": (*PRESETS, LEARNER), "default": "MT3"},
        "--tasks": {"nargs": "+", "help": "names of Meta-World v3 in place of a benchmark"},
        "--network": {"choices": ("shared", "multi_head")},
        "--steps": {"type": int, "help": "of every task, in whole episodes"},
        "--evaluate-every": {"type": int, "help": "steps, in whole episodes"},
        "--episodes": {"type": int, "help": "of an evaluation"},
        "--widths": {"type": int, "nargs": "+", "help": "of the hidden layers"},
        "--batch-size": {"type": int, "help": "of each task"},
        "--reward-version": {"choices": ("v1", "v2"), "help": "of Meta-World's rewards"},
        "--raw-rewards": {"action": "store_true", "help": "rewards are not scaled"},
        "--processes": {"type": int, "choices": (1, 2), "default": 2, "help": "2: simulate apart"},
    },
)

if __name__ == "__main__":
    study.main()
