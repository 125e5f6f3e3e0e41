"""How often scores order answers as rankings do."""

from __future__ import annotations

import numpy as np

from llmjax.errors import UserError


def pair_accuracy(scores_NK: np.ndarray, ranks_NK: np.ndarray) -> float:
    """How often `scores` (N, K), higher is better, order a pair as `ranks` (N, K), lower is better, do.

    Over all pairs within a row whose ranks differ; equal scores count half; answers of rank -1 are not there. NaN if no pair
    differs in rank.
    """
    right, total = _pairs(scores_NK, ranks_NK)
    return float(right.sum() / total.sum()) if total.sum() else float("nan")


def pair_accuracy_error(scores_NK: np.ndarray, ranks_NK: np.ndarray) -> float:
    """Standard error of `pair_accuracy`, clustered by ranking: the pairs of one prompt are not independent.

    That of a ratio of sums over rankings (Cochran 1977, Sampling Techniques, eq. 6.13). NaN for fewer than two rankings.
    """
    right, total = _pairs(scores_NK, ranks_NK)
    right, total = right[total > 0], total[total > 0]
    n = len(total)
    if n < 2:
        return float("nan")
    residuals = right - right.sum() / total.sum() * total
    return float(np.sqrt(n / (n - 1) * np.sum(residuals**2)) / total.sum())


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
