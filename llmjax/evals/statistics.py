"""Means, shares and differences with errors that know which observations belong together.

Answers to six phrasings of one question are one observation of what a model knows, not six: all errors here are those of a sum
over independent groups, of which the members may depend on one another in any way.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np


def clustered_ratio(numerator_N: np.ndarray, denominator_N: np.ndarray, groups: Sequence[Hashable]) -> tuple[float, float]:
    """sum(numerator) / sum(denominator) and its standard error, clustered by group.

    The linearised error of a ratio of group totals (Cochran 1977, Sampling Techniques, eq. 6.13). Groups without a
    denominator do not count. NaN for no denominator; the error is NaN for fewer than two groups.
    """
    return clustered_mean_of_ratios([(numerator_N, denominator_N)], groups)


def clustered_mean_of_ratios(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """The mean of several ratios over the same N observations, each a (numerator [N], denominator [N]), whatever their sizes,
    and its standard error, clustered by group: `clustered_ratio` of one, with the same rules for each part."""
    _, which = np.unique([str(group) for group in groups], return_inverse=True)
    size = int(which.max(initial=-1)) + 1
    mean, influence, counted = 0.0, np.zeros(size), np.zeros(size, bool)
    for numerator, denominator in parts:
        above, below = (np.bincount(which, np.asarray(x, np.float64), minlength=size) for x in (numerator, denominator))
        whole = below.sum()
        if not whole:
            return math.nan, math.nan
        ratio = above[below != 0].sum() / whole
        mean += float(ratio) / len(parts)
        influence += np.where(below != 0, above - ratio * below, 0.0) / (abs(whole) * len(parts))
        counted |= below != 0
    n = int(counted.sum())
    return mean, float(np.sqrt(n / (n - 1) * np.sum(influence**2))) if n > 1 else math.nan


def clustered_mean(values_N: Sequence[float] | np.ndarray, groups: Sequence[Hashable]) -> tuple[float, float]:
    """The mean of N values and its standard error, clustered by group. For the difference of two models give the differences
    of their values on the same prompts."""
    values = np.asarray(values_N, np.float64)
    return clustered_ratio(values, np.ones_like(values), groups)
