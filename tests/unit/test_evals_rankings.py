"""llmjax.evals.rankings: accuracy over pairs, and its error where the pairs of one prompt hang together."""

import itertools

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.evals.rankings import pair_accuracy, pair_accuracy_error


def by_hand(scores, ranks):
    """(pairs ordered alike, pairs) of each ranking, from the definition."""
    counts = []
    for row_scores, row_ranks in zip(scores, ranks):
        right, total = 0.0, 0
        for i, j in itertools.combinations(range(len(row_scores)), 2):
            if min(row_ranks[i], row_ranks[j]) < 0 or row_ranks[i] == row_ranks[j]:
                continue
            better, worse = (i, j) if row_ranks[i] < row_ranks[j] else (j, i)
            total += 1
            right += 0.5 if row_scores[i] == row_scores[j] else float(row_scores[better] > row_scores[worse])
        counts.append((right, total))
    return np.array(counts).T


def rankings(seed, n=300, k=5, agreement=1.0):
    """Random scores and ranks, ties in both, some answers missing; what is said of one prompt hangs together."""
    rng = np.random.default_rng(seed)
    liking = rng.normal(size=(n, 1)) * agreement
    truth = rng.normal(size=(n, k))
    scores = np.round(liking * truth + rng.normal(size=(n, k)), 0)
    ranks = np.argsort(np.argsort(-truth, axis=1), axis=1) // rng.integers(1, 3, size=(n, 1))
    ranks[np.arange(k) >= rng.integers(1, k + 1, size=(n, 1))] = -1
    return scores, ranks


def test_ties_count_half_and_undecided_pairs_are_skipped():
    ranks = np.array([[0, 1, 2]])
    assert pair_accuracy(np.array([[3.0, 2.0, 1.0]]), ranks) == 1
    assert pair_accuracy(np.array([[1.0, 2.0, 3.0]]), ranks) == 0
    assert pair_accuracy(np.array([[3.0, 1.0, 1.0]]), ranks) == pytest.approx(2.5 / 3)
    assert pair_accuracy(np.array([[3.0, 1.0, 2.0]]), np.array([[0, 0, 2]])) == pytest.approx(0.5)
    assert np.isnan(pair_accuracy(np.ones((1, 2)), np.zeros((1, 2), int)))


def test_answers_that_are_not_there_count_for_nothing():
    scores = np.array([[1.0, 2.0, 99.0, -99.0], [5.0, 1.0, 3.0, 0.0]])
    ranks = np.array([[1, 0, -1, -1], [0, 2, 1, -1]])
    assert pair_accuracy(scores, ranks) == 1
    assert pair_accuracy(scores[:, :2], ranks[:, :2]) == 1
    assert np.isnan(pair_accuracy(scores, np.full((2, 4), -1)))
    scores[0, 0] = 3.0
    assert pair_accuracy(scores, ranks) == 3 / 4
    scores[0, 2] = np.nan  # what stands there does not matter
    assert pair_accuracy(scores, ranks) == 3 / 4


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_is_that_of_the_definition(seed):
    scores, ranks = rankings(seed)
    right, total = by_hand(scores, ranks)
    assert pair_accuracy(scores, ranks) == pytest.approx(right.sum() / total.sum(), abs=1e-12)
    assert 0.3 < right.sum() / total.sum() < 0.7 and (total == 0).any() and (right % 1 == 0.5).any()


def test_error_by_hand():
    """Four prompts of one pair each: the binomial error, with n - 1."""
    scores = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranks = np.tile([0, 1], (4, 1))
    assert pair_accuracy_error(scores, ranks) == pytest.approx(np.sqrt(0.75 * 0.25 / 3), abs=1e-12)
    # Of one prompt with three pairs right and one with one pair wrong, p = 3/4: residuals 3 - 9/4 and 0 - 3/4.
    scores, ranks = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 0.0]]), np.array([[0, 1, 2], [0, 1, -1]])
    assert pair_accuracy(scores, ranks) == 0.75
    assert pair_accuracy_error(scores, ranks) == pytest.approx(np.sqrt(2 * (0.75**2 + 0.75**2)) / 4, abs=1e-12)


@pytest.mark.parametrize("agreement", [0.0, 1.0, 3.0])
def test_error_is_that_of_a_bootstrap_over_prompts(agreement):
    scores, ranks = rankings(7, n=400, agreement=agreement)
    right, total = by_hand(scores, ranks)
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, len(right), size=(4000, len(right)))
    spread = np.std(right[drawn].sum(axis=1) / total[drawn].sum(axis=1))
    error = pair_accuracy_error(scores, ranks)
    assert error == pytest.approx(spread, rel=0.06)
    p = right.sum() / total.sum()
    naive = np.sqrt(p * (1 - p) / total.sum())
    assert (error > 1.3 * naive) == (agreement > 0), "pairs of one prompt are not independent"


def test_error_is_that_of_repeated_experiments():
    estimates, errors = [], []
    for seed in range(200):
        scores, ranks = rankings(100 + seed, n=150, agreement=2.0)
        estimates.append(pair_accuracy(scores, ranks))
        errors.append(pair_accuracy_error(scores, ranks))
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_rankings_without_a_pair_change_no_error():
    scores, ranks = rankings(3, n=50)
    more = np.concatenate([scores, scores]), np.concatenate([ranks, np.full_like(ranks, -1)])
    assert pair_accuracy_error(*more) == pytest.approx(pair_accuracy_error(scores, ranks), abs=1e-12)
    # The same said twice as often is not twice as sure, up to n - 1.
    assert pair_accuracy_error(np.tile(scores, (4, 1)), np.tile(ranks, (4, 1))) == pytest.approx(
        pair_accuracy_error(scores, ranks) / 2, rel=0.02
    )


def test_one_ranking_has_no_error():
    assert np.isnan(pair_accuracy_error(np.array([[1.0, 0.0]]), np.array([[0, 1]])))
    assert np.isnan(pair_accuracy_error(np.ones((3, 2)), np.array([[0, 1], [0, 0], [-1, 0]])))
    assert np.isnan(pair_accuracy_error(np.ones((2, 2)), np.zeros((2, 2), int)))


def test_shapes_that_do_not_fit_are_one_line():
    for measure in (pair_accuracy, pair_accuracy_error):
        for scores, ranks in ((np.ones((1, 2)), np.zeros((1, 3), int)), (np.ones(2), np.zeros(2, int))):
            with pytest.raises(UserError, match="prompts, answers"):
                measure(scores, ranks)
