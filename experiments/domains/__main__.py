"""The command line of the domains."""

import argparse
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.checkpoints import Checkpoint
from experiments.domains.data import BENCHMARKS, Split, load, make_up
from experiments.domains.methods import METHODS
from experiments.domains.networks import DEPTHS
from experiments.domains.report import claims, report
from experiments.domains.train import Options, train
from experiments.study import Job, Part, Record, Results, Say, Study, config_of
from experiments.weights import Arrays, read_weights

# One of each route: losses alone, their Gramian, rows. Every one compiles for seconds.
SMOKE = ("linear_scalarization", "aligned_mtl", "moco")
SEEDS = 3  # the paper's
SMALL: dict[str, Any] = {"size": 32, "width": 4, "depth": 10, "batch_size": 8, "epochs": 2}
MADE_UP = 4  # classes


def options_of(args: argparse.Namespace) -> Options:
    """Returns the options of the command line."""
    fields = ("size", "width", "depth", "batch_size", "epochs", "max_steps")
    given = {name: value for name in fields if (value := getattr(args, name)) is not None}
    if any(value < 1 for value in given.values()):
        raise SystemExit(f"expected positive numbers, got {given}; correct them")
    if args.smoke:
        given = SMALL | {"made_up": MADE_UP, "learning_rate": 1e-3} | given
    options = Options(
        **{
            "dataset": args.dataset,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "pretrained": args.weights is not None,
        }
        | given
    )
    if options.pretrained and (options.width, options.depth) != (64, 18):
        raise SystemExit(
            f"expected --weights, those of a ResNet-18, with --width 64 and --depth 18, got width "
            f"{options.width} and depth {options.depth}; leave them out"
        )
    if options.size < 32:
        raise SystemExit(
            f"expected images of at least 32 x 32, a pixel after the last stage, got "
            f"{options.size}; pass a larger --size"
        )
    if options.batch_size < 2:
        raise SystemExit(
            "expected at least 2 images a batch, of one alone BatchNorm makes zeros; pass a larger "
            "--batch-size"
        )
    return options


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the part of a data set."""
    options = options_of(args)
    benchmark, name = BENCHMARKS[options.dataset], options.dataset
    finished: list[Checkpoint] = []

    with TemporaryDirectory() as made:

        @cache
        def splits() -> dict[str, Split]:
            memory = int(args.memory * 2**30)
            if options.made_up is None:
                return load(benchmark, args.data_dir, args.lists, options.size, memory)
            make_up(benchmark, Path(made), options.made_up)
            return load(benchmark, made, None, options.size, memory)

        @cache
        def weights() -> Arrays | None:
            return read_weights(args.weights) if args.weights else None

        def run(method: str, seed: int, say: Say) -> list[Record]:
            folder = args.out / "domains" / "checkpoints"
            checkpoint = Checkpoint(folder / f"{name}-{method}-{seed}.npz", options)
            if not args.resume:
                checkpoint.remove()
            record = train(options, method, seed, splits(), checkpoint, say, weights())
            # The record is written before the checkpoint goes: see below.
            finished.append(checkpoint)
            return [record]

        def jobs(results: Results) -> Iterator[Job]:
            done = {(r["method"], r["seed"]) for r in results.records}
            seeds = args.seeds or (1 if args.smoke else SEEDS)
            for seed in args.seeds_only or range(seeds):
                for method in args.methods or (SMOKE if args.smoke else METHODS):
                    if (method, seed) not in done:
                        label = f"{method} seed {seed}"
                        yield Job(label, partial(run, method, seed), options.epochs)

        yield Part(name, jobs, [config_of(options)])
        for checkpoint in finished:
            checkpoint.remove()


_FILES = "--data-dir DIR --weights resnet18.pth"
study = Study(
    name="domains",
    commands=(
        f"{_FILES} --out experiments/results",
        f"{_FILES} --dataset office_home --out experiments/results",
    ),
    methods=tuple(METHODS),
    figures=tuple(f"{name}.png" for name in BENCHMARKS),
    plan=plan,
    report=report,
    claims=claims,
    options={
        "--dataset": {"choices": BENCHMARKS, "default": "office31"},
        "--data-dir": {"help": "folder from which the paths of the lists lead to the images"},
        "--lists": {
            "help": "folder with LibMTL's office-31 and office-home; data_txt in the former"
        },
        "--weights": {"help": "torchvision's resnet18 as .safetensors or .pth"},
        "--size": {"type": int, "help": "height and width of the images, by default 224"},
        "--width": {"type": int, "help": "channels of the first layer, by default 64"},
        "--depth": {"type": int, "choices": DEPTHS, "help": "of the ResNet, by default 18"},
        "--batch-size": {"type": int, "help": "of each domain, by default 64"},
        "--epochs": {"type": int, "help": "by default 100"},
        "--learning-rate": {"type": float, "default": 1e-4},
        "--weight-decay": {"type": float, "default": 1e-5, "help": "as LibMTL's"},
        "--max-steps": {"type": int, "help": "per epoch, for trials"},
        "--memory": {"type": float, "default": 4.0, "help": "GiB of decoded images to keep"},
        "--seeds-only": {"type": int, "nargs": "+", "help": "these, one process each"},
    },
)

if __name__ == "__main__":
    study.main()
