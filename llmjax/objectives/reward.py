"""The reward model: K answers to one prompt, ranked by people, all pairs of the prompt in one batch element."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax import sharding
from llmjax.models.config import ModelConfig
from llmjax.models.heads import ScalarModel, last_token, scalars
from llmjax.models.moe import router_loss, router_metrics
from llmjax.typing import Array, Float, Int


def reward_of(params: ScalarModel, tokens_BT: Array, segment_ids_BT: Array, cfg: ModelConfig):
    """The score of each row: the head at its last real token (float32 [B]), whatever its padding; router statistics."""
    positions_BT = jnp.maximum(jnp.cumsum(segment_ids_BT > 0, axis=1) - 1, 0)
    values_BT, stats = scalars(params, tokens_BT, cfg, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
    return last_token(values_BT, segment_ids_BT), stats


def pairwise_ranking_loss(rewards_BK: Float[Array, "B K"], ranks_BK: Int[Array, "B K"]) -> tuple[Array, Array]:
    """-1 / C(K, 2) * sum over pairs with i ranked above j of log sigmoid(r_i - r_j), averaged over prompts.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1. ranks: 0 is best, equal ranks are ties and say nothing. Also returns the
    accuracy: the share of strictly ranked pairs that the rewards order the same way, equal rewards counting half.
    """
    k = rewards_BK.shape[1]
    margin = rewards_BK[:, :, None] - rewards_BK[:, None, :]
    better = (ranks_BK[:, :, None] < ranks_BK[:, None, :]).astype(jnp.float32)
    loss = -jnp.sum(better * jax.nn.log_sigmoid(margin), axis=(1, 2)) / (k * (k - 1) / 2)
    right = jnp.sum(better * (0.5 * (jnp.sign(margin) + 1.0)))
    return jnp.mean(loss), right / jnp.maximum(jnp.sum(better), 1.0)


def reward_loss(params: ScalarModel, batch: dict[str, Array], key, cfg: ModelConfig) -> tuple[Array, dict[str, Array]]:
    """The ranking loss of a batch: tokens, segment_ids [B, K, T] (prompt and answer, padded), ranks [B, K].

    One forward pass per answer, K for a prompt and not K * (K - 1). key: unused, there is no dropout.
    """
    del key
    b, k, t = batch["tokens"].shape
    rewards_R, stats = reward_of(
        params, batch["tokens"].reshape(b * k, t), batch["segment_ids"].reshape(b * k, t), cfg
    )
    rewards_BK = sharding.constrain(rewards_R.reshape(b, k), "B.")
    loss, accuracy = pairwise_ranking_loss(rewards_BK, batch["ranks"])
    metrics = {"loss": loss, "accuracy": accuracy, "reward_mean": jnp.mean(rewards_R), "reward_std": jnp.std(rewards_R)}
    if stats is None:
        return loss, metrics
    return loss + router_loss(stats, cfg.moe), metrics | router_metrics(stats)
