"""The small pieces: RMSNorm, rotary embedding, SwiGLU, token embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.config import ModelConfig
from llmjax.models.spec import ParamSpec
from llmjax.typing import Array, Float, Int


def rms_norm(x_BTD: Float[Array, "B T D"], scale_D: Float[Array, "D"], eps: float) -> Float[Array, "B T D"]:
    """x / sqrt(mean(x^2) + eps) * scale, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    x = x_BTD.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (y * scale_D).astype(x_BTD.dtype)


def rope_table(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin [B, T, H/2] float32 of position * theta^(-2i/H) (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions_BT.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BTNH: Float[Array, "B T N H"], table: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head, the half-split layout of Llama checkpoints."""
    cos, sin = (t[:, :, None, :] for t in table)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


@struct.dataclass
class Mlp:
    """SwiGLU weights: gate, up [D, F]; down [F, D]."""

    gate: Array
    up: Array
    down: Array


def mlp_spec(cfg: ModelConfig) -> Mlp:
    """The `ParamSpec` of each matrix."""
    d, f = cfg.embed_dim, cfg.mlp_dim
    into = ParamSpec((d, f), ("embed", "mlp"), std=d**-0.5)
    out = ParamSpec((f, d), ("mlp", "embed"), std=f**-0.5 * residual_scale(cfg))
    return Mlp(gate=into, up=into, down=out)


def swiglu(w: Mlp, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""
    gate_BTF = sharding.einsum("BTD,DF->BTF", x_BTD, w.gate.astype(x_BTD.dtype))
    up_BTF = sharding.einsum("BTD,DF->BTF", x_BTD, w.up.astype(x_BTD.dtype))
    return sharding.einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, w.down.astype(x_BTD.dtype))


def residual_scale(cfg: ModelConfig) -> float:
    """Factor on the initial output weights of a branch, so that the residual stream keeps its size (GPT-2, section 2.3)."""
    return (2 * cfg.num_layers) ** -0.5


def embed_tokens(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Rows of the table. On a mesh the table is gathered first, so the look-up is local."""

    def look_up(table, tokens):
        return jnp.take(table, tokens, axis=0, mode="clip")

    return sharding.local(look_up, ["..", "BT"], "BTD")(table_VD, tokens_BT).astype(dtype)
