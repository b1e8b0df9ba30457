"""Tables, figures and verdicts of instance-wise training, from its results files alone."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import Claim, changed, claim, differing, mean_and_error, not_runnable, show
from experiments.study import Record, Report, Table, read_records

DATASETS = ("mnist", "fashion_mnist", "cifar10", "kmnist", "eurosat", "svhn")
ADAM = ("adam", "adam_svhn")
PARTS = (*DATASETS, "batch_size", *ADAM)
FIGURES = tuple(f"{name}.png" for name in PARTS)
PAPER = "Quinton and Rey 2024"

# Table 7: seconds per epoch on an NVIDIA L4.
_RULES = (
    *("sgd", "mean", "mgda", "dual_proj", "pcgrad", "graddrop", "imtl_g", "cagrad", "rgw"),
    *("nash_mtl", "aligned_mtl", "upgrad"),
)
_SECONDS = {
    "cifar10": (0.50, 1.76, 5.22, 1.88, 3.13, 1.90, 1.79, 2.26, 1.76, 8.12, 1.98, 2.01),
    "mnist": (0.47, 1.64, 5.22, 1.76, 3.01, 1.78, 1.69, 2.17, 1.73, 7.91, 1.71, 1.90),
    "svhn": (0.79, 1.41, 5.50, 1.51, 2.78, 1.57, 1.48, 1.93, 1.42, 7.88, 1.53, 1.80),
    "eurosat": (0.81, 2.93, 6.91, 3.02, 4.18, 3.06, 2.94, 3.42, 2.89, 9.33, 2.97, 3.21),
}
TABLE7 = {name: dict(zip(_RULES, row, strict=True)) for name, row in _SECONDS.items()}
# Shown three at a time beside the mean and UPGrad, as the paper does for readability.
PANELS = (
    ("dual_proj", "dual_proj_ridge_largest", "dual_proj_ridge", "mgda"),
    ("pcgrad", "graddrop", "rgw", "cagrad"),
    ("imtl_g", "nash_mtl", "aligned_mtl"),
)
COLORS = {
    "mean": "black",
    "upgrad": "tab:pink",
    "upgrad_ridge_largest": "tab:brown",
    "upgrad_ridge": "tab:red",
}
OTHERS = ("tab:blue", "tab:green", "tab:orange", "tab:purple")
# With 1e-4 of the Gramian's largest eigenvalue on its diagonal, as the code of the paper's time has
# it, or of its trace; else as they are defined.
RIDGES = {"_ridge_largest": "the paper's ridge", "_ridge": "a ridge of the trace"}
FORMS = {f"upgrad{end}": f"UPGrad with {ridge}" for end, ridge in RIDGES.items()} | {
    "upgrad": "UPGrad as defined"
}
WORSE = {
    "rgw": "RGW's randomness costs training loss",
    "graddrop": "GradDrop's randomness costs training loss",
    "nash_mtl": "Nash-MTL disappoints, they suspect because of its code",
}

COARSE = 22  # rates, over which the search walks; the full one tries 50 more
# Where the subsets of 1,024 are drawn from, if not from the whole training part.
IMAGES = {
    "cifar10": "of the first 10,000 training images",
    "kmnist": "of the 10,000 test images",
    "eurosat/rgb": "of 4,000 of 27,000 images",
}

Best = dict[str, list[Record]]  # of each aggregator, the record of the best rate of each seed


def settings_in(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns the settings, in order of appearance."""
    found: list[dict[str, Any]] = []
    for record in records:
        if record["setting"] not in found:
            found.append(record["setting"])
    return found


def best_of(records: Sequence[Record], setting: dict[str, Any]) -> Best:
    """Returns the trainings at the rate with the least area under the loss curve, per seed."""
    best: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["setting"] == setting and record["area"] is not None:
            seeds = best.setdefault(record["aggregator"], {})
            if record["seed"] not in seeds or record["area"] < seeds[record["seed"]]["area"]:
                seeds[record["seed"]] = record
    return {name: [seeds[s] for s in sorted(seeds)] for name, seeds in best.items()}


def final(best: Best, name: str) -> list[float]:
    """Returns the loss on all examples after training, per seed."""
    return [r["final_loss"] for r in best[name]]


def mean(values: Sequence[float]) -> float:
    """Returns the mean."""
    return mean_and_error(values)[0]


def area(best: Best, name: str) -> float:
    """Returns the area under the loss curve, averaged over seeds."""
    return mean([r["area"] for r in best[name]])


def compare(best: Best, first: str, second: str) -> tuple[str, list[bool]]:
    """Returns both final losses in words, and whether the first is better.

    That is: final loss and area are lower, and the area by more than its standard error, which a
    single seed does not have. The seeds that both have are compared: they share subset, initial
    parameters and batches.
    """
    by_seed = [{r["seed"]: r for r in best[name]} for name in (first, second)]
    both = [(by_seed[0][s], by_seed[1][s]) for s in by_seed[0] if s in by_seed[1]]
    a, b = ([pair[i]["final_loss"] for pair in both] for i in (0, 1))
    text = f"{show(a, digits=4)} against {show(b, digits=4)}"
    lower = [mean([p["final_loss"] - q["final_loss"] for p, q in both]) < 0]
    difference, error = mean_and_error([p["area"] - q["area"] for p, q in both])
    lower += [difference < 0, difference + error < 0]
    return text if len(both) > 1 else f"{text} (one seed)", lower


def best_by_part(folder: Path) -> dict[str, list[tuple[dict[str, Any], Best]]]:
    """Returns the settings of every part and their best trainings."""
    parts = {}
    main = [r for name in DATASETS for r in read_records(folder / f"{name}.jsonl")]
    for name in PARTS:
        records = read_records(folder / f"{name}.jsonl")
        if name == "batch_size" and records:  # whose batch of 32 is in the data set's own part
            same = records[0]["setting"] | {"batch_size": 32}
            rules = {r["aggregator"] for r in records}
            records += [r for r in main if r["setting"] == same and r["aggregator"] in rules]
            records.sort(key=lambda r: r["setting"]["batch_size"])
        parts[name] = [(s, best_of(records, s)) for s in settings_in(records)]
    return parts


def title_of(setting: dict[str, Any], best: Best) -> str:
    """Returns what a table or figure shows."""
    seeds = sorted({len(records) for records in best.values()})
    count = "-".join(str(n) for n in (seeds if len(seeds) < 2 else (seeds[0], seeds[-1])))
    return (
        f"IWRM on {setting['examples']} images of {setting['dataset']}, "
        f"{setting['optimizer']}, batch {setting['batch_size']}, {setting['epochs']} epochs, "
        f"{count} seed{'s' if count != '1' else ''}"
    )


# --- claims -------------------------------------------------------------------------------------


def claims(folder: Path) -> list[Claim]:
    """Returns what the paper says beside what the results say.

    One aggregator is better than another by the criteria of ``compare``: a claim that rests on one
    seed is reproduced partly at best.
    """
    parts = best_by_part(folder)
    found: list[Claim] = []
    for name in DATASETS:
        for setting, best in parts[name]:
            made = claims_of_dataset(setting, best)
            found += differing(made, differs(folder, name, setting, best))
    if any(parts[name] for name in DATASETS):
        found += [not_run(part) for part in NOT_RUN if not parts[part]]
    for setting, best in parts["batch_size"][:1]:
        made = claims_of_batch_size(parts["batch_size"])
        found += differing(made, differs(folder, "batch_size", setting, best))
    plain = {s["dataset"]: best for name in DATASETS for s, best in parts[name]}
    for name in ADAM:
        for setting, best in parts[name]:
            made = claims_of_adam(setting, best, plain.get(setting["dataset"]))
            found += differing(made, differs(folder, name, setting, best))
    times = claims_of_time(read_records(folder / "time.jsonl"))
    where = "a CPU in place of an NVIDIA L4; weights of the Gramian where a rule has them"
    return [*found, *differing(times, where)]


def differs(folder: Path, part: str, setting: dict[str, Any], best: Best) -> str:
    """Returns what differs from the paper's set-up."""
    records = read_records(folder / f"{part}.jsonl")
    tried = Counter((r["aggregator"], r["seed"]) for r in records if r["setting"] == setting)
    full = sum(rates > COARSE for rates in tried.values())
    search = f"a walk over {COARSE} coarse rates in place of 72"
    search += f" but in {full} of {len(tried)} searches" * (full > 0)
    seeds = [len(records) for records in best.values()]
    counts = {"seeds": min(seeds) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"}
    images = IMAGES.get(setting["dataset"], "")
    ridge = "ridge: 1e-4 of the trace or none, theirs of the largest eigenvalue"
    ridge = "" if "upgrad_ridge_largest" in best else ridge
    search = search if full < len(tried) else ""
    return "; ".join(filter(None, (images, changed(counts, {"seeds": 8}), search, ridge)))


# What the paper says of a data set that is not at hand, by part: claim, figure, parts to run.
NOT_RUN = {
    "svhn": (
        "UPGrad is the best of eleven aggregators, DualProj better than the mean",
        "section 5, figures 2, 3",
        "svhn",
    ),
    "adam_svhn": (
        "with Adam UPGrad beats the mean, by less than with SGD",
        "appendix D.3, figure 10",
        "svhn adam_svhn",
    ),
}


def not_run(part: str) -> Claim:
    """Returns what the paper says of a part that has not run, with the command that decides it."""
    text, where, names = NOT_RUN[part]
    command = f"python -m experiments.iwrm --parts {names} --paper --full-search"
    return not_runnable(f"svhn_cropped: {text}", f"{PAPER}, {where}", command)


def claims_of_dataset(setting: dict[str, Any], best: Best) -> Iterator[Claim]:
    """Yields the claims of section 5 and appendix D.1."""

    def said(
        text: str, ours: str, conditions: Sequence[bool], where: str = "section 5, figures 2-8"
    ) -> Claim:
        return claim(f"{setting['dataset']}: {text}", f"{PAPER}, {where}", ours, conditions)

    for name, form in FORMS.items():
        if {name, "mean"} <= set(best):
            faster = f"{form} converges faster than the mean (loss after training)"
            yield said(faster, *compare(best, name, "mean"))
            curve = np.mean([r["cosine"] for r in best[name]], axis=0)
            early, late = curve[: len(curve) // 2].min(), curve[-1]
            text = f"{early:.2f} in the first half, {late:.2f} at the end"
            low = f"{form}: low cosine to the mean early, higher later"
            yield said(low, text, [late > early, len(best[name]) > 1])
    for end, ridge in RIDGES.items():
        upgrad, dual_proj = f"upgrad{end}", f"dual_proj{end}"
        if {dual_proj, "mean", upgrad} <= set(best):
            ours, lower = compare(best, dual_proj, "mean")
            _, less = compare(best, upgrad, dual_proj)
            text = f"DualProj with {ridge} is better than the mean, less than UPGrad"
            yield said(text, ours, [*lower, *less])
    if {"mgda", "mean"} <= set(best):
        text = "MGDA is worse than the mean (mean's loss against MGDA's)"
        yield said(text, *compare(best, "mean", "mgda"))
    for end, ridge in RIDGES.items():
        upgrad, dual_proj = f"upgrad{end}", f"dual_proj{end}"
        others = [name for name in best if not name.startswith(("upgrad", "dual_proj"))]
        if len(others) >= 7 and upgrad in best:
            rivals = [*others, upgrad, *({dual_proj} & set(best))]
            order = sorted(rivals, key=lambda name: area(best, name))
            rank = order.index(upgrad) + 1
            text = f"rank {rank} of {len(order)} by area (first: {', '.join(order[:3])})"
            yield said(f"UPGrad with {ridge} is the best", text, [rank == 1, rank <= 3])
    for name, worse in WORSE.items():
        if {name, "mean"} <= set(best):
            text = f"{worse} (mean's loss against its)"
            yield said(text, *compare(best, "mean", name), "appendix D.1")


def gap(best: Best, name: str) -> float:
    """Returns the logarithm of the area of the mean over that of a rule, averaged over seeds."""
    areas = [{r["seed"]: r["area"] for r in best[n]} for n in ("mean", name)]
    return mean([float(np.log(a / areas[1][s])) for s, a in areas[0].items() if s in areas[1]])


def claims_of_batch_size(part: Sequence[tuple[dict[str, Any], Best]]) -> Iterator[Claim]:
    """Yields the claim of appendix D.2."""
    for name, form in FORMS.items():
        gaps = {s["batch_size"]: gap(b, name) for s, b in part if {"mean", name} <= set(b)}
        if len(gaps) < 2:
            continue
        sizes = sorted(gaps)
        text = ", ".join(f"{np.exp(gaps[b]):.2f} at {b}" for b in sizes)
        smallest = min(gaps, key=lambda b: abs(gaps[b]))
        seeds = min(len(b[name]) for s, b in part if s["batch_size"] in gaps)
        yield claim(
            f"{part[0][0]['dataset']}: the lead over the mean grows with the batch ({form})",
            f"{PAPER}, appendix D.2, figure 9",
            f"area of the mean over its own: {text} (seeds: at least {seeds})",
            [gaps[sizes[-1]] > gaps[sizes[0]], smallest == sizes[0], seeds > 1],
            paper="very similar at 4, a gap at 64",
        )


def claims_of_adam(setting: dict[str, Any], best: Best, plain: Best | None) -> Iterator[Claim]:
    """Yields the claims of appendix D.3."""
    source, where = f"{PAPER}, appendix D.3, figure 10", f"{setting['dataset']}, Adam"
    for name, form in FORMS.items():
        if not {"mean", name} <= set(best):
            continue
        yield claim(f"{where}: {form} beats the mean", source, *compare(best, name, "mean"))
        if plain is not None and {"mean", name} <= set(plain):
            leads = gap(best, name), gap(plain, name)
            text = "area of the mean over its own: {:.2f} with Adam, {:.2f} with SGD"
            smaller = f"{where}: the lead is smaller than with SGD ({form})"
            conditions = [0 < leads[0] < leads[1], len(best[name]) > 1]
            yield claim(smaller, source, text.format(*np.exp(leads)), conditions)


def claims_of_time(records: Sequence[Record]) -> Iterator[Claim]:
    """Yields the claims of table 7, as ratios to SGD."""
    slow = ("mgda", "nash_mtl")
    for network, paper in TABLE7.items():
        ours = {r["aggregator"]: r for r in records if r["network"] == network}
        if not ours:
            continue
        ratios = {name: paper[name] / paper["sgd"] for name in paper}
        ratio = {name: ours[name]["time_ratio"] for name in ours}
        others = [r for name, r in ratio.items() if name not in (*slow, "sgd")]
        yield claim(
            f"{network} network: MGDA and Nash-MTL take the longest",
            f"{PAPER}, table 7",
            ", ".join(f"{name} {ratio[name]:.2f} x SGD" for name in slow),
            [ratio[name] > max(others) for name in slow],
            paper=", ".join(f"{name} {ratios[name]:.1f} x SGD" for name in slow),
        )
        flops = ours["upgrad"]["flops_ratio"]
        operations = "" if flops is None else f", {flops:.2f} x its operations"
        yield claim(
            f"{network} network: by the Gramian a step of UPGrad costs less than with rows",
            f"{PAPER}, section 6 and table 7",
            f"{ratio['upgrad']:.2f} x SGD{operations}",
            [ratio["upgrad"] < ratios["upgrad"], ratio["upgrad"] < 2],
            paper=f"{ratios['upgrad']:.1f} x SGD with the Jacobian",
        )


# --- tables and figures -------------------------------------------------------------------------


def make_table(setting: dict[str, Any], best: Best) -> Table:
    """Returns the table of a setting, the best aggregator first."""
    rows = []
    for name in sorted(best, key=lambda name: mean(final(best, name))):
        records = best[name]
        rates = sorted({r["learning_rate"] for r in records})
        rows.append(
            (
                name,
                show(final(best, name), digits=4),
                show([r["area"] for r in records], digits=4),
                show([float(np.mean(r["cosine"])) for r in records], digits=3),
                " - ".join(f"{rate:.3g}" for rate in dict.fromkeys((rates[0], rates[-1]))),
                str(len(records)),
            )
        )
    header = ("aggregator", "final loss", "area / step", "cosine to mean", "learning rate", "seeds")
    return Table(title_of(setting, best), header, rows)


def make_time_table(records: Sequence[Record]) -> Table:
    """Returns seconds per epoch and ratios to SGD, beside table 7."""
    rows = []
    for r in records:
        paper = TABLE7[r["network"]]
        theirs = paper[r["aggregator"].partition("_ridge")[0]] / paper["sgd"]
        operations = "" if r["flops_ratio"] is None else f"{r['flops_ratio']:.3f}"
        cells = f"{r['seconds_per_epoch']:.2f}", f"{r['time_ratio']:.2f}", operations
        rows.append((r["network"], r["aggregator"], *cells, f"{theirs:.2f}"))
    title = "One epoch of 32 steps of 32 examples; ratios to SGD, table 7 beside"
    header = ("network", "rule", "s per epoch", "x SGD", "operations x SGD", "paper x SGD")
    return Table(title, header, rows, names=2)


def curve(axis: Any, records: Sequence[Record], quantity: str, **look: Any) -> None:
    """Draws the mean over seeds with a band of one standard error."""
    values = np.array([r[quantity] for r in records], float)
    epochs = np.arange(1, values.shape[1] + 1)
    middle = values.mean(axis=0)
    axis.plot(epochs, middle, **look)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(epochs, middle - error, middle + error, color=look["color"], alpha=0.15)


def draw(path: Path, panels: Sequence[tuple[str, Best, Sequence[str]]], title: str) -> None:
    """Saves a figure with the loss above and the cosine below, one column per panel."""
    if len(panels) == 1:  # side by side
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots(1, 2).reshape(2, 1)
        axes[0, 0].set_xlabel("epoch")
    else:
        figure = Figure(figsize=(3.8 * len(panels), 6), layout="constrained")
        axes = figure.subplots(2, len(panels), sharex="col", sharey="row")
    for column, (header, best, names) in enumerate(panels):
        for name in ("mean", *names, *FORMS):
            if name not in best:
                continue
            color = COLORS.get(name) or OTHERS[list(names).index(name) % len(OTHERS)]
            for axis, quantity in zip(axes[:, column], ("loss", "cosine"), strict=True):
                width = 2.2 if name in COLORS else 1.4
                curve(axis, best[name], quantity, color=color, label=name, linewidth=width)
        axes[0, column].set_title(header, fontsize=10)
        axes[0, column].legend(fontsize=8, loc="lower left")
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("training loss of the epoch")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(top=min(axes[0, 0].get_ylim()[1], 6))  # guessing has log 10 = 2.3
    axes[1, 0].set_ylabel("cosine to the mean gradient")
    for axis in axes.ravel():
        axis.grid(alpha=0.3, which="both")
    note = "*_ridge, *_ridge_largest: 1e-4 of trace, largest eigenvalue on the Gramian's diagonal"
    figure.suptitle(f"{title}\n{note}", fontsize=11)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns the tables and figures of what the folder holds."""
    del args
    parts = best_by_part(folder)
    tables = [make_table(*found) for part in parts.values() for found in part]
    times = read_records(folder / "time.jsonl")
    figures = {
        f"{name}.png": partial(draw_part, name, part) for name, part in parts.items() if part
    }
    tables += [make_time_table(times)] if times else []
    return Report(tables, figures, conclude([found for name in DATASETS for found in parts[name]]))


def conclude(found: Sequence[tuple[dict[str, Any], Best]]) -> str:
    """Returns, of every data set, the aggregator with the least area beside the mean."""
    least = []
    for setting, best in found:
        if len(best) > 1 and "mean" in best:
            first = min((name for name in best if name != "mean"), key=partial(area, best))
            _, better = compare(best, first, "mean")
            areas = (show([r["area"] for r in best[name]], digits=4) for name in (first, "mean"))
            sure = "" if better[-1] else ", undecided"
            least.append("{}: {} ({}; mean {}{})".format(setting["dataset"], first, *areas, sure))
    return f"Least area under the loss curve, mean apart: {'; '.join(least)}." if least else ""


def draw_part(name: str, part: Sequence[tuple[dict[str, Any], Best]], path: Path) -> None:
    """Saves the figure of a part, one panel per setting or group of aggregators."""
    setting, best = part[0]
    title = title_of(setting, best)
    panels: list[tuple[str, Best, Sequence[str]]] = [
        (f"batch {s['batch_size']}" if len(part) > 1 else "", b, sorted(set(b) - set(COLORS)))
        for s, b in part
    ]
    if name in DATASETS:
        panels = [("", best, p) for p in PANELS if set(p) & set(best)] or [("", best, ())]
    if name == "batch_size":
        title = title.replace(f"batch {setting['batch_size']}, ", "")
    draw(path, panels, title)
