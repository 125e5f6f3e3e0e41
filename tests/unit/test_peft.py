"""Adapters of PEFT and ours are the same thing: each reads what the other writes, to equal logits."""

import dataclasses
import json
import os

import jax
import numpy as np
import peers
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from llmjax.errors import UserError
from llmjax.interop.hf_folder import load_params, read_config
from llmjax.interop.peft_folder import load_adapter, save_adapter
from llmjax.models.lora import LoRAConfig, merge

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity
FAMILIES = ("llama3", "phi3", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
LORA = LoRAConfig(rank=3, alpha=6.0)
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=FAMILIES, name="case")
def make_case(request, tmp_path_factory):
    """(folder, our config, family, our parameters)."""
    return open_case(request.param, tmp_path_factory)


def open_case(name, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp(name) / "hf")
    peers.save(name, folder)
    cfg, raw = read_config(folder)
    cfg = dataclasses.replace(cfg, layer_loop="unroll")
    return folder, cfg, raw["model_type"], load_params(folder, cfg, raw["model_type"])


def peer_with(folder, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def compare(merged, base, cfg, peer):
    text = tiny.tokens(cfg, 2, 20)
    got, want = tiny.logits(merged, text, cfg), peers.logits(peer, text)
    assert np.max(np.abs(got - want)) <= TOLERANCE
    assert np.max(np.abs(got - tiny.logits(base, text, cfg))) > 0.1


def test_peft_reads_what_we_write(case, tmp_path):
    folder, cfg, family, base = case
    updates = tiny.updates(cfg, LORA)
    save_adapter(updates, LORA, cfg, family, str(tmp_path / "adapter"), folder)
    compare(merge(base, updates, LORA, cfg), base, cfg, peer_with(folder, str(tmp_path / "adapter")))


def test_peft_reads_part_of_the_matrices(case, tmp_path):
    folder, cfg, family, base = case
    lora = dataclasses.replace(LORA, targets=("o", "blocks.mlp.down"))
    updates = tiny.updates(cfg, lora)
    save_adapter(updates, lora, cfg, family, str(tmp_path / "adapter"))
    compare(merge(base, updates, lora, cfg), base, cfg, peer_with(folder, str(tmp_path / "adapter")))


def test_we_read_what_peft_writes(case, tmp_path):
    folder, cfg, family, base = case
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    linear = {n.rpartition(".")[2] for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    if cfg.moe:  # PEFT would take these for experts of an older format
        linear -= {"gate_proj", "up_proj", "down_proj"}
    parameters = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")] if cfg.moe else None
    first = min(linear)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=5, use_rslora=True, target_modules=sorted(linear),
        target_parameters=parameters, rank_pattern={first: 2}, alpha_pattern={first: 7},
    )  # fmt: skip
    torch.manual_seed(0)
    peer = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, value in peer.named_parameters():
            if "lora_B" in name:
                value.copy_(0.2 * torch.randn_like(value))
    peer.save_pretrained(str(tmp_path / "adapter"))
    updates, lora = load_adapter(str(tmp_path / "adapter"), cfg, family)
    assert lora.rank == 4
    compare(merge(base, updates, lora, cfg), base, cfg, peer)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_older_adapters_with_a_pair_for_each_expert(name, tmp_path, tmp_path_factory):
    """As PEFT wrote them when experts were modules; PEFT itself converts them when it loads."""
    folder, cfg, family, base = open_case(name, tmp_path_factory)
    updates = tiny.updates(cfg, LORA)
    prefix, names = {
        "mixtral": ("block_sparse_moe.experts", dict(gate="w1", up="w3", down="w2")),
        "qwen3_moe": ("mlp.experts", dict(gate="gate_proj", up="up_proj", down="down_proj")),
    }[name]
    tensors = {}
    for layer in range(cfg.num_layers):
        for expert in range(cfg.moe.num_experts):
            for ours, theirs in names.items():
                update = getattr(updates.blocks.mlp, ours)
                module = f"base_model.model.model.layers.{layer}.{prefix}.{expert}.{theirs}"
                tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(update.a[layer, expert].T)
                tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(update.b[layer, expert].T)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=[*names.values()])
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    read, lora = load_adapter(str(adapter), cfg, family)
    compare(merge(base, read, lora, cfg), base, cfg, peer_with(folder, str(adapter)))


@pytest.mark.parametrize("name", peers.FAMILIES)
def test_there_and_back(name, tmp_path, tmp_path_factory):
    _, cfg, family, base = open_case(name, tmp_path_factory)
    updates = tiny.updates(cfg, LORA)
    save_adapter(updates, LORA, cfg, family, str(tmp_path / "adapter"))
    again, lora = load_adapter(str(tmp_path / "adapter"), cfg, family)
    want, got = merge(base, updates, LORA, cfg), merge(base, again, lora, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), want, got)


def change_tensors(adapter, change):
    path = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(adapter, **fields):
    path = f"{adapter}/adapter_config.json"
    with open(path) as file:
        config = json.load(file) | fields
    with open(path, "w") as file:
        json.dump(config, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BREAKS = {
    "no tensors": (lambda a: os.remove(f"{a}/adapter_model.safetensors"), "not a readable safetensors file"),
    "no config": (lambda a: os.remove(f"{a}/adapter_config.json"), "adapter_config.json: no such file"),
    "other method": (lambda a: change_config(a, peft_type="IA3"), "peft_type='IA3' is not supported"),
    "dora": (lambda a: change_config(a, use_dora=True), "use_dora=True is not supported"),
    "biases": (lambda a: change_config(a, bias="all"), "bias='all' is not supported"),
    "whole modules": (lambda a: change_config(a, modules_to_save=["lm_head"]), "modules_to_save=.*not supported"),
    "half a pair": (lambda a: change_tensors(a, lambda t: t.pop(Q)), "q_proj.lora_B.weight' has no place, or no counterpart"),
    "unknown": (lambda a: change_tensors(a, lambda t: t.update(spare=np.zeros(2))), "'spare' has no place"),
    "shape": (
        lambda a: change_tensors(a, lambda t: t.update({Q: np.zeros((3, 7), np.float32)})), r"\[3, 7\] and its lora_B .* fit"),
    "quantized": (
        lambda a: change_tensors(a, lambda t: t.update({Q: t[Q].astype(np.int8)})), f"tensor '{Q}' is of dtype I8; convert"),
    "empty": (lambda a: change_tensors(a, lambda t: t.clear()), "holds no update"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_adapters_are_one_clear_line(kind, tmp_path):
    cfg = tiny.DENSE
    save_adapter(tiny.updates(cfg, LORA), LORA, cfg, "llama", str(tmp_path / "adapter"))
    damage, words = BREAKS[kind]
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=words) as caught:
        load_adapter(str(tmp_path / "adapter"), cfg, "llama")
    assert "\n" not in str(caught.value)


def test_half_of_one_matrix_cannot_be_written(tmp_path):
    lora = dataclasses.replace(LORA, targets=("gate",))
    with pytest.raises(UserError, match="is one matrix in this format, so lora.targets must have all of it: blocks.mlp.up too"):
        save_adapter(tiny.updates(tiny.SPARSE, lora), lora, tiny.SPARSE, "mixtral", str(tmp_path / "adapter"))
    assert not os.listdir(tmp_path)
