"""llmjax-chat: mistakes are one line; the conversation is led, shown piece by piece, and begun anew."""

import dataclasses
import os
import pathlib

import jax
import pytest
import tiny

from llmjax.commands import base, chat, convert
from llmjax.config import to_dict
from llmjax.data.records import Message
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.files import write_json_atomic
from llmjax.results import Summary, write_summary
from llmjax.runs.models import open_model, open_stage
from llmjax.training.checkpoint import save_params

STAGES = ("text", "teach", "judge", "improve")
CFG = dataclasses.replace(tiny.DENSE, vocab_size=262)


@pytest.fixture(autouse=True)
def _leave_this_process_alone(monkeypatch):
    monkeypatch.setenv("LLMJAX_KEEP_MEMORY", "0")


def add_stage(folder: pathlib.Path, name: str, seed: int = 0, kind: str = "language") -> None:
    """What a complete stage leaves: an untrained model and what it is."""
    params = tiny.language_model(CFG, seed) if kind == "language" else tiny.scalar_model(CFG, seed)
    save_params(str(folder / name / "params"), params)
    about = {"kind": kind, "dtype": "float32", "model": to_dict(CFG), "source": None}
    write_json_atomic(folder / name / "model.json", about)
    write_summary(folder / name, Summary(name))


def make_run(folder: pathlib.Path) -> pathlib.Path:
    """A workdir with a tokenizer of bytes, of an experiment that no stage of which is complete."""
    Tokenizer.train((), TokenizerConfig(kind="byte")).save(folder / "tokenizer")
    write_json_atomic(folder / "config.json", {"stages": {name: {"class": "OfSomeExperiment"} for name in STAGES}})
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A run of an experiment that is not there any more, of whose four stages all but the last are complete."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    add_stage(folder, "teach", 1)
    add_stage(folder, "text", 0)
    add_stage(folder, "judge", 2, "scalar")
    (folder / "improve").mkdir()
    return folder


def error_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as ended:
        base.call(chat.run, ["llmjax-chat", *map(str, flags)])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.startswith("llmjax-chat: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("llmjax-chat: ").rstrip("\n")


def answer_of(capsys, workdir, *flags: str) -> str:
    chat.run(["llmjax-chat", f"--workdir={workdir}", "--max_new_tokens=4", *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ([], "give --workdir, the folder of a run, or --model, the folder of a model"),
    (["--workdir=x", "--model=y"], "give --workdir, the folder of a run, or --model, the folder of a model"),
    (["--model=x", "--stage=sft"], "--stage=sft goes with --workdir; --model names a model's own folder"),
    (["--workdir=x", "--mesage=hello"], "Unknown command line flag 'mesage'. Did you mean: message ?"),
    (["--workdir=/no/such/folder"], "--workdir=/no/such/folder: no such folder"),
    (["--model=/no/such/folder"], "/no/such/folder: no such folder"),
    (["--model=/"], "/: holds neither config.json, of a Hugging Face model, nor model.json, of a finished stage"),
])  # fmt: skip
def test_wrong_flags(capsys, flags, message):
    assert error_of(capsys, *flags).startswith(message)


@pytest.mark.parametrize("stage", ["improve", "judge", "nothing"])
def test_stage_that_cannot_be_talked_to(capsys, workdir, stage):
    line = error_of(capsys, f"--workdir={workdir}", f"--stage={stage}")
    assert line == f"--workdir={workdir}: stage {stage} is not complete there; there is text, teach"


def test_nothing_complete(capsys, tmp_path):
    line = error_of(capsys, f"--workdir={make_run(tmp_path)}")
    assert line == f"--workdir={tmp_path}: stage of a language model is not complete there; there is none"


def test_a_stage_without_its_result_is_not_complete(capsys, workdir, tmp_path):
    """Its model is written before the result, so a crash between the two leaves the one without the other."""
    add_stage(make_run(tmp_path), "text")
    os.remove(tmp_path / "text" / "result.json")
    assert error_of(capsys, f"--workdir={tmp_path}").endswith("there is none")
    assert "text: this stage is not complete" in error_of(capsys, f"--model={tmp_path}/text")


def test_a_model_that_gives_numbers(capsys, workdir):
    line = error_of(capsys, f"--model={workdir}/judge")
    assert line == f"{workdir}/judge: a scalar model, which gives numbers and no text; name a language model"


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"dtype": "float32"', '{"kind": "language", "dtype": "float32", "model": {"num_heads": "x"}}']
)
def test_a_broken_model_file_is_one_line(capsys, tmp_path, content):
    add_stage(make_run(tmp_path), "text")
    (tmp_path / "text" / "model.json").write_text(content)
    for flag in (f"--model={tmp_path}/text", f"--workdir={tmp_path}"):
        assert "model.json" in error_of(capsys, flag)


def test_the_newest_stage_is_the_last_of_the_config(workdir):
    name, model = open_stage(str(workdir))
    assert name == "teach"  # although `text` was written later
    tiny.assert_trees_equal(model.load("float32"), tiny.language_model(CFG, 1))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.load("bfloat16"))} == {"bfloat16"}


def test_without_a_config_the_newest_stage_is_the_one_completed_last(tmp_path):
    make_run(tmp_path)
    (tmp_path / "config.json").unlink()
    for seconds, name in enumerate(("z", "a", "m")):
        add_stage(tmp_path, name)
        os.utime(tmp_path / name / "result.json", (1e9 + seconds,) * 2)
    assert open_stage(str(tmp_path))[0] == "m"


@pytest.mark.parametrize("flag", ["--temperature=-1", "--max_new_tokens=0"])
def test_wrong_sampling(capsys, workdir, flag):
    name = flag.strip("-").split("=")[0]
    assert error_of(capsys, f"--workdir={workdir}", flag, "--message=hello").startswith(f"{name}=")


def test_one_message(capsys, workdir):
    first = answer_of(capsys, workdir, "--message=hello")
    assert first.endswith("\n") and first == answer_of(capsys, workdir, "--message=hello", "--stage=teach")
    assert first != answer_of(capsys, workdir, "--message=hello", "--stage=text")


def test_a_model_wherever_it_lies(capsys, workdir, tmp_path):
    """A stage, the Hugging Face folder that is exported from it, and the checkpoint that is made of this answer alike."""
    stage, exported, checkpoint = workdir / "teach", tmp_path / "hf", tmp_path / "ours"
    convert.run(["llmjax-convert", f"--source={stage}", f"--target={exported}"])
    convert.run(["llmjax-convert", f"--source={exported}", f"--target={checkpoint}"])
    capsys.readouterr()
    want = answer_of(capsys, workdir, "--message=hello")
    for folder in (stage, exported, checkpoint):
        chat.run(["llmjax-chat", f"--model={folder}", "--message=hello", "--max_new_tokens=4"])
        assert capsys.readouterr().out == want


def test_it_says_when_it_compiles(capsys, workdir):
    notices = []
    talk = chat.Chat(open_model(str(workdir / "teach")), max_new_tokens=2, notice=notices.append)
    for message in ("hello", "/x" * 40, "hello"):
        talk.messages.clear()
        list(talk.answer(message))
    assert notices == [f"compiling for dialogues of up to {length} tokens ..." for length in (16, 128)]
    chat.run(["llmjax-chat", f"--workdir={workdir}", "--max_new_tokens=2", "--message=hello"])
    assert capsys.readouterr().err == notices[0] + "\n"


def test_seed_decides_what_is_sampled(capsys, workdir):
    flags = ["--message=hello", "--temperature=1"]
    one, same, other = (answer_of(capsys, workdir, *flags, f"--seed={seed}") for seed in (1, 1, 2))
    assert one == same != other


def test_answer_comes_piece_by_piece(workdir):
    talk = chat.Chat(open_model(str(workdir / "teach")), max_new_tokens=4)
    pieces = talk.answer("hello")
    first = next(pieces)
    assert talk.messages == [Message("user", "hello")]  # the rest has not been written yet
    rest = "".join(pieces)
    assert talk.messages == [Message("user", "hello"), Message("assistant", (first + rest).strip())]
    list(talk.answer("and then?"))
    assert [m.role for m in talk.messages] == ["user", "assistant"] * 2


def test_what_was_said_before_is_part_of_the_prompt(workdir, monkeypatch):
    talk = chat.Chat(open_model(str(workdir / "teach")), max_new_tokens=1)
    prompts = []

    def stream(params, tokens, key, **options):
        prompts.append(talk.tokenizer.decode(tokens))
        yield from talk.tokenizer.encode("yes")

    monkeypatch.setattr("llmjax.generation.decode.stream", stream)
    assert ["".join(talk.answer(text)) for text in ("hello", "and then?")] == ["yes", "yes"]
    assert prompts[1].startswith(prompts[0]) and "yes" in prompts[1] and "and then?" in prompts[1]


def test_the_answer_ends_at_any_of_the_stop_tokens(workdir, monkeypatch):
    talk = chat.Chat(open_model(str(workdir / "teach")))
    seen = {}
    monkeypatch.setattr("llmjax.generation.decode.stream", lambda *args, **options: seen.update(options) or iter(()))
    list(talk.answer("hello"))
    names = {talk.tokenizer.decode([i]) for i in seen["stop_ids"]}
    assert names == {"<|end|>", "<|endoftext|>"}

def test_conversation(capsys, workdir, monkeypatch):
    typed = iter(["hello", "/new", "hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    greeting, *answers = answer_of(capsys, workdir).split("\n", 1)
    assert greeting.startswith(f"the teach model of {workdir}; an empty line ends the chat")
    one = answer_of(capsys, workdir, "--message=hello")
    assert answers == [one * 2]  # a new dialogue is answered as the first was


def test_end_of_input_ends_the_conversation(capsys, workdir, monkeypatch):
    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert answer_of(capsys, workdir).count("\n") == 1
