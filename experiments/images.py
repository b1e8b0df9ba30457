"""Small image sets as arrays: scikit-learn's bundled digits, and whatever TFDS reads as images."""

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

# What Pillow and zip files raise for unknown kinds and for truncated or altered files.
BROKEN = (OSError, SyntaxError, EOFError, zipfile.BadZipFile, zlib.error)


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
      data_dir: TFDS's folder, with the prepared set, or with others: TFDS then downloads to it. By
        default TFDS's own.

    Returns:
      Images of shape (n, height, width), with a channel axis if there are several channels.

    Raises:
      FileNotFoundError: There is a folder, and it is not TFDS's.
    """
    if data_dir is not None and not _is_tfds(Path(data_dir), name):
        own = f"{LOCAL[name]}, or " if name in LOCAL else ""
        raise FileNotFoundError(
            f"expected {own}TFDS's folder {name} in {data_dir}, got neither that nor another of "
            "TFDS's sets; name the folder that has it with --data-dir, or leave --data-dir away to "
            "download by TFDS"
        )
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


# What a set of their own form is called in a sentence.
LOCAL = {
    "kmnist": "kmnist-{train,test}-{imgs,labels}.npz",
    "eurosat/rgb": "a zip, or folders by class, of EuroSAT's JPEG images",
}
EUROSAT_CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture"),
    *("PermanentCrop", "Residential", "River", "SeaLake"),
)


def load_local_images(name: str, data_dir: str | None) -> Images | None:
    """Returns a set that lies in a folder in its publishers' own form, None if it does not.

    Args:
      name: ``"kmnist"``: ``kmnist-{train,test}-{imgs,labels}.npz``, of which the training part is
        taken if it is there; or ``"eurosat/rgb"``: a zip, or a tree of folders, of JPEG images in
        one folder a class. Classes are numbered in alphabetical order.
      data_dir: The folder.

    Raises:
      FileNotFoundError: There is no such folder, or only one of two files that belong together.
      ValueError: A file is not what its name says, images and labels of Kuzushiji-MNIST differ in
        number, or images of EuroSAT in size, or a class is missing.
    """
    loader = {"kmnist": _local_kmnist, "eurosat/rgb": _local_eurosat}.get(name)
    if loader is None or not data_dir:
        return None
    if not Path(data_dir).exists():
        raise FileNotFoundError(
            f"expected a folder with {LOCAL[name]}, got {data_dir}, which is not there; name "
            "another with --data-dir, or leave it away to download by TFDS"
        )
    return loader(Path(data_dir))


def _local_kmnist(folder: Path) -> Images | None:
    for part in ("train", "test"):
        paths = [folder / f"kmnist-{part}-{kind}.npz" for kind in ("imgs", "labels")]
        there = [path for path in paths if path.exists()]
        if len(there) == 1:
            (absent,) = set(paths) - set(there)
            raise FileNotFoundError(
                f"expected {absent} beside {there[0].name}, which is not there; take both files of "
                "a part"
            )
        if there:
            images, labels = (_only_array(path) for path in paths)
            for path, array, shape in ((paths[0], images, (28, 28)), (paths[1], labels, ())):
                if array.shape[1:] != shape or array.ndim != 1 + len(shape):
                    wanted = ", ".join(map(str, ("n", *shape)))
                    raise ValueError(
                        f"expected an array of shape ({wanted}) in {path}, got {array.shape}; take "
                        "the file as published"
                    )
                if array.dtype != np.uint8:
                    raise ValueError(
                        f"expected numbers of type uint8 in {path}, got {array.dtype}; take the "
                        "file as published"
                    )
            if len(images) != len(labels):
                raise ValueError(
                    f"expected one label for each image in {folder}, got {len(labels)} for "
                    f"{len(images)}; take both files of the same part"
                )
            if labels.max(initial=0) > 9:
                raise ValueError(
                    f"expected labels 0 to 9 in {paths[1]}, got {labels.max()}; take those of "
                    "Kuzushiji-MNIST, not of Kuzushiji-49"
                )
            return Images(images, labels.astype(np.int32))
    return None


def _only_array(path: Path) -> np.ndarray:
    arrays = read_npz(path)
    if set(arrays) != {"arr_0"}:
        raise ValueError(
            f"expected one array, arr_0, in {path}, got {sorted(arrays)}; take the file as "
            "published"
        )
    return arrays["arr_0"]


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file.

    Raises:
      ValueError: It is no such file, or only part of one.
    """
    try:
        # Opened here: NumPy leaves a broken file open.
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"expected arrays as numpy.savez writes them in {path}, got another file ({error}); "
            "fetch it anew"
        ) from None


def _local_eurosat(folder: Path) -> Images | None:
    archives = sorted(folder.glob("*.zip")) if folder.is_dir() else [folder]
    for archive in archives:
        if not zipfile.is_zipfile(archive):
            raise ValueError(f"expected a zip in {archive}, got another file; fetch it anew")
    roots: list[Any] = [zipfile.Path(archive) for archive in archives] or [folder]
    found = sorted(
        (path.parent.name, path.name, path)
        for root in roots
        for path in _jpegs(root)
        if path.parent.name in EUROSAT_CLASSES
    )
    if not found:
        return None
    missing = sorted(set(EUROSAT_CLASSES) - {name for name, *_ in found})
    if missing:
        raise ValueError(
            f"expected JPEG images in a folder for each of EuroSAT's ten classes in {folder}, got "
            f"none of {', '.join(missing)}; unpack the set whole"
        )
    images = []
    for *_, path in track(found, description="decoding EuroSAT"):
        images.append(_in_colors(path))
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"expected images of one size in {folder}, got {sizes}; leave others out")
    labels = [EUROSAT_CLASSES.index(name) for name, *_ in found]
    return Images(np.stack(images), np.asarray(labels, np.int32))


def read_picture(
    path: Any, encoded: bytes | None = None, advice: str = "fetch the file anew"
) -> Any:
    """Returns a picture of Pillow, decoded.

    Args:
      path: The file, a path of a folder or of a zip file, or a name for messages.
      encoded: The bytes of the file; read from the path if not given.
      advice: What a person whose file is broken can do.

    Raises:
      ValueError: The file is no picture, or only part of one.
    """
    from PIL import Image

    try:
        data = path.read_bytes() if encoded is None else encoded
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except BROKEN as error:
        raise ValueError(
            f"expected a picture in {path}, got one that Pillow cannot read ({error}); {advice}"
        ) from None
    return picture


def _in_colors(path: Any) -> np.ndarray:
    picture = read_picture(path)
    if picture.mode != "RGB":
        raise ValueError(
            f"expected a picture in colors in {path}, got mode {picture.mode}; take EuroSAT's RGB "
            "images"
        )
    return np.asarray(picture)


def _is_tfds(folder: Path, name: str) -> bool:
    """Tells whether a folder has the set, or is TFDS's by another set in it."""
    if (folder / name).is_dir():
        return True
    return any(next(folder.glob(f"{depth}/dataset_info.json"), None) for depth in ("*/*", "*/*/*"))


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
