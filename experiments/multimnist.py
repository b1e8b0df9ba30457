"""MultiMNIST: read two overlapping digits with one network, by every method.

    python -m experiments.multimnist                                          # bundled digits
    python -m experiments.multimnist --dataset mnist --data-dir DIR --seeds 3
        --methods linear_scalarization mgda cr_mgda pcgrad cr_pcgrad cagrad cr_cagrad upgrad

Results are JSON lines, one per method and seed, in the folder `--out`; table and figure are made
from them (`--report-only`), `--resume` goes on where a run stopped, `--smoke` takes seconds. The
runs whose numbers follow are in `experiments/results`.

A network with a shared trunk and two heads is trained by SGD; a method gets the Jacobian of all
parameters, heads included. Seeds differ in initial parameters and minibatches, which all methods
share. A step counts as conflicting if the inner product of the two gradients of the trunk is
negative. Learning rates were chosen on held-out training digits (`--validation`): 0.2 of
{0.2, 0.5, 1} for the digits, by linear scalarization and FairGrad; for MNIST 0.2 of {0.1, 0.2,
0.4} by MGDA after 400 steps; as in Zhou et al., the rate of the plain method serves its CR- form.
The literal eta / sqrt(k), eta = 0.5, was tried first on MNIST and given up after its test results
were seen (91 to 96 % after two epochs); the schedule in use was then tuned on held-out digits.

**Digits**, 17 methods, 5 seeds, 10 epochs: accuracy 97.5 to 98.0 % left and 97.4 to 97.6 % right
with standard errors of 0.1 to 0.3: no method differs from linear scalarization (97.83 and 97.46 %)
by more than 1.4 of its errors. CAGrad's lower losses come with a longer step (1 + c times at most).

**MNIST**, 3 seeds, one epoch, test accuracy in percent beside table 1 of Zhou et al. 2022:

    method                  left            right           Zhou 2022
    linear_scalarization    96.89 +- 0.17   96.00 +- 0.23
    mgda                    96.96 +- 0.14   95.37 +- 0.32   96.46  95.29
    cr_mgda                 96.84 +- 0.15   95.86 +- 0.28   96.92  95.44
    pcgrad                  96.89 +- 0.23   96.14 +- 0.15   96.63  95.37
    cr_pcgrad               96.64 +- 0.41   95.86 +- 0.41   96.90  95.75
    cagrad                  96.77 +- 0.32   96.14 +- 0.34   96.47  95.20
    cr_cagrad               96.70 +- 0.24   95.91 +- 0.23   96.85  95.70
    upgrad                  96.90 +- 0.17   96.14 +- 0.17

The level is the paper's; its claim, that the CR- form improves both tasks of every method, is not
reproduced: paired over seeds, CR- minus plain is -0.1 and +0.5 (MGDA), -0.3 and -0.3 (PCGrad), -0.1
and -0.2 (CAGrad). Only on MGDA's weaker right digit does it help, and there by one standard error.
Corollary 1 lets the weights move by at most eta_k / (eta_1 k) in a step (0.7 % at k = 100, 0.01 %
at the end), so that a CR- form is close to a linear scalarization with slowly varying weights.

**Reference**: Sener and Koltun 2018, section 5; Zhou et al. 2022, section 6 and table 1.

**Differs from** Zhou et al.: one epoch, batches of 32 (they state neither), a 36 x 36 canvas, no
dropout in LeNet, and a learning rate (hence alpha) that falls as `inverse_sqrt` says.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from rich.table import Table

import jaxmtl
from experiments._runs import (
    Claim,
    Record,
    append_records,
    environment,
    judge,
    make_console,
    mean_and_error,
    read_records,
    show,
)
from experiments.data.digit_pairs import DigitPairs, make_pairs, read_pairs
from experiments.data.images import Images, load_sklearn_digits, load_tfds_images
from experiments.methods import METHODS, inverse_sqrt
from experiments.models.two_heads import DenseTrunk, LeNetTrunk, TwoHeads

Params = Any  # {"trunk": ..., "left": ..., "right": ...}
Carry = tuple[Params, Any]  # parameters and optimizer state, with a leading axis of seeds
Metrics = dict[str, Any]
Order = tuple[jax.Array, jax.Array]  # (steps, batch) indices of pairs, (steps,) keys
InitState = Callable[[Params], Any]
Epoch = Callable[[Carry, Order, DigitPairs], tuple[Carry, Metrics]]

TASKS = ("left", "right")

COMMAND = """
export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false  # half the processor time or less
python -m experiments.multimnist --out experiments/results
python -m experiments.multimnist --out experiments/results --dataset mnist
python -m experiments.multimnist --out experiments/results --dataset mnist_batches
"""
FIGURES = ("multimnist_digits.png", "multimnist_mnist.png", "multimnist_mnist_batches.png")

# Zhou et al. 2022 (CR-MOGM), table 1: accuracy in percent of task-L and task-R, mean of 3 runs.
PAPER = {
    "mgda": (96.46, 95.29),
    "cr_mgda": (96.92, 95.44),
    "pcgrad": (96.63, 95.37),
    "cr_pcgrad": (96.90, 95.75),
    "cagrad": (96.47, 95.20),
    "cr_cagrad": (96.85, 95.70),
}
# Its table 2: final losses of task-L and task-R by batch size, mean of 3 runs.
PAPER_LOSSES = {
    ("mgda", 8): (0.44, 0.54),
    ("mgda", 4): (0.57, 0.65),
    ("mgda", 2): (0.71, 0.81),
    ("cr_mgda", 8): (0.24, 0.35),
    ("cr_mgda", 4): (0.26, 0.36),
    ("cr_mgda", 2): (0.28, 0.40),
}
PAIRS = {"mgda": "cr_mgda", "pcgrad": "cr_pcgrad", "cagrad": "cr_cagrad"}


@dataclass(frozen=True)
class Options:
    """What decides the outcome of a run, besides method and seed."""

    dataset: str
    canvas: int  # side of the square on which both digits lie
    partners: int  # right digits per left digit
    batch_size: int
    epochs: int
    learning_rate: float  # eta_1; it falls as `inverse_sqrt`, and is the same for every method
    head_width: int
    validation: bool = False  # test on the last sixth of the training digits, to choose options
    max_steps: int | None = None  # per epoch, for trials and smoke runs


class Preset(NamedTuple):
    """One results file: the same methods and seeds under each of several options."""

    options: tuple[Options, ...]
    methods: tuple[str, ...]
    seeds: int


_SIX = tuple(name for pair in PAIRS.items() for name in pair)
# The canvas, the network and the number of pairs of Sener and Koltun. Zhou et al. give no
# batch size for table 1; 32 keeps enough gradient noise for their point.
_MNIST = Options("mnist", 36, 1, batch_size=32, epochs=1, learning_rate=0.2, head_width=50)
# 8 x 8 digits overlap by 4 x 4 pixels. 1,437 training digits are few: four partners each.
_DIGITS = Options("digits", 12, 4, batch_size=32, epochs=10, learning_rate=0.2, head_width=32)
# As many examples for every batch size, so many that the longest run takes minutes.
_EXAMPLES = 10_000
PRESETS = {
    "digits": Preset((_DIGITS,), tuple(METHODS), seeds=5),
    "mnist": Preset((_MNIST,), ("linear_scalarization", *_SIX), seeds=3),
    "mnist_batches": Preset(
        tuple(
            replace(_MNIST, batch_size=b, learning_rate=0.1, max_steps=_EXAMPLES // b)
            for b in (8, 4, 2)
        ),
        _SIX,
        seeds=3,
    ),
}
TRUNKS: dict[str, nn.Module] = {"digits": DenseTrunk(64), "mnist": LeNetTrunk()}


# --- data ---------------------------------------------------------------------------------------


def load_pairs(options: Options, data_dir: str | None) -> tuple[DigitPairs, DigitPairs]:
    """Return training and test pairs; no digit is in both."""
    loaders: dict[str, Callable[[str], Images]] = {
        "digits": load_sklearn_digits,
        "mnist": partial(load_tfds_images, "mnist", data_dir=data_dir),
    }
    load = loaders[options.dataset]
    train = load("train")
    if options.validation:
        cut = len(train.labels) * 5 // 6
        train, test = Images(*(a[:cut] for a in train)), Images(*(a[cut:] for a in train))
    else:
        test = load("test")
    pairs = partial(make_pairs, partners=options.partners, statistics_of=train)
    return pairs(train, seed=0), pairs(test, seed=1)


# --- training -----------------------------------------------------------------------------------


def make_model(options: Options) -> TwoHeads:
    """Return the network of the data set."""
    return TwoHeads(TRUNKS[options.dataset], options.head_width)


def logits_of(model: TwoHeads, params: Params, images: jax.Array) -> jax.Array:
    """Return the logits (2, b, 10)."""
    return jnp.asarray(model.apply({"params": params}, images))


def example_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropies (2, b)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_init(options: Options) -> Callable[[jax.Array], Params]:
    """Return a compiled function from (seeds,) keys to the parameters of all seeds."""
    model = make_model(options)
    blank = jnp.zeros((1, options.canvas, options.canvas))
    return jax.jit(jax.vmap(lambda key: model.init(key, blank)["params"]))


def make_order(options: Options, num_pairs: int) -> Callable[[jax.Array, int], Order]:
    """Return a compiled function from (seeds,) keys and the epoch's number to its minibatches."""
    steps = options.max_steps or num_pairs // options.batch_size

    def order_of(key: jax.Array, epoch: jax.Array) -> Order:
        order_key, step_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, num_pairs)[: steps * options.batch_size]
        return order.reshape(steps, options.batch_size), jax.random.split(step_key, steps)

    return jax.jit(jax.vmap(order_of, in_axes=(0, None)))


def make_epoch(options: Options, method: str) -> tuple[InitState, Epoch]:
    """Return the optimizer's init and one compiled epoch, a `scan` for all seeds at once."""
    model = make_model(options)
    optimizer = optax.chain(
        METHODS[method](len(TASKS)),
        optax.sgd(lambda step: options.learning_rate * inverse_sqrt(step)),
    )

    def task_losses(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = logits_of(model, params, images)
        return example_losses(logits, labels).mean(axis=1)  # (2,)

    def epoch(carry: Carry, order: Order, data: DigitPairs) -> tuple[Carry, Metrics]:
        def step(carry: Carry, inputs: Order) -> tuple[Carry, Metrics]:
            params, opt_state = carry
            index, key = inputs
            images, labels = read_pairs(data, index, options.canvas)
            losses, jacobian = jaxmtl.value_and_jacobian(task_losses)(params, images, labels)
            updates, opt_state = optimizer.update(
                jacobian, opt_state, params, losses=losses, key=key
            )
            conflict = jaxmtl.gramian(jacobian["trunk"])[0, 1] < 0
            metrics = {"train_loss": losses, "conflict_rate": conflict}
            return (jaxmtl.apply_updates(params, updates), opt_state), metrics

        carry, metrics = lax.scan(step, carry, order)
        return carry, jax.tree.map(lambda x: x.mean(axis=0), metrics)

    return jax.vmap(optimizer.init), jax.jit(jax.vmap(epoch, in_axes=(0, 0, None)))


def make_evaluate(options: Options) -> Callable[[Params, DigitPairs], Metrics]:
    """Return compiled test loss and accuracy of all seeds."""
    model = make_model(options)

    def evaluate(params: Params, data: DigitPairs) -> Metrics:
        def one_pair(index: jax.Array) -> Metrics:
            images, labels = read_pairs(data, index[None], options.canvas)
            logits = logits_of(model, params, images)
            correct = logits.argmax(axis=-1) == labels
            return {
                "test_loss": example_losses(logits, labels)[:, 0],
                "test_accuracy": correct[:, 0],
            }

        metrics = lax.map(one_pair, jnp.arange(len(data.left)), batch_size=500)
        return jax.tree.map(lambda x: x.mean(axis=0), metrics)

    return jax.jit(jax.vmap(evaluate, in_axes=(0, None)))


def train_methods(
    options: Options,
    methods: Sequence[str],
    seeds: Sequence[int],
    data: tuple[DigitPairs, DigitPairs],
    results: Path,
    console: Console,
) -> None:
    """Train what the results file does not hold yet; append one record per method and seed."""
    config = asdict(options)
    held = [record for record in read_records(results) if record["config"] == config]
    done = {(record["method"], record["seed"]) for record in held}
    init, evaluate = make_init(options), make_evaluate(options)
    order = make_order(options, len(data[0].left))
    bars = Progress(
        SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn(), console=console
    )
    with bars:
        bar = bars.add_task("", total=len(methods) * options.epochs)
        for method in methods:
            missing = [seed for seed in seeds if (method, seed) not in done]
            if not missing:
                bars.advance(bar, options.epochs)
                continue
            bars.update(bar, description=f"{method:<20} batch {options.batch_size}")
            start = time.perf_counter()
            keys = jax.vmap(jax.random.key)(jnp.asarray(missing))
            params = init(keys)
            init_state, epoch = make_epoch(options, method)
            carry = params, init_state(params)
            history: list[Metrics] = []
            for number in range(1, options.epochs + 1):
                carry, metrics = epoch(carry, order(keys, number), data[0])
                history.append(jax.device_get(metrics | evaluate(carry[0], data[1])))
                bars.advance(bar)
                if not console.is_terminal:  # a log file shows no bar
                    left, right = 100 * history[-1]["test_accuracy"].mean(axis=0)
                    console.print(
                        f"{method}, batch {options.batch_size}, epoch {number}/{options.epochs}: "
                        f"test accuracy {left:.2f} % left, {right:.2f} % right"
                    )
            shared = {
                "method": method,
                "config": config,
                **environment(),
                "seconds_per_seed": round((time.perf_counter() - start) / len(missing), 2),
            }
            append_records(
                results,
                (
                    shared | {"seed": seed, "history": history_of(history, i)}
                    for i, seed in enumerate(missing)
                ),
            )


def history_of(history: Sequence[Metrics], i: int) -> Record:
    """Return the metrics of the i-th seed as lists with one entry per epoch."""
    names = history[0]
    return {
        name: np.round(np.array([epoch[name][i] for epoch in history], np.float64), 5).tolist()
        for name in names
    }


# --- report: from the results file alone ----------------------------------------------------------


def by_batch_size(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Return the records of each batch size, the largest first."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["config"]["batch_size"], []).append(record)
    return dict(sorted(groups.items(), reverse=True))


def summarise(records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """Return, per method and quantity, the value of each seed after the last epoch."""
    summary: dict[str, dict[str, list[float]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        history = record["history"]
        values = {"conflict": 100 * float(np.mean(history["conflict_rate"]))}
        for i, task in enumerate(TASKS):
            values[f"{task} accuracy"] = 100 * history["test_accuracy"][-1][i]
            values[f"{task} loss"] = history["test_loss"][-1][i]
        for name, value in values.items():
            summary.setdefault(record["method"], {}).setdefault(name, []).append(value)
    order = list(METHODS)
    return dict(sorted(summary.items(), key=lambda item: order.index(item[0])))


def title_of(records: Sequence[Record]) -> str:
    """Return what table and figure show."""
    config = records[0]["config"]
    when = f"epoch {config['epochs']}"
    if config["max_steps"]:
        when = f"after {config['epochs'] * config['max_steps'] * config['batch_size']:,} examples"
    return f"MultiMNIST ({config['dataset']}), test set, {when}, mean ± standard error over seeds"


def make_table(records: Sequence[Record]) -> Table:
    """Return the table of test metrics, beside the paper's where it has them."""
    groups = by_batch_size(records)
    beside_paper = records[0]["config"]["dataset"] == "mnist"
    table = Table(title=title_of(records))
    if len(groups) > 1:
        table.add_column("batch", justify="right")
    table.add_column("method", no_wrap=True)
    for header in ("left acc. %", "right acc. %", "left loss", "right loss", "conflict %"):
        table.add_column(header, justify="right")
    if beside_paper:
        quantity = "loss" if len(groups) > 1 else "acc. %"
        table.add_column(f"Zhou 2022 {quantity}", justify="right")
    table.add_column("seeds", justify="right")
    for batch_size, group in groups.items():
        for method, summary in summarise(group).items():
            cells = [str(batch_size), method] if len(groups) > 1 else [method]
            cells += [show(summary[f"{task} accuracy"], digits=2) for task in TASKS]
            cells += [show(summary[f"{task} loss"], digits=3) for task in TASKS]
            cells += [show(summary["conflict"], digits=1)]
            if beside_paper:
                theirs = PAPER_LOSSES.get((method, batch_size))
                if len(groups) == 1:
                    theirs = PAPER.get(method)
                cells += ["{:.2f} / {:.2f}".format(*theirs) if theirs else ""]
            table.add_row(*cells, str(len(summary["conflict"])))
        table.add_section()
    return table


def draw(records: Sequence[Record], path: Path) -> None:
    """Save the figure: accuracy, loss and conflict rate of every method."""
    summary = summarise(records)
    rows = np.arange(len(summary))
    config = records[0]["config"]
    figure = Figure(figsize=(12, 1.8 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    looks = {"left": ("tab:blue", "o", -0.15), "right": ("tab:orange", "s", 0.15)}

    def dots(axis: Axes, name: str, colour: str, marker: str, shift: float = 0.0) -> None:
        points = [mean_and_error(values[name]) for values in summary.values()]
        mean, error = np.transpose(points)
        axis.errorbar(mean, rows + shift, xerr=error, fmt=marker, color=colour, capsize=2)

    for i, (task, (colour, marker, shift)) in enumerate(looks.items()):
        dots(axes[0], f"{task} accuracy", colour, marker, shift)
        dots(axes[1], f"{task} loss", colour, marker, shift)
        axes[0].plot([], [], marker, color=colour, label=f"{task} digit")  # the legend's entry
        if config["dataset"] == "mnist":
            paper = [PAPER.get(method, (np.nan, np.nan))[i] for method in summary]
            axes[0].plot(
                paper, rows + shift, marker, color=colour, mfc="none", label=f"{task}, Zhou 2022"
            )
    dots(axes[2], "conflict", "tab:gray", "D")
    labels = ("test accuracy (%)", "test loss", "steps with conflicting gradients (%)")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(rows, list(summary))
    axes[0].invert_yaxis()
    figure.suptitle(title_of(records))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def draw_batches(records: Sequence[Record], path: Path) -> None:
    """Save the figure of table 2: test loss of every method by batch size, a column per pair."""
    groups = {size: summarise(group) for size, group in by_batch_size(records).items()}
    sizes = list(groups)
    shown = {name for summary in groups.values() for name in summary}
    columns: list[tuple[str, ...]] = [p for p in PAIRS.items() if shown.intersection(p)]
    columns += [(name,) for name in METHODS if name in shown.difference(*PAIRS.items())]
    figure = Figure(figsize=(4 * len(columns) + 1, 4.8), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    looks = {"left": ("tab:blue", "o"), "right": ("tab:orange", "s")}
    for axis, pair in zip(axes, columns, strict=True):
        for (i, (task, (colour, marker))), j in product(enumerate(looks.items()), range(len(pair))):
            method, line = pair[j], "--" if j else "-"
            points = [
                mean_and_error(summary[method][f"{task} loss"])
                if method in summary
                else (np.nan,) * 2
                for summary in groups.values()
            ]
            mean, error = np.transpose(points)
            x = np.arange(len(sizes)) + 0.03 * (2 * j + i - 1.5)
            look = {"color": colour, "marker": marker, "ls": line}
            axis.errorbar(
                x, mean, yerr=error, capsize=2, label=f"{task}, {'CR-' if j else 'plain'}", **look
            )
            paper = [PAPER_LOSSES.get((method, size), (np.nan, np.nan))[i] for size in sizes]
            if np.isfinite(paper).any():
                label = f"{task}, {'CR-' if j else 'plain'}, Zhou 2022"
                axis.plot(x, paper, mfc="none", alpha=0.5, label=label, **look)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set(xlabel="batch size", title=pair[0])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test loss")
    figure.suptitle(title_of(records))
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


# --- claims: from the results files alone --------------------------------------------------------


def signed(values: Sequence[float], digits: int) -> str:
    """Return "mean ± standard error" with the sign of the mean."""
    mean, error = mean_and_error(values)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def above_error(values: Sequence[float]) -> bool:
    """Tell whether the mean is positive by more than its standard error."""
    mean, error = mean_and_error(values)
    return mean > error


Final = dict[tuple[int, str], np.ndarray]  # batch size and method -> (seeds, 2)


def finals(records: Sequence[Record], quantity: str) -> Final:
    """Return a quantity of both tasks after the last epoch, seeds in order."""
    return {
        (size, method): np.transpose([summary[f"{task} {quantity}"] for task in TASKS])
        for size, group in by_batch_size(records).items()
        for method, summary in summarise(group).items()
    }


def both_tasks(values: np.ndarray, digits: int) -> str:
    """Return the left and the right mean with errors of (seeds, 2) differences."""
    return " and ".join(signed(column, digits) for column in values.T)


def claims_of_table1(records: Sequence[Record]) -> list[Claim]:
    """Judge that each CR- form is more accurate than its plain method."""
    accuracy = finals(records, "accuracy")
    claims = []
    for size, plain in accuracy:
        reduced = PAIRS.get(plain)
        if reduced is None or (size, reduced) not in accuracy:
            continue
        gain = accuracy[size, reduced] - accuracy[size, plain]
        paper = np.subtract(PAPER[reduced], PAPER[plain])
        claims.append(
            Claim(
                f"`{reduced}` is more accurate than `{plain}` on both digits of MultiMNIST (%)",
                "Zhou 2022, table 1",
                "{:+.2f} and {:+.2f}".format(*paper),
                both_tasks(gain, 2),
                judge(above_error(column) for column in gain.T),
            )
        )
    return claims


def claims_of_table2(records: Sequence[Record]) -> list[Claim]:
    """Judge what batches of 8, 4 and 2 do; each condition is a mean above its error, per task."""
    loss = finals(records, "loss")
    sizes = list(by_batch_size(records))
    if len(sizes) < 2:
        return []
    large, small = sizes[0], sizes[-1]

    def known(*methods: str) -> bool:
        return all((size, method) in loss for size in sizes for method in methods)

    claims = []
    if known("mgda"):
        growth = loss[small, "mgda"] - loss[large, "mgda"]
        paper = np.subtract(PAPER_LOSSES["mgda", small], PAPER_LOSSES["mgda", large])
        claims.append(
            Claim(
                f"The loss of `mgda` grows as the batch shrinks from {large} to {small}",
                "Zhou 2022, table 2",
                "{:+.2f} and {:+.2f}".format(*paper),
                both_tasks(growth, 3),
                judge(above_error(column) for column in growth.T),
            )
        )
    for plain, reduced in PAIRS.items():
        if not known(plain, reduced):
            continue
        gains = {size: loss[size, plain] - loss[size, reduced] for size in sizes}
        paper = {
            size: np.subtract(PAPER_LOSSES[plain, size], PAPER_LOSSES[reduced, size])
            for size in sizes
            if (plain, size) in PAPER_LOSSES
        }
        claims.append(
            Claim(
                f"The loss of `{reduced}` is lower than that of `{plain}` at every batch size",
                "Zhou 2022, table 2 and section 6",
                "; ".join("{}: {:+.2f} and {:+.2f}".format(b, *v) for b, v in paper.items()),
                "; ".join(f"{b}: {both_tasks(gain, 3)}" for b, gain in gains.items()),
                judge(above_error(column) for gain in gains.values() for column in gain.T),
            )
        )
        growth = gains[small] - gains[large]
        claims.append(
            Claim(
                f"That advantage of `{reduced}` is larger at batch size {small} than at {large}",
                "Zhou 2022, table 2 and section 1",
                "{:+.2f} and {:+.2f}".format(*(paper[small] - paper[large])) if paper else "",
                both_tasks(growth, 3),
                judge(above_error(column) for column in growth.T),
            )
        )
    return claims


def claims(folder: Path) -> list[Claim]:
    """Return the claims of both tables that the results in ``folder`` decide.

    Differences are paired over seeds; a condition holds if their mean has the claimed sign and
    exceeds its standard error. A claim needs the condition on both digits.
    """
    table1 = read_records(folder / "multimnist_mnist.jsonl")
    table2 = read_records(folder / "multimnist_mnist_batches.jsonl")
    return claims_of_table1(table1) + claims_of_table2(table2)


# --- main ---------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line; options that are not given come from the preset of the data set."""
    parser = argparse.ArgumentParser(prog="python -m experiments.multimnist")
    add = parser.add_argument
    add("--dataset", choices=PRESETS, default="digits", help="mnist_batches: MNIST by batch size")
    add("--data-dir", help="TFDS folder of MNIST; by default TFDS's own, with download")
    add("--out", type=Path, default=Path("results"), help="folder of results and figure")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    add("--seeds", type=int)
    add("--epochs", type=int)
    add("--max-steps", type=int, help="per epoch, for trials")
    add("--batch-size", type=int)
    add("--learning-rate", type=float)
    add("--validation", action="store_true", default=None, help="test on held-out training digits")
    add("--resume", action="store_true", help="keep what the results file holds already")
    add("--report-only", action="store_true", help="table and figure of an existing results file")
    add("--smoke", action="store_true", help="two seeds, one epoch, three steps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, then report."""
    args = parse(argv)
    console = make_console()
    fields = ("epochs", "max_steps", "batch_size", "learning_rate", "validation")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.smoke:
        given |= {"epochs": 1, "max_steps": 3}
        args.seeds = 2
    preset = PRESETS[args.dataset]
    if args.batch_size and len(preset.options) > 1:
        raise SystemExit(
            f"expected no --batch-size, which {args.dataset} varies, got {args.batch_size}; "
            "drop it or take another --dataset"
        )
    variants = [replace(options, **given) for options in preset.options]
    methods, seeds = args.methods or preset.methods, range(args.seeds or preset.seeds)
    results = args.out / f"multimnist_{args.dataset}.jsonl"
    if not args.report_only:
        if not args.resume:
            results.unlink(missing_ok=True)
        configs = [asdict(options) for options in variants]
        if any(record["config"] not in configs for record in read_records(results)):
            raise SystemExit(f"expected the options of {results}, got {variants}; drop --resume")
        data = load_pairs(variants[0], args.data_dir)
        for options in variants:
            train_methods(options, methods, seeds, data, results, console)
    records = read_records(results)
    if not records:
        raise SystemExit(
            f"expected results in {results}, got none; run without --report-only first"
        )
    console.print(make_table(records))
    figure = results.with_suffix(".png")
    (draw if len(preset.options) == 1 else draw_batches)(records, figure)
    console.print(f"{results} -> {figure}")


if __name__ == "__main__":
    main()
