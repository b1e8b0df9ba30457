"""The command line of the scenes."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np

from experiments.checkpoints import Checkpoint
from experiments.scenes.benchmarks import BENCHMARKS
from experiments.scenes.data import Arrays, Source, load_folder, load_tree, make_up
from experiments.scenes.methods import METHODS, SINGLE
from experiments.scenes.networks import NETWORKS
from experiments.scenes.published import RATE, RATES, RECIPES
from experiments.scenes.report import claims, part_name, report
from experiments.scenes.train import Options, Variant, train
from experiments.study import Job, Part, Record, Results, Say, Study, config_of
from experiments.weights import read_weights

# In the order in which a run that is cut short is of most use.
DEFAULT = (
    *("linear_scalarization", SINGLE, "upgrad", "aligned_mtl", "ldc_mtl", "famo", "cagrad"),
    *("nash_mtl", "uncertainty_weighting", "mgda"),
)
# By losses and by rows; every route compiles for seconds.
SMOKE = (SINGLE, "linear_scalarization", "aligned_mtl")
# The methods that an option changes.
VARIED = {"penalty": ("ldc_mtl_router", "ldc_mtl"), "task_weights": ("linear_scalarization",)}


def size_of(text: str) -> tuple[int, int]:
    """Returns height and width of a text such as 96x128."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"expected height x width such as 96x128, got {text}")
    height, width = map(int, text.split("x"))
    return height, width


def options_of(args: argparse.Namespace) -> Options:
    """Returns the options of the command line."""
    if args.network not in BENCHMARKS[args.dataset].networks:
        raise SystemExit(
            f"expected a network of {BENCHMARKS[args.dataset].networks} for {args.dataset}, got "
            f"{args.network}; its targets have another size"
        )
    recipe = RECIPES[args.dataset]
    given: dict[str, Any] = {
        "size": args.size or recipe.size,
        "batch_size": args.batch_size or recipe.batch_size,
        "epochs": args.epochs or recipe.epochs,
        "width": args.width or 64,
        "levels": args.levels or 5,
        "pretrained": args.weights is not None,
    }
    if args.smoke:
        given |= {"epochs": 2, "batch_size": 2, "size": (32, 32), "width": 2, "levels": 1}
    if given["pretrained"] and args.network != "pspnet":
        raise SystemExit(
            f"expected --weights, those of a ResNet-50, with --network pspnet, got {args.network}; "
            "leave them out"
        )
    height, width = given["size"]
    factor = 8 if args.network == "pspnet" else 2 ** given["levels"]
    if height % factor or width % factor:
        raise SystemExit(
            f"expected height and width divisible by {factor}, got {height} x {width}; pass "
            "another --size"
        )
    varied = varied_of(args)
    make = partial(Variant, **varied) if varied else Options
    return make(
        dataset=args.dataset,
        network=args.network,
        learning_rate=args.learning_rate or RATE,
        average=min(10, max(given["epochs"] // 5, 1)),
        max_steps=args.max_steps,
        scenes=8 if args.smoke else None,
        **given,
    )


def varied_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the hyperparameters of the command line, which make files of their own."""
    given = {name: getattr(args, name) for name in VARIED if getattr(args, name) is not None}
    for name, methods in VARIED.items():
        flag = f"--{name.replace('_', '-')}"
        if name in given and not set(args.methods or ("all",)) <= set(methods):
            raise SystemExit(
                f"expected {flag} with --methods of {', '.join(methods)}, which alone have it, got "
                f"{', '.join(args.methods or ('no --methods',))}; name them"
            )
    if given.get("penalty", 1) <= 0:
        raise SystemExit(f"expected a positive --penalty, got {given['penalty']}; correct it")
    if (weights := given.get("task_weights")) is not None:
        tasks = BENCHMARKS[args.dataset].tasks
        if len(weights) != len(tasks) or min(weights) < 0 or max(weights) == 0:
            raise SystemExit(
                f"expected --task-weights of {len(tasks)} numbers for {', '.join(tasks)}, none "
                f"negative and not all 0, got {' '.join(map(str, weights))}; correct them"
            )
        given["task_weights"] = tuple(weights)
    return given


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the part of a data set and a network."""
    options = options_of(args)
    benchmark = BENCHMARKS[options.dataset]
    name = part_name(args.dataset, args.network, args.penalty, args.task_weights)

    def options_with(method: str) -> Options:
        """Returns the options of a method, whose authors may have a rate of their own."""
        rate = args.learning_rate or RATES.get((options.dataset, method), RATE)
        return replace(options, learning_rate=rate)

    @cache
    def sources() -> tuple[Source, Source]:
        if options.scenes:
            made: list[Arrays] = [
                make_up(benchmark, options.scenes, options.size, seed) for seed in (0, 1)
            ]
            return made[0], made[1]
        loader = load_tree if options.dataset == "cityscapes3" else load_folder
        load = partial(loader, benchmark, args.data_dir, size=options.size)
        return load(split="train"), load(split="val")

    @cache
    def weights() -> dict[str, np.ndarray] | None:
        return read_weights(args.weights) if args.weights else None

    def run(method: str, seed: int, tasks: tuple[str, ...], say: Say) -> list[Record]:
        label, own = f"{method}-{'-'.join(tasks)}-{seed}", options_with(method)
        checkpoint = Checkpoint(args.out / "scenes" / "checkpoints" / f"{name}-{label}.npz", own)
        if not args.resume:
            checkpoint.remove()
        record = train(own, method, seed, tasks, sources(), checkpoint, say, weights())
        # The record is written before the checkpoint goes: see ``finish``.
        finished.append(checkpoint)
        return [record]

    finished: list[Checkpoint] = []

    def jobs(results: Results) -> Iterator[Job]:
        done = [(r["method"], r["seed"], tuple(r["tasks"])) for r in results.records]
        for seed in args.seeds_only or range(args.seeds or 1):
            for method in args.methods or (SMOKE if args.smoke else DEFAULT):
                groups = [(t,) for t in benchmark.tasks] if method == SINGLE else [benchmark.tasks]
                for tasks in groups:
                    if (method, seed, tasks) not in done:
                        label = f"{method} seed {seed}"
                        yield Job(label, partial(run, method, seed, tasks), options.epochs)

    yield Part(name, jobs, [config_of(options_with(method)) for method in (SINGLE, *METHODS)])
    for checkpoint in finished:
        checkpoint.remove()


study = Study(
    name="scenes",
    commands=(
        "--out experiments/results --data-dir DIR --size 96x128 --width 8 --batch-size 8 "
        "--epochs 10 --learning-rate 1e-3 --seeds 2",
    ),
    methods=(SINGLE, *METHODS),
    figures=("nyuv2_mtan_delta_m.png", "nyuv2_mtan_gradients.png"),
    plan=plan,
    report=report,
    claims=claims,
    options={
        "--dataset": {"choices": BENCHMARKS, "default": "nyuv2"},
        "--network": {"choices": NETWORKS, "default": "mtan"},
        "--data-dir": {"help": "folder of the data set"},
        "--size": {"type": size_of, "metavar": "HxW", "help": "by default the papers'"},
        "--width": {"type": int, "help": "channels of the first level; by default 64"},
        "--levels": {
            "type": int,
            "choices": range(1, 6),
            "help": "of the network, by default all 5",
        },
        "--weights": {"help": "torchvision's resnet50 as .safetensors or .pth, for pspnet"},
        "--batch-size": {"type": int, "help": "by default the papers'"},
        "--epochs": {"type": int, "help": "by default the papers', 200 or 100"},
        "--learning-rate": {
            "type": float,
            "help": "of all methods; by default the papers' of each",
        },
        "--penalty": {"type": float, "help": "lambda of LDC-MTL, in a results file of its own"},
        "--task-weights": {
            "type": float,
            "nargs": "+",
            "help": "of linear_scalarization, in a results file of its own",
        },
        "--max-steps": {"type": int, "help": "per epoch, for trials"},
        "--seeds-only": {"type": int, "nargs": "+", "help": "these, one process each"},
    },
)

if __name__ == "__main__":
    study.main()
