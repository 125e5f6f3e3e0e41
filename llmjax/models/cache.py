"""The key/value cache: explicit, in and out. One entry per layer, so that a decode step updates it in place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.config import ModelConfig
from llmjax.typing import Array


@struct.dataclass
class LayerCache:
    """Keys and values of one layer.

    k, v [B, S, K, H]; segment_ids [B, S] int32, 0 where nothing is stored; length: scalar int32, slots in use (the same
    for every row: shorter prompts are padded on the left). With latent attention k is [B, S, 1, kv_lora_rank + rope_dim],
    from which the values follow, and v is empty.
    """

    k: Array
    v: Array
    segment_ids: Array
    length: Array


def init_cache(cfg: ModelConfig, batch: int, size: int) -> tuple[LayerCache, ...]:
    """An empty cache of `size` slots for each layer, in the dtype of activations."""
    heads, k_dim, v_dim, letters = cfg.num_kv_heads, cfg.head_dim, cfg.head_dim, "BSKH"
    if cfg.mla is not None:
        heads, k_dim, v_dim, letters = 1, cfg.mla.kv_lora_rank + cfg.mla.rope_dim, 0, "BS.H"

    def layer():
        return LayerCache(
            k=sharding.constrain(jnp.zeros((batch, size, heads, k_dim), cfg.dtype), letters),
            v=sharding.constrain(jnp.zeros((batch, size, heads, v_dim), cfg.dtype), letters),
            segment_ids=sharding.constrain(jnp.zeros((batch, size), jnp.int32), "BS"),
            length=jnp.zeros((), jnp.int32),
        )

    return tuple(layer() for _ in range(cfg.num_layers))


def append(cache: LayerCache, k_BTKH: Array, v_BTKH: Array, segment_ids_BT: Array) -> LayerCache:
    """Writes T new slots behind those in use. The caller sizes the cache: beyond its end JAX would clamp the write."""
    at = cache.length
    return LayerCache(
        k=jax.lax.dynamic_update_slice_in_dim(cache.k, k_BTKH, at, axis=1),
        v=jax.lax.dynamic_update_slice_in_dim(cache.v, v_BTKH, at, axis=1),
        segment_ids=jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids_BT, at, axis=1),
        length=at + k_BTKH.shape[1],
    )
