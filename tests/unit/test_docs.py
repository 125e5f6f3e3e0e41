"""What README, docs and the docstrings of experiments tell people to type is right."""

import pathlib
import re
import shlex

import pytest

from llmjax.commands import chat, convert, train
from llmjax.commands.base import parse_flags

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *sorted((ROOT / "experiments").glob("*.py"))]}
COMMANDS = ("llmjax", "llmjax-chat", "llmjax-convert")


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line that begins with one of the commands; lines that end in a backslash go on."""
    found = []
    for path, text in TEXTS.items():
        lines = text.replace("\\\\\n", "\\\n").replace("\\\n", " ").splitlines()
        for line in lines:
            line = re.sub(r"^.*?&& (?=llmjax )", "", line.strip())
            if line.split(" ")[0] in COMMANDS and "--" in line:
                words = shlex.split(re.split(r"\s{2,}[(#A-Z]| # ", re.sub(r"(?<=\S)\s{5,}(?=--)", " ", line))[0])
                found.append((path.name, words))
    return found


FOUND = commands()


def test_there_are_commands():
    assert {words[0] for _, words in FOUND} == set(COMMANDS)
    assert {"README.md", "config.md", "data.md", "interop.md", "moe.md", "post_training.md", "sharding.md"} <= {
        page for page, _ in FOUND
    }


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page}: {' '.join(words)[:90]}" for page, words in FOUND])
def test_what_people_are_told_to_type(page, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *rest = words
    if command == "llmjax":
        if (config := next(word for word in rest if word.startswith("--config="))).split("/")[0] != "--config=experiments":
            pytest.skip(f"{config}: a file of the reader")
        devices = [word for word in rest if word.startswith("--cpu_devices=")]  # jax runs already, with those of the tests
        train.run([command, *(word for word in rest if word not in devices), "--print_config"])
        assert '"stages"' in capsys.readouterr().out
    else:
        parse_flags(words, {"llmjax-chat": chat, "llmjax-convert": convert}[command].define_flags(), "")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_pages_name_is_there(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[path]):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`?\b((?:llmjax|experiments|tests|benchmarks|docs)/[\w/]+\.(?:py|md|json))", TEXTS[path]):
        assert (ROOT / name).exists(), name


def test_the_example_of_the_readme(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS[ROOT / "README.md"], re.DOTALL)
    (tmp_path / "short.py").write_text(code)
    train.run(["llmjax", f"--config={tmp_path}/short.py", "--print_config"])
    out = capsys.readouterr().out
    assert '"class": "GRPO"' in out and '"short": "short:few_words"' in out
