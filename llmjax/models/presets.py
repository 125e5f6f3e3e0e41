"""Published models by name, at their exact sizes: `preset("llama3-8b")`. Sources: each model's own config.json.

>>> preset("mixtral-8x7b").moe.num_experts
8
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

from llmjax.config import did_you_mean
from llmjax.errors import UserError
from llmjax.models.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling

_BF16: dict[str, Any] = dict(dtype="bfloat16", tie_embeddings=False)


def _llama3(num_layers, embed_dim, num_heads, mlp_dim) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=8, head_dim=128,
        mlp_dim=mlp_dim, rope_theta=500_000.0, norm_eps=1e-5, **_BF16,
    )  # fmt: skip


def _llama31(num_layers, embed_dim, num_heads, mlp_dim) -> ModelConfig:
    return replace(_llama3(num_layers, embed_dim, num_heads, mlp_dim), rope_scaling=RopeScaling("llama3", factor=8.0))


def _qwen25(num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, tie=True, vocab_size=151_936) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=embed_dim // num_heads, mlp_dim=mlp_dim, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=tie, qkv_bias=True,
        dtype="bfloat16",
    )  # fmt: skip


def _qwen3(num_layers, embed_dim, num_heads, mlp_dim, tie=False, vocab_size=151_936) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=8,
        head_dim=128, mlp_dim=mlp_dim, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=tie, qk_norm="head", dtype="bfloat16",
    )  # fmt: skip


def _gemma(num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim) -> ModelConfig:
    return ModelConfig(
        vocab_size=256_000, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=256, mlp_dim=mlp_dim, norm_eps=1e-6, activation="gelu", norm_offset=1.0, scale_embedding=True,
        dtype="bfloat16",
    )  # fmt: skip


def _olmo2(num_layers, embed_dim, num_heads, mlp_dim) -> ModelConfig:
    return ModelConfig(
        vocab_size=100_352, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=128, mlp_dim=mlp_dim, rope_theta=500_000.0, norm_eps=1e-6, qk_norm="full", pre_norms=False, post_norms=True,
        **_BF16,
    )  # fmt: skip


def _gemma3(num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim, window, **change) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocab_size=262_208, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, mlp_dim=mlp_dim, sliding_window=window, global_every=6, rope_theta=1e6, local_rope_theta=1e4,
        rope_scaling=RopeScaling("linear", factor=8.0), norm_eps=1e-6, tie_embeddings=True, qk_norm="head",
        activation="gelu", post_norms=True, norm_offset=1.0, scale_embedding=True, dtype="bfloat16",
    )  # fmt: skip
    return ModelConfig(**fields | change)


def _mixtral(num_layers, embed_dim, num_heads, mlp_dim, vocab_size) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=8,
        head_dim=128, mlp_dim=mlp_dim, rope_theta=1e6, norm_eps=1e-5, **_BF16,
        moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=mlp_dim, load_balance_coef=0.001, z_loss_coef=0.0),
    )  # fmt: skip


def _qwen3_moe(num_layers, embed_dim, num_heads, mlp_dim, expert_dim) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=4, head_dim=128,
        mlp_dim=mlp_dim, rope_theta=1e6, norm_eps=1e-6, qk_norm="head", **_BF16,
        moe=MoEConfig(num_experts=128, top_k=8, mlp_dim=expert_dim, load_balance_coef=0.001, z_loss_coef=0.0),
    )  # fmt: skip


def _gpt_oss(num_layers, num_experts) -> ModelConfig:
    return ModelConfig(
        vocab_size=201_088, num_layers=num_layers, embed_dim=2880, num_heads=64, num_kv_heads=8, head_dim=64, mlp_dim=2880,
        rope_theta=150_000.0, norm_eps=1e-5, sliding_window=128, global_every=2, qkv_bias=True, out_bias=True,
        attention_sinks=True, activation="clipped_silu", activation_limit=7.0, **_BF16,
        rope_scaling=RopeScaling("yarn", factor=32.0, original_length=4096, truncate=False),
        moe=MoEConfig(
            num_experts=num_experts, top_k=4, mlp_dim=2880, router_bias=True, expert_bias=True, load_balance_coef=0.001,
            z_loss_coef=0.0,
        ),
    )  # fmt: skip


def _yarn_scale(width: int, factor: float, mscale_all_dim: float) -> float:
    """DeepSeek's softmax scale under YaRN: width^-0.5 * (0.1 mscale_all_dim ln(factor) + 1)^2."""
    return width**-0.5 * (0.1 * mscale_all_dim * math.log(factor) + 1.0) ** 2


PRESETS: dict[str, ModelConfig] = {
    "llama3-8b": _llama3(32, 4096, 32, 14336),
    "llama3-70b": _llama3(80, 8192, 64, 28672),
    "llama3.2-1b": replace(
        _llama3(16, 2048, 32, 8192), head_dim=64, tie_embeddings=True, rope_scaling=RopeScaling("llama3", factor=32.0)
    ),
    "llama3.1-8b": _llama31(32, 4096, 32, 14336),
    "llama3.1-70b": _llama31(80, 8192, 64, 28672),
    "llama3.1-405b": _llama31(126, 16384, 128, 53248),
    "qwen2.5-0.5b": _qwen25(24, 896, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen25(28, 1536, 12, 2, 8960),
    "qwen2.5-7b": _qwen25(28, 3584, 28, 4, 18944, tie=False, vocab_size=152_064),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tie=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tie=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tie=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),
    "mistral-7b": ModelConfig(
        vocab_size=32_000, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14336,
        sliding_window=4096, norm_eps=1e-5, **_BF16,
    ),
    "phi3-mini": ModelConfig(
        vocab_size=32_064, num_layers=32, embed_dim=3072, num_heads=32, num_kv_heads=32, head_dim=96, mlp_dim=8192,
        sliding_window=2047, norm_eps=1e-5, **_BF16,
    ),
    "phi4": ModelConfig(
        vocab_size=100_352, num_layers=40, embed_dim=5120, num_heads=40, num_kv_heads=10, head_dim=128, mlp_dim=17920,
        rope_theta=250_000.0, norm_eps=1e-5, **_BF16,
    ),
    "olmo2-1b": _olmo2(16, 2048, 16, 8192),
    "olmo2-7b": _olmo2(32, 4096, 32, 11008),
    "gemma-2b": _gemma(18, 2048, 8, 1, 16384),
    "gemma-7b": _gemma(28, 3072, 16, 16, 24576),
    "gemma3-270m": _gemma3(18, 640, 4, 1, 256, 2048, 512, vocab_size=262_144, rope_scaling=None),
    "gemma3-1b": _gemma3(26, 1152, 4, 1, 256, 6912, 512, vocab_size=262_144, rope_scaling=None),
    "gemma3-4b": _gemma3(34, 2560, 8, 4, 256, 10240, 1024),
    "gemma3-12b": _gemma3(48, 3840, 16, 8, 256, 15360, 1024),
    "gemma3-27b": _gemma3(62, 5376, 32, 16, 128, 21504, 1024, attention_scale=168**-0.5),
    "mixtral-8x7b": _mixtral(32, 4096, 32, 14336, 32_000),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 16384, 32_768),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 12288, 1536),
    "olmoe-1b-7b": ModelConfig(
        vocab_size=50_304, num_layers=16, embed_dim=2048, num_heads=16, num_kv_heads=16, head_dim=128, mlp_dim=1024,
        rope_theta=10_000.0, norm_eps=1e-5, qk_norm="full", **_BF16,
        moe=MoEConfig(num_experts=64, top_k=8, mlp_dim=1024, renormalize=False, load_balance_coef=0.01, z_loss_coef=1e-3),
    ),
    "deepseek-v2": ModelConfig(
        vocab_size=102_400, num_layers=60, embed_dim=5120, num_heads=128, num_kv_heads=128, head_dim=128, mlp_dim=12288,
        rope_theta=10_000.0, norm_eps=1e-6, **_BF16, mla=MLAConfig(),
        rope_scaling=RopeScaling("yarn", factor=40.0, original_length=4096, attention_factor=1.0),
        attention_scale=_yarn_scale(192, 40.0, 0.707),
        moe=MoEConfig(
            num_experts=160, top_k=6, mlp_dim=1536, renormalize=False, routed_scaling=16.0, num_groups=8, top_k_groups=3,
            shared_mlp_dim=2 * 1536, first_k_dense=1, load_balance_coef=0.001, z_loss_coef=0.0,
        ),
    ),
    "deepseek-v3": ModelConfig(
        vocab_size=129_280, num_layers=61, embed_dim=7168, num_heads=128, num_kv_heads=128, head_dim=128, mlp_dim=18432,
        rope_theta=10_000.0, norm_eps=1e-6, **_BF16, mla=MLAConfig(),
        rope_scaling=RopeScaling("yarn", factor=40.0, original_length=4096, attention_factor=1.0),
        attention_scale=_yarn_scale(192, 40.0, 1.0),
        moe=MoEConfig(
            num_experts=256, top_k=8, mlp_dim=2048, scoring="sigmoid", selection_bias=True, routed_scaling=2.5, num_groups=8,
            top_k_groups=4, shared_mlp_dim=2048, first_k_dense=3, load_balance_coef=1e-4, z_loss_coef=0.0,
        ),
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}  # fmt: skip


def preset(name: str, **change) -> ModelConfig:
    """The config of a published model, with fields changed; UserError for a name that is none."""
    if name not in PRESETS:
        raise UserError(f"no model is called {name!r}; {did_you_mean(name, PRESETS)}")
    return dataclasses.replace(PRESETS[name], **change)
