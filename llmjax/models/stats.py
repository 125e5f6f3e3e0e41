"""Parameter counts and FLOPs, from the config alone."""

from __future__ import annotations

import math

import jax

from llmjax.models.config import ModelConfig
from llmjax.models.spec import is_spec, num_params
from llmjax.models.transformer import transformer_spec


def total_params(cfg: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return num_params(transformer_spec(cfg))


def active_params(cfg: ModelConfig) -> int:
    """Parameters that one token touches: of the experts, only `top_k`."""
    specs = jax.tree.leaves(transformer_spec(cfg), is_leaf=is_spec)
    return round(sum(math.prod(spec.shape) * _share(spec, cfg) for spec in specs))


def _share(spec, cfg: ModelConfig) -> float:
    return cfg.experts.top_k / cfg.experts.num_experts if "expert" in spec.axes else 1.0


def forward_flops_per_token(cfg: ModelConfig, length: int) -> float:
    """Matrix-product FLOPs of one token in a causal sequence of `length`: 2 per active weight of a matrix, and 2 per number
    of the keys and values that a query meets (Kaplan et al. 2020, arXiv:2001.08361, table 1, with causal masking and
    windows); the look-up of the input, norms and biases are free. Modules for multi-token prediction count.
    """
    specs = jax.tree.leaves(transformer_spec(cfg), is_leaf=is_spec)
    matrices = sum(math.prod(spec.shape) * _share(spec, cfg) for spec in specs if spec.constant is None)
    lookup = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.embed_dim
    keys = sum(_mean_keys(min(window, length), length) for window in (*cfg.windows, *(length,) * cfg.num_mtp_layers))
    matrices += cfg.num_mtp_layers * cfg.vocab_size * cfg.embed_dim  # the head is used once more by each module
    return 2.0 * (matrices - lookup) + 2.0 * keys * cfg.num_heads * (cfg.qk_dim + cfg.v_dim)


def _mean_keys(window: int, length: int) -> float:
    """Keys that a query sees on average, to leading order."""
    return window - window**2 / (2 * length)


def train_flops_per_token(cfg: ModelConfig, length: int, frozen: bool = False) -> float:
    """Forward and backward: three times the forward pass; twice if the weights are frozen (the low rank itself is free)."""
    return (2.0 if frozen else 3.0) * forward_flops_per_token(cfg, length)


def steps_for_flops(cfg: ModelConfig, length: int, batch_size: int, budget: float) -> int:
    """Steps of batch_size sequences of `length` tokens whose training FLOPs are nearest to `budget`, at least one."""
    return max(1, round(budget / (batch_size * length * train_flops_per_token(cfg, length))))
