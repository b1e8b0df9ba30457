"""Scenes as arrays: MTAN's folders, Cityscapes' own tree, made-up scenes; augmentation.

A *source* gives raw batches on the host, ``prepare`` makes floats of them on the device, inside
``jit``, and augments them there. Cityscapes with three tasks is augmented at full resolution, on
the host.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import track

from experiments.scenes.benchmarks import UNDEFINED, Batch, Benchmark

Raw = dict[str, np.ndarray]
SCALES = (1.0, 1.2, 1.5)


class Source(Protocol):
    """Scenes of one split."""

    size: int

    def read(self, index: np.ndarray, rng: np.random.Generator | None) -> Raw:
        """Returns a raw batch; with ``rng``, augmented where that is done on the host."""
        ...


@dataclass
class Arrays:
    """Scenes in memory."""

    arrays: Raw  # with a leading axis of scenes

    @property
    def size(self) -> int:
        """Their number."""
        return len(self.arrays["image"])

    def read(self, index: np.ndarray, rng: np.random.Generator | None = None) -> Raw:
        """Returns a raw batch."""
        del rng
        return {name: array[index] for name, array in self.arrays.items()}


def read_ahead(source: Source, order: np.ndarray, rng: np.random.Generator | None) -> Iterator[Raw]:
    """Yields the batches of an order (steps, b), the next one being read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(source.read, order[0], rng)
        for index in [*order[1:], None]:
            batch = ahead.result()
            if index is not None:
                ahead = pool.submit(source.read, index, rng)
            yield batch


# --- MTAN's folders -----------------------------------------------------------------------------

FOLDERS = {"nyuv2": "label", "cityscapes2": "label_7"}  # of the labels
_CHANNELS = {"image": 3, "depth": 1, "normal": 3}


def load_folder(
    benchmark: Benchmark, data_dir: str | Path | None, split: str, size: tuple[int, int]
) -> Arrays:
    """Returns a split from MTAN's files, ``DIR/{train,val}/<kind>/<i>.npy``.

    Kinds are ``image``, (h, w, 3) in [0, 1]; ``label`` (NYUv2) or ``label_7`` (Cityscapes), (h, w)
    with -1 for void; ``depth``, (h, w, 1), 0 where undefined; ``normal`` (NYUv2), (h, w, 3), zeros
    where undefined. In memory, images are rounded to steps of 1/255, and normals to half precision
    (0.03 degrees).

    Args:
      benchmark: ``nyuv2`` or ``cityscapes2``.
      data_dir: The folder.
      split: ``"train"`` or ``"val"``.
      size: Height and width that the files are expected to have.

    Raises:
      FileNotFoundError: A folder or a file is missing.
      ValueError: An array has a wrong size, type or range.
    """
    if data_dir is None:
        raise FileNotFoundError(
            f"expected MTAN's folder of {benchmark.title}, got none; pass --data-dir DIR (python -m "
            "experiments.scenes.convert makes one of an archive of NYUv2), or --smoke"
        )
    root = Path(data_dir) / split
    kinds = {"image": "image"}
    for task in benchmark.tasks:
        kinds[task] = FOLDERS[benchmark.name] if task == "semantic" else task
    numbers = {}
    for folder in kinds.values():
        names = sorted((root / folder).glob("*.npy")) if (root / folder).is_dir() else []
        if not names:
            raise FileNotFoundError(
                f"expected {root / folder}/0.npy and so on, got none; {benchmark.title} needs the "
                f"folders {', '.join(kinds.values())} under train and val"
            )
        numbers[folder] = {path.stem for path in names}
    first = numbers["image"]
    for folder, found in numbers.items():
        if found != first:
            odd = sorted(found ^ first)[0]
            raise FileNotFoundError(
                f"expected the same files in {root / 'image'} and {root / folder}, got {odd}.npy "
                "in only one of them; complete the folder"
            )
    order = sorted(first, key=lambda name: (len(name), name))
    arrays = {}
    for task, folder in kinds.items():
        scenes = [
            _checked(task, root / folder / f"{name}.npy", benchmark, size)
            for name in track(order, description=f"reading {split}/{folder}", transient=True)
        ]
        arrays[task] = np.stack(scenes)
    return Arrays(arrays)


def _checked(task: str, path: Path, benchmark: Benchmark, size: tuple[int, int]) -> np.ndarray:
    """Returns one array in the type in which it is kept."""
    try:
        array = np.load(path)
    except ValueError as error:
        raise ValueError(f"expected an array in {path}, got {error}; write it by numpy.save") from None
    channels = _CHANNELS.get(task)
    expected = size if channels is None else (*size, channels)
    if array.shape != expected:
        raise ValueError(
            f"expected {path} of shape {expected}, got {array.shape}; pass --size "
            f"{'x'.join(map(str, array.shape[:2]))} if that is the height and width of all files, "
            "channels come last"
        )
    if array.dtype.kind not in "fiu":
        raise ValueError(f"expected numbers in {path}, got dtype {array.dtype}; write it anew")
    if not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers in {path}, got others; undefined pixels are 0")
    if task == "semantic":
        classes = benchmark.outputs[0].channels
        if (array != np.round(array)).any() or array.min() < -1 or array.max() >= classes:
            raise ValueError(
                f"expected labels -1 (void) to {classes - 1} in {path}, got {array.min():g} to "
                f"{array.max():g}; map other numbers to these"
            )
        return array.astype(np.int8)
    if task == "image":
        if array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"expected an image between 0 and 1 in {path}, got {array.min():g} to "
                f"{array.max():g}; divide by 255"
            )
        return np.round(array * 255).astype(np.uint8)
    if task == "depth":
        if array.min() < 0:
            raise ValueError(
                f"expected depths of at least 0 in {path}, got {array.min():g}; undefined is 0"
            )
        return array.astype(np.float32)
    if np.abs(array).max() > 1.01:
        raise ValueError(
            f"expected normals of length 1 (0 if undefined) in {path}, got entries up to "
            f"{np.abs(array).max():g}; divide by their length"
        )
    return array.astype(np.float16)


# --- on the device ------------------------------------------------------------------------------


def _to_floats(raw: Batch) -> Batch:
    def one(name: str, x: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return x.astype(jnp.float32) / 255
        return x.astype(jnp.int32 if name == "semantic" else jnp.float32)

    return {name: one(name, x) for name, x in raw.items()}


def prepare(raw: Batch, key: jax.Array | None = None) -> Batch:
    """Returns a batch as the network and the losses take it.

    Args:
      raw: Of a source.
      key: Draws the augmentation; none if None.
    """
    batch = _to_floats(raw)
    return batch if key is None else augment(batch, key)


def augment(batch: Batch, key: jax.Array) -> Batch:
    """Returns each scene cropped, scaled back, and perhaps mirrored.

    A scale s of 1, 1.2 and 1.5 is drawn, a window of 1/s of height and width, and a mirroring with
    probability 1/2. Images and normals are interpolated linearly between the window's corner
    pixels, labels and depths taken from the nearest pixel; depth is divided by s, and mirrored
    normals have their x negated.
    """
    b, height, width, _ = batch["image"].shape
    keys = jax.random.split(key, 4)
    choice = jax.random.randint(keys[0], (b,), 0, len(SCALES))
    mirrored = jax.random.bernoulli(keys[3], shape=(b,))
    rows = _window(keys[1], choice, height)
    columns = _window(keys[2], choice, width)
    scales = jnp.asarray(SCALES)[choice][:, None, None, None]

    def linear(x: jax.Array) -> jax.Array:
        high = lax.Precision.HIGHEST
        x = jnp.einsum("bih,bhwc->biwc", rows.weights, x, precision=high)
        return jnp.einsum("bjw,biwc->bijc", columns.weights, x, precision=high)

    def nearest(x: jax.Array) -> jax.Array:
        x = jax.vmap(lambda x, i: jnp.take(x, i, axis=0))(x, rows.nearest)
        return jax.vmap(lambda x, i: jnp.take(x, i, axis=1))(x, columns.nearest)

    def flip(x: jax.Array) -> jax.Array:
        return jnp.where(mirrored.reshape(-1, *(1,) * (x.ndim - 1)), jnp.flip(x, axis=2), x)

    made = {}
    for name, x in batch.items():
        x = flip(linear(x) if name in ("image", "normal") else nearest(x))
        if name == "depth":
            x = x / scales
        if name == "normal":
            sign = jnp.where(mirrored, -1.0, 1.0)[:, None, None]
            x = x.at[..., 0].multiply(sign)
        made[name] = x
    return made


@dataclass
class _Window:
    weights: jax.Array  # (b, size, size) of linear interpolation
    nearest: jax.Array  # (b, size) int32


def _window(key: jax.Array, choice: jax.Array, size: int) -> _Window:
    """Draws a window along one axis for each scene, enlarged to the whole axis."""
    lengths = np.array([int(size / scale) for scale in SCALES])
    length = jnp.asarray(lengths)[choice]  # (b,)
    # randint with bounds per scene: 0 to size - length.
    offset = jax.random.randint(key, choice.shape, 0, size - length + 1)
    i = np.arange(size)
    near = jnp.asarray([np.floor(i * (n / size)) for n in lengths], jnp.int32)[choice]
    places = jnp.asarray([i * ((n - 1) / (size - 1)) for n in lengths], jnp.float32)
    position = places[choice] + offset[:, None]  # (b, size)
    distance = jnp.abs(position[..., None] - jnp.arange(size))
    return _Window(jnp.maximum(1 - distance, 0), near + offset[:, None])


# --- made-up scenes -----------------------------------------------------------------------------


def make_up(benchmark: Benchmark, number: int, size: tuple[int, int], seed: int = 0) -> Arrays:
    """Returns scenes of shapes before a wall, with class, depth, normal and instance of each.

    For trials and tests: a network can learn them, and they show nothing about real scenes.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    classes = benchmark.outputs[0].channels
    scenes: list[Raw] = []
    for _ in range(number):
        label = np.zeros(size, np.int8)
        depth = np.full(size, 4.0, np.float32)
        normal = np.tile(np.array([0, 0, -1], np.float16), (*size, 1))
        offsets = np.full((*size, 2), UNDEFINED, np.float32)
        for _ in range(rng.integers(2, 5)):
            kind = int(rng.integers(1, classes))
            center = rng.uniform(0.2, 0.8, 2) * size
            radii = rng.uniform(0.1, 0.3, 2) * size
            inside = ((y - center[0]) / radii[0]) ** 2 + ((x - center[1]) / radii[1]) ** 2 < 1
            if not inside.any():
                continue
            direction = np.array([*rng.normal(0, 0.5, 2), -1])
            label[inside] = kind
            depth[inside] = rng.uniform(1, 3)
            normal[inside] = direction / np.linalg.norm(direction)
            offsets[inside] = np.stack([y - y[inside].mean(), x - x[inside].mean()], -1)[inside]
        label[:1], depth[:1], normal[:1] = -1, 0, 0  # a frame without targets
        colors = np.random.default_rng(1).uniform(0.2, 1, (classes, 3))[label]
        shading = 0.5 + 0.5 * np.abs(normal[..., 2:]) / np.maximum(depth[..., None], 1)
        noise = rng.normal(0, 0.02, (*size, 3))
        image = np.clip(255 * (colors * shading + noise), 0, 255).astype(np.uint8)
        targets = {
            "semantic": label,
            "depth": depth[..., None],
            "normal": normal,
            "instance": offsets,
            "disparity": np.where(depth > 0, 1 / np.maximum(depth, 1), 0)[..., None],
        }
        s = benchmark.stride
        scene = {"image": image} | {
            task: targets[task][s // 2 :: s, s // 2 :: s] for task in benchmark.tasks
        }
        scenes.append(scene)
    return Arrays({name: np.stack([s[name] for s in scenes]) for name in scenes[0]})
