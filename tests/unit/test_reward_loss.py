"""The ranking loss: all pairs of a prompt, and nothing but their order."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.generation.score import reward_of
from llmjax.objectives.reward import pairwise_ranking_loss, reward_loss
from llmjax.stages.reward import _way_up

both = pytest.mark.parametrize("name", tiny.crossed([("dense",)], tiny.MODELS))


def some_rankings(k: int, rows: int = 5):
    rng = np.random.default_rng(k)
    ranks = np.argsort(rng.random((rows, k)), axis=1)
    return rng.normal(size=(rows, k)).astype(np.float32) * 2, ranks.astype(np.int32)


def by_pairs(rewards, ranks):
    """Mean over prompts of the mean over strictly ranked pairs of -log sigmoid(better - worse)."""
    losses = []
    for r, rank in zip(rewards.astype(np.float64), ranks):
        pairs = []
        for i, j in itertools.combinations(range(len(r)), 2):
            sign = np.sign(rank[j] - rank[i])  # 1: i is better
            if sign and min(rank[i], rank[j]) >= 0:
                pairs.append(math.log1p(math.exp(-sign * (r[i] - r[j]))))
        if pairs:
            losses.append(np.mean(pairs))
    return np.mean(losses)


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_the_loss_is_the_mean_over_all_pairs(k):
    rewards, ranks = some_rankings(k)
    np.testing.assert_allclose(pairwise_ranking_loss(rewards, ranks)[0], by_pairs(rewards, ranks), rtol=1e-6)


def test_two_answers_are_the_bradley_terry_model():
    rewards, ranks = some_rankings(2)
    chosen = np.take_along_axis(rewards, np.argmin(ranks, axis=1)[:, None], axis=1)
    rejected = np.take_along_axis(rewards, np.argmax(ranks, axis=1)[:, None], axis=1)
    expected = np.mean(-np.log(1 / (1 + np.exp(-(chosen - rejected)))))
    np.testing.assert_allclose(pairwise_ranking_loss(rewards, ranks)[0], expected, rtol=1e-5)


def test_the_order_of_answers_does_not_matter():
    rewards, ranks = some_rankings(4)
    loss, accuracy = pairwise_ranking_loss(rewards, ranks)
    for order in itertools.permutations(range(4)):
        permuted = pairwise_ranking_loss(rewards[:, list(order)], ranks[:, list(order)])
        np.testing.assert_allclose(permuted, (loss, accuracy), rtol=1e-6)


def test_a_constant_added_to_the_rewards_of_a_prompt_changes_nothing():
    rewards, ranks = some_rankings(4)
    shifted = rewards + np.float32([[3], [-2], [0], [8], [1]])
    np.testing.assert_allclose(
        pairwise_ranking_loss(shifted, ranks), pairwise_ranking_loss(rewards, ranks), rtol=1e-5
    )


def test_gradients_of_a_prompt_sum_to_zero_and_point_the_right_way():
    rewards, ranks = some_rankings(4)
    grad = jax.grad(lambda r: pairwise_ranking_loss(r, ranks)[0])(rewards)
    np.testing.assert_allclose(np.sum(grad, axis=1), 0, atol=1e-7)
    best = np.take_along_axis(np.asarray(grad), np.argmin(ranks, axis=1)[:, None], axis=1)
    worst = np.take_along_axis(np.asarray(grad), np.argmax(ranks, axis=1)[:, None], axis=1)
    assert np.all(best < 0) and np.all(worst > 0)


def test_ties_say_nothing():
    rewards = np.float32([[0.3, -1.0, 2.0]])
    tied = np.int32([[0, 1, 1]])
    loss, accuracy = pairwise_ranking_loss(rewards, tied)
    pairs = [math.log1p(math.exp(-(0.3 - other))) for other in (-1.0, 2.0)]
    np.testing.assert_allclose(loss, sum(pairs) / 2, rtol=1e-6)
    assert accuracy == 0.5  # one of the two ranked pairs is right
    grad = jax.grad(lambda r: pairwise_ranking_loss(r, jnp.zeros((1, 3), jnp.int32))[0])(rewards)
    assert np.all(grad == 0)
    loss, accuracy = pairwise_ranking_loss(rewards, np.zeros((1, 3), np.int32))
    assert loss == 0 and np.isnan(accuracy)  # nothing was ranked: neither right nor wrong


def test_rankings_of_different_sizes_share_a_batch():
    rewards, _ = some_rankings(4, rows=4)
    ranks = np.int32([[0, 1, 2, 3], [1, 0, -1, -1], [0, 1, 1, -1], [0, 0, -1, -1]])
    loss, accuracy = pairwise_ranking_loss(rewards, ranks)
    np.testing.assert_allclose(loss, by_pairs(rewards, ranks), rtol=1e-6)
    alone = [pairwise_ranking_loss(rewards[i : i + 1, :size], ranks[i : i + 1, :size])[0] for i, size in enumerate((4, 2, 3))]
    np.testing.assert_allclose(loss, np.mean(alone), rtol=1e-6)
    anything = np.where(ranks < 0, 7.0, rewards).astype(np.float32)
    np.testing.assert_allclose(pairwise_ranking_loss(anything, ranks), (loss, accuracy), rtol=1e-6)
    grad = jax.grad(lambda r: pairwise_ranking_loss(r, ranks)[0])(rewards)
    assert np.all(np.asarray(grad)[ranks < 0] == 0) and np.all(np.asarray(grad)[3] == 0)


def test_equal_rewards_cost_ln_2_and_are_right_half_the_time():
    ranks = np.int32([[0, 1, 2, 3], [0, 1, 1, 2], [1, 0, -1, -1], [0, 0, 0, 0]])
    loss, accuracy = pairwise_ranking_loss(np.full((4, 4), 0.7, np.float32), ranks)
    np.testing.assert_allclose((loss, accuracy), (math.log(2), 0.5), rtol=1e-6)


def test_accuracy():
    ranks = np.int32([[0, 1, 2], [2, 0, 1]])
    assert pairwise_ranking_loss(np.float32([[3, 2, 1], [1, 3, 2]]), ranks)[1] == 1
    assert pairwise_ranking_loss(np.float32([[1, 2, 3], [3, 1, 2]]), ranks)[1] == 0
    assert pairwise_ranking_loss(np.zeros((2, 3), np.float32), ranks)[1] == 0.5
    np.testing.assert_allclose(pairwise_ranking_loss(np.float32([[3, 1, 2], [1, 3, 2]]), ranks)[1], 5 / 6)


def test_far_apart_rewards_stay_finite():
    rewards, ranks = np.float32([[-500, 500]]), np.int32([[0, 1]])
    loss, grad = jax.value_and_grad(lambda r: pairwise_ranking_loss(r, ranks)[0])(rewards)
    assert loss == 1000 and np.all(np.isfinite(grad))


@both
def test_the_reward_does_not_depend_on_padding_nor_on_other_rows(name):
    cfg = tiny.MODELS[name]
    params, text, width = tiny.scalar_model(cfg), tiny.tokens(cfg, 1, 6)[0], 14
    score = jax.jit(lambda p, t, s: reward_of(p, t, s, cfg)[0])
    lefts = range(0, width - 5, 2)  # the text at every place, between paddings
    segments = np.stack([np.pad(np.ones(6, np.int32), (left, width - 6 - left)) for left in lefts])
    tokens = np.stack([np.pad(text, (left, width - 6 - left), constant_values=9) for left in lefts])
    alone = score(params, text[None], np.ones((1, 6), np.int32))[0]
    np.testing.assert_allclose(score(params, tokens, segments), np.full(len(lefts), alone), atol=1e-5)
    tokens[1:], segments[1:] = tiny.tokens(cfg, len(lefts) - 1, width, seed=5), 1  # other neighbours
    got = score(params, tokens, segments)
    np.testing.assert_allclose(got[0], alone, atol=1e-5)
    assert np.all(np.abs(got[1:] - alone) > 1e-4)


@both
def test_the_loss_of_a_batch_is_that_of_its_rewards(name):
    cfg = tiny.MODELS[name]
    params, batch = tiny.scalar_model(cfg), tiny.rankings(cfg, 3, 4, 8)
    loss, metrics = jax.jit(lambda p: reward_loss(p, batch, None, cfg))(params)
    flat = batch["tokens"].reshape(12, 8), batch["segment_ids"].reshape(12, 8)
    rewards = np.asarray(jax.jit(lambda p: reward_of(p, *flat, cfg)[0])(params)).reshape(3, 4)
    np.testing.assert_allclose(metrics["loss"], by_pairs(rewards, batch["ranks"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_mean"], rewards.mean(), atol=1e-6)
    np.testing.assert_allclose(metrics["reward_std"], rewards.std(), rtol=1e-5)
    assert (loss == metrics["loss"]) if cfg.moe is None else (loss > metrics["loss"])


def test_the_way_from_chance_to_the_ceiling():
    assert (_way_up(0.5, 0.9), _way_up(0.9, 0.9), _way_up(0.6, 0.9)) == (0, 1, pytest.approx(0.25))
    assert math.isnan(_way_up(0.5, 0.5))
