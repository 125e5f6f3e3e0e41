"""Rewards, advantages and whitening against loops that follow the papers."""

import jax
import numpy as np
import pytest
import tiny

from llmjax.objectives.policy import masked_mean
from llmjax.rl.advantages import gae, kl_rewards, whiten

B, R = 4, 6


def some_rows():
    rng = np.random.default_rng(0)
    lengths = np.array([R, 1, 3, 4])
    mask = (np.arange(R) < lengths[:, None]).astype(np.float32)
    log_probs, reference, rewards, values = rng.normal(size=(4, B, R)).astype(np.float32)
    return lengths, mask, log_probs, reference, rewards * mask, values * mask


def gae_by_loops(rewards, values, lengths, gamma, lam):
    advantages = np.zeros((B, R))
    for row, length in enumerate(lengths):
        for t in range(length):
            for later in range(t, length):
                next_value = values[row, later + 1] if later + 1 < length else 0.0
                delta = rewards[row, later] + gamma * next_value - values[row, later]
                advantages[row, t] += (gamma * lam) ** (later - t) * delta
    return advantages


def test_kl_rewards_by_loops():
    lengths, mask, log_probs, reference, _, _ = some_rows()
    scores = np.float32([1.5, -2.0, 0.0, 0.75])
    got = kl_rewards(scores, log_probs, reference, mask, 0.3)
    for row, length in enumerate(lengths):
        for t in range(R):
            expected = -0.3 * (log_probs[row, t] - reference[row, t]) + scores[row] * (t == length - 1)
            np.testing.assert_allclose(got[row, t], expected if t < length else 0.0, atol=1e-6)
    log_ratio = np.sum((log_probs - reference) * mask, axis=1)
    np.testing.assert_allclose(np.sum(got, axis=1), scores - 0.3 * log_ratio, atol=1e-5)


def test_a_score_arrives_exactly():
    _, mask, log_probs, _, _, _ = some_rows()
    got = np.asarray(kl_rewards(np.full(B, 0.75, np.float32), log_probs, log_probs, mask, 0.3))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.sum(axis=1), np.float32(0.75))
    np.testing.assert_array_equal((got != 0).sum(axis=1), 1)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_by_loops(gamma, lam):
    lengths, mask, _, _, rewards, values = some_rows()
    advantages, returns = jax.jit(gae)(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, gae_by_loops(rewards, values, lengths, gamma, lam), atol=1e-5)
    np.testing.assert_allclose(returns, (advantages + values) * mask, atol=1e-6)


def test_lambda_one_is_returns_to_go_minus_value():
    _, mask, _, _, rewards, values = some_rows()
    advantages, returns = jax.jit(gae)(rewards, values, mask, 1.0, 1.0)
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1] * mask
    np.testing.assert_allclose(advantages, to_go - values, atol=1e-5)
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


def test_lambda_zero_is_the_temporal_difference():
    _, mask, _, _, rewards, values = some_rows()
    advantages, _ = jax.jit(gae)(rewards, values, mask, 0.9, 0.0)
    after = np.pad(values, ((0, 0), (0, 1)))[:, 1:]
    np.testing.assert_allclose(advantages, mask * (rewards + 0.9 * after - values), atol=1e-5)


def test_what_lies_outside_the_mask_does_not_matter():
    _, mask, _, _, rewards, values = some_rows()
    expected = jax.jit(gae)(rewards, values, mask, 0.9, 0.8)
    got = jax.jit(gae)(rewards + 7 * (1 - mask), values - 9 * (1 - mask), mask, 0.9, 0.8)
    tiny.assert_trees_close(got, expected, 1e-6)
    assert np.all(np.asarray(got[0])[mask == 0] == 0) and np.all(np.asarray(got[1])[mask == 0] == 0)


def test_whitened_numbers_have_mean_zero_and_variance_one():
    _, mask, log_probs, _, _, _ = some_rows()
    x = 5 * log_probs + 3
    got = np.asarray(whiten(x, mask))[mask > 0]
    np.testing.assert_allclose(got.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(got.var(), 1, atol=1e-5)
    np.testing.assert_array_equal(np.argsort(got), np.argsort(x[mask > 0]))
    assert np.all(np.asarray(whiten(x, mask))[mask == 0] == 0)
    np.testing.assert_allclose(whiten(x + 100 * (1 - mask), mask), whiten(x, mask), atol=1e-5)
    assert np.all(np.isfinite(whiten(np.ones_like(x), mask)))


def test_masked_mean():
    assert masked_mean(np.float32([1, 2, 30]), np.float32([1, 1, 0])) == 1.5
    assert masked_mean(np.float32([1, 2]), np.zeros(2, np.float32)) == 0
