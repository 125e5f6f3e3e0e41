"""Parameter counts and FLOPs, from the config alone."""

from __future__ import annotations

from llmjax.models.config import ModelConfig
from llmjax.models.spec import num_params
from llmjax.models.transformer import transformer_spec


def total_params(cfg: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return num_params(transformer_spec(cfg))


def active_params(cfg: ModelConfig) -> int:
    """Parameters that one token touches: of the experts, only `top_k`."""
    if cfg.moe is None:
        return total_params(cfg)
    expert = 3 * cfg.embed_dim * cfg.moe.mlp_dim
    idle = cfg.num_layers * (cfg.moe.num_experts - cfg.moe.top_k) * expert
    return total_params(cfg) - idle


def forward_flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Matrix-product FLOPs of one token in a causal sequence of `length`: 2 per active weight, 2 * 2 * N * H * length / 2
    for attention (Kaplan et al. 2020, arXiv:2001.08361, table 1, with causal masking); the look-up of the input is free.
    """
    lookup = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.embed_dim
    norms = cfg.embed_dim * (2 * cfg.num_layers + 1)
    weights = active_params(cfg) - lookup - norms
    return 2.0 * weights + 2.0 * cfg.num_layers * cfg.num_heads * cfg.head_dim * length


def train_flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Forward and backward: three times the forward pass."""
    return 3.0 * forward_flops_per_token(cfg, length)
