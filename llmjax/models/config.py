"""The shape of a model. Dense and sparse differ by one field: `ModelConfig.moe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmjax.errors import UserError


@dataclass(frozen=True)
class MoEConfig:
    """A sparse feed-forward layer: a gating network sends each token to `top_k` of `num_experts` experts.

    mlp_dim: hidden width of one expert (active width of a token: top_k * mlp_dim).
    renormalize: the chosen probabilities are divided by their sum (Mixtral); else used as they are (OLMoE).
    load_balance_coef: weight of the load-balancing loss, which is 1 per layer at perfect balance (Fedus et al. 2021,
        arXiv:2101.03961, eq. 4, divided by top_k).
    z_loss_coef: weight of the router z-loss (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
    """

    num_experts: int = 8
    top_k: int = 2
    mlp_dim: int = 256
    renormalize: bool = True
    load_balance_coef: float = 0.01
    z_loss_coef: float = 1e-3

    def validate(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")
        if self.top_k == 1 and self.renormalize:
            raise UserError(
                "top_k=1 with renormalize=True makes every gate 1, so the router gets no gradient; set renormalize=False"
            )
        if self.mlp_dim < 1:
            raise UserError(f"mlp_dim={self.mlp_dim} must be positive")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU or mixture of experts.

    vocab_size: 0 takes the tokenizer's size. dtype: of activations ("bfloat16" on accelerators); parameters,
    norms, softmax, router and losses are float32. layer_loop: "scan" compiles one block whatever the depth,
    "unroll" runs 10-15 % faster on CPU; "auto" chooses by backend. remat: recompute blocks in the backward pass.
    """

    vocab_size: int = 0
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 344
    moe: MoEConfig | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    remat: bool = False

    def validate(self) -> None:
        for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.vocab_size < 0:
            raise UserError(f"vocab_size={self.vocab_size} must be positive, or 0 for the tokenizer's size")
