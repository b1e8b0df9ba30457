"""The benchmarks: their tasks, losses and metrics.

A batch is a dict of ``image`` (b, h, w, 3) and one target for each task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.scenes.networks import Output, Predictions

Batch = dict[str, Any]  # arrays
UNDEFINED = 250  # in Cityscapes' offsets
ANGLES = (11.25, 22.5, 30.0)


class Metric(NamedTuple):
    """A column of a published table."""

    task: str
    name: str
    higher: bool  # whether larger is better


class Benchmark(NamedTuple):
    """A data set and what is learnt from it."""

    name: str
    title: str
    outputs: tuple[Output, ...]
    metrics: tuple[Metric, ...]  # the columns of the papers' tables, in their order
    networks: tuple[str, ...]
    stride: int = 1  # of the targets, in pixels of the image

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the papers' order."""
        return tuple(output.task for output in self.outputs)

    def task_of_metric(self) -> list[int]:
        """Returns the number of the task of each metric."""
        return [self.tasks.index(metric.task) for metric in self.metrics]


_SEMANTIC = (Metric("semantic", "mIoU", True), Metric("semantic", "pixel accuracy", True))
_DEPTH = (Metric("depth", "abs error", False), Metric("depth", "rel error", False))
_NORMAL = (
    *(Metric("normal", f"{name} angle", False) for name in ("mean", "median")),
    *(Metric("normal", f"within {angle:g}", True) for angle in ANGLES),
)

BENCHMARKS = {
    "nyuv2": Benchmark(
        "nyuv2",
        "NYUv2",
        (
            Output("semantic", 13, "classes"),
            Output("depth", 1, "values"),
            Output("normal", 3, "directions"),
        ),
        (*_SEMANTIC, *_DEPTH, *_NORMAL),
        ("mtan", "pspnet", "segnet", "cross_stitch"),
    ),
    "cityscapes2": Benchmark(
        "cityscapes2",
        "Cityscapes, 2 tasks",
        (Output("semantic", 7, "classes"), Output("depth", 1, "values")),
        (*_SEMANTIC, *_DEPTH),
        ("mtan", "segnet", "cross_stitch"),
    ),
    "cityscapes3": Benchmark(
        "cityscapes3",
        "Cityscapes, 3 tasks",
        (
            Output("semantic", 19, "classes"),
            Output("instance", 2, "values"),
            Output("disparity", 1, "values"),
        ),
        (
            Metric("semantic", "mIoU", True),
            Metric("instance", "L1 error", False),
            Metric("disparity", "squared error", False),
        ),
        ("pspnet",),
        stride=8,
    ),
}


# --- losses -------------------------------------------------------------------------------------


def _mean_where(values: jax.Array, defined: jax.Array) -> jax.Array:
    """Returns the mean over defined entries, 0 where there is none."""
    return jnp.sum(jnp.where(defined, values, 0)) / jnp.maximum(jnp.sum(defined), 1)


def semantic_loss(log_probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean negative log-likelihood of the pixels whose label is a class."""
    defined = (labels >= 0) & (labels < log_probabilities.shape[-1])
    index = jnp.where(defined, labels, 0)
    # A product with 0 and 1: XLA's gather has a slow gradient on CPU.
    chosen = jax.nn.one_hot(index, log_probabilities.shape[-1], dtype=log_probabilities.dtype)
    return _mean_where(-jnp.sum(log_probabilities * chosen, axis=-1), defined)


def depth_loss(prediction: jax.Array, depth: jax.Array) -> jax.Array:
    """Returns the mean absolute error of the pixels whose depth is not 0."""
    return _mean_where(jnp.abs(prediction - depth), depth != 0)


def normal_loss(prediction: jax.Array, normals: jax.Array) -> jax.Array:
    """Returns 1 less the mean inner product of the pixels whose normal is not 0."""
    return 1 - _mean_where(jnp.sum(prediction * normals, axis=-1), jnp.any(normals != 0, axis=-1))


def instance_loss(prediction: jax.Array, offsets: jax.Array) -> jax.Array:
    """Returns the mean absolute error of the entries that are defined."""
    return _mean_where(jnp.abs(prediction - offsets), offsets != UNDEFINED)


def disparity_loss(prediction: jax.Array, disparity: jax.Array) -> jax.Array:
    """Returns the mean absolute error of the pixels of positive disparity."""
    return _mean_where(jnp.abs(prediction - disparity), disparity > 0)


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "semantic": semantic_loss,
    "depth": depth_loss,
    "normal": normal_loss,
    "instance": instance_loss,
    "disparity": disparity_loss,
}


# --- metrics ------------------------------------------------------------------------------------
# Of a batch, ``count`` on the device gives sums (and all angles); of a split, ``measure`` on the
# host gives the metrics of the sum over batches.


class Counted(NamedTuple):
    """What is added up over a split."""

    sums: Any  # pytree of arrays
    angles: Any  # (n,) in degrees, NaN where undefined; None without normals


def _count_semantic(prediction: jax.Array, labels: jax.Array, kept: jax.Array) -> Any:
    classes = prediction.shape[-1]
    defined = (labels >= 0) & (labels < classes) & kept[:, None, None]
    cell = jnp.where(defined, labels, 0) * classes + prediction.argmax(axis=-1)
    counts = jnp.zeros(classes**2, jnp.int32).at[cell.ravel()].add(defined.ravel())
    return counts.reshape(classes, classes)  # rows are labels


def _count_depth(prediction: jax.Array, depth: jax.Array, kept: jax.Array) -> Any:
    defined = (depth != 0) & kept[:, None, None, None]
    error = jnp.where(defined, jnp.abs(prediction - depth), 0)
    relative = error / jnp.where(defined, depth, 1)
    return jnp.sum(error), jnp.sum(relative), jnp.sum(defined)


def _count_instance(prediction: jax.Array, offsets: jax.Array, kept: jax.Array) -> Any:
    defined = (offsets != UNDEFINED) & kept[:, None, None, None]
    error = jnp.where(defined, jnp.abs(jnp.trunc(prediction) - jnp.trunc(offsets)), 0)
    return jnp.sum(error), jnp.sum(defined)


def _count_disparity(prediction: jax.Array, disparity: jax.Array, kept: jax.Array) -> Any:
    defined = (disparity != 0) & kept[:, None, None, None]
    error = jnp.where(defined, (prediction - disparity) ** 2, 0)
    return jnp.sum(error), jnp.sum(defined)


def angles_between(prediction: jax.Array, normals: jax.Array, kept: jax.Array) -> jax.Array:
    """Returns angles (n,) in degrees, NaN where the normal is 0."""
    cosines = jnp.clip(jnp.sum(prediction * normals, axis=-1), -1, 1)
    defined = jnp.any(normals != 0, axis=-1) & kept[:, None, None]
    return jnp.where(defined, jnp.rad2deg(jnp.arccos(cosines)), jnp.nan).ravel()


_COUNTS = {
    "semantic": _count_semantic,
    "depth": _count_depth,
    "instance": _count_instance,
    "disparity": _count_disparity,
}


def count(predictions: Predictions, batch: Batch, kept: jax.Array) -> Counted:
    """Returns what a batch adds to the metrics.

    Args:
      predictions: By task.
      batch: Targets by task.
      kept: (b,) bool: examples that count; the others fill up a last batch.
    """
    sums = {
        task: _COUNTS[task](prediction, batch[task], kept)
        for task, prediction in predictions.items()
        if task != "normal"
    }
    angles = None
    if "normal" in predictions:
        angles = angles_between(predictions["normal"], batch["normal"], kept)
    return Counted(sums, angles)


def _iou_and_accuracy(confusion: np.ndarray) -> dict[str, float]:
    """Returns both in percent; a class that is neither labelled nor predicted is left out."""
    right = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - right
    seen = union > 0
    return {
        "mIoU": 100 * float(np.mean(right[seen] / union[seen])),
        "pixel accuracy": 100 * float(right.sum() / confusion.sum()),
    }


def measure(counted: Sequence[Counted]) -> dict[str, dict[str, float]]:
    """Returns metrics by task and name from what the batches of a split have added.

    Means are over all defined pixels of the split, and one confusion matrix holds all of them.
    """
    total: dict[str, Any] = {}
    for part in counted:
        for task, sums in jax.tree.map(lambda x: np.asarray(x, np.float64), part.sums).items():
            total[task] = sums if task not in total else jax.tree.map(np.add, total[task], sums)
    found: dict[str, dict[str, float]] = {}
    for task, sums in total.items():
        if task == "semantic":
            found[task] = _iou_and_accuracy(sums)
        elif task == "depth":
            found[task] = {"abs error": sums[0] / sums[2], "rel error": sums[1] / sums[2]}
        else:
            name = {"instance": "L1 error", "disparity": "squared error"}[task]
            found[task] = {name: sums[0] / sums[1]}
    if any(part.angles is not None for part in counted):
        angles = np.concatenate([np.asarray(part.angles) for part in counted])
        angles = angles[~np.isnan(angles)].astype(np.float64)
        found["normal"] = {"mean angle": angles.mean(), "median angle": np.median(angles)}
        found["normal"] |= {f"within {a:g}": 100 * np.mean(angles < a) for a in ANGLES}
    return {task: {k: float(v) for k, v in values.items()} for task, values in found.items()}


def table_row(benchmark: Benchmark, found: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Returns the metrics in the order of the benchmark's columns; NaN where a task is missing."""
    return [found.get(m.task, {}).get(m.name, float("nan")) for m in benchmark.metrics]
