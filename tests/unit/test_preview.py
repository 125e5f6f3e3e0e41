"""llmjax --preview: the first examples as the model will see them, what is cut and left out; nothing trained, nothing kept."""

import json
import pathlib
import re
import tempfile

import pytest

from llmjax.commands import train
from llmjax.data.base import Mixture
from llmjax.data.sources import Dialogues, Prompts, Rankings, Text
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.rl.algorithms import GRPO
from llmjax.runs.preview import preview
from llmjax.stages import base
from llmjax.stages.experiment import Experiment
from llmjax.stages.pretrain import Pretrain
from llmjax.stages.reward import RewardModel
from llmjax.stages.rl import RL
from llmjax.stages.sft import SFT
from llmjax.tasks.verify import Number

QUICKSTART = f"--config={pathlib.Path(__file__).parents[2] / 'experiments' / 'quickstart.py'}:test"
LONG = "and on " * 12


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path) -> pathlib.Path:
    """Where temporary folders are made: empty in the end. And no stage trains."""

    def trained(*args, **options):
        pytest.fail("a preview trains nothing")

    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(base, "train", trained)
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    yield folder
    assert [path for path in folder.rglob("*") if not path.name.endswith("tfds")] == []  # TFDS leaves an empty folder


def sections(printed: str) -> dict[str, str]:
    """Stage -> what was printed of it."""
    parts = re.split(r"\n(\w+): tokens are divided by ·, those that carry loss stand in \[\[ \]\]\n", printed)
    return dict(zip(parts[1::2], parts[2::2]))


def write(path: pathlib.Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def said(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def split(text: str) -> str:
    """As the tokens of a tokenizer of bytes are shown."""
    return "·".join(text)


def turn(question: str, answer: str) -> str:
    """A dialogue of one turn as it is shown: the answer and the end of its turn carry loss."""
    return f"<|endoftext|>·<|user|>·{split(question)}·<|end|>·<|assistant|>[[{split(answer)}·<|end|>]]"


# ---- from the command line ----------------------------------------------------------------------------------------


def test_every_stage_of_the_quickstart(capsys, tmp_path):
    train.run(["llmjax", QUICKSTART, "--preview", f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
    shown = sections(capsys.readouterr().out)
    assert list(shown) == ["pretrain", "sft", "reward", "ppo", "table"]
    assert "400 documents of the built-in world" in shown["pretrain"]
    windows = re.findall(r"window (\d), 64 tokens in (\d) segments?, 64 of 65 tokens carry loss\n    (.*)", shown["pretrain"])
    assert [number for number, _, _ in windows] == ["1", "2"]
    for number, _, text in windows:
        assert re.fullmatch(r"[^\[\]]+\[\[[^\[\]]+\]\]", text)  # all but the first token, which nothing predicts
        assert text.startswith("<|endoftext|>[[") == (number == "1")
    learnt = re.findall(r"<\|assistant\|>\[\[([^\[\]]*<\|end\|>)\]\]", shown["sft"])
    assert len(learnt) > 2
    texts = re.findall(r"text window .*, 64 of 65 tokens carry loss", shown["sft"])  # that are mixed in
    assert len(texts) == 2
    assert "RankedAnswers: the answers are written when sft is complete" in shown["reward"]
    assert "926 prompts to train on; fields that a reward sees: kind, subject, answers" in shown["ppo"]
    assert "16 held-out prompts that ask for" in shown["table"] and "to template bot, base, plain text" in shown["table"]
    prompts = re.findall(r"  prompt .*, 0 of \d+ tokens carry loss\n    (<\|endoftext\|>·<\|user\|>·.*)", shown["ppo"])
    assert len(prompts) == 3 and all(text.endswith("·<|end|>·<|assistant|>") and "[[" not in text for text in prompts)


def test_dialogues_of_a_file(capsys, tmp_path):
    """One of six is held out, one is cut, one has no room for its answer."""
    records = [said("hi", "hello"), said("one", "two three"), said("and", "so on"), said(LONG * 2, "never seen"),
               said("tell me", LONG), said("six", "[[6]]")]  # fmt: skip
    path = write(tmp_path / "a.jsonl", *records)
    flags = ["--config.sft.data=Dialogues", f"--config.sft.data.path={path}", "--config.tokenizer.kind=byte"]
    train.run(["llmjax", QUICKSTART, "--preview", f"--workdir={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()
    shown = sections(capsys.readouterr().out)["sft"]
    assert f"6 dialogues of {path}, format messages" in shown
    # 4 bytes of control tokens, the question, the answer and its end.
    assert "of 5 dialogues 1 are cut to length, 1 left out since their answers begin behind it; length=" in shown
    # Each dialogue begins with a <|endoftext|> of its own, also behind another one in its window.
    whole = [("hi", "hello"), ("one", "two three"), ("and", "so on"), ("six", "[[6]]")]
    assert [turn(*pair) for pair in whole if turn(*pair) not in shown] == [turn("hi", "hello")]  # that is held out
    assert split("never") not in shown
    cut = re.search(rf"<\|user\|>·{split('tell me')}·<\|end\|>·<\|assistant\|>\[\[(.*)\]\]\n", shown).group(1)
    assert split(LONG).startswith(cut) and len(cut.split("·")) == 65 - 11  # a window of 64, and the last target
    assert "window 2, 64 tokens in 1 segment, 54 of 65 tokens carry loss" in shown


def test_a_mistake_in_the_data_is_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    flags = ["--config.sft.data=Dialogues", f"--config.sft.data.path={path}"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: no message of the assistant, so there is nothing to learn"):
        train.run(["llmjax", QUICKSTART, "--preview", *flags])


# ---- other data ---------------------------------------------------------------------------------------------------


@pytest.fixture(name="experiment")
def make_experiment(tmp_path):
    """An experiment of a tokenizer of bytes with the given stages behind pre-training."""
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(40)), encoding="utf-8")
    text = Text(path=str(tmp_path / "a.txt"), document_separator="lines")

    def make(**stages) -> Experiment:
        model = ModelConfig(num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
        stages = {"pretrain": Pretrain(text, length=16)} | stages
        return Experiment("tiny", tokenizer=TokenizerConfig(kind="byte"), model=model, stages=stages)

    return make


def test_the_tokenizer_of_a_run_is_used_and_nothing_but_data_is_kept_there(capsys, tmp_path, experiment):
    workdir = tmp_path / "run"
    Tokenizer.train(["line"] * 9, TokenizerConfig(vocab_size=265)).save(workdir / "tokenizer")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    preview(experiment(), str(workdir))
    assert "<|endoftext|>[[line· ·0·<|endoftext|>·line· ·" in sections(capsys.readouterr().out)["pretrain"]
    kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert before.items() <= kept.items()
    assert {path.relative_to(workdir).parts[0] for path in kept} == {"tokenizer", "data"}


def test_a_mixture_is_shown_source_by_source(capsys, tmp_path, experiment):
    sources = {
        "chats": Dialogues(write(tmp_path / "chats.jsonl", said("hi", "hello"), said("one", "two"))),
        "pairs": Dialogues(write(tmp_path / "pairs.jsonl", *({"prompt": p, "completion": "so"} for p in ("yes?", "no?")))),
    }
    preview(experiment(sft=SFT(Mixture(sources), length=32)), None)
    shown = sections(capsys.readouterr().out)["sft"]
    for name, format in (("chats", "messages"), ("pairs", "prompt/completion")):
        assert f"  {name}: 2 dialogues of {tmp_path / name}.jsonl, format {format}\n" in shown
        assert re.search(rf"  {name} window 1, \d+ tokens in 1 segment, \d of \d+ tokens carry loss\n    <", shown)
    assert shown.count("[[") == 2


def test_rankings_are_shown_best_first(capsys, tmp_path, experiment):
    rows = [{"prompt": p, "answers": ["bad", "good", "soso", LONG], "scores": [0.1, 0.9, 0.5, 0.3]} for p in ("a?", "b?", "c?")]
    data = Rankings(write(tmp_path / "r.jsonl", *rows))
    preview(experiment(reward=RewardModel(data, init="pretrain", length=16)), None)
    shown = sections(capsys.readouterr().out)["reward"]
    assert "2 rankings of up to 3 answers to train on" in shown
    assert "2 answers of more than length=16 tokens are left out, and 0 of 2 rankings" in shown
    found = re.findall(r"ranking (\d), rank (\d), \d+ of \d+ tokens carry loss\n    .*\[\[(.*)·<\|end\|>\]\]", shown)
    best_first = [("0", split("good")), ("1", split("soso")), ("3", split("bad"))]
    assert found == [(number, *one) for number in "12" for one in best_first]


def test_prompts_with_what_a_reward_sees(capsys, tmp_path, experiment):
    """One of seven is held out, one is too long."""
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1), "source": "mine"} for i in range(6)] + [{"question": LONG}]
    stage = RL(Prompts(write(tmp_path / "p.jsonl", *rows)), {"right": Number()}, policy="pretrain", algorithm=GRPO(),
               prompt_length=20)  # fmt: skip
    preview(experiment(rl=stage), None)
    printed = capsys.readouterr().out
    assert "rl        1 train prompts of more than prompt_length=20 tokens are left out" in printed
    shown = sections(printed)["rl"]
    assert "5 prompts to train on; fields that a reward sees: answer, source" in shown
    assert re.search(rf"0 of 10 tokens carry loss\n    <\|endoftext\|>·<\|user\|>·\d·{re.escape(split(' + 1?'))}·", shown)
