"""llmjax.evals.statistics: errors that know what belongs together."""

import numpy as np
import pytest

from llmjax.data.records import Completion, Prompt, user
from llmjax.evals.answers import Answers, report
from llmjax.evals.rankings import edit_accuracy
from llmjax.evals.statistics import clustered_mean, clustered_mean_of_ratios, clustered_ratio


def observations(seed, groups=120, between=1.0):
    """Values of unequal groups, of which the members hang together."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, size=groups)
    names = np.repeat([f"fact {i}" for i in range(groups)], sizes)
    common = np.repeat(between * rng.normal(size=groups), sizes)
    return names, (common + rng.normal(size=sizes.sum()) > 0).astype(float)


def bootstrap(names, *arrays, statistic, draws=4000):
    """Standard deviation of a statistic over groups drawn with replacement."""
    rng, own = np.random.default_rng(0), [np.flatnonzero(names == name) for name in np.unique(names)]
    found = []
    for _ in range(draws):
        rows = np.concatenate([own[i] for i in rng.integers(len(own), size=len(own))])
        found.append(statistic(*(array[rows] for array in arrays)))
    return np.std(found)


def test_by_hand():
    """Two groups, of two values and of one: mean 2/3, residual totals 2 - 4/3 and 0 - 2/3."""
    mean, error = clustered_mean([1.0, 1.0, 0.0], ["a", "a", "b"])
    assert mean == pytest.approx(2 / 3) and error == pytest.approx(np.sqrt(2 * 2 * (2 / 3) ** 2) / 3)


def test_groups_of_one_are_the_ordinary_error():
    values = np.random.default_rng(0).normal(size=50)
    mean, error = clustered_mean(values, range(50))
    assert (mean, error) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1) / np.sqrt(50)))


@pytest.mark.parametrize("between", [0.0, 1.0, 3.0])
def test_the_error_of_a_mean_is_that_of_a_bootstrap_over_groups(between):
    names, values = observations(1, between=between)
    assert clustered_mean(values, names)[1] == pytest.approx(bootstrap(names, values, statistic=np.mean), rel=0.06)


def test_the_error_of_a_paired_difference_is_that_of_a_bootstrap_over_groups():
    names, before = observations(2)
    after = np.where(np.random.default_rng(3).random(len(before)) < 0.2, 1 - before, before)
    got = clustered_mean(after - before, names)
    assert got[0] == pytest.approx(after.mean() - before.mean())
    assert got[1] == pytest.approx(bootstrap(names, after, before, statistic=lambda a, b: a.mean() - b.mean()), rel=0.06)
    assert got[1] < 0.6 * np.hypot(clustered_mean(after, names)[1], clustered_mean(before, names)[1]), "pairs help"


def test_the_error_of_a_ratio_is_that_of_a_bootstrap_over_groups():
    names, known = observations(4)
    kept = known * (np.random.default_rng(5).random(len(known)) < 0.8)
    ratio, error = clustered_ratio(kept, known, names)
    assert ratio == pytest.approx(kept.sum() / known.sum())
    assert error == pytest.approx(bootstrap(names, kept, known, statistic=lambda a, b: a.sum() / b.sum()), rel=0.06)


def test_nothing_and_one_group():
    assert np.isnan(clustered_mean([], [])).all()
    assert np.isnan(clustered_ratio([1.0], [0.0], ["a"])).all()
    mean, error = clustered_mean([1.0, 0.0], ["a", "a"])
    assert mean == 0.5 and np.isnan(error)


def test_answers_about_one_thing_are_one_observation():
    """The error of a score over ten wordings of each question is that over the questions."""
    prompts = [Prompt(f"{i}/{j}", user("?"), {"group": f"{i}"}) for i in range(20) for j in range(10)]
    right = np.random.default_rng(0).random(20) < 0.5
    answers = Answers(prompts, [()] * 200, [Completion(str(right[int(p.group)])) for p in prompts], np.zeros(200))
    metric, *_ = report({"right": lambda prompt, completion: completion.text == "True"}, answers)
    assert metric.value == right.mean() and metric.unit == "%"
    assert metric.error == pytest.approx(right.std(ddof=1) / np.sqrt(20))
    assert [Prompt("a", user("?")).group, Prompt("a", user("?"), {"group": "b"}).group] == ["a", "b"]


def test_edits_count_where_the_scores_differ():
    """Made worse by the edit: a pair ordered right, one wrong, one tied in reward; made better: one right. Two are left out."""
    own, edited = np.array([2.0, 0.0, 1.0, 0.0, 9.0, 9.0]), np.array([0.0, 1.0, 1.0, 3.0, 0.0, 0.0])
    rewards = np.stack([own, edited], axis=1)
    scores = np.array([[1.0, 0.1], [1.0, 0.1], [0.9, 0.1], [0.1, 0.7], [0.5, 0.5], [0.5, np.nan]])
    edited_from = np.array([[-1, 0]] * 6)
    share, error = edit_accuracy(rewards, scores, edited_from, list("abcdef"))
    assert share == pytest.approx((1.5 / 3 + 1) / 2) and error == pytest.approx(np.sqrt(4 / 3 * 0.5) / 3 / 2)
    assert edit_accuracy(-rewards, scores, edited_from, list("abcdef"))[0] == pytest.approx((1.5 / 3 + 0) / 2)
    assert np.isnan(edit_accuracy(rewards[:3], scores[:3], edited_from[:3], list("abc"))[0])  # none was made better
    assert np.isnan(edit_accuracy(rewards, scores, np.full((6, 2), -1), list("abcdef"))[0])


@pytest.mark.parametrize("rewards", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_to_prefer_what_nobody_edited_is_chance(rewards):
    """However many of the own answers were right."""
    scores = np.array([[1.0, 0.1]] * 9 + [[0.1, 1.0]])
    assert edit_accuracy(np.array([rewards] * 10), scores, np.array([[-1, 0]] * 10), list("abcdefghij"))[0] == 0.5


def test_error_of_a_mean_of_ratios_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    groups = rng.integers(40, size=300)
    first = rng.random(300) < 0.7
    right = rng.random(300) < np.where(first, 0.8, 0.4) + 0.1 * rng.normal(size=40)[groups]
    parts = [(right * first, first), (right * ~first, ~first)]
    mean, error = clustered_mean_of_ratios(parts, groups.tolist())
    rows = [np.flatnonzero(groups == g) for g in range(40)]
    drawn = []
    for _ in range(2000):
        i = np.concatenate([rows[g] for g in rng.integers(40, size=40)])
        drawn.append(np.mean([above[i].sum() / below[i].sum() for above, below in parts]))
    assert mean == pytest.approx(np.mean([right[first].mean(), right[~first].mean()]))
    assert error == pytest.approx(np.std(drawn), rel=0.1)
