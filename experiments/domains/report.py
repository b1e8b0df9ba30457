"""Tables, figures and verdicts of the domains, from their results files alone."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxmtl
from experiments.claims import (
    Claim,
    above_error,
    changed,
    claim,
    mean_and_error,
    not_runnable,
    show,
)
from experiments.domains.data import BENCHMARKS, Benchmark
from experiments.domains.methods import BASELINE, METHODS
from experiments.domains.published import TABLES
from experiments.domains.train import Options
from experiments.study import Record, Report, Table, config_of, read_records


class Found(NamedTuple):
    """What the records of a data set say."""

    dataset: str
    methods: dict[str, list[Record]]  # by method, seed by seed

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark."""
        return BENCHMARKS[self.dataset]

    @property
    def config(self) -> Record:
        """Options of the records."""
        config: Record = next(iter(self.methods.values()))[0]["config"]
        return config

    def accuracies(self, method: str) -> np.ndarray:
        """Returns the test accuracies (seeds, m) in percent."""
        return np.array([record["test_accuracy"] for record in self.methods[method]])

    def drops(self, method: str) -> list[float]:
        """Returns delta_m (seeds,) in percent against equal weights; empty without these."""
        if BASELINE not in self.methods:
            return []
        base = self.accuracies(BASELINE).mean(axis=0)
        return [drop(row, base) for row in self.accuracies(method)]

    def gains(self, better: str, worse: str) -> list[float]:
        """Returns by how much delta_m is lower, seed by seed."""
        pairs = zip(self.drops(better), self.drops(worse), strict=False)
        return [b - a for a, b in pairs]


# From LibMTL, by which the paper's table was made.
DIFFERS = (
    "GradDrop on gradients of parameters, not of features; PCGrad draws an order for each task; "
    "MGDA is exact; running variances without Bessel's correction"
)


def drop(row: np.ndarray, base: np.ndarray) -> float:
    """Returns delta_m in percent of accuracies (m,)."""
    return float(
        jaxmtl.metrics.delta_m(
            jnp.asarray(row),
            baselines=jnp.asarray(base),
            higher_is_better=jnp.ones(len(base), bool),
        )
    )


def read_found(folder: Path, dataset: str) -> Found | None:
    """Returns the records of a data set, None if there are none."""
    methods: dict[str, list[Record]] = {}
    records = read_records(folder / f"{dataset}.jsonl")
    for record in sorted(records, key=lambda record: record["seed"]):
        methods.setdefault(record["method"], []).append(record)
    if not methods:
        return None
    return Found(dataset, {name: methods[name] for name in METHODS if name in methods})


def differs(config: Record) -> str:
    """Returns what differs from the paper's options, "" if nothing does."""
    theirs = config_of(Options(config["dataset"], pretrained=True))
    odd = [name for name in theirs if config[name] != theirs[name]]
    words = []
    for name in odd:
        if name == "pretrained":
            words.append("without ImageNet's weights")
        elif name == "made_up":
            words.append("made-up images")
        elif theirs[name] is None:
            words.append(f"{name.replace('_', ' ')} {config[name]}")
        else:
            words.append(f"{name.replace('_', ' ')} {config[name]} in place of {theirs[name]}")
    return ", ".join(words)


# --- verdicts -------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """What the paper's table says of a method, as an order of delta_m."""

    text: str
    pairs: tuple[tuple[str, str], ...]  # (lower, higher)
    paper: str


def statements(dataset: str) -> list[Statement]:
    """Returns what the paper's table of a data set says."""
    theirs = TABLES[dataset].delta_m
    rivals = tuple(name for name in (BASELINE, *theirs) if name != "moco")
    return [
        Statement(
            "MoCo has a lower delta_m than equal weights",
            (("moco", BASELINE),),
            f"{theirs['moco']:+.2f} %",
        ),
        Statement(
            "MGDA has a higher delta_m than equal weights",
            ((BASELINE, "mgda"),),
            f"{theirs['mgda']:+.2f} %",
        ),
        Statement(
            "MoCo has the lowest delta_m of the paper's methods",
            tuple(("moco", rival) for rival in rivals),
            "rank 1 of 6",
        ),
    ]


def claims(folder: Path) -> list[Claim]:
    """Returns what tables 7 and 8 claim beside what the records say.

    An order of two methods holds if the difference of their delta_m, seed by seed, exceeds its
    standard error; with one seed none does. Where there is no record of the methods, a row says
    what would make one.
    """
    made = []
    for dataset, table in TABLES.items():
        found = read_found(folder, dataset)
        if found is not None and found.config["made_up"]:
            found = None  # shows nothing
        for statement in statements(dataset):
            text = f"{BENCHMARKS[dataset].title}: {statement.text}"
            named = {name for pair in statement.pairs for name in pair}
            if found is None or not named | {BASELINE} <= found.methods.keys():
                command = (
                    f"python -m experiments.domains --dataset {dataset} --data-dir DIR "
                    "--weights resnet18.pth"
                )
                lacks = "data, weights of ResNet-18, an accelerator"
                made.append(
                    not_runnable(text, table.source, command, statement.paper, lacks, DIFFERS)
                )
                continue
            gaps = {pair: found.gains(*pair) for pair in statement.pairs}
            held = [len(gap) > 1 and above_error(gap) for gap in gaps.values()]
            ours = ", ".join(
                f"`{low}` {show(gap, digits=2, sign='+')} points below `{high}`"
                for (low, high), gap in gaps.items()
            )
            seeds = {"seeds": min(len(found.methods[name]) for name in named)}
            odd = filter(None, (differs(found.config), changed(seeds, {"seeds": 3}), DIFFERS))
            made.append(claim(text, table.source, ours, held, statement.paper, "; ".join(odd)))
    return made


# --- tables ---------------------------------------------------------------------------------------


def title_of(found: Found) -> str:
    """Returns what a table or figure shows."""
    odd = differs(found.config)
    return f"{found.benchmark.title}{f', {odd}' * bool(odd)}"


def accuracy_table(found: Found) -> Table:
    """Returns the accuracies of all methods with the printed ones, and delta_m."""
    theirs = TABLES[found.dataset]
    header = ["method", *found.benchmark.domains, "delta_m %", "printed", "best epoch", "seeds"]
    rows = []
    for method, records in found.methods.items():
        printed = theirs.values.get(method, ())
        cells = [show(column.tolist(), digits=2) for column in found.accuracies(method).T]
        cells = [f"{cell} ({printed[i]:.2f})" if printed else cell for i, cell in enumerate(cells)]
        drops = found.drops(method)
        rows.append(
            [
                method,
                *cells,
                show(drops, digits=2, sign="+") if drops else "",
                f"{theirs.delta_m[method]:+.2f}" if method in theirs.delta_m else "",
                ", ".join(str(record["best_epoch"]) for record in records),
                str(len(records)),
            ]
        )
    return Table(f"Test accuracy %, (printed): {title_of(found)}", header, rows)


def published_table(dataset: str) -> Table:
    """Returns the paper's table."""
    benchmark, table = BENCHMARKS[dataset], TABLES[dataset]
    rows = [
        [
            method,
            *(f"{value:.2f}" for value in values),
            f"{table.delta_m[method]:+.2f}" if method in table.delta_m else "",
        ]
        for method, values in table.values.items()
    ]
    title = f"{benchmark.title} as published: test accuracy %, three runs ({table.source})"
    return Table(title, ["method", *benchmark.domains, "delta_m %"], rows)


# --- figures --------------------------------------------------------------------------------------


def draw(found: Found, path: Path) -> None:
    """Saves delta_m of every method beside the change of each domain's accuracy."""
    methods = [name for name in found.methods if name != BASELINE]
    base = found.accuracies(BASELINE).mean(axis=0)
    changes = np.stack([found.accuracies(name).mean(axis=0) - base for name in methods])
    figure = Figure(figsize=(11, 2.2 + 0.38 * len(methods)), layout="constrained")
    points, cells = figure.subplots(1, 2, width_ratios=(1.3, 1))
    y = np.arange(len(methods))
    mean, error = np.transpose([mean_and_error(found.drops(name)) for name in methods])
    points.errorbar(mean, y, xerr=np.nan_to_num(error), fmt="o", capsize=3, label="here")
    printed = [TABLES[found.dataset].delta_m.get(name, np.nan) for name in methods]
    points.plot(printed, y, "D", mfc="none", color="tab:orange", label="printed")
    points.axvline(0, color="gray", lw=0.8)
    points.set_yticks(y, methods)
    points.set_ylim(len(methods) - 0.5, -0.5)
    points.set_xlabel("delta_m (%) against equal weights; negative is better")
    points.grid(axis="x", alpha=0.3)
    points.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    limit = max(1.0, float(np.abs(changes).max()))
    image = cells.imshow(changes, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in np.ndenumerate(changes):
        color = "white" if abs(value) > 0.65 * limit else "black"
        cells.text(column, row, f"{value:+.1f}", ha="center", va="center", color=color, fontsize=8)
    names = [f"{name}\n{value:.1f} %" for name, value in zip(domains_of(found), base, strict=True)]
    cells.set_xticks(range(len(names)), names)
    cells.set_yticks([])
    cells.set_title("test accuracy against that of equal weights (below), points", fontsize=10)
    figure.colorbar(image, ax=cells, pad=0.02)
    seeds = max(len(records) for records in found.methods.values())
    title = f"{title_of(found)}; {seeds} seed{'s' if seeds > 1 else ''}"
    figure.suptitle(fill(title, 110), fontsize="medium")
    figure.savefig(path, dpi=120)


def domains_of(found: Found) -> Sequence[str]:
    """Returns the names of the domains."""
    return [name.replace("_", " ") for name in found.benchmark.domains]


def conclusion_of(found: Found) -> str:
    """Returns the sentence that the numbers allow."""
    where = title_of(found)
    if BASELINE not in found.methods:
        return f"{where}: no delta_m yet, equal weights are missing."
    rivals = [name for name in found.methods if name != BASELINE]
    gaps = {name: found.gains(name, BASELINE) for name in rivals}

    def told(sign: int) -> str:
        names = [
            name
            for name, gap in gaps.items()
            if len(gap) > 1 and above_error([sign * x for x in gap])
        ]
        return f"{len(names)} ({', '.join(names)})" if names else "none"

    accuracy = found.accuracies(BASELINE).mean()
    few = "; one seed decides nothing" * all(len(gap) < 2 for gap in gaps.values())
    return (
        f"{where}: equal weights tell {accuracy:.1f} % right on average over domains; of "
        f"{len(rivals)} methods {told(1)} are better by more than the error of delta_m, {told(-1)} "
        f"worse, the others undecided{few}."
    )


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns tables and figures of what the results files hold, and the paper's table."""
    found, tables, figures = read_found(folder, args.dataset), [], dict[str, Any]()
    sentence = f"{BENCHMARKS[args.dataset].title}: not run here; the table is the paper's."
    if found is not None:
        tables.append(accuracy_table(found))
        sentence = conclusion_of(found)
        if len(found.methods) > 1 and BASELINE in found.methods:
            figures[f"{args.dataset}.png"] = partial(draw, found)
    return Report([*tables, published_table(args.dataset)], figures, sentence)
