"""Attention by its definition: all scores at once. Every other form is tested against this one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.kernels.attention.mask import MASKED
from llmjax.typing import Array


def plain_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask_BTS: Array,
    scale: float,
    softcap: float = 0.0,
    sinks_N: Array | None = None,
) -> Array:
    """softmax(scale q k^T) v with scores and softmax in float32. Returns [B, T, N, width of v].

    softcap: scores become softcap tanh(scores / softcap). sinks: a logit per head that takes part in the softmax and
    carries no value (gpt-oss).
    """
    b, t, n, h = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    if sinks_N is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks_N.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        column = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH).reshape(b, t, n, -1)
