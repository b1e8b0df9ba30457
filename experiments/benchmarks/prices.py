"""What every route costs on one network of each kind, in gradients of the mean loss.

    python -m experiments.benchmarks.prices                             # all kinds, 4 tasks
    python -m experiments.benchmarks.prices --kinds mlp --tasks 2 4 8
    python -m experiments.benchmarks.prices --compile 5                 # and what compiling takes

Each cell is two numbers: operations of a whole step, the update of the parameters included, divided
by those of a gradient step on the mean loss, and temporary memory. Operations are those of products
and convolutions, read off the program, times the trips of loops; the body of the solver's counts
once, but for its splitting, from 32 examples on, whose number of steps is fixed. Memory is the
compiler's. Neither depends on how busy the machine is. The routes:

* *plain*: weights that need nothing, so the gradient of a weighted sum.
* *losses*: a rule that reads the losses alone.
* *Jacobian*: UPGrad behind ``value_and_jacobian``.
* *no Jacobian*: UPGrad by ``value_and_grad``.
* *chunks*: the same with ``chunk_size=1``, one gradient at a time.
* *heads apart*: the same with ``shared=``: the heads are left out of the Gramian.
* *encoder*: UPGrad on the gradients of the encoder's output.
* *separate*: UPGrad on a batch of its own per task, of the same size; divided by the m gradients
  of m batches.
* *per example*: UPGrad on one objective per example of the batch.

With ``--compile`` a second table has the seconds that tracing and compiling the step take, divided
by those of the gradient step: medians of so many times in turns, which do depend on the machine.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxmtl
from experiments.operations import count
from experiments.study import append_records, environment
from experiments.timing import compiled, descend

RATE = 0.01


class Kind(NamedTuple):
    """A network with a linear output per task on the features of its encoder."""

    encode: Callable[[Any, jax.Array], jax.Array]  # (params, x) -> features (batch, width)
    params: Any  # of the encoder
    x: jax.Array
    width: int


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    fan_in = max(int(np.prod(shape[:-1])), 1)
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), jnp.float32)


def mlp() -> Kind:
    """Returns three dense layers of 256, batch 64."""
    rng = np.random.default_rng(0)
    params = [_normal(rng, 256, 256) for _ in range(3)]

    def encode(params: Any, x: jax.Array) -> jax.Array:
        for layer in params:
            x = jnp.tanh(x @ layer)
        return x

    return Kind(encode, params, _normal(rng, 64, 256), 256)


def cnn() -> Kind:
    """Returns three convolutions, 3-16-32-32 channels on images of 16 x 16, and a dense layer."""
    rng = np.random.default_rng(0)
    channels = (3, 16, 32, 32)
    params = {
        "convolutions": [_normal(rng, 3, 3, a, b) for a, b in itertools.pairwise(channels)],
        "dense": _normal(rng, 4 * 4 * 32, 64),
    }

    def encode(params: Any, x: jax.Array) -> jax.Array:
        for i, kernel in enumerate(params["convolutions"]):
            stride = (2, 2) if i else (1, 1)
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=numbers)
            x = jax.nn.relu(x)
        return jax.nn.relu(x.reshape(len(x), -1) @ params["dense"])

    return Kind(encode, params, jnp.asarray(rng.normal(size=(32, 16, 16, 3)), jnp.float32), 64)


def transformer() -> Kind:
    """Returns two blocks of width 64 with 4 heads, 16 tokens, batch 16."""
    rng = np.random.default_rng(0)
    width, heads, length = 64, 4, 16

    def block() -> Any:
        return {
            "qkv": _normal(rng, width, 3 * width),
            "out": _normal(rng, width, width),
            "up": _normal(rng, width, 4 * width),
            "down": _normal(rng, 4 * width, width),
        }

    params = {"embed": _normal(rng, 32, width), "blocks": [block(), block()]}

    def norm(x: jax.Array) -> jax.Array:
        x = x - jnp.mean(x, -1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def encode(params: Any, x: jax.Array) -> jax.Array:
        h = x @ params["embed"]
        for layer in params["blocks"]:
            mixed = norm(h) @ layer["qkv"]
            q, k, v = jnp.moveaxis(mixed.reshape(*h.shape[:2], 3, heads, width // heads), 2, 0)
            attention = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / heads, -1)
            h = h + jnp.einsum("bhts,bshe->bthe", attention, v).reshape(h.shape) @ layer["out"]
            h = h + jax.nn.gelu(norm(h) @ layer["up"]) @ layer["down"]
        return jnp.mean(h, 1)

    return Kind(encode, params, jnp.asarray(rng.normal(size=(16, length, 32)), jnp.float32), width)


def lstm() -> Kind:
    """Returns an LSTM of 64 units over 16 steps of 28 inputs, batch 32."""
    rng = np.random.default_rng(0)
    units = 64
    params = {"x": _normal(rng, 28, 4 * units), "h": _normal(rng, units, 4 * units)}

    def encode(params: Any, x: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
            c, h = carry
            i, f, g, o = jnp.split(x @ params["x"] + h @ params["h"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

        start = jnp.zeros((len(x), units))
        return jax.lax.scan(step, (start, start), jnp.moveaxis(x, 1, 0))[0][1]

    return Kind(encode, params, jnp.asarray(rng.normal(size=(32, 16, 28)), jnp.float32), units)


KINDS: dict[str, Callable[[], Kind]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "lstm": lstm,
}


def steps(kind: Kind, m: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]]:
    """Returns the step of every route with its arguments and the gradients that are its unit."""
    rng = np.random.default_rng(1)
    params = {"encoder": kind.params, "heads": _normal(rng, kind.width, m)}
    y = jnp.asarray(rng.normal(size=(len(kind.x), m)), jnp.float32)

    def of_features(params: Any, z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((z @ params["heads"] - y) ** 2, axis=0)

    def encode(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return kind.encode(params["encoder"], x)

    def losses_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return of_features(params, encode(params, x, y), x, y)

    def example_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(losses_fn(params, x[None], y[None]))

    def loss_of(i: int) -> Callable[..., jax.Array]:
        return lambda params, batch: losses_fn(params, *batch)[i]

    def gradient(params: Any, x: jax.Array, y: jax.Array) -> Any:
        return descend(params, jax.grad(lambda p: losses_fn(p, x, y).mean())(params), RATE)

    def with_jacobian(params: Any, x: jax.Array, y: jax.Array) -> Any:
        rule = jaxmtl.upgrad()
        _, jacobian = jaxmtl.value_and_jacobian(losses_fn)(params, x, y)
        return descend(params, rule.update(jacobian, rule.init(params), params)[0], RATE)

    def by(rule: jaxmtl.Aggregator, losses_fn: Any = losses_fn, **route: Any) -> Callable[..., Any]:
        def step(params: Any, *args: Any) -> Any:
            value_and_grad = jaxmtl.value_and_grad(losses_fn, rule, **route)
            return descend(params, value_and_grad(params, rule.init(params), *args)[1], RATE)

        return step

    args = params, kind.x, y
    names = [f"task_{i:02d}" for i in range(m)]
    losses = {name: loss_of(i) for i, name in enumerate(names)}
    return {
        "gradient": (gradient, args, 1),
        "plain": (by(jaxmtl.linear_scalarization()), args, 1),
        "losses": (by(jaxmtl.scale_invariant()), args, 1),
        "Jacobian": (with_jacobian, args, 1),
        "no Jacobian": (by(jaxmtl.upgrad()), args, 1),
        "chunks": (by(jaxmtl.upgrad(), chunk_size=1), args, 1),
        "heads apart": (by(jaxmtl.upgrad(), shared={"encoder": True, "heads": False}), args, 1),
        "encoder": (by(jaxmtl.upgrad(), of_features, encoder=encode), args, 1),
        "separate": (
            by(jaxmtl.upgrad(), losses),
            (params, dict.fromkeys(names, (kind.x, y))),
            m,
        ),
        "per example": (by(jaxmtl.upgrad(), example_loss, in_axes=(None, 0, 0)), args, 1),
    }


def compile_seconds(step: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float]:
    """Returns the seconds of tracing a step, lowering included, and of compiling it."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(step).lower(*args)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def compile_ratios(
    steps: dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Returns what tracing and compiling every route take, divided by that of the gradient."""
    found: dict[str, list[tuple[float, float]]] = {route: [] for route in steps}
    for _ in range(repeats):
        for route, (step, args, _) in steps.items():
            found[route].append(compile_seconds(step, args))
    medians = {
        route: [statistics.median(part) for part in zip(*seconds, strict=True)]
        for route, seconds in found.items()
    }
    base = medians["gradient"]
    return {route: (trace / base[0], run / base[1]) for route, (trace, run) in medians.items()}


def measure(kinds: Sequence[str], tasks: Sequence[int], repeats: int = 0) -> list[dict[str, Any]]:
    """Returns one record per kind of network, number of tasks and route.

    Args:
      kinds: Names of networks.
      tasks: Numbers of tasks.
      repeats: How often each step is compiled to time it; 0 leaves that out.
    """
    records = []
    for name in kinds:
        kind = KINDS[name]()
        for m in tasks:
            base = 1
            ratios = compile_ratios(steps(kind, m), repeats) if repeats else {}
            for route, (step, args, gradients) in steps(kind, m).items():
                operations, memory = count(step, *args), compiled(step, *args).bytes
                if route == "gradient":
                    base = operations
                records.append(
                    {
                        "kind": name,
                        "tasks": m,
                        "examples": len(kind.x),
                        "route": route,
                        "operations": operations,
                        "bytes": memory,
                        "gradients": round(operations / base / gradients, 3),
                    }
                )
                if repeats:
                    trace, run = ratios[route]
                    records[-1] |= {"trace_ratio": round(trace, 3), "compile_ratio": round(run, 3)}
    return records


def _price(record: dict[str, Any]) -> str:
    memory = "?" if record["bytes"] is None else f"{record['bytes'] / 1e6:.1f} MB"
    return f"{record['gradients']:.2f} ({memory})"


def _compile_time(record: dict[str, Any]) -> str:
    return f"{record['trace_ratio']:.2f} / {record['compile_ratio']:.2f}"


def table(records: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str] = _price) -> str:
    """Returns a table in Markdown, by default of gradients and temporary memory."""
    columns = list(dict.fromkeys((r["kind"], r["tasks"]) for r in records))
    found = {(r["kind"], r["tasks"], r["route"]): r for r in records}
    lines = [
        f"| route | {' | '.join(f'{kind}, m = {m}' for kind, m in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for route in dict.fromkeys(r["route"] for r in records):
        cells = [cell(found[kind, m, route]) for kind, m in columns]
        lines.append(f"| {route} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--tasks", type=int, nargs="+", default=[4])
    parser.add_argument(
        "--compile",
        type=int,
        default=0,
        metavar="N",
        help="trace and compile every step N times and print what that takes",
    )
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    options = parser.parse_args(arguments)
    records = measure(options.kinds, options.tasks, options.compile)
    if options.out is not None:
        append_records(options.out, [record | environment() for record in records])
    print(table(records))
    if options.compile:
        print("\nSeconds of tracing / compiling, the gradient step's = 1\n")
        print(table(records, _compile_time))


if __name__ == "__main__":
    main()
