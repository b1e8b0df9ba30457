"""The presets of instance-wise training, the trainer behind its search, and the command line."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.iwrm.methods import METHODS
from experiments.iwrm.report import FIGURES, TABLE7, claims, report
from experiments.iwrm.search import ADAM_START, DIVERGED, STARTS, climb, search_fully
from experiments.iwrm.timing import time_network
from experiments.iwrm.train import Options, make_train, programs, subset
from experiments.study import Job, Part, Preset, Record, Results, Say, Study

ALL, FEW = tuple(METHODS), ("mean", "upgrad", "upgrad_ridge_largest", "upgrad_ridge")


# Table 6 and appendix D. A batch of 32 is that of the data set's own part.
PAPER = {
    "mnist": Preset((Options("mnist", 8),), ALL, 8),
    "fashion_mnist": Preset((Options("fashion_mnist", 25),), ALL, 8),
    "cifar10": Preset((Options("cifar10", 20),), ALL, 8),
    "kmnist": Preset((Options("kmnist", 10),), ALL, 8),
    "eurosat": Preset((Options("eurosat/rgb", 30),), ALL, 8),
    "svhn": Preset((Options("svhn_cropped", 25),), ALL, 8),
    "batch_size": Preset(tuple(Options("cifar10", 20, b) for b in (4, 64, 16)), FEW, 8),
    "adam": Preset((Options("cifar10", 15, optimizer="adam"),), ALL, 8),
    "adam_svhn": Preset((Options("svhn_cropped", 20, optimizer="adam"),), ALL, 8),
}
# What takes one CPU core four hours.
REDUCED = {
    "mnist": PAPER["mnist"],
    "fashion_mnist": PAPER["fashion_mnist"]._replace(seeds=2),
    "cifar10": PAPER["cifar10"]._replace(seeds=3),
    "batch_size": PAPER["batch_size"]._replace(methods=("mean", "upgrad_ridge"), seeds=2),
    "adam": PAPER["adam"]._replace(methods=("mean", "upgrad", "upgrad_ridge"), seeds=2),
}
SMOKE = {"mnist": Preset((Options("digits", 2, 16, examples=32),), ("mean", "upgrad"), 2)}


def rounded(values: np.ndarray) -> Any:
    """Returns numbers of four digits for a results file, None where they are not finite."""
    numbers = [float(f"{v:.4g}") if np.isfinite(v) else None for v in np.ravel(values)]
    return numbers if values.ndim else numbers[0]


def recorded(rate: float) -> float:
    """Returns a learning rate as a results file holds it."""
    return float(f"{rate:.6g}")


def key_of(seed: int, rate: float) -> tuple[int, str]:
    """Returns what a training is known by, whether its rate is recorded already or not."""
    return seed, f"{recorded(rate):.5g}"


class Trainer(NamedTuple):
    """Trains a method where a results file does not hold it yet, and appends it."""

    results: Results
    args: argparse.Namespace
    options: Options
    names: tuple[str, ...]  # of the methods in the same compiled program
    method: str
    say: Say

    def areas(self, runs: dict[int, float]) -> list[float]:
        """Returns the areas under the curve for seeds and their rates, inf if not finite."""
        label = {"setting": asdict(self.options), "aggregator": self.method}

        def known() -> dict[tuple[int, str], float]:
            return {
                key_of(r["seed"], r["learning_rate"]): np.inf if r["area"] is None else r["area"]
                for r in self.results.records
                if label.items() <= r.items()
            }

        wanted, held = {key_of(s, r): (s, r) for s, r in runs.items()}, known()
        missing = [run for key, run in wanted.items() if key not in held]
        together = self.args.together or (1 if jax.default_backend() == "cpu" else len(runs))
        for start in range(0, len(missing), together):
            records = self.train(*zip(*missing[start : start + together], strict=True))
            self.results.add(label | record for record in records)
            for r in records:
                name = f"{self.results.path.stem} batch {self.options.batch_size} {self.method}"
                run = f"seed {r['seed']} rate {r['learning_rate']:.3g}"
                self.say(f"{name} {run}: area {r['area']}, {r['seconds']} s", 0)
        held = known()
        return [held[key] for key in wanted]

    def train(self, seeds: Sequence[int], rates: Sequence[float]) -> list[Record]:
        """Trains several seeds, each at its rate, in one call."""
        data = [subset(self.options, self.args.data_dir, seed) for seed in seeds]
        images, labels = (jnp.asarray(np.stack(a)) for a in zip(*data, strict=True))
        start = time.perf_counter()
        curves = make_train(self.options, images.shape[2:], self.names)(
            self.names.index(self.method),
            jnp.asarray(rates, jnp.float32),
            jax.vmap(jax.random.key)(jnp.asarray(seeds)),
            images,
            labels,
        )
        curves = jax.device_get(curves)
        seconds = round((time.perf_counter() - start) / len(seeds), 1)
        return [
            {"seed": seed, "learning_rate": recorded(rate), "seconds": seconds}
            | {name: rounded(values[i]) for name, values in curves.items()}
            for i, (seed, rate) in enumerate(zip(seeds, rates, strict=True))
        ]


def part_of(name: str, preset: Preset, args: argparse.Namespace) -> Part:
    """Returns the searches of every method under all options of a preset."""
    seeds = range(1, (args.seeds or preset.seeds) + 1)

    def search(trainer: Trainer) -> None:
        search_fully(lambda rates: trainer.areas(dict(zip(seeds, rates, strict=True))), len(seeds))

    def walk(trainer: Trainer, seed: int, rates: dict[str, float]) -> None:
        def area(rate: float) -> float:
            (found,) = trainer.areas({seed: rate})
            return found if found < DIVERGED else np.inf

        # From where the seed before ended.
        rates[trainer.method] = climb(area, rates[trainer.method])

    def jobs(results: Results) -> Iterator[Job]:
        for options in preset.options:
            for names in programs(args.methods or preset.methods):
                rates = {n: ADAM_START if options.optimizer == "adam" else STARTS[n] for n in names}
                # Seed by seed, so that an interrupted run has as many of each method.
                for seed in seeds[:1] if args.full_search else seeds:
                    find = search if args.full_search else partial(walk, seed=seed, rates=rates)
                    for method in names:
                        trainer = partial(Trainer, results, args, options, names, method)
                        yield Job(f"{name} {method:<12}", partial(run, find, trainer))

    return Part(name, jobs)


def run(find: Callable[[Trainer], None], trainer: Callable[[Say], Trainer], say: Say) -> tuple[()]:
    """Finds rates with a trainer, which appends its records itself."""
    find(trainer(say))
    return ()


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the parts that the command line asks for; the last is the timing of table 7."""
    presets = SMOKE if args.smoke else PAPER if args.paper else REDUCED
    for name in presets if args.smoke else args.parts or [*REDUCED, "time"]:
        preset = presets.get(name) or PAPER.get(name)
        yield part_of(name, preset, args) if preset else time_part()


def time_part() -> Part:
    """Returns the timing of every method on all networks."""

    def jobs(results: Results) -> Iterator[Job]:
        for network in TABLE7:
            if network not in {record["network"] for record in results.records}:
                yield Job(f"time {network}", partial(time_network, network))

    return Part("time", jobs)


study = Study(
    name="iwrm",
    commands=("--data-dir DIR --out experiments/results",),
    methods=tuple(METHODS),
    figures=FIGURES,
    plan=plan,
    report=report,
    claims=claims,
    options={
        "--data-dir": {"help": "TFDS folder; by default TFDS's own, with download"},
        "--parts": {"nargs": "+", "choices": [*PAPER, "time"]},
        "--paper": {"action": "store_true", "help": "8 seeds of every method in every part"},
        "--full-search": {"action": "store_true", "help": "72 learning rates for every seed"},
        "--together": {
            "type": int,
            "help": "seeds in a call of the full search; by default 1 on CPU, else all",
        },
    },
)

if __name__ == "__main__":
    study.main()
