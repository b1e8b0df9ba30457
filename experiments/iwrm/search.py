"""The search of learning rates: appendix C.1's, and one that walks over the same coarse rates."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

STEP = 10 ** (1 / 3)
DIVERGED = 2 * np.log(10)  # twice the loss of guessing, in the mean over all steps
COARSE = [10 ** (k / 3 - 5) for k in range(22)]
Evaluate = Callable[[Sequence[float]], Sequence[float]]  # a rate per seed -> an area per seed


def refined_rates(areas: dict[float, float], count: int = 50) -> list[float]:
    """Returns rates evenly spaced in the exponent around the two best of the coarse ones."""
    low, high = sorted(sorted(areas, key=lambda rate: areas[rate])[:2])
    return [float(r) for r in np.geomspace(low / STEP, high * STEP, count)]


def search_fully(evaluate: Evaluate, seeds: int) -> None:
    """Trains at the 72 rates of appendix C.1, chosen for each seed on its own."""
    areas: list[dict[float, float]] = [{} for _ in range(seeds)]
    for rate in COARSE:
        for found, area in zip(areas, evaluate([rate] * seeds), strict=True):
            found[rate] = area
    for rates in zip(*map(refined_rates, areas), strict=True):
        evaluate(rates)


def climb(evaluate: Callable[[float], float], start: float) -> float:
    """Returns the coarse rate of a local minimum of the area, found from ``start`` by neighbors.

    It is the best coarse rate wherever the area falls and then rises with the rate.
    """
    area = cache(lambda k: evaluate(COARSE[k]))
    k = round(3 * np.log10(start)) + 15
    while True:
        while not np.isfinite(area(k)):
            k -= 1
            if k < 0:
                raise ValueError("expected a rate at which the loss stays finite, got none")
        best = min((j for j in (k - 1, k + 1) if 0 <= j < len(COARSE)), key=area)
        if area(best) >= area(k):
            return COARSE[k]
        k = best


# Where the walk begins: this saves trainings and decides nothing, for the walk goes on from there.
STARTS = {
    "mean": 10 ** (-2 / 3),
    "mgda": 10 ** (-2 / 3),
    "dual_proj": 10**-1.0,
    "pcgrad": 10**-2.0,
    "graddrop": 10 ** (-7 / 3),
    "imtl_g": 10 ** (-2 / 3),
    "cagrad": 10 ** (-4 / 3),
    "rgw": 10**-1.0,
    "nash_mtl": 10 ** (-4 / 3),
    "aligned_mtl": 10 ** (-1 / 3),
    "upgrad": 10 ** (-4 / 3),
    "dual_proj_ridge_largest": 10 ** (-2 / 3),
    "upgrad_ridge_largest": 10**-1.0,
    "dual_proj_ridge": 10 ** (-2 / 3),
    "upgrad_ridge": 10**-1.0,
}
ADAM_START = 10 ** (-8 / 3)  # of every method
