"""The PPO objective on a batch of scored responses: clipped policy loss and clipped value loss."""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
from flax import struct

from llmjax.models.config import ModelConfig
from llmjax.models.heads import ScalarModel, scalar_model_spec, scalars
from llmjax.models.moe import router_loss, router_metrics
from llmjax.models.transformer import Params, hidden_states, logits, transformer_spec
from llmjax.objectives.lm import token_log_probs
from llmjax.typing import Array


class PPOLossConfig(Protocol):
    """What the loss reads of a PPO stage's config."""

    clip_ratio: float
    value_clip: float
    vf_coef: float
    temperature: float


@struct.dataclass
class ActorCritic:
    """The two networks that PPO trains; they share nothing."""

    policy: Params
    critic: ScalarModel


def actor_critic_spec(cfg: ModelConfig) -> ActorCritic:
    """The `ParamSpec` of every leaf of both networks."""
    return ActorCritic(policy=transformer_spec(cfg), critic=scalar_model_spec(cfg))


def response_log_probs(params: Params, batch: dict[str, Array], cfg: ModelConfig, temperature: float):
    """log-probability and entropy [B, R] of each response token under the policy that sampled at `temperature`.

    batch: tokens, segment_ids, positions [B, P + R]: a prompt padded on the left to P, and R response tokens.
    mask [B, R] gives R. The logits at place i predict token i + 1. Also returns router statistics.
    """
    response = batch["mask"].shape[1]
    x_BTD, _, stats = hidden_states(
        params, batch["tokens"], cfg, positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
    )
    logits_BRV = logits(params, x_BTD[:, -response - 1 : -1], cfg)
    log_probs_BR, entropy_BR = token_log_probs(logits_BRV, batch["tokens"][:, -response:], temperature)
    return log_probs_BR, entropy_BR, stats


def response_values(params: ScalarModel, batch: dict[str, Array], cfg: ModelConfig):
    """Critic values [B, R] of the state before each response token, and router statistics."""
    response = batch["mask"].shape[1]
    values_BT, stats = scalars(
        params, batch["tokens"], cfg, positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
    )
    return values_BT[:, -response - 1 : -1], stats


def ppo_loss(
    params: ActorCritic, batch: dict[str, Array], key, cfg: ModelConfig, ppo: PPOLossConfig
) -> tuple[Array, dict[str, Array]]:
    """Clipped surrogate and clipped value loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7 and 9), token means.

    batch: as in `response_log_probs`, and old_log_probs, advantages, returns, old_values [B, R] float32. Returns
    policy + vf_coef * value (+ router losses) and metrics. On the first minibatch of a rollout the ratio is exactly 1.
    key: unused, there is no dropout.
    """
    del key
    mask_BR = batch["mask"]
    num_tokens = jnp.maximum(jnp.sum(mask_BR), 1.0)

    def mean(x_BR):
        return jnp.sum(x_BR * mask_BR) / num_tokens

    log_probs_BR, entropy_BR, policy_stats = response_log_probs(params.policy, batch, cfg, ppo.temperature)
    log_ratio_BR = jnp.clip((log_probs_BR - batch["old_log_probs"]) * mask_BR, -20.0, 20.0)
    ratio_BR = jnp.exp(log_ratio_BR)
    clipped_BR = jnp.clip(ratio_BR, 1 - ppo.clip_ratio, 1 + ppo.clip_ratio)
    advantages_BR = batch["advantages"]
    policy_loss = mean(jnp.maximum(-advantages_BR * ratio_BR, -advantages_BR * clipped_BR))

    values_BR, critic_stats = response_values(params.critic, batch, cfg)
    near_BR = batch["old_values"] + jnp.clip(values_BR - batch["old_values"], -ppo.value_clip, ppo.value_clip)
    returns_BR = batch["returns"]
    errors_BR = jnp.maximum(jnp.square(values_BR - returns_BR), jnp.square(near_BR - returns_BR))
    value_loss = 0.5 * mean(errors_BR)

    loss = policy_loss + ppo.vf_coef * value_loss
    metrics = {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "ratio_max": jnp.max(jnp.where(mask_BR > 0, ratio_BR, 1.0)),
        "clip_fraction": mean((jnp.abs(ratio_BR - 1) > ppo.clip_ratio).astype(jnp.float32)),
        "approx_kl": 0.5 * mean(jnp.square(log_ratio_BR)),
        "entropy": mean(entropy_BR),
    }
    if policy_stats is None:
        return loss, metrics
    loss += router_loss(policy_stats, cfg.moe) + router_loss(critic_stats, cfg.moe)
    return loss, metrics | router_metrics(policy_stats)
