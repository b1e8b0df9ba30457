"""Whole Pareto fronts in one compiled run: which methods reach which part of them.

    python -m experiments.examples.pareto_fronts                       # six problems by formula
    python -m experiments.examples.pareto_fronts --data-dir DIR        # and nine of RE
    python -m experiments.examples.pareto_fronts --out DIR --seeds 5   # the recorded study

Each method trains a set of points (20 for two objectives, 45 for three, 56 for four or six) from
starts drawn at random, the same for every method, with Adam in the unit cube, bounds by clipping.
Methods that take a preference get evenly spaced ones; the others get none and spread out by their
starts alone, if at all. `hypervolume` is the gradient of the whole set's hypervolume, which
`jax.grad` takes through `fronts.hypervolume` (Deist et al. 2021 in its simplest form).

Objectives are scaled so that the front fills [0, 1]. Of the non-dominated points of a set: the
hypervolume up to (1.1, ...), as a share of the front's; and the share of the front that is
reached: of its points, those with one of the set closer than 0.1 (0.15 for three objectives and
more). Means over seeds; the table is printed, and a figure per problem is drawn with ``--out``.

Recorded in ``experiments/results`` (``pareto_fronts.jsonl``, ``fronts_*.png``), 5 seeds; share of
the front that is reached:

              linear   stch   upgrad  cagrad  aligned   mgda   nash  hypervolume
    VLMOP1     1.00    0.90    0.65    1.00    1.00     0.76   0.30     1.00
    VLMOP2     0.15    1.00    0.93    0.14    0.14     0.39   0.42     1.00
    ZDT1       0.85    0.98    0.06    0.79    0.66     0.06   0.06     1.00
    ZDT2       0.14    1.00    0.07    0.07    0.14     0.07   0.07     1.00
    ZDT3       0.67    0.75    0.09    0.70    0.70     0.09   0.09     0.93
    DTLZ2      0.06    0.76    0.21    0.09    0.07     0.07   0.06     0.39
    RE21       1.00    1.00    0.86    0.85    0.99     0.13   0.13     1.00
    RE24       0.58    0.56    0.43    0.48    0.62     0.09   0.11     0.66
    RE31       0.16    0.17    0.30    0.26    0.28     0.34   0.27     0.28
    RE32       0.31    0.32    0.27    0.28    0.40     0.43   0.27     0.82
    RE33       0.45    0.52    0.30    0.38    0.54     0.65   0.17     0.79
    RE34       0.53    0.88    0.42    0.33    0.48     0.18   0.16     0.78
    RE37       0.45    0.92    0.23    0.30    0.37     0.05   0.05     0.87
    RE41       0.24    0.49    0.05    0.19    0.20     0.11   0.03      -

To cover a front take `stch` with spread preferences, or the hypervolume of the whole set. Sums with
fixed weights end at the ends of a concave front (VLMOP2, ZDT2, DTLZ2), whatever the weights, and
`cagrad` and `aligned_mtl` with preferences behave like them. `upgrad` stops at the first point
where no objective can fall: its preference does not say where. `mgda` and `nash_mtl` from many
starts gather in one place or, with Adam on ZDT, at an end. On RE24 and RE31 to RE33 an objective of
violated constraints spans up to ten orders of magnitude: there no method reaches more than 0.82,
and there alone, and on the convex VLMOP1, rules of gradients reach more than `stch`.
RE61, six objectives, is a problem of the module and was not run.

Beside LibMOON's table 1 (``--libmoon``; VLMOP2, which that table calls VLMOP1; ten points, its
script's default, as it does not state a number; hypervolume up to (1, 1)): linear 0.042 (theirs
0.043), stch 0.263 (0.244), mgda 0.189 (0.228, from other starts), hypervolume 0.297 (0.286).
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxmtl
from experiments.examples._front_problems import FORMULAS, PROBLEMS, Problem, load_front
from jaxmtl import fronts

STEPS, RATE, MARGIN = 2000, 1e-2, 0.01
PARTITIONS = {2: 19, 3: 8, 4: 5, 6: 3}

Make = Callable[[jax.Array], jaxmtl.Aggregator]

# From a preference to a method. STCH minimizes a smooth maximum of r_i l_i: where it ends, l_i is
# close to proportional to 1 / r_i.
METHODS: dict[str, Make] = {
    "linear_scalarization": jaxmtl.linear_scalarization,
    "stch": lambda r: jaxmtl.stch(0.01, preference=r),
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
    problem: Problem,
    method: str,
    chosen: jax.Array,
    starts: jax.Array,
    make: Make | None = None,
) -> jax.Array:
    """Returns the objectives (k, m) where a method ends for k preferences, from k starts (k, n)."""
    if method == "hypervolume":
        return ascend_hypervolume(problem, starts)
    aggregator = make or METHODS[method]

    def make_optimizer(preference: jax.Array) -> optax.GradientTransformation:
        return optax.chain(aggregator(preference), optax.adam(RATE))

    front = fronts.train(
        problem.losses_fn,
        make_optimizer,
        starts,
        chosen,
        num_steps=STEPS,
        project=into_cube,
        stacked=True,
    )
    return front.losses


def ascend_hypervolume(problem: Problem, starts: jax.Array) -> jax.Array:
    """Returns the objectives (k, m) of a set of points whose hypervolume is climbed.

    The derivative of the volume by a point's objectives gives the weights of its gradients. Points
    that are dominated have none: they descend the sum of their objectives. The reference point is
    (1.1, ...), or beyond the worst of the set.
    """
    adam = optax.adam(RATE)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        points, state = carry
        losses, jacobian = jax.vmap(jaxmtl.value_and_jacobian(problem.losses_fn))(points)
        corner = 1.1 * jnp.maximum(jnp.max(losses, axis=0), 1)
        weights = -jax.grad(fronts.hypervolume)(losses, corner)
        totals = jnp.sum(weights, axis=1, keepdims=True)
        weights = jnp.where(totals > 0, weights / jnp.where(totals > 0, totals, 1), 1)
        updates, state = adam.update(jnp.einsum("km,kmn->kn", weights, jacobian), state)
        return (into_cube(points + updates), state), None

    (points, _), _ = jax.lax.scan(step, (starts, adam.init(starts)), length=STEPS)
    return jax.vmap(problem.losses_fn)(points)


def measure(points: jax.Array, front: jax.Array) -> dict[str, jax.Array]:
    """Returns the measures of a set (k, m) beside the true front (f, m)."""
    m = points.shape[1]
    kept = fronts.non_dominated(points)
    distances = jax.vmap(lambda z: fronts.igd(points, z[None], mask=kept))(front)
    measures = {
        "reached": jnp.mean(distances < (0.1 if m == 2 else 0.15)),
        "igd_plus": fronts.igd(points, front, plus=True, mask=kept),
        "kept": jnp.sum(kept),
    }
    if m <= 3:
        corner = jnp.full(m, 1.1)
        total = fronts.hypervolume(front, corner)
        measures["hypervolume"] = fronts.hypervolume(points, corner) / total
    return measures


def study(problem: Problem, front: np.ndarray, seeds: int) -> dict[str, Any]:
    """Returns points (seeds, k, m) and measures (seeds,) of every method on one problem."""
    m, n = problem.num_tasks, len(problem.low)
    chosen = fronts.preferences(m, PARTITIONS[m], margin=MARGIN)
    starts = jax.random.uniform(jax.random.key(0), (seeds, len(chosen), n))
    results: dict[str, Any] = {}
    for method in SETS:
        if method == "hypervolume" and m > 3:
            continue
        run = functools.partial(train, problem, method, chosen)
        points = jax.jit(jax.vmap(run))(starts)
        measures = jax.vmap(measure, (0, None))(points, jnp.asarray(front))
        results[method] = {"points": np.asarray(points)} | jax.tree.map(np.asarray, measures)
    return results


# LibMOON's table 1 (its markdown/results.md): hypervolume up to (1, 1), mean and deviation. It is
# headed VLMOP1; the numbers are those of a concave front, of the class VLMOP2 of its code, which
# carries that name.
LIBMOON = {
    "linear_scalarization": ("Agg-LS", 0.043, 0.002),
    "stch": ("Agg-SoftTche", 0.244, 0.000),
    "mgda": ("MGDA-UB", 0.228, 0.008),
    "hypervolume": ("HVGrad", 0.286, 0.000),
}


def beside_libmoon(seeds: int) -> list[dict[str, Any]]:
    """Returns hypervolumes on VLMOP2 as in LibMOON's table: ten points, from near the front."""
    problem = PROBLEMS["VLMOP2"]()
    chosen = fronts.preferences(2, 9, margin=MARGIN)
    # On each side of the middle, 1 / sqrt(n) of a cube that reaches from -1 to 1.
    uniform = jax.random.uniform(jax.random.key(1), (seeds, 10, 10), minval=-1)
    starts = 0.5 + uniform / np.sqrt(10) / 2
    records = []
    for method, (name, mean, deviation) in LIBMOON.items():
        make = (lambda r: jaxmtl.stch(0.1, preference=r)) if method == "stch" else None
        run = functools.partial(train, problem, method, chosen, make=make)
        points = jax.jit(jax.vmap(run))(starts) * problem.nadir
        volumes = jax.vmap(fronts.hypervolume, (0, None))(points, jnp.ones(2))
        theirs = {"name": name, "mean": mean, "deviation": deviation}
        ours = np.round(volumes, 5).tolist()
        records.append({"problem": "VLMOP2, ten points", "method": method, "libmoon": theirs})
        records[-1]["volume"] = ours
    return records


# --- table and figures ------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]], quantity: str) -> str:
    """Returns the means of a quantity, a row per problem and a column per method."""
    lines = [f"{'':8}" + "".join(f"{method[:12]:>14}" for method in SETS)]
    names = list(dict.fromkeys(r["problem"] for r in records if "libmoon" not in r))
    for name in names:
        row = {r["method"]: r.get(quantity) for r in records if r["problem"] == name}
        cells = [
            f"{np.mean(value):14.3f}" if (value := row.get(method)) is not None else f"{'-':>14}"
            for method in SETS
        ]
        lines.append(f"{name:8}" + "".join(cells))
    return "\n".join(lines)


def draw(problem: Problem, front: np.ndarray, results: dict[str, Any], path: Path) -> None:
    """Saves a figure with the front in gray and where each method ended, first seed."""
    dimensions = min(problem.num_tasks, 3)  # of four and six objectives the first three
    figure = Figure(figsize=(2.3 * len(results), 2.9), layout="constrained")
    for i, (method, result) in enumerate(results.items()):
        spatial = {"projection": "3d", "elev": 28, "azim": 40} if dimensions == 3 else {}
        axis: Any = figure.add_subplot(1, len(results), i + 1, **spatial)
        where = front.T[:dimensions]
        axis.scatter(*where, s=4 if dimensions == 2 else 1, color="0.75", linewidths=0)
        points = np.clip(result["points"][0], -0.05, 1.15)
        axis.scatter(*points.T[:dimensions], s=16, color="tab:red", linewidths=0)
        axis.set_title(f"{method}\n{100 * np.mean(result['reached']):.0f} % reached", fontsize=9)
        axis.set(xlim=(-0.08, 1.18), ylim=(-0.08, 1.18), xticks=[0, 1], yticks=[0, 1])
        if dimensions == 3:
            axis.set(zlim=(-0.08, 1.18), zticks=[0, 1])
    figure.suptitle(f"{problem.name}: the front, and where {len(points)} points end")
    figure.savefig(path, dpi=80)


def records_of(problem: Problem, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a record for each method: every number but the points."""
    return [
        {"problem": problem.name, "method": method}
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
    names = [*PROBLEMS, "VLMOP2, ten points"]
    records = [r for r in records if r["problem"] != new[0]["problem"]] + new
    records.sort(key=lambda record: names.index(record["problem"]))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study, prints its table and, with ``--out``, writes records and figures."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with re_suite.zip")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, help="by default all there are")
    parser.add_argument("--libmoon", action="store_true", help="repeat a table of LibMOON as well")
    parser.add_argument("--seeds", type=int, default=1, help="sets of starts")
    parser.add_argument("--out", type=Path, help="folder for records and figures")
    options = parser.parse_args(argv)
    default = list(PROBLEMS) if options.data_dir else [make().name for make in FORMULAS]
    path = options.out / "pareto_fronts.jsonl" if options.out is not None else None
    records = read(path)
    with jax.enable_x64(True):  # the RE problems' objectives differ by up to 1e12
        for name in options.problems or default:
            problem = PROBLEMS[name]()
            front = load_front(problem, options.data_dir)
            results = study(problem, front, options.seeds)
            records = write(path, records, records_of(problem, results))
            if path is not None:
                draw(problem, front, results, path.with_name(f"fronts_{name.lower()}.png"))
        if options.libmoon:
            records = write(path, records, beside_libmoon(options.seeds))
    print("hypervolume, share of the front's\n" + table(records, "hypervolume"))
    print("share of the front reached\n" + table(records, "reached"))
    for record in records:
        if "libmoon" in record:
            theirs, ours = record["libmoon"], np.array(record["volume"])
            print(
                f"VLMOP2, ten points: {record['method']:21} {ours.mean():.3f} ({ours.std():.3f}), "
                f"LibMOON's {theirs['name']} {theirs['mean']:.3f} ({theirs['deviation']:.3f})"
            )


if __name__ == "__main__":
    main()
