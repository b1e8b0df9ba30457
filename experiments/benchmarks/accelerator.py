"""What an accelerator makes of the library, in one command of less than eight minutes.

    python -m experiments.benchmarks.accelerator --out experiments/results/accelerator.jsonl

Parts, each with records that name the device:

* *solvers*: UPGrad's weights for 2 to 512 tasks, in one compiled scan over Gramians of Gaussian
  rows, in float32 and float64; milliseconds, and the largest residual in units of the machine
  epsilon.
* *examples*: a whole step with one objective per example, UPGrad, DualProj and MGDA beside SGD, on
  the MLP 784-512x3-10 at batches of 32 to 1,024.
* *digits*, if ``--data-dir`` is given: the same on MNIST, at the start and trained, where the
  weights are harder to find than on random inputs.
* *tasks*: a whole step of every route with 8 tasks on one batch, beside a gradient step
  (networks and routes of ``experiments.benchmarks.prices``).
* *precision*: the Gramian of the MLP and of a convolutional network in float32 beside float64, as
  the largest error in units of the root of the two diagonal entries. Matrix units that round
  float32 inputs to 10 bits would show here as 1e-3.
* *table7*: seconds per epoch of every method on the four networks of the Jacobian-descent paper,
  on random images.

The steps of a part take turns in one run. ``--smoke`` takes the smallest sizes of each, once.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxmtl
from experiments.benchmarks import prices
from experiments.benchmarks.models import MODELS
from experiments.benchmarks.solvers import gramians
from experiments.images import load_tfds_images
from experiments.iwrm.networks import ARCHITECTURES
from experiments.iwrm.timing import time_network
from experiments.study import Record, Table, append_records, environment
from experiments.timing import compiled, interleaved, make_step, median_ratio

AXES = (None, 0, 0)
WIDE = {"float32": "float64"}
RULES: dict[str, Callable[[], jaxmtl.Aggregator]] = {
    "upgrad": jaxmtl.upgrad,
    "dual_proj": jaxmtl.dual_proj,
    "mgda": jaxmtl.mgda,
}


def solvers(smoke: bool) -> Iterator[Record]:
    """Yields time and residual of UPGrad's problems, by number of tasks and precision."""
    for m in (2, 8) if smoke else (2, 4, 8, 16, 32, 64, 128, 256, 512):
        count = int(np.clip(2**13 // m**1.5, 1, 64))
        drawn = gramians(m, count, seed=m)
        norms = np.sqrt(np.diagonal(drawn, axis1=1, axis2=2))
        unit = drawn / norms[:, :, None] / norms[:, None, :]

        def solve(carry: None, q: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            found = jaxmtl.solvers.nonneg_qp(q, -q)
            return carry, (found.value, jnp.max(found.residual))

        programs = {
            dtype: compiled(lambda q: jax.lax.scan(solve, None, q)[1], jnp.asarray(unit, dtype))
            for dtype in ("float32", "float64")
        }
        times = interleaved({k: p.run for k, p in programs.items()}, 1 if smoke else 5, 10.0)
        for dtype, program in programs.items():
            residual = float(jnp.max(program.run()[1])) / float(np.finfo(dtype).eps)
            yield {
                "tasks": m,
                "dtype": dtype,
                "milliseconds": float(f"{1e3 * min(times[dtype]) / count:.4g}"),
                "residual_in_eps": round(residual, 1),
            }


def examples(smoke: bool) -> Iterator[Record]:
    """Yields steps with one objective per example beside SGD, by batch size."""
    model = MODELS["mlp"]()
    for n in (8,) if smoke else (32, 128, 256, 512, 1024):
        for record in _steps(model.loss, model.params, model.batch(n), smoke):
            yield {"batch": n} | record


def digits(data_dir: str, smoke: bool) -> Iterator[Record]:
    """Yields the same on MNIST's digits, at the start and after 1,000 steps of SGD."""
    model = MODELS["mlp"]()
    images, labels = load_tfds_images("mnist", "train", data_dir=data_dir)
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    x, y = jnp.asarray((flat - flat.mean()) / flat.std()), jnp.asarray(labels)
    order = jnp.asarray(np.random.default_rng(0).permutation(len(y)))

    def descended(params: Any, index: jax.Array) -> tuple[Any, None]:
        def mean_loss(params: Any) -> jax.Array:
            return jnp.mean(jax.vmap(model.loss, AXES)(params, x[index], y[index]))

        return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(mean_loss)(params)), None

    batches = order[: 32 * (2 if smoke else 1000)].reshape(-1, 32)
    trained = jax.jit(lambda p: jax.lax.scan(descended, p, batches)[0])(model.params)
    for n in (8,) if smoke else (32, 128, 256, 512, 1024):
        for at, params in (("start", model.params), ("trained", trained)):
            some = order[-n:]  # not trained on
            for record in _steps(model.loss, params, (x[some], y[some]), smoke):
                yield {"batch": n, "at": at} | record


def _steps(loss: Any, params: Any, batch: Any, smoke: bool) -> Iterator[Record]:
    programs = {"sgd": compiled(make_step(loss, None, in_axes=AXES), params, (), *batch)}
    for name, make in RULES.items():
        step = make_step(loss, make(), in_axes=AXES)
        programs[name] = compiled(step, params, make().init(params), *batch)
    times = interleaved({k: p.run for k, p in programs.items()}, 2 if smoke else 20, 3.0)
    for name, program in programs.items():
        yield {
            "step": name,
            "milliseconds": float(f"{1e3 * min(times[name]):.4g}"),
            "time_ratio": float(f"{median_ratio(times[name], times['sgd']):.4g}"),
            "temporary_megabytes": program.bytes and round(program.bytes / 1e6, 2),
        }


def tasks(smoke: bool) -> Iterator[Record]:
    """Yields steps of every route with several tasks on one batch, beside a gradient step."""
    for kind in ("mlp",) if smoke else tuple(prices.KINDS):
        for m in (2,) if smoke else (8,):
            steps = prices.steps(prices.KINDS[kind](), m)
            programs = {route: compiled(step, *args) for route, (step, args, _) in steps.items()}
            runs = {route: program.run for route, program in programs.items()}
            times = interleaved(runs, 2 if smoke else 20, 1.0)
            for route, (_, _, gradients) in steps.items():
                ratio = median_ratio(times[route], times["gradient"]) / gradients
                yield {
                    "kind": kind,
                    "tasks": m,
                    "route": route,
                    "milliseconds": float(f"{1e3 * min(times[route]):.4g}"),
                    "time_ratio": float(f"{ratio:.4g}"),
                }


def precision(smoke: bool) -> Iterator[Record]:
    """Yields the error of float32 Gramians against float64, of examples and of four tasks."""
    for name in ("mlp",) if smoke else ("mlp", "cifar10", "transformer"):
        model = MODELS[name]()
        args = (model.params, *model.batch(4 if smoke else 32))

        def both(params: Any, x: jax.Array, y: jax.Array, loss: Any = model.loss) -> Any:
            def losses_fn(params: Any) -> jax.Array:
                return jax.vmap(loss, AXES)(params, x[:4], y[:4])

            examples = jaxmtl.value_and_gramian(loss, in_axes=AXES)(params, x, y)[1]
            return examples, jaxmtl.value_and_gramian(losses_fn)(params)[1]

        found = jax.jit(both)(*args)
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                args,
            )
            expected = jax.device_get(jax.jit(both)(*wide))
        for route, gramian, exact in zip(("examples", "tasks"), found, expected, strict=True):
            norms = np.sqrt(np.diagonal(exact))
            error = np.abs(np.asarray(gramian, np.float64) - exact) / norms[:, None] / norms
            yield {
                "model": name,
                "route": route,
                "dtypes": f"{gramian.dtype} {exact.dtype}",
                "error": float(f"{error.max():.3g}"),
            }


def table7(smoke: bool) -> Iterator[Record]:
    """Yields seconds per epoch of every method on the networks of table 7."""
    for network in tuple(ARCHITECTURES)[: 1 if smoke else None]:
        yield from time_network(network, lambda *_: None, seconds=0.01 if smoke else 1.0)


PARTS: dict[str, Callable[[bool], Iterator[Record]]] = {
    "precision": precision,
    "solvers": solvers,
    "examples": examples,
    "tasks": tasks,
    "table7": table7,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts and prints a table of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "digits"])
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, once")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--data-dir", help="TFDS folder with MNIST: adds the part digits")
    options = parser.parse_args(arguments)
    if "digits" in (options.parts or ()) and not options.data_dir:
        parser.error("expected --data-dir, a TFDS folder with MNIST, with --parts digits; pass it")
    parts = dict(PARTS)
    if options.data_dir:
        parts["digits"] = partial(digits, options.data_dir)
    console, device = Console(width=130), environment()["device"]
    console.print(f"device: {device}")
    for part in options.parts or parts:
        began, records = time.perf_counter(), []
        with jax.enable_x64(part == "solvers"):
            for record in parts[part](options.smoke):
                records.append(record)
                if options.out is not None:
                    append_records(options.out, [{"part": part} | record | environment()])
        rows = [[str(value) for value in record.values()] for record in records]
        Table(part, list(records[0]), rows, names=2).show(console)
        console.print(f"{part}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
