"""The command line of the faces."""

import argparse
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax

from experiments.checkpoints import Checkpoint
from experiments.faces.data import Split, load_celeba, make_up
from experiments.faces.methods import METHODS, PAPER, SINGLE
from experiments.faces.report import claims, report
from experiments.faces.timing import JACOBIAN, measure
from experiments.faces.train import Options, train
from experiments.study import Job, Part, Record, Results, Say, Study, config_of

DEFAULT = (*PAPER, "upgrad", "aligned_mtl", SINGLE)  # forty networks come last
SMOKE = (SINGLE, "ldc_mtl", "upgrad")  # by losses and by rows
SMALL: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "width": 2,
    "num_tasks": 3,
    "made_up": 96,
    "size": 16,
}
CHUNK = 8  # on an accelerator: at 256 images the first layer's cotangents of 40 tasks are 10 GB


def options_of(args: argparse.Namespace) -> Options:
    """Returns the options of the command line."""
    names = ("width", "batch_size", "epochs", "learning_rate", "penalty", "order", "max_steps")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given["chunk_size"] = args.chunk_size
    if args.chunk_size is None and jax.default_backend() != "cpu":
        given["chunk_size"] = CHUNK
    if args.no_schedule:
        given["decay_epochs"] = None
    if args.timing:
        cpu = jax.default_backend() == "cpu"
        given = {"batch_size": 16 if cpu else 256} | given
    return Options(**((SMALL if args.smoke else {}) | given))


def part_name(options: Options) -> str:
    """Returns the name of the results file of a training."""
    changes = {
        "rate": options.learning_rate if options.learning_rate != 1e-3 else None,
        "lambda": options.penalty if options.penalty != 0.01 else None,
        "order": options.order,
    }
    name = "made_up" if options.made_up else "celeba"
    name += "".join(f"_{key}_{value:g}" for key, value in changes.items() if value is not None)
    return name + ("_constant" if options.decay_epochs is None else "")


def training_part(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the runs on the faces."""
    options, finished = options_of(args), []
    name = part_name(options)

    @cache
    def split() -> Split:
        if options.made_up:
            return Split(*(make_up(options.made_up, options.size, seed) for seed in range(3)))
        return load_celeba(args.data_dir)

    def run(method: str, seed: int, task: int | None, say: Say) -> list[Record]:
        label = f"{name}-{method}-{seed}" + ("" if task is None else f"-{task}")
        checkpoint = Checkpoint(args.out / "faces" / "checkpoints" / f"{label}.npz", options)
        if not args.resume:
            checkpoint.remove()
        record = train(options, method, seed, split(), checkpoint, say, task)
        # The record is written before the checkpoint goes.
        finished.append(checkpoint)
        return [record]

    def jobs(results: Results) -> Iterator[Job]:
        done = {(r["method"], r["seed"], r["task"]) for r in results.records}
        for seed in range(args.seeds or 1):
            for method in args.methods or (SMOKE if args.smoke else DEFAULT):
                for task in range(options.num_tasks) if method == SINGLE else (None,):
                    if (method, seed, task) not in done:
                        label = f"{method} seed {seed}" + ("" if task is None else f" {task + 1}")
                        yield Job(label, partial(run, method, seed, task), options.epochs)

    yield Part(name, jobs, [config_of(options)])
    for checkpoint in finished:
        checkpoint.remove()


def timing_part(args: argparse.Namespace) -> Part:
    """Returns the times of a step."""
    options = options_of(args)
    methods = [name for name in args.methods or METHODS if name != SINGLE]
    if any(METHODS[name].route == "rows" for name in methods):
        methods.insert(0, JACOBIAN)  # which the methods by rows share

    def jobs(results: Results) -> Iterator[Job]:
        sizes = options.width, options.batch_size
        done = {r["method"] for r in results.records if (r["width"], r["batch_size"]) == sizes}
        for method in methods:
            if method not in done:
                yield Job(method, partial(measure, options, method, args.repeats))

    return Part("time", jobs)


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the part that the command line asks for."""
    if args.timing:
        yield timing_part(args)
    else:
        yield from training_part(args)


study = Study(
    name="faces",
    commands=("--timing --repeats 2 --out experiments/results",),
    methods=(SINGLE, *METHODS),
    figures=("time.png",),
    plan=plan,
    report=lambda folder, args: report(
        folder, None if args.timing else part_name(options_of(args))
    ),
    claims=claims,
    options={
        "--data-dir": {"help": "CelebA's tree, or TFDS's folder; without it TFDS downloads"},
        "--timing": {"action": "store_true", "help": "time a step of each method; no data needed"},
        "--width": {"type": int, "help": "channels of the first layer; by default 64"},
        "--batch-size": {"type": int, "help": "by default 256; for --timing on a CPU 16"},
        "--epochs": {"type": int, "help": "by default 15"},
        "--learning-rate": {"type": float, "help": "by default 0.001"},
        "--no-schedule": {"action": "store_true", "help": "the rate stays as it is"},
        "--penalty": {"type": float, "help": "lambda of LDC-MTL, by default 0.01"},
        "--order": {"type": int, "metavar": "SEED", "help": "tasks in another order"},
        "--chunk-size": {
            "type": int,
            "help": "gradients at a time in one program; by default 8, on a CPU each by itself",
        },
        "--repeats": {"type": int, "default": 5, "help": "of each time"},
        "--max-steps": {"type": int, "help": "per epoch, for trials"},
    },
)

if __name__ == "__main__":
    study.main()
