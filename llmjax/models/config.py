"""The shape of a model. Dense and sparse differ by one field: `ModelConfig.moe`; families differ by fields alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from llmjax.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from llmjax.errors import UserError
from llmjax.kernels import AttentionKernel

UNLIMITED = 2**30  # the window of a layer that sees all earlier tokens


@dataclass(frozen=True)
class MoEConfig:
    """A sparse feed-forward layer: a gating network sends each token to `top_k` of `num_experts` experts.

    mlp_dim: hidden width of one expert (active width of a token: top_k * mlp_dim).
    router: "top_k"; "expert_choice": experts choose tokens (arXiv:2202.09368), for training only, since a token's fate depends
        on later ones; "hash": experts by the token's id, not learned (arXiv:2106.04426).
    capacity_factor: 0 serves every choice; else an expert takes ceil(capacity_factor * top_k * T / num_experts) tokens of a
        sequence of T and the others are dropped (arXiv:2006.16668). Only pre-training and SFT drop: see `ModelConfig.dropless`.
    router_noise, router_jitter: in training, noise on the logits (deviation router_noise / num_experts, arXiv:2106.05974) and
        factor 1 +- router_jitter on the router's input (arXiv:2101.03961).
    bias_update_rate: after each step of pre-training and SFT the selection bias of an expert with more than its share of
        the batch falls by this much, and that of one with less rises (arXiv:2408.15664, algorithm 1).
    expert_parallel: over the mesh axis `expert`, tokens are exchanged by "all_gather" (each device sees all of them) or by
        "all_to_all" (each sends its tokens to where their experts are). exchange_factor: 0 for room for the worst case in that
        exchange; else room for that many times an even share (from each device on CPU, from all together where the backend
        has a ragged exchange), and what does not fit is dropped and counted.
    sequence_balance_coef: weight of the load-balancing loss taken in each sequence by itself (arXiv:2412.19437, eq. 17).
    scoring: scores are the softmax over experts, or a sigmoid of each (DeepSeek-V3, arXiv:2412.19437, eq. 15).
    renormalize: the chosen scores are divided by their sum (Mixtral); else used as they are (OLMoE).
    routed_scaling: factor on the gate weights. router_bias: a learned bias on the router's logits (gpt-oss).
    selection_bias: a bias that is added to the scores for the choice only, never to a weight, and gets no gradient
        (auxiliary-loss-free balancing, arXiv:2408.15664).
    num_groups, top_k_groups: experts lie in num_groups groups and a token's experts come from top_k_groups of them; a group
        is worth its best score, with selection_bias the sum of its two best (arXiv:2412.19437, section 2.1.2).
    shared_mlp_dim: hidden width of the experts that every token passes besides, 0 for none. first_k_dense: that many
        layers at the bottom are dense. expert_bias: biases on the experts' matrices (gpt-oss).
    every: above those, every n-th layer is sparse and the others are dense (GShard has 2, arXiv:2006.16668).
    load_balance_coef: weight of the load-balancing loss, which is 1 per layer at perfect balance (Fedus et al. 2021,
        arXiv:2101.03961, eq. 4, divided by top_k).
    z_loss_coef: weight of the router z-loss (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
    """

    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    mlp_dim: PositiveInt = 256
    renormalize: bool = True
    load_balance_coef: NonNegativeFloat = 0.01
    z_loss_coef: NonNegativeFloat = 1e-3
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    routed_scaling: PositiveFloat = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    num_groups: PositiveInt = 1
    top_k_groups: PositiveInt = 1
    shared_mlp_dim: NonNegativeInt = 0
    first_k_dense: NonNegativeInt = 0
    expert_bias: bool = False
    router: Literal["top_k", "expert_choice", "hash"] = "top_k"
    capacity_factor: NonNegativeFloat = 0.0
    router_noise: NonNegativeFloat = 0.0
    router_jitter: Annotated[float, Range(least=0, below=1)] = 0.0
    bias_update_rate: NonNegativeFloat = 0.0
    expert_parallel: Literal["all_gather", "all_to_all"] = "all_gather"
    exchange_factor: NonNegativeFloat = 0.0
    sequence_balance_coef: NonNegativeFloat = 0.0
    every: PositiveInt = 1

    @property
    def has_slots(self) -> bool:
        """Whether an expert has a fixed number of places in training."""
        return self.router == "expert_choice" or self.capacity_factor > 0

    def validate(self) -> None:
        self._validate_router()
        if self.top_k > self.num_experts:
            raise UserError(f"top_k={self.top_k} must not exceed num_experts={self.num_experts}")
        if self.num_experts % self.num_groups:
            raise UserError(f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}")
        if self.top_k_groups > self.num_groups:
            raise UserError(f"top_k_groups={self.top_k_groups} must not exceed num_groups={self.num_groups}")
        reachable = self.top_k_groups * self.num_experts // self.num_groups
        if self.top_k > reachable:
            raise UserError(f"top_k={self.top_k}, but top_k_groups={self.top_k_groups} hold only {reachable} experts")

    def check_router_learns(self, where: str = "") -> None:
        """UserError, beginning with `where`, if only the balancing losses would train the router: no use in a new model."""
        if self.top_k == 1 and self.renormalize and self.router == "top_k":
            raise UserError(
                f"{where}top_k=1 with renormalize=True makes every gate 1, so the router gets no gradient; "
                "set renormalize=False"
            )

    def _validate_router(self) -> None:
        if self.bias_update_rate and not self.selection_bias:
            raise UserError(f"bias_update_rate={self.bias_update_rate} needs selection_bias=True: it is what is updated")
        if self.router != "top_k" and (self.selection_bias or self.num_groups > 1):
            raise UserError(f"router={self.router} makes no use of selection_bias and num_groups; leave them out")
        if self.has_slots and (self.expert_bias or self.expert_parallel == "all_to_all"):
            raise UserError("experts with a capacity go with neither expert_bias nor expert_parallel=all_to_all")
        if self.expert_bias and self.expert_parallel == "all_to_all":
            raise UserError("expert_bias goes with expert_parallel=all_gather only")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for longer contexts than the model was first trained on.

    kind: "linear" divides all by `factor` (arXiv:2306.15595); "llama3" divides the slow ones (wavelength above
    original_length / low_freq_factor), keeps the fast ones, blends between (Llama 3.1's own rule); "yarn" blends between
    beta_fast and beta_slow turns in original_length (arXiv:2309.00071, eq. 21-23; truncate: at whole dimensions) and
    multiplies the table by attention_factor, 0 for 0.1 ln(factor) + 1.
    """

    kind: Literal["linear", "llama3", "yarn"] = "llama3"
    factor: PositiveFloat = 8.0
    original_length: PositiveInt = 8192
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    truncate: bool = True
    attention_factor: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one latent vector.

    kv_lora_rank: width of that vector, which is what the cache holds, with one rotary key of rope_dim shared by all heads.
    q_lora_rank: width of the queries' latent vector, 0 for a full matrix. nope_dim, rope_dim: parts of a head's query and key
    without and with position. v_dim: width of a head's value.
    """

    kv_lora_rank: PositiveInt = 512
    q_lora_rank: NonNegativeInt = 1536
    nope_dim: PositiveInt = 128
    rope_dim: PositiveInt = 64
    v_dim: PositiveInt = 128

    def validate(self) -> None:
        if self.rope_dim % 2:
            raise UserError(f"rope_dim={self.rope_dim} must be even: RoPE rotates pairs")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer: RMSNorm, RoPE, grouped-query attention, gated feed-forward or mixture of experts.

    vocab_size: 0 takes the tokenizer's size. dtype: of activations ("bfloat16" on accelerators); parameters,
    norms, softmax, router and losses are float32. layer_loop: "scan" compiles one block whatever the depth,
    "unroll" runs 10-15 % faster on CPU; "auto" chooses by backend. remat: recompute blocks in the backward pass.
    attention_kernel: how whole sequences attend, in `llmjax.kernels.attention`: "plain" keeps all scores, "chunked" has bounded
    memory, "blocked" is fast for short sequences on CPU, "splash" is JAX's kernel for TPUs; "auto" chooses by platform and
    length.

    The rest tells families apart. activation: "silu" (SwiGLU), "gelu" (GeGLU, tanh form) or "clipped_silu" (gpt-oss), its
    inputs clipped at activation_limit. sliding_window: tokens that a local layer sees, itself included; 0: no local layers;
    global_every: every n-th layer sees everything, 0: none; global_layers: so do these, counted from 0.
    local_rope_theta: of local layers, unscaled; 0: as in the others.
    qk_norm: RMSNorm of queries and keys per head (Qwen3, Gemma-3) or over all heads ("full", OLMoE). qkv_bias, out_bias:
    biases of the projections. attention_sinks: a learned logit per head in the softmax's denominator (gpt-oss).
    attention_scale: 0 for 1/sqrt(width of a query). attention_softcap, logit_softcap: c tanh(x / c), 0 for none (Gemma-2).
    post_norms: a norm behind each branch (Gemma); pre_norms: one before it, which OLMo-2 has not. norm_offset: the scale of
    a norm is weight + norm_offset (Gemma: 1). scale_embedding: embeddings times sqrt(embed_dim) (Gemma). mla: latent
    attention in place of grouped queries.
    num_mtp_layers: modules that predict one token further each, for training only; mtp_coef: weight of their loss, the mean
    over modules (DeepSeek-V3, arXiv:2412.19437, section 2.2).
    """

    vocab_size: NonNegativeInt = 0
    num_layers: PositiveInt = 4
    embed_dim: PositiveInt = 128
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    mlp_dim: PositiveInt = 344
    moe: MoEConfig | None = None
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    remat: bool = False
    attention_kernel: AttentionKernel = "auto"
    activation: Literal["silu", "gelu", "clipped_silu"] = "silu"
    activation_limit: PositiveFloat = 7.0
    rope_scaling: RopeScaling | None = None
    sliding_window: NonNegativeInt = 0
    global_every: NonNegativeInt = 0
    global_layers: tuple[NonNegativeInt, ...] = ()
    local_rope_theta: NonNegativeFloat = 0.0
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    attention_sinks: bool = False
    attention_scale: NonNegativeFloat = 0.0
    attention_softcap: NonNegativeFloat = 0.0
    logit_softcap: NonNegativeFloat = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    scale_embedding: bool = False
    mla: MLAConfig | None = None
    num_mtp_layers: NonNegativeInt = 0
    mtp_coef: NonNegativeFloat = 0.3

    @property
    def experts(self) -> MoEConfig:
        """The mixture of experts of a model that has one."""
        if self.moe is None:
            raise ValueError("a dense model has no experts")
        return self.moe

    def dropless(self) -> ModelConfig:
        """The model as it decodes and scores: every choice is served, whatever capacity and room it is pre-trained with.

        What is dropped depends on padding and on neighbours, so log-probabilities, values and rewards would too, and sampling
        and training would disagree. Raises UserError where experts choose: there a token's fate depends on later ones.
        """
        if self.moe is None:
            return self
        if self.moe.router == "expert_choice":
            raise UserError(
                "model.moe.router=expert_choice cannot decode, nor score answers: experts choose among all tokens, later ones "
                "too; it is for pre-training only"
            )
        return replace(self, moe=replace(self.moe, capacity_factor=0.0, exchange_factor=0.0))

    @property
    def latent(self) -> MLAConfig:
        """The latent attention of a model that has it."""
        if self.mla is None:
            raise ValueError("the model has no latent attention")
        return self.mla

    @property
    def qk_dim(self) -> int:
        """Width of one head's query and key."""
        return self.head_dim if self.mla is None else self.mla.nope_dim + self.mla.rope_dim

    @property
    def v_dim(self) -> int:
        """Width of one head's value."""
        return self.head_dim if self.mla is None else self.mla.v_dim

    @property
    def rope_dim(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.head_dim if self.mla is None else self.mla.rope_dim

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Which layers have experts: none in a dense model."""
        if self.moe is None:
            return (False,) * self.num_layers
        above = (layer - self.moe.first_k_dense + 1 for layer in range(self.num_layers))
        return tuple(n > 0 and n % self.moe.every == 0 for n in above)

    @property
    def num_dense_layers(self) -> int:
        """Layers of a sparse model that are dense; 0 in a dense model."""
        return 0 if self.moe is None else self.sparse_layers.count(False)

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens each layer sees, itself included; UNLIMITED for a global layer."""

        def one(layer):
            is_global = layer in self.global_layers or (self.global_every > 0 and (layer + 1) % self.global_every == 0)
            return UNLIMITED if self.sliding_window == 0 or is_global else self.sliding_window

        return tuple(one(layer) for layer in range(self.num_layers))

    def validate(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.global_every and not self.sliding_window:
            raise UserError(f"global_every={self.global_every} needs a sliding_window for the layers between")
        if self.global_layers and not self.sliding_window:
            raise UserError(f"global_layers={self.global_layers} needs a sliding_window for the other layers")
        if any(layer >= self.num_layers for layer in self.global_layers):
            raise UserError(f"global_layers={self.global_layers}: there are only num_layers={self.num_layers}, counted from 0")
        if not (self.pre_norms or self.post_norms):
            raise UserError("pre_norms=False and post_norms=False leave the layers without norms; set one of them")
        if self.moe is not None and self.moe.first_k_dense + self.moe.every > self.num_layers:
            below = f"moe.first_k_dense={self.moe.first_k_dense} and moe.every={self.moe.every}"
            raise UserError(f"{below} leave no sparse layer of num_layers={self.num_layers}; their sum must not exceed it")
        unknown = {"blocked": ("attention_softcap", "attention_sinks"), "splash": ("attention_sinks",)}
        for name in unknown.get(self.attention_kernel, ()):
            if getattr(self, name):
                what = f"{name}={getattr(self, name)}"
                raise UserError(f"attention_kernel={self.attention_kernel} does not know {what}; take auto, chunked or plain")
        if self.mla is not None:
            plain = dict(qk_norm="none", attention_sinks=False, qkv_bias=False, out_bias=False)
            for name, value in plain.items():
                if getattr(self, name) != value:
                    raise UserError(f"{name}={getattr(self, name)} does not go with latent attention (mla)")
