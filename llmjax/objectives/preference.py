"""DPO: preferences learnt by the policy itself, without a reward model in between."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llmjax import sharding
from llmjax.models.config import ModelConfig
from llmjax.models.moe import RouterStats, router_loss, router_metrics
from llmjax.models.transformer import Params, hidden_states, logits
from llmjax.objectives.reward import pairwise_ranking_loss
from llmjax.typing import Array, Float

CHUNK_LOGITS = 16 * 2**20  # held at a time


def dpo_loss(
    params: Params, reference: Params, batch: dict[str, Array], cfg: ModelConfig, beta: float
) -> tuple[Array, dict[str, Array]]:
    """The ranking loss of the rewards beta * (log pi(answer) - log pi_ref(answer)), in nats per pair.

    For two answers that is Rafailov et al. 2023, arXiv:2305.18290, eq. 7; for K of them all ranked pairs count, as in the
    reward model's loss, whose reward this one is up to a term of the prompt (their eq. 5). At the start it is ln 2.

    batch: tokens, segment_ids, loss_mask [B, K, T] (prompt and answer, padded on the right; the mask is on the answer), ranks
    [B, K] (0 is best, -1 an answer that is not there). reference: is not differentiated.
    """
    rewards_BK, stats = implicit_rewards(params, reference, batch, cfg, beta)
    ranks_BK = batch["ranks"]
    loss, accuracy = pairwise_ranking_loss(rewards_BK, ranks_BK)
    here_BK = ranks_BK >= 0
    best_B = jnp.min(jnp.where(here_BK, ranks_BK, jnp.iinfo(jnp.int32).max), axis=1)
    worst_B = jnp.max(ranks_BK, axis=1)
    metrics = {
        "loss": loss,
        "accuracy": accuracy,
        "chosen_reward": jnp.mean(rewards_BK, where=here_BK & (ranks_BK == best_B[:, None])),
        "rejected_reward": jnp.mean(rewards_BK, where=here_BK & (ranks_BK == worst_B[:, None])),
    }
    if stats is None:
        return loss, metrics
    return loss + router_loss(stats, cfg.experts), metrics | router_metrics(stats)


def implicit_rewards(
    params: Params, reference: Params, batch: dict[str, Array], cfg: ModelConfig, beta: float
) -> tuple[Float[Array, "B K"], RouterStats | None]:
    """beta * (log pi - log pi_ref) of each answer, float32, and router statistics of the policy; batch as in `dpo_loss`."""
    b, k, t = batch["tokens"].shape
    rows = {name: batch[name].reshape(b * k, t) for name in ("tokens", "segment_ids", "loss_mask")}
    log_probs_R, stats = answer_log_probs(params, rows, cfg)
    reference_R, _ = answer_log_probs(jax.lax.stop_gradient(reference), rows, cfg)
    rewards_BK = beta * (log_probs_R - jax.lax.stop_gradient(reference_R)).reshape(b, k)
    return sharding.constrain(rewards_BK, "B."), stats


def answer_log_probs(params: Params, rows: dict[str, Array], cfg: ModelConfig) -> tuple[Float[Array, "R"], RouterStats | None]:
    """log p(answer | prompt) of each row in nats, float32, and router statistics; rows: [R, T] as in `dpo_loss`.

    The logits are made a stretch of positions at a time, and once more for the gradient, so they are never held whole. Experts
    drop nothing.
    """
    tokens_RT, segment_ids_RT = rows["tokens"], rows["segment_ids"]
    positions_RT = jnp.maximum(jnp.cumsum(segment_ids_RT > 0, axis=1) - 1, 0)
    x_RTD, _, stats = hidden_states(
        params, tokens_RT, cfg.dropless(), positions_BT=positions_RT, segment_ids_BT=segment_ids_RT
    )
    # The logits at place i predict token i + 1; those at the last place predict nothing.
    targets_RT = jnp.roll(tokens_RT, -1, axis=1)
    mask_RT = jnp.roll(rows["loss_mask"], -1, axis=1).at[:, -1].set(0)

    count, length = tokens_RT.shape
    stretches = math.ceil(length / max(1, CHUNK_LOGITS // (count * cfg.vocab_size)))

    @jax.checkpoint
    def stretch(total_R, part):
        x_RTD, targets_RT, mask_RT = part
        logits_RTV = logits(params, x_RTD, cfg).astype(jnp.float32)
        is_target = targets_RT[..., None] == jnp.arange(logits_RTV.shape[-1])
        chosen_RT = jnp.sum(jnp.where(is_target, logits_RTV, 0.0), axis=-1)
        log_probs_RT = (chosen_RT - jax.nn.logsumexp(logits_RTV, axis=-1)) * mask_RT
        return total_R + sharding.constrain(jnp.sum(log_probs_RT, axis=-1), "B"), None

    def cut(a):  # places beyond the last have mask 0
        size = math.ceil(length / stretches)
        whole = jnp.pad(a, [(0, 0), (0, stretches * size - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(whole.reshape(count, stretches, size, *a.shape[2:]), 1, 0)

    start_R, parts = sharding.constrain(jnp.zeros(count, jnp.float32), "B"), (x_RTD, targets_RT, mask_RT)
    if stretches == 1:
        return stretch(start_R, parts)[0], stats
    return jax.lax.scan(stretch, start_R, jax.tree.map(cut, parts))[0], stats
