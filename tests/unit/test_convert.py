"""llmjax-convert and Hugging Face folders: there and back bit for bit, errors in one line, nothing half-written."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from llmjax import convert
from llmjax.errors import UserError
from llmjax.interop.hf_config import family_of, hf_config, model_config
from llmjax.interop.hf_folder import load_params, read_config, save_params
from llmjax.models.config import ModelConfig
from llmjax.models.presets import PRESETS
from llmjax.sharding import MeshConfig, make_mesh

CFG = dataclasses.replace(tiny.SPARSE, layer_loop="auto", mlp_dim=12)


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    """A Mixtral of two layers in four shards, with a tokenizer file beside it."""
    folder = str(tmp_path / "hf")
    save_params(tiny.language_model(CFG), CFG, "mixtral", folder, shard_bytes=8_000)
    with open(f"{folder}/tokenizer.json", "w") as file:
        file.write("{}")
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
    assert os.path.exists(tmp_path / "back" / "tokenizer.json")
    with open(f"{folder}/config.json") as one, open(tmp_path / "back" / "config.json") as other:
        assert json.load(one) == json.load(other)


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
