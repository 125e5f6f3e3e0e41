"""The model: plain functions over pytrees of weights. Dense and sparse are the same functions under different configs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.attention import Attention, attention, attention_spec
from llmjax.models.cache import LayerCache
from llmjax.models.config import ModelConfig
from llmjax.models.layers import Mlp, embed_tokens, mlp_spec, rms_norm, rope_table, swiglu
from llmjax.models.moe import Moe, RouterStats, moe_layer, moe_spec
from llmjax.models.spec import ParamSpec, is_spec
from llmjax.typing import Array, Float, Int


@struct.dataclass
class Block:
    """One pre-norm Transformer block; leaves are stacked over layers [L, ...]."""

    attention_norm: Array
    attention: Attention
    mlp_norm: Array
    mlp: Mlp | Moe


@struct.dataclass
class Params:
    """embed [V, D]; blocks stacked [L, ...]; final_norm [D]; head [V, D], or None when tied to embed."""

    embed: Array
    blocks: Block
    final_norm: Array
    head: Array | None


def transformer_spec(cfg: ModelConfig) -> Params:
    """The `ParamSpec` of every leaf."""
    d = cfg.embed_dim
    norm = ParamSpec((d,), (None,), constant=1.0)
    block = Block(
        attention_norm=norm,
        attention=attention_spec(cfg),
        mlp_norm=norm,
        mlp=mlp_spec(cfg) if cfg.moe is None else moe_spec(cfg),
    )
    # Normalised hidden states have unit-size entries, so this width gives logits of unit size.
    table = ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), std=d**-0.5)
    return Params(
        embed=table,
        blocks=jax.tree.map(lambda s: s.stacked(cfg.num_layers), block, is_leaf=is_spec),
        final_norm=norm,
        head=None if cfg.tie_embeddings else table,
    )


def hidden_states(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions_BT: Int[Array, "B T"] | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    cache: tuple[LayerCache, ...] | None = None,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...] | None, RouterStats | None]:
    """Everything but the head: normalised hidden states, the updated cache, router statistics stacked over layers.

    positions: for RoPE, default 0..T-1. segment_ids: default all 1; 0 is padding, others attend only to their own.
    With a cache, tokens are appended to it, and positions must be given.
    """
    if positions_BT is None:
        if cache is not None:
            raise ValueError("positions_BT must be given with a cache: the default 0..T-1 would be wrong")
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    tokens_BT, positions_BT, segment_ids_BT = (
        sharding.constrain(a, "BT") for a in (tokens_BT, positions_BT, segment_ids_BT)
    )
    rope = rope_table(positions_BT, cfg.head_dim, cfg.rope_theta)
    x_BTD = embed_tokens(params.embed, tokens_BT, jnp.dtype(cfg.dtype))

    def block(x_BTD, w, layer_cache):
        y_BTD, layer_cache = attention(
            w.attention, rms_norm(x_BTD, w.attention_norm, cfg.norm_eps), rope, segment_ids_BT, layer_cache
        )
        x_BTD = x_BTD + y_BTD
        y_BTD, stats = _feed_forward(w.mlp, rms_norm(x_BTD, w.mlp_norm, cfg.norm_eps), segment_ids_BT, cfg)
        return x_BTD + y_BTD, layer_cache, stats

    if cfg.remat and cache is None:
        block = jax.checkpoint(block)
    if cache is None and _use_scan(cfg):
        def step(x_BTD, w):
            x_BTD, _, stats = block(x_BTD, w, None)
            return x_BTD, stats

        x_BTD, stats = jax.lax.scan(step, x_BTD, params.blocks)
    else:
        caches, all_stats = [], []
        for i, w in enumerate(_unstack(params.blocks, cfg.num_layers)):
            x_BTD, layer_cache, stats = block(x_BTD, w, None if cache is None else cache[i])
            caches.append(layer_cache)
            all_stats.append(stats)
        cache = None if cache is None else tuple(caches)
        stats = None if cfg.moe is None else jax.tree.map(lambda *s: jnp.stack(s), *all_stats)
    return rms_norm(x_BTD, params.final_norm, cfg.norm_eps), cache, stats


def head_table(params: Params) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits."""
    return params.embed if params.head is None else params.head


def logits(params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """float32 logits of hidden states."""
    table_VD = head_table(params).astype(x_BTD.dtype)
    return sharding.einsum("BTD,VD->BTV", x_BTD, table_VD, out_dtype=jnp.float32)


def apply(params: Params, tokens_BT: Array, cfg: ModelConfig, **inputs):
    """logits [B, T, V] float32, cache, router statistics; arguments as in `hidden_states`."""
    x_BTD, cache, stats = hidden_states(params, tokens_BT, cfg, **inputs)
    return logits(params, x_BTD), cache, stats


def _feed_forward(w, x_BTD, segment_ids_BT, cfg: ModelConfig):
    if cfg.moe is None:
        return swiglu(w, x_BTD), None
    return moe_layer(w, x_BTD, segment_ids_BT, cfg.moe)


def _use_scan(cfg: ModelConfig) -> bool:
    if cfg.layer_loop == "auto":
        return jax.default_backend() != "cpu"
    return cfg.layer_loop == "scan"


def _unstack(blocks: Block, num_layers: int) -> list[Block]:
    """The blocks one by one. By `lax.split`, whose gradient is one concatenation instead of a sum of padded arrays."""
    leaves, tree = jax.tree.flatten(blocks)
    pieces = [[p[0] for p in jax.lax.split(leaf, [1] * num_layers, axis=0)] for leaf in leaves]
    return [tree.unflatten([piece[i] for piece in pieces]) for i in range(num_layers)]
