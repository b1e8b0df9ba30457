"""Stochastic quadratics: rules that weigh noisy gradients do not converge, averaged ones do.

    python -m experiments.stochastic_quadratic

Example (4) of Zhou et al. 2022: two quadratics in the plane, each with two equally likely
outcomes, whose expectations have the Pareto set {(a, 0): |a| <= 1} on the domain |x| <= 1,
y >= 0. Weights that a rule computes from the drawn gradients are correlated with them, so that
the expected direction can point away from the Pareto set; `cr_mogm` averages the weights over the
steps. The expected directions are computed exactly, over the four pairs of outcomes, in float64.
The runs start at (0, 0.4) with eta_k = 0.006 / sqrt(k) and corollary 1's alpha_k; as a second
choice alpha = 0.9. Results are JSON lines in the folder `--out`; tables and figure are made from
them (`--report-only`), `--resume` goes on where a run stopped, `--smoke` takes seconds.

**Theorem 1 holds.** Exact expected directions along y, positive away from the Pareto set, and the
distance after 30,000 steps, mean and standard error over 20 seeds:

    method          E d_y at    least for   E d_y = 0   distance of      of CR-,         of CR-,
                    (0, 0.4)    y <= 0.05   at (0, y)   plain            corollary 1     0.9
    mgda            +0.246      +0.838      0.545       0.543 +- 0.002   0.010 +- 0.001  0.055
    pcgrad          +0.091      +0.052      0.453       0.454 +- 0.003   0.009 +- 0.002  0.026
    cagrad(0.4)     -0.268      +0.592      0.291       0.294 +- 0.002   0.009 +- 0.001  0.029
    cagrad(0.9)     +0.397      +1.457      0.531       0.534 +- 0.003   0.010 +- 0.002  0.046
    mean gradient   -0.800                  0           0.010 +- 0.001

Every rule stops where its expected direction vanishes, far outside the 0.05 that the proof needs.
If one draw decided both objectives, all directions at (0, 0.4) would be negative.
CAGrad moves away from (0, 0.4), as figure 1a has it, only if its c, which the paper does not
state, is large: with 0.9, not with 0.4, whose losses hence do not rise significantly.

Figure 1 holds but for one point. The CR- forms come as near as the mean gradient does, whose
noise floor this is, while a constant alpha keeps a gap, a tenth of the plain one at most. But
corollary 1 freezes the weights early, each seed at others, so that the runs end at different
points of the Pareto set: their two losses vary by up to 0.4 over seeds (standard error), and one
loss alone is not always lower than the plain method's.

Gaussian noise: with the covariance of the two outcomes the distances are 0.310 (MGDA), 0.086,
0.228 and 0.345, and 0.01 at most for CR-. With independent entries of the same deviation there is
no gap (0.012 at most without CR-): the noise is then symmetric about the Pareto set, and the
expected direction on it is zero. What the plain rules suffer from is noise along one coordinate
that decides about weights and drags another along.

**Reference**: Zhou et al. 2022, section 4 (example 4, theorem 1, figure 1), corollary 1 and
section 6.

**Differs from** Zhou et al., who do not say it: both objectives draw their outcomes
independently, and iterates are projected onto the domain. Of the Gaussian noise only the name is
known here: `gaussian` has the covariance of the two-point noise, `isotropic` its deviations alone.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.progress import track

import jaxmtl
from experiments._runs import (
    Claim,
    Record,
    append_records,
    environment,
    make_console,
    mean_and_error,
    read_records,
    show,
)
from experiments.methods import pcgrad_mean
from experiments.stochastic_quadratic_report import (
    BASELINE,
    FORMS,
    GAP,
    NOISES,
    STUDIED,
    claims_of_runs,
    claims_of_theorem,
    draw,
    find,
    make_tables,
    of_kind,
)

COMMAND = "python -m experiments.stochastic_quadratic --out experiments/results"
FIGURES = ("stochastic_quadratic.png",)

# Zhou et al. do not state CAGrad's c: 0.4 is that of Liu et al. and of our MultiMNIST.
METHODS: dict[str, Callable[[], jaxmtl.Aggregator]] = {
    BASELINE: jaxmtl.linear_scalarization,
    "mgda": jaxmtl.mgda,
    "pcgrad": pcgrad_mean,
    "cagrad(0.4)": lambda: jaxmtl.cagrad(0.4),
    "cagrad(0.9)": lambda: jaxmtl.cagrad(0.9),
}

# Zhou 2022, eq. 4: (objective, outcome, coordinate), each outcome with probability 1/2.
CENTRES = np.array([[[-1.0, 2.0], [-5.0, -2.0]], [[1.0, 2.0], [5.0, -2.0]]])


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method, form, noise and seed."""

    steps: int = 30_000  # not stated; the mean of the gradients is near its noise floor then
    learning_rate: float = 0.006  # eta_1, section 6; eta_k = eta_1 / sqrt(k)
    start: tuple[float, float] = (0.0, 0.4)  # section 6
    deviation: float = 4.0  # of each entry under isotropic noise, that of the two-point noise
    points: int = 40  # of each recorded curve, equally spaced in log k


# --- the problem --------------------------------------------------------------------------------


def losses_fn(x: jax.Array) -> jax.Array:
    """Return the expected objectives (2,) at x (2,)."""
    return jnp.mean(jnp.sum((x - CENTRES) ** 2, axis=-1), axis=1)


def sampled_gradients(x: jax.Array, z: jax.Array) -> jax.Array:
    """Return the gradients (2, 2) of a draw z (2,), one per objective.

    -1 and 1 are the two outcomes. Any z of mean 0 and variance 1 gives their mean and covariance.
    """
    middle, half = CENTRES.mean(axis=1), (CENTRES[:, 1] - CENTRES[:, 0]) / 2
    return 2 * (x - middle - z[:, None] * half)


def project(x: jax.Array) -> jax.Array:
    """Return the nearest point of the domain, |x| <= 1 and y >= 0."""
    return jnp.stack([jnp.clip(x[0], -1, 1), jnp.maximum(x[1], 0)])


def directions(aggregator: jaxmtl.Aggregator, x: jax.Array) -> jax.Array:
    """Return d (2, 2, 2) for each outcome of the first and of the second objective."""
    state = aggregator.init(x)

    def direction(z: jax.Array) -> jax.Array:
        return -aggregator.update(sampled_gradients(x, z), state, x)[0]

    return jax.vmap(jax.vmap(direction))(jnp.array([[(-1, -1), (-1, 1)], [(1, -1), (1, 1)]]))


# --- theorem 1, by exact expectation ------------------------------------------------------------


def expectation_record(name: str) -> Record:
    """Return the expected directions on a grid over the domain, exact, in float64.

    Outcomes are independent; `at_start_shared` is for one draw that decides both objectives.
    """
    xs, ys = np.linspace(-1, 1, 41), np.linspace(0, 0.8, 161)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    with jax.enable_x64(True):
        of_points = jax.jit(jax.vmap(jax.vmap(lambda x: directions(METHODS[name](), x))))
        d = np.asarray(of_points(grid))  # (ys, xs, 2, 2, 2)
    expected = d.mean(axis=(2, 3))
    upward, centre = expected[..., 1], len(xs) // 2
    start = np.argmin(np.abs(ys - Options.start[1])), np.argmin(np.abs(xs - Options.start[0]))
    return {
        "kind": "expectation",
        "method": name,
        "at_start": expected[start].round(6).tolist(),
        "at_start_shared": ((d[start][0, 0] + d[start][1, 1]) / 2).round(6).tolist(),
        "least_below_gap": round(float(upward[ys <= GAP + 1e-9].min()), 6),
        # Up to this height the expected direction points up whatever x is.
        "strip": round(crossing(ys, upward.min(axis=1)), 4),
        "equilibrium": round(crossing(ys, upward[:, centre]), 4),
        "y": ys[::8].round(4).tolist(),
        "upward": upward[::8, centre].round(5).tolist(),
    }


def crossing(ys: np.ndarray, values: np.ndarray) -> float:
    """Return where values first pass from positive to negative, 0 if they start negative."""
    if values[0] <= 0:
        return 0.0
    k = int(np.argmax(values <= 0))
    return float(ys[k - 1] + (ys[k] - ys[k - 1]) * values[k - 1] / (values[k - 1] - values[k]))


# --- runs ---------------------------------------------------------------------------------------


def make_run(options: Options, name: str, form: str) -> Callable[..., jax.Array]:
    """Return a compiled function of keys (seeds,) and the noises to paths (noises, seeds, k, 2)."""

    def eta(step: jax.Array) -> jax.Array:
        return options.learning_rate / jnp.sqrt(1 + step)

    aggregator, alpha = METHODS[name](), FORMS[form]
    if alpha is not None:
        aggregator = jaxmtl.cr_mogm(aggregator, alpha=alpha, learning_rate=eta, num_tasks=2)
    optimizer = optax.chain(aggregator, optax.sgd(eta))

    def run(key: jax.Array, noise: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, Any], key: jax.Array) -> tuple[Any, jax.Array]:
            x, opt_state = carry
            signs, normal = jax.random.rademacher(key, (2,)), jax.random.normal(key, (2,))
            entries = options.deviation * jax.random.normal(key, (2, 2))
            z = jnp.stack([signs, normal, jnp.zeros(2)])[noise]
            gradients = sampled_gradients(x, z) + jnp.where(noise == 2, entries, 0)
            updates, opt_state = optimizer.update(gradients, opt_state, x, key=key)
            x = project(jaxmtl.apply_updates(x, updates))
            return (x, opt_state), x

        start = jnp.asarray(options.start)
        keys = jax.random.split(key, options.steps)
        return lax.scan(step, (start, optimizer.init(start)), keys)[1]

    seeds = jax.vmap(run, in_axes=(0, None))
    return jax.jit(jax.vmap(seeds, in_axes=(None, 0)))


def recorded_steps(options: Options) -> np.ndarray:
    """Return the numbers k of the recorded steps, each once."""
    return np.unique(np.geomspace(1, options.steps, options.points).round().astype(int))


def curve(values: np.ndarray) -> Record:
    """Return mean and standard error over seeds of (seeds, k)."""
    moments = [mean_and_error(column) for column in values.T]
    return {
        "mean": [round(mean, 5) for mean, _ in moments],
        "error": [round(error, 5) for _, error in moments],
    }


def run_records(options: Options, name: str, form: str, seeds: int) -> list[Record]:
    """Run all seeds under every noise; return one record per noise."""
    start = time.perf_counter()
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    run = make_run(options, name, form)
    chosen = recorded_steps(options)
    paths = np.asarray(run(keys, jnp.arange(len(NOISES)))[:, :, chosen - 1], np.float64)
    seconds = round(time.perf_counter() - start, 1)
    first = np.broadcast_to(np.asarray(options.start), (*paths.shape[:2], 1, 2))
    paths = np.concatenate([first, paths], axis=2)
    losses = np.asarray(jnp.vectorize(losses_fn, signature="(n)->(m)")(paths), np.float64)
    return [
        {
            "kind": "run",
            "method": name,
            "form": form,
            "noise": noise,
            "config": asdict(options),
            "seeds": seeds,
            "k": [0, *chosen.tolist()],
            "loss1": curve(losses[i, ..., 0]),
            "loss2": curve(losses[i, ..., 1]),
            "distance": curve(paths[i, ..., 1]),
            "final": {
                "loss1": losses[i, :, -1, 0].round(5).tolist(),
                "loss2": losses[i, :, -1, 1].round(5).tolist(),
                "distance": paths[i, :, -1, 1].round(5).tolist(),
            },
            "seconds": seconds,
            **environment(),
        }
        for i, noise in enumerate(NOISES)
    ]


def forms_of(name: str) -> tuple[str, ...]:
    """Return the forms of a method: fixed weights need no averaging."""
    return tuple(FORMS) if name in STUDIED else ("plain",)


def claims(folder: Path) -> list[Claim]:
    """Return the claims that the results in ``folder`` decide.

    Far from the Pareto set is more than 0.05 from it by an error, the range of theorem 1's proof;
    converging is nearer than that, by an error, and nearer than at a tenth of the steps.
    """
    records = read_records(folder / "stochastic_quadratic.jsonl")
    gaussian = "Zhou 2022, section 4 (appendix G.2)"
    return [
        *claims_of_theorem(records),
        *claims_of_runs(records, "two-point", "Zhou 2022, theorem 1 and figure 1"),
        *claims_of_runs(records, "gaussian", gaussian),
        *claims_of_runs(records, "isotropic", gaussian),
    ]


# --- main ---------------------------------------------------------------------------------------


def compute(
    options: Options, methods: Sequence[str], seeds: int, results: Path, console: Console
) -> None:
    """Compute what the results file does not hold yet."""
    records = read_records(results)
    for name in methods:
        if name not in {r["method"] for r in of_kind(records, "expectation")}:
            append_records(results, [expectation_record(name)])
    jobs = [(name, form) for name in methods for form in forms_of(name)]
    missing = [(n, f) for n, f in jobs if find(records, n, f, NOISES[-1]) is None]
    for name, form in track(missing, console=console, disable=not console.is_terminal):
        done = run_records(options, name, form, seeds)
        append_records(results, done)
        for record in done:
            distance = show(record["final"]["distance"], digits=4)
            console.print(f"{name}, {form}, {record['noise']} noise: distance {distance}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.stochastic_quadratic")
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), help="folder of results and figure")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--seeds", type=int, default=20)
    add("--steps", type=int, default=Options.steps)
    add("--resume", action="store_true", help="keep what the results file holds already")
    add("--report-only", action="store_true", help="tables and figure of an existing results file")
    add("--smoke", action="store_true", help="two seeds, thirty steps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, then report."""
    args = parse(argv)
    console = make_console()
    if args.smoke:
        args.seeds, args.steps = 2, 30
    options = replace(Options(), steps=args.steps)
    results = args.out / "stochastic_quadratic.jsonl"
    if not args.report_only:
        if not args.resume:
            results.unlink(missing_ok=True)
        configs = [r["config"] for r in read_records(results) if r["kind"] == "run"]
        expected = asdict(options) | {"start": list(options.start)}
        if any(config != expected for config in configs):
            raise SystemExit(f"expected the options of {results}, got {options}; drop --resume")
        compute(options, args.methods, args.seeds, results, console)
    records = read_records(results)
    if not records:
        raise SystemExit(
            f"expected results in {results}, got none; run without --report-only first"
        )
    for table in make_tables(records):
        console.print(table)
    figure = results.with_suffix(".png")
    draw(records, figure)
    console.print(f"{results} -> {figure}")


if __name__ == "__main__":
    main()
