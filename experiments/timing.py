"""The one timer: programs take turns in one run, so that a busy machine disturbs them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Program(NamedTuple):
    """Something to time, with what its compiler counts."""

    run: Callable[[], Any]  # starts the program and returns what it computes
    flops: float | None = None  # compiled operations; the body of a loop counts once
    bytes: int | None = None  # of temporary memory


def flops_of(executable: Any) -> float | None:
    """Returns the compiled operations, None where the compiler does not count them."""
    flops: float | None = (executable.cost_analysis() or {}).get("flops")
    return flops


def ratio_of(flops: float | None, base: float | None) -> float | None:
    """Returns the ratio of operations, None where one is unknown."""
    return flops / base if flops and base else None


def compiled(function: Callable[..., Any], *args: Any) -> Program:
    """Returns a function of arrays, compiled for these arguments."""
    executable = jax.jit(function).lower(*args).compile()
    memory = executable.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else None
    return Program(lambda: executable(*args), flops_of(executable), temporary)


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Times programs in turn until each ran ``repeats`` times or for so many ``seconds``.

    Short ones are timed three times a turn, after two runs that are not, so that none pays for the
    cold caches and returned pages that a larger one before it leaves behind.

    Returns:
      The seconds of every timed run, in order; at least two of each program if ``repeats`` allows.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            found = times[name]
            if len(found) >= repeats or (sum(found) > seconds and len(found) >= 2):
                continue
            short = not found or found[-1] < 0.1
            for i in range(5 if short else 1):
                began = time.perf_counter()
                jax.block_until_ready(run())
                if i >= 2 or not short:
                    found.append(time.perf_counter() - began)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Returns the median of the ratios of times that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(times, base, strict=False))
