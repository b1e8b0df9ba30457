"""Two tasks that pull apart, 20 times: what the mean and three methods do to each loss.

    python -m experiments.quickstart                 # seconds; figure in results/quickstart.png

A network of two hidden units learns two targets from eight features. The second target is three
times (one of its own less the first): the tasks conflict, and the second shouts. Everything is
drawn anew in each of 20 problems, which are trained at once by `vmap`: 300 steps of SGD at 0.02
on the whole data, whatever the method. (Methods differ in the length of their step too: CAGrad's
is up to 1.5 times the mean's.)

**Result**: with the mean the first loss rises above its start in 12 of 20 problems, to 3.5 times
the start in one; with CAGrad in 4; with UPGrad and MGDA in none. After 300 steps UPGrad's losses
are those of the mean within two standard errors. MGDA leaves the second loss high: it stops caring
for a task whose gradient is long.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jaxmtl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "mean": "linear_scalarization",
    "MGDA": "mgda",
    "CAGrad": "cagrad",
    "UPGrad": "upgrad",
}
PROBLEMS, STEPS, RATE = 20, 300, 0.02
TOLERANCE = 1.001  # a loss has risen when it exceeds its start by a thousandth


class Problem(NamedTuple):
    """Data and first parameters."""

    x: jax.Array  # (256, 8)
    y: jax.Array  # (256, 2)
    params: dict[str, jax.Array]


def draw_problem(key: jax.Array) -> Problem:
    """Returns a problem; that of ``jax.random.key(0)`` is the quickstart notebook's."""
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (256, 8))
    first = jnp.tanh(x @ jax.random.normal(keys[1], (8,)))
    own = jnp.tanh(x @ jax.random.normal(keys[2], (8,)))
    y = jnp.stack([first, 3 * (own - first)], axis=1)
    hidden = jax.random.normal(keys[3], (8, 2)) / 8**0.5
    return Problem(x, y, {"hidden": hidden, "bias": jnp.zeros(2), "out": jnp.ones((2, 2))})


def train(problem: Problem, aggregator: jaxmtl.Aggregator, steps: int = STEPS) -> jax.Array:
    """Returns the losses (steps, 2) before each step; safe under `jit` and `vmap`."""
    optimizer = optax.chain(aggregator, optax.sgd(RATE))

    def losses_fn(params: dict[str, jax.Array]) -> jax.Array:
        hidden = jnp.tanh(problem.x @ params["hidden"] + params["bias"])
        return jnp.mean((hidden @ params["out"] - problem.y) ** 2, axis=0)

    def step(carry, _):  # type: ignore[no-untyped-def]
        params, opt_state = carry
        losses, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params)
        updates, opt_state = optimizer.update(jacobian, opt_state, params, losses=losses)
        return (jaxmtl.apply_updates(params, updates), opt_state), losses

    carry = (problem.params, optimizer.init(problem.params))
    losses: jax.Array = jax.lax.scan(step, carry, length=steps)[1]
    return losses


def train_all(problems: int = PROBLEMS, steps: int = STEPS) -> dict[str, np.ndarray]:
    """Returns the losses (problems, steps, 2) of every method; the compiled runs take seconds."""
    keys = jax.random.split(jax.random.key(0), problems)

    def run(name: str) -> jax.Array:
        return jax.vmap(lambda key: train(draw_problem(key), jaxmtl.make(name), steps))(keys)

    return {title: np.asarray(jax.jit(run, static_argnums=0)(n)) for title, n in METHODS.items()}


class Summary(NamedTuple):
    """What a method did to the losses of all problems."""

    rose: int  # in how many problems the first loss exceeded its start
    worst: float  # the highest first loss, in units of its start
    ends: np.ndarray  # (2,) mean losses at the end
    errors: np.ndarray  # (2,) their standard errors


def summarize(losses: np.ndarray) -> Summary:
    """Returns the summary of losses (problems, steps, 2)."""
    highest = losses[:, :, 0].max(axis=1) / losses[:, 0, 0]
    ends = losses[:, -1]
    errors = ends.std(axis=0, ddof=1) / len(ends) ** 0.5
    return Summary(int((highest > TOLERANCE).sum()), float(highest.max()), ends.mean(0), errors)


def make_table(summaries: dict[str, Summary], problems: int) -> str:
    """Returns the table that is printed."""
    lines = [
        f"{'':8} {'loss 1 rose':>12} {'at worst, x start':>19} "
        f"{'loss 1, end':>17} {'loss 2, end':>17}"
    ]
    for title, found in summaries.items():
        ends = [f"{e:.3f} +- {s:.3f}" for e, s in zip(found.ends, found.errors, strict=True)]
        rose = f"{found.rose} of {problems}"
        lines.append(f"{title:8} {rose:>12} {found.worst:19.2f} {ends[0]:>17} {ends[1]:>17}")
    return "\n".join(lines)


def compare_ends(losses: np.ndarray, baseline: np.ndarray) -> list[str]:
    """Says of each loss how it ends beside the baseline's, on the same problems."""
    gaps = losses[:, -1] - baseline[:, -1]
    errors = gaps.std(axis=0, ddof=1) / len(gaps) ** 0.5
    return [
        "as low" if abs(gap) <= 2 * error else "lower" if gap < 0 else "higher"
        for gap, error in zip(gaps.mean(axis=0), errors, strict=True)
    ]


def conclude(losses: dict[str, np.ndarray]) -> str:
    """Returns the sentence that the numbers allow."""
    mean, upgrad = summarize(losses["mean"]), summarize(losses["UPGrad"])
    words = compare_ends(losses["UPGrad"], losses["mean"])
    return (
        f"The mean pays for the loud loss with the first one, which rises in {mean.rose} of "
        f"{len(losses['mean'])} problems (to {mean.worst:.1f} times its start at worst); with "
        f"UPGrad it rises in {upgrad.rose}, and ends {words[0]}, the second {words[1]}, within "
        "two standard errors of the paired difference."
    )


def draw(losses: dict[str, np.ndarray], path: Path) -> None:
    """Draws both losses over the steps: median and the range of all problems but the extremes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for i, axis in enumerate(axes):
        for color, (title, history) in zip(("0.4", "C1", "C2", "C0"), losses.items(), strict=True):
            relative = history[:, :, i] / history[:, :1, i]
            low, middle, high = np.quantile(relative, (0.1, 0.5, 0.9), axis=0)
            axis.plot(middle, color=color, label=title)
            axis.fill_between(range(len(middle)), low, high, color=color, alpha=0.12, lw=0)
        axis.axhline(1, color="black", lw=0.8, ls=":")
        axis.set(title=f"loss {i + 1} / its start", xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, prints the table, the figure's place and the conclusion."""
    parser = argparse.ArgumentParser(description="Trains twenty small problems by four methods.")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the figure")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    losses = train_all()
    summaries = {title: summarize(history) for title, history in losses.items()}
    draw(losses, args.out / "quickstart.png")
    print(f"{PROBLEMS} problems of two tasks, {STEPS} steps of SGD; ends with standard errors\n")
    print(make_table(summaries, PROBLEMS))
    print(f"\nFigure (median, 10 to 90 %): {args.out / 'quickstart.png'}")
    print(conclude(losses))


if __name__ == "__main__":
    main()
