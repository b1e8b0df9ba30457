"""What every study shares: records as JSON lines, means with errors, claims and verdicts.

A study is a module with ``COMMAND``, the command that made its committed results; ``main(argv)``;
``FIGURES``, the names of the figures that it draws; and ``claims(folder)``, what its papers say
beside what its result files in ``folder`` say. `experiments.report` asks for no more.
"""

import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

import jaxmtl

Record = dict[str, Any]


class Claim(NamedTuple):
    """One statement of a paper and what became of it here."""

    claim: str  # what the paper says, in a sentence
    source: str  # paper and table, figure or theorem
    paper: str  # its number; "" where it gives none
    ours: str  # the same quantity here, mean ± standard error
    verdict: str  # one of VERDICTS, decided by the records and not by hand


VERDICTS = ("reproduced", "partly", "not")


def judge(conditions: Iterable[bool]) -> str:
    """Return the verdict: every condition of a claim holds, some do, or none."""
    held = list(conditions)
    return "reproduced" if all(held) else "partly" if any(held) else "not"


def environment() -> Record:
    """Return versions of what computes, and the kind of device."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "optax", "flax")}
    return {
        "versions": versions | {"jaxmtl": jaxmtl.__version__},
        "device": f"{device.platform}: {device.device_kind}",
    }


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append one JSON line per record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record, sort_keys=True) + "\n" for record in records)


def read_records(path: Path) -> list[Record]:
    """Return the records of a results file, an empty list where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error of the mean (nan for a single value)."""
    n = len(values)
    error = np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(np.mean(values)), float(error)


def show(values: Sequence[float], *, digits: int) -> str:
    """Return "mean ± standard error"."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def make_console() -> Console:
    """Return a console that does not fold tables in a log file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = 130
    return console
