"""What one step of instance-wise Jacobian descent costs, beside a gradient step and its rivals.

    python -m experiments.benchmarks.gramian                       # batch 32, all models
    python -m experiments.benchmarks.gramian --batch 32 128 256 --models mlp mnist

Every method makes the same step from the same batch: losses, the Gramian of their gradients,
UPGrad's weights, the weighted gradient, ``params - lr * gradient``. The methods are interleaved in
one run, so that a busy machine disturbs all alike; the table shows the median time, its ratio to
the gradient step (SGD on the mean loss), compiled operations and temporary bytes. Operations count
the body of a loop once (the LSTM's time steps, UPGrad's solver). TorchJD is measured where it is
installed (``torch==2.13.0 torchjd==0.18.0``), on the models that have a PyTorch twin here.
"""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmtl
from experiments.benchmarks.models import MODELS, Model
from experiments.iwrm.networks import ARCHITECTURES
from experiments.study import append_records
from experiments.timing import Program, compiled, descend, interleaved
from experiments.timing import make_step as rule_step

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    models: tuple[str, ...] = tuple(MODELS)
    batch: tuple[int, ...] = (32,)  # sizes, which are the numbers of objectives
    methods: tuple[str, ...] = ("sgd", "vmap(grad)", "jacrev", "jaxmtl", "autogram", "autojac")
    repeats: int = 30  # at most so many timed steps of each method
    seconds: float = 5.0  # a method stops after so long in timed steps
    learning_rate: float = 0.01
    out: Path | None = None  # JSON lines are appended here


def _explicit(model: Model, lr: float, forward: bool) -> Callable[..., Any]:
    aggregator = jaxmtl.upgrad()

    def step(params: PyTree, x: jax.Array, y: jax.Array) -> Any:
        if forward:
            per_example = jax.vmap(jax.value_and_grad(model.loss), (None, 0, 0))
            losses, jacobian = per_example(params, x, y)
        else:

            def losses_fn(params: PyTree) -> tuple[jax.Array, jax.Array]:
                losses = jax.vmap(model.loss, (None, 0, 0))(params, x, y)
                return losses, losses

            jacobian, losses = jax.jacrev(losses_fn, has_aux=True)(params)
        weights, _ = aggregator.weighting.update(
            jaxmtl.gramian(jacobian), aggregator.weighting.init(), losses=losses
        )
        return descend(params, jaxmtl.combine(jacobian, weights), lr), losses

    return step


def _torch_network(name: str) -> Any:
    """Returns the PyTorch twin of a benchmark model, or None."""
    from torch import nn

    if name == "mlp":
        sizes = (784, 512, 512, 512, 10)
        layers: list[Any] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if name not in ARCHITECTURES:
        return None
    network = ARCHITECTURES[name]
    pairs = itertools.pairwise((network.shape[-1], *network.channels))
    layers = []
    for i, ((a, b), pool) in enumerate(zip(pairs, network.pools, strict=True)):
        layers.append(nn.Conv2d(a, b, 3, groups=a if network.grouped and i else 1))
        layers += [nn.MaxPool2d(pool)] * (pool > 1) + [nn.ELU()]
    layers += [nn.Flatten(), nn.Linear(network.flat(), network.hidden)]
    layers += [nn.ELU(), nn.Linear(network.hidden, 10)]
    return nn.Sequential(*layers)


def _torchjd(name: str, route: str, x: Any, y: Any, lr: float) -> Program | None:
    """Returns TorchJD's step: its Gramian engine ("autogram") or its Jacobian ("autojac")."""
    try:
        import torch
        from torchjd import autogram, autojac
        from torchjd.aggregation import UPGrad, UPGradWeighting
    except ImportError:
        return None
    network = _torch_network(name)
    if network is None:
        return None
    inputs = torch.from_numpy(np.array(x))
    if inputs.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    targets = torch.from_numpy(np.array(y)).long()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
    if route == "autogram":
        engine = autogram.Engine(network, batch_dim=0)
        weighting = UPGradWeighting()
    else:
        aggregator = UPGrad()

    def run() -> None:
        losses = loss_fn(network(inputs), targets)
        optimizer.zero_grad()
        if route == "autogram":
            losses.backward(weighting(engine.compute_gramian(losses)))
        else:
            autojac.backward(losses)
            autojac.jac_to_grad(network.parameters(), aggregator)
        optimizer.step()

    return Program(run)


def make_step(method: str, name: str, model: Model, batch: Any, lr: float) -> Program | None:
    """Returns one method on one model, or None where it cannot run."""
    if method in ("autogram", "autojac"):
        x, y = batch
        return _torchjd(name, method, x, y, lr)
    axes = (None, 0, 0)
    if method in ("sgd", "jaxmtl"):
        rule = jaxmtl.upgrad() if method == "jaxmtl" else None
        state = rule.init(model.params) if rule else ()
        step = rule_step(model.loss, rule, rate=lr, in_axes=axes)
        return compiled(step, model.params, state, *batch)
    step = _explicit(model, lr, forward=method == "vmap(grad)")
    return compiled(step, model.params, *batch)


def main() -> None:
    """Runs the benchmark and print one table per model and batch size."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=defaults.models)
    parser.add_argument("--batch", nargs="+", type=int, default=defaults.batch)
    parser.add_argument("--methods", nargs="+", choices=defaults.methods, default=defaults.methods)
    parser.add_argument("--repeats", type=int, default=defaults.repeats)
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--out", type=Path, default=None)
    options = Options(**vars(parser.parse_args()))

    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}")
    header = f"{'model':<12} {'batch':>5} {'method':<11} {'ms':>9} {'x SGD':>7}"
    print(f"{header} {'best ms':>9} {'MFLOP':>9} {'temp MB':>8}")
    for name in options.models:
        model = MODELS[name]()
        for n in options.batch:
            batch = model.batch(n)
            steps = {
                method: step
                for method in options.methods
                if (step := make_step(method, name, model, batch, options.learning_rate))
            }
            runs = {method: step.run for method, step in steps.items()}
            times = interleaved(runs, options.repeats, options.seconds)
            for method, step in steps.items():
                record = {
                    "model": name,
                    "batch": n,
                    "method": method,
                    "median_ms": 1e3 * statistics.median(times[method]),
                    "best_ms": 1e3 * min(times[method]),
                    "flops": step.flops,
                    "temp_bytes": step.bytes,
                    "steps": len(times[method]),
                    "jax": jax.__version__,
                    "jaxmtl": jaxmtl.__version__,
                    "device": device.device_kind,
                }
                _print(record, times)
                if options.out is not None:
                    append_records(options.out, [record])


def _print(record: dict[str, Any], times: dict[str, list[float]]) -> None:
    ratio = ""
    if "sgd" in times:
        ratio = f"{record['median_ms'] / (1e3 * statistics.median(times['sgd'])):.2f}"
    flops = "" if record["flops"] is None else f"{record['flops'] / 1e6:.1f}"
    temp = "" if record["temp_bytes"] is None else f"{record['temp_bytes'] / 1e6:.2f}"
    print(
        f"{record['model']:<12} {record['batch']:>5} {record['method']:<11} "
        f"{record['median_ms']:>9.2f} {ratio:>7} {record['best_ms']:>9.2f} {flops:>9} {temp:>8}",
        flush=True,
    )


if __name__ == "__main__":
    main()
