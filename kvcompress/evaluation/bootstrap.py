"""Confidence intervals by resampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Sum of numerators / sum of denominators, and an interval for it.

    Source: Efron, Bootstrap Methods, 1979; the percentile interval over samples.

    Args:
        numerators: one for each sample.
        denominators: the same; all 1 for a mean.
        seed: of the resampling.

    Returns:
        The value, and the bounds between which it lies for 95 % of 1,000 resamples of the samples.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    drawn = _resamples(len(above), seed)
    low, high = _bounds(above[drawn].sum(axis=1) / below[drawn].sum(axis=1))
    return float(above.sum() / below.sum()), low, high


def median_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """The median and an interval for it, as in `ratio_interval`."""
    given = np.asarray(values, dtype=np.float64)
    low, high = _bounds(np.median(given[_resamples(len(given), seed)], axis=1))
    return float(np.median(given)), low, high


def transformed(function: Callable[[float], float], interval: tuple[float, float, float]) -> tuple[float, float, float]:
    """The same interval on another scale; the function must grow."""
    value, low, high = interval
    return function(value), function(low), function(high)


def _resamples(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _bounds(found: np.ndarray) -> tuple[float, float]:
    outside = 50 * (1 - LEVEL)
    low, high = np.percentile(found, [outside, 100 - outside])
    return float(low), float(high)
