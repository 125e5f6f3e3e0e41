"""What one command leaves: four complete stages, metrics, samples, a report, and a model to talk to."""

import json
import math
import re
import shutil

import program
import pytest

from llmjax.commands import chat, train
from llmjax.config import load_experiment, to_dict, to_json
from llmjax.errors import UserError
from llmjax.files import damage
from llmjax.results import read_summary
from llmjax.runs.models import finished as models_of
from llmjax.runs.models import open_model
from llmjax.units import text

METRICS = {
    "pretrain": {"loss", "perplexity", "bits_per_byte", "ngram5_bits_per_byte", "num_params", "num_active_params",
                 "train_flops_per_token", "train_flops"},
    "sft": {"loss", "instruction_following", "gold", "correct", "kl", "ended", "length"},
    "reward": {"accuracy", "noise_ceiling", "loss", "new_prompts_accuracy"},
    "ppo": {"gold", "correct", "instruction_following", "kl", "ended", "length"},
}  # fmt: skip


@pytest.fixture()
def experiment(finished):
    return load_experiment(f"{program.QUICKSTART}:{program.KINDS[finished.kind]}")


def test_terminal(finished):
    assert finished.stderr == ""
    for stage in program.STAGES:
        assert re.search(rf"^{stage} +step +\d+/\d+  loss -?[\d.]+  .*done in \d+:\d\d$", finished.stdout, re.MULTILINE)
        assert re.search(rf"^{stage} +complete in \d+ s$", finished.stdout, re.MULTILINE)
        shown = [metric for metric in read_summary(finished.workdir / stage).metrics if metric.label]
        for metric in shown:
            value = re.escape(text(metric.value, metric.unit, metric.error))
            assert re.search(rf"^    {re.escape(metric.label)} +{value}", finished.stdout, re.MULTILINE), metric.name
        assert len(shown) > 2
    assert re.search(r"ppo +step .* on training prompts: reward [-+][\d.]+  gold [\d.]+ .*KL -?[\d.]+ nats ", finished.stdout)
    assert "tokens/s" in finished.stdout and "time left" in finished.stdout
    for line in (f"report    {finished.workdir}/report.html", f"llmjax-chat --workdir={finished.workdir}"):
        assert line in finished.stdout


def steps_of(experiment, stage: str) -> int:
    """Of the optimizer. A reward model sees each ranking once."""
    cfg = experiment.stages[stage]
    return cfg.data.num_prompts * cfg.data.rankings_per_prompt // cfg.batch_size if stage == "reward" else cfg.steps


def test_results(finished, experiment):
    for stage in program.STAGES:
        result = program.result(finished.workdir, stage)
        assert result["stage"] == stage and result["steps"] == steps_of(experiment, stage)
        assert result["seconds"] > 0 and result["tokens"] > 0
        assert METRICS[stage] <= set(result["metrics"])
        assert all(math.isfinite(value) for value in result["metrics"].values())
    metrics = program.result(finished.workdir, "pretrain")["metrics"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert (metrics["num_active_params"] < metrics["num_params"]) == (finished.kind == "moe")
    cfg = experiment.stages["pretrain"]
    tokens = program.result(finished.workdir, "pretrain")["tokens"]
    assert tokens == cfg.steps * cfg.batch_size * cfg.length
    assert metrics["train_flops"] == tokens * metrics["train_flops_per_token"]


def test_everybody_is_asked_the_same_with_the_same_keys(finished):
    (table,) = program.result(finished.workdir, "table")["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    for stage in ("sft", "ppo"):
        after = program.result(finished.workdir, stage)["metrics"]
        assert {name: rows[stage][name] for name in ("gold", "correct")} == {name: after[name] for name in ("gold", "correct")}
    assert rows["ppo"]["kl"] == program.result(finished.workdir, "ppo")["metrics"]["kl"] != 0.0
    first, *_ = (m for m in read_summary(finished.workdir / "ppo").metrics if m.name == "gold")
    assert first.baseline == ("before", rows["sft"]["gold"])


def test_everybody_side_by_side(finished, experiment):
    result, stage = program.result(finished.workdir, "table"), experiment.stages["table"]
    (table,) = result["tables"]
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == list(stage.rows) and "base, plain text" in rows and "sampled" not in rows
    sft, best = rows["sft"], rows["best of 4"]
    assert sft["kl"] == 0 and "difference" not in sft and "greedy" not in best
    assert best["kl"] == pytest.approx(math.log(4) - 3 / 4)
    for name, row in rows.items():
        assert 0 <= row["correct"] <= 1 and 0 <= row["gold"] <= 1, name
        if name != "sft":
            assert row["difference"] == pytest.approx(row["correct"] - sft["correct"])
        if "greedy_difference" in row:
            assert row["greedy_difference"] == pytest.approx(row["greedy"] - sft["greedy"])
    bot = rows["template bot"]
    assert "kl" not in bot and bot["greedy"] == bot["correct"] and bot["gold"] >= 0.1 - 1e-9
    after = program.result(finished.workdir, "ppo")["metrics"]
    assert rows["ppo"]["gold"] == after["gold"] and rows["ppo"]["kl"] == pytest.approx(after["kl"]), "the same keys"
    assert not (finished.workdir / "table" / "params").exists() and not (finished.workdir / "table" / "model.json").exists()


def test_models(finished, experiment):
    """What a stage's model is stands beside it: the other programs need no experiment."""
    for stage in program.STAGES:
        about = json.loads((finished.workdir / stage / "model.json").read_text(encoding="utf-8"))
        model = to_dict(experiment.model) | {"vocab_size": 1024}
        kind = "scalar" if stage == "reward" else "language"
        learnt = {"chats": stage != "pretrain", "length": 64}  # that of pre-training, the longest
        assert about == {"kind": kind, "dtype": "float32", "model": model, "source": None} | learnt
        assert not damage(finished.workdir / stage / "params")
    assert models_of(str(finished.workdir)) == ["pretrain", "sft", "ppo"]


def test_samples(finished):
    for stage in ("pretrain", "sft", "ppo"):
        samples = program.result(finished.workdir, stage)["samples"]
        assert len(samples) == 2 and all(sample["prompt"] and sample["answer"] for sample in samples)
        for sample in samples:
            prompt, answer = (" ".join(sample[part].split()) for part in ("prompt", "answer"))
            shown = re.findall(rf"^    {re.escape(prompt)} -> (.*?)( \.\.\.)?$", finished.stdout, re.MULTILINE)
            assert any(answer == said or (cut and answer.startswith(said) and len(said) > 100) for said, cut in shown)
            assert sample["continues"] == (stage == "pretrain")


def test_rankings(finished, experiment):
    sizes, data = {}, experiment.stages["reward"].data
    for path in sorted((finished.workdir / "reward").glob("rankings-*.jsonl")):
        ranked = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        sizes[path.stem] = len({row["id"] for row in ranked})
        assert len(ranked) == sizes[path.stem] * data.rankings_per_prompt
        for row in ranked:
            assert len(row["answers"]) == len(row["ranks"]) == len(row["scores"]) == len(row["edited_from"]) <= 4
            assert min(row["ranks"]) == 0 and row["edited_from"][:2] == [-1, -1]
            for answer, source in zip(row["answers"], row["edited_from"]):
                assert answer["tokens"] if source < 0 else answer["text"] != row["answers"][source]["text"]
    assert sizes == {
        "rankings-train": data.num_prompts,
        "rankings-held_out": data.num_eval_prompts,
        "rankings-new_prompts": data.num_eval_prompts,
    }


def test_metrics_rows(finished, experiment):
    for stage in program.STAGES:
        train = program.rows(finished.workdir, stage, "train")
        assert [row["step"] for row in train] == list(range(1, steps_of(experiment, stage) + 1))
        assert all(math.isfinite(value) for row in train for value in row.values() if not isinstance(value, str))
        assert all(row["tokens_per_second"] > 0 for row in train[1:])
    assert [row["step"] for row in program.rows(finished.workdir, "pretrain", "eval")] == [3, 6]
    assert [row["step"] for row in program.rows(finished.workdir, "sft", "eval")] == [2, 4]


def test_ppo_starts_on_the_reference(finished):
    first, *later = program.rows(finished.workdir, "ppo", "train")
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and first["first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert all(row["sampler_gap"] < 1e-4 for row in (first, *later))
    assert any(abs(row["kl"]) > 1e-3 for row in later)


def test_router_metrics(finished, experiment):
    """Scalars at every step; by layer and expert at evaluations and at the last step, which keeps metrics.jsonl small."""
    evaluated = {"pretrain": [3, 6], "sft": [2, 4], "reward": [6], "ppo": [3]}
    for stage in program.STAGES:
        rows = program.rows(finished.workdir, stage, "train")
        assert all(("moe/max_load" in row) == (finished.kind == "moe") for row in rows)
        arrays = [row["step"] for row in rows if any(name.startswith(("moe/load/", "moe/layer/")) for name in row)]
        assert arrays == (evaluated[stage] if finished.kind == "moe" else [])
        for row in (row for row in rows if row["step"] in arrays):
            for layer in range(experiment.model.num_layers):
                assert sum(row[f"moe/load/{layer}/{e}"] for e in range(4)) == pytest.approx(1.0, abs=1e-5)


def test_report_needs_nothing_else(finished):
    page = (finished.workdir / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!["']?(?:data:|#))[^"'\s>]+""", page)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!#|data:)", page)
    assert page.count("<svg") >= 3
    for title in ("Pre-training", "SFT", "Reward model", "Reinforcement learning", f"llmjax-chat --workdir={finished.workdir}"):
        assert title in page


def test_nothing_unfinished_is_left(finished):
    names = [str(path.relative_to(finished.workdir)) for path in finished.workdir.rglob("*")]
    assert not [name for name in names if re.search(r"(^|/)\.(?!config)|checkpoints|tmp", name)]  # TFDS has a .config
    assert {name for name in names if "/" not in name} == {
        "config.json", "data", "metrics.jsonl", "report.html", "run.json", "tokenizer", *program.ALL_STAGES
    }  # fmt: skip


def test_config_is_kept(finished, experiment):
    assert (finished.workdir / "config.json").read_text(encoding="utf-8") == to_json(experiment)


def test_again_does_nothing(finished):
    def written():
        paths = [path for path in finished.workdir.rglob("*") if path.is_file() and path.name != "report.html"]
        return {path: (path.stat().st_size, path.read_bytes()) for path in paths}

    before, params = written(), finished.workdir / "ppo" / "params"
    made = params.stat().st_mtime_ns
    again = program.run(finished.kind, finished.workdir)
    assert re.findall(r"^(\w+) +complete already$", again.stdout, re.MULTILINE) == list(program.ALL_STAGES)
    assert "step" not in again.stdout
    assert again.stderr == "" and f"report    {finished.workdir}/report.html" in again.stdout
    assert written() == before and params.stat().st_mtime_ns == made


def test_another_config_is_refused(finished):
    config = f"--config={program.QUICKSTART}:{program.KINDS[finished.kind]}"
    with pytest.raises(UserError, match=r"was made by another config \(seed: 0 -> 1\)"):
        train.run(["llmjax", config, f"--workdir={finished.workdir}", "--config.seed=1"])


def chat_with(workdir, *flags: str) -> None:
    chat.run(["llmjax-chat", f"--workdir={workdir}", "--message=Where does Klosha live?", "--max_new_tokens=6", *flags])


def test_chat(finished, capsys):
    answers = {}
    for flags in ((), ("--stage=ppo",), ("--stage=sft",), ("--stage=pretrain",)):
        chat_with(finished.workdir, *flags)
        answers[flags] = capsys.readouterr().out
    assert answers[()] == answers["--stage=ppo",]
    assert all(answer.endswith("\n") for answer in answers.values())
    assert any(answer.strip() for answer in answers.values())


def test_chat_streams_what_it_answers(finished, capsys):
    talk = chat.Chat(open_model(str(finished.workdir / "pretrain")), max_new_tokens=6)
    pieces = list(talk.answer("Where does Klosha live?"))
    chat_with(finished.workdir, "--stage=pretrain")
    assert "".join(pieces) + "\n" == capsys.readouterr().out
    assert sum(bool(piece) for piece in pieces) > 1


def test_chat_with_an_unfinished_run(finished, tmp_path):
    for name in ("config.json", "tokenizer", "pretrain", "sft"):
        copy = shutil.copytree if (finished.workdir / name).is_dir() else shutil.copy
        copy(finished.workdir / name, tmp_path / name)
    for stage in ("ppo", "reward"):
        with pytest.raises(UserError, match=f"stage {stage} is not complete there; there is pretrain, sft$"):
            chat_with(tmp_path, f"--stage={stage}")
    chat_with(tmp_path)
