"""Molecules as padded graphs: QM9's own files, TFDS, and 10,000 molecules with other properties.

Atoms have the eleven features of PyTorch Geometric: the element as 0 and 1 (H, C, N, O, F), the
atomic number, whether it is aromatic, three of its hybridization, and the number of hydrogens bound
to it. That package reads QM9 without RDKit's clean-up, which leaves aromaticity and hybridization
of every atom at 0; so they are here. Bonds are single, double, triple or aromatic.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.images import read_npz

ELEMENTS = (1, 6, 7, 8, 9)
NUM_FEATURES = 11
MAX_ATOMS = 29
HARTREE = 27.211386246  # eV
KCAL_PER_MOL = 0.04336414  # eV
DEBYE = 2.541746  # per atomic unit of a dipole

# Covalent radii in angstrom of single, double and triple bonds (Pyykko and Atsumi 2009).
RADII = {
    1: (0.32, np.nan, np.nan),
    6: (0.75, 0.67, 0.60),
    7: (0.71, 0.60, 0.54),
    8: (0.63, 0.57, 0.53),
    9: (0.64, 0.59, 0.53),
}
STRETCH = 1.2  # atoms within this multiple of the sum of their radii are bound


class Task(NamedTuple):
    """A property and how its error is printed."""

    name: str
    unit: str
    factor: float = 1.0  # from the unit of the values to that one
    short: str = ""  # for the head of a column, where the name is long


class Molecules(NamedTuple):
    """Molecules padded to ``a`` atoms; what is padded is 0."""

    nodes: np.ndarray  # (n, a, 11) int8
    positions: np.ndarray  # (n, a, 3) float32, in angstrom
    bonds: np.ndarray  # (n, a, a) int8: 0 for none, single, double, triple, aromatic
    sizes: np.ndarray  # (n,) int32
    targets: np.ndarray  # (n, m) float64 as read, then float32, standardized

    def take(self, index: np.ndarray) -> "Molecules":
        """Returns some of them."""
        return Molecules(*(values[index] for values in self))


class Split(NamedTuple):
    """Three parts, each cut into strata of molecules of similar size, padded to the largest."""

    train: tuple[Molecules, ...]
    validation: tuple[Molecules, ...]
    test: tuple[Molecules, ...]
    tasks: tuple[Task, ...]
    scale: np.ndarray  # (m,) what an error of 1 in a standardized target is in the printed unit


# The order of the paper's table: PyTorch Geometric's targets 0-3, 5, 6, 12-15 and 11.
QM9_TASKS = (
    Task("mu", "D"),
    Task("alpha", "a0^3"),
    Task("HOMO", "meV", 1000),
    Task("LUMO", "meV", 1000),
    Task("R2", "a0^2"),
    Task("ZPVE", "meV", 1000),
    Task("U0", "meV", 1000),
    Task("U", "meV", 1000),
    Task("H", "meV", 1000),
    Task("G", "meV", 1000),
    Task("cv", "cal / mol K"),
)

RIMP2_TASKS = (
    Task("nuclear repulsion", "Ha", 1.0, "V_nn"),
    Task("kinetic", "meV", 1000 * HARTREE, "T"),
    Task("virial ratio", "1e-6", 1e6, "-V/T"),
    Task("correlation", "meV", 1000 * HARTREE, "E_c"),
    Task("dipole", "D", DEBYE, "mu"),
    Task("HOMO", "meV", 1000 * HARTREE),
    Task("LUMO", "meV", 1000 * HARTREE),
    Task("gap", "meV", 1000 * HARTREE),
    Task("binding", "meV", 1000 * HARTREE, "E_b"),
    Task("largest charge", "me", 1000, "q_max"),
    Task("smallest charge", "me", 1000, "q_min"),
)
COMPOSED = (0, 1)  # of these: what a fit of the composition leaves


# --- graphs -------------------------------------------------------------------------------------


def features(numbers: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """Returns the features (n, a, 11) of atoms from atomic numbers (n, a) and bonds (n, a, a)."""
    one_hot = numbers[..., None] == np.asarray(ELEMENTS)
    hydrogens = ((bonds > 0) & (numbers == 1)[:, None, :]).sum(axis=-1)
    blank = np.zeros_like(numbers)
    columns = [numbers, blank, blank, blank, blank, hydrogens]
    return np.concatenate([one_hot, np.stack(columns, axis=-1)], axis=-1).astype(np.int8)


def guess_bonds(numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns bonds (n, a, a) of the kind whose covalent radii fit the distance best.

    None are aromatic: their bonds are guessed to be single or double.
    """
    radii = np.full((max(RADII) + 1, 3), np.nan)
    for number, of_kinds in RADII.items():
        radii[number] = of_kinds
    of_atoms = radii[numbers]  # (n, a, 3)
    lengths = of_atoms[:, :, None] + of_atoms[:, None, :]  # nan where one is padded
    square = np.sum((positions[:, :, None] - positions[:, None, :]) ** 2, axis=-1)
    distances = np.sqrt(square)[..., None]
    near = distances[..., 0] < STRETCH * lengths[..., 0]
    near &= ~np.eye(numbers.shape[1], dtype=bool)
    gaps = np.abs(distances - lengths)
    kinds = 1 + np.argmin(np.where(np.isnan(gaps), np.inf, gaps), axis=-1)
    return np.where(near, kinds, 0).astype(np.int8)


def strata_of(molecules: Molecules, number: int) -> tuple[Molecules, ...]:
    """Returns the molecules in equal parts by size, each padded to its largest molecule.

    The last few are left out where their number is no multiple; these are of any size.
    """
    whole = np.arange(len(molecules.sizes) // number * number)
    order = whole[np.argsort(molecules.sizes[whole], kind="stable")]
    parts = []
    for index in np.split(order, number):
        part = molecules.take(index)
        a = part.sizes.max()
        parts.append(
            Molecules(part.nodes[:, :a], part.positions[:, :a], part.bonds[:, :a, :a], *part[3:])
        )
    return tuple(parts)


def split_of(
    molecules: Molecules,
    tasks: Sequence[Task],
    num_held_out: int,
    strata: int,
    composed: Sequence[int] = (),
) -> Split:
    """Returns test, validation and training parts, drawn at random but always the same.

    Args:
      molecules: All, with targets as read.
      tasks: The m tasks.
      num_held_out: Molecules of the test part, and as many of the validation part.
      strata: Parts by size.
      composed: Targets from which a linear fit of the numbers of atoms of each element, made on
        the training part, is subtracted.
    """
    order = np.random.default_rng(0).permutation(len(molecules.sizes))
    test, validation, train = np.split(order, [num_held_out, 2 * num_held_out])
    targets = molecules.targets.copy()
    counts = molecules.nodes[..., : len(ELEMENTS)].sum(axis=1)
    inputs = np.concatenate([np.ones((len(counts), 1)), counts], axis=1)
    for i in composed:
        fit = np.linalg.lstsq(inputs[train], targets[train, i])[0]
        targets[:, i] -= inputs @ fit
    mean, deviation = targets[train].mean(axis=0), targets[train].std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1)
    standardized = molecules._replace(targets=((targets - mean) / deviation).astype(np.float32))
    factors = np.array([task.factor for task in tasks])
    return Split(
        train=strata_of(standardized.take(train), strata),
        validation=strata_of(standardized.take(validation), strata),
        test=strata_of(standardized.take(test), strata),
        tasks=tuple(tasks),
        scale=deviation * factors,
    )


# --- 10,000 molecules with RI-MP2 ---------------------------------------------------------------


def load_rimp2(data_dir: str | Path | None, strata: int = 1) -> Split:
    """Returns 10,000 molecules of QM9 with properties by RI-MP2 in the basis def2-TZVP.

    Eleven targets that are no copies of each other: nuclear repulsion and kinetic energy without
    what the composition tells, the virial ratio, the correlation energy (RI-MP2 less SCF), the
    dipole, the energies of HOMO and LUMO and the gap between them, the binding energy, the largest
    and the smallest charge of an atom (Mulliken, which is no input). Bonds are guessed.

    Args:
      data_dir: Folder with ``qm9_rimp2_10k.npz``.
      strata: Parts by size.

    Returns:
      A ```Split``` of 8,000, 1,000 and 1,000.

    Raises:
      FileNotFoundError: The file is not there.
      ValueError: An array or a property is missing, or of another shape, type or range.
    """
    name = "qm9_rimp2_10k.npz"
    path = Path(data_dir or "") / name
    if not data_dir or not path.exists():
        raise FileNotFoundError(_wanted(name, data_dir))
    arrays = read_npz(path)
    missing = {"numbers", "positions", "mulliken", "properties", "keys"} - arrays.keys()
    if missing:
        raise ValueError(
            f"expected arrays {sorted(missing)} in {path}, got {sorted(arrays)}; take the file as "
            "published"
        )
    dims = {"numbers": 2, "keys": 1}
    for key, dim in dims.items():
        if arrays[key].ndim != dim:
            raise ValueError(
                f"expected {key} with {dim} axes in {path}, got the shape {arrays[key].shape}; "
                "take the file as published"
            )
    (n, a), keys = arrays["numbers"].shape, [str(key) for key in arrays["keys"]]
    shapes = {"positions": (n, a, 3), "mulliken": (n, a), "properties": (n, len(keys))}
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            raise ValueError(
                f"expected {key} of shape {shape} in {path}, got {arrays[key].shape}; take the "
                "file as published"
            )
    for key, kinds in (
        ("numbers", "iu"),
        ("positions", "f"),
        ("mulliken", "f"),
        ("properties", "f"),
    ):
        if arrays[key].dtype.kind not in kinds:
            kind = "integers" if kinds == "iu" else "floats"
            raise ValueError(
                f"expected {key} of {kind} in {path}, got {arrays[key].dtype}; take the file as "
                "published"
            )
    numbers, positions = arrays["numbers"].astype(np.int64), arrays["positions"]
    odd = sorted(set(np.unique(numbers).tolist()) - {0, *ELEMENTS})
    if odd:
        raise ValueError(
            f"expected numbers of H, C, N, O and F, and 0 where there is no atom, in {path}, got "
            f"{odd}; take the file as published"
        )
    if (numbers[:, 0] == 0).any() or (np.diff(numbers > 0, axis=1) & (numbers[:, 1:] > 0)).any():
        raise ValueError(
            f"expected the atoms of every molecule first in numbers of {path}, got zeros before "
            "them; move the padding behind them"
        )
    present = numbers > 0
    for key in ("positions", "mulliken", "properties"):
        values = arrays[key] if key == "properties" else arrays[key][present]
        if not np.isfinite(values).all():
            raise ValueError(
                f"expected finite {key} in {path}, got others; leave such molecules out"
            )
    if n < 10 * strata:
        raise ValueError(
            f"expected at least {10 * strata} molecules for parts of {strata} sizes in {path}, got "
            f"{n}; take the file as published"
        )
    wanted = (
        *("nuclear_repulsion", "kinetic", "virial", "final_energy", "scf_total"),
        *("dipole_mp2_relaxed_au", "homo", "lumo", "ref_binding"),
    )
    absent = [key for key in wanted if key not in keys]
    if absent:
        raise ValueError(
            f"expected the properties {absent} in {path}, got {keys}; take the file as published"
        )
    of = {key: arrays["properties"][:, keys.index(key)] for key in wanted}
    charges = np.where(numbers > 0, arrays["mulliken"], np.nan)
    targets = [
        of["nuclear_repulsion"],
        of["kinetic"],
        of["virial"],
        of["final_energy"] - of["scf_total"],
        of["dipole_mp2_relaxed_au"],
        of["homo"],
        of["lumo"],
        of["lumo"] - of["homo"],
        of["ref_binding"],
        np.nanmax(charges, axis=1),
        np.nanmin(charges, axis=1),
    ]
    bonds = guess_bonds(numbers, positions)
    sizes = (numbers > 0).sum(axis=1).astype(np.int32)
    nodes = features(numbers, bonds)
    molecules = Molecules(nodes, positions, bonds, sizes, np.stack(targets, axis=1))
    return split_of(molecules, RIMP2_TASKS, n // 10, strata, COMPOSED)


def _wanted(name: str, data_dir: str | Path | None) -> str:
    where = f"in {data_dir}" if data_dir else "and a folder with it"
    return f"expected {name} {where}, which is not there; name its folder with --data-dir"


def make_up(tasks: Sequence[Task], number: int, strata: int) -> Split:
    """Returns made-up molecules for smoke runs: random chains, targets that depend on them."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 8, number).astype(np.int32)
    present = np.arange(7) < sizes[:, None]
    numbers = np.where(present, rng.choice(ELEMENTS[:4], (number, 7)), 0)
    positions = np.cumsum(rng.normal(0, 0.8, (number, 7, 3)), axis=1) * present[..., None]
    bonds = guess_bonds(numbers, positions)
    nodes = features(numbers, bonds)
    told = np.stack([numbers.sum(1), (bonds > 0).sum((1, 2)), np.ptp(positions, 1).max(1)], axis=1)
    targets = told @ rng.normal(size=(3, len(tasks))) + rng.normal(size=(number, len(tasks)))
    molecules = Molecules(nodes, positions.astype(np.float32), bonds, sizes, targets)
    return split_of(molecules, tasks, number // 5, strata)
