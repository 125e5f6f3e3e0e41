"""Multi-head latent attention: keys and values of all heads come from one short vector, which is all that is cached.

DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C. Over a sequence the keys and values are expanded; over a cache
the expansion is folded into queries and outputs instead, so decoding is attention with one shared key of width
kv_lora_rank + rope_dim, whose first part is also the value.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.attention import attend_cached, attend_sequence
from llmjax.models.cache import LayerCache, append
from llmjax.models.config import ModelConfig
from llmjax.models.layers import apply_rope, residual_scale, rms_norm
from llmjax.models.linear import Weight, full_weight, linear
from llmjax.models.spec import param
from llmjax.typing import Array, Float, Int


@struct.dataclass
class Mla:
    """q_down [D, R], q_norm [R], q_up [R, N, H], or with a full query matrix q_up [D, N, H] and the others None.

    H = nope_dim + rope_dim. kv_down [D, kv_lora_rank + rope_dim]; kv_norm [kv_lora_rank]; k_up [kv_lora_rank, N, nope_dim];
    v_up [kv_lora_rank, N, v_dim]; o [N, v_dim, D].
    """

    q_down: Weight | None
    q_norm: Array | None
    q_up: Weight
    kv_down: Weight
    kv_norm: Array
    k_up: Weight
    v_up: Weight
    o: Weight


def mla_spec(cfg: ModelConfig) -> Mla:
    """The `ParamSpec` of each array."""
    d, n, m = cfg.embed_dim, cfg.num_heads, cfg.latent
    q_in = m.q_lora_rank or d
    heads = ("heads", "head_dim")

    def up(width):
        return param((m.kv_lora_rank, n, width), ("latent", *heads), std=m.kv_lora_rank**-0.5)

    def norm(width):
        return param((width,), (None,), constant=1.0)

    return Mla(
        q_down=param((d, q_in), ("embed", "latent"), std=d**-0.5) if m.q_lora_rank else None,
        q_norm=norm(q_in) if m.q_lora_rank else None,
        q_up=param((q_in, n, cfg.qk_dim), ("latent" if m.q_lora_rank else "embed", *heads), std=q_in**-0.5),
        kv_down=param((d, m.kv_lora_rank + m.rope_dim), ("embed", "latent"), std=d**-0.5),
        kv_norm=norm(m.kv_lora_rank),
        k_up=up(m.nope_dim),
        v_up=up(m.v_dim),
        o=param((n, m.v_dim, d), (*heads, "embed"), std=(n * m.v_dim) ** -0.5 * residual_scale(cfg)),
    )


def mla_attention(
    w: Mla,
    x_BTD: Float[Array, "B T D"],
    rope: tuple[Array, Array],
    segment_ids_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    window: int | Array,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """One layer of latent attention; arguments and results as in `attention`."""
    m = cfg.latent
    if w.q_down is None or w.q_norm is None:
        q_BTNH = linear("BTD,DNH->BTNH", x_BTD, w.q_up)
    else:
        q_BTR = rms_norm(linear("BTD,DR->BTR", x_BTD, w.q_down), w.q_norm, cfg.norm_eps)
        q_BTNH = linear("BTR,RNH->BTNH", q_BTR, w.q_up)
    q_nope, q_rope = jnp.split(q_BTNH, [m.nope_dim], axis=-1)
    q_rope = apply_rope(q_rope, rope)
    kv_BTR = linear("BTD,DR->BTR", x_BTD, w.kv_down)
    latent_BTR, k_rope = jnp.split(kv_BTR, [m.kv_lora_rank], axis=-1)
    latent_BTR = rms_norm(latent_BTR, w.kv_norm, cfg.norm_eps)
    k_rope = apply_rope(k_rope[:, :, None, :], rope)
    if cache is None:
        k_nope = linear("BTR,RNH->BTNH", latent_BTR, w.k_up)
        v_BTNH = linear("BTR,RNH->BTNH", latent_BTR, w.v_up)
        for_all_heads = sharding.constrain(jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], m.rope_dim)), "BTNH")
        k_BTNH = jnp.concatenate([k_nope, for_all_heads], axis=-1)
        q_BTNH = jnp.concatenate([q_nope, q_rope], axis=-1)
        y_BTNH = attend_sequence(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, cfg, window)
    else:
        start = cache.length
        shared_BT1R = jnp.concatenate([latent_BTR[:, :, None, :], k_rope], axis=-1)
        cache = append(cache, shared_BT1R, shared_BT1R[..., :0], segment_ids_BT)
        q_BTNR = jnp.concatenate([_by_head(q_nope, w.k_up, "btnh,rnh->btnr"), q_rope], axis=-1)
        values = cache.k[..., : m.kv_lora_rank]
        y_BTNR = attend_cached(q_BTNR, cache.k, values, segment_ids_BT, cache, start, cfg, window, kv=".")
        y_BTNH = _by_head(y_BTNR, w.v_up, "btnr,rnh->btnh")
    return linear("BTNH,NHD->BTD", y_BTNH, w.o), cache


def _by_head(x_BTNH, w_RNH, equation):
    """A product of each head with its own matrix."""
    w_RNH = full_weight(w_RNH, "RNH", num_leading=0, num_in=1).astype(x_BTNH.dtype)
    return sharding.local(lambda x, w: jnp.einsum(equation, x, w), ["BTNH", "RNH"], "BTNH")(x_BTNH, w_RNH)
