"""Causal grouped-query attention with segment ids, over a full sequence or a key/value cache.

The mask is one rule everywhere: a query sees the keys whose slot is not later and whose segment id equals its own. Slots
are places in the array, positions (for RoPE) restart with each packed segment; segment 0 is padding or an empty cache slot.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.blocked_attention import blocked_attention
from llmjax.models.cache import LayerCache, append
from llmjax.models.config import ModelConfig
from llmjax.models.layers import apply_rope, residual_scale
from llmjax.models.spec import ParamSpec
from llmjax.typing import Array, Float, Int

MASKED = -1e30


@struct.dataclass
class Attention:
    """Projection weights: q [D, N, H]; k, v [D, K, H]; o [N, H, D]."""

    q: Array
    k: Array
    v: Array
    o: Array


def attention_spec(cfg: ModelConfig) -> Attention:
    """The `ParamSpec` of each projection."""
    d, n, k, h = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    kv = ParamSpec((d, k, h), ("embed", "kv_heads", "head_dim"), std=d**-0.5)
    return Attention(
        q=ParamSpec((d, n, h), ("embed", "heads", "head_dim"), std=d**-0.5),
        k=kv,
        v=kv,
        o=ParamSpec((n, h, d), ("heads", "head_dim", "embed"), std=(n * h) ** -0.5 * residual_scale(cfg)),
    )


def attention(
    w: Attention,
    x_BTD: Float[Array, "B T D"],
    rope: tuple[Array, Array],
    segment_ids_BT: Int[Array, "B T"],
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """One attention layer: project, rotate, attend (Vaswani et al. 2017, eq. 1; grouped queries arXiv:2305.13245).

    rope: `rope_table` of the positions of x. cache: keys and values of earlier slots; x is appended to it. Returns the
    output and the cache that now holds x.
    """
    dtype = x_BTD.dtype
    q_BTNH = apply_rope(sharding.einsum("BTD,DNH->BTNH", x_BTD, w.q.astype(dtype)), rope)
    k_BTKH = apply_rope(sharding.einsum("BTD,DKH->BTKH", x_BTD, w.k.astype(dtype)), rope)
    v_BTKH = sharding.einsum("BTD,DKH->BTKH", x_BTD, w.v.astype(dtype))
    if cache is None:
        attend = sharding.local(_attend_sequence, ["BTNH", "BSKH", "BSKH", "BT"], "BTNH")
        y_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    else:
        start = cache.length
        cache = append(cache, k_BTKH, v_BTKH, segment_ids_BT)
        attend = sharding.local(_attend_cached, ["BTNH", "BSKH", "BSKH", "BT", "BS", ""], "BTNH")
        y_BTNH = attend(q_BTNH, cache.k, cache.v, segment_ids_BT, cache.segment_ids, start)
    return sharding.einsum("BTNH,NHD->BTD", y_BTNH, w.o.astype(dtype)), cache


def _attend_sequence(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    if jax.default_backend() == "cpu":
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    slots = jnp.arange(q_BTNH.shape[1])
    mask_BTS = _mask(segment_ids_BT, segment_ids_BT, slots, slots)
    return dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def _attend_cached(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, start):
    q_slots = start + jnp.arange(q_BTNH.shape[1])
    mask_BTS = _mask(q_segments_BT, k_segments_BS, q_slots, jnp.arange(k_BSKH.shape[1]))
    return dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def _mask(q_segments_BT, k_segments_BS, q_slots_T, k_slots_S):
    causal_TS = q_slots_T[:, None] >= k_slots_S[None, :]
    return causal_TS & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])


def dot_product_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> Array:
    """softmax(q k^T / sqrt(H)) v with scores and softmax in float32: the plain form, [B, T, N, H] in and out."""
    b, t, n, h = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q = q_BTNH.reshape(b, t, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(b, t, n, h)
