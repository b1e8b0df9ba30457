"""CelebA as arrays: its own tree of files, TFDS, and made-up faces."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from experiments.images import cache_dir, read_picture

_NAMES = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose
    Black_Hair Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee
    Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard
    Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair
    Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young
    """
ATTRIBUTES = tuple(_NAMES.split())
PARTITIONS = ("train", "validation", "test")  # 0, 1, 2 in the official list
SIZE = 64  # height and width to which images are resized
ALIGNED = (178, 218)  # width and height of the aligned and cropped images
LABELS, PARTITION, IMAGES = (
    Path("Anno/list_attr_celeba.txt"),
    Path("Eval/list_eval_partition.txt"),
    Path("Img/img_align_celeba"),
)


class Faces(NamedTuple):
    """Images with 40 labels each."""

    images: np.ndarray  # (n, size, size, 3) uint8; may lie in a file
    labels: np.ndarray  # (n, 40) bool


class Split(NamedTuple):
    """The official partition."""

    train: Faces
    validation: Faces
    test: Faces


# --- the publishers' tree -------------------------------------------------------------------------


def load_celeba(data_dir: str | Path | None) -> Split:
    """Returns CelebA from a folder, or by TFDS.

    The folder has the publishers' ``Anno/list_attr_celeba.txt``, ``Eval/list_eval_partition.txt``
    and ``Img/img_align_celeba/*.jpg``, or TFDS's prepared ``celeb_a``. Images are resized once, to
    64 x 64, and kept in a file in ``cache_dir`` (2.5 GB for all 202,599) that is mapped to memory.

    Args:
      data_dir: The folder; None for TFDS's own, where it downloads.

    Raises:
      FileNotFoundError: A folder or a file is missing.
      ValueError: A list or an image is not what the publishers' is.
    """
    root = None if data_dir is None else Path(data_dir)
    if root is None or (root / "celeb_a").is_dir():
        return _load_tfds(root)
    for path in (LABELS, PARTITION, IMAGES):
        if not ((root / path).is_dir() if path == IMAGES else (root / path).is_file()):
            raise FileNotFoundError(
                f"expected {root / path}, got no such {'folder' if path == IMAGES else 'file'}; "
                f"--data-dir is a folder with {LABELS}, {PARTITION} and {IMAGES}/*.jpg, unpacked, "
                "or with TFDS's celeb_a"
            )
    names, labels = read_labels(root / LABELS)
    parts = read_partition(root / PARTITION, names)
    there = set(os.listdir(root / IMAGES))
    for name in names:
        if name not in there:
            raise FileNotFoundError(
                f"expected {root / IMAGES / name}, which {LABELS} lists, got no such file; unpack "
                "img_align_celeba.zip whole"
            )
    images = _resized(
        f"{root.resolve()} {' '.join(names)}",
        len(names),
        lambda: ((root / IMAGES / name).read_bytes() for name in names),
        lambda i: str(root / IMAGES / names[i]),
    )
    return Split(*(_part(images, labels, parts == k) for k in range(len(PARTITIONS))))


def _part(images: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> Faces:
    """Returns a partition; as a view of the file where its images lie together, as they do."""
    rows = np.nonzero(kept)[0]
    together = rows[-1] - rows[0] == len(rows) - 1
    return Faces(images[rows[0] : rows[-1] + 1] if together else images[rows], labels[rows])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in {path}, got {error}; take it as published") from error


def read_labels(path: Path) -> tuple[list[str], np.ndarray]:
    """Returns the names of the images and their labels (n, 40), in the order of ``ATTRIBUTES``.

    The file has the number of images, the names of the attributes, and a line for each image with
    its name and -1 or 1 for each attribute.

    Raises:
      ValueError: It has not.
    """
    lines = _lines(path)
    header = lines[1].split() if len(lines) > 1 else []
    if sorted(header) != sorted(ATTRIBUTES):
        odd = sorted(set(header) ^ set(ATTRIBUTES))[:3]
        raise ValueError(
            f"expected the 40 attributes of CelebA in the second line of {path}, got "
            f"{len(header)} ({', '.join(odd) or 'repeated ones'} only there or only here); take "
            "the file as published"
        )
    rows = [line.split() for line in lines[2:] if line.strip()]
    if lines[0].strip() != str(len(rows)) or not rows:
        raise ValueError(
            f"expected as many images as the first line of {path} says, {lines[0].strip()}, got "
            f"{len(rows)}; the file is not whole"
        )
    for number, row in enumerate(rows, start=3):
        if len(row) != 1 + len(ATTRIBUTES):
            raise ValueError(
                f"expected a name and {len(ATTRIBUTES)} labels in line {number} of {path}, got "
                f"{len(row)} words; take the file as published"
            )
        if not {"-1", "1"}.issuperset(row[1:]):
            odd = sorted(set(row[1:]) - {"-1", "1"})[:3]
            raise ValueError(
                f"expected labels -1 and 1 in line {number} of {path}, got {', '.join(odd)}; where "
                "0 stands for no, write -1"
            )
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"expected every image once in {path}, got repeated ones; drop these")
    order = [header.index(attribute) for attribute in ATTRIBUTES]
    labels = np.array([[cell == "1" for cell in row[1:]] for row in rows])
    return names, labels[:, order]


def read_partition(path: Path, names: Sequence[str]) -> np.ndarray:
    """Returns the partition (n,) of each image: 0, 1, 2 for training, validation and test.

    Raises:
      ValueError: A line is not a name and one of these numbers, other images are listed than the
        ones with labels, or a partition is empty.
    """
    found = {}
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 2 or cells[1] not in ("0", "1", "2"):
            raise ValueError(
                f"expected a name and 0 (training), 1 (validation) or 2 (test) in line {number} of "
                f"{path}, got {line.strip()!r}; take the file as published"
            )
        found[cells[0]] = int(cells[1])
    odd = sorted(set(names) ^ set(found))
    if odd:
        raise ValueError(
            f"expected the same images in {path} and in {LABELS}, got {odd[0]} in only one of them "
            f"({len(odd)} in all); take both files as published"
        )
    parts = np.array([found[name] for name in names])
    for k, title in enumerate(PARTITIONS):
        if not (parts == k).any():
            raise ValueError(
                f"expected images of partition {k} ({title}) in {path}, got none; keep some of each"
            )
    return parts


# --- images ---------------------------------------------------------------------------------------


def resize(image: Any) -> np.ndarray:
    """Returns an image of Pillow at 64 x 64 (antialiased, bilinear), as torchvision's Resize."""
    from PIL import Image

    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def decode(encoded: bytes, path: str) -> np.ndarray:
    """Returns a JPEG resized.

    Raises:
      ValueError: It cannot be read, is no color JPEG, or has another size than aligned images.
    """
    image = read_picture(path, encoded, "unpack img_align_celeba.zip anew")
    if (image.format, image.mode) != ("JPEG", "RGB"):
        raise ValueError(
            f"expected a JPEG in color in {path}, got {image.format} of mode {image.mode}; use the "
            "images as published"
        )
    if image.size != ALIGNED:
        width, height = image.size
        raise ValueError(
            f"expected {ALIGNED[0]} x {ALIGNED[1]} pixels in {path}, got {width} x {height}; use "
            "the aligned and cropped images, img_align_celeba.zip"
        )
    return resize(image)


def _resized(
    what: str,
    number: int,
    encoded: Callable[[], Iterator[bytes]],
    path_of: Callable[[int], str],
) -> np.ndarray:
    """Returns images (n, 64, 64, 3), mapped from a file that is made where there is none.

    Args:
      what: Tells these images from others.
      number: n.
      encoded: Gives the JPEGs in order.
      path_of: Gives the name of one, for messages.
    """

    def fill(images: np.ndarray) -> None:
        with ThreadPoolExecutor() as pool:  # Pillow decodes without the lock
            source, done = encoded(), 0
            for _ in track(range(-(-number // 1000)), description="decoding CelebA"):
                chunk = list(islice(source, 1000))
                numbers = range(done, done + len(chunk))
                for i, image in zip(
                    numbers, pool.map(decode, chunk, map(path_of, numbers)), strict=True
                ):
                    images[i] = image
                done += len(chunk)

    return _mapped(what, number, fill)


def _mapped(what: str, number: int, fill: Callable[[np.ndarray], None]) -> np.ndarray:
    """Returns the images of a file in ``cache_dir``, which ``fill`` makes if it is not there."""
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    cache = cache_dir() / f"celeba-{SIZE}-{key}.npy"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npy")
        shape = (number, SIZE, SIZE, 3)
        try:
            images = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            fill(images)
            images.flush()
            del images
            partial.replace(cache)  # in one move, so that an interrupted run leaves no half file
        finally:
            partial.unlink(missing_ok=True)
    mapped: np.ndarray = np.load(cache, mmap_mode="r")
    return mapped


# --- TFDS -----------------------------------------------------------------------------------------


def _load_tfds(data_dir: Path | None) -> Split:
    import tensorflow_datasets as tfds  # slow to import

    return Split(
        *(
            _tfds_part(tfds.data_source("celeb_a", split=part, data_dir=data_dir), part)
            for part in PARTITIONS
        )
    )


def _tfds_part(source: Any, part: str) -> Faces:
    """Returns a partition; images and labels are decoded together, and kept."""
    from PIL import Image

    number = len(source)
    labels = np.zeros((number, len(ATTRIBUTES)), bool)
    kept = cache_dir() / f"celeba-labels-{part}-{number}.npy"

    def fill(images: np.ndarray) -> None:
        # Many at once: array_record reads slowly one by one.
        for start in track(range(0, number, 1000), description=f"decoding CelebA, {part}"):
            rows = range(start, min(start + 1000, number))
            for i, record in zip(rows, source.__getitems__(rows), strict=True):
                images[i] = resize(Image.fromarray(record["image"]))
                labels[i] = [record["attributes"][name] for name in ATTRIBUTES]
        np.save(kept, labels)

    images = _mapped(f"tfds {part} {number}", number, fill)
    return Faces(images, np.load(kept))


# --- made-up faces --------------------------------------------------------------------------------


def make_up(number: int, size: int, seed: int) -> Faces:
    """Returns faces for smoke runs: each attribute lights up a cell of its own, in noise."""
    rng = np.random.default_rng(seed)
    shares = np.linspace(0.1, 0.8, len(ATTRIBUTES))
    labels = rng.random((number, len(ATTRIBUTES))) < shares
    cells = labels.reshape(number, 8, 5)
    rows, columns = np.arange(size) * 8 // size, np.arange(size) * 5 // size
    light = cells[:, rows][:, :, columns][..., None]
    noise = rng.integers(0, 100, (number, size, size, 3))
    return Faces((noise + 120 * light).astype(np.uint8), labels)
