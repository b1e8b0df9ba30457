"""Tables, figures and verdicts of the faces, from their results files alone."""

import argparse
from pathlib import Path

from experiments.claims import Claim
from experiments.study import Report


def claims(folder: Path) -> list[Claim]:
    """Returns nothing yet."""
    return []


def report(folder: Path, args: argparse.Namespace) -> Report:
    """Returns nothing yet."""
    return Report([], {})
