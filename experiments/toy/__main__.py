"""The figures of the toy study as presets, the run, and the command line."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxmtl
from experiments.methods import METHODS, Method
from experiments.study import Job, Part, Record, Results, Say, Study, config_of
from experiments.toy import landscape
from experiments.toy.figures import DRAWERS
from experiments.toy.report import claims, report

# --- methods ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A method in a figure, and what it gets to see; it may ask for ``preference``."""

    method: Method
    exact: bool = False  # gradients without noise
    weighted_losses: bool = False  # the losses are multiplied by the task weights
    batch_of: Callable[[Any], Any] = lambda step: 1  # samples behind a step's gradients
    divisors: tuple[float, float] = (1.0, 1.0)  # the losses are divided by these


def tracking_rate(k: jax.Array) -> jax.Array:
    """Returns MoCo's beta_k = 5 / sqrt(k), from k = 1."""
    return 5 / jnp.sqrt(k)


def track(aggregator: Any, num_tasks: int) -> Any:
    """Returns the aggregator on tracked gradients."""
    return optax.chain(jaxmtl.track_gradients(tracking_rate, num_tasks=num_tasks), aggregator)


CAGRAD = METHODS["cagrad"].using(c=0.4)
# SMG is MGDA on stochastic gradients. The authors' toy code of MoCo finds lambda exactly from the
# tracked gradients; algorithm 1 of their paper takes one step of lambda at a time.
MOCO = {
    "mgda": Entry(METHODS["mgda"], exact=True),
    "smg": Entry(METHODS["mgda"]),
    "smg_growing_batch": Entry(METHODS["mgda"], batch_of=lambda step: 1 + step // 10_000),
    "pcgrad": Entry(METHODS["pcgrad"]),
    "cagrad": Entry(CAGRAD),
    "moco": Entry(METHODS["mgda"].then(track)),
    "moco_algorithm_1": Entry(METHODS["moco"].using(beta=tracking_rate, gamma=0.1)),
}


def imtl_closed_form(num_tasks: int = 2) -> jaxmtl.Aggregator:
    """Returns IMTL-G as its paper solves it, which for two tasks is weights 1 / |g_i|.

    ``jaxmtl.imtl_g`` is the same by the pseudo-inverse, until the gradients are dependent within
    rounding: of opposite ones it then takes the difference, and moves along the front.
    """

    def weigh(gramian: jax.Array) -> jax.Array:
        norms = jnp.sqrt(jnp.diagonal(gramian))
        return norms[::-1] / norms.sum()

    return jaxmtl.from_weighting(weigh, num_tasks=num_tasks)


# Only Aligned-MTL has task weights of its own (algorithm 1 of the paper); the authors' toy code
# multiplies the losses by them, for every method.
ALIGNED = {
    "uniform": Entry(METHODS["linear_scalarization"], weighted_losses=True),
    "pcgrad": Entry(METHODS["pcgrad"], weighted_losses=True),
    "cagrad": Entry(CAGRAD, weighted_losses=True),
    "imtl": Entry(Method(imtl_closed_form), weighted_losses=True),
    "imtl_g": Entry(METHODS["imtl_g"], weighted_losses=True),
    "nash_mtl": Entry(METHODS["nash_mtl"].using(max_norm=1.0), weighted_losses=True),
    "aligned_mtl": Entry(METHODS["aligned_mtl"]._replace(asks=("preference",))),
    "aligned_mtl_weighted_losses": Entry(METHODS["aligned_mtl"], weighted_losses=True),
}

# FAMO needs lower bounds of the losses; its authors take -21 times the scale.
FAMO = METHODS["famo"].using(min_losses=np.array([-2.1, -21.0], np.float32))


def _ldc(penalty: float, tau: str = "ones") -> Entry:
    return Entry(METHODS["ldc_mtl"].using(penalty=penalty, tau=tau), divisors=(0.1, 1.0))


LDC = {
    "linear_scalarization": Entry(METHODS["linear_scalarization"]),
    "mgda": Entry(METHODS["mgda"]),
    # The weight decay of the FAMO paper, and that of LDC-MTL's copy of FAMO.
    "famo": Entry(FAMO),
    "famo_decay_1e-5": Entry(FAMO.using(weight_decay=1e-5)),
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


class Preset(NamedTuple):
    """The runs behind a figure of a paper."""

    table: dict[str, Entry]
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
PRESETS = {
    "moco_1": Preset(MOCO, _RIVALS, _MOCO_1),
    "moco_2": Preset(MOCO, _RIVALS, _MOCO_2),
    "moco_2_noise_0.3": Preset(MOCO, _RIVALS, replace(_MOCO_2, noise=0.3)),
    "bias": Preset(
        MOCO,
        ("smg", "smg_growing_batch", "moco"),
        replace(_MOCO_2, starts=_MOCO_1.starts[:3], points=140, sets=10),
    ),
    "aligned": Preset(ALIGNED, tuple(ALIGNED), _ALIGNED),
    # The paper's code is in float32, where rank one, hence the front, is met much earlier.
    "aligned_float32": Preset(
        ALIGNED,
        ("uniform", "imtl", "imtl_g", "aligned_mtl", "aligned_mtl_weighted_losses"),
        _ALIGNED,
        double=False,
    ),
    "ldc": Preset(LDC, tuple(LDC), _LDC),
}


SMOKE_METHODS = ["mgda", "smg", "smg_growing_batch", "moco", "aligned_mtl", "ldc_mtl"]


# --- runs ---------------------------------------------------------------------------------------


@cache
def make_run(
    entry: Entry, steps: int, points: int, sets: int, scale: tuple[float, float]
) -> Callable[..., dict[str, jax.Array]]:
    """Returns the compiled run, a ``scan``, for all seeds, task weights and starts at once.

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
        factors = jnp.asarray(scale) / jnp.asarray(entry.divisors)
        if entry.weighted_losses:
            factors = factors * weights
        aggregator = entry.method.build(2, preference=weights)
        exact = jaxmtl.mgda()
        optimizer = optax.adam(lambda k: learning_rate / (1 + k) ** decay)
        value_and_jacobian = jaxmtl.value_and_jacobian(lambda x: factors * landscape.losses(x))

        def stochastic(jacobian: jax.Array, k: jax.Array, key: jax.Array) -> jax.Array:
            if entry.exact:
                return jacobian
            spread = noise / jnp.sqrt(entry.batch_of(k))
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


def run_entry(options: Options, entry: Entry) -> Record:
    """Returns what one method did, as lists: the ends of all seeds, the paths of the first."""
    shape = (options.seeds, len(options.starts), 2)
    starts = options.starts + np.random.default_rng(0).normal(0, options.jitter, shape)
    starts[0] = options.starts
    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds))
    alphas = jnp.asarray(options.alphas)
    run = make_run(entry, options.steps, options.points, options.sets, options.scale)
    rates = options.learning_rate, options.decay, options.noise
    out = jax.device_get(run(jnp.asarray(starts), alphas, keys, rates))
    record = {"final": out["final"].round(4).tolist(), "path": out["path"][0].round(3).tolist()}
    if options.sets:
        every = options.steps // options.points
        batches = np.broadcast_to(entry.batch_of(np.arange(options.steps)), options.steps)
        record["bias"] = out["bias"][:, 0].round(4).tolist()  # (seeds, starts, points)
        record["samples"] = np.cumsum(batches)[::every].tolist()
    return record


def part_of(name: str, args: argparse.Namespace) -> Part:
    """Returns the runs of one figure, with what the command line changes."""
    preset = PRESETS[name]
    methods = args.methods or (SMOKE_METHODS if args.smoke else preset.methods)
    options = preset.options
    if args.smoke:
        options = replace(options, steps=12, points=4, seeds=2)
    if args.seeds:
        options = replace(options, seeds=args.seeds)
    config = config_of(options)

    def run(method: str, say: Say) -> list[Record]:
        start = time.perf_counter()
        with jax.enable_x64(preset.double):
            record = run_entry(options, preset.table[method])
        seconds = round(time.perf_counter() - start, 1)
        say(f"{name} {method}: {seconds} s")
        return [{"part": name, "method": method, "config": config, "seconds": seconds} | record]

    def jobs(results: Results) -> Iterator[Job]:
        done = {record["method"] for record in results.records}
        for method in preset.methods:
            if method in methods and method not in done:
                yield Job(f"{name} {method:<28}", partial(run, method))

    return Part(name, jobs, [config])


study = Study(
    name="toy",
    commands=("--out experiments/results",),
    methods=tuple(dict.fromkeys(m for preset in PRESETS.values() for m in preset.methods)),
    figures=tuple(DRAWERS),
    plan=lambda args: [part_of(name, args) for name in args.parts],
    report=report,
    claims=claims,
    options={
        "--parts": {
            "nargs": "+",
            "choices": PRESETS,
            "default": tuple(PRESETS),
            "metavar": "PART",
            "help": f"of {', '.join(PRESETS)}",
        }
    },
)

if __name__ == "__main__":
    study.main()
