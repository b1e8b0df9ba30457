"""The landscape of Liu et al. 2021 under three papers' methods: who reaches the Pareto front.

    python -m experiments.toy --out experiments/results                  # a few minutes
    python -m experiments.toy --out experiments/results --report-only    # tables and figures alone

Two parameters, two losses, Adam, and each paper's starts, steps, rates and noise; the landscape,
its front and how its printed forms differ are in `experiments.models.landscape`. Starts and seeds
are `vmap`ped, a run is one `scan`; a method gets gradients and losses and is never named by the
driver. A run has reached the front (or an optimum) if its losses are within 0.5 of it, of 20 by
which either loss falls along the front; runs that do not are stuck in a valley or still on the way.

**MoCo** (figures 1 to 3; 10 seeds of noise). Share of seeds that reach the front, from the starts
(-8.5, 7.5), (-8.5, 5), (10, -8) at rate 0.001 (figure 1), and these, (0, 0), (9, 9) at 0.0025
(figure 2):

    method              figure 1            figure 2
    mgda (true grad.)   1.00  1.00  1.00    1.00  1.00  1.00  1.00  1.00
    smg                 0.00  1.00  1.00    0.20  1.00  1.00  1.00  0.00
    pcgrad              0.00  0.50  1.00    0.00  1.00  1.00  1.00  0.00
    cagrad              0.00  0.10  1.00    0.00  1.00  1.00  1.00  0.00
    moco                1.00  1.00  1.00    1.00  1.00  1.00  1.00  0.70
    moco_algorithm_1    0.50  1.00  1.00    1.00  1.00  1.00  1.00  0.60

Figure 1 is reproduced. In figure 2 MoCo leaves the valley at (9, 9) in 7 of 10 seeds; with noise of
0.3 in 10 of 10 (the others in none). The paper does not state its noise. With one step of lambda a
time (algorithm 1, gamma = 0.1) MoCo is slower in the valley at (-8.5, 7.5). Bias of the
multi-gradient in the last tenth, three starts: SMG 0.43, 0.19, 0.19 (1.5, 0.7, 0.4 times that of
the first tenth), SMG with growing batch 0.065, MoCo 0.053 with a quarter of its samples.

**Aligned-MTL** (figures 1 and 6; exact starts, and two jittered ones). Runs of 25 (5 starts, 5 task
weightings) that end on the front / at the weighted optimum, in float64:

    float64: uniform 15 / 15, pcgrad 17 / 9, cagrad 17 / 16, imtl 25 / 6, imtl_g 25 / 12,
             nash_mtl 25 / 6, aligned_mtl 24 / 20, aligned_mtl with weighted losses 25 / 20
    float32: uniform 15 / 15, imtl 25 / 6, imtl_g 25 / 24,
             aligned_mtl 24 / 24, aligned_mtl with weighted losses 24 / 24

The claim, all but one, holds to the number in float32, the precision of the authors' code. In
float64 five runs are still on their way along the front when the 35,000 steps end: until the
Gramian's small eigenvalue counts as zero, at 2 machine epsilons of the large one, the steps are
scaled by its root, and in float64 that point comes late.

`imtl` is the solution of IMTL's paper, which stops at the front. `imtl_g`, the library's, takes a
pseudo-inverse, as the Jacobian-descent paper defines it for every rank: once the gradients are
opposite within rounding its weights have opposite signs, and it slides along the front towards the
optimum of the weighted sum, in float32 almost always and in float64 late.

**LDC-MTL** (figure 1; L1 is scaled by 0.1). Balanced means 10 L1 = L2, on the front. From all seven
starts `ldc_mtl` ends there (10 L1 - L2 = 0.00), with lambda = 1 and tau = 1, which the paper does
not state, on (10 L1, L2), which its "rescale normalization" may mean. It is sensitive: 2 of 7 with
lambda = 0.5, 4 with 2, 5 with tau = sigma; the others sit on the line 10 L1 = L2 above the front,
or are stuck in a valley. Linear scalarization and MGDA end at no balanced point, FAMO at different
ones; with the FAMO paper's weight decay of 1e-3 it ends near either end of the front.

**Reference**: Fernando et al. 2023, figures 1 to 3 and appendix F.1; Senushkin et al. 2023, figures
1 and 6 and appendix C; Xiao et al. 2025, figure 1 and appendix A.3.

**Differs from** the papers: MoCo's noise, optimizer and decay of the rate are those of the authors'
code, as is its exact lambda (`moco`; `moco_algorithm_1` is the paper's). LDC-MTL's figure shows
other starts than its text prints: both are run. Float64, but for `aligned_float32`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

import jaxmtl
from experiments._runs import (
    Claim,
    Record,
    append_records,
    environment,
    make_console,
    read_records,
)
from experiments.models import landscape
from experiments.toy_figures import DRAWERS, draw_all
from experiments.toy_report import claims_of, tables_of

COMMAND = "python -m experiments.toy --out experiments/results"
FIGURES = tuple(DRAWERS)

# --- methods ------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A method, and what it gets to see."""

    make: Callable[[jax.Array], optax.GradientTransformationExtraArgs]  # of task weights (2,)
    exact: bool = False  # gradients without noise
    weighted_losses: bool = False  # the losses are multiplied by the task weights
    batch_of: Callable[[Any], Any] = lambda step: 1  # samples behind a step's gradients
    divisors: tuple[float, float] = (1.0, 1.0)  # the losses are divided by these


def tracking_rate(k: jax.Array) -> jax.Array:
    """Return MoCo's beta_k = 5 / sqrt(k), from k = 1."""
    return 5 / jnp.sqrt(k)


# SMG is MGDA on stochastic gradients. The authors' toy code of MoCo finds lambda exactly from the
# tracked gradients; algorithm 1 of their paper takes one step of lambda at a time.
MOCO = {
    "mgda": Method(lambda w: jaxmtl.mgda(), exact=True),
    "smg": Method(lambda w: jaxmtl.mgda()),
    "smg_growing_batch": Method(lambda w: jaxmtl.mgda(), batch_of=lambda step: 1 + step // 10_000),
    "pcgrad": Method(lambda w: jaxmtl.pcgrad()),
    "cagrad": Method(lambda w: jaxmtl.cagrad(0.5)),
    "moco": Method(
        lambda w: optax.chain(jaxmtl.track_gradients(tracking_rate, num_tasks=2), jaxmtl.mgda())
    ),
    "moco_algorithm_1": Method(lambda w: jaxmtl.moco(num_tasks=2, beta=tracking_rate, gamma=0.1)),
}


def imtl_closed_form() -> jaxmtl.Aggregator:
    """Return IMTL-G as its paper solves it, which for two tasks is weights 1 / |g_i|.

    `jaxmtl.imtl_g` is the same by the pseudo-inverse, until the gradients are dependent within
    rounding: of opposite ones it then takes the difference, and moves along the front.
    """

    def weigh(gramian: jax.Array) -> jax.Array:
        norms = jnp.sqrt(jnp.diagonal(gramian))
        return norms[::-1] / norms.sum()

    return jaxmtl.from_weighting(weigh)


# Only Aligned-MTL has task weights of its own (algorithm 1 of the paper); the authors' toy code
# multiplies the losses by them, for every method.
ALIGNED = {
    "uniform": Method(lambda w: jaxmtl.linear_scalarization(), weighted_losses=True),
    "pcgrad": Method(lambda w: jaxmtl.pcgrad(), weighted_losses=True),
    "cagrad": Method(lambda w: jaxmtl.cagrad(0.5), weighted_losses=True),
    "imtl": Method(lambda w: imtl_closed_form(), weighted_losses=True),
    "imtl_g": Method(lambda w: jaxmtl.imtl_g(), weighted_losses=True),
    "nash_mtl": Method(lambda w: jaxmtl.nash_mtl(max_norm=1.0), weighted_losses=True),
    "aligned_mtl": Method(lambda w: jaxmtl.aligned_mtl(preference=w)),
    "aligned_mtl_weighted_losses": Method(lambda w: jaxmtl.aligned_mtl(), weighted_losses=True),
}

# FAMO needs lower bounds of the losses; its authors take -21 times the scale.
_BOUNDS = jnp.array([-2.1, -21.0])


def _ldc(penalty: float, tau: str = "ones") -> Method:
    return Method(lambda w: jaxmtl.ldc_mtl(penalty, num_tasks=2, tau=tau), divisors=(0.1, 1.0))


LDC = {
    "linear_scalarization": Method(lambda w: jaxmtl.linear_scalarization()),
    "mgda": Method(lambda w: jaxmtl.mgda()),
    # The weight decay of the FAMO paper, and that of LDC-MTL's copy of FAMO.
    "famo": Method(lambda w: jaxmtl.famo(num_tasks=2, min_losses=_BOUNDS)),
    "famo_decay_1e-5": Method(
        lambda w: jaxmtl.famo(num_tasks=2, min_losses=_BOUNDS, weight_decay=1e-5)
    ),
    "ldc_mtl": _ldc(1.0),
    "ldc_mtl_lambda_0.5": _ldc(0.5),
    "ldc_mtl_lambda_2": _ldc(2.0),
    "ldc_mtl_tau_sigma": _ldc(1.0, tau="sigma"),
}


@dataclass(frozen=True)
class Options:
    """What decides the outcome of the runs of one part, besides the method."""

    starts: tuple[tuple[float, float], ...]
    steps: int
    learning_rate: float  # Adam's is learning_rate / k^decay
    seeds: int
    decay: float = 0.0
    noise: float = 0.0  # standard deviation of every entry of the gradients
    jitter: float = 0.0  # standard deviation of the starts, but for the first seed
    scale: tuple[float, float] = (1.0, 1.0)  # of the losses
    alphas: tuple[float, ...] = (0.5,)  # task weights (alpha, 1 - alpha)
    points: int = 70  # recorded along a trajectory
    sets: int = 0  # sets of gradient samples for the bias of the multi-gradient


class Part(NamedTuple):
    """The runs behind a figure of a paper."""

    table: dict[str, Method]
    methods: tuple[str, ...]
    options: Options
    double: bool = True  # float64: the walls of the valleys amplify rounding


# Printed: rate, decay, steps, starts, beta. Not printed, from the authors' code: Adam, a rate that
# falls as a power of k, noise of standard deviation 1. It starts at (-8.5, -5), not at the (-8.5,
# 5) that is printed; both are run.
_MOCO_1 = Options(
    starts=((-8.5, 7.5), (-8.5, 5.0), (10.0, -8.0), (0.0, 0.0), (9.0, 9.0), (-8.5, -5.0)),
    steps=70_000,
    learning_rate=1e-3,
    decay=0.05,
    noise=1.0,
    seeds=10,
)
_MOCO_2 = replace(_MOCO_1, learning_rate=2.5e-3)
_ALIGNED = Options(
    starts=((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)),
    steps=35_000,
    learning_rate=1e-3,
    alphas=(0.1, 0.3, 0.5, 0.7, 0.9),
    jitter=0.1,
    seeds=3,
    points=50,
)
# The paper prints the first five starts; its figure shows those of Aligned-MTL.
_LDC = Options(
    starts=(
        *((-8.5, 7.5), (-8.5, 5.0), (0.0, 0.0), (9.0, 9.0), (10.0, -8.0)),
        *((-7.5, -0.5), (9.0, -1.0)),
    ),
    steps=50_000,
    learning_rate=1e-3,
    scale=(0.1, 1.0),
    jitter=0.1,
    seeds=5,
)
_RIVALS = ("mgda", "smg", "pcgrad", "cagrad", "moco", "moco_algorithm_1")
PARTS = {
    "moco_1": Part(MOCO, _RIVALS, _MOCO_1),
    "moco_2": Part(MOCO, _RIVALS, _MOCO_2),
    "moco_2_noise_0.3": Part(MOCO, _RIVALS, replace(_MOCO_2, noise=0.3)),
    "bias": Part(
        MOCO,
        ("smg", "smg_growing_batch", "moco"),
        replace(_MOCO_2, starts=_MOCO_1.starts[:3], points=140, sets=10),
    ),
    "aligned": Part(ALIGNED, tuple(ALIGNED), _ALIGNED),
    # The paper's code is in float32, where rank one, hence the front, is met much earlier.
    "aligned_float32": Part(
        ALIGNED,
        ("uniform", "imtl", "imtl_g", "aligned_mtl", "aligned_mtl_weighted_losses"),
        _ALIGNED,
        double=False,
    ),
    "ldc": Part(LDC, tuple(LDC), _LDC),
}


SMOKE_METHODS = ["mgda", "smg", "smg_growing_batch", "moco", "aligned_mtl", "ldc_mtl"]


# --- runs ---------------------------------------------------------------------------------------


@cache
def make_run(
    method: Method, steps: int, points: int, sets: int, scale: tuple[float, float]
) -> Callable[..., dict[str, jax.Array]]:
    """Return the compiled run, a `scan`, for all seeds, task weights and starts at once.

    Returns:
      ``run(starts, alphas, keys, (learning_rate, decay, noise))``, with arrays of shapes (seeds,
      starts, 2), (alphas,) and (seeds,), to a dict of ``path`` (seeds, alphas, starts, points, 2),
      ``final`` without the axis of points, and ``bias`` without the last one, where there are
      ``sets``.
    """
    every = steps // points

    def run(
        start: jax.Array, alpha: jax.Array, key: jax.Array, rates: tuple[float, float, float]
    ) -> dict[str, jax.Array]:
        learning_rate, decay, noise = rates
        weights = jnp.stack([alpha, 1 - alpha])
        factors = jnp.asarray(scale) / jnp.asarray(method.divisors)
        if method.weighted_losses:
            factors = factors * weights
        aggregator = method.make(weights)
        exact = jaxmtl.mgda()
        optimizer = optax.adam(lambda k: learning_rate / (1 + k) ** decay)
        value_and_jacobian = jaxmtl.value_and_jacobian(lambda x: factors * landscape.losses(x))

        def stochastic(jacobian: jax.Array, k: jax.Array, key: jax.Array) -> jax.Array:
            if method.exact:
                return jacobian
            spread = noise / jnp.sqrt(method.batch_of(k))
            return jacobian + spread * jax.random.normal(key, jacobian.shape)

        def step(carry: Any, k: jax.Array) -> tuple[Any, None]:
            x, mtl_state, opt_state = carry
            losses, jacobian = value_and_jacobian(x)
            rows = stochastic(jacobian, k, jax.random.fold_in(key, k))
            # There are no batches: the previous one's losses at the present x are the losses.
            update, mtl_state = aggregator.update(
                rows, mtl_state, x, losses=losses, previous_batch_losses=losses
            )
            updates, opt_state = optimizer.update(update, opt_state, x)
            return (jaxmtl.apply_updates(x, updates), mtl_state, opt_state), None

        def bias(carry: Any, k: jax.Array) -> jax.Array:
            x, mtl_state, _ = carry
            _, jacobian = value_and_jacobian(x)

            def draw(key: jax.Array) -> jax.Array:
                return aggregator.update(stochastic(jacobian, k, key), mtl_state, x)[0]

            keys = jax.random.split(jax.random.fold_in(key, steps + k), sets)
            true, _ = exact.update(jacobian, exact.init(x), x)
            return jaxmtl.metrics.multi_gradient_bias(jax.vmap(draw)(keys), true)

        def stretch(carry: Any, first: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            record = {"path": carry[0]}
            if sets:
                record["bias"] = bias(carry, first)
            carry, _ = lax.scan(step, carry, first + jnp.arange(every))
            return carry, record

        carry = start, aggregator.init(start), optimizer.init(start)
        carry, history = lax.scan(stretch, carry, every * jnp.arange(points))
        return history | {"final": carry[0]}

    over_starts = jax.vmap(run, (0, None, None, None))
    over_alphas = jax.vmap(over_starts, (None, 0, None, None))
    return jax.jit(jax.vmap(over_alphas, (0, None, 0, None)))


def run_method(options: Options, method: Method) -> Record:
    """Return what one method did, as lists: every seed's end, and the first seed's trajectories."""
    shape = (options.seeds, len(options.starts), 2)
    starts = options.starts + np.random.default_rng(0).normal(0, options.jitter, shape)
    starts[0] = options.starts
    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds))
    alphas = jnp.asarray(options.alphas)
    run = make_run(method, options.steps, options.points, options.sets, options.scale)
    rates = options.learning_rate, options.decay, options.noise
    out = jax.device_get(run(jnp.asarray(starts), alphas, keys, rates))
    record = {"final": out["final"].round(4).tolist(), "path": out["path"][0].round(3).tolist()}
    if options.sets:
        every = options.steps // options.points
        batches = np.broadcast_to(method.batch_of(np.arange(options.steps)), options.steps)
        record["bias"] = out["bias"][:, 0].round(4).tolist()  # (seeds, starts, points)
        record["samples"] = np.cumsum(batches)[::every].tolist()
    return record


def methods_of(part: Part, args: argparse.Namespace) -> list[str]:
    """Return the methods of a part that the command line asks for."""
    return [name for name in part.methods if not args.methods or name in args.methods]


def run_parts(args: argparse.Namespace, console: Console) -> None:
    """Run what the results files do not hold yet; append one record per part and method."""
    bars = Progress(
        SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), console=console
    )
    with bars:
        bar = bars.add_task(
            "", total=sum(len(methods_of(PARTS[name], args)) for name in args.parts)
        )
        for name in args.parts:
            part, results = PARTS[name], results_of(args.out, name)
            options = part.options
            if args.smoke:
                options = replace(options, steps=12, points=4, seeds=2)
            if args.seeds:
                options = replace(options, seeds=args.seeds)
            config = json.loads(json.dumps(asdict(options)))  # tuples as lists, as in the file
            if not args.resume:
                results.unlink(missing_ok=True)
            done = read_records(results)
            if any(record["config"] != config for record in done):
                raise SystemExit(f"expected the options of {results}, got {options}; drop --resume")
            for method in methods_of(part, args):
                bars.update(bar, description=f"{name} {method:<28}")
                if method in {record["method"] for record in done}:
                    bars.advance(bar)
                    continue
                start = time.perf_counter()
                with jax.enable_x64(part.double):
                    record = run_method(options, part.table[method])
                seconds = round(time.perf_counter() - start, 1)
                shared = {"part": name, "method": method, "config": config, "seconds": seconds}
                append_records(results, [shared | environment() | record])
                bars.advance(bar)
                if not console.is_terminal:  # a log file shows no bar
                    console.print(f"{name} {method}: {seconds} s")


# --- main ---------------------------------------------------------------------------------------


def results_of(folder: Path, part: str) -> Path:
    """Return the results file of a part."""
    return folder / f"toy_{part}.jsonl"


def read_parts(folder: Path) -> dict[str, dict[str, Record]]:
    """Return the records of a folder by part and method."""
    parts = {part: read_records(results_of(folder, part)) for part in PARTS}
    return {
        part: {record["method"]: record for record in records}
        for part, records in parts.items()
        if records
    }


def claims(folder: Path) -> list[Claim]:
    """Return what the papers say of the landscape beside what the results in `folder` say."""
    return claims_of(read_parts(folder))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.toy")
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), help="folder of results and figures")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--methods", nargs="+", metavar="METHOD", help="of those of each part; by default all")
    add("--seeds", type=int, help="by default those of each part")
    add("--resume", action="store_true", help="keep what the results files hold already")
    add("--report-only", action="store_true", help="tables and figures of existing results")
    add("--smoke", action="store_true", help="two seeds, twelve steps, few methods")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run every part, then report."""
    args = parse(argv)
    if args.smoke and not args.methods:
        args.methods = SMOKE_METHODS
    console = make_console()
    if not args.report_only:
        run_parts(args, console)
    parts = read_parts(args.out)
    if not parts:
        raise SystemExit(f"expected results in {args.out}, got none; run without --report-only")
    for table in tables_of(parts):
        console.print(table)
    for claim in claims_of(parts):
        console.print(f"{claim.verdict}: {claim.claim} ({claim.source}). {claim.ours}")
    for figure in draw_all(parts, args.out):
        console.print(f"-> {figure}")


if __name__ == "__main__":
    main()
