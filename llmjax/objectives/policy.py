"""The pieces of policy-gradient losses: the two networks, the clipped surrogate, the clipped value loss."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from llmjax.generation.score import response_log_probs, response_values
from llmjax.models.config import ModelConfig
from llmjax.models.heads import ScalarModel, scalar_model_spec
from llmjax.models.transformer import Params, transformer_spec
from llmjax.typing import Array, Float


@struct.dataclass
class ActorCritic:
    """The networks that are trained; they share nothing. critic: None for algorithms without one."""

    policy: Params
    critic: ScalarModel | None


@struct.dataclass
class Scored:
    """What the networks say of responses now. log_probs, entropy (nats), values (None without a critic): float32 [B, R]."""

    log_probs: Array
    entropy: Array
    values: Array | None


def actor_critic_spec(cfg: ModelConfig, critic: bool = True) -> ActorCritic:
    """The `ParamSpec` of every leaf of both networks, or of the policy alone."""
    return ActorCritic(policy=transformer_spec(cfg), critic=scalar_model_spec(cfg) if critic else None)


def scored(params: ActorCritic, batch: dict[str, Array], cfg: ModelConfig, temperature: float) -> tuple[Scored, list]:
    """Both networks on the responses of `batch` (as in `response_log_probs`), and the router statistics of each, the policy's
    first; none for dense models."""
    log_probs_BR, entropy_BR, stats = response_log_probs(params.policy, batch, cfg, temperature)
    if params.critic is None:
        return Scored(log_probs_BR, entropy_BR, None), [stats]
    values_BR, critic_stats = response_values(params.critic, batch, cfg)
    return Scored(log_probs_BR, entropy_BR, values_BR), [stats, critic_stats]


def log_ratio(new_BR: Array, old_BR: Array, mask_BR: Array) -> Array:
    """log pi_new - log pi_old of each token, between -20 and 20, 0 outside the mask."""
    return jnp.clip((new_BR - old_BR) * mask_BR, -20.0, 20.0)


def clipped_surrogate(
    log_ratio_BR: Float[Array, "B R"], advantages_BR: Float[Array, "B R"], clip_low: float, clip_high: float
) -> Float[Array, "B R"]:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) of each token (Schulman et al. 2017, arXiv:1707.06347, eq. 7)."""
    ratio_BR = jnp.exp(log_ratio_BR)
    clipped_BR = jnp.clip(ratio_BR, 1 - clip_low, 1 + clip_high)
    return jnp.maximum(-advantages_BR * ratio_BR, -advantages_BR * clipped_BR)


def clipped_value_loss(values_BR: Array, old_values_BR: Array, returns_BR: Array, clip: float) -> Array:
    """Half the larger squared error of the value and of the value kept within `clip` of the old one, of each token."""
    near_BR = old_values_BR + jnp.clip(values_BR - old_values_BR, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values_BR - returns_BR), jnp.square(near_BR - returns_BR))


def ratio_metrics(log_ratio_BR: Array, mask_BR: Array, clip_low: float, clip_high: float) -> dict[str, Array]:
    """How far the policy has moved from the one that sampled: largest ratio, share of tokens clipped, approximate KL (nats)."""
    ratio_BR = jnp.exp(log_ratio_BR)
    outside_BR = (ratio_BR < 1 - clip_low) | (ratio_BR > 1 + clip_high)
    return {
        "ratio_max": jnp.max(jnp.where(mask_BR > 0, ratio_BR, 1.0)),
        "clip_fraction": masked_mean(outside_BR.astype(jnp.float32), mask_BR),
        "approx_kl": 0.5 * masked_mean(jnp.square(log_ratio_BR), mask_BR),
    }


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean of x where mask is 1."""
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)
