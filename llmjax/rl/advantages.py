"""From scores to advantages: per-token rewards with the KL penalty, GAE, whitening, comparison within a group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.objectives.policy import masked_mean
from llmjax.sharding import constrain
from llmjax.typing import Array, Float


def kl_rewards(
    scores_B: Float[Array, "B"],
    log_probs_BR: Float[Array, "B R"],
    ref_log_probs_BR: Float[Array, "B R"],
    mask_BR: Float[Array, "B R"],
    kl_coef: float,
) -> Float[Array, "B R"]:
    """r_t = -kl_coef * (log pi - log ref)_t, plus the score at the last response token (Ziegler et al. 2019,
    arXiv:1909.08593, eq. 2; the estimator k1, the only one whose gradient as a reward is that of KL(pi || ref)).

    mask: 1 on response tokens up to and including the end of turn. The row sums are score - kl_coef * log-ratio.
    """
    last_BR = mask_BR * (jnp.cumsum(mask_BR[:, ::-1], axis=1)[:, ::-1] == 1)
    return mask_BR * (-kl_coef * (log_probs_BR - ref_log_probs_BR)) + last_BR * scores_B[:, None]


def gae(
    rewards_BR: Float[Array, "B R"],
    values_BR: Float[Array, "B R"],
    mask_BR: Float[Array, "B R"],
    gamma: float,
    gae_lambda: float,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Generalised advantage estimates and returns A + V (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lambda A_{t+1}. The value after the last response token is 0,
    also when the response was cut off by the length limit. Zero outside the mask.
    """

    def step(carry, now):
        advantage, next_value = carry
        reward, value, mask = now
        advantage = mask * (reward + gamma * next_value - value + gamma * gae_lambda * advantage)
        return (advantage, mask * value), advantage

    start = (jnp.zeros_like(values_BR[:, 0]), jnp.zeros_like(values_BR[:, 0]))
    _, advantages_RB = jax.lax.scan(step, start, (rewards_BR.T, values_BR.T, mask_BR.T), reverse=True)
    advantages_BR = advantages_RB.T
    return advantages_BR, mask_BR * (advantages_BR + values_BR)


def whiten(x: Array, mask: Array, eps: float = 1e-8) -> Array:
    """x shifted and scaled to mean 0 and variance 1 over the masked entries of the whole batch; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean(jnp.square(x - mean), mask)
    return mask * (x - mean) * jax.lax.rsqrt(variance + eps)


def group_advantages(scores_B: Float[Array, "B"], group_size: int, scale: bool, eps: float = 1e-6) -> Float[Array, "B"]:
    """Each score minus the mean of its group of `group_size` neighbours, divided by the group's standard deviation if `scale`
    (DeepSeekMath, arXiv:2402.03300, section 4.1.1; without scale Dr. GRPO, arXiv:2503.20783).

    0 throughout a group of equal scores. The deviation is that of the group itself (divided by its size).
    """
    groups = constrain(scores_B, ".").reshape(-1, group_size)
    groups = groups - groups[:, :1]  # so that equal scores are 0, exactly
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    if scale:
        centred = centred / (jnp.std(groups, axis=1, keepdims=True) + eps)
    return centred.reshape(-1)
