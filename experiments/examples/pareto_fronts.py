"""Whole Pareto fronts in one compiled run: which methods reach which part of them.

    python -m experiments.examples.pareto_fronts                       # a convex and a concave one
    python -m experiments.examples.pareto_fronts --problems ZDT3 DTLZ2
    python -m experiments.examples.pareto_fronts --data-dir DIR --problems RE37
    python -m experiments.examples.pareto_fronts --data-dir DIR --recorded --seeds 5 --out OUT

DIR holds ``re_suite.zip``, the fronts of the RE problems. Each method trains a set of points (20
for two objectives, 45 for three, 56 for four or six) from starts drawn at random, the same for
every method, with Adam in the unit cube, bounds by clipping. Methods that take a preference get
evenly spaced ones; the others get none and spread out by their starts alone, if at all.
`hypervolume` is the gradient of the whole set's hypervolume, which `jax.grad` takes through
`fronts.hypervolume` (Deist et al. 2021 in its simplest form).

Objectives are scaled so that the front fills [0, 1]. Of the non-dominated points of a set: the
hypervolume up to (1.1, ...), as a share of the front's; and the share of the front that is
reached: of its points, those with one of the set closer than 0.1 (0.15 for three objectives and
more), also of its middle and of its ends alone. For six objectives (RE61) the volumes are estimates
from 262,144 points drawn in the box, of standard error ``sqrt(v (1 - v)) / 512`` for a share v of
the box. Means over seeds; the tables are printed, and a figure per problem is drawn with ``--out``.

Recorded in ``experiments/results/fronts``, five seeds, with notes and all tables; share of the
front that is reached:

            linear   stch  tcheby   pbi  cosmos   epo  pmgda  upgrad  cagrad  mgda  hypervolume
    VLMOP1    1.00   0.90    0.92  0.76    0.53  0.91   0.91    0.65    1.00  0.76         1.00
    VLMOP2    0.15   1.00    1.00  0.99    1.00  1.00   1.00    0.93    0.14  0.39         1.00
    ZDT1      0.85   0.98    1.00  1.00    0.76  1.00   0.31    0.05    0.79  0.05         1.00
    ZDT2      0.14   1.00    1.00  1.00    1.00  1.00   0.07    0.07    0.07  0.07         1.00
    ZDT3      0.66   0.75    0.78  0.66    0.63  0.76   0.68    0.09    0.70  0.09         0.93
    DTLZ2     0.06   0.76    0.73  0.98    0.99  0.74   0.96    0.21    0.09  0.07         0.39
    RE21      1.00   1.00    1.00  1.00    0.75  1.00   0.44    0.86    0.85  0.13         1.00
    RE24      0.58   0.56    0.53  0.33    0.31  0.48   0.50    0.43    0.48  0.09         0.66
    RE31      0.16   0.17    0.17  0.16    0.17  0.27   0.36    0.30    0.26  0.31         0.28
    RE32      0.31   0.32    0.32  0.27    0.29  0.33   0.33    0.27    0.28  0.43         0.82
    RE33      0.45   0.52    0.54  0.37    0.44  0.67   0.68    0.30    0.38  0.65         0.79
    RE34      0.53   0.88    0.90  0.73    0.77  0.52   0.35    0.42    0.33  0.18         0.78
    RE37      0.45   0.92    0.90  0.89    0.87  0.67   0.18    0.23    0.29  0.05         0.87
    RE41      0.23   0.49    0.50  0.49    0.52  0.56   0.12    0.05    0.19  0.11         0.63
    RE61      0.38   0.37    0.49  0.29    0.54  0.48   0.38    0.12    0.44  0.23            -

To cover a front of two objectives take `tchebycheff`, `stch` or `epo` with spread preferences, or
the hypervolume of the whole set. With three objectives and more it depends on the front: on the
sphere of DTLZ2 `cosmos`, `pbi` and `pmgda` lead and the Tchebycheff forms leave gaps; on RE34 and
RE37 the Tchebycheff forms lead. RE31 to RE33 crowd into a corner of the scaled box, where spread
preferences end close together: there, and on RE41, the hypervolume of the set reaches most, RE31
apart, where nothing reaches half. Sums with fixed weights end at the ends of a concave front
(VLMOP2, ZDT2, DTLZ2), whatever the weights, and `cagrad` and `aligned_mtl` with preferences behave
like them. COSMOS leaves out the ends of a convex front; PMGDA does not arrive where the starts are
far from the front (ZDT). `upgrad` stops at the first point where no objective can fall: its
preference does not say where. `mgda` and `nash_mtl` from many starts gather in one place or, on
ZDT, at an end.

Ten points on VLMOP2 stand beside LibMOON's table 1 in the notes (it calls the problem VLMOP1; ten
points are its script's default, as it does not state a number): the order is the same.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxmtl
from experiments.examples._front_problems import PROBLEMS, Problem, load_front
from experiments.report import with_tables
from jaxmtl import fronts

STEPS, RATE, MARGIN = 2000, 1e-2, 0.01
PARTITIONS = {2: 19, 3: 8, 4: 5, 6: 3}
QUICK = ("VLMOP1", "VLMOP2")  # a convex front and a concave one: most of the time is compilation
SAMPLES = 2**18

Make = Callable[[jax.Array], jaxmtl.Aggregator]
Losses = Callable[[jax.Array], jax.Array]

# From a preference to a method. STCH, Tchebycheff and EPO make all r_i l_i equal: where they end,
# l_i is proportional to 1 / r_i. PBI, COSMOS and PMGDA hold l to the direction of r.
METHODS: dict[str, Make] = {
    "linear_scalarization": jaxmtl.linear_scalarization,
    "stch": lambda r: jaxmtl.stch(0.01, preference=r),
    "tchebycheff": lambda r: jaxmtl.tchebycheff(preference=r),
    "pbi": lambda r: jaxmtl.pbi(preference=r),
    "cosmos": lambda r: jaxmtl.cosmos(8.0, preference=r),
    "epo": lambda r: jaxmtl.epo(preference=r),
    "pmgda": lambda r: jaxmtl.pmgda(preference=r),
    "upgrad": lambda r: jaxmtl.upgrad(preference=r),
    "cagrad": lambda r: jaxmtl.cagrad(0.5, preference=r),
    "aligned_mtl": lambda r: jaxmtl.aligned_mtl(preference=r),
    "mgda": lambda r: jaxmtl.mgda(),
    "nash_mtl": lambda r: jaxmtl.nash_mtl(),
}
SETS = (*METHODS, "hypervolume")


def into_cube(unit: jax.Array) -> jax.Array:
    """Returns the nearest point of the unit cube."""
    return jnp.clip(unit, 0, 1)


def train(
    losses_fn: Losses,
    method: str,
    chosen: jax.Array,
    starts: jax.Array,
    steps: int = STEPS,
    *,
    make: Make | None = None,
    project: Callable[[jax.Array], jax.Array] = into_cube,
) -> jax.Array:
    """Returns the points (k, n) where a method ends for k preferences, from k starts (k, n)."""
    if method == "hypervolume":
        return ascend_hypervolume(losses_fn, starts, steps, project)
    aggregator = make or METHODS[method]

    def make_optimizer(preference: jax.Array) -> optax.GradientTransformation:
        return optax.chain(aggregator(preference), optax.adam(RATE))

    front = fronts.train(
        losses_fn,
        make_optimizer,
        starts,
        chosen,
        num_steps=steps,
        project=project,
        stacked=True,
    )
    points: jax.Array = front.params
    return points


def ascend_hypervolume(
    losses_fn: Losses, starts: jax.Array, steps: int, project: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns a set of points (k, n) whose hypervolume is climbed, from k starts.

    The derivative of the volume by a point's objectives gives the weights of its gradients. Points
    that are dominated have none: they descend the sum of their objectives. The reference point is
    (1.1, ...), or beyond the worst of the set.
    """
    adam = optax.adam(RATE)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        points, state = carry
        losses, jacobian = jax.vmap(jaxmtl.value_and_jacobian(losses_fn))(points)
        corner = 1.1 * jnp.maximum(jnp.max(losses, axis=0), 1)
        weights = -jax.grad(fronts.hypervolume)(losses, corner)
        totals = jnp.sum(weights, axis=1, keepdims=True)
        weights = jnp.where(totals > 0, weights / jnp.where(totals > 0, totals, 1), 1)
        updates, state = adam.update(jnp.einsum("km,kmn->kn", weights, jacobian), state)
        return (project(points + updates), state), None

    (points, _), _ = jax.lax.scan(step, (starts, adam.init(starts)), length=steps)
    return points


def halves(front: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which points of a front (f, m) are its middle, and which its ends.

    The middle is the half of the points nearest in angle to the diagonal, on which all objectives
    are equal.
    """
    cosines = front.sum(axis=1) / np.maximum(np.linalg.norm(front, axis=1), 1e-12)
    middle = cosines >= np.median(cosines)
    return middle, ~middle


def dominated(points: jax.Array, samples: jax.Array) -> jax.Array:
    """Returns which samples (s, m) are dominated by one of the points (k, m)."""

    def one(sample: jax.Array) -> jax.Array:
        return jnp.any(jnp.all(points <= sample[None, :], axis=1))

    found: jax.Array = jax.lax.map(one, samples, batch_size=1024)
    return found


def volume_of(m: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the volume of points (k, m) up to (1.1, ...), as a share of that of the box.

    Exact for up to four objectives. For six, whose front has 2,999 points, the share of points
    drawn at random in the box that are dominated, the same for every set.
    """
    if m <= 4:
        return lambda points: fronts.hypervolume(points, jnp.full(m, 1.1)) / 1.1**m
    samples = jax.random.uniform(jax.random.key(2), (SAMPLES, m), maxval=1.1)
    return lambda points: jnp.mean(dominated(points, samples))


def measure(points: jax.Array, front: jax.Array, middle: jax.Array) -> dict[str, jax.Array]:
    """Returns the measures of a set (k, m) beside the true front (f, m)."""
    m = points.shape[1]
    kept = fronts.non_dominated(points)
    distances = jax.vmap(lambda z: fronts.igd(points, z[None], mask=kept))(front)
    reached = distances < (0.1 if m == 2 else 0.15)
    return {
        "reached": jnp.mean(reached),
        "middle": jnp.mean(reached, where=middle),
        "ends": jnp.mean(reached, where=~middle),
        "igd_plus": fronts.igd(points, front, plus=True, mask=kept),
        "kept": jnp.sum(kept),
        "volume": volume_of(m)(points),
    }


def measured(front: np.ndarray, found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Returns by method its points (seeds, k, m) and their measures (seeds,)."""
    true, middle = jnp.asarray(front), jnp.asarray(halves(front)[0])
    volume = float(jax.jit(volume_of(front.shape[1]))(true))
    measures_of = jax.jit(jax.vmap(measure, (0, None, None)))
    results = {}
    for method, points in found.items():
        measures = measures_of(jnp.asarray(points), true, middle)
        measures["hypervolume"] = measures.pop("volume") / volume
        results[method] = {"points": points} | jax.tree.map(np.asarray, measures)
    return results


def study(
    problems: Sequence[Problem],
    true_fronts: Sequence[np.ndarray],
    seeds: int,
    steps: int = STEPS,
    methods: Sequence[str] = SETS,
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yields for each problem its name, and points (seeds, k, m) and measures of every method.

    The problems have the same number of objectives. A method is compiled once for all of them: the
    problem is a traced number, and variables that one does not have lie idle.
    """
    m, widest = problems[0].num_tasks, max(len(problem.low) for problem in problems)
    chosen = fronts.preferences(m, PARTITIONS[m], margin=MARGIN)

    def losses_fn(unit: jax.Array, which: jax.Array) -> jax.Array:
        cases = [lambda unit, p=p: p.losses_fn(unit[: len(p.low)]) for p in problems]
        losses: jax.Array = jax.lax.switch(which, cases, unit)
        return losses

    @functools.cache
    def compiled(method: str) -> Callable[[jax.Array, int], jax.Array]:
        def run(starts: jax.Array, which: jax.Array) -> jax.Array:
            def of(unit: jax.Array) -> jax.Array:
                return losses_fn(unit, which)

            found: jax.Array = jax.vmap(of)(train(of, method, chosen, starts, steps))
            return found

        return jax.jit(jax.vmap(run, (0, None)))

    for which, (problem, front) in enumerate(zip(problems, true_fronts, strict=True)):
        n = len(problem.low)
        starts = jax.random.uniform(jax.random.key(0), (seeds, len(chosen), n))
        starts = jnp.pad(starts, ((0, 0), (0, 0), (0, widest - n)))
        found = {
            method: np.asarray(compiled(method)(starts, which))
            for method in methods
            if method != "hypervolume" or m <= 4  # k^(m - 1) operations a step
        }
        yield problem.name, measured(front, found)


# LibMOON's table 1 (its markdown/results.md): hypervolume up to (1, 1), mean and deviation. It is
# headed VLMOP1; the numbers are those of a concave front, of the class VLMOP2 of its code, which
# carries that name. Beside them its code's parameters, where they are not those of `METHODS`.
LIBMOON: dict[str, tuple[str, float, float, Make | None]] = {
    "linear_scalarization": ("Agg-LS", 0.043, 0.002, None),
    "stch": ("Agg-SoftTche", 0.244, 0.000, lambda r: jaxmtl.stch(0.1, preference=r)),
    "tchebycheff": ("Agg-Tche", 0.283, 0.000, None),
    "pbi": ("Agg-PBI", 0.281, 0.002, lambda r: jaxmtl.pbi(1.0, preference=r)),
    "cosmos": (
        "Agg-COSMOS",
        0.285,
        0.000,
        lambda r: jaxmtl.cosmos(8.0, preference=r / jnp.linalg.norm(r)),
    ),
    "epo": ("EPO", 0.283, 0.000, None),
    "pmgda": ("PMGDA", 0.283, 0.000, lambda r: jaxmtl.pmgda(0.95, preference=r)),
    "mgda": ("MGDA-UB", 0.228, 0.008, None),
    "hypervolume": ("HVGrad", 0.286, 0.000, None),
}


def beside_libmoon(seeds: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """Returns hypervolumes on VLMOP2 as in LibMOON's table: ten points, from near the front."""
    problem = PROBLEMS["VLMOP2"]()
    chosen = fronts.preferences(2, 9, margin=MARGIN)
    # On each side of the middle, 1 / sqrt(n) of a cube that reaches from -1 to 1.
    uniform = jax.random.uniform(jax.random.key(1), (seeds, 10, 10), minval=-1)
    starts = 0.5 + uniform / np.sqrt(10) / 2
    records = []
    for method, (name, mean, deviation, make) in LIBMOON.items():

        def run(starts: jax.Array, method: str = method, make: Make | None = make) -> jax.Array:
            points = train(problem.losses_fn, method, chosen, starts, steps, make=make)
            return fronts.hypervolume(
                jax.vmap(problem.losses_fn)(points) * problem.nadir, jnp.ones(2)
            )

        volumes = jax.jit(jax.vmap(run))(starts)
        theirs = {"name": name, "mean": mean, "deviation": deviation}
        ours = np.round(volumes, 5).tolist()
        records.append({"problem": "VLMOP2, ten points", "method": method, "libmoon": theirs})
        records[-1]["volume"] = ours
    return records


# --- tables and figures -----------------------------------------------------------------------

QUANTITIES = {
    "reached": "Share of the front that is reached",
    "middle": "Share of its middle",
    "ends": "Share of its ends",
    "hypervolume": "Hypervolume, as a share of the front's",
}


def table(records: Sequence[dict[str, Any]], quantity: str) -> list[list[str]]:
    """Returns the means of a quantity, a row per problem and a column per method."""
    rows = [["", *(method.replace("linear_scalarization", "linear") for method in SETS)]]
    for name in dict.fromkeys(r["problem"] for r in records if "libmoon" not in r):
        here = [r for r in records if r["problem"] == name and quantity in r]
        row = {r["method"]: r[quantity] for r in here}
        cells = [f"{np.mean(row[m]):.2f}" if m in row else "-" for m in SETS]
        rows.append([name, *cells])
    return rows


def libmoon_table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns hypervolumes beside those of LibMOON's table, mean and deviation."""
    rows = [["method", "here", "LibMOON", "its name"]]
    for record in records:
        if "libmoon" in record:
            theirs, ours = record["libmoon"], np.array(record["volume"])
            here = f"{ours.mean():.3f} ({ours.std():.3f})"
            there = f"{theirs['mean']:.3f} ({theirs['deviation']:.3f})"
            rows.append([record["method"], here, there, theirs["name"]])
    return rows


def tables(records: Sequence[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Returns every table by its title."""
    found = {title: table(records, quantity) for quantity, title in QUANTITIES.items()}
    beside = libmoon_table(records)
    return found | ({"VLMOP2, ten points, up to (1, 1)": beside} if len(beside) > 1 else {})


def draw(
    name: str,
    front: np.ndarray,
    results: dict[str, Any],
    path: Path,
    labels: Sequence[str] = ("objective 1", "objective 2"),
) -> None:
    """Saves a figure with the front in gray and where each method ended, first seed."""
    dimensions = min(front.shape[1], 3)  # of four and six objectives the first three
    columns = -(-len(results) // 2)
    figure = Figure(figsize=(2.1 * columns, 5.4), layout="constrained")
    for i, (method, result) in enumerate(results.items()):
        spatial = {"projection": "3d", "elev": 28, "azim": 40} if dimensions == 3 else {}
        axis: Any = figure.add_subplot(2, columns, i + 1, **spatial)
        where = front.T[:dimensions]
        dots = 1 if dimensions == 3 else 4 if len(front) > 200 else 14
        axis.scatter(*where, s=dots, color="0.7", linewidths=0)
        points = np.clip(result["points"][0], -0.05, 1.15)
        axis.scatter(*points.T[:dimensions], s=16, color="tab:red", linewidths=0)
        share = 100 * np.mean(result["reached"])
        axis.set_title(f"{method.replace('_scalarization', '')}\n{share:.0f} % reached", fontsize=9)
        axis.set(xlim=(-0.08, 1.18), ylim=(-0.08, 1.18), xticks=[0, 1], yticks=[0, 1])
        if dimensions == 2:
            axis.set_xlabel(labels[0] if i >= columns else "", fontsize=8)
            axis.set_ylabel(labels[1] if i % columns == 0 else "", fontsize=8)
        if dimensions == 3:
            axis.set(zlim=(-0.08, 1.18), zticks=[0, 1])
    shown = "" if dimensions == front.shape[1] else f", {dimensions} objectives of more"
    figure.suptitle(f"{name}: the front (gray), and where {len(points)} points end{shown}")
    figure.savefig(path, dpi=70)


def records_of(name: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a record for each method: every number but the points."""
    return [
        {"problem": name, "method": method}
        | {key: np.round(value, 5).tolist() for key, value in result.items() if key != "points"}
        for method, result in results.items()
    ]


def read(path: Path | None) -> list[dict[str, Any]]:
    """Returns the records of a file, none where there is no file."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(
    path: Path | None, records: list[dict[str, Any]], new: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the records with those of one problem renewed; writes them if there is a path."""
    names = [*PROBLEMS, "Census", "VLMOP2, ten points"]
    records = [r for r in records if r["problem"] != new[0]["problem"]] + new
    records.sort(key=lambda record: names.index(record["problem"]))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def report(folder: Path | None, records: Sequence[dict[str, Any]]) -> None:
    """Prints the tables and, where there is a folder, writes them into its notes."""
    for title, rows in tables(records).items():
        widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
        print(title)
        for row in rows:
            print("".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if folder is not None:
        page = folder / "notes.md"
        prose = page.read_text() if page.exists() else ""
        page.write_text(with_tables(prose, tables(records).items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study, prints its tables and, with ``--out``, writes records, figures and notes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with re_suite.zip")
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=QUICK)
    parser.add_argument("--libmoon", action="store_true", help="repeat a table of LibMOON")
    parser.add_argument("--recorded", action="store_true", help="all problems, and that table")
    parser.add_argument("--methods", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--seeds", type=int, default=1, help="sets of starts")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, help="results go to its folder fronts")
    options = parser.parse_args(argv)
    folder = options.out / "fronts" if options.out is not None else None
    path = folder / "problems.jsonl" if folder is not None else None
    records = read(path)
    with jax.enable_x64(True):  # the RE problems' objectives differ by up to 1e12
        names = PROBLEMS if options.recorded else options.problems
        groups: dict[int, list[Problem]] = {}
        for problem in (PROBLEMS[name]() for name in names):
            groups.setdefault(problem.num_tasks, []).append(problem)
        for problems in groups.values():
            true = [load_front(problem, options.data_dir) for problem in problems]
            runs = study(problems, true, options.seeds, options.steps, options.methods)
            for (name, results), front in zip(runs, true, strict=True):
                records = write(path, records, records_of(name, results))
                if folder is not None:
                    draw(name, front, results, folder / f"{name.lower()}.png")
        if options.recorded or options.libmoon:
            records = write(path, records, beside_libmoon(options.seeds, options.steps))
    report(folder, records)


if __name__ == "__main__":
    main()
