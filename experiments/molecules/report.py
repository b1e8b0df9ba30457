"""Tables, figures and verdicts of the molecules, from their results files alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.claims import Claim
from experiments.molecules.methods import SINGLE
from experiments.study import Record, Report


def baselines_of(records: Sequence[Record], num_tasks: int) -> Record | None:
    """Returns the errors (m,) of the single tasks, mean over seeds; None if a task is missing."""
    singles: list[list[Record]] = [[] for _ in range(num_tasks)]
    for record in records:
        if record["method"] == SINGLE:
            singles[record["task"]].append(record)
    if not all(singles):
        return None
    return {
        key: [float(np.mean([record[key][0] for record in task])) for task in singles]
        for key in ("validation_mae", "test_mae")
    }


def claims(folder: Path) -> list[Claim]:
    """Returns none yet."""
    return []


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns nothing yet."""
    return Report([], {})
