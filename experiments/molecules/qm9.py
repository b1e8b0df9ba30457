"""QM9 as its users have it: MoleculeNet's SDF and table, the xyz files of figshare, or TFDS.

All three give the eleven tasks of the papers in PyTorch Geometric's units: eV for energies, which
are those of atomization for U0, U, H and G. The 3,054 molecules that failed a consistency check are
left out by their numbers in ``uncharacterized.txt``, which counts from 1. (Versions of PyTorch
Geometric before 2.1 counted from 0 and left out each one's successor.)
"""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from experiments.images import cache_dir
from experiments.molecules.data import (
    HARTREE,
    KCAL_PER_MOL,
    QM9_TASKS,
    Molecules,
    Split,
    features,
    guess_bonds,
    split_of,
)

SYMBOLS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
HELD_OUT = 10_000
SDF, CSV, SKIPPED = "gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"
PATTERN = "dsgdb9nsd_*.xyz"
WHERE = "figshare's collection 978904, or MoleculeNet's qm9.zip"

# Energies of atoms in hartree at 0 K, 298.15 K, the enthalpy and the free energy: QM9's atomref.txt
ATOMS = {
    1: (-0.500273, -0.498857, -0.497912, -0.510927),
    6: (-37.846772, -37.845355, -37.844411, -37.861317),
    7: (-54.583861, -54.582445, -54.581501, -54.598897),
    8: (-75.064579, -75.063163, -75.062219, -75.079532),
    9: (-99.718730, -99.717314, -99.716370, -99.733544),
}


class Raw(NamedTuple):
    """A molecule as read."""

    numbers: np.ndarray  # (atoms,) int
    positions: np.ndarray  # (atoms, 3)
    bonds: np.ndarray | None  # (atoms, atoms) int, or None where the file tells none
    targets: Sequence[float]  # (11,)


def load_qm9(data_dir: str | Path | None, strata: int = 1) -> Split:
    """Returns QM9 in random parts of 10,000 for test, 10,000 for validation, the rest for training.

    Args:
      data_dir: Folder with ``gdb9.sdf``, ``gdb9.sdf.csv`` and ``uncharacterized.txt`` (bonds are
        then the file's); or with ``dsgdb9nsd_000001.xyz`` and so on and ``uncharacterized.txt``
        (bonds are guessed); or with TFDS's ``qm9/original`` (likewise). None: TFDS's own folder,
        with download.
      strata: Parts by size.

    Returns:
      A ```Split```; of fewer than 100,000 molecules a tenth is for test and for validation.

    Raises:
      FileNotFoundError: A file that belongs to the others is not there.
      ValueError: A file is not what its name says.
    """
    folder = Path(data_dir) if data_dir else None
    if folder and (folder / SDF).exists():
        raw = read_sdf(folder)
    elif folder and next(folder.glob(PATTERN), None):
        raw = read_xyz(folder)
    elif folder and not (folder / "qm9").is_dir():
        raise FileNotFoundError(
            f"expected {SDF} with {CSV}, or files {PATTERN}, or a folder qm9 of TFDS in {folder}, "
            f"got none; unpack {WHERE} there, or leave --data-dir away to download by TFDS"
        )
    else:
        raw = read_tfds(data_dir)
    molecules = pad(raw)
    number = len(molecules.sizes)
    if number < 10 * strata:
        raise ValueError(
            f"expected at least {10 * strata} molecules for parts of {strata} sizes, got {number}; "
            "take all files"
        )
    return split_of(molecules, QM9_TASKS, min(HELD_OUT, number // 10), strata)


def pad(raw: Iterable[Raw]) -> Molecules:
    """Returns molecules padded to the largest; bonds that no file tells are guessed."""
    listed = list(raw)
    sizes = np.array([len(one.numbers) for one in listed], np.int32)
    n, a = len(listed), sizes.max(initial=0)
    numbers = np.zeros((n, a), np.int64)
    positions = np.zeros((n, a, 3), np.float32)
    bonds = np.zeros((n, a, a), np.int8)
    for i, one in enumerate(listed):
        size = sizes[i]
        numbers[i, :size], positions[i, :size] = one.numbers, one.positions
        if one.bonds is not None:
            bonds[i, :size, :size] = one.bonds
    if listed and listed[0].bonds is None:
        for part in np.array_split(np.arange(n), max(n // 1000, 1)):
            bonds[part] = guess_bonds(numbers[part], positions[part])
    targets = np.array([one.targets for one in listed], np.float64)
    return Molecules(features(numbers, bonds), positions, bonds, sizes, targets)


def skipped(folder: Path) -> set[int]:
    """Returns the numbers, from 1, of the molecules that failed the check of consistency.

    The list has nine lines above it and one below.
    """
    path = folder / SKIPPED
    if not path.exists():
        raise FileNotFoundError(
            f"expected {path}, which is not there; it is figshare's file 3195404 and lists the "
            "molecules that every paper leaves out (an empty list needs its ten other lines)"
        )
    lines = _text(path).rstrip("\n").split("\n")[9:-1]
    return {int(_number(line.split()[:1], path)[0]) for line in lines}


# --- SDF ----------------------------------------------------------------------------------------


def read_sdf(folder: Path) -> Iterator[Raw]:
    """Yields the molecules of ``gdb9.sdf`` with their rows of ``gdb9.sdf.csv``."""
    if not (folder / CSV).exists():
        raise FileNotFoundError(
            f"expected {CSV} beside {SDF} in {folder}, which is not there; both are in "
            "MoleculeNet's qm9.zip"
        )
    out = skipped(folder)
    rows = list(csv.DictReader(_text(folder / CSV).splitlines()))
    atomization = ("u0_atom", "u298_atom", "h298_atom", "g298_atom")
    wanted = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "cv", *atomization)
    absent = [name for name in wanted if rows and name not in rows[0]]
    if not rows or absent:
        raise ValueError(
            f"expected columns {absent or list(wanted)} in {folder / CSV}, got "
            f"{list(rows[0]) if rows else 'no rows'}; take the file as published"
        )
    blocks = _text(folder / SDF).rstrip().removesuffix("$$$$").split("$$$$\n")
    if len(blocks) != len(rows):
        raise ValueError(
            f"expected one row of {CSV} for each molecule of {SDF}, got {len(rows)} for "
            f"{len(blocks)}; take both from the same archive"
        )
    pairs = zip(blocks, rows, strict=True)
    for i, (block, row) in enumerate(track(pairs, "reading QM9", total=len(rows)), 1):
        if i in out:
            continue
        value = dict(
            zip(wanted, _number([row[name] for name in wanted], folder / CSV), strict=True)
        )
        targets = targets_of(value, [value[name] * KCAL_PER_MOL for name in atomization])
        yield Raw(*_parse_block(block.split("\n"), i, folder / SDF), targets)


def _parse_block(lines: Sequence[str], i: int, path: Path) -> tuple[Any, Any, Any]:
    # V2000: numbers of three characters, which may touch.
    try:
        atoms, num_bonds = int(lines[3][:3]), int(lines[3][3:6])
        cells = [line.split() for line in lines[4 : 4 + atoms]]
        numbers = np.array([SYMBOLS[cell[3]] for cell in cells])
        positions = _finite(np.array([cell[:3] for cell in cells], np.float64)).reshape(atoms, 3)
        bonds = np.zeros((atoms, atoms), np.int8)
        for line in lines[4 + atoms : 4 + atoms + num_bonds]:
            first, second, kind = (int(line[start : start + 3]) for start in (0, 3, 6))
            if not 1 <= kind <= 4:
                raise ValueError(f"bond of type {kind}")
            if not (1 <= first <= atoms and 1 <= second <= atoms):
                raise ValueError(f"bond of atoms {first} and {second} of {atoms}")
            bonds[first - 1, second - 1] = bonds[second - 1, first - 1] = kind
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"expected a V2000 block of H, C, N, O, F with bonds of types 1 to 4 as molecule {i} "
            f"of {path}, got {error!r}; take the file as published"
        ) from error
    return numbers, positions, bonds


# --- xyz ----------------------------------------------------------------------------------------

PROPERTIES = (
    *("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "cv"),
)


def read_xyz(folder: Path) -> Iterator[Raw]:
    """Yields the molecules of ``dsgdb9nsd_*.xyz``, in the order of their numbers."""
    out = skipped(folder)
    paths = sorted(folder.glob(PATTERN))
    for path in track(paths, "reading QM9"):
        try:
            number = int(path.stem.removeprefix("dsgdb9nsd_"))
        except ValueError as error:
            raise ValueError(
                f"expected a number in the name of {path}, got none; leave other files out"
            ) from error
        if number not in out:
            yield _parse_xyz(path)


def _parse_xyz(path: Path) -> Raw:
    lines = _text(path).split("\n")
    try:
        atoms = int(lines[0])
        cells = [line.replace("*^", "e").split() for line in lines[2 : 2 + atoms]]
        numbers = np.array([SYMBOLS[cell[0]] for cell in cells])
        positions = _finite(np.array([cell[1:4] for cell in cells], np.float64)).reshape(atoms, 3)
        values = _number(lines[1].split()[2:], path)
        value = dict(zip(PROPERTIES, values, strict=True))
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"expected the number of atoms, 15 properties behind 'gdb' and a number, and a line "
            f"for each atom (H, C, N, O, F) in {path}, got {error!r}; take it as published"
        ) from error
    return Raw(numbers, positions, None, targets_of(value, atomization_of(value, numbers)))


# --- TFDS ---------------------------------------------------------------------------------------


def read_tfds(data_dir: str | Path | None) -> Iterator[Raw]:
    """Yields the molecules of TFDS's ``qm9/original``, decoded once and kept in ``cache_dir``."""
    import tensorflow_datasets as tfds  # slow to import

    source = tfds.data_source("qm9/original", split="train", data_dir=data_dir)
    cache = cache_dir() / f"qm9-train-{len(source)}.npz"
    names = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "U0", "U", "H", "G", "Cv")
    keys = ("num_atoms", "charges", "positions", *names)
    if not cache.exists():
        listed: dict[str, list[Any]] = {key: [] for key in keys}
        for start in track(range(0, len(source), 1000), description="decoding QM9"):
            for record in source.__getitems__(range(start, min(start + 1000, len(source)))):
                for key in keys:
                    listed[key].append(record[key])
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        stacked: dict[str, Any] = {key: np.asarray(values) for key, values in listed.items()}
        np.savez_compressed(partial, **stacked)
        partial.replace(cache)  # in one move, so that an interrupted run leaves no half file
    with np.load(cache) as file:
        arrays = {key: file[key] for key in keys}
    for i, atoms in enumerate(arrays["num_atoms"]):
        numbers = arrays["charges"][i, :atoms]
        value = {name.replace("Cv", "cv"): float(arrays[name][i]) for name in names}
        positions = arrays["positions"][i, :atoms]
        yield Raw(numbers, positions, None, targets_of(value, atomization_of(value, numbers)))


# --- what all share -----------------------------------------------------------------------------


def targets_of(value: dict[str, float], atomization: Sequence[float]) -> list[float]:
    """Returns the eleven targets from properties in QM9's units and atomization energies in eV."""
    orbital = [HARTREE * value[name] for name in ("homo", "lumo")]
    extent = [value["r2"], HARTREE * value["zpve"]]
    return [value["mu"], value["alpha"], *orbital, *extent, *atomization, value["cv"]]


def atomization_of(value: dict[str, float], numbers: np.ndarray) -> list[float]:
    """Returns U0, U, H and G in eV less those of the atoms."""
    atoms = np.sum([ATOMS[int(number)] for number in numbers], axis=0)
    total = np.array([value[name] for name in ("U0", "U", "H", "G")])
    energies: list[float] = (HARTREE * (total - atoms)).tolist()
    return energies


def _number(cells: Iterable[str | None], path: Path) -> list[float]:
    try:
        return _finite(np.array([float(cell or "") for cell in cells])).tolist()
    except ValueError as error:
        raise ValueError(
            f"expected numbers in {path}, got {error}; take it as published"
        ) from error


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("a number that is not finite")
    return values


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in {path}, got {error}; take it as published") from None
