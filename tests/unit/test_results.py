"""result.json: what a stage has to say comes back as it was said, and a broken file is one line."""

import dataclasses
import json
import subprocess
import sys

import pytest

from llmjax.errors import UserError
from llmjax.results import (
    About,
    Bars,
    Curve,
    Figure,
    HeatMap,
    Metric,
    Panel,
    Sample,
    Source,
    Start,
    Summary,
    Table,
    read_about,
    read_summary,
    write_about,
    write_summary,
)

SUMMARY = Summary(
    "sft", "SFT", "What it is.", 40, 12.5, 20_480,
    metrics=(
        Metric("loss", 0.1 + 0.2),
        Metric("accuracy", 0.75, "Held-out accuracy", "% of pairs", 0.0125, ("chance", 0.5), True),
        Metric("z", -3.0, "Zuletzt: größer 🦊", "nats"),
    ),
    figures=(
        Bars("Correct", "% of prompts", (("before", 0.0), ("after", 1.0)), "Four of four."),
        Figure(
            "Loss",
            (
                Panel("nats", (Curve("loss", label="training"), Curve("loss", "eval", "held out"))),
                Panel("% of pairs", (Curve("accuracy"),), (("chance", 0.5), ("ceiling", 0.9)), True),
            ),
            "Lower is better.", compare=False,
        ),
        HeatMap("Expert load", "moe/load", "train", "layer", "expert", "Even is 1."),
    ),
    samples=(Sample("hello", "\n<b>hi</b>\n", "greedy"), Sample("Once", " upon a time", continues=True)),
    tables=(
        Table(
            "Two models", (("gold", "Gold", ""), ("kl", "KL", "nats")),
            ({"name": "base", "gold": 0.5, "gold_stderr": 0.1, "kl": None}, {"name": "sft", "gold": 1.0, "kl": 0.0}),
        ),
        Table("None", (), ()),
    ),
    extra={"own": [1, {"two": "three"}]},
)  # fmt: skip


def test_a_summary_comes_back_as_it_was_said(tmp_path):
    write_summary(tmp_path / "sft", SUMMARY)
    again = read_summary(tmp_path / "sft")
    for field in dataclasses.fields(Summary):
        assert getattr(again, field.name) == getattr(SUMMARY, field.name), field.name
    assert again == SUMMARY


@pytest.mark.parametrize("fields", [
    dict(error=0.0), dict(baseline=("before", 0.0)), dict(error=0.0, baseline=("chance", 0.0), headline=True, unit="%"),
    dict(label="0"), dict(),
])  # fmt: skip
def test_numbers_that_are_zero_are_not_lost(tmp_path, fields):
    """Of sixteen wrong answers the share of right ones is 0, and so is its standard error."""
    metric = Metric("correct", 0.0, **fields)
    write_summary(tmp_path, Summary("x", metrics=(metric,)))
    assert read_summary(tmp_path).metrics == (metric,)


def test_the_least_that_a_stage_can_say(tmp_path):
    write_summary(tmp_path, Summary("x"))
    assert read_summary(tmp_path) == Summary("x")


def test_numbers_stand_by_themselves_for_programs(tmp_path):
    write_summary(tmp_path, SUMMARY)
    data = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert data["metrics"] == {"loss": 0.1 + 0.2, "accuracy": 0.75, "z": -3.0}
    assert data["about"]["accuracy"] == {
        "label": "Held-out accuracy", "unit": "% of pairs", "error": 0.0125, "baseline": ["chance", 0.5], "headline": True,
    }  # fmt: skip
    assert data["about"]["loss"] == {}
    assert [row["name"] for row in data["tables"][0]["rows"]] == ["base", "sft"]
    assert (data["steps"], data["seconds"], data["tokens"]) == (40, 12.5, 20_480)


def test_a_metric_by_its_name():
    assert SUMMARY.metric("accuracy") == 0.75 and SUMMARY.metric("nothing") is None
    assert Summary("x", metrics=(Metric("zero", 0.0),)).metric("zero") == 0.0


def test_no_file_is_a_stage_that_is_not_complete(tmp_path):
    assert read_summary(tmp_path) is None and read_summary(tmp_path / "nothing") is None


@pytest.mark.parametrize(("content", "words"), [
    ('{"stage": "sft",\n"metrics" {}}', r"result\.json:2: not JSON"),
    ("[]", "not the result of a stage"),
    ("3", "not the result of a stage"),
    ("{}", "field 'stage' of Summary is missing"),
    ('{"stage": "sft", "metrics": {"loss": "low"}}', r"metrics\.0\.value='low': expected float"),
    ('{"stage": "sft", "metrics": [1.0]}', "not the result of a stage"),
    ('{"stage": "sft", "metrics": {"loss": 1.0}, "about": {"loss": {"colour": 1}}}', "no field 'colour' in Metric"),
    ('{"stage": "sft", "metrics": {"loss": 1.0}, "about": {"loss": 3}}', "not the result of a stage"),
    ('{"stage": "sft", "figures": [{"class": "Pie", "title": "x"}]}', "unknown class 'Pie'"),
    ('{"stage": "sft", "figures": [{"title": "x", "panels": []}]}', "unknown class None"),
    ('{"stage": "sft", "samples": "none"}', "samples='none': expected"),
    ('{"stage": "ppo", "steps": 1, "table": []}', "no field 'table' in Summary"),  # of an older version
])  # fmt: skip
def test_a_broken_file_is_one_line_that_names_it(tmp_path, content, words):
    (tmp_path / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_summary(tmp_path)
    assert str(tmp_path / "result.json") in str(error.value) and "\n" not in str(error.value)


def test_a_summary_that_cannot_be_written_leaves_the_stage_incomplete(tmp_path):
    with pytest.raises((ValueError, TypeError)):
        write_summary(tmp_path, Summary("x", metrics=(Metric("loss", float("nan")),)))
    assert read_summary(tmp_path) is None and not list(tmp_path.iterdir())


ABOUT = About(
    (Start("2026-11-27 10:00:00+01:00", "llmjax --config='a b.py'", "0123456789ab", "1 × cpu", {"jax": "0.10"}), Start("x")),
    1024, {"sft": (Source("", "dialogues", 180, 9000, 0, 20, 12, 3, "200 dialogues of größer.jsonl"),), "rl": ()},
)  # fmt: skip


def test_what_is_known_of_a_run_comes_back_as_it_was_said(tmp_path):
    assert read_about(tmp_path) == About()
    write_about(tmp_path, ABOUT)
    assert read_about(tmp_path) == ABOUT


@pytest.mark.parametrize("content", ["[]", '{"starts": [{}]}', '{"data": {"sft": [{"rows": 1}]}}', '{"vocab_size": "x"}'])
def test_a_broken_run_file_is_one_line_that_names_it(tmp_path, content):
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json: not what is known of a run \(.*\); restore the file or remove it"):
        read_about(tmp_path)


def test_importing_it_imports_no_jax():
    code = "import sys, llmjax.results; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
