"""The problem, its exact expectations, its runs, and the command line."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxmtl
from experiments import methods
from experiments.claims import mean_and_error, show
from experiments.stochastic_quadratic.report import (
    BASELINE,
    FORMS,
    GAP,
    NAME,
    NOISES,
    STUDIED,
    claims,
    find,
    of_kind,
    report,
)
from experiments.study import Job, Part, Record, Results, Say, Study, config_of

# Zhou et al. do not state CAGrad's c: 0.4 is that of Liu et al. and of our MultiMNIST.
METHODS = {
    BASELINE: methods.METHODS[BASELINE],
    "mgda": methods.METHODS["mgda"],
    "pcgrad": methods.METHODS["pcgrad"].using(reduction="mean"),
    "cagrad(0.4)": methods.METHODS["cagrad"],
    "cagrad(0.9)": methods.METHODS["cagrad"].using(c=0.9),
}

# Zhou 2022, eq. 4: (objective, outcome, coordinate), each outcome with probability 1/2.
CENTERS = np.array([[[-1.0, 2.0], [-5.0, -2.0]], [[1.0, 2.0], [5.0, -2.0]]])


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
    """Returns the expected objectives (2,) at x (2,)."""
    return jnp.mean(jnp.sum((x - CENTERS) ** 2, axis=-1), axis=1)


def sampled_gradients(x: jax.Array, z: jax.Array) -> jax.Array:
    """Returns the gradients (2, 2) of a draw z (2,), one per objective.

    -1 and 1 are the two outcomes. Any z of mean 0 and variance 1 gives their mean and covariance.
    """
    middle, half = CENTERS.mean(axis=1), (CENTERS[:, 1] - CENTERS[:, 0]) / 2
    return 2 * (x - middle - z[:, None] * half)


def project(x: jax.Array) -> jax.Array:
    """Returns the nearest point of the domain, |x| <= 1 and y >= 0."""
    return jnp.stack([jnp.clip(x[0], -1, 1), jnp.maximum(x[1], 0)])


def directions(aggregator: jaxmtl.Aggregator, x: jax.Array) -> jax.Array:
    """Returns d (2, 2, 2) for each outcome of the first and of the second objective."""
    state = aggregator.init(x)

    def direction(z: jax.Array) -> jax.Array:
        return -aggregator.update(sampled_gradients(x, z), state, x)[0]

    return jax.vmap(jax.vmap(direction))(jnp.array([[(-1, -1), (-1, 1)], [(1, -1), (1, 1)]]))


# --- theorem 1, by exact expectation ------------------------------------------------------------


def expectation_record(name: str) -> Record:
    """Returns the expected directions on a grid over the domain, exact, in float64.

    Outcomes are independent; ``at_start_shared`` is for one draw that decides both objectives.
    """
    xs, ys = np.linspace(-1, 1, 41), np.linspace(0, 0.8, 161)
    grid = np.stack(np.meshgrid(xs, ys), axis=-1)
    with jax.enable_x64(True):
        of_points = jax.jit(jax.vmap(jax.vmap(lambda x: directions(METHODS[name].make(2), x))))
        d = np.asarray(of_points(grid))  # (ys, xs, 2, 2, 2)
    expected = d.mean(axis=(2, 3))
    upward, center = expected[..., 1], len(xs) // 2
    start = np.argmin(np.abs(ys - Options.start[1])), np.argmin(np.abs(xs - Options.start[0]))
    return {
        "kind": "expectation",
        "method": name,
        "at_start": expected[start].round(6).tolist(),
        "at_start_shared": ((d[start][0, 0] + d[start][1, 1]) / 2).round(6).tolist(),
        "least_below_gap": round(float(upward[ys <= GAP + 1e-9].min()), 6),
        # Up to this height the expected direction points up whatever x is.
        "strip": round(crossing(ys, upward.min(axis=1)), 4),
        "equilibrium": round(crossing(ys, upward[:, center]), 4),
        "y": ys[::8].round(4).tolist(),
        "upward": upward[::8, center].round(5).tolist(),
    }


def crossing(ys: np.ndarray, values: np.ndarray) -> float:
    """Returns where values first pass from positive to negative, 0 if they start negative."""
    if values[0] <= 0:
        return 0.0
    k = int(np.argmax(values <= 0))
    return float(ys[k - 1] + (ys[k] - ys[k - 1]) * values[k - 1] / (values[k - 1] - values[k]))


# --- runs ---------------------------------------------------------------------------------------


def make_run(options: Options, name: str, form: str) -> Callable[..., jax.Array]:
    """Returns a compiled function of keys (seeds,) and noises to paths (noises, seeds, k, 2)."""

    def eta(step: jax.Array) -> jax.Array:
        return options.learning_rate / jnp.sqrt(1 + step)

    aggregator, alpha = METHODS[name].make(2), FORMS[form]
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
    """Returns the numbers k of the recorded steps, each once."""
    return np.unique(np.geomspace(1, options.steps, options.points).round().astype(int))


def curve(values: np.ndarray) -> Record:
    """Returns mean and standard error over seeds of (seeds, k)."""
    moments = [mean_and_error(column) for column in values.T]
    return {
        "mean": [round(mean, 5) for mean, _ in moments],
        "error": [round(error, 5) for _, error in moments],
    }


def run_records(options: Options, name: str, form: str, seeds: int) -> list[Record]:
    """Runs all seeds under every noise; returns one record per noise."""
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
            "config": config_of(options),
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
        }
        for i, noise in enumerate(NOISES)
    ]


def forms_of(name: str) -> tuple[str, ...]:
    """Returns the forms of a method: fixed weights need no averaging."""
    return tuple(FORMS) if name in STUDIED else ("plain",)


def plan(args: argparse.Namespace) -> Iterator[Part]:
    """Yields the only part: expectations, then runs."""
    options = replace(Options(), steps=30 if args.smoke else args.steps)
    seeds = 2 if args.smoke else args.seeds or 20
    names = args.methods or tuple(METHODS)

    def expect(name: str, say: Say) -> list[Record]:
        say(f"{name}: expected directions")
        return [expectation_record(name)]

    def run(name: str, form: str, say: Say) -> list[Record]:
        records = run_records(options, name, form, seeds)
        distances = {r["noise"]: show(r["final"]["distance"], digits=4) for r in records}
        say(f"{name}, {form}: distances {distances}")
        return records

    def jobs(results: Results) -> Iterator[Job]:
        held = results.records
        for name in names:
            if name not in {r["method"] for r in of_kind(held, "expectation")}:
                yield Job(name, partial(expect, name))
        for name in names:
            for form in forms_of(name):
                if find(held, name, form, NOISES[-1]) is None:
                    yield Job(f"{name}, {form}", partial(run, name, form))

    yield Part(NAME, jobs, [config_of(options)])


study = Study(
    name="stochastic_quadratic",
    commands=("--out experiments/results",),
    methods=tuple(METHODS),
    figures=(f"{NAME}.png",),
    plan=plan,
    report=report,
    claims=claims,
    options={"--steps": {"type": int, "default": Options.steps}},
)

if __name__ == "__main__":
    study.main()
