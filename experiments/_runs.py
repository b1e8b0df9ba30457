"""What every study shares: records as JSON lines, where they were made, and means with errors."""

import json
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmtl

Record = dict[str, Any]


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
