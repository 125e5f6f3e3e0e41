"""Whatever an experiment brings of its own, a stage, a format, a reward, a ranker, an algorithm, lives the whole life: from the
command line through training, kill -9 and resume, to report, chat and export. Nothing in llmjax/ knows any of it."""

import json
import pathlib
import re
import subprocess
import sys
import time

import program
import pytest

from llmjax.commands import chat, convert, train
from llmjax.errors import UserError

pytestmark = pytest.mark.slow

HOUSE = pathlib.Path(__file__).with_name("own_house.py")
STAGES = ("pretrain", "drill", "judge", "climb")
EVERY_STEP = "--config.checkpoint_seconds=0.001"
NAMES = ("Drill", "flashcard", "vowels", "ShortestFirst", "Reinforce", "own_house")


@pytest.fixture(scope="module", name="data")
def make_data(tmp_path_factory) -> tuple[str, ...]:
    """A text and a deck of cards, as flags."""
    folder = tmp_path_factory.mktemp("data")
    words = ["oak", "elm", "ash", "fir", "bay", "yew", "fig", "box"]
    (folder / "notes.txt").write_text("\n".join(f"The {a} stands by the {b}." for a in words for b in words), encoding="utf-8")
    cards = [{"front": f"Where is the {a} {i}?", "back": f"by the {b}" if i else ""}
             for i in range(3) for a, b in zip(words, reversed(words))]  # fmt: skip
    (folder / "cards.jsonl").write_text("".join(json.dumps(card) + "\n" for card in cards), encoding="utf-8")
    deck = folder / "cards.jsonl"
    return (
        f"--config.pretrain.data.path={folder / 'notes.txt'}", f"--config.drill.data.path={deck}",
        f"--config.judge.data.prompts.path={deck}", f"--config.climb.data.path={deck}",
    )  # fmt: skip


def command(workdir: pathlib.Path, data: tuple[str, ...], *flags: str) -> list[str]:
    return [sys.executable, "-m", "llmjax", f"--config={HOUSE}", f"--workdir={workdir}", *data, *flags]


def run(workdir: pathlib.Path, data: tuple[str, ...], *flags: str) -> str:
    done = subprocess.run(
        command(workdir, data, *flags), env=program.environment(), capture_output=True, text=True, timeout=program.TIMEOUT
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stderr == ""
    return done.stdout


def kill_in(stage: str, workdir: pathlib.Path, data: tuple[str, ...]) -> None:
    """Starts the run and kills it (SIGKILL) as soon as `stage` has a checkpoint."""
    process = subprocess.Popen(
        command(workdir, data, EVERY_STEP), env=program.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + program.TIMEOUT
    try:
        while not program.committed_steps(workdir, stage):
            assert process.poll() is None, f"over before {stage}:\n{''.join(process.communicate())[-4000:]}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", name="whole")
def run_whole(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(workdir, data)


def outcome(workdir: pathlib.Path) -> dict:
    results = {stage: program.result(workdir, stage) for stage in STAGES}
    kept = {s: {k: v for k, v in r.items() if k != "seconds"} for s, r in results.items()}
    return kept | {"rows": [{k: v for k, v in row.items() if k not in program.SPEED} for row in program.rows(workdir)]}


def test_it_runs_and_says_what_it_is(whole, data):
    workdir, printed = whole
    assert "16 dialogues of" in printed and "format flashcard, 8 left out" in printed
    assert "damping 0." in printed and "Size of the embeddings" in printed and "(at the start 0.0200 rms)" in printed
    first, *_, last = program.rows(workdir, "climb", "train")
    assert {"reward", "reward/vowels", "reward/short", "score_spread", "reinforce_loss"} <= set(first)
    assert abs(first["reward"] - first["reward/vowels"] - 0.5 * first["reward/short"]) < 1e-5
    assert abs(first["kl"]) < 1e-5 < abs(last["kl"])
    ranked = [json.loads(line) for line in (workdir / "judge" / "rankings-train.jsonl").read_text().splitlines()]
    for row in ranked:
        lengths = [len(answer["text"]) for answer in row["answers"]]
        assert row["ranks"] == [sum(other < length for other in lengths) for length in lengths] and len(lengths) == 3
    saved = json.loads((workdir / "config.json").read_text())["stages"]
    assert saved["drill"]["class"] == "Drill" and saved["drill"]["data"]["format"] == "own_house:flashcard"
    assert saved["climb"]["algorithm"] == {"class": "Reinforce", "weight": 1.0}
    again = run(workdir, data)
    assert again.count("complete already") == len(STAGES)


def test_killed_and_resumed_it_ends_the_same(whole, data, tmp_path):
    for stage in ("drill", "climb"):
        kill_in(stage, tmp_path / "run", data)
        assert not (tmp_path / "run" / stage / "result.json").exists()
    assert "goes on after step" in run(tmp_path / "run", data, EVERY_STEP)
    assert outcome(tmp_path / "run") == outcome(whole[0])


def test_another_config_of_it_is_refused(whole, data, monkeypatch):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")
    with pytest.raises(UserError, match=r"made by another config \(drill.damping: 0.1 -> 0.5\)"):
        train.run(["llmjax", f"--config={HOUSE}", f"--workdir={whole[0]}", *data, "--config.drill.damping=0.5"])


def test_report_chat_and_export(whole, tmp_path, capsys):
    workdir, _ = whole
    page = (workdir / "report.html").read_text(encoding="utf-8")
    said = ("Flashcard drill", "A stage that only this experiment knows.", "Damping of the drill", "Size of the embeddings")
    assert all(words in page for words in said)
    for stage in ("drill", "climb"):
        said = ("--message=Where is the oak?", "--max_new_tokens=4")
        chat.run(["llmjax-chat", f"--workdir={workdir}", f"--stage={stage}", *said])
        assert capsys.readouterr().out.endswith("\n")
    with pytest.raises(UserError, match="there is pretrain, drill, climb$"):
        chat.run(["llmjax-chat", f"--workdir={workdir}", "--stage=judge", "--message=x"])
    convert.run(["llmjax-convert", f"--source={workdir}/climb", f"--target={tmp_path}/hf"])
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["hidden_size"] == 16 and len(exported["eos_token_id"]) == 2
    chat.run(["llmjax-chat", f"--model={tmp_path}/hf", "--message=Where is the oak?", "--max_new_tokens=4"])


def test_nothing_in_the_library_knows_it():
    sources = "".join(path.read_text(encoding="utf-8") for path in (program.REPOSITORY / "llmjax").rglob("*.py"))
    assert not [name for name in NAMES if re.search(rf"\b{name}\b", sources)]
