"""Tables, figures and verdicts of the scenes, from their results files alone."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

import jaxmtl
from experiments.claims import Claim, above_error, claim, mean_and_error, not_runnable, show
from experiments.scenes.benchmarks import BENCHMARKS, Benchmark
from experiments.scenes.methods import METHODS, SINGLE
from experiments.scenes.networks import NETWORKS
from experiments.scenes.published import TABLES
from experiments.study import Record, Report, Table, read_records

BASELINE = "linear_scalarization"
# Of the rows of a table: the balanced gradients.
QUANTITIES = {
    "condition": "condition number",
    "norm_ratio": "ratio of norms",
    "least_cosine": "least cosine",
    "least_similarity": "least magnitude similarity",
}


class Setup(NamedTuple):
    """The results of a data set and a network."""

    dataset: str
    network: str
    values: dict[str, np.ndarray]  # by method, (seeds, metrics)
    records: dict[str, list[Record]]  # by method, seed by seed, of all tasks together
    single: np.ndarray | None  # (metrics,) means of single tasks, None while one is missing

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark."""
        return BENCHMARKS[self.dataset]

    @property
    def config(self) -> Record:
        """Options of its records."""
        config: Record = next(iter(self.records.values()))[0]["config"]
        return config

    def drops(self, method: str, reduce: str) -> list[float]:
        """Returns delta_m in percent of each seed, over ``"metric"`` or ``"task"``."""
        if self.single is None:
            return []
        one = partial(
            jaxmtl.metrics.delta_m,
            baselines=jnp.asarray(self.single),
            higher_is_better=jnp.asarray([metric.higher for metric in self.benchmark.metrics]),
            tasks=jnp.asarray(self.benchmark.task_of_metric()) if reduce == "task" else None,
        )
        return [float(x) for x in jax.vmap(one)(jnp.asarray(self.values[method]))]


def setups(folder: Path) -> dict[str, Setup]:
    """Returns what the results files hold, by the name of the file."""
    found = {}
    for dataset, benchmark in BENCHMARKS.items():
        for network in NETWORKS:
            records = read_records(folder / f"{dataset}_{network}.jsonl")
            joint: dict[str, list[Record]] = {}
            singles: dict[int, np.ndarray] = {}
            for record in sorted(records, key=lambda record: record["seed"]):
                if record["method"] == SINGLE:
                    row = singles.setdefault(
                        record["seed"], np.full(len(benchmark.metrics), np.nan)
                    )
                    result = np.asarray(record["result"], float)
                    row[~np.isnan(result)] = result[~np.isnan(result)]
                else:
                    joint.setdefault(record["method"], []).append(record)
            if not joint:
                continue
            whole = [row for row in singles.values() if not np.isnan(row).any()]
            values = {
                name: np.asarray([r["result"] for r in joint[name]])
                for name in METHODS
                if name in joint
            }
            if whole:
                values = {SINGLE: np.stack(whole)} | values
            single = np.mean(whole, axis=0) if whole else None
            found[f"{dataset}_{network}"] = Setup(dataset, network, values, joint, single)
    return found


# --- tables -------------------------------------------------------------------------------------


def title_of(setup: Setup) -> str:
    """Returns what a table or figure shows."""
    config = setup.config
    height, width = config["size"]
    data = "made-up scenes" if config["scenes"] else setup.benchmark.title
    return (
        f"{data}, {setup.network} of width {config['width']}, {height} x {width}, "
        f"{config['epochs']} epochs, mean of the last {config['average']}"
    )


def printed_of(setup: Setup, method: str) -> tuple[list[float], list[float]]:
    """Returns what the papers print: the metrics and delta_m, or empty lists."""
    network, name = setup.network, method
    if network == "cross_stitch" and method == BASELINE:  # a row among MTAN's methods
        network, name = "mtan", "cross_stitch"
    for table in TABLES.get((setup.dataset, network), ()):
        if name in table.values:
            return table.values[name], table.delta_m[name]
    return [], []


def digits_of(values: np.ndarray) -> int:
    """Returns how many decimals show about four digits."""
    size = np.nanmax(np.abs(values), initial=0)
    return 2 if size >= 5 else 3 if size >= 0.5 else 4


def drops_table(setup: Setup) -> Table:
    """Returns delta_m of every method, beside the printed one."""
    header = ["method", "over metrics %", "printed", "over tasks %", "printed", "seeds"]
    rows = []
    for method in setup.records:
        _, theirs = printed_of(setup, method)
        cells = []
        for i, reduce in enumerate(("metric", "task")):
            drops = setup.drops(method, reduce)
            cells.append(show(drops, digits=1, sign="+") if drops else "")
            cells.append(f"{theirs[i]:+.2f}" if len(theirs) > i else "")
        rows.append([method, *cells, str(len(setup.values[method]))])
    return Table(f"delta_m: {title_of(setup)}", header, rows)


def task_table(setup: Setup, task: str) -> Table:
    """Returns the metrics of a task by every method, with the printed ones in parentheses."""
    columns = [i for i, metric in enumerate(setup.benchmark.metrics) if metric.task == task]
    header = ["method", *(setup.benchmark.metrics[i].name for i in columns)]
    rows = []
    for method, values in setup.values.items():
        theirs, _ = printed_of(setup, method)
        cells = []
        for i in columns:
            text = show(values[:, i].tolist(), digits=digits_of(values[:, i]))
            cells.append(f"{text} ({theirs[i]:g})" if theirs else text)
        rows.append([method, *cells])
    return Table(f"{task}, (printed): {title_of(setup)}", header, rows)


def over_training(record: Record, kind: str, name: str) -> list[float]:
    """Returns a quantity of the raw or the balanced gradients, epoch by epoch."""
    values = [log[kind][name] for log in record["history"] if kind in log]
    return [np.inf if value is None else value for value in values]


def gradient_table(setup: Setup) -> Table:
    """Returns quantities of the balanced gradients, means over training."""
    header = ["method", *QUANTITIES.values(), "condition number, raw", "least cosine, raw"]
    rows = []
    for method, records in setup.records.items():
        cells = []
        asked = [("balanced", name) for name in QUANTITIES]
        for kind, name in [*asked, ("raw", "condition"), ("raw", "least_cosine")]:
            each = [over_training(record, kind, name) for record in records]
            means = [float(np.mean(values)) for values in each if values]
            cells.append(show(means, digits=2) if means else "")
        rows.append([method, *cells])
    return Table(f"Gradients: {title_of(setup)}", header, rows)


# --- figures ------------------------------------------------------------------------------------


def draw_drops(setup: Setup, path: Path) -> None:
    """Saves delta_m of every method, beside the printed one."""
    methods = [name for name in setup.values if name != SINGLE]
    figure = Figure(figsize=(9, 1.8 + 0.42 * len(methods)), layout="constrained")
    axis = figure.subplots()
    y = np.arange(len(methods))
    looks = {"metric": ("tab:blue", "o", -0.12), "task": ("tab:orange", "s", 0.12)}
    for reduce, (color, marker, shift) in looks.items():
        points = [mean_and_error(setup.drops(name, reduce)) for name in methods]
        mean, error = np.transpose(points)
        axis.errorbar(
            mean,
            y + shift,
            xerr=np.nan_to_num(error),
            fmt=marker,
            color=color,
            capsize=3,
            label=f"here, over {reduce}s",
        )
    theirs = [next(iter(printed_of(setup, name)[1]), np.nan) for name in methods]
    axis.plot(theirs, y - 0.12, "o", mfc="none", color="tab:blue", label="printed, over metrics")
    axis.axvline(0, color="gray", lw=0.8)
    axis.set_yticks(y, methods)
    axis.invert_yaxis()
    axis.set_xlabel("delta_m (%) against single-task networks; negative is better")
    axis.grid(axis="x", alpha=0.3)
    figure.suptitle(title_of(setup), fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def draw_gradients(setup: Setup, path: Path) -> None:
    """Saves the quantities of the balanced gradients over training, Aligned-MTL's figures 4, 7."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    styles = ("-", "--", ":")
    for i, (method, records) in enumerate(setup.records.items()):
        color = f"C{i % 10}"
        for axis, (name, label) in zip(axes, QUANTITIES.items(), strict=True):
            curves = [over_training(record, "balanced", name) for record in records]
            curves = [curve for curve in curves if curve]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            axis.plot(
                np.arange(1, len(mean) + 1),
                mean,
                styles[i // 10 % 3],
                color=color,
                marker=".",
                label=method if axis is axes[0] else None,
            )
            axis.set_title(label, fontsize="medium")
            axis.grid(alpha=0.3)
            if name in ("condition", "norm_ratio"):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.yaxis.set_minor_locator(NullLocator())
    for axis in axes[2:]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"Balanced gradients: {title_of(setup)}", fontsize="medium")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


# --- claims -------------------------------------------------------------------------------------


class Orders(NamedTuple):
    """What became of the orders of pairs of methods in a printed table."""

    same: int
    opposite: int
    undecided: int  # within the error of the difference, seed by seed


def compare_orders(setup: Setup, theirs: dict[str, float]) -> Orders:
    """Compares the order of all pairs of methods by delta_m over metrics, the lower the better."""
    counts = {"same": 0, "opposite": 0, "undecided": 0}
    names = [name for name in setup.values if name in theirs and name != SINGLE]
    for a, b in combinations(names, 2):
        if theirs[a] == theirs[b]:
            continue
        x, y = (setup.drops(name, "metric") for name in (a, b))
        n = min(len(x), len(y))
        gaps = np.subtract(x[:n], y[:n]) * (1 if theirs[a] > theirs[b] else -1)
        if n > 1 and above_error(gaps.tolist()):
            counts["same"] += 1
        elif n > 1 and above_error((-gaps).tolist()):
            counts["opposite"] += 1
        else:
            counts["undecided"] += 1
    return Orders(**counts)


def gains(setup: Setup, better: str, worse: str) -> list[float]:
    """Returns by how much delta_m is lower, seed by seed."""
    x, y = (setup.drops(name, "metric") for name in (better, worse))
    return [b - a for a, b in zip(x, y, strict=False)]


def claims_of(setup: Setup) -> Iterator[Claim]:
    """Yields the claims that the results of a set-up can speak to."""
    where = f"{setup.benchmark.title}, {setup.network}"
    for table in TABLES.get((setup.dataset, setup.network), ()):
        theirs = {name: values[0] for name, values in table.delta_m.items() if values}
        orders = compare_orders(setup, theirs)
        if setup.single is None or not sum(orders):
            continue
        decided = orders.same + orders.opposite
        if decided:  # an order of which no pair is decided says nothing
            yield claim(
                f"{where}: methods stand in the printed order of delta_m",
                table.source,
                f"of {sum(orders)} pairs {orders.same} in this order, {orders.opposite} in the "
                f"opposite, {orders.undecided} undecided (within the error, or one seed)",
                [orders.same > 0, orders.same > orders.opposite, orders.undecided < decided],
            )
        for method in ("aligned_mtl", "famo", "ldc_mtl_router"):
            if method in theirs and {method, BASELINE} <= setup.values.keys():
                gap = gains(setup, method, BASELINE)
                yield claim(
                    f"{where}: {method} has a lower delta_m than equal weights",
                    table.source,
                    f"{show(gap, digits=1, sign='+')} points of {len(gap)} seeds",
                    [bool(np.mean(gap) > 0), len(gap) > 1 and above_error(gap)],
                    f"{theirs[BASELINE] - theirs[method]:+.1f}",
                )
    aligned = setup.records.get("aligned_mtl")
    if aligned:
        worst = max(max(over_training(r, "balanced", "condition")) for r in aligned)
        cosine = min(min(over_training(r, "balanced", "least_cosine")) for r in aligned)
        raw = float(np.mean([over_training(r, "raw", "condition") for r in aligned]))
        yield claim(
            f"{where}: Aligned-MTL's balanced gradients have condition number 1 and cosines 0",
            "Senushkin 2023, figures 4, 7",
            f"largest condition number {worst:.3f}, least cosine {cosine:+.3f}; "
            f"of the raw gradients {raw:.1f} on average",
            [worst < 1.01, cosine > -0.01],
        )


def claims(folder: Path) -> list[Claim]:
    """Returns what the papers claim beside what the records say.

    An order of two methods counts as decided if the difference of their delta_m, seed by seed,
    exceeds its standard error; with one seed nothing is decided. Tables without results here are
    rows of their own, with the command that makes them.
    """
    found = {k: s for k, s in setups(folder).items() if not s.config["scenes"]}
    if not found:
        return []  # made-up scenes show nothing
    made = [one for setup in found.values() for one in claims_of(setup)]
    for (dataset, network), tables in TABLES.items():
        if f"{dataset}_{network}" in found:
            continue
        title = BENCHMARKS[dataset].title
        for table in tables:
            best = min((v[0], name) for name, v in table.delta_m.items() if v)
            command = (
                f"python -m experiments.scenes --dataset {dataset} --network {network} "
                f"--data-dir DIR{' --weights FILE' if network == 'pspnet' else ''}"
            )
            made.append(
                not_runnable(
                    f"{title}, {network}: {best[1]} has the lowest delta_m",
                    table.source,
                    command,
                    f"{best[0]:+.2f} %",
                    "data" if dataset != "nyuv2" else "weights of ResNet-50, an accelerator",
                )
            )
    return made


def named(methods: Sequence[str]) -> str:
    """Returns how many there are, and which."""
    return f"{len(methods)} ({', '.join(methods)})" if methods else "none"


def conclusion(found: Sequence[Setup]) -> str:
    """Returns the sentence that the numbers allow."""
    sentences = []
    for setup in found:
        data = "made-up scenes" if setup.config["scenes"] else setup.dataset
        where = f"{data}, {setup.network}"
        if setup.single is None or BASELINE not in setup.values:
            sentences.append(f"{where}: no delta_m yet, single tasks or equal weights are missing.")
            continue
        rivals = [name for name in setup.values if name not in (SINGLE, BASELINE)]
        gap = {name: gains(setup, name, BASELINE) for name in rivals}
        better = [n for n, g in gap.items() if len(g) > 1 and above_error(g)]
        worse = [n for n, g in gap.items() if len(g) > 1 and above_error([-x for x in g])]
        few = all(len(g) < 2 for g in gap.values())
        own = show(setup.drops(BASELINE, "metric"), digits=1, sign="+")
        text = f"{where}: equal weights have delta_m {own} %; of {len(rivals)} methods "
        if few:
            lower = [n for n, g in gap.items() if np.mean(g) > 0]
            text += f"{named(lower)} are lower, with one seed: undecided."
        else:
            text += f"{named(better)} are lower by more than the error, {named(worse)} higher, the "
            text += "others undecided."
        sentences.append(text)
    return "\n".join(sentences)


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns tables and figures of what the results files hold."""
    name = f"{args.dataset}_{args.network}"
    found = {key: setup for key, setup in setups(folder).items() if key == name}
    tables, figures = [], {}
    for key, setup in found.items():
        tables += [drops_table(setup)] if setup.single is not None else []
        tables += [task_table(setup, task) for task in setup.benchmark.tasks]
        tables += [gradient_table(setup)]
        figures[f"{key}_gradients.png"] = partial(draw_gradients, setup)
        if setup.single is not None:
            figures[f"{key}_delta_m.png"] = partial(draw_drops, setup)
    return Report(tables, figures, conclusion(list(found.values())))
