"""Causal grouped-query attention with segment ids, over a full sequence or a key/value cache.

The mask is one rule everywhere (`attention_mask`): a query sees the keys whose slot is not later, that lie within the
layer's window, and whose segment id equals its own. Slots are places in the array, positions (for RoPE) restart with each
packed segment; segment 0 is padding or an empty cache slot.
"""

from __future__ import annotations

from flax import struct

from llmjax import sharding
from llmjax.kernels.attention.choose import attend
from llmjax.models.cache import LayerCache, append
from llmjax.models.config import UNLIMITED, ModelConfig
from llmjax.models.layers import apply_rope, residual_scale, rms_norm
from llmjax.models.linear import Weight, linear
from llmjax.models.spec import param
from llmjax.typing import Array, Float, Int


@struct.dataclass
class Attention:
    """Projection weights: q [D, N, H]; k, v [D, K, H]; o [N, H, D]. The rest only where the family has it:

    q_bias [N, H], k_bias, v_bias [K, H], o_bias [D]; q_norm, k_norm [H], or [N, H] and [K, H] over all heads; sinks [N].
    """

    q: Weight
    k: Weight
    v: Weight
    o: Weight
    q_bias: Array | None = None
    k_bias: Array | None = None
    v_bias: Array | None = None
    o_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    sinks: Array | None = None


def attention_spec(cfg: ModelConfig) -> Attention:
    """The `ParamSpec` of each array; None for what the family has not."""
    d, n, k, h = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    kv = param((d, k, h), ("embed", "kv_heads", "head_dim"), std=d**-0.5)
    kv_bias = param((k, h), ("kv_heads", "head_dim"), constant=0.0) if cfg.qkv_bias else None

    def norm(heads, axis):
        if cfg.qk_norm == "none":
            return None
        shape, axes = ((heads, h), (axis, "head_dim")) if cfg.qk_norm == "full" else ((h,), ("head_dim",))
        return param(shape, axes, constant=1.0 - cfg.norm_offset)

    return Attention(
        q=param((d, n, h), ("embed", "heads", "head_dim"), std=d**-0.5),
        k=kv,
        v=kv,
        o=param((n, h, d), ("heads", "head_dim", "embed"), std=(n * h) ** -0.5 * residual_scale(cfg)),
        q_bias=param((n, h), ("heads", "head_dim"), constant=0.0) if cfg.qkv_bias else None,
        k_bias=kv_bias,
        v_bias=kv_bias,
        o_bias=param((d,), (None,), constant=0.0) if cfg.out_bias else None,
        q_norm=norm(n, "heads"),
        k_norm=norm(k, "kv_heads"),
        sinks=param((n,), ("heads",), constant=0.0) if cfg.attention_sinks else None,
    )


def attention(
    w: Attention,
    x_BTD: Float[Array, "B T D"],
    rope: tuple[Array, Array],
    segment_ids_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    window: int | Array = UNLIMITED,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """One attention layer: project, rotate, attend (Vaswani et al. 2017, eq. 1; grouped queries arXiv:2305.13245).

    rope: `rope_table` of the positions of x. window: tokens seen, itself included. cache: keys and values of earlier
    slots; x is appended to it. Returns the output and the cache that now holds x.
    """
    dtype = x_BTD.dtype

    def project(weight, bias, norm, kind):
        y = linear(f"BTD,D{kind}H->BT{kind}H", x_BTD, weight)
        y = y if bias is None else y + bias.astype(dtype)
        return y if norm is None else rms_norm(y, norm, cfg.norm_eps, cfg.norm_offset)

    q_BTNH = apply_rope(project(w.q, w.q_bias, w.q_norm, "N"), rope)
    k_BTKH = apply_rope(project(w.k, w.k_bias, w.k_norm, "K"), rope)
    v_BTKH = project(w.v, w.v_bias, None, "K")
    if cache is None:
        y_BTNH = attend_sequence(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, cfg, window, w.sinks)
    else:
        start = cache.length
        cache = append(cache, k_BTKH, v_BTKH, segment_ids_BT)
        y_BTNH = attend_cached(q_BTNH, cache.k, cache.v, segment_ids_BT, cache, start, cfg, window, w.sinks)
    y_BTD = linear("BTNH,NHD->BTD", y_BTNH, w.o)
    return (y_BTD if w.o_bias is None else y_BTD + w.o_bias.astype(dtype)), cache


def _scale(cfg: ModelConfig) -> float:
    return cfg.attention_scale or cfg.qk_dim**-0.5


def attend_sequence(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, cfg: ModelConfig, window=UNLIMITED, sinks_N=None):
    """A whole sequence attends to itself: [B, T, N, width of v]."""

    def local(q, k, v, segments, window, sinks):
        return attend(
            q, k, v, segments, segments, scale=_scale(cfg), window=window, softcap=cfg.attention_softcap, sinks_N=sinks,
            kernel=cfg.attention_kernel,
        )  # fmt: skip

    return _run_local(local, ["BTNH", "BSKH", "BSKH", "BT"], (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT), window, sinks_N)


def attend_cached(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, cache, start, cfg, window=UNLIMITED, sinks_N=None, kv="K"):
    """T new queries attend to a cache in which they begin at slot `start`. kv: letter of the heads' axis in the cache."""

    def local(q, k, v, q_segments, k_segments, start, window, sinks):
        return attend(
            q, k, v, q_segments, k_segments, start=start, scale=_scale(cfg), window=window, softcap=cfg.attention_softcap,
            sinks_N=sinks,
        )  # fmt: skip

    letters = ["BTNH", f"BS{kv}H", f"BS{kv}H", "BT", "BS", ""]
    args = (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, cache.segment_ids, start)
    return _run_local(local, letters, args, window, sinks_N)


def _run_local(fn, letters, args, window, sinks_N):
    """`fn(*args, window, sinks)` on local arrays; a static window and absent sinks are no arguments of the region."""
    traced = not isinstance(window, int)
    letters = [*letters, *([""] if traced else []), *(["N"] if sinks_N is not None else [])]
    args = [*args, *([window] if traced else []), *([sinks_N] if sinks_N is not None else [])]

    def call(*args):
        rest = list(args)
        sinks = rest.pop() if sinks_N is not None else None
        own_window = rest.pop() if traced else window
        return fn(*rest, own_window, sinks)

    return sharding.local(call, letters, "BTNH")(*args)
