"""The other experiments, whole: your own text, and dense beside sparse."""

import gzip
import json
import math
import re

import program
import pytest

from llmjax.commands import train
from llmjax.errors import UserError
from llmjax.tasks.world.builder import WorldRecords


@pytest.mark.parametrize("tokenizer", [pytest.param("bpe", marks=pytest.mark.slow), "byte"])
def test_pretraining_on_files(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    texts = list(WorldRecords(tmp_path / "world", "documents", "train", seed=0, size=120))
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:60]), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[60:])
    workdir = tmp_path / "run"
    flags = [f"--config.pretrain.data.path={tmp_path}/a.txt,{tmp_path}/b.*", f"--config.tokenizer.kind={tokenizer}"]
    experiment = f"--config={program.REPOSITORY / 'experiments' / 'pretrain_text.py'}:test"
    train.run(["llmjax", experiment, f"--workdir={workdir}", *flags])
    metrics = program.result(workdir, "pretrain")["metrics"]
    assert 0 < metrics["ngram5_bits_per_byte"] < 8 and metrics["bits_per_byte"] < 12
    if tokenizer == "byte":  # a token is a byte, but for the few that end a document
        assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2), rel=0.02)
        assert metrics["loss"] == pytest.approx(math.log(262), abs=0.8)  # hardly trained
    assert len(program.result(workdir, "pretrain")["samples"]) == 4
    printed = capsys.readouterr().out
    assert flags[0] in printed.splitlines()[-1]  # what to type next holds what was typed
    assert re.search(rf"^let it go on with a text: +llmjax-chat --workdir={workdir}$", printed, re.MULTILINE)


@pytest.mark.slow
def test_dense_beside_sparse(tmp_path):
    workdir = tmp_path / "study"
    run = program.run("study", workdir, "--config.pretrain.steps=5")
    assert run.stderr == ""
    for name in ("dense", "moe"):
        assert f"llmjax-chat --workdir={workdir / name}" in run.stdout
        assert program.result(workdir / name, "pretrain")["steps"] == 5
        assert (workdir / name / "report.html").exists()
    tokens = [program.result(workdir / name, "pretrain")["tokens"] for name in ("dense", "moe")]
    assert tokens[0] == tokens[1]
    page = (workdir / "report.html").read_text(encoding="utf-8")
    assert "dense" in page and "moe" in page and "<svg" in page
    again = program.run("study", workdir, "--config.pretrain.steps=5")
    assert again.stdout.count("complete already") == 2 * len(program.ALL_STAGES)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.reward.data.num_prompts=5000", r"reward.data.num_prompts \+ num_eval_prompts=5008: there are 926 train"),
        ("--config.reward.data.num_eval_prompts=500", "reward.data.num_eval_prompts=500: there are 478 validation prompts"),
        ("--config.ppo.prompt_length=3", r"ppo: none of 926 train prompts fits prompt_length=3; 99 % of them fit \d+$"),
    ],
)
def test_prompts_that_are_too_few_or_too_long_are_refused_before_any_training(tmp_path, flag, words):
    with pytest.raises(UserError, match=words):
        train.run(["llmjax", f"--config={program.QUICKSTART}:test", f"--workdir={tmp_path}", flag])
    assert not [stage for stage in program.STAGES if (tmp_path / stage).exists()]
