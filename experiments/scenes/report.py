"""Tables, figures and verdicts of the scenes, from their results files alone."""

import argparse
from collections.abc import Container, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

import jaxmtl
from experiments.claims import (
    Claim,
    above_error,
    changed,
    claim,
    listed,
    mean_and_error,
    not_runnable,
    show,
)
from experiments.scenes.benchmarks import BENCHMARKS, Benchmark
from experiments.scenes.methods import METHODS, SINGLE
from experiments.scenes.networks import NETWORKS
from experiments.scenes.published import (
    AVERAGED,
    MOCO_RIVALS,
    MOCO_TABLES,
    OWN_PENALTY,
    PENALTIES,
    RATE,
    RECIPES,
    SEEDS,
    TABLES,
    WEIGHTS,
    XIAO8,
    XIAO9,
    ZHOU,
    Published,
)
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
        """Options of its records, of equal weights if they are there."""
        records = self.records.get(BASELINE) or next(iter(self.records.values()))
        config: Record = records[0]["config"]
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


def part_name(
    dataset: str,
    network: str,
    penalty: float | None = None,
    task_weights: Sequence[float] | None = None,
) -> str:
    """Returns the name of a results file; one of another hyperparameter has it in its name."""
    name = f"{dataset}_{network}"
    if penalty is not None:
        name += f"_lambda_{penalty:g}"
    if task_weights:
        name += "_weights" + "".join(f"_{weight:g}" for weight in task_weights)
    return name


def read_setup(
    folder: Path, dataset: str, network: str, varied: dict[str, Any] | None = None
) -> Setup | None:
    """Returns what a results file holds, None if no method of all tasks is in it.

    Runs with another hyperparameter are measured against the single tasks of the others.
    """
    metrics = BENCHMARKS[dataset].metrics
    joint: dict[str, list[Record]] = {}
    singles: dict[int, np.ndarray] = {}
    plain, own = (part_name(dataset, network, **each) for each in ({}, varied or {}))
    for name in dict.fromkeys((plain, own)):
        records = read_records(folder / f"{name}.jsonl")
        for record in sorted(records, key=lambda record: record["seed"]):
            if record["method"] == SINGLE:
                row = singles.setdefault(record["seed"], np.full(len(metrics), np.nan))
                result = np.asarray(record["result"], float)
                row[~np.isnan(result)] = result[~np.isnan(result)]
            elif name == own:
                joint.setdefault(record["method"], []).append(record)
    if not joint:
        return None
    whole = [row for row in singles.values() if not np.isnan(row).any()]
    values = {
        name: np.asarray([r["result"] for r in joint[name]]) for name in METHODS if name in joint
    }
    if whole:
        values = {SINGLE: np.stack(whole)} | values
    return Setup(dataset, network, values, joint, np.mean(whole, axis=0) if whole else None)


def setups(folder: Path) -> dict[str, Setup]:
    """Returns what the results files of all methods hold, by the name of the file."""
    return {
        part_name(dataset, network): setup
        for dataset in BENCHMARKS
        for network in NETWORKS
        if (setup := read_setup(folder, dataset, network)) is not None
    }


# --- tables -------------------------------------------------------------------------------------


def title_of(setup: Setup) -> str:
    """Returns what a table or figure shows."""
    config = setup.config
    height, width = config["size"]
    data = "made-up scenes" if config["scenes"] else setup.benchmark.title
    varied = [f", lambda {config['penalty']:g}"] if config.get("penalty") else []
    if config.get("task_weights"):
        varied.append(f", weights {' '.join(map(str, config['task_weights']))}")
    return (
        f"{data}, {setup.network} of width {config['width']}, {height} x {width}, "
        f"{config['epochs']} epochs, mean of the last {config['average']}{''.join(varied)}"
    )


def printed_of(setup: Setup, method: str) -> tuple[list[float], list[float]]:
    """Returns what the papers print: the metrics and delta_m, or empty lists."""
    network, name = setup.network, method
    if setup.config.get("penalty") or setup.config.get("task_weights"):
        return [], []  # other numbers: see the published tables
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


# From the authors' codes; see the package.
CODE_DIFFERS = {
    "pcgrad": "PCGrad draws an order for each task",
    "gradvac": "GradVac updates every target",
    "nash_mtl": "Nash-MTL is exact",
    "ldc_mtl_router": "features do not train LDC-MTL's router",
}


def differs_of(
    dataset: str, methods: Container[str], config: Record | None = None, seeds: int = SEEDS
) -> str:
    """Returns what differs from the papers' set-up, without records by their commands."""
    told = []
    if config is not None:
        recipe = RECIPES[dataset]
        height, width = config["size"]
        ours = config | {"size": f"{height} x {width}", "seeds": seeds}
        theirs = {"size": "{} x {}".format(*recipe.size), "width": 64, "levels": 5}
        theirs |= {"batch_size": recipe.batch_size, "epochs": recipe.epochs}
        told.append(changed(ours, theirs | {"learning_rate": RATE, "seeds": SEEDS}))
        if dataset == "nyuv2" and (height, width) != recipe.size:  # only the archive has others
            told.append("normals estimated, depth of 8 bits")
        if config["network"] == "pspnet" and not config["pretrained"]:
            told.append("without ImageNet's weights")
    if dataset == "cityscapes3":
        told.append("the schedule of the authors' code, as the paper states none")
    told += [text for name, text in CODE_DIFFERS.items() if name in methods]
    told.append("running variances without Bessel's correction")
    return "; ".join(filter(None, told))


def command(dataset: str, network: str, methods: Sequence[str], options: str = "") -> str:
    """Returns the command that runs methods as the papers do, beside those that have run."""
    weights = " --weights FILE" if network == "pspnet" else ""
    return (
        f"python -m experiments.scenes --dataset {dataset} --network {network} --data-dir DIR"
        f"{weights} --epochs {RECIPES[dataset].epochs} --seeds {SEEDS} --resume{options} --methods "
        f"{' '.join(methods)}"
    )


def lacking(dataset: str, network: str) -> str:
    """Returns what the papers' set-up takes and is not at hand."""
    images = "images of 288 x 384" if dataset == "nyuv2" else "data"
    weights = ["weights of ResNet-50"] if network == "pspnet" else []
    return ", ".join([images, *weights, "an accelerator"])


class Statement(NamedTuple):
    """What a paper says of methods, as orders of delta_m."""

    text: str
    source: str
    pairs: tuple[tuple[str, str], ...]  # (lower, higher)
    paper: str


def statements(dataset: str, table: Published) -> Iterator[Statement]:
    """Yields what a table says."""
    theirs = {name: v[0] for name, v in table.delta_m.items() if v and name in METHODS}

    def lowest(method: str, rivals: Sequence[str], source: str, among: str = "") -> Statement:
        pairs = tuple((method, rival) for rival in rivals if rival != method)
        text = f"{method} has the lowest delta_m{among}"
        return Statement(text, source, pairs, f"{theirs[method]:+.2f} %")

    def lower(low: str, high: str, source: str) -> Statement:
        words = "equal weights" if high == BASELINE else high
        gain = f"{theirs[high] - theirs[low]:+.1f}"
        return Statement(f"{low} has a lower delta_m than {words}", source, ((low, high),), gain)

    yield lowest(min(theirs, key=lambda name: theirs[name]), list(theirs), table.source)
    for method in ("aligned_mtl", "famo", "ldc_mtl_router"):
        if method in theirs:
            yield lower(method, BASELINE, table.source)
    if "moco" in theirs:
        alone, added = MOCO_TABLES[dataset]
        yield lowest("moco", MOCO_RIVALS, alone, " of that paper's methods")
        for plain in ("pcgrad", "cagrad"):  # on Cityscapes it does not help PCGrad, they say
            low, high = sorted((plain, f"moco_{plain}"), key=lambda name: theirs[name])
            yield lower(low, high, added)


def judged(setup: Setup, statement: Statement) -> Claim | None:
    """Returns a statement judged by records, None where these have none of its pairs.

    A statement on several rivals is reproduced if all of them have run.
    """
    known = [pair for pair in statement.pairs if set(pair) <= setup.values.keys()]
    names = dict.fromkeys(name for pair in known for name in pair)
    if setup.single is None or not known:
        return None
    gaps = {pair: gains(setup, *pair) for pair in known}
    held = [len(gap) > 1 and above_error(gap) for gap in gaps.values()]
    seeds = min(map(len, gaps.values()))
    if len(statement.pairs) == 1:
        (gap,) = gaps.values()
        ours = f"{show(gap, digits=1, sign='+')} points of {len(gap)} seeds"
        held = [bool(np.mean(gap) > 0), *held]
    else:
        drops = {name: setup.drops(name, "metric") for name in names}
        order = sorted(drops, key=lambda name: np.mean(drops[name]))
        text = listed({m: show(drops[m], digits=1, sign="+") for m in order}, separator=", ")
        rank, of = order.index(known[0][0]) + 1, len(statement.pairs) + 1
        ours = f"rank {rank} of the {len(order)} that ran, of {of}: {text}"
        held = [*held, len(known) == len(statement.pairs)]
    return claim(
        f"{setup.benchmark.title}, {setup.network}: {statement.text}",
        statement.source,
        ours,
        held,
        statement.paper,
        differs_of(setup.dataset, names, setup.config, seeds),
    )


def claims_of_table(
    dataset: str, network: str, table: Published, setup: Setup | None
) -> Iterator[Claim]:
    """Yields what a table says, judged by the records or with the command that makes them."""
    where = f"{BENCHMARKS[dataset].title}, {network}"
    if setup is not None and setup.single is not None:
        theirs = {name: values[0] for name, values in table.delta_m.items() if values}
        orders = compare_orders(setup, theirs)
        decided = orders.same + orders.opposite
        if decided:  # an order of which no pair is decided says nothing
            seeds = min(len(v) for name, v in setup.values.items() if name in theirs)
            yield claim(
                f"{where}: methods stand in the printed order of delta_m",
                table.source,
                f"of {sum(orders)} pairs {orders.same} in this order, {orders.opposite} in the "
                f"opposite, {orders.undecided} undecided (within the error, or one seed)",
                [orders.same > 0, orders.same > orders.opposite, orders.undecided < decided],
                differs=differs_of(dataset, setup.values, setup.config, seeds),
            )
    for statement in statements(dataset, table):
        told = judged(setup, statement) if setup is not None else None
        names = dict.fromkeys(name for pair in statement.pairs for name in pair)
        yield told or not_runnable(
            f"{where}: {statement.text}",
            statement.source,
            command(dataset, network, (SINGLE, *names)),
            statement.paper,
            lacking(dataset, network),
            differs_of(dataset, names),
        )


def claims_of_gradients(setup: Setup) -> Iterator[Claim]:
    """Yields what Aligned-MTL's figures say of the balanced gradients."""
    aligned = setup.records.get("aligned_mtl")
    if aligned:
        worst = max(max(over_training(r, "balanced", "condition")) for r in aligned)
        cosine = min(min(over_training(r, "balanced", "least_cosine")) for r in aligned)
        raw = float(np.mean([over_training(r, "raw", "condition") for r in aligned]))
        yield claim(
            f"{setup.benchmark.title}, {setup.network}: Aligned-MTL's balanced gradients have "
            "condition number 1 and cosines 0",
            "Senushkin 2023, figures 4, 7",
            f"largest condition number {worst:.3f}, least cosine {cosine:+.3f}; "
            f"of the raw gradients {raw:.1f} on average",
            [worst < 1.01, cosine > -0.01],
            differs=differs_of(setup.dataset, (), setup.config, len(aligned)),
        )


# Cityscapes with two tasks by MTAN, of which the next tables are.
CITY = ("cityscapes2", "mtan")


def claims_of_averaging(setup: Setup | None) -> Iterator[Claim]:
    """Yields what CR-MOGM's table says of the metrics on the held out part."""
    benchmark = BENCHMARKS[CITY[0]]
    sign = np.array([1 if metric.higher else -1 for metric in benchmark.metrics])
    where, plains = f"{benchmark.title}, {CITY[1]}", ("mgda", "pcgrad", "cagrad")

    def better(name: str, values: Any) -> np.ndarray:
        """Returns by how much the CR- form is better, metric by metric."""
        ours, plain = (np.asarray(values[key]) for key in (f"cr_{name}", name))
        n = min(len(ours), len(plain))
        found: np.ndarray = sign * (ours[:n] - plain[:n])
        return found

    def shown(gaps: np.ndarray) -> str:
        """Returns the gains in every metric; the errors are small numbers."""
        means = dict(zip((m.name for m in benchmark.metrics), gaps.mean(axis=0), strict=True))
        return listed(means, lambda value: f"{value:+.4g}", ", ")

    testing = {name: [both[1]] for name, both in AVERAGED.items()}
    base = np.array(TABLES[CITY][0].values[SINGLE])
    theirs = {name: 100 * (better(name, testing) / base).mean() for name in plains}
    ran = [] if setup is None else [m for m in plains if {m, f"cr_{m}"} <= setup.values.keys()]
    for name in plains:
        names = (name, f"cr_{name}")
        text = f"{where}: cr_{name} is comparable to {name} or better in every metric"
        paper = shown(better(name, testing))
        if setup is None or name not in ran:
            way, lacks = command(*CITY, names), lacking(*CITY)
            yield not_runnable(text, ZHOU, way, paper, lacks, differs_of(CITY[0], names))
            continue
        gaps = better(name, setup.values)
        held = [len(gaps) > 1 and not above_error((-gap).tolist()) for gap in gaps.T]
        differs = differs_of(CITY[0], names, setup.config, len(gaps))
        yield claim(text, ZHOU, shown(gaps), held, paper, differs)
    text = f"{where}: the CR- form improves mgda and cagrad more than pcgrad (by delta_m)"
    paper = listed(theirs, lambda value: f"{value:+.1f}", ", ") + " by the columns"
    if setup is None or setup.single is None or len(ran) < len(plains):
        methods = (SINGLE, *AVERAGED)
        way, lacks = command(*CITY, methods), lacking(*CITY)
        yield not_runnable(text, ZHOU, way, paper, lacks, differs_of(CITY[0], plains))
        return
    saved = {name: gains(setup, f"cr_{name}", name) for name in plains}
    n = min(map(len, saved.values()))
    more = [np.subtract(saved[name][:n], saved["pcgrad"][:n]).tolist() for name in plains[::2]]
    ours = listed(saved, lambda gap: show(gap, digits=1, sign="+"), ", ")
    held = [n > 1 and above_error(gap) for gap in more]
    yield claim(text, ZHOU, ours, held, paper, differs_of(CITY[0], plains, setup.config, n))


def claims_of_variants(folder: Path, setup: Setup | None) -> Iterator[Claim]:
    """Yields what LDC-MTL's tables say of its lambda and of scalarization by its weights."""
    where, own = f"{BENCHMARKS[CITY[0]].title}, {CITY[1]}", "ldc_mtl_router"
    delta_m = {name: v[0] for name, v in TABLES[CITY][1].delta_m.items() if v}

    def drops(method: str, varied: dict[str, Any]) -> list[float]:
        found = read_setup(folder, *CITY, varied)
        return found.drops(method, "metric") if found and method in found.values else []

    def told(
        text: str,
        source: str,
        pairs: dict[str, tuple[list[float], list[float]]],
        way: str,
        paper: str,
    ) -> Claim:
        gaps = {
            key: [b - a for a, b in zip(low, high, strict=False)]
            for key, (low, high) in pairs.items()
        }
        text = f"{where}: {text}"
        if setup is None or setup.single is None or not all(gaps.values()):
            return not_runnable(
                text, source, way, paper, lacking(*CITY), differs_of(CITY[0], (own,))
            )
        ours = listed(gaps, lambda gap: show(gap, digits=1, sign="+"), ", ") + " points"
        held = [len(gap) > 1 and above_error(gap) for gap in gaps.values()]
        differs = differs_of(CITY[0], (own,), setup.config, min(map(len, gaps.values())))
        return claim(text, source, ours, held, paper, differs)

    def loop(values: Sequence[str], options: str, method: str, others: Sequence[str]) -> str:
        each = command(*CITY, (method,), options)
        plain = command(*CITY, (SINGLE, *others))
        return f"for x in {' '.join(values)}; do {each}; done; {plain}"

    rival = drops("fairgrad", {})
    penalties = {p: drops(own, {"penalty": p} if p != OWN_PENALTY else {}) for p in PENALTIES}
    yield told(
        f"{own} has a lower delta_m than fairgrad by every lambda of 0.02 to 0.1",
        XIAO8,
        {f"{p:g}": (found, rival) for p, found in penalties.items()},
        loop(
            [f"{p:g}" for p in PENALTIES if p != OWN_PENALTY],
            " --penalty $x",
            own,
            ("fairgrad", own),
        ),
        f"{listed({f'{p:g}': v[4] for p, v in PENALTIES.items()}, separator=', ')} against "
        f"{delta_m['fairgrad']}",
    )
    weighted = {w: drops(BASELINE, {"task_weights": w}) for w in WEIGHTS}
    reference = drops(own, {})
    names = {w: " : ".join(f"{x:g}" for x in w) for w in WEIGHTS}
    yield told(
        f"no weights of linear_scalarization have as low a delta_m as {own}",
        XIAO9,
        {"equal": (reference, drops(BASELINE, {}))}
        | {names[w]: (reference, found) for w, found in weighted.items()},
        loop(
            ["'{:g} {:g}'".format(*w) for w in WEIGHTS],
            " --task-weights $x",
            BASELINE,
            (BASELINE, own),
        ),
        f"{listed({names[w]: v[4] for w, v in WEIGHTS.items()}, separator=', ')} against "
        f"{delta_m[own]}",
    )


def claims(folder: Path) -> list[Claim]:
    """Returns what the papers claim beside what the records say.

    An order of two methods counts as decided if the difference of their delta_m, seed by seed,
    exceeds its standard error; with one seed nothing is decided. What no record speaks of has the
    command that would decide it.
    """
    found = {k: s for k, s in setups(folder).items() if not s.config["scenes"]}
    if not found:
        return []  # made-up scenes show nothing
    made: list[Claim] = []
    for (dataset, network), tables in TABLES.items():
        setup = found.get(part_name(dataset, network))
        for table in tables:
            made += claims_of_table(dataset, network, table, setup)
    for setup in found.values():
        made += claims_of_gradients(setup)
    city = found.get(part_name(*CITY))
    return [*made, *claims_of_averaging(city), *claims_of_variants(folder, city)]


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


def published_tables() -> list[Table]:
    """Returns the papers' tables."""
    made = []
    for (dataset, network), tables in TABLES.items():
        benchmark = BENCHMARKS[dataset]
        for table in tables:
            rows = []
            for name, values in table.values.items():
                drops = [f"{value:+.2f}" for value in table.delta_m[name]]
                rows.append([name, *(f"{v:g}" for v in values), *drops])
            header = ["method", *(metric.name for metric in benchmark.metrics), "delta_m %"]
            header += ["over tasks %"] * (max(map(len, table.delta_m.values())) > 1)
            made.append(_filled(f"{benchmark.title}, {network}", table.source, header, rows))
    where = f"{BENCHMARKS[CITY[0]].title}, {CITY[1]}"
    metrics = [metric.name for metric in BENCHMARKS[CITY[0]].metrics]
    header = ["method", *metrics, *(f"{name}, training" for name in metrics)]
    rows = [
        [name, *(f"{v:g}" for v in (*testing, *training))]
        for name, (training, testing) in AVERAGED.items()
    ]
    made.append(_filled(where, ZHOU, header, rows))
    varied: tuple[tuple[str, str, dict[Any, tuple[float, ...]]], ...] = (
        (XIAO8, "lambda of ldc_mtl_router", {f"{p:g}": v for p, v in PENALTIES.items()}),
        (XIAO9, "weights of the sum", {"{:g} : {:g}".format(*w): v for w, v in WEIGHTS.items()}),
    )
    for source, what, numbers in varied:
        rows = [
            [name, *(f"{v:g}" for v in values[:4]), f"{values[4]:+.2f} ± {values[5]:.2f}"]
            for name, values in numbers.items()
        ]
        made.append(_filled(where, source, [what, *metrics, "delta_m %"], rows))
    return made


def _filled(where: str, source: str, header: list[str], rows: list[list[str]]) -> Table:
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    return Table(f"{where} as published ({source})", header, rows)


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns tables and figures of what the results file holds, and the papers' tables."""
    varied = {"penalty": args.penalty, "task_weights": args.task_weights}
    name = part_name(args.dataset, args.network, **varied)
    setup = read_setup(folder, args.dataset, args.network, varied)
    if setup is None:
        return Report([], {})
    tables = [drops_table(setup)] if setup.single is not None else []
    tables += [task_table(setup, task) for task in setup.benchmark.tasks]
    tables += [gradient_table(setup)]
    figures = {f"{name}_gradients.png": partial(draw_gradients, setup)}
    if setup.single is not None:
        figures[f"{name}_delta_m.png"] = partial(draw_drops, setup)
    tables += [] if setup.config["scenes"] else published_tables()
    # With another hyperparameter there is no baseline beside: see the claims.
    return Report(tables, figures, "" if any(varied.values()) else conclusion([setup]))
