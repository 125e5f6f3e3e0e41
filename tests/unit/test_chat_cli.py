"""llmjax-chat: mistakes are one line; the conversation is led, shown piece by piece, and begun anew."""

import dataclasses
import json
import os
import pathlib
import sys

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


def add_stage(folder: pathlib.Path, name: str, seed: int = 0, kind: str = "language", **about) -> None:
    """What a complete stage leaves: an untrained model and what it is."""
    params = tiny.language_model(CFG, seed) if kind == "language" else tiny.scalar_model(CFG, seed)
    save_params(str(folder / name / "params"), params)
    about = {"kind": kind, "dtype": "float32", "model": to_dict(CFG), "source": None} | about
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


def said(monkeypatch, text: str, *, prompts: list | None = None, stop_after: int | None = None) -> None:
    """Every model writes `text`, a token a byte; Ctrl-C comes in place of token `stop_after`."""

    def stream(params, tokens, key, **options):
        if prompts is not None:
            prompts.append(tokens)
        for number, byte in enumerate(text.encode()):
            if number == stop_after:
                raise KeyboardInterrupt
            yield 6 + byte

    monkeypatch.setattr("llmjax.generation.decode.stream", stream)


def type_in(monkeypatch, *lines) -> None:
    """What is typed at the prompt, line by line; an exception is raised in its place."""
    typed = iter(lines)

    def read(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


# ---- base models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> pathlib.Path:
    folder = make_run(tmp_path_factory.mktemp("base"))
    add_stage(folder, "text", chats=False, length=20)
    return folder


def test_a_base_model_goes_on_with_the_text(base_model, capsys, monkeypatch):
    prompts: list[list[int]] = []
    said(monkeypatch, " there was", prompts=prompts)
    type_in(monkeypatch, "Once é", "/new", "")
    chat.run(["llmjax-chat", f"--workdir={base_model}"])
    first, *answers = capsys.readouterr().out.splitlines()
    assert first == (f"the text model of {base_model}, a base model: it goes on with your text, each line by itself; "
                     "Ctrl-C stops an answer, an empty line ends the program")  # fmt: skip
    assert answers == [" there was"] * 2  # with the space that it begins with
    bos = 1
    assert prompts == [[bos, *(6 + byte for byte in text.encode())] for text in ("Once é", "/new")]


@pytest.mark.parametrize(("flags", "plain"), [([], True), (["--plain"], True), (["--noplain"], False)])
def test_plain_or_not_can_be_said(base_model, capsys, monkeypatch, flags, plain):
    prompts: list[list[int]] = []
    said(monkeypatch, "x", prompts=prompts)
    chat.run(["llmjax-chat", f"--workdir={base_model}", "--message=Once", *flags])
    text = Tokenizer.load(base_model / "tokenizer").decode(prompts[0])
    assert text == ("<|endoftext|>Once" if plain else "<|endoftext|><|user|>Once<|end|><|assistant|>")


def test_a_folder_without_a_chat_template_holds_a_base_model(workdir, tmp_path):
    """And so does the checkpoint that is made of it."""
    folder, checkpoint = tmp_path / "hf", tmp_path / "ours"
    convert.run(["llmjax-convert", f"--source={workdir / 'teach'}", f"--target={folder}"])
    assert open_model(str(folder)).chats
    os.remove(folder / "chat_template.jinja")
    config = json.loads((folder / "config.json").read_text())
    write_json_atomic(folder / "config.json", config | {"max_position_embeddings": 77})
    convert.run(["llmjax-convert", f"--source={folder}", f"--target={checkpoint}"])
    for place in (folder, checkpoint):
        model = open_model(str(place))
        assert not model.chats and model.length == 77 and chat.Chat(model).plain
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json_atomic(folder / "tokenizer_config.json", config | {"chat_template": "{{ messages[0].content }}"})
    assert open_model(str(folder)).chats


# ---- the terminal -------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_not_the_program(workdir, capsys, monkeypatch):
    said(monkeypatch, "so it was", stop_after=2)
    talk = chat.Chat(open_model(str(workdir / "teach")))
    type_in(monkeypatch, "hello", "again", KeyboardInterrupt())
    chat._converse(talk)
    assert capsys.readouterr().out == "so ... stopped\n" * 2 + "\n"
    assert [(m.role, m.content) for m in talk.messages] == [
        ("user", "hello"), ("assistant", "so"), ("user", "again"), ("assistant", "so")
    ]  # fmt: skip


def test_a_message_whose_answer_is_stopped_before_it_begins_is_forgotten(workdir, monkeypatch):
    said(monkeypatch, "yes", stop_after=0)
    talk = chat.Chat(open_model(str(workdir / "teach")))
    type_in(monkeypatch, "hello", "")
    chat._converse(talk)
    assert talk.messages == []


@pytest.mark.parametrize("end", [KeyboardInterrupt(), EOFError()])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_quietly(workdir, capsys, monkeypatch, end):
    type_in(monkeypatch, end)
    base.call(chat.run, ["llmjax-chat", f"--workdir={workdir}"])  # no SystemExit
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2 and captured.err == ""


def test_the_prompt_has_line_editing_and_a_history(workdir, monkeypatch):
    pytest.importorskip("readline")
    monkeypatch.delitem(sys.modules, "readline")
    type_in(monkeypatch, "")
    chat._converse(chat.Chat(open_model(str(workdir / "teach"))))
    assert "readline" in sys.modules


def test_a_context_beyond_the_length_of_training_is_said_once(base_model, capsys, monkeypatch):
    said(monkeypatch, "twelve bytes")
    lines = ["1234567", "12345678", "12345678", ""]
    type_in(monkeypatch, *lines)
    chat.run(["llmjax-chat", f"--workdir={base_model}"])
    _, *answers = capsys.readouterr().out.splitlines()
    word = "(21 tokens, and the model was trained on 20 at most: it reads all of them, but may write worse)"
    assert answers == ["twelve bytes", "twelve bytes", word, "twelve bytes"]  # 1 + 7 + 12 tokens are 20


def test_a_dialogue_grows_beyond_it_too(tmp_path, capsys, monkeypatch):
    add_stage(make_run(tmp_path), "text", length=23)
    said(monkeypatch, "yes")
    type_in(monkeypatch, "hello", "hello", "")
    chat.run(["llmjax-chat", f"--workdir={tmp_path}"])
    _, *answers = capsys.readouterr().out.splitlines()
    word = "(24 tokens, and the model was trained on 23 at most: it reads all of them, but may write worse"
    assert answers == ["yes", "yes", f"{word}; /new starts a new dialogue)"]


def test_a_terminal_is_told_while_the_first_answer_is_compiled(workdir, capsys, monkeypatch):
    said(monkeypatch, "yes")
    talk = chat.Chat(open_model(str(workdir / "teach")))
    type_in(monkeypatch, "hello", "hello", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    chat._converse(talk)
    captured = capsys.readouterr()
    assert captured.out == "yes\n" * 2
    word = chat.COMPILING
    assert captured.err == f"{word}\r{' ' * len(word)}\r"  # gone when the answer begins


# ---- a conversation -----------------------------------------------------------------------------------------------


def test_conversation(capsys, workdir, monkeypatch):
    type_in(monkeypatch, "hello", "/new", "hello", "")
    greeting, *answers = answer_of(capsys, workdir).split("\n", 1)
    assert greeting.startswith(f"the teach model of {workdir}; Ctrl-C stops an answer, an empty line ends the program, /new")
    one = answer_of(capsys, workdir, "--message=hello")
    assert answers == [one * 2]  # a new dialogue is answered as the first was

