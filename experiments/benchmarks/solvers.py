"""Accuracy and time of UPGrad's weights, against other solvers of the same problem.

    python -m experiments.benchmarks.solvers

Ours and jaxopt's run inside one compiled scan over the Gramians; quadprog is called m times
per Gramian and TorchJD (where installed) once. All take turns, round by round in one run, so
that the machine's drift hits them alike. Two figures each: the largest relative error of the
update against quadprog's active faces solved once more, and the median over the rounds of the
time per Gramian. Results: ``experiments/results/solvers.jsonl``.

The Gramians are of four kinds in turn: Gaussian, conflicting, with rows imbalanced by up to
e^8, and both. A slow solver gets fewer of them.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmtl

RESULTS = Path(__file__).parents[1] / "results" / "solvers.jsonl"


@dataclass(frozen=True)
class Options:
    """Options of the benchmark, each with its reason."""

    tasks: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)  # two tasks to a batch of instances
    gramians: int = 200  # distinct ones, so that no branch is learnt by heart
    rounds: int = 5  # the median of five survives a disturbed round
    patience: float = 4.0  # seconds that one solver may take in a round; sets its share
    seed: int = 0


Solver = Callable[[np.ndarray], np.ndarray]  # (count, m, m) Gramians -> (count, m) weights


def gramians(m: int, count: int, seed: int) -> np.ndarray:
    """Draws Gramians of four kinds in turn, float64 (count, m, m)."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        rows = rng.standard_normal((m, 2 * m))
        if i % 2:
            rows -= 0.8 * rows.mean(0)
        if i % 4 > 1:
            rows *= np.exp(rng.uniform(-4, 4, (m, 1)))
        found.append(rows @ rows.T)
    return np.array(found)


def error_of(gram: np.ndarray, weights: np.ndarray) -> float:
    """Error of the update ``J^T w`` relative to its norm, against `upgrad_by_faces`."""
    reference = upgrad_by_faces(gram)
    gap = weights - reference
    return float(np.sqrt(max(gap @ gram @ gap, 0) / (reference @ gram @ reference)))


def upgrad_by_faces(gram: np.ndarray) -> np.ndarray:
    """UPGrad's weights by quadprog, each active face solved once more in float64."""
    import quadprog

    m = len(gram)
    norms = np.sqrt(np.diag(gram))
    unit = gram / norms[:, None] / norms
    total = np.zeros(m)
    for i in range(m):
        bound = np.eye(m)[i]
        x, _, _, _, multipliers, _ = quadprog.solve_qp(unit, np.zeros(m), np.eye(m), bound)
        free = multipliers <= 0
        if free.any():
            x = bound.copy()
            x[free] = np.linalg.solve(unit[np.ix_(free, free)], -(unit @ (bound * ~free))[free])
        total += norms[i] * x / m
    return total / norms


def ours() -> Solver:
    """Returns jaxmtl's solver in one compiled scan."""
    weighting = jaxmtl.upgrad().weighting

    def weigh(carry: None, gram: jax.Array) -> tuple[None, jax.Array]:
        return carry, weighting.update(gram, weighting.init())[0]

    scan = jax.jit(lambda grams: jax.lax.scan(weigh, None, grams)[1])
    return lambda grams: np.asarray(scan(jnp.asarray(grams)))


def by_quadprog() -> Solver:
    """Returns quadprog, m calls per Gramian."""
    import quadprog

    def weigh(gram: np.ndarray) -> np.ndarray:
        m = len(gram)
        norms = np.sqrt(np.diag(gram))
        unit, bounds = gram / norms[:, None] / norms, np.eye(m)
        found = [quadprog.solve_qp(unit, np.zeros(m), bounds, e)[0] for e in bounds]
        return (norms @ np.array(found)) / m / norms

    return lambda grams: np.array([weigh(gram) for gram in grams])


def by_jaxopt() -> Solver:
    """Returns jaxopt's box coordinate descent for the m problems, in one compiled scan."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt
    solver = jaxopt.BoxCDQP(maxiter=500, tol=1e-9)

    def weigh(carry: None, gram: jax.Array) -> tuple[None, jax.Array]:
        m = len(gram)
        norms = jnp.sqrt(jnp.diagonal(gram))
        unit = gram / norms[:, None] / norms

        def one(bound: jax.Array) -> jax.Array:
            top = jnp.full((m,), 1e6)
            zero = jnp.zeros((m,))
            return solver.run(bound, params_obj=(unit, zero), params_ineq=(bound, top)).params

        return carry, norms @ jax.vmap(one)(jnp.eye(m)) / m / norms

    scan = jax.jit(lambda grams: jax.lax.scan(weigh, None, grams)[1])
    return lambda grams: np.asarray(scan(jnp.asarray(grams)))


def by_torchjd() -> Solver:
    """Returns TorchJD's weighting, with its default regularisation."""
    import torch
    from torchjd.aggregation import UPGradWeighting

    weighting = UPGradWeighting()
    return lambda grams: np.array([weighting(torch.from_numpy(g)).numpy() for g in grams])


def solvers() -> dict[str, Solver]:
    """Returns the solvers that are installed."""
    found = {"jaxmtl": ours()}
    for name, make in (("quadprog", by_quadprog), ("jaxopt", by_jaxopt), ("torchjd", by_torchjd)):
        if importlib.util.find_spec(name) is not None:
            found[name] = make()
    return found


def measure(m: int, options: Options) -> list[dict[str, Any]]:
    """Times all solvers in turn on the Gramians of one size."""
    grams = gramians(m, options.gramians, options.seed + m)
    found = solvers()
    counts: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in found}
    for name, solve in found.items():
        solve(grams[:4])  # compiles, for one length
        start = time.perf_counter()
        solve(grams[:4])
        each = (time.perf_counter() - start) / 4
        counts[name] = int(np.clip(options.patience / each, 4, options.gramians)) // 4 * 4
        solve(grams[: counts[name]])
    for _ in range(options.rounds):
        for name, solve in found.items():
            start = time.perf_counter()
            solve(grams[: counts[name]])
            times[name].append((time.perf_counter() - start) / counts[name])
    checked = grams[:8]
    rows = []
    for name, solve in found.items():
        weights = solve(checked)
        rows.append(
            {
                "tasks": m,
                "solver": name,
                "error": max(error_of(g, w) for g, w in zip(checked, weights, strict=True)),
                "microseconds": 1e6 * statistics.median(times[name]),
                "ratio": statistics.median(
                    own / other for own, other in zip(times[name], times["quadprog"], strict=True)
                ),
                "gramians": counts[name],
            }
        )
    return rows


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(Options.tasks))
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--gramians", type=int, default=Options.gramians)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    options = Options(tuple(given.tasks), given.gramians, given.rounds)
    print(f"{'m':>4} {'solver':>9} {'error':>9} {'us/Gramian':>11} {'/quadprog':>10}")
    lines = []
    with jax.enable_x64(True):
        for m in options.tasks:
            for row in measure(m, options):
                print(
                    f"{m:4d} {row['solver']:>9} {row['error']:9.1e} {row['microseconds']:11.1f} "
                    f"{row['ratio']:10.2f}",
                    flush=True,
                )
                lines.append(
                    json.dumps(
                        row
                        | {
                            "options": asdict(options),
                            "jax": jax.__version__,
                            "jaxmtl": jaxmtl.__version__,
                            "device": jax.devices()[0].device_kind,
                            "machine": platform.machine(),
                        }
                    )
                )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
