"""llmjax-convert and Hugging Face folders: there and back bit for bit, errors in one line, nothing half-written."""

import dataclasses
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from llmjax.commands import convert
from llmjax.config import to_dict
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.files import read_json, write_json_atomic
from llmjax.interop.hf_config import family_of, hf_config, model_config
from llmjax.interop.hf_folder import load_params, read_config, save_params
from llmjax.interop.hf_tokenizer import PLAIN_TEMPLATE, read_tokenizer
from llmjax.models.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from llmjax.models.lora import LoRAConfig, merge
from llmjax.models.presets import PRESETS
from llmjax.results import Summary, write_summary
from llmjax.runs.models import write_model_file
from llmjax.runs.pipeline import keep_source
from llmjax.sharding import MeshConfig, make_mesh
from llmjax.training import checkpoint

CFG = dataclasses.replace(tiny.SPARSE, layer_loop="auto", mlp_dim=12, vocab_size=262)
TOKENIZER = Tokenizer.train((), TokenizerConfig(kind="byte"))
IDS = {"bos_token_id": 1, "eos_token_id": [1, 5], "pad_token_id": 0}


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    """A Mixtral of two layers in several shards, with a tokenizer of bytes beside it."""
    TOKENIZER.save(tmp_path / "tokenizer")
    files = [str(path) for path in (tmp_path / "tokenizer").iterdir()]
    save_params(tiny.language_model(CFG), CFG, "mixtral", str(tmp_path / "hf"), shard_bytes=8_000, beside=files)
    shutil.rmtree(tmp_path / "tokenizer")
    return str(tmp_path / "hf")


@pytest.fixture(name="stage")
def make_stage(tmp_path):
    """What a complete SFT stage with LoRA leaves in a run: the merged model, and the updates that are in it."""
    lora, folder = LoRAConfig(rank=2), tmp_path / "run" / "sft"
    TOKENIZER.save(tmp_path / "run" / "tokenizer")
    base, updates = tiny.language_model(CFG), tiny.updates(CFG, lora)
    checkpoint.save_params(str(folder / "params"), merge(base, updates, lora, CFG))
    checkpoint.save_params(str(folder / "adapter"), updates)
    about = {"kind": "language", "dtype": "float32", "model": to_dict(CFG), "lora": to_dict(lora), "source": None}
    write_json_atomic(folder / "model.json", about)
    write_summary(folder, Summary("sft"))
    return folder


def shards(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def weights(folder):
    found = {}
    for name in shards(folder):
        found |= load_file(f"{folder}/{name}")
    return found


def run(*args):
    convert.run(["llmjax-convert", *args])


def test_there_and_back_is_bit_identical(folder, tmp_path, capsys):
    run(f"--source={folder}", f"--target={tmp_path}/ours")
    run(f"--source={tmp_path}/ours", f"--target={tmp_path}/back")
    assert "mixtral in Hugging Face format, float32" in capsys.readouterr().out
    first, second = weights(folder), weights(tmp_path / "back")
    assert first.keys() == second.keys() and len(shards(folder)) > 2
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], strict=True)
    assert read_json(tmp_path / "back" / "config.json") == read_json(f"{folder}/config.json") | IDS
    assert read_tokenizer(str(tmp_path / "back")).fingerprint() == TOKENIZER.fingerprint()


def test_an_exported_folder_says_where_others_must_stop(stage, tmp_path):
    """Its ids stand in config.json and generation_config.json; those that the model came with are left as they are."""
    run(f"--source={stage}", f"--target={tmp_path}/out")
    assert read_json(tmp_path / "out" / "generation_config.json") == IDS
    assert IDS.items() <= read_json(tmp_path / "out" / "config.json").items()
    own = {"temperature": 0.6, "eos_token_id": [5, 7]}
    write_json_atomic(tmp_path / "out" / "generation_config.json", own)
    run(f"--source={tmp_path}/out", f"--target={tmp_path}/ours")
    run(f"--source={tmp_path}/ours", f"--target={tmp_path}/back")
    assert read_json(tmp_path / "back" / "generation_config.json") == own
    assert read_json(tmp_path / "back" / "config.json") == read_json(tmp_path / "out" / "config.json")


# A folder as others publish it: bfloat16 with one float32 tensor, fields and files that this library does not know.

FOREIGN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 262, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rope_theta": 1000000.0, "eos_token_id": [5, 1, 7], "bos_token_id": 1,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "unknown_field": [1],
}  # fmt: skip
EXACT = "model.norm.weight"


@pytest.fixture(name="foreign")
def make_foreign(tmp_path):
    folder = tmp_path / "hf"
    TOKENIZER.save(folder)
    write_json_atomic(folder / "config.json", FOREIGN)
    write_json_atomic(folder / "generation_config.json", {"temperature": 0.6, "eos_token_id": [5, 1, 7], "own": "x"})
    write_json_atomic(folder / "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    write_json_atomic(folder / "added_tokens.json", {})
    (folder / "LICENSE").write_text("free\n", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}", encoding="utf-8")
    cfg = model_config(FOREIGN)
    save_params(tiny.language_model(cfg), cfg, "qwen2", str(tmp_path / "made"), dtypes={"": "bfloat16", EXACT: "float32"})
    os.rename(tmp_path / "made" / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(tmp_path / "made")
    return folder


def files(folder):
    """Every file of a folder but its weights, JSON as objects: how it is laid out is nobody's concern."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {
        str(path.relative_to(folder)): read_json(path) if path.suffix == ".json" else path.read_bytes() for path in paths
    }


def assert_same_weights(folder, other):
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], strict=True)


def test_a_folder_of_others_comes_back_as_it_was(foreign, tmp_path):
    run(f"--source={foreign}", f"--target={tmp_path}/ours")
    run(f"--source={tmp_path}/ours", f"--target={tmp_path}/back")
    assert files(tmp_path / "back") == files(foreign)
    assert_same_weights(foreign, tmp_path / "back")
    assert weights(foreign)[EXACT].dtype == np.float32 and weights(foreign)["lm_head.weight"].dtype == ml_dtypes.bfloat16


def finish_stage(foreign, workdir):
    """What a stage leaves behind that has started from the folder, and trained nothing."""
    cfg, raw = read_config(str(foreign))
    tokenizer = read_tokenizer(str(foreign))
    tokenizer.save(workdir / "tokenizer")
    keep_source(str(foreign), tokenizer, str(workdir / "source"))
    checkpoint.save_params(str(workdir / "sft" / "params"), load_params(str(foreign), cfg, raw["model_type"]))
    cfg = dataclasses.replace(cfg, dtype="float32")
    write_model_file(str(workdir / "sft"), "language", cfg, str(foreign), chats=True, length=0)
    write_summary(workdir / "sft", Summary("sft"))
    return workdir / "sft"


def test_a_stage_that_started_from_it_keeps_its_files_and_dtypes(foreign, tmp_path):
    before, kept = files(foreign), shutil.copytree(foreign, tmp_path / "kept")
    stage = finish_stage(foreign, tmp_path / "run")
    shutil.rmtree(foreign)
    run(f"--source={stage}", f"--target={tmp_path}/out")
    assert files(tmp_path / "out") == before
    assert_same_weights(kept, tmp_path / "out")
    run(f"--source={stage}", f"--target={tmp_path}/half", "--dtype=float16")
    assert {value.dtype for value in weights(tmp_path / "half").values()} == {np.dtype(np.float16)}
    assert read_json(tmp_path / "half" / "config.json") == FOREIGN | {"torch_dtype": "float16"}


def test_a_stage_adds_the_end_of_its_turns_to_the_ids_that_the_folder_names(foreign, tmp_path):
    """A base model that stopped at one id only, and has no template: after training it ends turns with another token."""
    write_json_atomic(foreign / "config.json", FOREIGN | {"eos_token_id": 7})
    write_json_atomic(foreign / "generation_config.json", {"top_p": 0.9, "eos_token_id": 7})
    os.remove(foreign / "chat_template.jinja")
    run(f"--source={finish_stage(foreign, tmp_path / 'run')}", f"--target={tmp_path}/out")
    eos = TOKENIZER.eos_id
    assert read_json(tmp_path / "out" / "config.json") == FOREIGN | {"eos_token_id": [eos, 7]}
    assert read_json(tmp_path / "out" / "generation_config.json") == {"top_p": 0.9, "eos_token_id": [eos, 7]}
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == PLAIN_TEMPLATE


def test_a_model_made_sparse_keeps_ids_and_length(foreign, tmp_path):
    write_json_atomic(foreign / "config.json", FOREIGN | {"model_type": "llama"})
    change_tensors(foreign / "model.safetensors", lambda t: [t.pop(name) for name in list(t) if name.endswith("bias")])
    run(f"--source={foreign}", f"--target={tmp_path}/sparse", "--num_experts=4")
    config = read_json(tmp_path / "sparse" / "config.json")
    kept = {"max_position_embeddings": 131072, "eos_token_id": [5, 1, 7], "bos_token_id": 1, "torch_dtype": "bfloat16"}
    assert config | kept == config and config["model_type"] == "mixtral"
    assert read_json(tmp_path / "sparse" / "generation_config.json") == files(foreign)["generation_config.json"]
    with pytest.raises(UserError, match="top_k=1 with renormalize=True"):
        run(f"--source={foreign}", f"--target={tmp_path}/x", "--num_experts=4", "--top_k=1")


def test_a_config_without_ids_says_so(folder):
    """Readers would take those of the family's first release, which are other tokens here."""
    config = read_json(f"{folder}/config.json")
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


def test_a_head_that_config_json_calls_tied_is_used_if_it_is_another_matrix(foreign):
    write_json_atomic(foreign / "config.json", FOREIGN | {"tie_word_embeddings": True})
    cfg, raw = read_config(str(foreign))
    assert not cfg.tie_embeddings and raw["tie_word_embeddings"] is False
    head = load_params(str(foreign), cfg, "qwen2").head
    np.testing.assert_array_equal(head, weights(foreign)["lm_head.weight"].astype(np.float32))
    copied = weights(foreign)["model.embed_tokens.weight"]
    change_tensors(foreign / "model.safetensors", lambda t: t.update({"lm_head.weight": copied}))
    cfg, raw = read_config(str(foreign))
    assert cfg.tie_embeddings and raw["tie_word_embeddings"] is True
    assert load_params(str(foreign), cfg, "qwen2").head is None


def test_copies_of_the_tables_must_be_copies(tmp_path):
    mtp = MoEConfig(num_experts=4, top_k=2, mlp_dim=12, scoring="sigmoid", selection_bias=True)
    cfg = dataclasses.replace(tiny.DENSE, num_kv_heads=4, mla=MLAConfig(8, 0, 4, 4, 4), moe=mtp, num_mtp_layers=1)
    folder = tmp_path / "hf"
    save_params(tiny.language_model(cfg), cfg, "deepseek_v3", str(folder))
    cfg, _ = read_config(str(folder))
    load_params(str(folder), cfg, "deepseek_v3")
    name = "model.layers.2.embed_tokens.weight"
    change_tensors(folder / "model.safetensors", lambda t: t.update({name: t[name] + 1}))
    with pytest.raises(UserError, match=f"'{name}' must be a copy of 'model.embed_tokens.weight'"):
        load_params(str(folder), cfg, "deepseek_v3")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8"])
@pytest.mark.parametrize("scaled", [True, False])
def test_quantized_tensors_are_one_line_that_names_tensor_and_dtype(foreign, tmp_path, dtype, scaled):
    name = "model.layers.0.mlp.up_proj.weight"

    def quantize(tensors):
        tensors[name] = tensors[name].astype(np.int8)
        if scaled:
            tensors[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)

    change_tensors(foreign / "model.safetensors", quantize)
    rename_dtype(foreign / "model.safetensors", name, dtype)
    with pytest.raises(UserError, match=rf"tensor '{name}' is of dtype {dtype}; convert it to one of F32, BF16, F16, F64"):
        run(f"--source={foreign}", f"--target={tmp_path}/ours")
    assert not (tmp_path / "ours").exists()


def rename_dtype(path, name, dtype):
    """Says in a file's header that the bytes of a tensor are of another dtype of one byte."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def change_tensors(path, change):
    """Rewrites a safetensors file after change(tensors)."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parity
def test_generation_elsewhere_stops_where_a_turn_ends(tmp_path):
    """A trained stage, exported: transformers' generate ends with the end of a turn, as the folder says."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    cfg = dataclasses.replace(tiny.DENSE, vocab_size=262)
    params = jax.tree.map(lambda leaf: 0 * leaf, tiny.language_model(cfg))
    end = TOKENIZER.end_of_turn_id
    ones = dataclasses.replace(params, embed=params.embed + 1, final_norm=params.final_norm + 1)
    TOKENIZER.save(tmp_path / "run" / "tokenizer")
    checkpoint.save_params(str(tmp_path / "run" / "sft" / "params"), ones.replace(head=params.head.at[end].set(1.0)))
    write_model_file(str(tmp_path / "run" / "sft"), "language", cfg, None, chats=True, length=0)
    write_summary(tmp_path / "run" / "sft", Summary("sft"))
    run(f"--source={tmp_path}/run/sft", f"--target={tmp_path}/out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        said = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert said[0, prompt["input_ids"].shape[1] :].tolist() == [end]
    assert model.config.pad_token_id == tokenizer.pad_token_id == TOKENIZER.pad_id


def test_a_folder_without_a_tokenizer_can_be_converted(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        os.remove(f"{folder}/{name}")
    run(f"--source={folder}", f"--target={tmp_path}/ours")
    run(f"--source={tmp_path}/ours", f"--target={tmp_path}/back")
    assert read_json(tmp_path / "back" / "config.json") == read_json(f"{folder}/config.json")
    assert not (tmp_path / "back" / "generation_config.json").exists()


def test_a_stage_and_its_adapter(stage, folder, tmp_path, capsys):
    """The adapter, added to the base model, makes what the stage hands on; the run's config.json is not needed."""
    run(f"--source={stage}", f"--target={tmp_path}/out")
    run(f"--source={stage}", f"--target={tmp_path}/adapter", "--adapter_only")
    run(f"--source={folder}", f"--lora={tmp_path}/adapter", f"--target={tmp_path}/merged")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/out: mixtral in Hugging Face format, float32"
    assert lines[1] == f"{tmp_path}/adapter: PEFT adapter of rank 2 for mixtral"
    merged, base = weights(tmp_path / "merged"), weights(folder)
    for name, value in weights(tmp_path / "out").items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)
    changed = {name for name, value in merged.items() if not np.array_equal(value, base[name])}
    assert changed == {name for name in base if "_proj" in name or ".experts." in name}


def test_stages_that_hold_nothing_to_convert(stage, folder, tmp_path):
    refused = [
        ({"kind": "scalar"}, (), "a scalar model, which gives numbers and no text"),
        ({"lora": None}, ("--adapter_only",), "trained with LoRA, so it has no adapter"),
    ]
    whole = read_json(stage / "model.json")
    for change, flags, words in refused:
        about = {name: value for name, value in (whole | change).items() if value is not None}
        write_json_atomic(stage / "model.json", about)
        with pytest.raises(UserError, match=rf"--source={stage}: .*{words}"):
            run(f"--source={stage}", f"--target={tmp_path}/x", *flags)
    with pytest.raises(UserError, match=f"--source={folder}: .*so it has no adapter"):
        run(f"--source={folder}", f"--target={tmp_path}/x", "--adapter_only")
    write_json_atomic(stage / "model.json", whole)
    os.remove(stage / "result.json")
    with pytest.raises(UserError, match=f"--source={stage}: this stage is not complete"):
        run(f"--source={stage}", f"--target={tmp_path}/x")
    assert not (tmp_path / "x").exists()


def test_bfloat16_on_the_way(folder, tmp_path):
    run(f"--source={folder}", f"--target={tmp_path}/ours", "--dtype=bfloat16")
    run(f"--source={tmp_path}/ours", f"--target={tmp_path}/back")
    for name, value in weights(tmp_path / "back").items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(value, weights(folder)[name].astype(ml_dtypes.bfloat16))


def test_straight_onto_a_mesh(folder):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    cfg, raw = read_config(folder)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    sharded = load_params(folder, cfg, raw["model_type"], mesh)
    assert sharded.blocks.mlp.gate.sharding.shard_shape(sharded.blocks.mlp.gate.shape)[1] == cfg.moe.num_experts // 2
    tiny.assert_trees_equal(sharded, load_params(folder, cfg, raw["model_type"]))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_its_config_json(name):
    cfg = PRESETS[name]
    family = family_of(cfg)
    again = model_config(json.loads(json.dumps(hf_config(cfg, family))))
    assert again.windows == cfg.windows
    np.testing.assert_allclose(again.attention_scale or again.qk_dim**-0.5, cfg.attention_scale or cfg.qk_dim**-0.5)


def test_families_of_models_trained_here():
    dense = dataclasses.replace(ModelConfig(), vocab_size=50)
    assert family_of(dense) == "llama"
    assert family_of(dataclasses.replace(CFG, vocab_size=50)) == "mixtral"
    own = dict(sliding_window=3, global_layers=(0, 3))
    changes = {
        "qwen2": dict(qkv_bias=True), "llama": dict(qkv_bias=True, out_bias=True), "mistral": dict(sliding_window=3),
        "gemma": dict(activation="gelu", norm_offset=1.0, scale_embedding=True),
        "qwen3": own | dict(qk_norm="head"), "olmo2": dict(pre_norms=False, post_norms=True, qk_norm="full"),
        "olmo3": own | dict(pre_norms=False, post_norms=True, qk_norm="full", rope_scaling=RopeScaling("yarn"),
                            local_rope_theta=dense.rope_theta),
    }  # fmt: skip
    assert {family: family_of(dataclasses.replace(dense, **change)) for family, change in changes.items()} == {
        family: family for family in changes
    }
    with pytest.raises(UserError, match="no Hugging Face family has this combination"):
        family_of(dataclasses.replace(dense, attention_sinks=True, qk_norm="full"))


def change_tensor(folder, name, change):
    """Rewrites the shard that holds tensor `name` after change(tensors)."""
    with open(f"{folder}/model.safetensors.index.json") as file:
        change_tensors(f"{folder}/{json.load(file)['weight_map'][name]}", change)


def change_config(folder, **fields):
    with open(f"{folder}/config.json") as file:
        config = json.load(file) | fields
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)


NORM = "model.norm.weight"
BREAKS = {
    "unknown architecture": (lambda f: change_config(f, model_type="mamba"), "model_type='mamba' is not supported"),
    "missing tensor": (
        lambda f: change_tensor(f, NORM, lambda t: t.pop(NORM)), f"tensor '{NORM}' is missing"),
    "extra tensor": (
        lambda f: change_tensor(f, NORM, lambda t: t.update(spare=np.zeros(2))), "tensor 'spare' has no place"),
    "wrong shape": (
        lambda f: change_tensor(f, NORM, lambda t: t.update({NORM: np.zeros(3, np.float32)})),
        rf"tensor '{NORM}' has shape \[3\]; config.json asks for \[16\]"),
    "quantized": (
        lambda f: change_config(f, quantization_config={"quant_method": "fp8"}), "quantization_config=.*not supported"),
    "missing field": (lambda f: os.remove(f"{f}/config.json") or change_nothing(f), "'vocab_size' is missing"),
    "cut shard": (lambda f: os.truncate(f"{f}/{shards(f)[0]}", 100), "not a readable safetensors file"),
    "missing shard": (lambda f: os.remove(f"{f}/{shards(f)[0]}"), "not a readable safetensors file"),
    "rope": (
        lambda f: change_config(f, rope_scaling={"rope_type": "longrope", "factor": 2}), "rope_type='longrope' is not"),
    "rope of phi3": (
        lambda f: change_config(f, model_type="phi3", rope_scaling={"type": "yarn", "factor": 2}),
        "rope_type='yarn' is not supported; supported: default"),
    "rotated in part": (
        lambda f: change_config(f, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75}),
        "partial_rotary_factor=0.75 is not supported for model_type='mixtral'"),
    "biases where the family has none": (
        lambda f: change_config(f, attention_bias=True), "attention_bias=True is not supported for model_type='mixtral'"),
    "kinds of layers": (
        lambda f: change_config(f, model_type="qwen2", use_sliding_window=True, sliding_window=4, layer_types=["linear", "x"]),
        r"layer_types=\['linear', 'x'\]; supported is full_attention or sliding_attention for each of 2 layers"),
    "local layers without a window": (
        lambda f: change_config(f, model_type="qwen2", layer_types=["sliding_attention"] * 2),
        "layer_types=.* and no sliding_window; supported is full_attention for each"),
}  # fmt: skip


def change_nothing(folder):
    """A config.json with nothing but the family."""
    with open(f"{folder}/config.json", "w") as file:
        json.dump({"model_type": "mixtral", "num_attention_heads": 4}, file)


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_folders_are_one_clear_line_and_nothing_is_written(folder, tmp_path, kind):
    damage, words = BREAKS[kind]
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        run(f"--source={folder}", f"--target={tmp_path}/ours")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--target=x"], "--source is missing"),
        (["--source=nowhere", "--target=x"], "--source=nowhere: no such folder"),
        (["--source=/", "--target=x"], "holds neither config.json"),
        (["--source=/", "--target=/tmp"], "--target=/tmp: exists already"),
        (["--source=/", "--target=x", "--dtype=int4"], "dtype"),
    ],
)
def test_wrong_arguments(args, words):
    with pytest.raises(UserError, match=words):
        run(*args)
