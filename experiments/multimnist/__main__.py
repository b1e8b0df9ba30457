"""The presets of MultiMNIST and their command line."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.multimnist.report import PAIRS, claims, report
from experiments.multimnist.train import (
    METHODS,
    Metrics,
    Options,
    load_pairs,
    make_epoch,
    make_evaluate,
    make_init,
    make_order,
)
from experiments.study import Job, Part, Preset, Record, Results, Say, Study, config_of

_SIX = tuple(name for pair in PAIRS.items() for name in pair)
# The canvas, the network and the number of pairs of Sener and Koltun. Zhou et al. give no
# batch size for table 1; 32 keeps enough gradient noise for their point.
_MNIST = Options("mnist", 36, 1, batch_size=32, epochs=1, learning_rate=0.2, head_width=50)
# 8 x 8 digits overlap by 4 x 4 pixels. 1,437 training digits are few: four partners each.
_DIGITS = Options("digits", 12, 4, batch_size=32, epochs=10, learning_rate=0.2, head_width=32)
# As many examples for every batch size; on two CPU cores a run of three seeds takes minutes.
_EXAMPLES = 10_000
PRESETS = {
    "digits": Preset((_DIGITS,), tuple(METHODS), seeds=5),
    "mnist": Preset((_MNIST,), ("linear_scalarization", *_SIX, "upgrad"), seeds=3),
    "mnist_batches": Preset(
        tuple(
            replace(_MNIST, batch_size=b, learning_rate=0.1, max_steps=_EXAMPLES // b)
            for b in (8, 4, 2)
        ),
        _SIX,
        seeds=3,
    ),
}


def train(
    options: Options,
    method: str,
    seeds: Sequence[int],
    data_dir: str | None,
    say: Say,
) -> list[Record]:
    """Trains all seeds at once and returns a record of each."""
    data = load_pairs(options, data_dir)
    start = time.perf_counter()
    init_state, epoch = make_epoch(options, method)
    evaluate, order = make_evaluate(options), make_order(options, len(data[0].left))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    params = make_init(options)(keys)
    carry = params, init_state(params)
    history: list[Metrics] = []
    for number in range(1, options.epochs + 1):
        carry, metrics = epoch(carry, order(keys, number), data[0])
        history.append(jax.device_get(metrics | evaluate(carry[0], data[1])))
        left, right = 100 * history[-1]["test_accuracy"].mean(axis=0)
        say(
            f"{method}, batch {options.batch_size}, epoch {number}/{options.epochs}: "
            f"test accuracy {left:.2f} % left, {right:.2f} % right"
        )
    shared = {
        "method": method,
        "config": config_of(options),
        "seconds_per_seed": round((time.perf_counter() - start) / len(seeds), 2),
    }
    return [
        shared | {"seed": seed, "history": history_of(history, i)} for i, seed in enumerate(seeds)
    ]


def history_of(history: Sequence[Metrics], i: int) -> Record:
    """Returns the metrics of the i-th seed as lists with one entry per epoch."""
    return {
        name: np.round(np.array([epoch[name][i] for epoch in history], np.float64), 5).tolist()
        for name in history[0]
    }


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the part of a data set, with what the command line changes of its preset."""
    preset = PRESETS[args.dataset]
    if args.batch_size and len(preset.options) > 1:
        raise SystemExit(
            f"expected no --batch-size, which {args.dataset} varies, got {args.batch_size}; "
            "drop it or take another --dataset"
        )
    fields = ("epochs", "max_steps", "batch_size", "learning_rate", "validation")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.smoke:
        given |= {"epochs": 1, "max_steps": 3}
    variants = [replace(options, **given) for options in preset.options]
    seeds = range(2 if args.smoke else args.seeds or preset.seeds)

    def jobs(results: Results) -> Iterator[Job]:
        done = [(r["config"], r["method"], r["seed"]) for r in results.records]
        for options in variants:
            for method in args.methods or preset.methods:
                missing = [s for s in seeds if (config_of(options), method, s) not in done]
                if missing:
                    label = f"{method:<20} batch {options.batch_size}"
                    run = partial(train, options, method, missing, args.data_dir)
                    yield Job(label, run, options.epochs)

    yield Part(args.dataset, jobs, [config_of(options) for options in variants])


study = Study(
    name="multimnist",
    commands=(
        "--out experiments/results",
        "--out experiments/results --dataset mnist",
        "--out experiments/results --dataset mnist_batches",
    ),
    methods=tuple(METHODS),
    figures=tuple(f"{name}.png" for name in PRESETS),
    plan=plan,
    report=report,
    claims=claims,
    options={
        "--dataset": {
            "choices": PRESETS,
            "default": "digits",
            "help": "mnist_batches: MNIST by batch size",
        },
        "--data-dir": {"help": "TFDS folder of MNIST; by default TFDS's own, with download"},
        "--epochs": {"type": int},
        "--max-steps": {"type": int, "help": "per epoch, for trials"},
        "--batch-size": {"type": int},
        "--learning-rate": {"type": float},
        "--validation": {
            "action": "store_true",
            "default": None,
            "help": "test on held-out training digits",
        },
    },
)

if __name__ == "__main__":
    study.main()
