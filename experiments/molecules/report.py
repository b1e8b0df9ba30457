"""Tables, figures and verdicts of the molecules, from their results files alone."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

import jaxmtl
from experiments.claims import (
    Claim,
    above_error,
    changed,
    claim,
    differing,
    listed,
    mean_and_error,
    not_runnable,
    show,
)
from experiments.molecules.data import QM9_TASKS, RIMP2_TASKS, Task
from experiments.molecules.methods import GRADIENT_BALANCING, LOSS_BALANCING, SINGLE
from experiments.molecules.published import (
    CODE_DIFFERS,
    DATA_DIFFERS,
    DELTA_M,
    PUBLISHED,
    TABLE6,
)
from experiments.study import Record, Report, Table, read_records

TASKS: dict[str, tuple[Task, ...]] = {"rimp2": RIMP2_TASKS, "qm9": QM9_TASKS}
TITLES = {"rimp2": "10,000 molecules, RI-MP2", "qm9": "QM9"}
EQUAL = "linear_scalarization"


class Found(NamedTuple):
    """What the records of one source of molecules say."""

    methods: dict[str, list[Record]]  # by method, a record a seed; without single tasks
    single: np.ndarray  # (m,) test errors, means over seeds
    tasks: tuple[Task, ...]

    def errors(self, method: str) -> np.ndarray:
        """Returns the test errors (seeds, m), nan where training failed."""
        return np.array([r["test_mae"] for r in self.methods[method]], np.float64)

    def changes(self, method: str) -> np.ndarray:
        """Returns the changes in percent (seeds, m) against single tasks; negative is better."""
        return 100 * (self.errors(method) - self.single) / self.single

    def drops(self, method: str) -> list[float]:
        """Returns delta_m (seeds,) in percent."""
        return [drop(errors, self.single) for errors in self.errors(method)]

    def by_drop(self) -> list[str]:
        """Returns the methods, best delta_m first."""
        return sorted(self.methods, key=lambda method: np.mean(self.drops(method)))


def drop(errors: np.ndarray, single: np.ndarray) -> float:
    """Returns delta_m in percent."""
    lower = jnp.zeros(len(single), bool)
    values, base = jnp.asarray(errors), jnp.asarray(single)
    return float(jaxmtl.metrics.delta_m(values, baselines=base, higher_is_better=lower))


def baselines_of(records: Sequence[Record], num_tasks: int) -> Record | None:
    """Returns the errors (m,) of the single tasks, mean over seeds; None if a task is missing."""
    singles: list[list[Record]] = [[] for _ in range(num_tasks)]
    for record in records:
        if record["method"] == SINGLE:
            singles[record["task"]].append(record)
    if not all(singles):
        return None
    return {
        key: [float(np.mean([record[key][0] for record in task])) for task in singles]
        for key in ("validation_mae", "test_mae")
    }


def read_found(folder: Path, dataset: str) -> Found | None:
    """Returns the records of a source, None before all single tasks and one method are there."""
    records, tasks = read_records(folder / f"{dataset}.jsonl"), TASKS[dataset]
    baselines = baselines_of(records, len(tasks))
    methods: dict[str, list[Record]] = {}
    for record in records:
        if record["method"] != SINGLE:
            methods.setdefault(record["method"], []).append(record)
    if baselines is None or not methods:
        return None
    return Found(methods, np.array(baselines["test_mae"]), tasks)


# --- verdicts -----------------------------------------------------------------------------------


# Of delta_m, in points: what one seed has to be ahead by. The paper's LDC-MTL has ± 3.64.
MARGIN = 5.0


def ahead(gains: Sequence[float], margin: float = MARGIN) -> bool:
    """Tells whether a mean is positive: by more than its error, or by the margin for one seed."""
    return above_error(gains) if len(gains) > 1 else gains[0] > margin


def claims(folder: Path) -> list[Claim]:
    """Returns what table 6 and figure 5c claim beside what the records say.

    With one seed a difference of delta_m counts from 5 points on. QM9 without records has rows of
    its own, with the command that makes them.
    """
    made = []
    for dataset in TASKS:
        found = read_found(folder, dataset)
        if found is not None:
            made += differing(_claims_of(found, TITLES[dataset]), differs_of(dataset, found))
        elif made:
            made += _not_run(TITLES[dataset])
    return made


def differs_of(dataset: str, found: Found) -> str:
    """Returns what differs from table 6 in the records."""
    config = next(iter(found.methods.values()))[0]["config"]
    recipe = {"width": 64, "epochs": 300, "batch_size": 120, "seeds": 3}
    seeds = {"seeds": min(map(len, found.methods.values()))}
    odd = changed(config | seeds, recipe)
    return "; ".join([*filter(None, [DATA_DIFFERS.get(dataset, ""), odd]), CODE_DIFFERS])


def _not_run(title: str) -> list[Claim]:
    """Returns what the paper says of QM9 itself, with the command that would decide it."""
    command = (
        "python -m experiments.molecules --datasets qm9 --data-dir DIR --seeds 3 --methods "
        f"{' '.join((SINGLE, *DELTA_M))}"
    )
    ranked = sorted(DELTA_M, key=lambda method: DELTA_M[method])[:3]
    words = {
        "no method is as good as single tasks (delta_m above 0)": "49.5 to 203.8",
        "`ldc_mtl` has the lowest delta_m of the paper's methods": listed(
            {method: DELTA_M[method] for method in ranked}, separator=", "
        ),
    }
    lacks = "data (10,000 of 130,831 molecules are at hand), an accelerator"
    return [
        not_runnable(f"{title}: {text}", TABLE6, command, paper, lacks, CODE_DIFFERS)
        for text, paper in words.items()
    ]


def _claims_of(found: Found, title: str) -> list[Claim]:
    def gains(better: str, worse: str) -> list[float]:
        pairs = zip(found.drops(worse), found.drops(better), strict=False)
        return [a - b for a, b in pairs]

    def text(methods: Sequence[str]) -> str:
        return listed({m: show(found.drops(m), digits=1) for m in methods}, separator=", ")

    made: list[Claim] = []

    def add(words: str, source: str, ours: str, conditions: list[bool], paper: str) -> None:
        made.append(claim(f"{title}: {words}", source, ours, conditions, paper))

    order = found.by_drop()
    known = [method for method in order if method in DELTA_M]
    add(
        "no method is as good as single tasks (delta_m above 0)",
        TABLE6,
        text(order),
        [ahead(found.drops(method)) for method in order],
        "49.5 to 203.8",
    )
    if EQUAL in order:
        for method in ("ldc_mtl", "go4align", "famo", "nash_mtl", "fairgrad", "imtl_g"):
            if method in order:
                add(
                    f"`{method}` has a lower delta_m than equal weights",
                    TABLE6,
                    text([method, EQUAL]),
                    [ahead(gains(method, EQUAL))],
                    f"{DELTA_M[method]} against {DELTA_M[EQUAL]}",
                )
    rivals = [method for method in known if method != "ldc_mtl"]
    if "ldc_mtl" in known and rivals:
        add(
            "`ldc_mtl` has the lowest delta_m of the paper's methods",
            TABLE6,
            f"rank {known.index('ldc_mtl') + 1} of {len(known)} that ran: {text(known)}",
            [ahead(gains("ldc_mtl", rival)) for rival in rivals],
            f"rank 1 of {len(DELTA_M)}",
        )
    if len(known) > 3:
        ours = [np.mean(found.drops(method)) for method in known]
        related = spearmanr(ours, [DELTA_M[method] for method in known])
        add(
            "the methods' order by delta_m",
            TABLE6,
            f"rank correlation with the paper's {related.statistic:+.2f}, p {related.pvalue:.2f} "
            f"({len(known)} methods)",
            [related.statistic > 0 and related.pvalue < 0.05],
            "",
        )
    return made + _claims_of_router(found, title)


def _claims_of_router(found: Found, title: str) -> list[Claim]:
    records = [r for r in found.methods.get("ldc_mtl", ()) if len(r["history"]["router"]) > 3]
    if not records:
        return []
    routers = np.array([record["history"]["router"] for record in records])  # (seeds, epochs, m)
    half = routers.shape[1] // 2
    moved = [np.abs(np.diff(part, axis=1)).sum((1, 2)) for part in np.split(routers, [half], 1)]
    ratios = (routers[:, -1].max(axis=1) / routers[:, -1].min(axis=1)).tolist()
    first, second = (show(part.tolist(), digits=3) for part in moved)
    return [
        claim(
            f"{title}: the weights of LDC-MTL adapt early and converge later",
            "Xiao 2025, figure 5c",
            f"they move by {first} in the first half of training, {second} in the second",
            [ahead((moved[0] - moved[1]).tolist(), margin=0)],
        ),
        claim(
            f"{title}: the converged weights of LDC-MTL are nearly equal",
            "Xiao 2025, figure 5c",
            f"largest over smallest {show(ratios, digits=2)} (nearly: at most 1.5)",
            [max(ratios) <= 1.5],
        ),
    ]


# --- tables -------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Returns three digits, without an exponent."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def head_of(task: Task) -> str:
    """Returns the head of a task's column."""
    return f"{task.short or task.name} ({task.unit})"


def cells_of(values: np.ndarray) -> list[str]:
    """Returns the means (m,) of (seeds, m), with errors where there are several seeds."""
    made = []
    for column in values.T:
        mean, error = mean_and_error(column.tolist())
        made.append(number(mean) + (f" ± {number(error)}" if len(column) > 1 else ""))
    return made


def errors_table(dataset: str, found: Found) -> Table:
    """Returns the errors of all methods, best delta_m first."""
    header = ["method", *map(head_of, found.tasks), "dm %", "epoch"]
    rows = [[SINGLE, *map(number, found.single), "0.0", ""]]
    for method in found.by_drop():
        epochs = ", ".join(str(record["best_epoch"]) for record in found.methods[method])
        drops = show(found.drops(method), digits=1)
        rows.append([method, *cells_of(found.errors(method)), drops, epochs])
    title = f"{TITLES[dataset]}: mean absolute test errors at the best validation delta_m"
    return Table(title, header, rows)


def cost_of(found: Found, method: str) -> str:
    """Returns the CPU time of a step relative to equal weights."""
    if EQUAL not in found.methods:
        return ""
    ours, base = (found.methods[name][0]["cpu_seconds_per_step"] for name in (method, EQUAL))
    return f"{ours / base:.1f}"


def beside_table(dataset: str, found: Found) -> Table:
    """Returns delta_m and ranks beside the published ones."""
    order, published = found.by_drop(), sorted(DELTA_M, key=lambda method: DELTA_M[method])
    rows = []
    for method in [*published, *(m for m in order if m not in DELTA_M)]:
        paper = ["", ""]
        if method in DELTA_M:
            paper = [f"{DELTA_M[method]:.1f}", str(published.index(method) + 1)]
        ours = ["not run", ""]
        if method in order:
            changes = found.changes(method).mean(axis=0)
            worst, best = (int(index) for index in (changes.argmax(), changes.argmin()))
            ours = [show(found.drops(method), digits=1), str(order.index(method) + 1)]
            ours += [f"{found.tasks[i].name} {changes[i]:+.0f} %" for i in (best, worst)]
            ours.append(cost_of(found, method))
        rows.append([method, *paper, *ours])
    header = [
        *("method", "paper: delta_m %", f"rank of {len(DELTA_M)}", "here: delta_m %"),
        *(f"rank of {len(order)}", "best task", "worst task", "cost"),
    ]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    title = f"{TITLES[dataset]} beside table 6 of Xiao et al. 2025 ({differs_of(dataset, found)})"
    return Table(title, header, rows)


def published_table() -> Table:
    """Returns table 6."""
    header = ["method", *map(head_of, QM9_TASKS), "dm %"]
    rows = [
        [method, *(f"{value:g}" for value in values), f"{DELTA_M[method]}" if i else "0"]
        for i, (method, values) in enumerate(PUBLISHED.items())
    ]
    return Table(
        "QM9 as published: mean absolute test errors (Xiao et al. 2025, table 6)", header, rows
    )


# --- figures ------------------------------------------------------------------------------------

COLORS = {
    **dict.fromkeys(LOSS_BALANCING, "tab:green"),
    **dict.fromkeys(GRADIENT_BALANCING, "tab:blue"),
}


def draw_errors(title: str, found: Found, path: Path) -> None:
    """Saves delta_m as bars beside the change of every task."""
    order = found.by_drop()
    changes = np.stack([found.changes(method).mean(axis=0) for method in order])
    drops = [mean_and_error(found.drops(method)) for method in order]
    figure = Figure(figsize=(13, 1.9 + 0.42 * len(order)), layout="constrained")
    bars, cells = figure.subplots(1, 2, width_ratios=(1, 2.6))
    places = np.arange(len(order))
    for method, place, (mean, error) in zip(order, places, drops, strict=True):
        bars.barh(place, mean, xerr=np.nan_to_num(error), color=COLORS[method], alpha=0.8)
    for color, label in (("tab:green", "one gradient"), ("tab:blue", "a gradient per task")):
        bars.barh([0], [0], color=color, label=label)
    bars.axvline(0, color="tab:red", lw=1.2, label="single tasks")
    bars.set_yticks(places, order)
    bars.set_ylim(len(order) - 0.4, -0.6)
    bars.set_xlabel("delta_m (%): mean over tasks, negative is better")
    bars.grid(axis="x", alpha=0.3)
    bars.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, frameon=False, fontsize=8)
    limit = max(10.0, float(np.nanquantile(np.abs(changes), 0.9)))
    image = cells.imshow(changes, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, values in enumerate(changes):
        for column, value in enumerate(values):
            color = "white" if abs(value) > 0.65 * limit else "black"
            text = f"{value:+.0f}" if np.isfinite(value) else "failed"
            cells.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    names = [task.name for task in found.tasks]
    cells.set_xticks(range(len(names)), names, rotation=35, ha="right")
    cells.set_yticks([])
    cells.set_ylim(len(order) - 0.4, -0.6)
    cells.set_title("test error against that of a network of its own (%)", fontsize=10)
    figure.colorbar(image, ax=cells, pad=0.01, extend="both", label="%")
    seeds = max(len(records) for records in found.methods.values())
    figure.suptitle(f"{title}, 11 properties, {seeds} seed{'s' if seeds > 1 else ''}")
    figure.savefig(path, dpi=110)


def weight_curves(found: Found) -> dict[str, np.ndarray]:
    """Returns weights over epochs (epochs, m) of the first seed, of mean 1, by what they are of."""
    curves = {}
    for method, records in found.methods.items():
        history = records[0]["history"]
        if method == "ldc_mtl":
            curves["LDC-MTL: its router (figure 5c)"] = np.array(history["router"], np.float64)
        if method not in (EQUAL, "rlw") and "weights" in history:
            curves[method] = np.array(history["weights"], np.float64)
    return {
        name: weights / np.abs(weights).mean(axis=1, keepdims=True)
        for name, weights in sorted(curves.items(), key=lambda item: "router" not in item[0])
    }


def draw_weights(title: str, found: Found, path: Path) -> None:
    """Saves the weights of the tasks over training, a panel a method."""
    curves = weight_curves(found)
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.7 * rows + 1.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    colors = mpl.colormaps["tab20"](np.linspace(0, 1, 20))[[0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 1]]
    for panel, (name, weights) in zip(panels.flat, curves.items(), strict=False):
        for values, task, color in zip(weights.T, found.tasks, colors, strict=True):
            epochs = np.arange(1, len(values) + 1)
            panel.plot(epochs, values, color=color, lw=1.5, label=task.name)
        panel.axhline(1, color="black", lw=0.6, ls=":")
        if weights.max() > 5 or weights.min() < 0:
            panel.set_yscale("symlog", linthresh=0.1)
            low, high = weights.min(), weights.max()
            marks = [-10, -3, -1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10]
            panel.set_yticks(marks, [f"{mark:g}" for mark in marks], minor=False)
            panel.set_ylim(1.2 * low if low < 0 else 0.8 * low, 1.2 * high)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
        panel.set_xlabel("epoch")
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylabel("weight / mean size")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{title}: weights of the tasks, means over each epoch (first seed)")
    figure.savefig(path, dpi=110)


def conclusion_of(title: str, found: Found) -> str:
    """Returns the sentence that the numbers allow."""
    order = found.by_drop()
    best, last = (f"{m} ({np.mean(found.drops(m)):.1f} %)" for m in (order[0], order[-1]))
    below = sum(np.mean(found.drops(method)) < 0 for method in order)
    seeds = min(len(records) for records in found.methods.values())
    equal = f", equal weights at {np.mean(found.drops(EQUAL)):.1f} %" if EQUAL in order else ""
    return (
        f"{title}: of {len(order)} methods {best} has the best delta_m and {last} the worst"
        f"{equal}; {below} are better than single tasks ({seeds} seed"
        + ("s)." if seeds > 1 else ": differences of a few percent say little).")
    )


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns tables and figures of what the results files hold."""
    tables: list[Table] = []
    figures: dict[str, Callable[[Path], Any]] = {}
    sentences = []
    for dataset in args.datasets:
        found = read_found(folder, dataset)
        if found is None:
            continue
        tables += [errors_table(dataset, found), beside_table(dataset, found)]
        figures[f"{dataset}.png"] = partial(draw_errors, TITLES[dataset], found)
        if weight_curves(found):
            figures[f"{dataset}_weights.png"] = partial(draw_weights, TITLES[dataset], found)
        sentences.append(conclusion_of(TITLES[dataset], found))
    if not tables:
        raise SystemExit(
            f"expected results in {folder}, all single tasks and a method among them; run without "
            "--report-only first"
        )
    return Report([*tables, published_table()], figures, " ".join(sentences))
