"""Multi-task tables: Census-Income with two labels, Yeast with fourteen.

Both come from OpenML by scikit-learn's ``fetch_openml`` (cached in its own folder), or from a
folder that holds them as ``.csv.gz`` files. Categories are kept as integers: a network takes those
of a batch as 0 and 1 (``features``), which are never stored.
"""

import csv
import gzip
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
CENSUS_TRAIN = 199_523  # rows of the donors' training file, which comes first
CENSUS_TASKS = ("income", "never married")

YEAST_TRAIN = 1_500  # rows of the first users' training set
YEAST_TASKS = tuple(f"class {i}" for i in range(1, 15))

TASKS = {"yeast": YEAST_TASKS, "census": CENSUS_TASKS}


class Table(NamedTuple):
    """Rows of a table."""

    codes: jax.Array  # (n, c) int32: which of the features 0..num_codes - 1 are 1
    numbers: jax.Array  # (n, d) float32, standardised
    labels: jax.Array  # (n, m) float32, 0 or 1


class Split(NamedTuple):
    """A table in three parts, whose rows are disjoint."""

    train: Table
    validation: Table
    test: Table
    num_codes: int
    tasks: tuple[str, ...]


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
    """
    if data_dir is None:
        columns = _openml_columns(_fetch(data_id=4535, target_column=None))
    else:
        names = ("census_income_kdd_train.csv.gz", "census_income_kdd_test.csv.gz")
        columns = _text_columns(row for name in names for row in _read(Path(data_dir) / name))
    return census_split(columns, CENSUS_TRAIN)


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
    """
    if data_dir is None:
        bunch = _fetch(name="yeast", version=4)
        numbers = np.asarray(bunch.data, np.float64)
        target = np.asarray(bunch.target).astype(str)
        labels = np.isin(target, ("TRUE", "True", "1")).astype(np.float64)
    else:
        rows = _read(Path(data_dir) / "yeast.csv.gz")
        values = np.asarray(list(rows)[1:], np.float64)
        numbers, labels = np.split(values, [-len(YEAST_TASKS)], axis=1)
    return yeast_split(numbers, labels, YEAST_TRAIN)


def yeast_split(numbers: np.ndarray, labels: np.ndarray, num_train: int) -> Split:
    """Returns the split of (n, d) numbers and (n, 14) labels."""
    first = np.random.default_rng(0).permutation(num_train)
    cut = num_train * 4 // 5
    parts = (first[:cut], first[cut:], np.arange(num_train, len(numbers)))
    codes = np.zeros((len(numbers), 0), np.int32)
    return _split(codes, numbers, labels, parts, 0, YEAST_TASKS)


# --- what both share ----------------------------------------------------------------------------


def _fetch(**which: Any) -> Any:
    from sklearn.datasets import fetch_openml  # slow to import

    # This parser and arrays in place of frames do without pandas.
    return fetch_openml(**which, as_frame=False, parser="liac-arff")


def _read(path: Path) -> Iterable[list[str]]:
    if not path.exists():
        raise FileNotFoundError(
            f"expected {path}, which is not there; leave --data-dir away to download it"
        )
    with gzip.open(path, "rt", newline="") as file:
        yield from csv.reader(file, skipinitialspace=True)


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
) -> Split:
    train = numbers[parts[0]]
    deviation = train.std(axis=0)
    numbers = (numbers - train.mean(axis=0)) / np.where(deviation > 0, deviation, 1)

    def rows(part: np.ndarray) -> Table:
        return Table(
            jnp.asarray(codes[part], jnp.int32),
            jnp.asarray(numbers[part], jnp.float32),
            jnp.asarray(labels[part], jnp.float32),
        )

    train_rows, validation, test = map(rows, parts)
    return Split(train_rows, validation, test, num_codes, tasks)


def make_up(tasks: tuple[str, ...], num_rows: int) -> Split:
    """Returns a made-up table for smoke runs: columns of both kinds, labels that depend on them."""
    from sklearn.datasets import make_multilabel_classification

    counts, labels = make_multilabel_classification(
        num_rows, n_features=12, n_classes=len(tasks), n_labels=len(tasks) // 2, random_state=0
    )
    codes = np.minimum(counts[:, :4], 9).astype(np.int32) + 10 * np.arange(4)
    parts = tuple(np.array_split(np.arange(num_rows), 3))
    return _split(codes, counts[:, 4:], labels, (parts[0], parts[1], parts[2]), 40, tasks)
