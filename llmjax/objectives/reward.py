"""The reward model: K answers to one prompt, ranked by people, all pairs of the prompt in one batch element."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax import sharding
from llmjax.generation.score import reward_of
from llmjax.models.config import ModelConfig
from llmjax.models.heads import ScalarModel
from llmjax.models.moe import router_loss, router_metrics
from llmjax.typing import Array, Float, Int


def pairwise_ranking_loss(rewards_BK: Float[Array, "B K"], ranks_BK: Int[Array, "B K"]) -> tuple[Array, Array]:
    """The mean of -log sigmoid(r_i - r_j) over the pairs with i ranked above j, first of a prompt and then of prompts.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1, whose C(K, 2) pairs are all strict. ranks: 0 is best, equal ranks are ties, -1
    is an answer that is not there; ties and absent answers are in neither the sum nor the count, so that equal rewards cost
    ln 2 whatever the ranks. A prompt without a ranked pair says nothing. Also returns the accuracy: the share of strictly
    ranked pairs that the rewards order the same way, equal rewards counting half; NaN where no pair is ranked.
    """
    margin = rewards_BK[:, :, None] - rewards_BK[:, None, :]
    here = (ranks_BK >= 0)[:, :, None] & (ranks_BK >= 0)[:, None, :]
    better = (here & (ranks_BK[:, :, None] < ranks_BK[:, None, :])).astype(jnp.float32)
    pairs = jnp.sum(better, axis=(1, 2))
    loss = -jnp.sum(better * jax.nn.log_sigmoid(margin), axis=(1, 2)) / jnp.maximum(pairs, 1.0)
    right = jnp.sum(better * (0.5 * (jnp.sign(margin) + 1.0)))
    accuracy = jnp.where(jnp.sum(pairs) > 0, right / jnp.maximum(jnp.sum(pairs), 1.0), jnp.nan)
    return jnp.sum(loss) / jnp.maximum(jnp.sum(pairs > 0), 1), accuracy


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
    here = batch["ranks"] >= 0
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "reward_mean": jnp.mean(rewards_BK, where=here),
        "reward_std": jnp.std(rewards_BK, where=here),
    }
    if stats is None:
        return loss, metrics
    return loss + router_loss(stats, cfg.experts), metrics | router_metrics(stats)
