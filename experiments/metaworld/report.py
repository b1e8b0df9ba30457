"""What the runs on Meta-World say, beside two papers: tables, curves and claims."""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import (
    Claim,
    above_error,
    changed,
    claim,
    mean_and_error,
    not_runnable,
    show,
)
from experiments.metaworld.methods import BASELINE, SINGLE
from experiments.study import Record, Report, Table, read_records

LEARNER = "learner"  # a results file of its own: updates without a simulator
HIGH = 0.8  # what the study calls high success
PARTS = ("critic", "actor")

# Success on MT10 (v1), the best of all evaluations, with standard errors over 5 and 10 seeds.
MOCO = {
    SINGLE: ".90 ± .032",
    BASELINE: ".49 ± .073",
    "multi_head": ".61 ± .036",
    "pcgrad": ".72 ± .022",
    "cagrad": ".83 ± .045",
    "moco": ".75 ± .050",
    "cagrad_moco": ".86 ± .022",
}
ALIGNED = {
    SINGLE: ".90 ± .032",
    BASELINE: ".49 ± .073",
    "multi_head": ".61 ± .036",
    "pcgrad": ".72 ± .022",
    "cagrad": ".83 ± .045",
    "nash_mtl": ".91 ± .031",
    "aligned_mtl": ".97 ± .045",
}

# What a paper's text draws from its table: sentence, pairs (higher, lower) of success.
STATEMENTS: dict[str, tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = {
    "Fernando 2023, table 4": (
        ("`moco` succeeds more often than `pcgrad`", (("moco", "pcgrad"),)),
        ("`moco` succeeds less often than `cagrad`", (("cagrad", "moco"),)),
        ("`cagrad_moco` succeeds more often than `cagrad`", (("cagrad_moco", "cagrad"),)),
    ),
    "Senushkin 2023, table 5": (
        (
            "`aligned_mtl` succeeds more often than all others",
            tuple(
                ("aligned_mtl", name)
                for name in (BASELINE, "pcgrad", "cagrad", "nash_mtl", "multi_head", SINGLE)
            ),
        ),
    ),
}
TABLES = {"Fernando 2023, table 4": (MOCO, 5), "Senushkin 2023, table 5": (ALIGNED, 10)}  # seeds
# Of the tables, and not among the networks here.
ELSEWHERE = {"task encoder": ".54 ± .047", "soft modularization": ".73 ± .043"}
ELSEWHERE["CARE"] = ".84 ± .051"

Runs = dict[str, dict[int, list[Record]]]  # by method and seed, evaluations in order


def part_name(args: argparse.Namespace) -> str:
    """Returns the name of the results file of a command line."""
    if args.smoke:
        return "made_up"
    name = "tasks" if args.tasks else args.benchmark.lower()
    return str(name) + (f"_{args.network}" if args.network not in (None, "shared") else "")


def runs_of(records: Sequence[Record]) -> Runs:
    """Returns the records by method and seed."""
    runs: Runs = {}
    for record in records:
        runs.setdefault(record["method"], {}).setdefault(record["seed"], []).append(record)
    return runs


def successes(run: Sequence[Record]) -> np.ndarray:
    """Returns the success (evaluations, tasks) of a run."""
    return np.array([record["success"] for record in run])


def last(runs: dict[int, list[Record]]) -> list[float]:
    """Returns the mean over tasks at the last evaluation of each seed."""
    return [float(successes(run)[-1].mean()) for run in runs.values()]


def best(runs: dict[int, list[Record]]) -> list[float]:
    """Returns the largest mean over tasks of all evaluations of each seed, as the papers do."""
    return [float(successes(run).mean(axis=1).max()) for run in runs.values()]


def title_of(records: Sequence[Record]) -> str:
    """Returns what was run."""
    config = records[0]["config"]
    networks = " x ".join(map(str, config["widths"]))
    return f"{config['benchmark']}, {config['network']} network {networks}"


def short(task: str) -> str:
    """Returns the name of a task without its version."""
    return task.removesuffix("-v3")


def success_table(records: Sequence[Record]) -> Table:
    """Returns success of each method, beside the papers'."""
    config = records[0]["config"]
    header = ["method", "seeds", "steps", "last", "best"]
    header += ["Fernando 2023, MT10, best", "Senushkin 2023, MT10"]
    rows = []
    for method, runs in runs_of(records).items():
        steps = min(run[-1]["step"] for run in runs.values())
        heads = config["network"] == "multi_head" and method == BASELINE
        key = "multi_head" if heads else method
        cells = [method, str(len(runs)), f"{steps:,}"]
        cells += [show(values, digits=2) for values in (last(runs), best(runs))]
        rows.append([*cells, MOCO.get(key, ""), ALIGNED.get(key, "")])
    title = f"Success on {title_of(records)}: mean ± standard error over seeds"
    return Table(title, header, rows)


def tasks_table(records: Sequence[Record]) -> Table:
    """Returns the success of each task at the last evaluation."""
    tasks, found = records[0]["config"]["tasks"], runs_of(records)
    lasts = {
        method: np.array([successes(run)[-1] for run in runs.values()])
        for method, runs in found.items()
    }
    rows = [
        [short(task), *(show(values[:, i].tolist(), digits=2) for values in lasts.values())]
        for i, task in enumerate(tasks)
    ]
    return Table("Success at the last evaluation, by task", ["task", *found], rows)


def mean_of(runs: dict[int, list[Record]], part: str, name: str) -> np.ndarray | None:
    """Returns a logged quantity, averaged over evaluations and seeds, None if there is none."""
    found = [r[part][name] for run in runs.values() for r in run if name in r.get(part, {})]
    return np.mean(found, axis=0) if found else None


def gradients_table(records: Sequence[Record]) -> Table:
    """Returns what the gradients of the tasks were like."""
    header = ["method", "of", "conflict %", "lowest cosine", "norms: max / min"]
    rows = []
    for method, runs in runs_of(records).items():
        for part in PARTS:
            conflicts = mean_of(runs, part, "conflict_rate")
            cosines, norms = mean_of(runs, part, "cosines"), mean_of(runs, part, "norms")
            if conflicts is not None and cosines is not None and norms is not None:
                cells = [f"{100 * conflicts:.0f}", f"{cosines.min():.2f}"]
                rows.append([method, part, *cells, f"{norms.max() / norms.min():.1f}"])
    return Table("Gradients of the tasks, means over the training", header, rows, names=2)


def weights_table(records: Sequence[Record]) -> Table:
    """Returns the weights that the tasks got in the critic and the actor, where a rule has some."""
    tasks = records[0]["config"]["tasks"]
    shown: dict[str, list[Any]] = {}
    for method, runs in runs_of(records).items():
        weights = [mean_of(runs, part, "weights") for part in PARTS]
        if all(w is not None for w in weights):
            shown[method] = weights
    rows = [
        [short(task), *(" / ".join(f"{w[i]:.2f}" for w in pair) for pair in shown.values())]
        for i, task in enumerate(tasks)
    ]
    return Table("Weights in critic / actor, means over the training", ["task", *shown], rows)


def rates_table(records: Sequence[Record]) -> Table:
    """Returns how fast the runs were; the random steps, which learn nothing, are left out."""
    header = ["method", "environment steps/s", "of the simulator alone", "updates/s", "waiting %"]
    rows = []
    for method, runs in runs_of(records).items():
        later = [r for run in runs.values() for r in run[1:] or run]

        def median(name: str, later: list[Record] = later) -> float:
            return float(np.median([record[name] for record in later]))

        rows.append(
            [
                method,
                f"{median('env_steps_per_second'):.0f}",
                f"{median('env_steps_per_second_alone'):.0f}",
                f"{median('updates_per_second'):.1f}",
                f"{100 * median('share_waiting'):.0f}",
            ]
        )
    title = "Rates, medians; the learner waits for the simulator in the last column"
    return Table(title, header, rows)


def learner_table(records: Sequence[Record]) -> Table:
    """Returns what an update costs by each rule."""
    header = ["size", "method", "operations, mean = 1", "ms", "time, mean = 1", "rule, % of time"]
    rows = [
        [
            record["size"],
            record["method"],
            f"{record['flops_ratio']:.3f}" if record["flops_ratio"] else "",
            f"{record['milliseconds']:.1f}",
            f"{record['time_ratio']:.2f}",
            f"{100 * record['share_of_rule']:.0f}",
        ]
        for record in records
    ]
    tasks = records[0]["tasks"]
    return Table(f"One update of {tasks} tasks, without a simulator", header, rows, names=2)


# --- figure -------------------------------------------------------------------------------------


def curve(runs: dict[int, list[Record]], of: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns steps, means and standard errors over the seeds that got so far."""
    steps = sorted({record["step"] for run in runs.values() for record in run})
    points = []
    for step in steps:
        values = [of(r) for run in runs.values() for r in run if r["step"] == step]
        points.append(mean_and_error([v for v in values if v is not None]))
    mean, error = np.transpose(points)
    return np.array(steps), mean, np.nan_to_num(error)


def draw(records: Sequence[Record], path: Path) -> None:
    """Saves success of every method, in the mean and by task, against environment steps."""
    tasks = records[0]["config"]["tasks"]
    panels = ["mean over tasks", *map(short, tasks), "conflicts in the critic (%)"]
    columns = min(len(panels), 5 if len(panels) < 10 else 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    colors = [f"tab:{c}" for c in ("gray", "orange", "blue", "green", "red", "purple", "brown")]
    looks = [(color, style) for style in ("-", "--") for color in colors]

    def line(axis: Axes, runs: Any, of: Any, look: tuple[str, str], label: str) -> None:
        steps, mean, error = curve(runs, of)
        axis.plot(steps / 1e3, mean, color=look[0], ls=look[1], label=label, lw=1.6)
        axis.fill_between(steps / 1e3, mean - error, mean + error, color=look[0], alpha=0.15, lw=0)

    for (method, runs), look in zip(runs_of(records).items(), looks, strict=False):
        line(axes[0], runs, lambda r: np.mean(r["success"]), look, method)
        for i in range(len(tasks)):
            line(axes[1 + i], runs, lambda r, i=i: r["success"][i], look, method)
        logged = {
            seed: [r for r in run if "conflict_rate" in r.get("critic", {})]
            for seed, run in runs.items()
        }
        if any(logged.values()):
            line(axes[len(panels) - 1], logged, _conflicts, look, method)
    for axis, title in zip(axes, panels, strict=False):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("thousand steps of each task")
    for axis in axes[: len(panels) - 1]:
        axis.set_ylim(-0.03, 1.03)
    axes[0].axhline(HIGH, color="black", lw=0.8, ls=":")
    axes[0].set_ylabel("success")
    seeds = max(len(runs) for runs in runs_of(records).values())
    bands = ", bands: standard error over seeds" if seeds > 1 else ""
    figure.suptitle(f"{title_of(records)}; seeds: {seeds}{bands}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def _conflicts(record: Record) -> float:
    return 100 * float(record["critic"]["conflict_rate"])


# --- claims -------------------------------------------------------------------------------------


def number(text: str) -> float:
    """Returns the mean of a published cell."""
    return float(text.split()[0])


def published_table() -> Table:
    """Returns the tables of both papers."""
    rows = [[name, MOCO.get(name, ""), ALIGNED.get(name, "")] for name in {**MOCO, **ALIGNED}]
    first = {"task encoder": ELSEWHERE["task encoder"]}  # that of Fernando et al. has it alone
    rows += [[f"{name} (not here)", first.get(name, ""), text] for name, text in ELSEWHERE.items()]
    header = ["method", *TABLES]
    return Table("MT10 (v1) as published: success, best of all evaluations", header, rows)


# The papers' sizes; mtrl takes 2 million steps, here in whole episodes of 150.
PAPER_STEPS = 2_000_100
RECIPE = {"widths": [400] * 3, "batch_size": 128, "episodes": 1, "reward_version": "v1"}
COMMAND = (
    "python -m experiments.metaworld --benchmark MT10 --steps 2000100 --widths 400 400 400 "
    "--batch-size 128 --episodes 1"
)
CODE_DIFFERS = "Meta-World v3 in place of v1, the rule not on the temperature"


def differs_of(config: Record, seeds: int, source: str) -> str:
    """Returns what differs from a paper's set-up."""
    ours = config | {"seeds": seeds, "tasks": len(config["tasks"]), "steps": f"{config['steps']:,}"}
    theirs = RECIPE | {"seeds": TABLES[source][1], "tasks": 10}
    if config["steps"] != PAPER_STEPS:
        theirs |= {"steps": "2 million"}
    return f"{changed(ours, theirs)}; {CODE_DIFFERS}"


def runs_with_heads(records: Sequence[Record], heads: Sequence[Record]) -> Runs:
    """Returns the runs of a benchmark, those of the network with a head per task among them."""
    runs = runs_of(records)
    baseline = runs_of(heads).get(BASELINE)
    return runs | ({"multi_head": baseline} if baseline else {})


def gains_of(runs: Runs, better: str, worse: str, of: Any) -> list[float]:
    """Returns by how much one method is above another, on the seeds of both."""
    seeds = [seed for seed in runs.get(better, {}) if seed in runs.get(worse, {})]
    common = [{s: runs[m][s] for s in seeds} for m in (better, worse)]
    return [a - b for a, b in zip(*map(of, common), strict=True)]


def statements(source: str) -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Yields what a table says, as pairs (higher, lower)."""
    table = TABLES[source][0]
    for name in table:
        is_common = source != next(iter(TABLES)) and name in MOCO  # printed by both: told once
        if name not in (BASELINE, SINGLE) and not is_common:
            yield f"`{name}` succeeds more often than the mean", ((name, BASELINE),)
    yield from STATEMENTS[source]


def judged(
    runs: Runs, config: Record, text: str, source: str, pairs: Sequence[tuple[str, str]]
) -> Claim | None:
    """Returns a statement of a paper judged by runs, None where fewer than two seeds can tell."""
    gaps = {pair: gains_of(runs, *pair, best) for pair in pairs}
    seeds = min(map(len, gaps.values()))
    if seeds < 2:
        return None
    table = TABLES[source][0]
    shown = [
        f"best {show(gap, digits=2, sign='+')}, last "
        f"{show(gains_of(runs, *pair, last), digits=2, sign='+')}"
        + f" against {pair[1]}"
        * (len(pairs) > 1)
        for pair, gap in gaps.items()
    ]
    return claim(
        f"{text} (theirs: MT10; here: {config['benchmark']})",
        source,
        "; ".join(shown),
        [above_error(gap) for gap in gaps.values()],
        paper_of(table, pairs),
        differs_of(config, seeds, source),
    )


def paper_of(table: dict[str, str], pairs: Sequence[tuple[str, str]]) -> str:
    """Returns the printed gains."""
    if len(pairs) > 1:
        return f"best {number(table[pairs[0][0]]):.2f}, rank 1 of {len(table) + len(ELSEWHERE)}"
    ((high, low),) = pairs
    return f"best {number(table[high]) - number(table[low]):+.2f}"


def command_of(source: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Returns what would decide a statement."""
    names = dict.fromkeys(name for pair in pairs for name in pair)
    shared = " ".join(name for name in names if name != "multi_head")
    command = f"{COMMAND} --seeds {TABLES[source][1]} --methods"
    heads = f"; {command} {BASELINE} --network multi_head" if "multi_head" in names else ""
    return f"{command} {shared}{heads}"


def claims(folder: Path) -> list[Claim]:
    """Returns what the tables of both papers say beside what the records say.

    A gain, by the best of all evaluations as in the papers, is paired over seeds; it must exceed
    its standard error. With one seed nothing is decided: a statement that no benchmark has two
    seeds of is a row with the command that would decide it.
    """
    benchmarks = {
        name: [read_records(folder / f"{name}{end}.jsonl") for end in ("", "_multi_head")]
        for name in ("mt3", "mt10")
    }
    found = {
        name: (runs_with_heads(*both), both[0][0]["config"])
        for name, both in benchmarks.items()
        if both[0]
    }
    made = []
    for source in TABLES if found else ():
        for text, pairs in statements(source):
            ours = [judged(*each, text, source, pairs) for each in found.values()]
            told = [one for one in ours if one is not None]
            if not told:
                paper, command = paper_of(TABLES[source][0], pairs), command_of(source, pairs)
                odd = f"rewards v2 in place of v1; {CODE_DIFFERS}"
                told = [not_runnable(f"MT10: {text}", source, command, paper, "", odd)]
            made += told
    return made


def conclude(records: Sequence[Record]) -> str:
    """Returns which methods reached high success, and how far they lie from the mean."""
    runs = runs_of(records)
    high = [f"{m} ({np.mean(last(r)):.2f})" for m, r in runs.items() if np.mean(last(r)) >= HIGH]
    low = [f"{m} ({np.mean(last(r)):.2f})" for m, r in runs.items() if np.mean(last(r)) < HIGH]
    text = f"Success of {HIGH} or more at the last evaluation: {', '.join(high) or 'none'}."
    if low:
        text += f" Not reached: {', '.join(low)}."
    return text + " The papers report the best of all evaluations, which is above the last."


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns tables and figure of a benchmark, or of the learner alone."""
    name = part_name(args)
    records = read_records(folder / f"{name}.jsonl")
    if not records:
        return Report([], {})
    if name == LEARNER:
        return Report([learner_table(records)], {})
    makers = success_table, tasks_table, gradients_table, weights_table, rates_table
    tables = [make(records) for make in makers]
    if name == "mt10":
        tables.append(published_table())
    return Report(tables, {f"{name}.png": partial(draw, records)}, conclude(records))
