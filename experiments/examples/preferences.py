"""Preferences at run time: a whole front in one compiled run, and which rules reach which points.

    python -m experiments.examples.preferences                # a table, in under a minute
    python -m experiments.examples.preferences --out DIR      # and a figure

A rule that takes a preference reads the one passed to ``update``, or to the function of
`jaxmtl.value_and_grad`, in place of the one given at construction: a traced value, over which
`jax.vmap` maps. Here one function trains a point for one preference; mapped over 21 preferences it
trains the front. All start from the same point, so that nothing but the preference tells them
apart.

Two fronts: a convex one (VLMOP1) and a concave one (VLMOP2), both scaled to [0, 1]. A point of the
front counts as reached if one of the 21 ends closer than 0.05 to it.

The share of each front that is reached:

    rule             convex  concave
    weighted sum      100 %      8 %
    stch               78 %    100 %
    pbi                70 %     98 %
    epo                73 %    100 %
    cagrad            100 %      7 %
    aligned_mtl       100 %      7 %
    upgrad             53 %     78 %

So: the weighted sum reaches a convex front evenly and of a concave one the two ends; CAGrad and
Aligned-MTL, whose preference weighs the gradients likewise, do the same. STCH, PBI and EPO, whose
preference asks for a ratio of losses, reach fronts of either shape: all of the concave one, and all
of the convex one but its ends, where even ratios lie far apart. UPGrad stops at the
first Pareto-stationary point on its way, on either front; the preference moves that point, but
never to the ends.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxmtl
from experiments.examples._front_problems import Problem, load_front, vlmop1, vlmop2
from jaxmtl import fronts

STEPS, RATE, NUM_PREFERENCES, CLOSE = 1000, 1e-2, 21, 0.05

# What each does with a preference r: the first two read losses, the others the Gramian.
RULES: dict[str, Callable[[], jaxmtl.Aggregator]] = {
    # Minimises sum_i r_i l_i, of which a concave front has only the ends.
    "weighted sum": jaxmtl.linear_scalarization,
    "stch": lambda: jaxmtl.stch(0.01),
    "pbi": jaxmtl.pbi,
    "epo": jaxmtl.epo,
    "cagrad": lambda: jaxmtl.cagrad(0.5),
    "aligned_mtl": jaxmtl.aligned_mtl,
    "upgrad": jaxmtl.upgrad,
}


def train(problem: Problem, rule: str, preference: jax.Array) -> jax.Array:
    """Returns the objectives (m,) where a rule ends for one preference (m,)."""
    aggregator, optimizer = RULES[rule](), optax.adam(RATE)
    value_and_grad = jaxmtl.value_and_grad(problem.losses_fn, aggregator)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        point, state, opt_state = carry
        (_, state), grads = value_and_grad(point, state, preference=preference)
        updates, opt_state = optimizer.update(grads, opt_state, point)
        return (optax.apply_updates(point, updates), state, opt_state), None

    start = jnp.linspace(0.2, 0.7, len(problem.low))
    carry = (start, aggregator.init(start), optimizer.init(start))
    (point, *_), _ = jax.lax.scan(step, carry, length=STEPS)
    return problem.losses_fn(point)


def train_front(problem: Problem, rule: str) -> jax.Array:
    """Returns the objectives (k, m) for all preferences, in one compiled run."""
    chosen = fronts.preferences(2, NUM_PREFERENCES - 1, margin=0.01)
    run = jax.jit(jax.vmap(lambda preference: train(problem, rule, preference)))
    ends: jax.Array = run(chosen)
    return ends


def reached(points: np.ndarray, front: np.ndarray) -> float:
    """Returns the share of the front's points (f, m) that have one of (k, m) close to them."""
    distances = np.linalg.norm(front[:, None] - points[None], axis=-1)
    return float(np.mean(distances.min(axis=1) < CLOSE))


def study() -> dict[str, dict[str, Any]]:
    """Returns by problem the front, and by rule the points where it ends."""
    found: dict[str, dict[str, Any]] = {}
    for shape, problem in {"convex": vlmop1(), "concave": vlmop2()}.items():
        front = load_front(problem, None, 500)
        ends = {rule: np.asarray(train_front(problem, rule)) for rule in RULES}
        found[shape] = {"front": front, "ends": ends}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the shares reached, one line per rule."""
    lines = [f"{'rule':14}" + "".join(f"{shape:>9}" for shape in found)]
    for rule in RULES:
        shares = (100 * reached(part["ends"][rule], part["front"]) for part in found.values())
        lines.append(f"{rule:14}" + "".join(f"{share:7.0f} %" for share in shares))
    return "\n".join(lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Saves a figure: a row per front, a column per rule, preferences from blue to yellow."""
    figure = Figure(figsize=(2.0 * len(RULES), 2.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(RULES), sharex=True, sharey=True)
    for row, (shape, part) in zip(axes, found.items(), strict=True):
        for axis, (rule, ends) in zip(row, part["ends"].items(), strict=True):
            axis.scatter(*part["front"].T, s=4, color="0.8", linewidths=0)
            axis.scatter(*ends.T, s=18, c=range(len(ends)), linewidths=0)
            share = 100 * reached(ends, part["front"])
            axis.set_title(f"{rule}: {share:.0f} %", fontsize=9)
            axis.set(xticks=[0, 1], yticks=[0, 1])
        row[0].set_ylabel(f"{shape} front", fontsize=9)
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all fronts, prints the table and, with ``--out``, draws the figure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figure")
    options = parser.parse_args(argv)
    found = study()
    print(f"share of the front reached by {NUM_PREFERENCES} preferences\n{table(found)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(found, options.out / "preferences.png")


if __name__ == "__main__":
    main()
