"""llmjax-chat: mistakes are one line; the conversation is led, shown piece by piece, and begun anew."""

import dataclasses
import pathlib

import jax
import pytest

from llmjax import chat, main
from llmjax.config import load_experiment, to_json
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.files import write_json_atomic, write_text_atomic
from llmjax.models.spec import init_params
from llmjax.models.transformer import transformer_spec
from llmjax.training.checkpoint import save_params

PRETRAIN_TEXT = pathlib.Path(__file__).parents[2] / "experiments" / "pretrain_text.py"


@pytest.fixture(autouse=True)
def _leave_this_process_alone(monkeypatch):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A run with a complete pre-training stage: an untrained model over bytes."""
    folder = tmp_path_factory.mktemp("run")
    experiment = load_experiment(f"{PRETRAIN_TEXT}:test")
    tokenizer = Tokenizer.train((), TokenizerConfig(kind="byte"))
    model = dataclasses.replace(experiment.model, vocab_size=tokenizer.vocab_size)
    write_text_atomic(folder / "config.json", to_json(experiment))
    tokenizer.save(folder / "tokenizer")
    save_params(str(folder / "pretrain" / "params"), init_params(transformer_spec(model), jax.random.key(0)))
    write_json_atomic(folder / "pretrain" / "result.json", {"stage": "pretrain"})
    return folder


def error_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main.call(chat.run, ["llmjax-chat", *map(str, flags)])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.startswith("llmjax-chat: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("llmjax-chat: ").rstrip("\n")


def answer_of(capsys, workdir, *flags: str) -> str:
    chat.run(["llmjax-chat", f"--workdir={workdir}", "--max_new_tokens=4", *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--workdir is missing; give the folder of a finished run"),
    (["--workdir=x", "--stage=sfft"], "flag --stage=sfft: value should be one of <ppo|sft|pretrain>"),
    (["--workdir=x", "--mesage=hello"], "Unknown command line flag 'mesage'. Did you mean: message ?"),
    (["--workdir=/no/such/folder"], "--workdir=/no/such/folder: no config.json there"),
])  # fmt: skip
def test_wrong_flags(capsys, flags, message):
    assert error_of(capsys, *flags).startswith(message)


def test_stage_that_is_not_complete(capsys, workdir):
    line = error_of(capsys, f"--workdir={workdir}", "--stage=ppo")
    assert line == f"--workdir={workdir}: stage ppo is not complete there; there is pretrain"


def test_nothing_complete(capsys, workdir, tmp_path):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (tmp_path / "tokenizer").symlink_to(workdir / "tokenizer")
    line = error_of(capsys, f"--workdir={tmp_path}")
    assert line == f"--workdir={tmp_path}: stage pretrain is not complete there; there is none"


@pytest.mark.parametrize("flag", ["--temperature=-1", "--max_new_tokens=0"])
def test_wrong_sampling(capsys, workdir, flag):
    name = flag.strip("-").split("=")[0]
    assert error_of(capsys, f"--workdir={workdir}", flag, "--message=hello").startswith(f"{name}=")


def test_one_message(capsys, workdir):
    first = answer_of(capsys, workdir, "--message=hello")
    assert first.endswith("\n") and first == answer_of(capsys, workdir, "--message=hello", "--stage=pretrain")


def test_seed_decides_what_is_sampled(capsys, workdir):
    flags = ["--message=hello", "--temperature=1"]
    one, same, other = (answer_of(capsys, workdir, *flags, f"--seed={seed}") for seed in (1, 1, 2))
    assert one == same != other


def test_answer_comes_piece_by_piece(workdir):
    talk = chat.Chat(str(workdir), None, 0.0, 4, 0)
    pieces = talk.answer("hello")
    next(pieces)
    assert [m["role"] for m in talk.messages] == ["user"]  # the rest has not been written yet
    list(pieces)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    list(talk.answer("and then?"))
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_conversation(capsys, workdir, monkeypatch):
    typed = iter(["hello", "/new", "hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    greeting, *answers = answer_of(capsys, workdir).split("\n", 1)
    assert greeting.startswith(f"the pretrain model of {workdir}; an empty line ends the chat")
    one = answer_of(capsys, workdir, "--message=hello")
    assert answers == [one * 2]  # a new dialogue is answered as the first was


def test_end_of_input_ends_the_conversation(capsys, workdir, monkeypatch):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert answer_of(capsys, workdir).count("\n") == 1
