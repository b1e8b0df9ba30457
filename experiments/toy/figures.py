"""The figures of the toy study, drawn from its results files alone."""

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from experiments.study import Record
from experiments.toy import landscape

Parts = dict[str, dict[str, Record]]  # records by part and method

NAMES = {
    "mgda": "MGDA",
    "smg": "SMG",
    "smg_growing_batch": "SMG, growing batch",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "moco": "MoCo",
    "uniform": "Uniform",
    "imtl": "IMTL",
    "imtl_g": "IMTL, pseudo-inverse",
    "nash_mtl": "Nash-MTL",
    "aligned_mtl": "Aligned-MTL",
    "float32": "Aligned-MTL, float32",
    "linear_scalarization": "Linear scalarization",
    "famo": "FAMO, decay 1e-3",
    "famo_decay_1e-5": "FAMO, decay 1e-5",
    "ldc_mtl": "LDC-MTL",
}
COLORS = {"smg": "tab:blue", "smg_growing_batch": "tab:orange", "moco": "tab:green"}
LIMIT = 11.5  # of the parameters that are shown


def save(figure: Figure, path: Path) -> None:
    """Saves a figure with 256 colors, which makes it three times smaller than with all."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def trajectory(axis: Axes, points: np.ndarray) -> None:
    """Draws a line (k, 2) from dark to bright, with a dot at its start and a cross at its end."""
    segments = np.stack([points[:-1], points[1:]], axis=1)
    line = LineCollection(list(segments), cmap="plasma", lw=2, zorder=3, capstyle="round")
    line.set_array(np.linspace(0, 0.9, len(segments)))
    line.set_clim(0, 1)
    axis.add_collection(line)
    axis.plot(*points[0], "o", color="black", ms=5, zorder=4)
    axis.plot(*points[-1], "X", color="tab:red", mec="white", mew=0.6, ms=8, zorder=5)


def paths_of(record: Record, alpha: int, starts: Sequence[int] | None = None) -> np.ndarray:
    """Returns the first seed's trajectories with their ends, (starts, points + 1, 2)."""
    path, final = np.array(record["path"])[alpha], np.array(record["final"])[0, alpha]
    paths = np.concatenate([path, final[:, None]], axis=1)
    return paths if starts is None else paths[list(starts)]


def parameter_space(axis: Axes, paths: np.ndarray, alpha: float = 0.5) -> None:
    """Draws trajectories over the weighted objective, with the Pareto set and its optimum."""
    ticks = np.linspace(-LIMIT, LIMIT, 201)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1)
    height = landscape.losses_at(grid) @ np.array([alpha, 1 - alpha])
    axis.contourf(ticks, ticks, height, levels=18, cmap="Blues_r", alpha=0.55)
    axis.plot(*landscape.pareto_set().T, color="0.35", lw=6, solid_capstyle="butt", zorder=2)
    best = landscape.minimize_weighted(np.array([alpha]))[0]
    axis.plot(*best, "*", color="gold", mec="black", ms=13, zorder=4)
    for path in paths:
        trajectory(axis, path)
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[-8, 0, 8], yticks=[-8, 0, 8])


def objective_space(
    axis: Axes, paths: np.ndarray, best: np.ndarray, scale: Sequence[float] = (1, 1)
) -> None:
    """Draws trajectories of the losses, with the front and a star at the losses ``best``."""
    front = landscape.losses_at(landscape.pareto_set()) * scale
    axis.plot(*front.T, color="0.35", lw=6, solid_capstyle="butt", zorder=2)
    axis.plot(*(best * scale), "*", color="gold", mec="black", ms=13, zorder=4)
    for path in paths:
        trajectory(axis, landscape.losses_at(path) * scale)
    axis.grid(alpha=0.25)
    axis.set(xlim=(-23 * scale[0], 12 * scale[0]), ylim=(-23 * scale[1], 12 * scale[1]))


def optimum(alpha: float) -> np.ndarray:
    """Returns the losses at the optimum of a weighted sum."""
    return landscape.losses_at(landscape.minimize_weighted(np.array([alpha])))[0]


def two_rows(
    columns: Sequence[tuple[str, np.ndarray, np.ndarray]],
    title: str,
    path: Path,
    scale: Sequence[float] = (1, 1),
) -> None:
    """Saves trajectories in parameter space (above) and objective space (below) per method."""
    figure = Figure(figsize=(2.5 * len(columns), 5.6), layout="constrained")
    axes = figure.subplots(2, len(columns), sharex="row", sharey="row", squeeze=False)
    for column, (method, above, below) in zip(axes.T, columns, strict=True):
        parameter_space(column[0], above)
        objective_space(column[1], below, optimum(0.5), scale)
        column[0].set(title=NAMES[method], xlabel="$x_1$")
        column[1].set_xlabel("$L_1$")
    axes[0, 0].set_ylabel("$x_2$")
    axes[1, 0].set_ylabel("$L_2$")
    figure.suptitle(title)
    save(figure, path)


def draw_moco(parts: Parts, path: Path) -> None:
    """Saves MoCo's figures 1 (parameters) and 2 (objectives), the first seed."""
    above, below = parts["moco_1"], parts["moco_2"]
    columns = [
        (method, paths_of(above[method], 0, [0, 1, 2]), paths_of(below[method], 0, range(5)))
        for method in ("mgda", "smg", "pcgrad", "cagrad", "moco")
        if method in above and method in below
    ]
    title = (
        "Noisy gradients (but for MGDA): dots are starts, crosses ends, grey the Pareto front\n"
        "above: three starts, rate 0.001; below: five starts, rate 0.0025"
    )
    two_rows(columns, title, path)


def aligned_records(parts: Parts) -> dict[str, Record]:
    """Returns the records that are drawn, with Aligned-MTL's in both precisions."""
    records = {name: record for name, record in parts["aligned"].items() if name in NAMES}
    single = parts.get("aligned_float32", {})
    return records | ({"float32": single["aligned_mtl"]} if "aligned_mtl" in single else {})


def draw_aligned(parts: Parts, path: Path) -> None:
    """Saves Aligned-MTL's figure 1: equal task weights."""
    records = aligned_records(parts)
    middle = len(next(iter(records.values()))["config"]["alphas"]) // 2
    columns = [(name, paths := paths_of(r, middle), paths) for name, r in records.items()]
    title = "Equal task weights: dots are starts, crosses ends, the star is the optimum"
    two_rows(columns, title, path)


def draw_weights(parts: Parts, path: Path) -> None:
    """Saves Aligned-MTL's figure 6: objective space for every task weighting."""
    records = aligned_records(parts)
    alphas = next(iter(records.values()))["config"]["alphas"]
    figure = Figure(figsize=(2.1 * len(alphas), 1.7 * len(records) + 0.6), layout="constrained")
    axes = figure.subplots(len(records), len(alphas), sharex=True, sharey=True, squeeze=False)
    for row, (method, record) in zip(axes, records.items(), strict=True):
        row[0].set_ylabel(f"{NAMES[method]}\n$L_2$")
        for i, axis in enumerate(row):
            objective_space(axis, paths_of(record, i), optimum(alphas[i]))
    for axis, alpha in zip(axes[0], alphas, strict=True):
        axis.set_title(f"${alpha:g} L_1 + {1 - alpha:g} L_2$", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("$L_1$")
    figure.suptitle("Where five starts end for five task weights (star: the weighted optimum)")
    save(figure, path)


def draw_ldc(parts: Parts, path: Path) -> None:
    """Saves LDC-MTL's figure 1."""
    records = parts["ldc"]
    shown = ("linear_scalarization", "mgda", "famo", "famo_decay_1e-5", "ldc_mtl")
    columns = [(n, paths := paths_of(records[n], 0), paths) for n in shown if n in records]
    title = "Losses of different scale: the star is where $10 L_1 = L_2$"
    two_rows(columns, title, path, scale=next(iter(records.values()))["config"]["scale"])


def draw_bias(parts: Parts, path: Path) -> None:
    """Saves MoCo's figure 3: the bias over steps and over samples, mean and standard error."""
    records = parts["bias"]
    config = next(iter(records.values()))["config"]
    figure = Figure(figsize=(3.6 * len(config["starts"]), 5.6), layout="constrained")
    axes = figure.subplots(2, len(config["starts"]), sharey=True, sharex="row", squeeze=False)
    width = 5  # of the moving average
    for method, record in records.items():
        color = COLORS[method]
        bias = np.array(record["bias"])
        steps = np.arange(bias.shape[-1]) * (config["steps"] // config["points"])
        kernel = np.ones(min(width, bias.shape[-1])) / min(width, bias.shape[-1])
        for i, column in enumerate(axes.T):
            smooth = np.array([np.convolve(x, kernel, "valid") for x in bias[:, i]])
            mean = smooth.mean(axis=0)
            error = smooth.std(axis=0) / np.sqrt(len(smooth))
            half = len(kernel) // 2
            ticks = (steps / 1000, np.array(record["samples"]) / 1000)
            for axis, tick in zip(column, ticks, strict=True):
                tick = tick[half : half + len(mean)]
                axis.semilogy(tick, mean, color=color, label=NAMES[method])
                axis.fill_between(tick, mean - error, mean + error, color=color, alpha=0.25)
                axis.grid(alpha=0.3)
    for i, start in enumerate(config["starts"]):
        axes[0, i].set(title="start ({:g}, {:g})".format(*start), xlabel="thousand steps")
        axes[1, i].set(xlabel="thousand samples of the gradients")
    for axis in axes[:, 0]:
        axis.set_ylabel("bias of the multi-gradient")
    figure.suptitle(
        f"Norm of the error of the mean of {config['sets']} multi-gradients: mean and standard "
        f"error of {config['seeds']} seeds"
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    save(figure, path)


DRAWERS = {
    "moco.png": (draw_moco, ("moco_1", "moco_2")),
    "bias.png": (draw_bias, ("bias",)),
    "aligned.png": (draw_aligned, ("aligned",)),
    "aligned_weights.png": (draw_weights, ("aligned",)),
    "ldc.png": (draw_ldc, ("ldc",)),
}


def drawn(parts: Parts) -> dict[str, Callable[[Path], None]]:
    """Returns how to draw every figure whose records are there."""
    return {
        name: partial(draw, parts)
        for name, (draw, needs) in DRAWERS.items()
        if all(part in parts for part in needs)
    }
