"""From prompts to scored experience: what PPO learns from in one iteration."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.generation.decode import Generation
from llmjax.models.config import ModelConfig
from llmjax.models.heads import ScalarModel
from llmjax.models.transformer import Params
from llmjax.objectives.ppo import ActorCritic, PPOLossConfig, response_log_probs, response_values
from llmjax.objectives.reward import reward_of
from llmjax.rl.advantages import gae, kl_rewards, masked_mean, whiten
from llmjax.typing import Array


class RolloutConfig(PPOLossConfig):
    """What scoring reads of a PPO stage's config, beside what the loss reads."""

    kl_coef: float
    gamma: float
    gae_lambda: float
    missing_end_penalty: float


def join_response(prompt_BT: Array, segment_ids_BT: Array, generation: Generation) -> dict[str, Array]:
    """Prompt (padded on the left) and response as one sequence: tokens, segment_ids, positions [B, P + R]; mask [B, R]."""
    segments_BT = jnp.concatenate([segment_ids_BT, generation.mask.astype(jnp.int32)], axis=1)
    return {
        "tokens": jnp.concatenate([prompt_BT, generation.tokens], axis=1),
        "segment_ids": segments_BT,
        "positions": jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0),
        "mask": generation.mask,
    }


def score_experience(
    params: ActorCritic,
    reference: Params,
    reward_model: ScalarModel,
    prompt_BT: Array,
    segment_ids_BT: Array,
    generation: Generation,
    cfg: ModelConfig,
    ppo: RolloutConfig,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The batch that `ppo_loss` takes, and metrics of the rollout.

    The score is the reward model's at the last response token; a response that did not end itself gets
    `missing_end_penalty` less (Stiennon et al. 2020). KL is measured and penalised against `reference` per token.
    """
    batch = join_response(prompt_BT, segment_ids_BT, generation)
    mask_BR = batch["mask"]
    log_probs_BR, _, _ = response_log_probs(params.policy, batch, cfg, ppo.temperature)
    ref_log_probs_BR, _, _ = response_log_probs(reference, batch, cfg, ppo.temperature)
    values_BR, _ = response_values(params.critic, batch, cfg)
    proxy_B, _ = reward_of(reward_model, batch["tokens"], batch["segment_ids"], cfg)
    scores_B = proxy_B - ppo.missing_end_penalty * (1.0 - generation.ended.astype(jnp.float32))
    rewards_BR = kl_rewards(scores_B, log_probs_BR, ref_log_probs_BR, mask_BR, ppo.kl_coef)
    advantages_BR, returns_BR = gae(rewards_BR, values_BR * mask_BR, mask_BR, ppo.gamma, ppo.gae_lambda)
    batch |= {
        "old_log_probs": log_probs_BR * mask_BR,
        "old_values": values_BR * mask_BR,
        "returns": returns_BR,
        "advantages": whiten(advantages_BR, mask_BR),
    }
    residual = masked_mean(jnp.square(returns_BR - values_BR), mask_BR)
    spread = masked_mean(jnp.square(returns_BR - masked_mean(returns_BR, mask_BR)), mask_BR)
    metrics = {
        "reward": jnp.mean(proxy_B),
        "kl": jnp.mean(jnp.sum((log_probs_BR - ref_log_probs_BR) * mask_BR, axis=1)),
        "response_length": jnp.mean(jnp.sum(mask_BR, axis=1)),
        "ended": jnp.mean(generation.ended.astype(jnp.float32)),
        "explained_variance": 1.0 - residual / jnp.maximum(spread, 1e-8),
        "sampler_gap": jnp.max(jnp.abs(log_probs_BR - generation.log_probs) * mask_BR),
    }
    return batch, metrics


def minibatches(batch: dict[str, Array], key: jax.Array, num_minibatches: int) -> dict[str, Array]:
    """The rows in a fresh random order, cut into minibatches: [B, ...] -> [M, B / M, ...]; every row exactly once."""
    rows = batch["tokens"].shape[0]
    order = jax.random.permutation(key, rows)
    return jax.tree.map(lambda x: x[order].reshape(num_minibatches, rows // num_minibatches, *x.shape[1:]), batch)
