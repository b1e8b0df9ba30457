"""Scenes as arrays: MTAN's folders, Cityscapes' own tree, made-up scenes; augmentation.

A *source* gives raw batches on the host, ``prepare`` makes floats of them on the device, inside
``jit``, and augments them there. Cityscapes with three tasks is augmented at full resolution, on
the host.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import track

from experiments.images import read_picture
from experiments.scenes.benchmarks import UNDEFINED, Batch, Benchmark

Raw = dict[str, np.ndarray]
SCALES = (1.0, 1.2, 1.5)


class Source(Protocol):
    """Scenes of one split."""

    @property
    def size(self) -> int:
        """Their number."""
        ...

    def read(self, index: np.ndarray, rng: np.random.Generator | None = None) -> Raw:
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
            f"expected MTAN's folder of {benchmark.title}, got none; pass --data-dir DIR (python "
            "-m experiments.scenes.convert makes one of an archive of NYUv2), or --smoke"
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
        raise ValueError(
            f"expected an array in {path}, got {error}; write it by numpy.save"
        ) from None
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


# --- Cityscapes' own tree -----------------------------------------------------------------------

# labelIds of the 19 classes, in the order of their training numbers.
CLASSES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
STUFF = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23)  # without instances
MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # taken from BGR in this order
DISPARITY = np.float32(2729.0680031169923)
DEGREES = 10.0
STRIDE = 8  # of the targets


class _Files(NamedTuple):
    """The pictures of one scene."""

    image: Path
    labels: Path
    instances: Path
    disparity: Path


@dataclass
class CityscapesTree:
    """Scenes that are read, and augmented at full resolution, when they are needed."""

    files: list[_Files]
    image_size: tuple[int, int]  # of the network's input

    @property
    def size(self) -> int:
        """Their number."""
        return len(self.files)

    def read(self, index: np.ndarray, rng: np.random.Generator | None = None) -> Raw:
        """Returns a batch of floats; with ``rng`` each scene is rotated and perhaps mirrored."""
        scenes = [self._scene(self.files[i], rng) for i in index]
        return {name: np.stack([scene[name] for scene in scenes]) for name in scenes[0]}

    def _scene(self, files: _Files, rng: np.random.Generator | None) -> Raw:
        from PIL import Image

        pictures = _open(files)
        if rng is not None:
            angle, mirrored = rng.uniform(-DEGREES, DEGREES), rng.random() < 0.5
            for name, picture in pictures.items():
                kind = Image.Resampling.BILINEAR if name == "image" else Image.Resampling.NEAREST
                picture = picture.rotate(angle, kind)  # what comes in is 0: black, void, undefined
                if mirrored:
                    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                pictures[name] = picture
        height, width = self.image_size
        image = pictures["image"].resize((width, height), Image.Resampling.BILINEAR)
        labels = np.asarray(pictures["labels"])
        offsets = instance_offsets(labels, np.asarray(pictures["instances"]))
        disparity = np.asarray(pictures["disparity"], np.float32) / DISPARITY
        shrink = partial(_shrunk, size=(height // STRIDE, width // STRIDE))
        return {
            "image": (np.asarray(image, np.float32)[..., ::-1] - MEAN) / 255,
            "semantic": training_numbers(shrink(labels)),
            "instance": shrink(offsets),
            "disparity": shrink(disparity)[..., None],
        }


def training_numbers(labels: np.ndarray) -> np.ndarray:
    """Returns labelIds as classes 0 to 18, 250 for all others."""
    table = np.full(256, UNDEFINED, np.int16)
    table[list(CLASSES)] = np.arange(len(CLASSES))
    return table[labels]


def instance_offsets(labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """Returns each pixel's offset (h, w, 2), y and x, from the center of its instance.

    Args:
      labels: (h, w) labelIds.
      instances: (h, w) instanceIds.

    Returns:
      Pixels of full resolution; 250 where there is no instance.
    """
    offsets = np.full((*labels.shape, 2), UNDEFINED, np.float32)
    there = np.isin(labels, [c for c in CLASSES if c not in STUFF])
    y, x = np.nonzero(there)
    _, number = np.unique(instances[y, x], return_inverse=True)
    count = np.maximum(np.bincount(number), 1)
    for axis, place in enumerate((y, x)):
        center = np.bincount(number, place) / count
        offsets[y, x, axis] = place - center[number]
    return offsets


def _shrunk(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the pixels (h, w, ...) nearest to the centers of a coarser grid."""
    y, x = (
        ((np.arange(small) + 0.5) * (large / small)).astype(int)
        for small, large in zip(size, array.shape[:2], strict=True)
    )
    return array[y[:, None], x[None]]


def _open(files: _Files) -> dict[str, Any]:
    """Returns the pictures in modes that can be rotated.

    Raises:
      ValueError: One cannot be read, is of another kind, or of another size than the image.
    """
    kinds = {
        "image": (("RGB",), "RGB", "8-bit color"),
        "labels": (("L",), "L", "8-bit"),
        "instances": (("I;16", "I"), "I", "16-bit"),
        "disparity": (("I;16", "I"), "I", "16-bit"),
    }
    pictures: dict[str, Any] = {}
    for (name, (modes, wanted, text)), path in zip(kinds.items(), files, strict=True):
        picture = read_picture(path, advice="unpack its archive anew")
        if picture.mode not in modes:
            raise ValueError(
                f"expected {path} to be a {text} picture, got mode {picture.mode}; use the files "
                "of Cityscapes as they are"
            )
        pictures[name] = picture.convert(wanted)
        size = pictures["image"].size
        if picture.size != size:
            raise ValueError(
                f"expected {path} of the size of its image, {size[1]} x {size[0]}, got "
                f"{picture.size[1]} x {picture.size[0]}; use the files of Cityscapes as they are"
            )
    return pictures


def load_tree(
    benchmark: Benchmark, data_dir: str | Path | None, split: str, size: tuple[int, int]
) -> CityscapesTree:
    """Returns a split of Cityscapes' tree, for three tasks.

    The folder has ``leftImg8bit/<split>/<city>/<scene>_leftImg8bit.png``, and likewise
    ``gtFine/.../<scene>_gtFine_{labelIds,instanceIds}.png`` and ``disparity/.../
    <scene>_disparity.png``.

    Args:
      benchmark: ``cityscapes3``.
      data_dir: The folder.
      split: ``"train"`` or ``"val"``.
      size: Height and width to which images are resized; targets have an eighth of it.

    Raises:
      FileNotFoundError: A folder or a file is missing.
    """
    if data_dir is None:
        raise FileNotFoundError(
            f"expected the folder of {benchmark.title}, with leftImg8bit, gtFine and disparity, "
            "got none; pass --data-dir DIR, or --smoke"
        )
    root = Path(data_dir)
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise FileNotFoundError(
            f"expected {root}/leftImg8bit/{split}/<city>/<scene>_leftImg8bit.png, got none; unpack "
            "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip and disparity_trainvaltest.zip "
            "into one folder"
        )
    files = []
    for image in images:
        scene, city = image.name.removesuffix("_leftImg8bit.png"), image.parent.name
        fine = root / "gtFine" / split / city
        found = _Files(
            image,
            fine / f"{scene}_gtFine_labelIds.png",
            fine / f"{scene}_gtFine_instanceIds.png",
            root / "disparity" / split / city / f"{scene}_disparity.png",
        )
        for path in found:
            if not path.exists():
                raise FileNotFoundError(
                    f"expected {path} for {image.name}, got no such file; unpack the archive of "
                    f"{path.relative_to(root).parts[0]} into {root}"
                )
        files.append(found)
    return CityscapesTree(files, size)


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
      key: Draws the augmentation; none if None, and none of targets coarser than the image, which
        are augmented on the host.
    """
    batch = _to_floats(raw)
    coarse = any(x.shape[:3] != batch["image"].shape[:3] for x in batch.values())
    return batch if key is None or coarse else augment(batch, key)


def augment(batch: Batch, key: jax.Array) -> Batch:
    """Returns each scene cropped, scaled back, and perhaps mirrored.

    A scale s of 1, 1.2 and 1.5 is drawn, a window of 1/s of height and width, and a mirroring with
    probability 1/2. Images and normals are interpolated linearly between the window's corner
    pixels, labels and depths taken from the nearest pixel; depth is divided by s, and mirrored
    normals have their x negated.
    """
    b, height, width, _ = batch["image"].shape
    # One draw for all: each call of a random function adds as much to compile as a layer.
    draws = jax.random.uniform(key, (4, b))
    choice = _below(draws[0], len(SCALES))
    mirrored = draws[3] < 0.5
    rows = _window(draws[1], choice, height)
    columns = _window(draws[2], choice, width)
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


def _below(draws: jax.Array, number: int | jax.Array) -> jax.Array:
    """Returns integers from 0 to number - 1 from draws in [0, 1)."""
    return jnp.minimum((draws * number).astype(jnp.int32), number - 1)


def _window(draws: jax.Array, choice: jax.Array, size: int) -> _Window:
    """Returns a window along one axis for each scene, enlarged to the whole axis."""
    lengths = np.array([int(size / scale) for scale in SCALES])
    length = jnp.asarray(lengths)[choice]  # (b,)
    offset = _below(draws, size - length + 1)
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
        targets: Raw = {
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
