"""The other experiments, whole: your own text, and dense beside sparse."""

import gzip
import json
import math

import program
import pytest

from llmjax import main
from llmjax.data.builder import open_world, prepare_world
from llmjax.errors import UserError


@pytest.mark.parametrize("tokenizer", ["bpe", "byte"])
def test_pretraining_on_files(tmp_path, capsys, monkeypatch, tokenizer):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    world = prepare_world(tmp_path / "world", seed=0, num_documents=120, num_dialogues=1)
    texts = list(open_world(world, "documents", "train"))
    (tmp_path / "a.txt").write_text("\n\n".join(texts[:60]), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[60:])
    workdir = tmp_path / "run"
    flags = [f"--config.data.path={tmp_path}/a.txt,{tmp_path}/b.*", f"--config.tokenizer.kind={tokenizer}"]
    experiment = f"--config={program.REPOSITORY / 'experiments' / 'pretrain_text.py'}:test"
    main.run(["llmjax", experiment, f"--workdir={workdir}", *flags])
    metrics = program.result(workdir, "pretrain")["metrics"]
    assert 0 < metrics["ngram5_bits_per_byte"] < 8 and metrics["bits_per_byte"] < 12
    if tokenizer == "byte":  # a token is a byte, but for the few that end a document
        assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / math.log(2), rel=0.02)
        assert metrics["loss"] == pytest.approx(math.log(262), abs=0.5)
    assert len(program.result(workdir, "pretrain")["samples"]) == 4
    printed = capsys.readouterr().out
    assert flags[0] in printed.splitlines()[-1]  # what to type next holds what was typed
    assert "llmjax-chat" not in printed


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
    assert again.stdout.count("complete already") == 2 * len(program.STAGES)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.reward.num_prompts=5000", r"reward.num_eval_prompts=5008: the world has 1646 train questions"),
        ("--config.evaluation.num_questions=5000", "evaluation.num_questions=5000: the world has 298 validation"),
    ],
)
def test_more_questions_than_there_are_are_refused_before_anything_is_written(tmp_path, flag, words):
    with pytest.raises(UserError, match=words):
        main.run(["llmjax", f"--config={program.QUICKSTART}:test", f"--workdir={tmp_path / 'run'}", flag])
    assert not (tmp_path / "run").exists()


def test_questions_that_do_not_fit_are_refused_before_any_training(tmp_path):
    flags = ["llmjax", f"--config={program.QUICKSTART}:test", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match=r"use --config.ppo.prompt_length=\d+ or more"):
        main.run([*flags, "--config.ppo.prompt_length=5"])
    assert not (tmp_path / "pretrain").exists()
