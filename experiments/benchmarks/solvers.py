"""Accuracy and time of UPGrad's weights, against other solvers of the same problem.

    python -m experiments.benchmarks.solvers            # beside other solvers, 2 to 128 tasks
    python -m experiments.benchmarks.solvers --scale    # up to 512 tasks, kinds and precisions

Ours and jaxopt's run inside one compiled scan over the Gramians; quadprog is called m times
per Gramian and TorchJD (where installed) once. All take turns, round by round in one run, so
that the machine's drift hits them alike. Two figures each: the largest relative error of the
update against quadprog's active faces solved once more, and the median over the rounds of the
time per Gramian. Results: ``experiments/results/solvers.jsonl``.

The Gramians are of four kinds in turn: Gaussian, conflicting, with rows imbalanced by up to
e^8, and both. A slow solver gets fewer of them.

With ``--scale``, the m problems of UPGrad on the row-normalised Gramian (the solver itself,
without the weighting around it) for Gaussian rows of m and 2 m entries, Gaussian rows of rank
m / 4, and one row per example of the digits' network, at the start and after 2,000 steps of
SGD. Ours in float64 and float32, inside one compiled scan, and quadprog take turns; the least
of the rounds counts. From m = 256, quadprog is called for the first right-hand sides alone
and its time scaled to m. Given are the residual in units of the machine epsilon and, in
float64, the largest error against quadprog, where Q is regular and the solution unique.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
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


EPS = {name: float(np.finfo(name).eps) for name in ("float64", "float32")}
SCALE_TASKS = (8, 16, 32, 64, 128, 256, 512)
KINDS = ("n = m", "n = 2m", "rank m/4", "digits, start", "digits, trained")


def digit_gramians(m: int, seed: int) -> dict[str, np.ndarray]:
    """Computes Gramians of m examples' gradients in the MLP 64-128-128-128-10 on digits."""
    from experiments.images import load_sklearn_digits

    digits = load_sklearn_digits("train")
    x = jnp.asarray(digits.images.reshape(len(digits.images), -1) / 255 - 0.3)
    y = jnp.asarray(digits.labels)
    rng = np.random.default_rng(seed)
    sizes = (64, 128, 128, 128, 10)
    start = [
        (jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / a)), jnp.zeros(b))
        for a, b in itertools.pairwise(sizes)
    ]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = params[-1]
        return -jax.nn.log_softmax(x @ w + b)[y]

    def mean(params: Any, index: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, x[index], y[index]))

    def step(params: Any, index: jax.Array) -> tuple[Any, None]:
        gradient = jax.grad(mean)(params, index)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), None

    batches = jnp.asarray(rng.integers(0, len(y), (2000, 32)))
    trained = jax.jit(lambda p: jax.lax.scan(step, p, batches)[0])(start)
    chosen = jnp.asarray(rng.permutation(len(y))[:m])

    def gramian(params: Any) -> np.ndarray:
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x[chosen], y[chosen])
        rows = np.concatenate([np.reshape(g, (m, -1)) for g in jax.tree.leaves(gradients)], 1)
        return rows @ rows.T

    return {"digits, start": gramian(start), "digits, trained": gramian(trained)}


def unit_gramians(m: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """Draws ``count`` row-normalised Gramians (count, m, m) of each of `KINDS`."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for i in range(count):
        for kind, n in (("n = m", m), ("n = 2m", 2 * m), ("rank m/4", max(m // 4, 1))):
            rows = rng.standard_normal((m, n))
            found[kind].append(rows @ rows.T)
        if i < 2:  # networks to train
            pair = digit_gramians(m, seed + i)
        for kind, gram in pair.items():
            found[kind].append(gram)

    def unit(gram: np.ndarray) -> np.ndarray:
        norms = np.sqrt(np.diag(gram))
        return gram / norms[:, None] / norms

    return {kind: np.array([unit(g) for g in grams]) for kind, grams in found.items()}


def measure_scale(m: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Times the m problems of one matrix, in both precisions, beside quadprog."""
    import quadprog

    count = int(np.clip(2**13 // m**1.5, 1, 64))

    def solve(carry: None, q: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        found = jaxmtl.solvers.nonneg_qp(q, -q)
        return carry, (found.value, jnp.max(found.residual))

    scan = jax.jit(lambda grams: jax.lax.scan(solve, None, grams)[1])
    rows = []
    for kind, grams in unit_gramians(m, count, seed).items():
        sides = m if m < 256 else 256 // (m // 64) ** 2  # 16 of 256, 4 of 512
        # quadprog asks for a regular matrix.
        matrix = grams[0] + (1e-13 * np.eye(m) if kind == "rank m/4" else 0)
        times: dict[str, list[float]] = {"quadprog": [], "float64": [], "float32": []}
        inputs = {name: jnp.asarray(grams, name) for name in ("float64", "float32")}
        for each in inputs.values():
            jax.block_until_ready(scan(each))
        for _ in range(rounds):
            start = time.perf_counter()
            reference = np.array(
                [quadprog.solve_qp(matrix, -q, np.eye(m), np.zeros(m))[0] for q in matrix[:sides]]
            )
            times["quadprog"].append((time.perf_counter() - start) * m / sides)
            for name, each in inputs.items():
                start = time.perf_counter()
                jax.block_until_ready(scan(each))
                times[name].append((time.perf_counter() - start) / count)
        for name, each in inputs.items():
            value, residual = scan(each)
            unique = name == "float64" and kind != "rank m/4"
            error = float(np.abs(np.asarray(value)[0, :sides] - reference).max())
            rows.append(
                {
                    "part": "scale",
                    "tasks": m,
                    "kind": kind,
                    "dtype": name,
                    "milliseconds": round(1e3 * min(times[name]), 4),
                    "ratio": round(min(times[name]) / min(times["quadprog"]), 5),
                    "residual_in_eps": round(
                        float(jnp.max(residual)) / float(np.finfo(name).eps), 1
                    ),
                    "error": error if unique else None,
                    "gramians": count,
                    "rounds": rounds,
                }
            )
    return rows


def scale(tasks: Sequence[int], rounds: int, seed: int, out: Path) -> None:
    """Prints the table of ``--scale`` and puts it beside the other lines of the results."""
    kept = out.read_text().splitlines() if out.exists() else []
    lines = [line for line in kept if json.loads(line).get("part") != "scale"]
    print(
        f"{'m':>4} {'Gramian':>15} {'dtype':>8} {'ms':>10} {'/quadprog':>10} {'res/eps':>8} error"
    )
    for m in tasks:
        for row in measure_scale(m, rounds, seed + m):
            error = "" if row["error"] is None else f"{row['error']:.1e}"
            print(
                f"{m:4d} {row['kind']:>15} {row['dtype']:>8} {row['milliseconds']:10.4f} "
                f"{row['ratio']:10.4f} {row['residual_in_eps']:8.1f} {error}",
                flush=True,
            )
            extra = {"jax": jax.__version__, "machine": platform.machine()}
            lines.append(json.dumps(row | extra))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", action="store_true", help="kinds and precisions, to m = 512")
    parser.add_argument("--tasks", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--gramians", type=int, default=Options.gramians)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.scale:
        with jax.enable_x64(True):
            scale(given.tasks or SCALE_TASKS, given.rounds, Options.seed, given.out)
        return
    options = Options(tuple(given.tasks or Options.tasks), given.gramians, given.rounds)
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
    if given.out.exists():  # what --scale wrote
        kept = given.out.read_text().splitlines()
        lines += [line for line in kept if json.loads(line).get("part") == "scale"]
    given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
