"""What models say of a given text: log-probabilities of responses, values, rewards; experts drop nothing, as in decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.generation.decode import Generation
from llmjax.models.config import ModelConfig
from llmjax.models.heads import ScalarModel, last_token, scalars
from llmjax.models.transformer import Params, hidden_states, logits
from llmjax.typing import Array, Float, Int


def join_response(prompt_BT: Array, segment_ids_BT: Array, generation: Generation) -> dict[str, Array]:
    """Prompt (padded on the left) and response as one sequence: tokens, segment_ids, positions [B, P + R]; mask [B, R]."""
    segments_BT = jnp.concatenate([segment_ids_BT, generation.mask.astype(jnp.int32)], axis=1)
    return {
        "tokens": jnp.concatenate([prompt_BT, generation.tokens], axis=1),
        "segment_ids": segments_BT,
        "positions": jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0),
        "mask": generation.mask,
    }


def response_log_probs(params: Params, batch: dict[str, Array], cfg: ModelConfig, temperature: float):
    """log-probability and entropy [B, R] of each response token under the policy that sampled at `temperature`.

    batch: tokens, segment_ids, positions [B, P + R]: a prompt padded on the left to P, and R response tokens.
    mask [B, R] gives R. The logits at place i predict token i + 1. Also returns router statistics.
    """
    response = batch["mask"].shape[1]
    x_BTD, _, stats = hidden_states(
        params, batch["tokens"], cfg.dropless(), positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
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


def reward_of(params: ScalarModel, tokens_BT: Array, segment_ids_BT: Array, cfg: ModelConfig):
    """The score of each row: the head at its last real token (float32 [B]), whatever its padding; router statistics."""
    positions_BT = jnp.maximum(jnp.cumsum(segment_ids_BT > 0, axis=1) - 1, 0)
    values_BT, stats = scalars(params, tokens_BT, cfg, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT)
    return last_token(values_BT, segment_ids_BT), stats


def token_log_probs(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], temperature: float = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p(target) and entropy (nats) of softmax(logits / temperature) at each position, float32."""
    scaled = logits_BTV.astype(jnp.float32) / temperature
    log_partition = jax.nn.logsumexp(scaled, axis=-1)
    chosen = jnp.sum(jnp.where(targets_BT[..., None] == jnp.arange(scaled.shape[-1]), scaled, 0.0), axis=-1)
    probs = jnp.exp(scaled - log_partition[..., None])
    return chosen - log_partition, log_partition - jnp.sum(probs * scaled, axis=-1)
