"""Tables, figures and verdicts of the tables, from their results files alone."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import rankdata, ttest_1samp

import jaxmtl
from experiments.claims import Claim, claim, differing, listed, mean_and_error, show
from experiments.methods import needs
from experiments.study import Record, Report, Table, read_records
from experiments.tabular.data import CENSUS_TASKS, TASKS
from experiments.tabular.methods import METHODS, SINGLE

Results = dict[str, Record]  # of one model: by the name of the method; swept ones by their weights


def read_results(folder: Path, dataset: str) -> dict[str, Results]:
    """Returns the records of a data set by model and method."""
    results: dict[str, Results] = {}
    for record in read_records(folder / f"{dataset}.jsonl"):
        results.setdefault(record["model"], {})[label_of(record)] = record
    return results


def label_of(record: Record) -> str:
    """Returns the name of a method with its setting."""
    if record["setting"] is None:
        return str(record["method"])
    if len(record["setting"]) == 2:
        return "weights " + " : ".join(f"{weight:.2f}" for weight in record["setting"])
    return "weights #" + str(np.round(100 * np.asarray(record["setting"])).astype(int).tolist())


def measure_of(record: Record) -> tuple[str, int]:
    """Returns the name of a record's first measure, and 1 if larger is better, else -1."""
    return ("auc", 1) if "test_auc" in record else ("rrmse", -1)


def tested(record: Record) -> np.ndarray:
    """Returns the first measure (seeds, m) on the test set."""
    return np.asarray(record[f"test_{measure_of(record)[0]}"])


def is_swept(record: Record) -> bool:
    """Tells whether a record belongs to the sweep of a rule's settings."""
    return record["setting"] is not None


def rules_of(results: Results) -> Results:
    """Returns the records of rules: neither single tasks nor scalarizations."""
    baselines = (SINGLE, "linear_scalarization")
    return {k: v for k, v in results.items() if k not in baselines and not is_swept(v)}


def tuned_of(results: Results) -> Record:
    """Returns the scalarization, equal weights included, of the best validation mean."""
    swept = [r for k, r in results.items() if is_swept(r) or k == "linear_scalarization"]
    name, sign = measure_of(swept[0])
    return max(swept, key=lambda record: sign * np.mean(record[f"validation_{name}"]))


def drops(record: Record, single: Record) -> np.ndarray:
    """Returns delta_m (seeds,) in percent against the mean of the single-task networks."""
    baseline = tested(single).mean(axis=0)
    higher = np.full(baseline.shape, measure_of(single)[1] > 0)
    return np.asarray(_drops(tested(record), baseline, higher))


@jax.jit
def _drops(values: jax.Array, baselines: jax.Array, higher: jax.Array) -> jax.Array:
    one = partial(jaxmtl.metrics.delta_m, baselines=baselines, higher_is_better=higher)
    return jax.vmap(one)(values)


def mean_ranks(results: Results) -> dict[str, float]:
    """Returns the rank of each method's mean on the test set, averaged over tasks; 1 is best."""
    losses = np.stack([-measure_of(r)[1] * tested(r).mean(axis=0) for r in results.values()])
    return dict(zip(results, rankdata(losses, axis=0).mean(axis=1), strict=True))


class Rival(NamedTuple):
    """The rule that gains most over a scalarization, seed by seed."""

    name: str
    gains: np.ndarray  # (seeds,) of delta_m, in percent: positive is better than scalarization
    beyond: int  # rules whose mean gain exceeds two standard errors
    significant: int  # rules that are better by a one-sided paired t-test, 5 % in all (Bonferroni)
    rules: int


def best_rival(results: Results, single: Record, reference: Record) -> Rival:
    """Compares all rules with one scalarization on the test set."""
    rules = rules_of(results)
    base = drops(reference, single)
    gains = {name: base - drops(record, single) for name, record in rules.items()}
    best = max(gains, key=lambda name: gains[name].mean())
    beyond = significant = 0
    for gain in gains.values():
        mean, error = mean_and_error(gain.tolist())
        beyond += mean > 2 * error
        p = ttest_1samp(gain, 0, alternative="greater").pvalue if gain.std() else 1.0
        significant += p < 0.05 / len(gains)
    return Rival(best, gains[best], beyond, significant, len(gains))


def beyond_front(results: Results) -> list[str]:
    """Returns the rules that no scalarization matches on all tasks within two standard errors."""
    front = [r for k, r in results.items() if is_swept(r) or k == "linear_scalarization"]
    found = []
    for name, record in rules_of(results).items():
        test = np.asarray(record["test_auc"])
        gaps = [test - np.asarray(other["test_auc"]) for other in front]  # (seeds, m), paired
        errors = [gap.std(axis=0, ddof=1) / np.sqrt(len(gap)) for gap in gaps]
        if all((g.mean(axis=0) > 2 * e).any() for g, e in zip(gaps, errors, strict=True)):
            found.append(name)
    return found


def setups(folder: Path) -> dict[str, tuple[Results, Record]]:
    """Returns, for every data set and model at hand, its results and the single-task record."""
    found = {}
    for dataset in TASKS:
        results = read_results(folder, dataset)
        singles = [models[SINGLE] for models in results.values() if SINGLE in models]
        for model, records in results.items():
            complete = "linear_scalarization" in records and rules_of(records)
            if singles and complete:
                found[f"{dataset}, {model}"] = records, singles[0]
    return found


def claims(folder: Path) -> list[Claim]:
    """Returns what the papers claim beside what the records say.

    A scalarization *matches* the rules of a set-up if none has a better delta_m by a one-sided
    t-test, paired by seed, at 5 % for all of them together (Bonferroni). Shown are the rule that
    gains most, and how many gain more than two standard errors, uncorrected.
    """
    found = setups(folder)
    if not found:
        return []

    def against(text: str, source: str, name: str, pick: Callable[[Results], Record]) -> Claim:
        rivals = {key: best_rival(*setup, pick(setup[0])) for key, setup in found.items()}
        ours = "; ".join(
            f"{key}: best of {r.rules} {r.name} {show(r.gains.tolist(), digits=2)} %, "
            f"{r.beyond} beyond 2 errors, {r.significant} significant"
            for key, r in rivals.items()
        )
        ours = f"gain in delta_m over {name} weights: {ours}"
        return claim(text, source, ours, [r.significant == 0 for r in rivals.values()])

    equal, tuned = (
        "Equal weights match every multi-task optimizer",
        "Scalarization with weights tuned on validation data matches every optimizer",
    )
    counts = sorted({len(single["seeds"]) for _, single in found.values()})
    seeds = f"{', '.join(map(str, counts))} seeds"
    made = [
        against(equal, "Kurin 2022", "equal", lambda results: results["linear_scalarization"]),
        against(tuned, "Xin 2022", "tuned", tuned_of),
    ]
    planes = {n: beyond_front(r) for n, (r, _) in found.items() if n.startswith("census")}
    if planes:
        text = "; ".join(
            f"{name}: {len(rules)} rules beyond" + (f" ({', '.join(rules)})" if rules else "")
            for name, rules in planes.items()
        )
        made += [
            claim(
                "No optimizer leaves the front that swept weights trace",
                "Xin 2022",
                f"better than each weighting on some task by 2 errors, {text}",
                [not rules for rules in planes.values()],
            )
        ]
    made = differing(
        made,
        f"tables and small networks in place of their benchmarks; {seeds}; rules with their "
        "defaults, validation chooses rate and epochs alone",
    )
    if {"census, shared_bottom", "census, mmoe"} <= found.keys():
        bottom, mixture = (
            np.asarray(found[f"census, {model}"][0]["linear_scalarization"]["test_auc"])
            for model in ("shared_bottom", "mmoe")
        )
        gaps = dict(zip(CENSUS_TASKS, (100 * (mixture - bottom).T).tolist(), strict=True))
        points = [mean_and_error(gap) for gap in gaps.values()]
        text = listed(gaps, partial(show, digits=3), ", ")
        made += [
            claim(
                "Multi-gate mixture of experts beats the shared bottom on Census-Income",
                "Ma 2018",
                f"AUC in percent, difference with equal weights: {text}",
                [mean > 2 * error for mean, error in points],
                differs="one pass at one rate in place of their search over networks and rates; "
                f"{seeds}",
            )
        ]
    return made + cost_claim(found)


def cost_claim(found: dict[str, tuple[Results, Record]]) -> list[Claim]:
    """Returns the claim on costs, from the data set with many tasks."""
    results = found.get("yeast, shared_bottom", ({}, {}))[0]
    names = ("ldc_mtl", "famo", "go4align", "nash_mtl")
    if not all(name in results for name in names):
        return []
    ratio = {name: cost_ratio(results, results[name]) for name in names}
    nash = ratio["nash_mtl"] / ratio["ldc_mtl"]
    return [
        claim(
            "LDC-MTL, FAMO and GO4Align cost about one gradient, Nash-MTL many times LDC-MTL",
            "Xiao 2025, section 5 and figure 4",
            listed(ratio, "{:.2f}".format, ", ")
            + f" times scalarization; Nash-MTL {nash:.1f} times LDC-MTL (14 tasks)",
            [max(ratio[name] for name in names[:3]) <= 1.11, nash >= 2],
            paper="at most 1.11 times scalarization; Nash-MTL 12 times LDC-MTL (CelebA, 40 tasks)",
            differs="14 labels of a table in place of 40 of images; CPU time of a step",
        )
    ]


def cost_ratio(results: Results, record: Record) -> float:
    """Returns the CPU time of a step relative to linear scalarization."""
    base = results["linear_scalarization"]["microseconds_per_step"]
    return float(record["microseconds_per_step"] / base)


def make_table(name: str, results: Results, single: Record) -> Table:
    """Returns the table of a data set and model, best delta_m first."""
    tasks = TASKS[name.split(",")[0]]
    per_task = len(tasks) == 2
    binary = measure_of(single)[0] == "auc"
    headers = [f"{task} AUC %" for task in tasks] if per_task else ["AUC %", "precision %"]
    headers = headers if binary else ["RRMSE %"]
    shown = {k: r for k, r in results.items() if not is_swept(r)}
    tuned = tuned_of(results)
    shown[f"tuned: {label_of(tuned)}" if per_task else "tuned weights"] = tuned
    ranks = mean_ranks({k: r for k, r in shown.items() if k != SINGLE})
    shown.setdefault(SINGLE, single)
    rows = []
    for method, record in sorted(shown.items(), key=lambda item: drops(item[1], single).mean()):
        first = 100 * tested(record)
        quantities = list(first.T) if per_task else [first.mean(axis=1)]
        if binary and not per_task:
            quantities += [100 * np.mean(record["test_average_precision"], axis=1)]
        cells = [show(values.tolist(), digits=2) for values in quantities]
        cells.append(show(drops(record, single).tolist(), digits=2))
        alone = method == SINGLE
        cells.append("" if alone else f"{ranks[method]:.1f}")
        cells.append("" if is_swept(record) or alone else f"{cost_ratio(results, record):.2f}")
        cells += ["", ""] if alone else [f"{record['learning_rate']:g}", str(record["epochs"])]
        rows.append([method, *cells])
    title = f"{name}: test set, mean ± standard error over seeds"
    return Table(title, ["method", *headers, "delta_m %", "rank", "cost", "rate", "epochs"], rows)


COLORS = {"none": "tab:green", "Gramian": "tab:blue", "coordinates": "tab:orange"}
LABELS = ("weights, then one backward pass", "weights of the Gramian", "coordinates")


def color_of(method: str) -> str:
    """Returns the color of what a method has to see of the gradients."""
    return COLORS[needs(METHODS[method])]


def color_legend(figure: Figure, extra: Sequence[Any] = ()) -> None:
    """Adds the legend of colors below."""
    dots = [
        Line2D([], [], marker="o", ls="", color=color, label=label)
        for label, color in zip(LABELS, COLORS.values(), strict=True)
    ]
    figure.legend(handles=[*dots, *extra], loc="outside lower center", ncols=3, frameon=False)


def draw_plane(found: dict[str, tuple[Results, Record]], path: Path) -> None:
    """Saves the plane of the two areas under the curve: one row per network, whole and enlarged."""
    figure = Figure(figsize=(11.5, 0.9 + 4.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for (whole, near), (name, (results, single)) in zip(panels, found.items(), strict=True):
        draw_panel(whole, results, single, numbers=False)
        draw_panel(near, results, single, numbers=True)
        points = np.array([np.mean(r["test_auc"], axis=0) for r in rules_of(results).values()])
        low, high = 100 * np.quantile(points, [0.1, 0.9], axis=0)
        margin = np.maximum(high - low, 0.01)
        near.set_xlim(low[0] - margin[0], high[0] + margin[0])
        near.set_ylim(low[1] - margin[1], high[1] + margin[1])
        near.legend(
            fontsize=7, ncols=2, handlelength=0.5, loc="center left", bbox_to_anchor=(1, 0.5)
        )
        network = name.split(", ")[1].replace("_", " ")
        for axis, part in ((whole, "all weights"), (near, "enlarged")):
            axis.set_title(f"{network}: {part}")
            axis.set_xlabel(f"{CENSUS_TASKS[0]}: test AUC (%)")
            axis.set_ylabel(f"{CENSUS_TASKS[1]}: test AUC (%)")
            axis.grid(alpha=0.3)
            axis.ticklabel_format(useOffset=False)
            axis.locator_params(nbins=5)
    seeds = len(next(iter(found.values()))[1]["seeds"])
    figure.suptitle(f"Census-Income: rules beside swept weights (mean ± error, {seeds} seeds)")
    curve = Line2D(
        [], [], color="black", marker="s", ms=4, label="scalarization, by the weight of income"
    )
    alone = Line2D([], [], color="tab:red", ls="--", label="single-task networks")
    color_legend(figure, [curve, alone])
    figure.savefig(path, dpi=110)


def draw_panel(axis: Axes, results: Results, single: Record, *, numbers: bool) -> None:
    """Draws one panel: rules, the curve of weights, the single-task networks."""

    def point(record: Record) -> tuple[np.ndarray, np.ndarray]:
        columns = 100 * np.asarray(record["test_auc"]).T
        mean, error = np.transpose([mean_and_error(column.tolist()) for column in columns])
        return mean, error

    swept = {r["setting"][0]: point(r)[0] for r in results.values() if is_swept(r)}
    swept[0.5] = point(results["linear_scalarization"])[0]
    curve = sorted(swept.items())
    axis.plot(*np.transpose([mean for _, mean in curve]), "s-", color="black", ms=4, lw=1)
    for weight, (x, y) in curve:
        if numbers or not 0.2 < weight < 0.8:  # those lie close together
            axis.annotate(
                f"{weight:g}",
                (x, y),
                (5, -10),
                textcoords="offset points",
                fontsize=7,
                annotation_clip=True,
            )
    for line, value in zip((axis.axvline, axis.axhline), point(single)[0], strict=True):
        line(value, color="tab:red", ls="--", lw=1)
    for number, (method, record) in enumerate(rules_of(results).items(), 1):
        (x, y), (dx, dy) = point(record)
        color = color_of(method)
        size = 11 if numbers else 4
        axis.errorbar(x, y, xerr=dx, yerr=dy, color=color, lw=0.7, alpha=0.4)
        axis.plot(x, y, "o", color=color, ms=size, alpha=0.6, label=f"{number} {method}")
        if numbers:
            axis.annotate(
                str(number),
                (x, y),
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                annotation_clip=True,
            )


def draw_bars(found: dict[str, tuple[Results, Record]], path: Path) -> None:
    """Saves delta_m of every rule as bars with errors."""
    results, single = next(iter(found.values()))
    rules = rules_of(results)
    values = {name: mean_and_error(drops(r, single).tolist()) for name, r in rules.items()}
    names = sorted(values, key=lambda name: values[name][0])
    figure = Figure(figsize=(8, 1.8 + 0.22 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(
        names,
        [values[name][0] for name in names],
        xerr=[values[name][1] for name in names],
        color=[color_of(name) for name in names],
        error_kw={"lw": 1},
    )
    axis.invert_yaxis()
    axis.margins(y=0.01)
    lines = []
    baselines = {
        "equal weights": (results["linear_scalarization"], "black"),
        "weights tuned on validation data": (tuned_of(results), "tab:purple"),
    }
    for label, (record, color) in baselines.items():
        mean, error = mean_and_error(drops(record, single).tolist())
        lines.append(axis.axvline(mean, color=color, lw=1.2, label=label))
        axis.axvspan(mean - error, mean + error, color=color, alpha=0.12, lw=0, zorder=0)
    axis.set_xlabel("delta_m (%) against single-task networks; negative is better")
    axis.grid(axis="x", alpha=0.3)
    dataset, seeds = next(iter(found)).split(",")[0], len(single["seeds"])
    name = dataset.replace("_", " ").capitalize()
    labels = "labels" if measure_of(single)[0] == "auc" else "targets"
    figure.suptitle(
        f"{name}, {len(TASKS[dataset])} {labels}: mean ± standard error over {seeds} seeds"
    )
    color_legend(figure, lines)
    figure.savefig(path, dpi=120)


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns tables and figures of what the results files hold."""
    found = {k: v for k, v in setups(folder).items() if k.split(",")[0] in args.datasets}
    if not found:
        raise SystemExit(
            f"expected results in {folder}, {SINGLE}, linear_scalarization and a rule among them; "
            "run without --report-only first"
        )
    figures = {}
    for dataset in TASKS:
        draw = draw_plane if dataset == "census" else draw_bars
        mine = {k: v for k, v in found.items() if k.startswith(dataset)}
        if mine:
            figures[f"{dataset}.png"] = partial(draw, mine)
    tables = [make_table(name, *setup) for name, setup in found.items()]
    return Report(tables, figures, conclude(found))


def conclude(found: dict[str, tuple[Results, Record]]) -> str:
    """Returns, of every set-up, how many rules gain over equal weights."""
    rivals = {k: best_rival(*setup, setup[0]["linear_scalarization"]) for k, setup in found.items()}
    counts = (f"{k} {r.beyond} of {r.rules} ({r.significant})" for k, r in rivals.items())
    return (
        "Rules better than equal weights by more than two standard errors, and in brackets those "
        f"significant among all: {'; '.join(counts)}."
    )
