"""Turns an archive of NYUv2 into the folders of MTAN's files.

    python -m experiments.scenes.convert nyuv2_256x192.zip DIR --size 96x128

The archive holds ``image/NNNN.jpg``, ``depth/NNNN.png`` (uint8, steps of 4 cm),
``label/NNNN.png`` (13 classes, 255 is void), ``normal/NNNN.jpg`` (``(n + 1) * 127.5``) and
``splits.json`` with the numbers of the official split, all at 192 x 256. It becomes
``DIR/{train,val}/<kind>/<i>.npy`` with images in [0, 1], labels with -1 for void, depth in meters
with 0 for undefined, normals of length 1, or 0 where undefined. The official test images are
MTAN's ``val``.

Images and normals are resized linearly, labels and depth to the nearest pixel. A normal whose
length is below 0.5, before or after that, is undefined. 288 x 384, the papers' size, is upsampled:
such files have the papers' shape and not their detail.
"""

import argparse
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from experiments.images import BROKEN, read_picture

SIZES = {"96x128": (96, 128), "192x256": (192, 256), "288x384": (288, 384)}
METERS = 0.04  # of one step of depth
LEAST_LENGTH = 0.5  # of a normal that is defined
FOLDERS = {"train": "train", "test": "val"}
ADVICE = "fetch the archive anew"
KINDS = {"image": "jpg", "depth": "png", "label": "png", "normal": "jpg"}


def unit_normals(normals: np.ndarray) -> np.ndarray:
    """Returns normals (..., 3) of length 1, zeros where their length is below 0.5."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    defined = length >= LEAST_LENGTH
    return np.where(defined, normals / np.where(defined, length, 1), 0).astype(np.float32)


def resize(array: np.ndarray, size: tuple[int, int], *, nearest: bool) -> np.ndarray:
    """Returns an array (h, w) or (h, w, c) of floats at another size, channel by channel."""
    from PIL import Image

    kind = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    if array.shape[:2] == size:
        return array
    if array.ndim == 3:
        return np.stack(
            [resize(array[..., c], size, nearest=nearest) for c in range(array.shape[2])], axis=-1
        )
    return np.asarray(Image.fromarray(array.astype(np.float32)).resize(size[::-1], kind))


def convert_scene(raw: dict[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns one scene as MTAN's arrays, from the four pictures of the archive."""
    label = resize(raw["label"], size, nearest=True).astype(np.int16)
    normals = unit_normals(raw["normal"].astype(np.float32) / 127.5 - 1)
    depth = resize(raw["depth"], size, nearest=True).astype(np.float32) * np.float32(METERS)
    image = resize(raw["image"].astype(np.float32), size, nearest=False) / 255
    return {
        "image": image.astype(np.float32),
        "label": np.where(label == 255, -1, label).astype(np.int16),
        "depth": depth[..., None],
        "normal": unit_normals(resize(normals, size, nearest=False)),
    }


def read_scene(archive: zipfile.ZipFile, number: int) -> dict[str, np.ndarray]:
    """Returns the four pictures of a scene.

    Raises:
      ValueError: One is missing, broken, of another size or of another kind of picture.
    """
    raw = {}
    for kind, suffix in KINDS.items():
        name = f"{kind}/{number:04d}.{suffix}"
        try:
            data = archive.read(name)
        except KeyError:
            raise ValueError(
                f"expected {name} in {archive.filename}, got no such member; use an archive with "
                "image, depth, label and normal for every number in splits.json"
            ) from None
        except BROKEN as error:
            raise ValueError(
                f"expected {name} in {archive.filename} unharmed, got {error}; {ADVICE}"
            ) from None
        raw[kind] = np.asarray(read_picture(name, data, ADVICE))
        dims = 3 if kind in ("image", "normal") else 2
        same = raw[kind].shape[:2] == raw["image"].shape[:2]
        channels = "three channels" if dims == 3 else "one channel"
        if raw[kind].dtype != np.uint8 or raw[kind].ndim != dims or not same:
            raise ValueError(
                f"expected {name} to be an 8-bit picture of {channels} "
                f"at the image's size {raw['image'].shape[:2]}, got {raw[kind].dtype} of shape "
                f"{raw[kind].shape}; the archive is of another form"
            )
    return raw


def read_splits(archive: zipfile.ZipFile) -> dict[str, list[int]]:
    """Returns the numbers of the scenes of each split.

    Raises:
      ValueError: They are of another form.
    """
    try:
        splits = json.loads(archive.read("splits.json"))
    except (ValueError, *BROKEN) as error:
        raise ValueError(
            f"expected JSON in splits.json of {archive.filename}, got {error}; {ADVICE}"
        ) from None
    names = sorted(splits) if isinstance(splits, dict) else type(splits).__name__
    if not isinstance(splits, dict) or not set(FOLDERS) <= set(splits):
        raise ValueError(
            f"expected train and test in splits.json, got {names}; use the official split"
        )
    for name in FOLDERS:
        numbers = splits[name]
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise ValueError(
                f"expected a list of whole numbers for {name} in splits.json, got "
                f"{str(numbers)[:40]}; use the official split"
            )
    return splits


def convert(archive: Path, out: Path, size: tuple[int, int]) -> dict[str, int]:
    """Converts an archive and returns the number of scenes by folder.

    Args:
      archive: The zip file.
      out: The folder to make.
      size: Height and width.

    Raises:
      ValueError: The archive is missing or of another form.
    """
    if not zipfile.is_zipfile(archive):
        what = "no zip file" if Path(archive).exists() else "not there"
        raise ValueError(
            f"expected a zip file of NYUv2, got {archive}, which is {what}; give the path of the "
            "archive"
        )
    counts = {}
    with zipfile.ZipFile(archive) as file:
        if "splits.json" not in file.namelist():
            raise ValueError(
                f"expected splits.json in {archive}, got none; it maps train and test to numbers"
            )
        splits = read_splits(file)
        for split, folder in FOLDERS.items():
            for kind in KINDS:
                (out / folder / kind).mkdir(parents=True, exist_ok=True)
            for i, number in enumerate(track(splits[split], description=folder)):
                scene = convert_scene(read_scene(file, number), size)
                for kind, array in scene.items():
                    np.save(out / folder / kind / f"{i}.npy", array)
            counts[folder] = len(splits[split])
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Converts what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m experiments.scenes.convert")
    parser.add_argument("archive", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="96x128")
    args = parser.parse_args(argv)
    try:
        counts = convert(args.archive, args.out, SIZES[args.size])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"{args.out}: {counts['train']} scenes in train, {counts['val']} in val, at {args.size}")
    if args.size == "288x384":
        print("288x384 is upsampled from 192x256: the papers' shape without their detail")


if __name__ == "__main__":
    main()
