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
    _, which = np.unique([str(group) for group in groups], return_inverse=True)
    above, below = (np.bincount(which, np.asarray(x, np.float64)) for x in (numerator_N, denominator_N))
    above, below = above[below != 0], below[below != 0]
    n, whole = len(below), below.sum()
    if not n or not whole:
        return math.nan, math.nan
    ratio = above.sum() / whole
    if n < 2:
        return float(ratio), math.nan
    return float(ratio), float(np.sqrt(n / (n - 1) * np.sum((above - ratio * below) ** 2)) / abs(whole))


def clustered_mean(values_N: Sequence[float] | np.ndarray, groups: Sequence[Hashable]) -> tuple[float, float]:
    """The mean of N values and its standard error, clustered by group. For the difference of two models give the differences
    of their values on the same prompts."""
    values = np.asarray(values_N, np.float64)
    return clustered_ratio(values, np.ones_like(values), groups)
