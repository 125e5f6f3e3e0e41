"""Every family against transformers: a tiny random model saved there gives the same logits here, and the way back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.generation.decode import decode_step, prefill
from llmjax.interop.hf_folder import load_params, read_config, save_params
from llmjax.objectives.lm import lm_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4
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
FAMILIES = {
    "llama3": ("Llama", dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3Text", GEMMA | dict(num_hidden_layers=7, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}})),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True)),
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


@pytest.fixture(scope="module", params=FAMILIES, name="case")
def make_case(request, tmp_path_factory):
    """(the peer, its folder, our config, our parameters), every norm, bias and sink away from its initial value."""
    name, fields = FAMILIES[request.param]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM")
    torch.manual_seed(0)
    peer = model_class(config_class(**SHARED | fields)).float().eval()
    with torch.no_grad():
        for key, value in [*peer.named_parameters(), *peer.named_buffers()]:
            if any(part in key for part in ("norm", "bias", "sinks")):
                value.add_(0.2 * torch.randn_like(value))
    folder = str(tmp_path_factory.mktemp(request.param) / "hf")
    peer.save_pretrained(folder)
    cfg, raw = read_config(folder)
    assert cfg.dtype == "float32"
    return peer, folder, dataclasses.replace(cfg, layer_loop="unroll"), raw, load_params(folder, cfg, raw["model_type"])


def peer_logits(peer, tokens, mask=None):
    with torch.no_grad():
        inputs = dict(input_ids=torch.from_numpy(tokens).long())
        if mask is not None:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            inputs |= dict(attention_mask=torch.from_numpy(mask).long(), position_ids=torch.from_numpy(positions).long())
        return peer(**inputs).logits.numpy()


def test_logits(case):
    peer, _, cfg, _, params = case
    text = tiny.tokens(cfg, 2, 24)
    want = peer_logits(peer, text)
    assert np.std(want) > 0.2
    assert np.max(np.abs(tiny.logits(params, text, cfg) - want)) <= TOLERANCE
    scanned = dataclasses.replace(cfg, layer_loop="scan")
    assert np.max(np.abs(tiny.logits(params, text, scanned) - want)) <= TOLERANCE


def test_left_padding(case):
    peer, _, cfg, _, params = case
    text, mask = tiny.tokens(cfg, 2, 20), np.ones((2, 20), np.int32)
    mask[1, :7] = 0
    want = peer_logits(peer, text, mask)
    got = tiny.logits(params, text, cfg, segments=mask)
    assert np.max(np.abs(got - want)[mask > 0]) <= TOLERANCE


def test_packing(case):
    peer, _, cfg, _, params = case
    first, second = tiny.tokens(cfg, 1, 9, seed=1), tiny.tokens(cfg, 1, 11, seed=2)
    segments = np.array([[1] * 9 + [2] * 11])
    positions = np.array([[*range(9), *range(11)]])
    got = tiny.logits(params, np.concatenate([first, second], axis=1), cfg, segments=segments, positions=positions)
    want = np.concatenate([peer_logits(peer, first), peer_logits(peer, second)], axis=1)
    assert np.max(np.abs(got - want)) <= TOLERANCE


def test_cached_decoding_and_greedy_tokens(case):
    """32 tokens, each the peer's most likely one; our cached logits are the peer's at every step."""
    peer, _, cfg, _, params = case
    prompt = tiny.tokens(cfg, 2, 8)
    with torch.no_grad():
        full = peer.generate(
            torch.from_numpy(prompt).long(), max_new_tokens=32, do_sample=False, use_cache=True,
            attention_mask=torch.ones(2, 8).long(), eos_token_id=-1,
        ).numpy().astype(np.int32)  # fmt: skip
    assert full.shape == (2, 40)
    want = peer_logits(peer, full)
    mask = np.ones((2, 8), np.int32)
    state = tiny.jit(prefill, static_argnames=("cfg", "size"))(params, prompt, mask, cfg=cfg, size=40)
    step = tiny.jit(decode_step, static_argnames="cfg")
    for t in range(8, 40):
        assert np.max(np.abs(np.asarray(state.logits) - want[:, t - 1])) <= TOLERANCE, f"token {t}"
        np.testing.assert_array_equal(np.argmax(state.logits, axis=-1), full[:, t])
        state = step(params, state, jnp.asarray(full[:, t]), cfg=cfg)


def test_export_loads_there_with_equal_logits(case, tmp_path):
    peer, _, cfg, raw, params = case
    folder = str(tmp_path / "out")
    save_params(params, cfg, raw["model_type"], folder, source=raw, shard_bytes=20_000)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    text = tiny.tokens(cfg, 2, 24)
    np.testing.assert_array_equal(peer_logits(again.float().eval(), text), peer_logits(peer, text))


def test_config_written_without_its_source_reads_back_as_the_same_model(case, tmp_path):
    peer, _, cfg, raw, params = case
    folder = str(tmp_path / "out")
    save_params(params, cfg, raw["model_type"], folder)
    again, _ = read_config(folder)
    text = tiny.tokens(cfg, 1, 24)
    want = tiny.logits(params, text, cfg)
    np.testing.assert_allclose(tiny.logits(params, text, dataclasses.replace(again, layer_loop="unroll")), want, atol=1e-5)
    peer_again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    np.testing.assert_allclose(peer_logits(peer_again, text), peer_logits(peer, text), atol=1e-5)


def test_gradient_of_the_loss(case):
    peer, _, cfg, raw, params = case
    if cfg.moe is not None:
        coefficients = dict(load_balance_coef=0.0, z_loss_coef=0.0)
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **coefficients))
    text = tiny.tokens(cfg, 2, 16)
    peer.zero_grad()
    ids = torch.from_numpy(text).long()
    peer(input_ids=ids, labels=ids).loss.backward()
    batch = {
        "inputs": text, "targets": np.roll(text, -1, axis=1), "segment_ids": np.ones_like(text),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), text.shape),
        "loss_mask": np.concatenate([np.ones((2, 15), np.int32), np.zeros((2, 1), np.int32)], axis=1),
    }  # fmt: skip
    _, (grads,) = tiny.value_and_grads(lambda p: lm_loss(p, batch, None, cfg)[0], params)
    want = np.sqrt(sum(float((p.grad**2).sum()) for p in peer.parameters() if p.grad is not None))
    got = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert abs(got - want) <= 1e-3 * want
    embed = peer.get_input_embeddings().weight.grad.numpy()
    assert np.max(np.abs(np.asarray(grads.embed) - embed)) <= 1e-3 * np.max(np.abs(embed))
    norm = peer.model.layers[0].input_layernorm.weight.grad.numpy()
    first = grads.blocks if grads.dense_blocks is None else grads.dense_blocks
    assert np.max(np.abs(np.asarray(first.attention_norm[0]) - norm)) <= 1e-3 * np.max(np.abs(norm))


def test_both_spellings_of_the_rotary_settings(case):
    _, folder, cfg, raw, _ = case
    if "full_attention" in raw["rope_parameters"]:
        pytest.skip("the old spelling of Gemma-3 cannot say this theta pattern")
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    scaling = dict(raw["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    old["torch_dtype"] = old.pop("dtype")
    with open(f"{folder}/config.json", "w") as file:
        json.dump(old, file)
    try:
        assert dataclasses.replace(read_config(folder)[0], layer_loop="unroll") == cfg
    finally:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(raw, file)
