"""Tables, figures and verdicts of the faces, from their results files alone."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
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
    differing,
    listed,
    mean_and_error,
    not_runnable,
    show,
)
from experiments.faces.data import ATTRIBUTES
from experiments.faces.methods import PAPER, SINGLE
from experiments.faces.published import (
    DELTA_M,
    FIGURE4,
    FIGURE7,
    LDC_AT_MOST,
    LOSSES,
    NASH_OVER_LDC,
    ORDERS,
    PENALTIES,
    STL,
    TABLE2,
    TABLE3,
    TABLE4,
    TABLE10,
)
from experiments.faces.timing import BASE, JACOBIAN
from experiments.study import Record, Report, Table, read_records

CELEBA = "celeba"  # the results file of the recipe of the paper
COLORS = {
    "losses": "tab:blue",
    "layer": "tab:olive",
    "features": "tab:green",
    "rows": "tab:orange",
}


# --- time -----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a step of a method costs, in steps of equal weights."""

    method: str
    route: str
    time: float
    of_rule: float  # the part of it that is the method's own, of a method by rows
    operations: float | None
    megabytes: float | None  # of temporary memory, the largest of its programs


class Times(NamedTuple):
    """The times of one size of network and batch."""

    width: int
    batch_size: int
    clock: str
    steps: dict[str, Step]
    seconds: float  # of a step of equal weights

    def title(self) -> str:
        """Returns what was timed."""
        return f"width {self.width}, {self.batch_size} images, 40 tasks"


def read_times(folder: Path) -> list[Times]:
    """Returns the times of each size; methods by rows only with the Jacobian that they share."""
    sizes: dict[tuple[int, int], dict[str, Record]] = {}
    for record in read_records(folder / "time.jsonl"):
        key = record["width"], record["batch_size"]
        sizes.setdefault(key, {})[record["method"]] = record
    return [_times_of(*key, records) for key, records in sizes.items()]


def _times_of(width: int, batch_size: int, records: dict[str, Record]) -> Times:
    shared = records.get(JACOBIAN)
    steps = {}
    for method, record in records.items():
        parts = [record]
        if record["part"] == "rule":
            if shared is None:
                continue
            parts = [shared, record]
        counts = [part["flops"] for part in parts]
        memory = [part["bytes"] for part in parts]
        steps[method] = Step(
            method,
            record["route"],
            sum(part["ratio"] for part in parts),
            record["ratio"] if record["part"] == "rule" else 0.0,
            None if None in counts else sum(counts) / record["base_flops"],
            None if None in memory else max(memory) / 1e6,
        )
    first = next(iter(records.values()))
    base = float(np.median([record["base_seconds"] for record in records.values()]))
    return Times(width, batch_size, first["clock"], steps, base)


def time_table(times: Times) -> Table:
    """Returns what a step costs."""
    header = ["method", "route", "time", "of it the rule", "operations", "temporary MB"]
    rows = []
    for step in sorted(times.steps.values(), key=lambda step: step.time):
        if step.method == JACOBIAN:
            continue
        rows.append(
            [
                step.method,
                step.route,
                f"{step.time:.2f}",
                f"{step.of_rule:.2f}" if step.of_rule else "",
                f"{step.operations:.2f}" if step.operations else "",
                f"{step.megabytes:.0f}" if step.megabytes else "",
            ]
        )
    title = (
        f"A step, {times.title()}: {times.clock} time and operations, equal weights "
        f"({times.seconds:.2f} s) = 1"
    )
    return Table(title, header, rows)


def claims_of_times(times: Times) -> Iterator[Claim]:
    """Judges what the paper says of figure 4, by time and by operations.

    Significantly slower is more than twice the time of LDC-MTL, approximately is up to a factor of
    two, negligible is what LDC-MTL may have at most, 1.11; FAMO's pass more may take it to 1.5.
    """
    steps = times.steps
    where = f" ({times.title()}, random images)"

    def text(names: Sequence[str]) -> str:
        return listed(
            {name: steps[name].time for name in names}, lambda t: f"{t:.2f}", separator=", "
        )

    if "ldc_mtl" not in steps:
        return
    own = steps["ldc_mtl"]
    yield claim(
        f"LDC-MTL's overhead over equal weights is negligible{where}",
        FIGURE4,
        f"{own.time:.2f} times, by operations {own.operations or float('nan'):.4f}",
        [own.time <= LDC_AT_MOST, (own.operations or np.inf) <= LDC_AT_MOST],
        f"at most {LDC_AT_MOST} times",
    )
    alike = [name for name in ("famo", "go4align") if name in steps]
    if alike:
        yield claim(
            f"So is that of other methods of the losses alone{where}",
            FIGURE4,
            text(alike),
            [steps[name].time <= 1.5 for name in alike],
        )
    slow = [name for name in PAPER if name in steps and steps[name].route == "rows"]
    if slow:
        yield claim(
            f"Methods that manipulate gradients are significantly slower{where}",
            FIGURE4,
            text(slow),
            [steps[name].time > 2 * own.time for name in slow],
        )
    if "nash_mtl" in steps:
        nash = steps["nash_mtl"]
        ratio = nash.time / own.time
        counted = ""
        if nash.operations and own.operations:
            counted = f", by operations {nash.operations / own.operations:.1f}"
        yield claim(
            f"Nash-MTL takes about 12 times as long as LDC-MTL{where}",
            FIGURE4,
            f"{ratio:.1f} times{counted}",
            [NASH_OVER_LDC / 2 <= ratio <= 2 * NASH_OVER_LDC],
            f"{NASH_OVER_LDC:.0f} times",
        )


def draw_times(times: Times, path: Path) -> None:
    """Saves the cost of a step of every method."""
    steps = sorted(
        (step for step in times.steps.values() if step.method != JACOBIAN),
        key=lambda step: -step.time,
    )
    figure = Figure(figsize=(8.5, 0.3 * len(steps) + 1.8), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(steps))
    axis.barh(places, [s.time for s in steps], color=[COLORS[s.route] for s in steps], height=0.7)
    counted = [(i, s.operations) for i, s in enumerate(steps) if s.operations]
    if counted:
        axis.plot(
            [o for _, o in counted],
            [i for i, _ in counted],
            "kd",
            ms=4,
            ls="",
            label="operations",
        )
    for route, color in COLORS.items():
        label = {
            "losses": "of the losses alone",
            "layer": "gradients of the last shared layer",
            "features": "gradients at the features",
            "rows": "gradients of the trunk",
        }[route]
        if any(step.route == route for step in steps):
            axis.barh(np.nan, np.nan, color=color, label=label)
    axis.axvline(LDC_AT_MOST, color="tab:red", lw=1, ls="--", label="paper: LDC-MTL at most 1.11")
    if "ldc_mtl" in times.steps:
        nash = NASH_OVER_LDC * times.steps["ldc_mtl"].time
        axis.axvline(nash, color="tab:purple", lw=1, ls=":", label="paper: Nash-MTL, 12 x LDC-MTL")
    axis.set_xscale("log")
    ticks = [1, 2, 5, 10, 20, 50]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(0.8, 1.6 * max(max(s.time for s in steps), NASH_OVER_LDC))
    axis.set_yticks(places, [step.method for step in steps])
    for i, step in enumerate(steps):
        place = 1.07 * max(step.time, step.operations or 0)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axis.text(place, i, f"{step.time:.2f}", va="center", bbox=box, zorder=3)
    axis.set_ylim(-0.6, len(steps) - 0.4)
    axis.set_xlabel(f"{times.clock} time of a step, equal weights = 1")
    axis.set_title(f"A step at 40 tasks: width {times.width}, {times.batch_size} random images")
    axis.grid(axis="x", alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def conclude_times(times: Times) -> str:
    """Returns the sentence that the times allow."""
    by_route = {
        route: [s for s in times.steps.values() if s.route == route and s.method != JACOBIAN]
        for route in COLORS
    }
    words = {
        "losses": "of the losses alone",
        "layer": "at the last shared layer",
        "features": "at the features",
        "rows": "by rows",
    }
    texts = []
    for route, steps in by_route.items():
        if steps:
            low, high = min(s.time for s in steps), max(s.time for s in steps)
            texts.append(f"{low:.2f} to {high:.2f} {words[route]}")
    return f"{times.title()}: a step takes as many of equal weights as {', '.join(texts)}."


# --- results on faces -----------------------------------------------------------------------------


class Found(NamedTuple):
    """What the records of one training part say."""

    name: str
    methods: dict[str, list[Record]]  # by method, a record a seed; without single tasks
    single: np.ndarray | None  # (m,) test F1 of single tasks, means over seeds

    def f1(self, method: str) -> np.ndarray:
        """Returns test F1 (seeds, m)."""
        return np.array([record["test_f1"] for record in self.methods[method]], np.float64)

    def drops(self, method: str, baseline: np.ndarray) -> list[float]:
        """Returns delta_m (seeds,) in percent."""
        return [drop(values, baseline) for values in self.f1(method)]

    def baseline(self) -> np.ndarray:
        """Returns our single tasks, or those of the paper's code until ours are whole."""
        return np.array(STL) if self.single is None else self.single

    def made_up(self) -> bool:
        """Tells whether it was a smoke run."""
        return bool(next(iter(self.methods.values()))[0]["config"]["made_up"])


def drop(f1: np.ndarray, baseline: np.ndarray) -> float:
    """Returns delta_m in percent over the attributes on which the baseline has a hit at all."""
    kept = baseline > 0
    if not kept.any():
        return float("nan")
    higher = jnp.ones(int(kept.sum()), bool)
    values, base = jnp.asarray(f1[kept]), jnp.asarray(baseline[kept])
    return float(jaxmtl.metrics.delta_m(values, baselines=base, higher_is_better=higher))


def single_of(records: Sequence[Record], num_tasks: int) -> np.ndarray | None:
    """Returns test F1 (m,) of the single tasks, None if one is missing."""
    values: list[list[float]] = [[] for _ in range(num_tasks)]
    for record in records:
        if record["method"] == SINGLE:
            values[record["task"]].append(record["test_f1"][0])
    return np.array([np.mean(found) for found in values]) if all(values) else None


def read_found(folder: Path, name: str) -> Found | None:
    """Returns what a results file holds, None if there is no method of several tasks in it."""
    records = read_records(folder / f"{name}.jsonl")
    methods: dict[str, list[Record]] = {}
    for record in records:
        if record["method"] != SINGLE:
            methods.setdefault(record["method"], []).append(record)
    if not methods:
        return None
    return Found(name, methods, single_of(records, records[0]["config"]["num_tasks"]))


def result_table(found: Found) -> Table:
    """Returns F1, delta_m, losses and cosines of every method, beside the paper's."""
    header = ["method", "seeds", "F1", "delta_m %", "against the code's F1", "paper: delta_m %"]
    header += ["test losses: mean, std", "paper: mean, std", "cosines"]
    rows = []
    for method, records in found.methods.items():
        f1, published = found.f1(method), DELTA_M.get(method)
        whole = f1.shape[1] == len(STL)
        losses = np.array([record["test_loss"] for record in records], np.float64)
        theirs = LOSSES.get(method)
        rows.append(
            [
                method,
                str(len(records)),
                show(f1.mean(axis=1).tolist(), digits=4),
                show(found.drops(method, found.single), digits=2, sign="+")
                if found.single is not None
                else "",
                show(found.drops(method, np.array(STL)), digits=2, sign="+") if whole else "",
                f"{published:+.2f}" if published is not None else "",
                f"{losses.mean():.3f}, {losses.mean(axis=0).std():.3f}",
                f"{theirs[0]:.3f}, {theirs[1]:.3f}" if theirs else "",
                f"{np.mean([record['cosines'][0] for record in records]):+.2f}",
            ]
        )
    return Table(f"{found.name}: test part, at the best epoch by validation", header, rows)


def attribute_table(found: Found) -> Table:
    """Returns F1 of every attribute."""
    methods = list(found.methods)
    number = found.f1(methods[0]).shape[1]
    rows = []
    for i, attribute in enumerate(ATTRIBUTES[:number]):
        single = "" if found.single is None else f"{found.single[i]:.4f}"
        values = [show(found.f1(method)[:, i].tolist(), digits=4) for method in methods]
        theirs = "" if found.made_up() else f"{STL[i]:.4f}"
        rows.append([attribute, theirs, single, *values])
    header = ["attribute", "the code's single task", SINGLE, *methods]
    return Table(f"{found.name}: F1 on the test part", header, rows)


def published_tables() -> list[Table]:
    """Returns the paper's numbers."""
    deltas = [[name, f"{value:+.2f}"] for name, value in DELTA_M.items() if name != SINGLE]
    deltas += [[f"ldc_mtl, lambda {k} (table 4)", f"{v:+.2f}"] for k, v in PENALTIES.items()]
    deltas += [
        [f"ldc_mtl, order {i} (table 10)", f"{value:+.2f}"] for i, value in enumerate(ORDERS)
    ]
    quarter = len(STL) // 4
    f1 = [
        [
            cell
            for k in range(4)
            for cell in (ATTRIBUTES[i + k * quarter], f"{STL[i + k * quarter]:.4f}")
        ]
        for i in range(quarter)
    ]
    return [
        Table("Published: delta_m % on CelebA (Xiao 2025, table 2)", ["method", "delta_m"], deltas),
        Table("Published: F1 of single tasks (their code)", ["attribute", "F1"] * 4, f1),
    ]


def draw_drops(found: Found, path: Path) -> None:
    """Saves delta_m of every method beside the paper's."""
    baseline = found.baseline()[: found.f1(next(iter(found.methods))).shape[1]]
    drops = {method: found.drops(method, baseline) for method in found.methods}
    order = sorted(drops, key=lambda method: -np.mean(drops[method]))
    figure = Figure(figsize=(8, 0.36 * len(order) + 1.8), layout="constrained")
    axis, places = figure.subplots(), np.arange(len(order))
    means, errors = np.transpose([mean_and_error(drops[method]) for method in order])
    axis.barh(places + 0.2, means, 0.4, xerr=np.nan_to_num(errors), color="tab:blue", label="here")
    theirs = [DELTA_M.get(method, np.nan) for method in order]
    axis.barh(places - 0.2, theirs, 0.4, color="tab:gray", label="paper")
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(places, order)
    of = "our" if found.single is not None else "the code's"
    axis.set_xlabel(f"delta_m in percent against {of} single tasks; left is better")
    axis.set_title("Made-up faces" if found.made_up() else "CelebA, test part")
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


# --- verdicts -------------------------------------------------------------------------------------

MARGIN = 0.5  # of delta_m, in points: what one seed has to be ahead by; LDC-MTL has ± 0.26


def ahead(gains: Sequence[float], margin: float = MARGIN) -> bool:
    """Tells whether a mean is positive: by more than its error, or by the margin for one seed."""
    return above_error(gains) if len(gains) > 1 else gains[0] > margin


def claims_of_faces(found: Found) -> Iterator[Claim]:
    """Judges tables 2 and 3 and figure 7 by what a whole run says."""
    baseline = found.baseline()
    drops = {method: found.drops(method, baseline) for method in found.methods}
    order = sorted(drops, key=lambda method: np.mean(drops[method]))
    known = [method for method in order if method in DELTA_M]

    def gains(better: str, worse: str) -> list[float]:
        return [a - b for a, b in zip(drops[worse], drops[better], strict=False)]

    if "ldc_mtl" in known:
        rivals = [method for method in known if method != "ldc_mtl"]
        text = listed({m: show(drops[m], digits=2, sign="+") for m in known}, separator=", ")
        if rivals:
            yield claim(
                "LDC-MTL has the lowest delta_m of the paper's methods",
                TABLE2,
                f"rank {known.index('ldc_mtl') + 1} of {len(known)}: {text}",
                [ahead(gains("ldc_mtl", rival)) for rival in rivals],
                f"{DELTA_M['ldc_mtl']}, rank 1 of 14",
            )
        yield claim(
            "LDC-MTL is better than single tasks",
            TABLE2,
            show(drops["ldc_mtl"], digits=2, sign="+"),
            [ahead([-value for value in drops["ldc_mtl"]])],
            f"{DELTA_M['ldc_mtl']} ± 0.26",
        )
    if {"ldc_mtl", BASE} <= found.methods.keys():
        pair = found.methods["ldc_mtl"], found.methods[BASE]
        losses = [np.array([r["test_loss"] for r in records], np.float64) for records in pair]
        spread = [values.std(axis=1) for values in losses]
        means = [values.mean(axis=1) for values in losses]
        yield claim(
            "LDC-MTL's 40 losses are lower and closer together than those of equal weights",
            TABLE3,
            f"mean {means[0].mean():.3f} against {means[1].mean():.3f}, standard deviation "
            f"{spread[0].mean():.3f} against {spread[1].mean():.3f}",
            [means[0].mean() < means[1].mean(), spread[0].mean() < spread[1].mean()],
            "mean 0.189 against 0.287, standard deviation 0.133 against 0.195",
        )
        cosine = [float(np.mean([r["cosines"][0] for r in records])) for records in pair]
        yield claim(
            "The gradients of 8 tasks are more alike at the end than by equal weights",
            FIGURE7,
            f"mean cosine {cosine[0]:+.3f} against {cosine[1]:+.3f}",
            [cosine[0] > cosine[1]],
        )


def claims_of_variants(folder: Path) -> Iterator[Claim]:
    """Judges tables 4 and 10, or says how they can be decided."""
    reference = read_found(folder, CELEBA)
    command = "python -m experiments.faces --methods ldc_mtl --resume --data-dir DIR"

    def values(name: str) -> list[float] | None:
        found = read_found(folder, name)
        if reference is None or found is None or "ldc_mtl" not in found.methods:
            return None
        return found.drops("ldc_mtl", reference.baseline())

    tables = (
        (
            TABLE4,
            "every lambda from 0.005 to 0.02 is better than FairGrad",
            {k: CELEBA if k == 0.01 else f"{CELEBA}_lambda_{k:g}" for k in PENALTIES},
            f"for x in {' '.join(map(str, PENALTIES))}; do {command} --seeds 3 --penalty $x; done",
            f"{', '.join(map(str, PENALTIES.values()))} against {DELTA_M['fairgrad']}",
        ),
        (
            TABLE10,
            "the order of the tasks makes no significant difference to LDC-MTL",
            {seed: f"{CELEBA}_order_{seed}" for seed in range(len(ORDERS))},
            f"{command} --seeds 3; for x in 0 1 2; do {command} --order $x; done",
            f"{', '.join(map(str, ORDERS))} against {DELTA_M['ldc_mtl']}",
        ),
    )
    for source, words, names, how, paper in tables:
        found = {key: drops for key, name in names.items() if (drops := values(name)) is not None}
        if len(found) < len(names):
            yield not_runnable(f"CelebA: {words}", source, how, paper)
            continue
        means = {f"{key:g}": float(np.mean(drops)) for key, drops in found.items()}
        text = listed(means, lambda value: f"{value:+.2f}", ", ")
        if source == TABLE4:
            below = [value < DELTA_M["fairgrad"] for value in means.values()]
            yield claim(words, source, text, below, paper)
        else:
            own = float(np.mean(values(CELEBA) or [np.nan]))
            near = [abs(value - own) <= MARGIN for value in means.values()]
            yield claim(words, source, f"{text} against {own:+.2f}", near, paper)


# The recipe of table 2; FAMO's authors have another, which the command line of ``faces`` shows.
RECIPE = {"width": 64, "batch_size": 256, "epochs": 15, "learning_rate": 1e-3}
CODE_DIFFERS = (
    "the last batch of an epoch, which is not full, left out; running variances without Bessel's "
    "correction; PCGrad draws an order for each task, Nash-MTL is exact"
)


def differs_of_times(times: Times) -> str:
    """Returns what differs from figure 4, the time of a training on a GPU."""
    where = "a CPU core" if times.clock == "CPU" else "another GPU"
    sizes = {"width": times.width, "batch_size": times.batch_size}
    parts = changed(sizes, {"width": 64, "batch_size": 256}), "no loading of data"
    return ", ".join([*filter(None, parts), f"a step on {where} in place of a training on a GPU"])


def differs_of(found: Found | None) -> str:
    """Returns what differs from tables 2 to 4 and 10, of records or of the command without them."""
    odd = ""
    if found is not None:
        config = next(iter(found.methods.values()))[0]["config"]
        seeds = {"seeds": min(map(len, found.methods.values()))}
        odd = changed(config | seeds, RECIPE | {"seeds": 3})
    return "; ".join([*filter(None, [odd]), CODE_DIFFERS])


def claims(folder: Path) -> list[Claim]:
    """Returns what the paper claims beside what the records say.

    A delta_m is ahead of another if their difference, seed by seed, exceeds its standard error,
    with one seed if it exceeds 0.5 points.
    """
    times, found = read_times(folder), read_found(folder, CELEBA)
    made = [
        one._replace(differs=differs_of_times(sizes))
        for sizes in times
        for one in claims_of_times(sizes)
    ]
    if not made and found is None:
        return []
    told: list[Claim] = []
    if found is not None:
        told += claims_of_faces(found)
    else:
        command = "python -m experiments.faces --data-dir DIR --seeds 3"
        losses = {method: values[:2] for method, values in LOSSES.items()}
        told += [
            not_runnable(
                "CelebA: LDC-MTL has the lowest delta_m of 14 methods, below that of single tasks",
                TABLE2,
                command,
                listed({m: DELTA_M[m] for m in ("ldc_mtl", "fairgrad", BASE)}, separator=", "),
            ),
            not_runnable(
                "CelebA: LDC-MTL's 40 losses are lower and closer together than those of equal "
                "weights",
                TABLE3,
                command,
                listed(losses, lambda v: f"mean {v[0]}, standard deviation {v[1]}"),
            ),
            not_runnable(
                "CelebA: the gradients of 8 tasks are more alike at the end than by equal weights",
                FIGURE7,
                command,
            ),
        ]
    told += claims_of_variants(folder)
    return made + differing(told, differs_of(found))


# --- all of it ------------------------------------------------------------------------------------


def conclude(found: Found) -> str:
    """Returns the sentence that the results allow."""
    means = {m: float(found.f1(m).mean()) for m in found.methods}
    best, last = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    seeds = min(len(records) for records in found.methods.values())
    order = f"{best} has the best mean F1 ({means[best]:.4f}), {last} the worst ({means[last]:.4f})"
    if means[best] == means[last]:
        order = f"each has a mean F1 of {means[best]:.4f}"
    where = "Made-up faces" if found.made_up() else "CelebA"
    text = f"{where}: of {len(means)} method{'s' if len(means) > 1 else ''} {order}"
    if found.single is not None:
        drops = {m: float(np.mean(found.drops(m, found.single))) for m in means}
        below = sum(value < 0 for value in drops.values())
        text += f"; {below} are better than single tasks by delta_m"
    few = seeds == 1
    return f"{text} ({seeds} seed{': differences of a point say little' if few else 's'})."


def report(folder: Path, name: str | None) -> Report:
    """Returns tables and figures of a training part, or, if ``name`` is None, of the times."""
    tables: list[Table] = []
    figures: dict[str, Callable[[Path], Any]] = {}
    sentences: list[str] = []
    published = published_tables()
    if name is None:
        for i, times in enumerate(read_times(folder)):
            if times.steps.keys() - {JACOBIAN}:
                tables.append(time_table(times))
                figures["time.png" if i == 0 else f"time_{i}.png"] = partial(draw_times, times)
                sentences.append(conclude_times(times))
    elif (found := read_found(folder, name)) is not None:
        tables = [result_table(found), attribute_table(found)]
        published = [] if found.made_up() else published
        figures[f"{name}.png"] = partial(draw_drops, found)
        sentences.append(conclude(found))
    return Report(tables + (published if tables else []), figures, "\n".join(sentences))
