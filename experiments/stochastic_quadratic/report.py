"""What the results of the stochastic quadratics say: tables, figure and claims."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import (
    Claim,
    above_error,
    claim,
    differing,
    listed,
    mean_and_error,
    show,
)
from experiments.study import Record, Report, Table, read_records

NAME = "quadratic"  # of the results file
BASELINE = "linear_scalarization"  # its weights do not depend on the noise
STUDIED = ("mgda", "pcgrad", "cagrad(0.4)", "cagrad(0.9)")
# How the weights are averaged: "plain" not at all, else ``cr_mogm``'s alpha.
FORMS: dict[str, float | str | None] = {"plain": None, "cr": "corollary1", "cr 0.9": 0.9}
# The example's own; Gaussian with its covariance; Gaussian, independent in every entry.
NOISES = ("two-point", "gaussian", "isotropic")
DIFFERS = "both objectives draw apart, and CAGrad's c is 0.4 or 0.9 (not stated)"
NOISE_DIFFERS = {
    "gaussian": "noise of the two-point's covariance (only its name is known here)",
    "isotropic": "independent noise of the two-point's deviations (only its name is known here)",
}
GAP = 0.05  # theorem 1's proof: up to this distance every expected direction points away


def of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    """Returns the records of a kind, the baseline's first."""
    order = (BASELINE, *STUDIED)
    return sorted(
        (record for record in records if record["kind"] == kind),
        key=lambda record: order.index(record["method"]),
    )


def find(records: Sequence[Record], method: str, form: str, noise: str) -> Record | None:
    """Returns the record of a run, None where there is none."""
    wanted = {"kind": "run", "method": method, "form": form, "noise": noise}
    return next((r for r in records if wanted.items() <= r.items()), None)


def make_tables(records: Sequence[Record]) -> list[Table]:
    """Returns the table of exact expectations and that of the runs."""
    signed, plain = ("at_start", "at_start_shared", "least_below_gap"), ("strip", "equilibrium")
    directions = Table(
        "Expected direction, exact (positive: away from the Pareto set)",
        (
            *("method", "E d_y at (0, 0.4)", "one draw for both", f"least, y <= {GAP}"),
            *("up for all x to y =", "E d_y = 0 at (0, y)"),
        ),
        [
            (
                record["method"],
                *(f"{np.ravel(record[name])[-1]:+.4f}" for name in signed),
                *(f"{record[name]:.3f}" for name in plain),
            )
            for record in of_kind(records, "expectation")
        ],
    )
    digits = {"loss1": 3, "loss2": 3, "distance": 4}
    runs = Table(
        "After the last step, mean ± standard error over seeds",
        ("noise", "method", "form", "loss 1", "loss 2", "distance", "distance at k / 10"),
        [
            (
                *(record[name] for name in ("noise", "method", "form")),
                *(show(record["final"][name], digits=n) for name, n in digits.items()),
                f"{earlier(record)[0]:.4f}",
            )
            for noise in NOISES
            for record in of_kind(records, "run")
            if record["noise"] == noise
        ],
        names=3,
    )
    return [directions, runs]


def earlier(record: Record) -> tuple[float, float]:
    """Returns mean and error of the distance at a tenth of the steps."""
    k = int(np.searchsorted(record["k"], record["k"][-1] / 10))
    return record["distance"]["mean"][k], record["distance"]["error"][k]


def draw(records: Sequence[Record], path: Path) -> None:
    """Saves the figure: expected direction, both losses, distances under both noises."""
    figure = Figure(figsize=(11.5, 7.4), layout="constrained")
    axes = figure.subplots(2, 3)
    colors = {name: f"C{i}" for i, name in enumerate((BASELINE, *STUDIED))}
    lines = dict(zip(FORMS, ("-", "--", ":"), strict=True))
    for record in of_kind(records, "expectation"):
        axes[0, 0].plot(record["y"], record["upward"], color=colors[record["method"]])
    axes[0, 0].axhline(0, color="black", lw=0.8)
    axes[0, 0].axvline(0.4, color="gray", lw=0.8, ls=":")
    axes[0, 0].set(
        title="(a) exact expected direction at (0, y)",
        xlabel="y, the distance to the Pareto set",
        ylabel="E d_y  (> 0: away)",
    )
    panels = (
        (axes[0, 1], "loss1", "two-point", "(b) loss 1, two-point noise"),
        (axes[0, 2], "loss2", "two-point", "(c) loss 2, two-point noise"),
        (axes[1, 0], "distance", "two-point", "(d) distance, two-point noise"),
        (axes[1, 1], "distance", "gaussian", "(e) distance, Gaussian of its covariance"),
        (axes[1, 2], "distance", "isotropic", "(f) distance, isotropic Gaussian"),
    )
    for axis, quantity, noise, title in panels:
        runs = [record for record in of_kind(records, "run") if record["noise"] == noise]
        if quantity != "distance":
            runs = [record for record in runs if record["form"] != "cr 0.9"]
        for i, record in enumerate(runs):
            mean, error = (np.array(record[quantity][part]) for part in ("mean", "error"))
            k = np.maximum(record["k"], 0.5)  # the start, left of step 1
            color = colors[record["method"]]
            axis.plot(k, mean, lines[record["form"]], color=color, lw=1.4)
            place = k[-1] * 1.25 ** (1 + i)
            axis.errorbar(place, mean[-1], error[-1], fmt="o", ms=3, color=color, capsize=2)
        axis.set(title=title, xlabel="step", xscale="log")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_yscale("log")
    axes[1, 0].set_ylabel("distance to the Pareto set")
    handles = [axes[0, 0].plot([], [], color=c, label=name)[0] for name, c in colors.items()]
    labels = ("plain", "CR-, corollary 1", "CR-, alpha = 0.9")
    handles += [
        axes[0, 0].plot([], [], line, color="black", label=label)[0]
        for line, label in zip(lines.values(), labels, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Stochastic quadratics (4) of Zhou et al. 2022: means over seeds, final errors")
    figure.savefig(path, dpi=110)


# --- claims -------------------------------------------------------------------------------------


def claims_of_theorem(records: Sequence[Record]) -> list[Claim]:
    """Judges signs of exact expectations: a condition per method."""
    facts = {r["method"]: r for r in of_kind(records, "expectation") if r["method"] in STUDIED}
    if not facts:
        return []
    start = {name: fact["at_start"] for name, fact in facts.items()}
    least = {name: fact["least_below_gap"] for name, fact in facts.items()}
    return [
        claim(
            "At (0, 0.4) the expected direction points straight away from the Pareto set",
            "Zhou 2022, section 4 and figure 1a",
            listed(start, lambda d: f"({round(d[0], 3) + 0.0:.3f}, {d[1]:+.3f})"),
            [abs(x) < 1e-6 < y for x, y in start.values()],
            paper="(0, e), e > 0",
        ),
        claim(
            "For every x in [-1, 1] and y in [0, 0.05] the expected direction points away",
            "Zhou 2022, theorem 1 (its proof's range)",
            listed(least, "at least {:+.3f}".format),
            [value > 0 for value in least.values()],
            paper="E d_y > 0",
        ),
    ]


def peak_rise(record: Record, loss: str) -> tuple[float, float]:
    """Returns how far the mean loss rises above its start, and the error there."""
    mean, error = (np.array(record[loss][part]) for part in ("mean", "error"))
    k = int(np.argmax(mean))
    return float(mean[k] - mean[0]), float(error[k])


def claims_of_runs(records: Sequence[Record], noise: str, source: str) -> list[Claim]:
    """Judges figure 1 and its Gaussian variants."""
    plain, reduced = (
        {name: run for name in STUDIED if (run := find(records, name, form, noise))}
        for form in ("plain", "cr")
    )
    if not plain or plain.keys() != reduced.keys():
        return []

    def far(record: Record) -> bool:
        mean, error = mean_and_error(record["final"]["distance"])
        return mean - error > GAP

    def converging(record: Record) -> bool:
        (mean, error), (before, _) = mean_and_error(record["final"]["distance"]), earlier(record)
        return mean + error < min(GAP, before)

    def distances(runs: dict[str, Record]) -> str:
        return listed(runs, lambda record: show(record["final"]["distance"], digits=3))

    def losses_saved(name: str, loss: str) -> list[float]:
        pair = (plain[name]["final"][loss], reduced[name]["final"][loss])
        return list(np.subtract(*pair))

    found = [
        claim(
            f"MGDA, PCGrad and CAGrad keep a distance to the Pareto set ({noise} noise)",
            source,
            distances(plain),
            map(far, plain.values()),
            paper="a constant gap",
        ),
        claim(
            f"Their CR- forms converge to the Pareto set ({noise} noise)",
            source,
            distances(reduced),
            map(converging, reduced.values()),
            paper="0",
        ),
    ]
    if noise != "two-point":
        return found
    rises = {name: [peak_rise(r, loss) for loss in ("loss1", "loss2")] for name, r in plain.items()}
    saved = {name: [losses_saved(name, loss) for loss in ("loss1", "loss2")] for name in plain}
    return [
        *found,
        claim(
            "Both losses of the plain methods first rise",
            source,
            listed(rises, lambda pair: " and ".join("{:+.3f} ± {:.3f}".format(*r) for r in pair)),
            [rise > error for pair in rises.values() for rise, error in pair],
        ),
        claim(
            "Both final losses of the plain methods are larger than those of their CR- forms",
            source,
            listed(saved, lambda pair: " and ".join(show(v, digits=3) for v in pair)),
            [above_error(values) for pair in saved.values() for values in pair],
        ),
    ]


def claims(folder: Path) -> list[Claim]:
    """Returns the claims that the results in ``folder`` decide.

    Far from the Pareto set is more than 0.05 from it by an error, the range of theorem 1's proof;
    converging is nearer than that, by an error, and nearer than at a tenth of the steps.
    """
    records = read_records(folder / f"{NAME}.jsonl")
    gaussian = "Zhou 2022, section 4 (appendix G.2)"
    noises = {"two-point": "Zhou 2022, theorem 1 and figure 1"} | dict.fromkeys(
        NOISES[1:], gaussian
    )
    made = differing(claims_of_theorem(records), f"float64; {DIFFERS}")
    for noise, source in noises.items():
        runs = [r for r in of_kind(records, "run") if r["noise"] == noise]
        seeds = ", ".join(f"{n} seeds" for n in sorted({r["seeds"] for r in runs}))
        form = f"{NOISE_DIFFERS[noise]}; " if noise in NOISE_DIFFERS else ""
        differs = f"{form}30,000 steps and {seeds} (neither is stated); projected onto the domain"
        made += differing(claims_of_runs(records, noise, source), f"{differs}; {DIFFERS}")
    return made


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns both tables and the figure."""
    del args
    records = read_records(folder / f"{NAME}.jsonl")
    if not records:
        return Report([], {})
    return Report(make_tables(records), {f"{NAME}.png": partial(draw, records)})
