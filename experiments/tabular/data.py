"""Multi-task tables: Census-Income with two labels, Yeast with fourteen; three of regression.

The first two come from OpenML by scikit-learn's ``fetch_openml`` (cached in its own folder), or
from a folder that holds them as ``.csv.gz`` files. Categories are kept as integers: a network takes
those of a batch as 0 and 1 (``features``), which are never stored. The regressions (SARCOS, river
flow RF1, water quality) come from a folder alone.
"""

import csv
import gzip
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Column numbers of Census-Income (KDD), from its description at UCI.
INCOME, MARITAL, WEIGHT = 41, 7, 24
CONTINUOUS = (0, 5, 16, 17, 18, 30, 39)
MONEY = (5, 16, 17, 18)  # mostly 0, else up to 99,999
CENSUS_COLUMNS = 42
CENSUS_TRAIN = 199_523  # rows of the donors' training file, which comes first
CENSUS_TASKS = ("income", "never married")

YEAST_TRAIN = 1_500  # rows of the first users' training set
YEAST_TASKS = tuple(f"class {i}" for i in range(1, 15))
YEAST_COLUMNS = 103 + len(YEAST_TASKS)

# Inputs come first, targets last, in the published files.
RF1_TASKS = ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")  # 48 h ahead
WATER_TASKS = (
    *("25400", "29600", "30400", "33400", "17300", "19400", "34500", "38100", "49700"),
    *("50390", "55800", "57500", "59300", "37880"),
)
SARCOS_TASKS = tuple(f"torque {i}" for i in range(1, 8))
NUM_INPUTS = {"sarcos": 21, "rf1": 64, "water_quality": 16}

TASKS = {
    "yeast": YEAST_TASKS,
    "census": CENSUS_TASKS,
    "sarcos": SARCOS_TASKS,
    "rf1": RF1_TASKS,
    "water_quality": WATER_TASKS,
}


class Table(NamedTuple):
    """Rows of a table."""

    codes: jax.Array  # (n, c) int32: which of the features 0..num_codes - 1 are 1
    numbers: jax.Array  # (n, d) float32, standardized
    labels: jax.Array  # (n, m) float32: 0 or 1, or standardized targets of a regression


class Split(NamedTuple):
    """A table in three parts, whose rows are disjoint."""

    train: Table
    validation: Table
    test: Table
    num_codes: int
    tasks: tuple[str, ...]
    regression: bool = False


class Column(NamedTuple):
    """A column of text as a dictionary."""

    codes: np.ndarray  # (n,) int32
    names: list[str]  # what a code stands for


def features(table: Table, examples: jax.Array, num_codes: int) -> jax.Array:
    """Returns the inputs (b, num_codes + d) of examples (b,): categories as 0 and 1, numbers."""
    codes = table.codes[examples]
    blank = jnp.zeros((examples.size, num_codes))
    ones = blank.at[jnp.arange(examples.size)[:, None], codes].set(1)
    return jnp.concatenate([ones, table.numbers[examples]], axis=1)


# --- Census-Income ------------------------------------------------------------------------------


def load_census(data_dir: str | Path | None = None) -> Split:
    """Returns Census-Income (KDD) with the two labels of group 1 of Ma et al. 2018.

    Labels are an income above 50,000 and never having married. Inputs are all other columns but
    the survey's weight: 7 numbers and 32 categorical columns. Ma et al. test on one half of the
    donors' test file and choose on the other; so does this split.

    Args:
      data_dir: Folder with ``census_income_kdd_{train,test}.csv.gz``, without header, or None for
        OpenML's set 4535, whose rows are taken to be those of the two files in turn.

    Returns:
      A ```Split``` of 199,523, 49,881 and 49,881 rows.

    Raises:
      FileNotFoundError: A file is not in ``data_dir``.
      ValueError: It is no table of 42 columns, too short, or of other contents.
    """
    if data_dir is None:
        columns = _openml_columns(_fetch(data_id=4535, target_column=None))
    else:
        names = ("census_income_kdd_train.csv.gz", "census_income_kdd_test.csv.gz")
        columns = _text_columns(
            row for name in names for row in _read(Path(data_dir) / name, CENSUS_COLUMNS)
        )
        _check_census(columns, Path(data_dir))
    return census_split(columns, CENSUS_TRAIN)


def _check_census(columns: Sequence[Column], folder: Path) -> None:
    n = len(columns[0].codes) if columns else 0
    if n <= CENSUS_TRAIN + 1:
        raise ValueError(
            f"expected {CENSUS_TRAIN} rows for training and others behind them in {folder}, got "
            f"{n} in all; take both files whole"
        )
    for i in CONTINUOUS:
        for name in columns[i].names:
            _number(name, f"column {i + 1} of census_income_kdd in {folder}")
    for i, word in ((INCOME, "-"), (MARITAL, "Never married")):
        if not any(word in name for name in columns[i].names) or len(columns[i].names) < 2:
            raise ValueError(
                f"expected a label, with {word!r} in one of its values, in column {i + 1} of "
                f"census_income_kdd in {folder}, got {columns[i].names[:3]}; take the files of "
                "Census-Income (KDD), without header"
            )


def census_split(columns: Sequence[Column], num_train: int) -> Split:
    """Returns the split of the 42 columns; the first ``num_train`` rows are for training."""
    n = len(columns[0].codes)
    labels = np.stack(
        [
            _matches(columns[INCOME], lambda name: "-" not in name),  # "- 50000." or "50000+."
            _matches(columns[MARITAL], lambda name: name == "Never married"),
        ],
        axis=1,
    )
    numbers = []
    for i in CONTINUOUS:
        values = np.asarray([float(name) for name in columns[i].names])[columns[i].codes]
        numbers.append(np.log1p(values) if i in MONEY else values)
    coded, num_codes = [], 0
    for i, column in enumerate(columns):
        if i not in (INCOME, MARITAL, WEIGHT, *CONTINUOUS):
            coded.append(column.codes + num_codes)
            num_codes += len(column.names)
    held_out = np.random.default_rng(0).permutation(np.arange(num_train, n))
    half = len(held_out) // 2
    parts = (np.arange(num_train), held_out[:half], held_out[half:])
    return _split(np.stack(coded, 1), np.stack(numbers, 1), labels, parts, num_codes, CENSUS_TASKS)


# --- Yeast --------------------------------------------------------------------------------------


def load_yeast(data_dir: str | Path | None = None) -> Split:
    """Returns Yeast: 103 numbers of 2,417 genes and 14 functional classes, 1 to 75 % positive.

    Args:
      data_dir: Folder with ``yeast.csv.gz``, with header, or None for version 4 on OpenML.

    Returns:
      A ```Split``` of 1,200, 300 and 917 rows: the first 1,500 rows, of which a fifth, drawn at
      random, is for validation, and the rest.

    Raises:
      FileNotFoundError: The file is not in ``data_dir``.
      ValueError: It is no table of 103 numbers and 14 labels, or too short.
    """
    if data_dir is None:
        bunch = _fetch(name="yeast", version=4)
        numbers = np.asarray(bunch.data, np.float64)
        target = np.asarray(bunch.target).astype(str)
        labels = np.isin(target, ("TRUE", "True", "1")).astype(np.float64)
    else:
        path = Path(data_dir) / "yeast.csv.gz"
        rows = list(_read(path, YEAST_COLUMNS))[1:]
        if len(rows) <= YEAST_TRAIN:
            raise ValueError(
                f"expected a header, {YEAST_TRAIN} rows for training and others behind them in "
                f"{path}, got {len(rows)} in all; take the file whole"
            )
        values = np.array([[_number(cell, path) for cell in row] for row in rows])
        numbers, labels = np.split(values, [-len(YEAST_TASKS)], axis=1)
        if not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"expected labels 0 and 1 in the last {len(YEAST_TASKS)} columns of {path}, got "
                f"{np.unique(labels[~np.isin(labels, (0, 1))])[:3]}; put the classes last"
            )
    return yeast_split(numbers, labels, YEAST_TRAIN)


def yeast_split(numbers: np.ndarray, labels: np.ndarray, num_train: int) -> Split:
    """Returns the split of (n, d) numbers and (n, 14) labels."""
    first = np.random.default_rng(0).permutation(num_train)
    cut = num_train * 4 // 5
    parts = (first[:cut], first[cut:], np.arange(num_train, len(numbers)))
    codes = np.zeros((len(numbers), 0), np.int32)
    return _split(codes, numbers, labels, parts, 0, YEAST_TASKS)


# --- regressions --------------------------------------------------------------------------------


def load_sarcos(data_dir: str | Path | None = None) -> Split:
    """Returns SARCOS: the positions, velocities and accelerations of an arm to 7 joint torques.

    Args:
      data_dir: Folder with ``sarcos_inv_test.mat``, 4,449 rows, which are split, and possibly with
        ``sarcos_inv.mat``, 44,484 rows: those are then for training and validation, and the test
        rows are the published ones. (Many of these are known to be among the training rows.)

    Raises:
      FileNotFoundError: The file of the test rows is not there.
      ValueError: A file is no table of 28 columns of numbers under its own name.
    """
    paths = [Path(data_dir or "") / f"{name}.mat" for name in ("sarcos_inv_test", "sarcos_inv")]
    if not data_dir or not any(path.exists() for path in paths):
        raise FileNotFoundError(_wanted(paths[0].name, data_dir))
    if not paths[0].exists():
        raise FileNotFoundError(
            f"expected {paths[0].name} beside {paths[1].name} in {data_dir}, which is not there; "
            "the published test rows are in it"
        )
    tables = [_read_mat(path) for path in paths if path.exists()]
    if len({table.shape[1] for table in tables}) > 1:
        raise ValueError(
            f"expected as many columns in both files of {data_dir}, got "
            f"{[table.shape for table in tables]}; take the files as published"
        )
    test, *training = tables
    return regression_split("sarcos", np.concatenate([*training, test]), len(test) * len(training))


def _read_mat(path: Path) -> np.ndarray:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    broken = (MatReadError, ValueError, TypeError, OSError, EOFError, NotImplementedError)
    try:
        with path.open("rb") as file:
            found = loadmat(file)
    except (*broken, IndexError, struct.error, zlib.error) as error:
        raise ValueError(
            f"expected a file of MATLAB up to version 7.2 in {path}, got another one ({error}); "
            "fetch it anew"
        ) from None
    if path.stem not in found:
        names = sorted(name for name in found if not name.startswith("__"))
        raise ValueError(
            f"expected the variable {path.stem} in {path}, got {names}; take the file as published"
        )
    values = np.asarray(found[path.stem])
    if values.dtype.kind not in "fiu":
        raise ValueError(
            f"expected numbers as {path.stem} in {path}, got {values.dtype}; take the file as "
            "published"
        )
    return values.astype(np.float64)


def load_arff(dataset: str, data_dir: str | Path | None = None) -> Split:
    """Returns river flow or water quality, as published for multi-target regression.

    Of river flow (``rf1``) the 120 of 9,125 rows with a missing input are dropped.

    Args:
      dataset: ``"rf1"``: 64 inputs, 8 targets; ``"water_quality"``: 16 inputs, 14 targets.
      data_dir: Folder with ``rf1.arff`` or ``wq.arff``, also with ``.gz`` behind.

    Raises:
      FileNotFoundError: The file is not there.
      ValueError: It is no ARFF file of numbers, or has another number of columns.
    """
    from scipy.io.arff import ArffError, loadarff

    name = {"rf1": "rf1.arff", "water_quality": "wq.arff"}[dataset]
    paths = [Path(data_dir or "") / f"{name}{suffix}" for suffix in ("", ".gz")]
    path = next((path for path in paths if data_dir and path.exists()), None)
    if path is None:
        raise FileNotFoundError(_wanted(f"{name} or {name}.gz", data_dir))
    broken = (ArffError, ValueError, IndexError, OSError, EOFError, zlib.error, StopIteration)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            rows, about = loadarff(file)
    except (*broken, NotImplementedError) as error:
        raise ValueError(
            f"expected an ARFF file of numbers in {path}, got another one ({error or 'cut off'}); "
            "fetch it anew"
        ) from None
    odd = [name for name in about.names() if about[name][0] != "numeric"]
    if odd:
        raise ValueError(
            f"expected numeric attributes in {path}, got {odd[0]} of type {about[odd[0]][0]}; take "
            "the file as published"
        )
    return regression_split(dataset, np.asarray(rows.tolist(), np.float64))


def regression_split(dataset: str, values: np.ndarray, num_test: int = 0) -> Split:
    """Returns the split of a table of inputs and targets, without the rows that miss a value.

    The last ``num_test`` rows are the test rows, and a fifth of the others, drawn at random, are
    for validation; if there are none, a fifth of all rows is for each of the two.
    """
    inputs, tasks = NUM_INPUTS[dataset], TASKS[dataset]
    if values.ndim != 2 or values.shape[1] != inputs + len(tasks):
        raise ValueError(
            f"expected {inputs} inputs and {len(tasks)} targets in the columns of {dataset}, got "
            f"an array of shape {values.shape}; take the file as published"
        )
    if np.isinf(values).any():
        raise ValueError(
            f"expected finite numbers, or missing ones, in {dataset}, got infinite ones; take the "
            "file as published"
        )
    kept = ~np.isnan(values).any(axis=1)
    if num_test:
        num_test = int(kept[-num_test:].sum())
    values = values[kept]
    if len(values) - num_test < 5:
        raise ValueError(
            f"expected at least 5 rows without a missing value in {dataset}, got "
            f"{len(values) - num_test}; take the file as published"
        )
    order = np.random.default_rng(0).permutation(len(values) - num_test)
    test = np.arange(len(order), len(values))
    fifth = len(order) // 5
    if not num_test:
        order, test = order[fifth:], order[:fifth]
    numbers, labels = np.split(values, [inputs], axis=1)
    parts = order[fifth:], order[:fifth], test
    codes = np.zeros((len(values), 0), np.int32)
    return _split(codes, numbers, labels, parts, 0, tasks, regression=True)


def _wanted(name: str, data_dir: str | Path | None) -> str:
    where = f"in {data_dir}" if data_dir else "and a folder with it"
    return f"expected {name} {where}, which is not there; name its folder with --data-dir"


# --- what all share -----------------------------------------------------------------------------


def _fetch(**which: Any) -> Any:
    from sklearn.datasets import fetch_openml  # slow to import

    # This parser and arrays in place of frames do without pandas.
    return fetch_openml(**which, as_frame=False, parser="liac-arff")


def _read(path: Path, num_columns: int) -> Iterable[list[str]]:
    if not path.exists():
        raise FileNotFoundError(
            f"expected {path}, which is not there; leave --data-dir away to download it"
        )
    try:
        with gzip.open(path, "rt", newline="") as file:
            for number, row in enumerate(csv.reader(file, skipinitialspace=True), 1):
                if len(row) != num_columns:
                    raise ValueError(
                        f"expected {num_columns} columns in line {number} of {path}, got "
                        f"{len(row)}; take the file as published"
                    )
                yield row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise ValueError(
            f"expected a table of text, compressed by gzip, in {path}, got another file ({error}); "
            "fetch it anew"
        ) from None


def _number(cell: str, where: str | Path) -> float:
    try:
        if np.isfinite(number := float(cell)):
            return number
    except ValueError:
        pass
    raise ValueError(
        f"expected finite numbers in {where}, got {cell!r}; take the file as published"
    )


def _text_columns(rows: Iterable[list[str]]) -> list[Column]:
    # Row by row, so that the 12.5 million cells never exist as Python strings at once.
    dictionaries: list[dict[str, int]] = []
    coded = []
    for row in rows:
        dictionaries = dictionaries or [{} for _ in row]
        pairs = zip(dictionaries, row, strict=True)
        coded.append(np.array([d.setdefault(cell, len(d)) for d, cell in pairs], np.int32))
    codes = np.stack(coded, axis=1)
    return [Column(c, list(d)) for c, d in zip(codes, dictionaries, strict=True)]


def _openml_columns(bunch: Any) -> list[Column]:
    columns = []
    for name, values in zip(bunch.feature_names, np.asarray(bunch.data).T, strict=True):
        values = values.astype(np.float64)
        if name in (bunch.categories or {}):
            names = [str(category).strip() for category in bunch.categories[name]]
            missing = np.isnan(values)
            codes = np.where(missing, len(names), np.where(missing, 0, values)).astype(np.int32)
            columns.append(Column(codes, [*names, "?"]))
        else:
            found, places = np.unique(values, return_inverse=True)
            columns.append(Column(places.astype(np.int32), [str(value) for value in found]))
    return columns


def _matches(column: Column, is_positive: Any) -> np.ndarray:
    return np.asarray([is_positive(name) for name in column.names])[column.codes]


def _split(
    codes: np.ndarray,
    numbers: np.ndarray,
    labels: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    num_codes: int,
    tasks: tuple[str, ...],
    regression: bool = False,
) -> Split:
    def standardized(values: np.ndarray) -> np.ndarray:
        train = values[parts[0]]
        deviation = train.std(axis=0)
        return (values - train.mean(axis=0)) / np.where(deviation > 0, deviation, 1)

    numbers = standardized(numbers)
    labels = standardized(labels) if regression else labels

    def rows(part: np.ndarray) -> Table:
        return Table(
            jnp.asarray(codes[part], jnp.int32),
            jnp.asarray(numbers[part], jnp.float32),
            jnp.asarray(labels[part], jnp.float32),
        )

    train_rows, validation, test = map(rows, parts)
    return Split(train_rows, validation, test, num_codes, tasks, regression)


def make_up(tasks: tuple[str, ...], num_rows: int, *, regression: bool = False) -> Split:
    """Returns a made-up table for smoke runs: columns of both kinds, labels that depend on them."""
    from sklearn.datasets import make_multilabel_classification, make_regression

    first, second, third = np.array_split(np.arange(num_rows), 3)
    if regression:
        numbers, labels = make_regression(num_rows, 12, n_targets=len(tasks), random_state=0)
        codes = np.zeros((num_rows, 0), np.int32)
        return _split(codes, numbers, labels, (first, second, third), 0, tasks, regression)

    counts, labels = make_multilabel_classification(
        num_rows, n_features=12, n_classes=len(tasks), n_labels=len(tasks) // 2, random_state=0
    )
    codes = np.minimum(counts[:, :4], 9).astype(np.int32) + 10 * np.arange(4)
    return _split(codes, counts[:, 4:], labels, (first, second, third), 40, tasks)
