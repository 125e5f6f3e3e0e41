"""Attention on TPU by JAX's own Pallas kernel, "splash attention": blocks that nobody sees are not computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llmjax.typing import Array

LANES = 128  # width of a vector register: blocks, and heads as the kernel reads them, are multiples of it
BLOCK = 512  # queries, and keys, at a time


def splash_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segment_ids_BT: Array, scale: float, window: int | None = None,
    softcap: float = 0.0, interpret: bool = False,
) -> Array:  # fmt: skip
    """`plain_attention` of whole sequences of a multiple of LANES tokens under `attention_mask`: [B, T, N, width of v].

    window: static. interpret: on any platform, slowly, for tests.
    """
    _, length, heads, _ = q_BTNH.shape
    # The kernel counts the tokens to the left of the query; a window here holds the query, too.
    one = splash.CausalMask((length, length)) if window is None else splash.LocalMask((length, length), (window - 1, 0), 0)
    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap or None,
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        interpret=interpret,
    )  # fmt: skip
    width = -(-max(q_BTNH.shape[-1], v_BSKH.shape[-1]) // LANES) * LANES  # one for all three

    def by_head(x_BTNH: Array) -> Array:
        return jnp.pad(x_BTNH, [(0, 0)] * 3 + [(0, width - x_BTNH.shape[-1])]).swapaxes(1, 2)

    q_BNTH = by_head(q_BTNH * jnp.asarray(scale, q_BTNH.dtype))
    y_BNTH: Any = jax.vmap(kernel)(q_BNTH, by_head(k_BSKH), by_head(v_BSKH), splash.SegmentIds(segment_ids_BT, segment_ids_BT))
    return y_BNTH.swapaxes(1, 2)[..., : v_BSKH.shape[-1]]
