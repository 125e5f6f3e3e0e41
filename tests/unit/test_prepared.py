"""llmjax.stages.datasets: what is prepared once, and found to be whole before it is trained on; what does not fit is told."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from llmjax.data.records import Dialogue, Message, Prompt, user
from llmjax.data.sources import Dialogues, Prompts, Rankings, Text
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.runs.pipeline import open_context
from llmjax.stages.datasets import (
    dialogue_rows,
    encode_answer,
    encode_prompt,
    held_out_prompts,
    prompt_sets,
    ranking_rows,
    text_rows,
)
from llmjax.stages.experiment import Experiment
from llmjax.stages.pretrain import Pretrain
from llmjax.stages.sft import SFT
from llmjax.training.metrics import MetricsLog

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps"]


@pytest.fixture(scope="module", name="files")
def make_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rows = {
        "text": [{"text": " ".join(WORDS[i % 5 :])} for i in range(40)],
        "dialogues": [{"prompt": f"{i}?", "completion": "x" * i} for i in range(1, 41)],
        "prompts": [{"prompt": f"{i}?", "answer": i} for i in range(40)],
        "rankings": [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(40)],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def context(files, workdir, **fields):
    """A run that begins."""
    experiment = Experiment(
        "prepared", tokenizer=TokenizerConfig(kind="byte"), model=ModelConfig(num_layers=1),
        stages={"pretrain": Pretrain(Text(str(files / "text.jsonl"))), "sft": SFT(Dialogues(str(files / "dialogues.jsonl")))},
        **fields,
    )  # fmt: skip
    return open_context(experiment, str(workdir), MetricsLog("", enabled=False)).for_stage("sft")


def contents(rows):
    return {name: array.tolist() for name, array in rows[np.arange(len(rows))].items()}


def text(files, context):
    return contents(text_rows(context, Text(str(files / "text.jsonl")), 16).train[""][0])


def dialogues(files, context):
    return contents(dialogue_rows(context, Dialogues(str(files / "dialogues.jsonl")), 64).train[""][0])


def prompts(files, context):
    found = prompt_sets(context, Prompts(str(files / "prompts.jsonl")), 32)["train"]
    return [(found[i], found.tokens(i)) for i in range(len(found))]


def rankings(files, context):
    return contents(ranking_rows(context, Rankings(str(files / "rankings.jsonl")), 64)[0]["train"])


def asked(files, context):
    return held_out_prompts(context, Dialogues(str(files / "dialogues.jsonl")))


KINDS = [text, dialogues, prompts, rankings, asked]


def flip(path: pathlib.Path, at: int = -3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_have_changed_are_made_anew_and_that_is_said(tmp_path, files, capsys, kind):
    want = kind(files, context(files, tmp_path))
    data = tmp_path / "data"
    written = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    damaged = [name for name in written if name.name != "sha256.json"]
    assert len(damaged) >= 2 and len({name.parts[0] for name in written}) == 1
    capsys.readouterr()
    assert kind(files, context(files, tmp_path)) == want
    assert "damaged" not in capsys.readouterr().out
    for name in damaged:
        flip(data / name)
        assert kind(files, context(files, tmp_path)) == want
        said = capsys.readouterr().out
        folder, inside = data / name.parts[0], name.relative_to(name.parts[0])
        assert f"the prepared data in {folder} are damaged ({inside} has changed)" in said
        assert {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()} == written


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_are_cut_or_gone_are_made_anew(tmp_path, files, capsys, kind):
    want = kind(files, context(files, tmp_path))
    (folder,) = (tmp_path / "data").iterdir()
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-1]), path.unlink, lambda: (folder / "more").write_text("x")):
        damage()
        assert kind(files, context(files, tmp_path)) == want
        assert "are damaged (" in capsys.readouterr().out


def test_without_digests_the_sizes_are_looked_at(tmp_path, files, capsys):
    want = text(files, context(files, tmp_path, checkpoint_digests=False))
    (path,) = (tmp_path / "data").rglob("train/00000.bin")
    flip(path)
    assert text(files, context(files, tmp_path, checkpoint_digests=False)) != want
    path.write_bytes(path.read_bytes()[:-2])
    assert text(files, context(files, tmp_path, checkpoint_digests=False)) == want
    assert "are damaged (train/00000.bin has" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_sealed_goes_on(tmp_path, files, capsys, kind):
    """A run that ended before it had written all, or had sealed it."""
    want = kind(files, context(files, tmp_path))
    (folder,) = (tmp_path / "data").iterdir()
    (folder / "sha256.json").unlink()
    assert kind(files, context(files, tmp_path)) == want
    (folder / "sha256.json").unlink()
    (folder / "splits.json").unlink()
    for path in (folder / "validation", folder / "prompts.jsonl"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert kind(files, context(files, tmp_path)) == want
    assert "damaged" not in capsys.readouterr().out


def test_data_are_looked_at_once_in_a_run(tmp_path, files):
    one = context(files, tmp_path)
    want = text(files, one)
    (path,) = (tmp_path / "data").rglob("train/00000.bin")
    flip(path)
    assert text(files, one.for_stage("pretrain")) != want


# ---- what does not fit -----------------------------------------------------------------------------------------------


def sizes(tokenizer):
    """Of the dialogues: what each has of tokens, and where its answer begins."""
    prompts = [encode_prompt(tokenizer, Prompt("", user(f"{i}?"))) for i in range(1, 41)]
    return [(len(prompt) + i + 1, len(prompt)) for i, prompt in enumerate(prompts, start=1)]


@pytest.mark.parametrize("length", [4, 6, 20, 50])
def test_dialogues_that_do_not_fit_are_counted(tmp_path, files, capsys, length):
    own = context(files, tmp_path)
    data = Dialogues(str(files / "dialogues.jsonl"), validation_path=str(files / "dialogues.jsonl"))
    found = sizes(own.tokenizer)
    left_out = sum(length < begin for _, begin in found)
    cut = sum(length + 1 < whole and length >= begin for whole, begin in found)
    holds = max(whole for whole, _ in found) - 1
    told = f"of 40 dialogues {cut} are cut to length, {left_out} left out since their answers begin behind it; "
    if left_out == 40:
        with pytest.raises(UserError, match=f"no example has a target with loss within length={length}"):
            dialogue_rows(own, data, length)
        assert told + f"length={holds} would hold 99 %" in capsys.readouterr().out
        return
    parts = dialogue_rows(own, data, length)
    values = {metric.name: metric.value for metric in parts.metrics}
    assert values == {"dialogues": 40, "dialogues_cut": cut, "dialogues_left_out": left_out, "length_for_99": holds}
    said = capsys.readouterr().out
    assert (told in said) == (told in " ".join(parts.notes)) == (length < 50)
    assert bool(cut or left_out) == (length < 50) == all(metric.label for metric in parts.metrics)
    if length < 50:
        assert f"sft       {told}length={holds} would hold 99 %" in said
        assert dialogue_rows(own, data, holds).metrics[1].value == 0
        assert dialogue_rows(own, data, holds - 1).metrics[1].value == 1


# ---- tools -----------------------------------------------------------------------------------------------------------

TOLD = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [{"name": "sum"}]


def test_prompts_of_records_with_tools_are_told_of_them(tmp_path, files):
    """In training and when the model is asked, the tools stand in front."""
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    record = {"messages": turns, "tools": TOOLS}
    path = str(tmp_path / "a.jsonl")
    pathlib.Path(path).write_text(json.dumps(record))
    pathlib.Path(f"{path}.json").write_text(json.dumps({"prompt": "1?", "chosen": "2", "rejected": "3", "tools": TOOLS}))
    (dialogue,), (prompt,) = (list(cls(path, validation_path=path).read(None).train) for cls in (Dialogues, Prompts))
    assert dialogue == Dialogue((*user("1?"), Message("assistant", "2")), tuple(TOOLS)) and prompt.tools == tuple(TOOLS)
    tokenizer = Tokenizer(Tokenizer.train([], TokenizerConfig(kind="byte"))._serialized, TOLD)
    tokens = encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(tokens) == '<|system|>[{"name": "sum"}]<|end|><|user|>1?<|end|><|assistant|>'
    (ranking,) = Rankings(f"{path}.json", validation_path=f"{path}.json").read(None).train
    assert encode_prompt(tokenizer, ranking.prompt) == tokens
    answer = encode_answer(tokenizer, ranking.prompt, tokens, ranking.completions[0])
    assert tokenizer.decode(answer) == "2<|end|>"
    (asked,) = held_out_prompts(context(files, tmp_path / "run"), Dialogues(path, validation_path=path))
    assert asked.tools == tuple(TOOLS) and asked.messages == user("1?")
