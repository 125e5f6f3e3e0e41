"""A run tells of itself while it goes on: report.html after each stage and at pauses within it; starts and data in run.json."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from llmjax.config import to_dict
from llmjax.data.base import Data, Mixture
from llmjax.data.records import Dialogue
from llmjax.data.sources import Dialogues, Prompts, Rankings, Text
from llmjax.data.tokenizer import TokenizerConfig
from llmjax.models.config import ModelConfig
from llmjax.results import Source, Start, read_about
from llmjax.runs import pipeline
from llmjax.runs.start import commit_of, this_start
from llmjax.stages.base import Context, Result, Stage
from llmjax.stages.datasets import dialogue_rows, prompt_sets, ranking_rows, text_rows
from llmjax.stages.experiment import Experiment
from llmjax.training.metrics import MetricsLog

MODEL = ModelConfig(num_layers=1, embed_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4)
SEEN: dict[str, str] = {}


@dataclass(frozen=True)
class Reads(Stage):
    """Reads documents and learns nothing; keeps in SEEN what the report says when it begins and after its pause."""

    data: Data

    makes: ClassVar = "scalar"
    title: ClassVar[str] = "Reading"

    def prepare(self, context: Context) -> None:
        text_rows(context, self.data, 16)

    def run(self, context: Context) -> Result:
        for moment in ("begins", "pauses"):
            if moment == "pauses":
                context.metrics.write(context.name, 3, "train", {"loss": 1.0})
                assert context.pause is not None
                context.pause()
            page = os.path.join(context.workdir, "report.html")
            SEEN[f"{context.name} {moment}"] = open(page, encoding="utf-8").read() if os.path.exists(page) else ""
        return Result({"w": jnp.zeros(2)}, 3, 1.0, 48)


def write(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def experiment_of(**stages: Stage) -> Experiment:
    return Experiment("tells", tokenizer=TokenizerConfig(kind="byte"), model=MODEL, stages=stages)


@pytest.fixture(name="text")
def make_text(tmp_path) -> Text:
    return Text(write(tmp_path / "a.jsonl", *({"text": f"día {i}"} for i in range(40))))


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_report_is_written_while_a_run_goes_on(tmp_path, text, monkeypatch, capsys, seconds):
    monkeypatch.setattr(pipeline, "REPORT_SECONDS", seconds)
    monkeypatch.setattr(pipeline, "REPORT_SHARE", 1e9)
    SEEN.clear()
    experiment = experiment_of(first=Reads(text), second=Reads(text))
    pipeline.run_experiment(experiment, str(tmp_path / "run"), "llmjax", start=Start("today", "llmjax --config=x.py"))
    assert SEEN["first begins"] == "" and "Reading ✓" in SEEN["second begins"] and "Still going on" in SEEN["second begins"]
    assert ("first after step 3" in SEEN["first pauses"]) == ("second after step 3" in SEEN["second pauses"]) == (seconds == 0)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Still going on" not in page and page.count("Reading ✓") == 2 and "llmjax --config=x.py" in page
    about = read_about(tmp_path / "run")
    assert about.starts == (Start("today", "llmjax --config=x.py"),) and about.vocab_size == 262
    (source,) = about.data["first"]
    assert about.data["second"] == about.data["first"]
    held = source.held_out
    letters = sum(len(f"día {i}".encode()) for i in range(40))
    assert source.records + held == 40 and 0 < held < 40 and source.kind == "documents"
    assert source.tokens == source.num_bytes + source.records  # each begins with a token of its own
    assert 0 < source.num_bytes < letters
    before = (tmp_path / "run" / "run.json").read_bytes()
    pipeline.run_experiment(experiment, str(tmp_path / "run"), "llmjax", start=Start("tomorrow"))
    assert (tmp_path / "run" / "run.json").read_bytes() == before  # nothing was run


def context_of(tmp_path, name: str, data: Data) -> Context:
    experiment = experiment_of(text=Reads(Text("x")), **{name: Reads(data)})
    log = MetricsLog("", enabled=False)
    return pipeline.open_context(experiment, str(tmp_path / "run"), log, verbose=False).for_stage(name)


def test_what_is_cut_and_left_out_is_noted(tmp_path):
    said = [{"prompt": f"{i}", "completion": "b" * n} for i, n in enumerate([3, 3, 30, 3, 3, 3, 3, 3, 3, 3])]
    said.append({"prompt": "c" * 40, "completion": "never seen"})
    data = Dialogues(write(tmp_path / "a.jsonl", *said), validation_path=write(tmp_path / "b.jsonl", *said[:2]))
    context = context_of(tmp_path, "sft", data)
    dialogue_rows(context, data, 16)
    note = f"11 dialogues of {tmp_path}/a.jsonl, format prompt/completion"
    tokens = 9 * (5 + 1 + 3) + 17
    assert context.sources == {"sft": (Source("", "dialogues", 10, tokens, 0, 2, 1, 1, note),)}


def test_sources_of_a_mixture_prompts_and_rankings_are_noted(tmp_path):
    both = [Text(write(tmp_path / f"{name}.jsonl", *({"text": "abc"} for _ in range(9)))) for name in "ab"]
    data = Mixture({"web": both[0], "code": both[1]})
    context = context_of(tmp_path, "text2", data)
    text_rows(context, data, 16)
    assert [(source.name, source.kind) for source in context.sources["text2"]] == [("web", "documents"), ("code", "documents")]
    asked = [{"prompt": "x" * n} for n in (1, 2, 3, 50)]
    prompts = Prompts(write(tmp_path / "p.jsonl", *asked), validation_path=write(tmp_path / "q.jsonl", {"prompt": "y"}))
    context = context_of(tmp_path, "rl", prompts)
    prompt_sets(context, prompts, 16)
    prompt_sets(context, prompts, 8)  # to be asked at the end, with another length
    (source,) = context.sources["rl"]
    assert (source.kind, source.records, source.held_out, source.dropped) == ("prompts", 3, 1, 1)
    pairs = [{"prompt": f"{i}", "chosen": "yes", "rejected": "n" * (60 if i == 2 else 2)} for i in range(4)]
    rankings = Rankings(write(tmp_path / "r.jsonl", *pairs), validation_path=write(tmp_path / "s.jsonl", pairs[0]))
    context = context_of(tmp_path, "reward", rankings)
    prompt_sets(context, prompts, 16)  # only asked about
    ranking_rows(context, rankings, 16)
    (source,) = context.sources["reward"]
    assert (source.kind, source.records, source.held_out, source.dropped) == ("rankings", 3, 1, 1)


def test_a_start_names_command_device_and_versions():
    start = this_start("llmjax --config=x.py")
    assert start.command == "llmjax --config=x.py" and start.commit == ""
    assert start.device.startswith(f"{jax.device_count()} × cpu, ")
    assert list(start.versions) == ["llmjax", "python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"]
    assert start.versions["jax"] == jax.__version__ and to_dict(start)["date"][:2] == "20"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_of_the_experiment(tmp_path):
    def git(*words):
        user = ("-c", "user.name=x", "-c", "user.email=x@x")
        return subprocess.run(["git", "-C", str(tmp_path), *user, *words], capture_output=True, text=True, check=True).stdout

    assert commit_of(str(tmp_path)) == ""
    git("init", "-q")
    (tmp_path / "x.py").write_text("1")
    git("add", "x.py")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")[:12]
    assert commit_of(str(tmp_path)) == this_start("", f"{tmp_path}/x.py:small").commit == head
    (tmp_path / "x.py").write_text("2")
    assert commit_of(str(tmp_path)) == f"{head}-dirty"


def test_no_dialogue_is_noted_that_a_stage_does_not_learn_from(tmp_path, text):
    context = context_of(tmp_path, "x", text)
    other = Dialogues(write(tmp_path / "d.jsonl", *({"prompt": f"{i}", "completion": "b"} for i in range(5))))
    assert other.kind is Dialogue
    dialogue_rows(context, other, 16)
    assert context.sources == {}
