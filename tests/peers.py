"""Tiny random models of every family, made by transformers: what ours are compared with."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED = dict(
    vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=44,
    num_hidden_layers=4, max_position_embeddings=512, initializer_range=0.2, pad_token_id=None, bos_token_id=None,
    eos_token_id=None, attn_implementation="eager",
)  # fmt: skip
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=8.0, beta_fast=4.0, beta_slow=1.0, original_max_position_embeddings=16)
MLA = dict(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=12, num_key_value_heads=4, head_dim=16)
DEEPSEEK = MLA | dict(
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=20, first_k_dense_replace=1, n_group=4, topk_group=2,
)  # fmt: skip
GEMMA = dict(sliding_window=5, query_pre_attn_scalar=24, hidden_activation="gelu_pytorch_tanh")
LOCAL, GLOBAL = "sliding_attention", "full_attention"
FAMILIES = {
    "llama3": ("Llama", dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-bias": ("Llama", dict(attention_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "phi3": ("Phi3", dict(sliding_window=5)),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", dict(sliding_window=5, layer_types=[LOCAL, GLOBAL, LOCAL, GLOBAL], rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": YARN})),
    "gemma": ("Gemma", dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3Text", GEMMA | dict(num_hidden_layers=7, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}})),
    "gemma3-layers": ("Gemma3Text", GEMMA | dict(layer_types=[GLOBAL, LOCAL, LOCAL, GLOBAL])),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral-one": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=1)),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True)),
    "qwen3_moe-every": ("Qwen3Moe", dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True, decoder_sparse_step=2,
        num_hidden_layers=5)),
    "olmoe": ("Olmoe", dict(num_experts=8, num_experts_per_tok=3, head_dim=8, norm_topk_prob=False)),
    "deepseek_v2": ("DeepseekV2", DEEPSEEK | dict(
        q_lora_rank=None, n_shared_experts=2, topk_method="group_limited_greedy", routed_scaling_factor=4.0)),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | dict(
        q_lora_rank=20, n_shared_experts=1, routed_scaling_factor=2.5,
        rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.8))),
    "gpt_oss": ("GptOss", dict(
        num_local_experts=4, num_experts_per_tok=2, sliding_window=5, swiglu_limit=0.5, head_dim=64,
        rope_parameters=YARN | dict(truncate=False))),
}  # fmt: skip


def save(family: str, folder: str):
    """The peer of `family`, saved to `folder`; every norm, bias and sink away from its initial value."""
    name, fields = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM")
    torch.manual_seed(0)
    peer = model_class(config_class(**SHARED | fields)).float().eval()
    with torch.no_grad():
        for key, value in [*peer.named_parameters(), *peer.named_buffers()]:
            if any(part in key for part in ("norm", "bias", "sinks")):
                value.add_(0.2 * torch.randn_like(value))
    peer.save_pretrained(folder)
    return peer


def logits(peer, tokens, mask=None):
    with torch.no_grad():
        inputs = dict(input_ids=torch.from_numpy(tokens).long())
        if mask is not None:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            inputs |= dict(attention_mask=torch.from_numpy(mask).long(), position_ids=torch.from_numpy(positions).long())
        return peer(**inputs).logits.numpy()
