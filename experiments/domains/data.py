"""Images of domains by LibMTL's lists, and made-up ones in that layout."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.images import read_picture

SPLITS = ("train", "val", "test")
# Of ImageNet, for colors in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Benchmark(NamedTuple):
    """A set of domains."""

    title: str
    lists: str  # LibMTL's folder of its lists
    domains: tuple[str, ...]  # sorted, as the library orders named losses
    classes: int


BENCHMARKS = {
    "office31": Benchmark("Office-31", "office-31", ("amazon", "dslr", "webcam"), 31),
    "office_home": Benchmark(
        "Office-Home", "office-home", ("Art", "Clipart", "Product", "Real_World"), 65
    ),
}


class Batch(NamedTuple):
    """Images of one domain."""

    images: np.ndarray  # (b, size, size, 3) uint8
    labels: np.ndarray  # (b,) int32


@dataclass
class Cache:
    """Decoded images, up to a number of bytes; what does not fit is decoded each time."""

    limit: int
    kept: dict[Path, np.ndarray] = field(default_factory=dict)
    size: int = 0
    lock: Lock = field(default_factory=Lock)

    def read(self, path: Path, size: int) -> np.ndarray:
        """Returns an image (size, size, 3) uint8."""
        if path in self.kept:
            return self.kept[path]
        image = read_image(path, size)
        with self.lock:
            if path not in self.kept and self.size + image.nbytes <= self.limit:
                self.size += image.nbytes
                self.kept[path] = image
        return image


def read_image(path: Path, size: int) -> np.ndarray:
    """Returns an image in colors, resized to a square without regard to its shape.

    Raises:
      ValueError: The file is no picture of 8 bits, or only part of one.
    """
    picture = read_picture(path)
    if picture.mode[0] in "IF":  # as colors all of them would be white
        raise ValueError(
            f"expected a picture of 8 bits in {path}, got mode {picture.mode}; use the files of "
            "the data set as they are"
        )
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


@dataclass
class Domain:
    """A domain's images of one split."""

    files: Sequence[Path]
    labels: np.ndarray  # (n,) int32
    size: int  # height and width
    cache: Cache

    def read(self, index: np.ndarray, pool: ThreadPoolExecutor) -> Batch:
        """Returns some images, decoded in several threads."""
        found = pool.map(lambda i: self.cache.read(self.files[i], self.size), index)
        return Batch(np.stack(list(found)), self.labels[index])


Split = Mapping[str, Domain]  # by the domain's name


def read_list(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """Returns the paths and the labels of a list, of lines such as "Art/Bike/00001.jpg 12".

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A line has another form, a label is out of range, or there is no line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a list of images in {path}, got no such file; copy the folder data_txt of "
            "LibMTL's examples/office there, or pass --lists with where it is"
        )
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in {path}, got {error}; fetch the list anew") from None
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.lstrip("-").isdecimal():
            raise ValueError(
                f"expected a path and a label in line {number} of {path}, got {line!r}; write for "
                'instance "amazon/images/bike/frame_0001.jpg 3"'
            )
        if not 0 <= int(label) < classes:
            raise ValueError(
                f"expected labels 0 to {classes - 1} in {path}, got {label} in line {number}; use "
                "the lists of this data set"
            )
        paths.append(name)
        labels.append(int(label))
    if not paths:
        raise ValueError(f"expected a line per image in {path}, got none; fetch the list anew")
    return paths, labels


def load(
    benchmark: Benchmark,
    data_dir: str | Path | None,
    lists: str | Path | None,
    size: int,
    memory: int,
) -> dict[str, Split]:
    """Returns the splits of a benchmark.

    Args:
      benchmark: Of ``BENCHMARKS``.
      data_dir: The folder from which the lists' paths lead to the images.
      lists: The folder that has LibMTL's ``office-31`` and ``office-home``; by default
        ``data_txt`` in the former.
      size: Height and width to which images are resized.
      memory: Bytes of decoded images to keep.

    Returns:
      By split, ``"train"``, ``"val"`` and ``"test"``, the domains by name.

    Raises:
      FileNotFoundError: A list or an image is missing.
      ValueError: A list is malformed, or an image is in two of them.
    """
    if data_dir is None:
        raise FileNotFoundError(
            f"expected the folder of {benchmark.title}, with "
            f"{', '.join(benchmark.domains)} and data_txt, got none; pass --data-dir DIR, or "
            "--smoke"
        )
    root, cache = Path(data_dir), Cache(memory)
    folder = (root / "data_txt" if lists is None else Path(lists)) / benchmark.lists
    splits: dict[str, Split] = {}
    seen: dict[str, Path] = {}
    for split in SPLITS:
        domains = {}
        for domain in benchmark.domains:
            path = folder / f"{domain}_{split}.txt"
            names, labels = read_list(path, benchmark.classes)
            for name in names:
                if name in seen:
                    raise ValueError(
                        f"expected every image once, got {name} in {seen[name]} and {path}; what "
                        "is trained on must not be tested on: use LibMTL's lists"
                    )
                seen[name] = path
            files = [root / name for name in names]
            missing = [file for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"expected {missing[0]}, which {path} names, got no such file "
                    f"({len(missing)} of {len(files)} are missing); unpack {benchmark.title} into "
                    f"{root}, with the folders {', '.join(benchmark.domains)}"
                )
            domains[domain] = Domain(files, np.array(labels, np.int32), size, cache)
        splits[split] = domains
    return splits


# --- batches --------------------------------------------------------------------------------------


def check_batches(domains: Split, batch_size: int) -> int:
    """Returns the steps of an epoch: the batches of the largest domain.

    Raises:
      ValueError: A domain has less than one batch.
    """
    for name, domain in domains.items():
        if len(domain.labels) < batch_size:
            raise ValueError(
                f"expected at least {batch_size} images for a batch of {name}, got "
                f"{len(domain.labels)}; pass a smaller --batch-size"
            )
    return max(len(domain.labels) // batch_size for domain in domains.values())


def order_of(number: int, batch_size: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
    """Returns the images (b,) of one step in an endless run of shuffled passes over a domain.

    What fills no batch is left out of a pass. As a function of the step it needs no state: a
    training goes on with the same batches after an interruption.
    """
    run, place = divmod(step, number // batch_size)
    order = np.random.default_rng((*seed, run)).permutation(number)
    return order[place * batch_size :][:batch_size]


def read_ahead(
    domains: Split, batch_size: int, steps: Sequence[int], seed: int
) -> Iterator[dict[str, Batch]]:
    """Yields a batch of every domain for each step; the next ones are being read meanwhile."""
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor() as pool:

        def read(step: int) -> dict[str, Batch]:
            made = {}
            for i, (name, domain) in enumerate(domains.items()):
                order = order_of(len(domain.labels), batch_size, step, (seed, i))
                made[name] = domain.read(order, pool)
            return made

        waiting = ahead.submit(read, steps[0])
        for step in [*steps[1:], None]:
            batch = waiting.result()
            if step is not None:
                waiting = ahead.submit(read, step)
            yield batch


def in_order(domain: Domain, batch_size: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields all images once, with which of a batch (b,) count: the last one is filled up."""
    number = len(domain.labels)
    padded = np.arange(-(-number // batch_size) * batch_size).reshape(-1, batch_size)
    with ThreadPoolExecutor() as pool:
        for index in padded:
            yield domain.read(np.minimum(index, number - 1), pool), index < number


def prepare(images: jax.typing.ArrayLike) -> jax.Array:
    """Returns images (b, h, w, 3) uint8 as the network takes them."""
    return (jnp.asarray(images, jnp.float32) / 255 - jnp.asarray(MEAN)) / jnp.asarray(STD)


# --- made-up images -------------------------------------------------------------------------------


def make_up(benchmark: Benchmark, root: Path, classes: int, copies: int = 5) -> None:
    """Writes images of colored bars and lists of them in the layout of the benchmark.

    For trials and tests: a network can learn them, and they show nothing about real images. The
    class is the color, the domain the direction of the bars. Domains differ in size.

    Args:
      benchmark: Whose layout.
      root: The folder to write into.
      classes: How many occur.
      copies: Of each class in a fifth of the first domain.
    """
    rng = np.random.default_rng(0)
    colors = np.random.default_rng(1).integers(40, 256, (classes, 3))
    y, x = np.mgrid[:40, :32]
    for i, domain in enumerate(benchmark.domains):
        bars = ((y if i % 2 else x) // (4 + 2 * i)) % 2
        number = 0
        for split, parts in zip(SPLITS, (3, 1, 1), strict=True):
            lines = []
            for _ in range(max(copies - i, 1) * parts):
                for label in range(classes):
                    noise = rng.normal(0, 12, (40, 32, 3))
                    picture = np.clip(colors[label] * (0.4 + 0.6 * bars[..., None]) + noise, 0, 255)
                    name = f"{domain}/class_{label}/{number:05}.jpg"
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture.astype(np.uint8)).save(root / name)
                    lines.append(f"{name} {label}\n")
                    number += 1
            path = root / "data_txt" / benchmark.lists / f"{domain}_{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
