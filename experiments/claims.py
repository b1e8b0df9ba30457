"""What papers claim beside what records say: verdicts, means with errors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Claim(NamedTuple):
    """One statement of a paper and what became of it here."""

    claim: str  # what the paper says, in a sentence
    source: str  # paper and table, figure or theorem
    paper: str  # its number; "" where it gives none
    ours: str  # the same quantity here, mean ± standard error
    differs: str  # here from the paper's set-up: data, sizes, epochs, seeds; "" where nothing does
    verdict: str  # one of VERDICTS, decided by the records and not by hand


NO_DATA = "no data"  # no record can decide it yet; ``ours`` is the command that would
VERDICTS = ("reproduced", "partly", "not", NO_DATA)


def judge(conditions: Iterable[bool]) -> str:
    """Returns the verdict: every condition of a claim holds, some do, or none."""
    held = list(conditions)
    return "reproduced" if all(held) else "partly" if any(held) else "not"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard error of the mean (nan for a single value, and beside infinity)."""
    n = len(values)
    is_known = n > 1 and bool(np.all(np.isfinite(values)))
    error = np.std(values, ddof=1) / np.sqrt(n) if is_known else np.nan
    return float(np.mean(values)), float(error)


def above_error(values: Sequence[float]) -> bool:
    """Tells whether the mean is positive by more than its standard error."""
    mean, error = mean_and_error(values)
    return mean > error


def show(values: Sequence[float], *, digits: int, sign: str = "") -> str:
    """Returns "mean ± standard error"; with ``sign="+"`` the mean has its sign, 0 never a minus."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}z.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def listed(
    values: Mapping[str, Any], text: Callable[[Any], str] = str, separator: str = "; "
) -> str:
    """Returns "name value" of all."""
    return separator.join(f"{name} {text(value)}" for name, value in values.items())


def claim(
    text: str,
    source: str,
    ours: str,
    conditions: Iterable[bool],
    paper: str = "",
    differs: str = "",
) -> Claim:
    """Returns a claim with the verdict of its conditions."""
    return Claim(text, source, paper, ours, differs, judge(conditions))


def not_runnable(
    text: str,
    source: str,
    command: str,
    paper: str = "",
    lacks: str = "data",
    differs: str = "",
) -> Claim:
    """Returns a claim that no record decides, with the command for who has what it takes.

    ``lacks`` is what is not at hand, "" where nothing but time is; ``differs`` what the command
    leaves different from the paper's set-up.
    """
    why = f"not runnable here: {lacks}" if lacks else "not run here"
    return Claim(text, source, paper, f"{why}; `{command}`", differs, NO_DATA)


def changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Returns "name our value in place of theirs" of all options of a paper that differ."""
    odd = {name: value for name, value in theirs.items() if ours[name] != value}
    return ", ".join(
        f"{name.replace('_', ' ')} {ours[name]} in place of {value}" for name, value in odd.items()
    )


def differing(claims: Iterable[Claim], differs: str) -> list[Claim]:
    """Returns claims with what differs from the set-up of their paper."""
    return [one._replace(differs=differs) for one in claims]
