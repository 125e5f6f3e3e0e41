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
from llmjax.interop.hf_tokenizer import read_tokenizer
from llmjax.models.config import ModelConfig
from llmjax.models.lora import LoRAConfig, merge
from llmjax.models.presets import PRESETS
from llmjax.results import Summary, write_summary
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
    with pytest.raises(UserError, match="no Hugging Face family has this combination"):
        family_of(dataclasses.replace(dense, attention_sinks=True, qk_norm="full"))


def change_tensor(folder, name, change):
    """Rewrites the shard that holds tensor `name` after change(tensors)."""
    with open(f"{folder}/model.safetensors.index.json") as file:
        shard = f"{folder}/{json.load(file)['weight_map'][name]}"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


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
