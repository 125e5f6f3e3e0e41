"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp

from llmjax.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Range
from llmjax.typing import Array, Float


@dataclass(frozen=True)
class SamplingConfig:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution. max_new_tokens includes the end of turn."""

    max_new_tokens: PositiveInt = 32
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0


def restrict(logits_BV: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf outside the top_k tokens and outside the smallest set of probability >= top_p (nucleus, arXiv:1904.09751).

    Of equal logits those of lower ids come first.
    """
    if top_k:
        count = min(top_k, logits_BV.shape[-1])
        logits_BV = _highest(logits_BV, jax.lax.top_k(logits_BV, count)[0][:, -1:], count)
    if top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits_BV = _highest(logits_BV, least, jnp.sum(kept, axis=-1, keepdims=True))
    return logits_BV


def _highest(logits_BV: Array, least: Array, count: Array | int) -> Array:
    """-inf outside the `count` highest logits, of which `least` is the last: [B, 1]."""
    above, equal = logits_BV > least, logits_BV == least
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    return jnp.where(above | equal & (jnp.cumsum(equal, axis=-1) <= room), logits_BV, -jnp.inf)


def sample(logits_BV: Float[Array, "B V"], keys_B: Array, cfg: SamplingConfig) -> tuple[Array, Array]:
    """One token per row, each from its own key, and its log-probability under the distribution sampled from.

    Returns (tokens [B] int32, log_probs [B] float32). Greedy: the log-probability is that of temperature 1.
    """
    if cfg.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
        scaled = logits_BV
    else:
        scaled = restrict(logits_BV / cfg.temperature, cfg.top_k, cfg.top_p)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, scaled)
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    return tokens_B.astype(jnp.int32), jnp.take_along_axis(log_probs, tokens_B[:, None], axis=-1)[:, 0]
