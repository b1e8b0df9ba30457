"""Small image sets as arrays: scikit-learn's bundled digits, and whatever TFDS reads as images."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track


class Images(NamedTuple):
    """Labelled single images."""

    images: np.ndarray  # (n, height, width[, channels]) uint8
    labels: np.ndarray  # (n,) int32


def cache_dir() -> Path:
    """Returns the user's cache folder for decoded images."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxmtl"


def minibatches(
    size: int, batch_size: int, rng: np.random.Generator, name: str = "images"
) -> np.ndarray:
    """Returns the examples (steps, b) of an epoch's minibatches; what fills none is left out.

    Raises:
      SystemExit: There are not enough examples for one batch.
    """
    steps = size // batch_size
    if steps == 0:
        raise SystemExit(
            f"expected at least {batch_size} {name} for a batch, got {size}; pass a "
            "smaller --batch-size"
        )
    return rng.permutation(size)[: steps * batch_size].reshape(steps, batch_size)


def load_sklearn_digits(split: str, *, test_fraction: float = 0.2) -> Images:
    """Returns the real 8 x 8 handwritten digits that come with scikit-learn (no download).

    Args:
      split: ``"train"`` or ``"test"``; the same fixed shuffle decides both.
      test_fraction: Share of the 1,797 digits that is kept for ``"test"``.

    Returns:
      Images of shape (n, 8, 8), with the 17 gray levels spread over 0..255.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    cut = round(len(order) * (1 - test_fraction))
    chosen = {"train": order[:cut], "test": order[cut:]}[split]
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return Images(images, digits.target[chosen].astype(np.int32))


def load_tfds_images(name: str, split: str, *, data_dir: str | None = None) -> Images:
    """Returns a TFDS image set, decoded once and then kept as an ``.npz`` in ``cache_dir``.

    Args:
      name: TFDS name, such as ``"mnist"``.
      split: TFDS split.
      data_dir: Folder with the prepared set; by default TFDS's own, where it downloads.

    Returns:
      Images of shape (n, height, width), with a channel axis if there are several channels.
    """
    import tensorflow_datasets as tfds  # slow to import, and not needed for the bundled digits

    source = tfds.data_source(name, split=split, data_dir=data_dir)
    # The length is part of the name: a folder may hold only part of a set.
    cache = cache_dir() / f"{name}-{split}-{len(source)}.npz"
    if not cache.exists():
        records = list(_records(source, description=f"decoding {name} {split}"))
        images = np.stack([record["image"] for record in records])
        labels = np.asarray([record["label"] for record in records], np.int32)
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(partial, images=images, labels=labels)
        partial.replace(cache)  # in one move, so that an interrupted run leaves no half file
    with np.load(cache) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return Images(images[..., 0] if images.shape[-1] == 1 else images, labels)


def load_local_images(name: str, data_dir: str | None) -> Images | None:
    """Returns a set that lies in a folder in its publishers' own form, None if it does not.

    Args:
      name: ``"kmnist"``: ``kmnist-{train,test}-{imgs,labels}.npz``, of which the training part is
        taken if it is there; or ``"eurosat/rgb"``: a zip, or a tree of folders, of JPEG images in
        one folder a class. Classes are numbered in alphabetical order.
      data_dir: The folder.

    Raises:
      ValueError: Images and labels of Kuzushiji-MNIST differ in number, or images of EuroSAT in
        size.
    """
    loader = {"kmnist": _local_kmnist, "eurosat/rgb": _local_eurosat}.get(name)
    return loader(Path(data_dir)) if loader and data_dir else None


def _local_kmnist(folder: Path) -> Images | None:
    for part in ("train", "test"):
        paths = [folder / f"kmnist-{part}-{kind}.npz" for kind in ("imgs", "labels")]
        if all(path.exists() for path in paths):
            images, labels = (np.load(path)["arr_0"] for path in paths)
            if len(images) != len(labels):
                raise ValueError(
                    f"expected one label for each image in {folder}, got {len(labels)} for "
                    f"{len(images)}; take both files of the same part"
                )
            return Images(images, labels.astype(np.int32))
    return None


def _local_eurosat(folder: Path) -> Images | None:
    from PIL import Image

    archives = sorted(folder.glob("*.zip")) if folder.is_dir() else [folder]
    roots: list[Any] = [zipfile.Path(archive) for archive in archives] or [folder]
    found = sorted((path.parent.name, path.name, path) for root in roots for path in _jpegs(root))
    if not found:
        return None
    classes = sorted({name for name, *_ in found})
    images = []
    for *_, path in track(found, description="decoding EuroSAT"):
        with path.open("rb") as file:
            images.append(np.asarray(Image.open(file).convert("RGB")))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size in {folder}, got {sizes}; leave others out")
    labels = [classes.index(name) for name, *_ in found]
    return Images(np.stack(images), np.asarray(labels, np.int32))


def _jpegs(root: Any) -> Iterator[Any]:
    for path in root.iterdir():
        if path.is_dir():
            yield from _jpegs(path)
        elif path.name.lower().endswith((".jpg", ".jpeg")):
            yield path


def _records(
    source: Any, *, description: str, chunk: int = 1000
) -> Iterator[dict[str, np.ndarray]]:
    # array_record reads about 1,500 records a second, and only when asked for many at once.
    for start in track(range(0, len(source), chunk), description=description):
        yield from source.__getitems__(range(start, min(start + chunk, len(source))))
