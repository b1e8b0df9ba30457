"""What the results of MultiMNIST say: tables, figures and the paper's claims."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import Claim, above_error, claim, differing, mean_and_error, show
from experiments.study import Record, Report, Table, read_records

TASKS = ("left", "right")
# Of the methods in tables and figures.
ORDER = (
    *("linear_scalarization", "rgw", "mgda", "cr_mgda", "pcgrad", "cr_pcgrad", "gradvac"),
    *("graddrop", "cagrad", "cr_cagrad", "imtl_g", "nash_mtl", "fairgrad", "aligned_mtl"),
    *("config", "dual_proj", "upgrad"),
)

# Zhou et al. 2022 (CR-MOGM), table 1: accuracy in percent of task-L and task-R, mean of 3 runs.
PAPER = {
    "mgda": (96.46, 95.29),
    "cr_mgda": (96.92, 95.44),
    "pcgrad": (96.63, 95.37),
    "cr_pcgrad": (96.90, 95.75),
    "cagrad": (96.47, 95.20),
    "cr_cagrad": (96.85, 95.70),
}
# Its table 2: final losses of task-L and task-R by batch size, mean of 3 runs.
PAPER_LOSSES = {
    ("mgda", 8): (0.44, 0.54),
    ("mgda", 4): (0.57, 0.65),
    ("mgda", 2): (0.71, 0.81),
    ("cr_mgda", 8): (0.24, 0.35),
    ("cr_mgda", 4): (0.26, 0.36),
    ("cr_mgda", 2): (0.28, 0.40),
}
BASELINE = "linear_scalarization"
PAIRS = {"mgda": "cr_mgda", "pcgrad": "cr_pcgrad", "cagrad": "cr_cagrad"}


def by_batch_size(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Returns the records of each batch size, the largest first."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["config"]["batch_size"], []).append(record)
    return dict(sorted(groups.items(), reverse=True))


def summarize(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Returns, per method and quantity, the value of each seed after the last epoch."""
    summary: dict[str, dict[str, list[float]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        history = record["history"]
        values = {"conflict": 100 * float(np.mean(history["conflict_rate"]))}
        for i, task in enumerate(TASKS):
            values[f"{task} accuracy"] = 100 * history["test_accuracy"][-1][i]
            values[f"{task} loss"] = history["test_loss"][-1][i]
        for name, value in values.items():
            summary.setdefault(record["method"], {}).setdefault(name, []).append(value)
    return dict(sorted(summary.items(), key=lambda item: ORDER.index(item[0])))


def title_of(records: Sequence[Record]) -> str:
    """Returns what table and figure show."""
    config = records[0]["config"]
    when = f"epoch {config['epochs']}"
    if config["max_steps"]:
        when = f"after {config['epochs'] * config['max_steps'] * config['batch_size']:,} examples"
    return f"MultiMNIST ({config['dataset']}), test set, {when}, mean ± standard error over seeds"


def make_table(records: Sequence[Record]) -> Table:
    """Returns the table of test metrics, beside the paper's where it has them."""
    groups = by_batch_size(records)
    several = len(groups) > 1
    beside_paper = records[0]["config"]["dataset"] == "mnist"
    header = ["method", "left acc. %", "right acc. %", "left loss", "right loss", "conflict %"]
    header = ["batch"] * several + header
    header += [f"Zhou 2022 {'loss' if several else 'acc. %'}"] * beside_paper + ["seeds"]
    rows = []
    for batch_size, group in groups.items():
        for method, summary in summarize(group).items():
            marked = f"{method} (baseline)" if method == BASELINE else method
            cells = [str(batch_size)] * several + [marked]
            cells += [show(summary[f"{task} accuracy"], digits=2) for task in TASKS]
            cells += [show(summary[f"{task} loss"], digits=3) for task in TASKS]
            cells += [show(summary["conflict"], digits=1)]
            theirs = PAPER_LOSSES.get((method, batch_size)) if several else PAPER.get(method)
            cells += ["{:.2f} / {:.2f}".format(*theirs) if theirs else ""] * beside_paper
            rows.append([*cells, str(len(summary["conflict"]))])
    return Table(title_of(records), header, rows, names=1 + several)


def draw(records: Sequence[Record], path: Path) -> None:
    """Saves the figure: accuracy, loss and conflict rate of every method."""
    summary = summarize(records)
    rows = np.arange(len(summary))
    config = records[0]["config"]
    figure = Figure(figsize=(12, 1.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    looks = {"left": ("tab:blue", "o", -0.15), "right": ("tab:orange", "s", 0.15)}

    def dots(axis: Axes, name: str, color: str, marker: str, shift: float = 0.0) -> None:
        points = [mean_and_error(values[name]) for values in summary.values()]
        mean, error = np.transpose(points)
        axis.errorbar(mean, rows + shift, xerr=error, fmt=marker, color=color, capsize=2)

    for i, (task, (color, marker, shift)) in enumerate(looks.items()):
        dots(axes[0], f"{task} accuracy", color, marker, shift)
        dots(axes[1], f"{task} loss", color, marker, shift)
        axes[0].plot([], [], marker, color=color, label=f"{task} digit")  # the legend's entry
        if config["dataset"] == "mnist":
            paper = [PAPER.get(method, (np.nan, np.nan))[i] for method in summary]
            axes[0].plot(
                paper, rows + shift, marker, color=color, mfc="none", label=f"{task}, Zhou 2022"
            )
    dots(axes[2], "conflict", "tab:gray", "D")
    labels = ("test accuracy (%)", "test loss", "steps with conflicting gradients (%)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(rows, list(summary))
    axes[0].invert_yaxis()
    figure.suptitle(title_of(records))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def draw_batches(records: Sequence[Record], path: Path) -> None:
    """Saves the figure of table 2: test loss of every method by batch size, a column per pair."""
    groups = {size: summarize(group) for size, group in by_batch_size(records).items()}
    sizes = list(groups)
    shown = {name for summary in groups.values() for name in summary}
    columns: list[tuple[str, ...]] = [p for p in PAIRS.items() if shown.intersection(p)]
    columns += [(name,) for name in ORDER if name in shown.difference(*PAIRS.items())]
    figure = Figure(figsize=(max(4 * len(columns), 9), 5), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    looks = {"left": ("tab:blue", "o"), "right": ("tab:orange", "s")}
    for axis, pair in zip(axes, columns, strict=True):
        for (i, (task, (color, marker))), j in product(enumerate(looks.items()), range(len(pair))):
            method, line = pair[j], "--" if j else "-"
            points = [
                mean_and_error(summary[method][f"{task} loss"])
                if method in summary
                else (np.nan,) * 2
                for summary in groups.values()
            ]
            mean, error = np.transpose(points)
            x = np.arange(len(sizes)) + 0.03 * (2 * j + i - 1.5)
            look = {"color": color, "marker": marker, "ls": line}
            axis.errorbar(
                x, mean, yerr=error, capsize=2, label=f"{task}, {'CR-' if j else 'plain'}", **look
            )
            paper = [PAPER_LOSSES.get((method, size), (np.nan, np.nan))[i] for size in sizes]
            if np.isfinite(paper).any():
                label = f"{task}, {'CR-' if j else 'plain'}, Zhou 2022"
                axis.plot(x, paper, mfc="none", alpha=0.5, label=label, **look)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set(xlabel="batch size", title=pair[0])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test loss")
    figure.suptitle(title_of(records))
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def conclude(records: Sequence[Record]) -> str:
    """Returns how far the methods lie from the baseline, on the same seeds; "" without it."""
    accuracy = finals(records, "accuracy")
    distances, sizes = {}, {size for size, _ in accuracy}
    for (size, method), values in accuracy.items():
        baseline = accuracy.get((size, BASELINE))
        if len(sizes) > 1 or method == BASELINE or baseline is None or len(values) < 2:
            continue
        if len(values) != len(baseline):
            continue
        errors = [
            np.hypot(*(x.std(ddof=1) / len(x) ** 0.5 for x in pair))
            for pair in zip(values.T, baseline.T, strict=True)
        ]
        gaps = np.abs(values.mean(axis=0) - baseline.mean(axis=0))
        distances[method] = max(g / e if e else 0.0 for g, e in zip(gaps, errors, strict=True))
    if not distances:
        return ""
    farthest = max(distances, key=lambda method: distances[method])
    beyond = [method for method, distance in distances.items() if distance > 2]
    text = (
        f"No method differs from {BASELINE} in accuracy by more than two of its standard errors"
        if not beyond
        else f"Beyond two standard errors of {BASELINE} in accuracy: {', '.join(beyond)}"
    )
    text += f" (the farthest is {farthest}, {distances[farthest]:.1f})."
    if {"upgrad", "pcgrad"} <= set(distances):
        text += (
            " With two tasks UPGrad has PCGrad's direction, half its length: the study scales"
            " PCGrad, a sum, to the mean, so that their difference is rounding alone."
        )
    return text


# --- claims -------------------------------------------------------------------------------------


Final = dict[tuple[int, str], np.ndarray]  # batch size and method -> (seeds, 2)


def finals(records: Sequence[Record], quantity: str) -> Final:
    """Returns a quantity of both tasks after the last epoch, seeds in order."""
    return {
        (size, method): np.transpose([summary[f"{task} {quantity}"] for task in TASKS])
        for size, group in by_batch_size(records).items()
        for method, summary in summarize(group).items()
    }


def both_tasks(values: np.ndarray, digits: int) -> str:
    """Returns the left and the right mean with errors of (seeds, 2) differences."""
    return " and ".join(show(column.tolist(), digits=digits, sign="+") for column in values.T)


def both_gains(text: str, source: str, gain: np.ndarray, digits: int, paper: str) -> Claim:
    """Returns the claim that gains (seeds, 2) exceed their errors on both tasks."""
    conditions = [above_error(column) for column in gain.T]
    return claim(text, source, both_tasks(gain, digits), conditions, paper=paper)


def claims_of_table1(records: Sequence[Record]) -> Iterator[Claim]:
    """Judges that each CR- form is more accurate than its plain method."""
    accuracy = finals(records, "accuracy")
    for size, plain in accuracy:
        reduced = PAIRS.get(plain)
        if reduced is not None and (size, reduced) in accuracy:
            yield both_gains(
                f"`{reduced}` is more accurate than `{plain}` on both digits of MultiMNIST (%)",
                "Zhou 2022, table 1",
                accuracy[size, reduced] - accuracy[size, plain],
                2,
                paper="{:+.2f} and {:+.2f}".format(*np.subtract(PAPER[reduced], PAPER[plain])),
            )


def claims_of_table2(records: Sequence[Record]) -> Iterator[Claim]:
    """Judges what batches of 8, 4 and 2 do; each condition is a mean above its error, per task."""
    loss = finals(records, "loss")
    sizes = list(by_batch_size(records))
    if len(sizes) < 2:
        return
    large, small = sizes[0], sizes[-1]
    known = {name for _, name in loss if all((size, name) in loss for size in sizes)}
    theirs = {key: np.array(pair) for key, pair in PAPER_LOSSES.items()}
    if "mgda" in known:
        growth = theirs["mgda", small] - theirs["mgda", large]
        yield both_gains(
            f"The loss of `mgda` grows as the batch shrinks from {large} to {small}",
            "Zhou 2022, table 2",
            loss[small, "mgda"] - loss[large, "mgda"],
            3,
            paper="{:+.2f} and {:+.2f}".format(*growth),
        )
    for plain, reduced in PAIRS.items():
        if not {plain, reduced} <= known:
            continue
        gains = {size: loss[size, plain] - loss[size, reduced] for size in sizes}
        paper = {b: theirs[plain, b] - theirs[reduced, b] for b in sizes if (plain, b) in theirs}
        yield claim(
            f"The loss of `{reduced}` is lower than that of `{plain}` at every batch size",
            "Zhou 2022, table 2 and section 6",
            "; ".join(f"{b}: {both_tasks(gain, 3)}" for b, gain in gains.items()),
            [above_error(column) for gain in gains.values() for column in gain.T],
            paper="; ".join("{}: {:+.2f} and {:+.2f}".format(b, *v) for b, v in paper.items()),
        )
        yield both_gains(
            f"That advantage of `{reduced}` is larger at batch size {small} than at {large}",
            "Zhou 2022, table 2 and section 1",
            gains[small] - gains[large],
            3,
            paper="{:+.2f} and {:+.2f}".format(*(paper[small] - paper[large])) if paper else "",
        )


def claims(folder: Path) -> list[Claim]:
    """Returns the claims of both tables that the results in ``folder`` decide.

    Differences are paired over seeds; a condition holds if their mean has the claimed sign and
    exceeds its standard error. A claim needs the condition on both digits.
    """
    table1, table2 = (read_records(folder / f"{name}.jsonl") for name in ("mnist", "mnist_batches"))
    return [
        *differing(claims_of_table1(table1), differs(table1)),
        *differing(claims_of_table2(table2), differs(table2)),
    ]


def differs(records: Sequence[Record]) -> str:
    """Returns what differs from Zhou et al. in the runs of a table, who leave much open."""
    if not records:
        return ""
    config, seeds = records[0]["config"], len({record["seed"] for record in records})
    size, steps = config["batch_size"], config["max_steps"]
    length = (
        f"{steps * size:,} examples" if steps else f"{config['epochs']} epoch of batches of {size}"
    )
    own = f"{seeds} seeds in place of 3 runs; " if seeds != 3 else ""
    return (
        f"{own}{length} (not stated), a canvas of {config['canvas']} x {config['canvas']}, LeNet "
        "without dropout, rates and hence alpha fall as 1 / sqrt(1 + k / 100)"
    )


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns the table and the figure of a data set."""
    records = read_records(folder / f"{args.dataset}.jsonl")
    if not records:
        return Report([], {})
    drawer = draw if len(by_batch_size(records)) == 1 else draw_batches
    figures = {f"{args.dataset}.png": partial(drawer, records)}
    return Report([make_table(records)], figures, conclude(records))
