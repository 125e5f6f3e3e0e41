"""How often scores order answers as rankings do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmjax.errors import UserError
from llmjax.evals.statistics import clustered_mean_of_ratios, clustered_ratio


def pair_accuracy(scores_NK: np.ndarray, ranks_NK: np.ndarray) -> float:
    """How often `scores` (N, K), higher is better, order a pair as `ranks` (N, K), lower is better, do.

    Over all pairs within a row whose ranks differ; equal scores count half; answers of rank -1 are not there. NaN if no pair
    differs in rank.
    """
    right, total = _pairs(scores_NK, ranks_NK)
    return float(right.sum() / total.sum()) if total.sum() else float("nan")


def pair_accuracy_error(scores_NK: np.ndarray, ranks_NK: np.ndarray, groups: Sequence[str] | None = None) -> float:
    """Standard error of `pair_accuracy`, clustered by the `groups` [N] of the prompts, default each ranking by itself: the
    pairs of one prompt are not independent. NaN for fewer than two groups."""
    right, total = _pairs(scores_NK, ranks_NK)
    return clustered_ratio(right, total, range(len(total)) if groups is None else groups)[1]


def edit_accuracy(
    rewards_NK: np.ndarray, scores_NK: np.ndarray, edited_from_NK: np.ndarray, groups: Sequence[str]
) -> tuple[float, float]:
    """How often rewards put the better of two answers above the other, of which one is the other with one thing changed by a
    person, and the error of that, clustered by group. Equal rewards count half; pairs of equal or unknown `scores` not at all.

    The mean of two shares: of the pairs in which the edit made it worse, and of those in which it made it better. So a model
    that always prefers the answer that nobody edited, or always the other, is at chance (0.5). NaN without both sorts of pairs.
    """
    row, new = np.nonzero(edited_from_NK >= 0)
    old = edited_from_NK[row, new]
    sign = np.nan_to_num(np.sign(scores_NK[row, new] - scores_NK[row, old]))
    alike = 0.5 + 0.5 * sign * np.sign(rewards_NK[row, new] - rewards_NK[row, old])
    sorts = [(np.where(sign == way, alike, 0.0), sign == way) for way in (-1, 1)]
    return clustered_mean_of_ratios(sorts, [groups[int(i)] for i in row])


def _pairs(scores_NK: np.ndarray, ranks_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs ordered alike, ties of scores counting half, and pairs that are ranked, of each row, float64 [N]."""
    scores, ranks = np.asarray(scores_NK, np.float64), np.asarray(ranks_NK)
    if scores.shape != ranks.shape or scores.ndim != 2:
        raise UserError(f"scores {scores.shape} and ranks {ranks.shape}: both must be (prompts, answers)")
    i, j = np.triu_indices(scores.shape[1], k=1)
    there = (ranks[:, i] >= 0) & (ranks[:, j] >= 0)
    preferred = np.sign(ranks[:, j] - ranks[:, i]) * there
    alike = 0.5 + 0.5 * preferred * np.sign(scores[:, i] - scores[:, j])
    counted = preferred != 0
    return np.where(counted, alike, 0.0).sum(axis=1), counted.sum(axis=1).astype(np.float64)
