"""From a Hugging Face folder through SFT and back into one, tokenizer and template included."""

import json

import numpy as np
import program
import pytest
import tiny
from safetensors.numpy import load_file

from llmjax.commands import chat, convert, train
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_folder import save_params
from llmjax.interop.hf_tokenizer import read_tokenizer
from llmjax.models.config import ModelConfig, MoEConfig

MODEL = ModelConfig(vocab_size=300, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
                    qk_norm="head", moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=12))  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = [
    "--config.sft.steps=4", "--config.sft.batch_size=4", "--config.sft.length=96", "--config.sft.data.num_dialogues=60",
    "--config.evaluation.num_prompts=8", "--config.evaluation.batch_size=8",
]  # fmt: skip


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    """A tiny Qwen3-MoE whose template has no {% generation %} block."""
    folder = tmp_path / "hf"
    save_params(tiny.language_model(MODEL), MODEL, "qwen3_moe", str(folder))
    tokenizer = Tokenizer.train(["Who lives in the town? 3 plus 4 is 7."] * 9, TokenizerConfig(vocab_size=290))
    tokenizer.save(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "LICENSE").write_text("free\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096, "unknown": [1]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run(folder, workdir, *flags, method=""):
    experiment = f"--config={program.REPOSITORY / 'experiments' / 'sft_from_hf.py'}:{folder}{method}"
    train.run(["llmjax", experiment, f"--workdir={workdir}", *SMALL, *flags])


@pytest.mark.slow
def test_sft_of_a_folder_and_back(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    run(folder, tmp_path / "run")
    result = program.result(tmp_path / "run", "sft")
    assert result["steps"] == 4 and result["metrics"]["loss"] > 0
    assert "chat with it" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert saved["embed_dim"] == 16 and saved["moe"]["num_experts"] == 4 and saved["qk_norm"] == "head"
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer")
    assert tokenizer.fingerprint() == read_tokenizer(str(folder)).fingerprint()
    assert tokenizer.decode([tokenizer.end_of_turn_id]) == "<|end|>" and tokenizer.chat_template == TEMPLATE
    convert.run(["llmjax-convert", f"--source={tmp_path}/run/sft", f"--target={tmp_path}/out"])
    was, now = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "pad")}
    assert now == was | ids | {"eos_token_id": list(tokenizer.stop_ids)} and tokenizer.end_of_turn_id in tokenizer.stop_ids
    assert (tmp_path / "out" / "LICENSE").read_text() == "free\n"
    assert read_tokenizer(str(tmp_path / "out")).fingerprint() == tokenizer.fingerprint()
    capsys.readouterr()
    said = {}
    for flag in (f"--workdir={tmp_path}/run", f"--model={tmp_path}/out"):
        chat.run(["llmjax-chat", flag, "--message=Who lives in the town?", "--max_new_tokens=5"])
        said[flag] = capsys.readouterr().out
    assert len(set(said.values())) == 1, said
    run(tmp_path / "out", tmp_path / "again", "--preview")  # and that folder is one to start from
    assert "<|assistant|>[[" in capsys.readouterr().out


def test_lora_of_a_folder(folder, tmp_path, monkeypatch):
    """The merged model is what the stage hands on; the adapter, exported, makes the same model of the folder."""
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    run(folder, tmp_path / "run", "--config.sft.lora.rank=2", method=",lora")
    metrics = program.result(tmp_path / "run", "sft")["metrics"]
    assert metrics["trained_params"] < 0.3 * sum(x.size for x in load_file(folder / "model.safetensors").values())
    stage = f"--source={tmp_path}/run/sft"
    convert.run(["llmjax-convert", stage, f"--target={tmp_path}/adapter", "--adapter_only"])
    convert.run(["llmjax-convert", stage, f"--target={tmp_path}/out"])
    merged = ["llmjax-convert", f"--source={folder}", f"--lora={tmp_path}/adapter", f"--target={tmp_path}/merged"]
    convert.run(merged)
    base, ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out", "merged"))
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-6, err_msg=name)
        adapted = any(part in name for part in ("_proj", "experts"))
        assert np.array_equal(value, base[name]) != adapted, name
    with pytest.raises(UserError, match="not a finished stage that was trained with LoRA"):
        convert.run(["llmjax-convert", f"--source={folder}", f"--target={tmp_path}/x", "--adapter_only"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json, tokenizer.model, nor vocab.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: not a tokenizer"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "names no eos_token"),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].content }}"), "breaks|beginning|ends the assist"),
    ],
)
def test_a_broken_folder_is_refused_before_anything_is_written(folder, tmp_path, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        run(folder, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_is_given_behind_a_colon():
    with pytest.raises(UserError, match="give the model's folder behind a colon"):
        train.run(["llmjax", f"--config={program.REPOSITORY / 'experiments' / 'sft_from_hf.py'}", "--workdir=x"])
