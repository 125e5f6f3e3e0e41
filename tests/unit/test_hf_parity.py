"""Every family against transformers: a tiny random model saved there gives the same logits here, and the way back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import tiny

from llmjax.generation.decode import decode_step, prefill
from llmjax.interop.hf_folder import load_params, read_config, save_params
from llmjax.objectives.lm import lm_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=peers.FAMILIES, name="case")
def make_case(request, tmp_path_factory):
    """(the peer, its folder, our config, our parameters), every norm, bias and sink away from its initial value."""
    folder = str(tmp_path_factory.mktemp(request.param) / "hf")
    peer = peers.save(request.param, folder)
    cfg, raw = read_config(folder)
    assert cfg.dtype == "float32"
    return peer, folder, dataclasses.replace(cfg, layer_loop="unroll"), raw, load_params(folder, cfg, raw["model_type"])


def test_logits(case):
    peer, _, cfg, _, params = case
    text = tiny.tokens(cfg, 2, 24)
    want = peers.logits(peer, text)
    assert np.std(want) > 0.2
    assert np.max(np.abs(tiny.logits(params, text, cfg) - want)) <= TOLERANCE
    scanned = dataclasses.replace(cfg, layer_loop="scan")
    assert np.max(np.abs(tiny.logits(params, text, scanned) - want)) <= TOLERANCE


def test_left_padding(case):
    peer, _, cfg, _, params = case
    text, mask = tiny.tokens(cfg, 2, 20), np.ones((2, 20), np.int32)
    mask[1, :7] = 0
    want = peers.logits(peer, text, mask)
    got = tiny.logits(params, text, cfg, segments=mask)
    assert np.max(np.abs(got - want)[mask > 0]) <= TOLERANCE


def test_packing(case):
    peer, _, cfg, _, params = case
    first, second = tiny.tokens(cfg, 1, 9, seed=1), tiny.tokens(cfg, 1, 11, seed=2)
    segments = np.array([[1] * 9 + [2] * 11])
    positions = np.array([[*range(9), *range(11)]])
    got = tiny.logits(params, np.concatenate([first, second], axis=1), cfg, segments=segments, positions=positions)
    want = np.concatenate([peers.logits(peer, first), peers.logits(peer, second)], axis=1)
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
    want = peers.logits(peer, full)
    mask = np.ones((2, 8), np.int32)
    state = jax.jit(prefill, static_argnames=("cfg", "size"))(params, prompt, mask, cfg=cfg, size=40)
    step = jax.jit(decode_step, static_argnames="cfg")
    for t in range(8, 40):
        assert np.max(np.abs(np.asarray(state.logits) - want[:, t - 1])) <= TOLERANCE, f"token {t}"
        np.testing.assert_array_equal(np.argmax(state.logits, axis=-1), full[:, t])
        state = step(params, state, jnp.asarray(full[:, t]), cfg=cfg)


def test_invariant_25_export_loads_there_with_equal_logits(case, tmp_path):
    peer, _, cfg, raw, params = case
    folder = str(tmp_path / "out")
    save_params(params, cfg, raw["model_type"], folder, source=raw, shard_bytes=20_000)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    text = tiny.tokens(cfg, 2, 24)
    np.testing.assert_array_equal(peers.logits(again.float().eval(), text), peers.logits(peer, text))


def test_config_written_without_its_source_reads_back_as_the_same_model(case, tmp_path):
    peer, _, cfg, raw, params = case
    folder = str(tmp_path / "out")
    save_params(params, cfg, raw["model_type"], folder)
    again, _ = read_config(folder)
    text = tiny.tokens(cfg, 1, 24)
    want = tiny.logits(params, text, cfg)
    np.testing.assert_allclose(tiny.logits(params, text, dataclasses.replace(again, layer_loop="unroll")), want, atol=1e-5)
    peer_again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    np.testing.assert_allclose(peers.logits(peer_again, text), peers.logits(peer, text), atol=1e-5)


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
    first = grads.blocks if grads.dense_blocks is None else grads.dense_blocks
    name, scale = ("input", first.attention_norm) if cfg.pre_norms else ("post_attention", first.attention_post_norm)
    norm = getattr(peer.model.layers[0], f"{name}_layernorm").weight.grad.numpy()
    assert np.max(np.abs(np.asarray(scale[0]) - norm)) <= 1e-3 * np.max(np.abs(norm))


def test_invariant_25_both_spellings_of_the_rotary_settings(case):
    _, folder, cfg, raw, _ = case
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    scaling = dict(raw["rope_parameters"])
    if "full_attention" in scaling:  # Gemma-3, OLMo-3
        if raw["model_type"] == "gemma3_text":
            old["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = dict(scaling["full_attention"])
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
