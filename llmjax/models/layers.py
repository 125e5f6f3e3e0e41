"""The small pieces: RMSNorm, rotary embedding, gated feed-forward layer, token embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.config import ModelConfig, RopeScaling
from llmjax.models.linear import Weight, linear
from llmjax.models.spec import param
from llmjax.typing import Array, Float, Int


def rms_norm(x_BTD: Float[Array, "B T D"], scale_D: Float[Array, "D"], eps: float, offset: float = 0.0):
    """x / sqrt(mean(x^2) + eps) * (scale + offset), in float32 (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

    The mean is over the axes of scale, which are the last ones of x. Returns the shape and dtype of x.
    """
    x = x_BTD.astype(jnp.float32)
    axes = tuple(range(-scale_D.ndim, 0))
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps)
    return (y * (scale_D + offset if offset else scale_D)).astype(x_BTD.dtype)


def rope_table(
    positions_BT: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Array, Array]:
    """cos and sin [B, T, H/2] float32 of position * theta^(-2i/H) (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    factor = 1.0
    if scaling is not None:
        frequency, factor = _scaled_frequency(frequency, head_dim, theta, scaling)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def _scaled_frequency(frequency: Array, head_dim: int, theta: float, s: RopeScaling) -> tuple[Array, float]:
    """Frequencies and the factor on cos and sin; see `RopeScaling` for the sources."""
    stretched = frequency / s.factor
    if s.kind == "linear":
        return stretched, 1.0
    if s.kind == "llama3":
        turns = s.original_length * frequency / (2 * math.pi)
        keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
        return keep * frequency + (1 - keep) * stretched, 1.0

    def dimension(turns):
        """The dimension that makes this many turns in the original length (YaRN's find_correction_dim)."""
        return head_dim * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001)
    keep = 1 - jnp.clip(ramp, 0, 1)
    return keep * frequency + (1 - keep) * stretched, s.attention_factor or 0.1 * math.log(s.factor) + 1.0


def apply_rope(x_BTNH: Float[Array, "B T N H"], table: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head, the half-split layout of Llama checkpoints."""
    cos, sin = (t[:, :, None, :] for t in table)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


@cache
def activation(name: str, limit: float) -> Callable[[Array, Array], Array]:
    """(gate, up) -> hidden of a gated feed-forward layer: `ModelConfig.activation` and `activation_limit`."""

    def silu(gate, up):
        return jax.nn.silu(gate) * up

    def gelu(gate, up):
        return jax.nn.gelu(gate, approximate=True) * up

    def clipped_silu(gate, up):
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)  # gpt-oss, reference implementation, `swiglu`

    return {"silu": silu, "gelu": gelu, "clipped_silu": clipped_silu}[name]


@struct.dataclass
class Mlp:
    """Weights of a gated feed-forward layer: gate, up [D, F]; down [F, D]."""

    gate: Weight
    up: Weight
    down: Weight


def mlp_spec(cfg: ModelConfig, mlp_dim: int) -> Mlp:
    """The `ParamSpec` of each matrix, for a hidden width of mlp_dim."""
    into = param((cfg.embed_dim, mlp_dim), ("embed", "mlp"), std=cfg.embed_dim**-0.5)
    out = param((mlp_dim, cfg.embed_dim), ("mlp", "embed"), std=mlp_dim**-0.5 * residual_scale(cfg))
    return Mlp(gate=into, up=into, down=out)


def gated_mlp(w: Mlp, x_BTD: Float[Array, "B T D"], act: Callable[[Array, Array], Array]) -> Float[Array, "B T D"]:
    """down(act(gate(x), up(x))): SwiGLU when act is silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""
    gate_BTF = linear("BTD,DF->BTF", x_BTD, w.gate)
    up_BTF = linear("BTD,DF->BTF", x_BTD, w.up)
    return linear("BTF,FD->BTD", act(gate_BTF, up_BTF), w.down)


def residual_scale(cfg: ModelConfig) -> float:
    """Factor on the initial output weights of a branch, so that the residual stream keeps its size (GPT-2, section 2.3)."""
    return (2 * cfg.num_layers) ** -0.5


def embed_tokens(
    table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype, stored: bool = True
) -> Float[Array, "B T D"]:
    """Rows of the table. stored: on a mesh it lies as parameters do, is gathered over fsdp, in `dtype`, and its gradient is
    scattered back; else it was gathered before (`for_decoding`). Over `tensor` each device looks up the tokens of its part of
    the vocabulary, and the parts are added."""

    def look_up(table, tokens):
        if sharding.axis_size("tensor") == 1:
            return jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
        own = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.take(table, own, axis=0, mode="clip").astype(dtype)
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), "tensor")

    tokens_BT = jnp.clip(tokens_BT, 0, table_VD.shape[0] - 1)
    look_up = sharding.local(look_up, ["=VD" if stored else "VD", "BT"], "BTD")
    return look_up(sharding.cast_to_send(table_VD, dtype), tokens_BT)
