"""llmjax.data.formats, as files are read: the records that people keep, and one line for each that is wrong."""

import csv
import dataclasses
import gzip
import json
import math
import os
import pathlib
import random

import numpy as np
import pytest

from llmjax import config
from llmjax.data.base import Mixture
from llmjax.data.formats import DIALOGUE_FORMATS, PROMPT_FORMATS, RANKING_FORMATS
from llmjax.data.records import Completion, Dialogue, Message, Prompt, Ranking, user
from llmjax.data.sources import Dialogues, Prompts, Rankings, Text
from llmjax.errors import UserError


def talk(*turns):
    """Messages of "role: text"."""
    return tuple(Message(*turn.split(": ", 1)) for turn in turns)


def hh(*turns):
    """The text of HH-RLHF: a human first, then in turns."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def ranking(prompt, texts, ranks, fields=None, id=""):
    return Ranking(Prompt(id, prompt, fields or {}), tuple(map(Completion, texts)), tuple(ranks))


def write(path, records):
    """A file of records, of the kind that its name says."""
    path = pathlib.Path(path)
    if path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def everything(cls, path, **fields):
    """All records in their order, and the note. (A file that is its own validation file holds nothing out.)"""
    splits = cls(path=str(path), validation_path=str(path), **fields).read(None)
    assert list(splits.train) == list(splits.train) == list(splits.held_out["validation"])
    return list(splits.train), splits.note


def fails(match, cls, path, **fields):
    with pytest.raises(UserError, match=match) as caught:
        cls(path=str(path), **fields).read(None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is right -----------------------------------------------------------------------------------------------

HI = talk("user: Hi", "assistant: Hello!")
TOOLS = [{"name": "add", "parameters": {"a": "int"}}]
CALLS = [{"name": "add", "arguments": {"a": 1}}]

# Format, records, what they mean.
DIALOGUES = {
    "messages": ("messages", [
        {"messages": [
            {"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "content": "2", "tool_call_id": "a"}, {"role": "assistant", "content": "It is 2."}],
         "tools": TOOLS},
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools": None},
    ], [
        Dialogue((*talk("system: Be kind.", "user: 1 + 1?"), Message("assistant", None, {"tool_calls": CALLS}),
                  Message("tool", "2", {"tool_call_id": "a"}), Message("assistant", "It is 2.")), tuple(TOOLS)),
        Dialogue(HI),
    ]),
    "system field, tools as text": ("messages", [
        {"system": "Be kind.", "tools": json.dumps(TOOLS), "conversation": [
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        {"system": "", "tools": "", "conversation": [
            {"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"}]},
        {"system": "Be kind.", "tools": None, "conversation": [
            {"role": "system", "content": "Mine."}, {"role": "developer", "content": "x"},
            {"role": "assistant", "content": ""}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes"}]},
    ], [
        Dialogue((*talk("system: Be kind."), *HI), tuple(TOOLS)), Dialogue((*talk("system: Mine."), *HI)),
        Dialogue(talk("system: Mine.", "developer: x", "assistant: ", "user: Hi", "assistant: Yes")),
    ]),
    "columns": ("messages", [{"messages": {"role": ["user", "assistant"], "content": ["Hi", "Hello!"]}}], [Dialogue(HI)]),
    "no tools in a text": ("messages", [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools": text}
        for text in ("", " ", "[]", "null")
    ], [Dialogue(HI)] * 4),
    "parts of text": ("messages", [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]}]},
    ], [Dialogue(HI)]),
    "ShareGPT": ("messages", [
        {"id": "a", "conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": "add"}, {"from": "observation", "value": "2"}, {"from": "gpt", "value": "2."}]},
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Hello!"}]},
    ], [
        Dialogue(talk("system: Be kind.", "user: 1 + 1?", "assistant: add", "tool: 2", "assistant: 2.")), Dialogue(HI),
    ]),
    "turns": ("messages", [
        {"id": "dev/1", "services": ["Food_2"],
         "turns": [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello!"}]},
        {"id": "dev/2", "services": [], "turns": [{"role": "prompter", "text": "Hi"}, {"role": "bot", "text": "Hello!"}]},
    ], [Dialogue(HI), Dialogue(HI)]),
    "speakers": ("messages", [
        {"dialogue": [{"speaker": "USER", "text": "Hi"}, {"speaker": "Model", "text": "Hello!"}]},
    ], [Dialogue(HI)]),
    "alpaca": ("alpaca", [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"}, {"instruction": "Greet.", "input": "", "output": " Hi "},
        {"instruction": "Greet.", "input": None, "output": "Hi"},
    ], [
        Dialogue(talk("user: Add.\n\n1 and 1", "assistant: 2")), Dialogue(talk("user: Greet.", "assistant:  Hi ")),
        Dialogue(talk("user: Greet.", "assistant: Hi")),
    ]),
    "alpaca without input": ("alpaca", [
        {"instruction": "Greet.", "output": "Hi", "system": "Be kind."},
        {"instruction": "Greet.", "output": "Hi", "system": None},
    ], [
        Dialogue(talk("system: Be kind.", "user: Greet.", "assistant: Hi")), Dialogue(talk("user: Greet.", "assistant: Hi")),
    ]),
    "pair of messages": ("prompt/completion", [
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
         "completion": [{"role": "assistant", "content": "Hello!"}]},
    ], [Dialogue((*talk("system: S"), *HI))]),
    "hh-rlhf": ("hh-rlhf", [
        {"text": hh("Hi", "Hello!")}, {"text": "\n\nHuman: a\n\nb\n\nAssistant:\n\nHuman: c Human: d\n\nAssistant: e\n\n"},
    ], [Dialogue(HI), Dialogue(talk("user: a\n\nb", "assistant: ", "user: c Human: d", "assistant: e"))]),
    "the chosen one alone": ("hh-rlhf", [{"chosen": hh("Hi", "Hello!")}], [Dialogue(HI)]),
    "chosen/rejected": ("chosen/rejected", [
        {"chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")},
        {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "c", "e")},
    ], [Dialogue(HI), Dialogue(talk("user: a", "assistant: b", "user: c", "assistant: d"))]),
    "chosen/rejected with prompt": ("chosen/rejected", [{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}],
                                    [Dialogue(HI)]),
}  # fmt: skip

DIALOGUES |= {
    f"{asked}/{answered}": (
        "alpaca" if (asked, answered) == ("instruction", "output") else "prompt/completion",
        [{"id": 3, asked: "Hi", answered: "Hello!"}], [Dialogue(HI)],
    )
    for asked in ("prompt", "question", "query", "instruction") for answered in ("completion", "response", "answer", "output")
}  # fmt: skip

ALONE = {"messages": [{"role": "user", "content": "Hi"}]}
PROMPTS = {
    "text": ("prompt", [
        {"prompt": "Hi", "id": "7", "level": 3, "tags": ["a", "b"]}, {"prompt": " Hi\n", "id": "x", "level": 4, "tags": []},
        {"prompt": "Ho", "id": None, "level": None, "tags": ["c"]},
    ], [
        Prompt("7", user("Hi"), {"id": "7", "level": 3, "tags": ["a", "b"]}),
        Prompt("x", user(" Hi\n"), {"id": "x", "level": 4, "tags": []}),
        Prompt("", user("Ho"), {"id": None, "level": None, "tags": ["c"]}),
    ]),
    "chosen/rejected are fields of a prompt": ("prompt", [{"prompt": "Hi", "chosen": "Hello!", "rejected": 3}],
                                               [Prompt("", user("Hi"), {"chosen": "Hello!", "rejected": 3})]),
    "question": ("prompt", [{"question": "1 + 1?", "answer": "#### 2"}], [Prompt("", user("1 + 1?"), {"answer": "#### 2"})]),
    "query": ("prompt", [{"_id": "q1", "query": "Hi"}], [Prompt("q1", user("Hi"), {"_id": "q1"})]),
    "instruction": ("prompt", [{"prompt_id": 0, "instruction": "Hi", "output": "x"}],
                    [Prompt("0", user("Hi"), {"prompt_id": 0, "output": "x"})]),
    "prompt of messages": ("prompt", [
        {"prompt": [{"role": "system", "content": "S"}, {"role": "human", "content": "Hi"}], "source": "web"},
    ], [Prompt("", talk("system: S", "user: Hi"), {"source": "web"})]),
    "messages": ("messages", [ALONE | {"answer": "Hello!"}], [Prompt("", user("Hi"), {"answer": "Hello!"})]),
    "a dialogue with its last answer": ("messages", [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"},
                           {"from": "gpt", "value": "d"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]},
    ], [
        Prompt("", user("Hi"), {"answer": "Hello!"}),
        Prompt("", talk("user: a", "assistant: b", "user: c"), {"answer": "d"}),
        Prompt("", talk("user: a", "assistant: b", "user: c"), {}),
    ]),
    "an answer that is there already": ("messages", [
        {"turns": [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello!"}], "answer": "mine"},
    ], [Prompt("", user("Hi"), {"answer": "mine"})]),
    "alpaca": ("alpaca", [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"}, {"instruction": "Greet.", "input": "", "output": "Hi"},
    ], [Prompt("", user("Add.\n\n1 and 1"), {"output": "2"}), Prompt("", user("Greet."), {"output": "Hi"})]),
    "alpaca with system": ("alpaca", [{"system": "S", "instruction": "Add.", "input": "1"}],
                           [Prompt("", talk("system: S", "user: Add.\n\n1"), {})]),
    "chosen/rejected": ("chosen/rejected", [{"id": 4, "chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go."), "level": 1}],
                        [Prompt("4", user("Hi"), {"id": 4, "level": 1})]),
}  # fmt: skip

# Sides that answer different prompts, as a few of HH-RLHF do: left out.
APART = [
    {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "e")}, {"chosen": hh("Hi", "b"), "rejected": hh("Ho", "b")},
    {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "e", "c", "d")},
]  # fmt: skip
DIALOGUES["chosen/rejected apart"] = (
    "chosen/rejected", [{"chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")}, *APART], [Dialogue(HI)]
)  # fmt: skip
PROMPTS["chosen/rejected apart"] = (
    "chosen/rejected", [{"chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")}, *APART], [Prompt("", user("Hi"))]
)  # fmt: skip

ASKED, OBJECTS = user("Hi"), [{"text": "a", "rank": 1, "by": "x"}, {"text": "b", "rank": 0, "by": "y"}]
NAMED = {"x": "Hello!", "y": "Hey", "z": "Go."}
RANKINGS = {
    "ranks": ("ranks", [
        {"prompt": "Hi", "answers": ["a", "b", "c"], "ranks": [2, 0, 1], "level": 3},
        {"prompt": "Hi", "answers": ["a", "b"], "ranks": [1, 0], "level": 4},
        {"prompt": "Hi", "answers": ["a", "b", "c", "d"], "ranks": [5, 1, 1, 9], "level": 5},
        {"prompt": "Hi", "answers": ["a", "b"], "ranks": [3, 3], "level": 6},
        {"prompt": "Hi", "answers": ["a", "b"], "ranks": None, "level": 7},
    ], [
        ranking(ASKED, "abc", (2, 0, 1), {"level": 3}), ranking(ASKED, "ab", (1, 0), {"level": 4}),
        ranking(ASKED, "abcd", (2, 0, 0, 3), {"level": 5}), ranking(ASKED, "ab", (0, 0), {"level": 6}),
    ]),
    "ranks of a question": ("ranks", [
        {"id": 0, "question": "Hi", "completions": ["a", "b"], "rank": [1.5, 0.5], "scores": [1, 2]},
    ], [ranking(ASKED, "ab", (1, 0), {"id": 0, "scores": [1, 2]}, "0")]),
    "ranks in objects": ("ranks", [{"prompt": "Hi", "responses": OBJECTS}], [ranking(ASKED, "ab", (1, 0))]),
    "ranks of a dialogue": ("ranks", [
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}], "answers": ["a", "b"],
         "ranks": [0, 1]},
    ], [ranking(talk("system: S", "user: Hi"), "ab", (0, 1))]),
    "ranks, not scores": ("ranks", [{"prompt": "Hi", "answers": ["a", "b"], "scores": [0.0, 1.0], "ranks": [0, 1]}],
                          [ranking(ASKED, "ab", (0, 1), {"scores": [0.0, 1.0]})]),
    "scores": ("scores", [
        {"prompt": "Hi", "answers": ["a", "b", "c"], "scores": [0.5, -1.0, 2.0]},
        {"prompt": "Hi", "answers": ["a", "b", "c"], "scores": [1.0, 1.0, 0.0]},
        {"prompt": "Hi", "answers": ["", "b"], "scores": [0.0, 3.0]}, {"prompt": "Hi", "answers": ["a", "b"], "scores": None},
    ], [
        ranking(ASKED, "abc", (1, 2, 0)), ranking(ASKED, "abc", (0, 0, 2)), ranking(ASKED, ["", "b"], (1, 0)),
    ]),
    "scores in objects": ("scores", [
        {"prompt": "Hi", "answers": [{"content": "a", "score": 1}, {"content": "b", "score": 3}]},
        {"prompt": "Ho", "answers": [{"content": "a", "score": 3}, {"content": "b", "score": 3}, {"content": "c", "score": 4}]},
    ], [ranking(ASKED, "ab", (1, 0)), ranking(user("Ho"), "abc", (1, 1, 0))]),
    "chosen/rejected, HH": ("chosen/rejected", [
        {"id": 0, "chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")},
        {"id": 1, "chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "c", "")},
    ], [
        ranking(ASKED, ["Hello!", "Go."], (0, 1), {"id": 0}, "0"),
        ranking(talk("user: a", "assistant: b", "user: c"), ["d", ""], (0, 1), {"id": 1}, "1"),
    ]),
    "chosen/rejected apart": ("chosen/rejected", [{"chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")}, *APART],
                              [ranking(ASKED, ["Hello!", "Go."], (0, 1))]),
    "chosen/rejected, messages": ("chosen/rejected", [
        {"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
         "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go."}], "score_chosen": 8.5},
    ], [ranking(ASKED, ["Hello!", "Go."], (0, 1), {"score_chosen": 8.5})]),
    "chosen/rejected, prompt": ("chosen/rejected", [{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go.", "source": "web"}],
                                [ranking(ASKED, ["Hello!", "Go."], (0, 1), {"source": "web"})]),
    "chosen/rejected, prompt of messages": ("chosen/rejected", [
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello!"}],
         "rejected": [{"role": "assistant", "content": "Go."}]},
    ], [ranking(ASKED, ["Hello!", "Go."], (0, 1))]),
    "chosen/rejected, prompt and whole dialogues": ("chosen/rejected", [
        {"prompt": "Hi", "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
         "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go."}]},
    ], [ranking(ASKED, ["Hello!", "Go."], (0, 1))]),
    "groups of texts": ("ranking", [
        {"prompt": "Hi", "ranking": [["a"], ["b", "c"], ["d"]], "level": 1},
        {"prompt": "Hi", "ranking": [["a", "b"]], "level": 2},
        {"prompt": "Hi", "ranking": [["a"], [], ["b"]], "level": 3},
    ], [
        ranking(ASKED, "abcd", (0, 1, 1, 3), {"level": 1}), ranking(ASKED, "ab", (0, 0), {"level": 2}),
        ranking(ASKED, "ab", (0, 1), {"level": 3}),
    ]),
    "groups of names": ("ranking", [
        {"prompt": "Hi", "answers": NAMED, "ranking": [["y"], ["x", "z"]]},
    ], [ranking(ASKED, ["Hey", "Hello!", "Go."], (0, 1, 1))]),
    "groups of numbers": ("ranking", [{"question": "Hi", "answers": ["a", "b", "c"], "ranking": [[2], [0, 1]]}],
                          [ranking(ASKED, "cab", (0, 1, 1))]),
    "an order": ("ranking", [{"prompt": "Hi", "ranking": ["a", "b", "c"]}], [ranking(ASKED, "abc", (0, 1, 2))]),
}  # fmt: skip

GOOD = [
    pytest.param(cls, *case, id=f"{cls.__name__}: {name}")
    for cls, cases in ((Dialogues, DIALOGUES), (Prompts, PROMPTS), (Rankings, RANKINGS))
    for name, case in cases.items()
]


def with_places(items, records, places):
    """What is expected, with the place of a record for the id of a prompt that has none."""
    found = []
    for item, place in zip(items, (place for record, place in zip(records, places) if record)):
        if isinstance(item, Prompt) and not item.id:
            item = dataclasses.replace(item, id=place)
        if isinstance(item, Ranking) and not item.prompt.id:
            item = dataclasses.replace(item, prompt=dataclasses.replace(item.prompt, id=place))
        found.append(item)
    return found


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize(("cls", "name", "records", "items"), GOOD)
def test_records_are_read_as_they_are_meant(tmp_path, cls, name, records, items, suffix):
    path = write(tmp_path / f"a.{suffix}", records)
    found, note = everything(cls, path)
    assert [type(item) for item in found] == [cls.kind] * len(items)
    places = [f"a.{suffix} row {i}" if suffix == "parquet" else f"a.{suffix}:{i}" for i in range(1, len(records) + 1)]
    assert found == with_places(items, records, places)
    left_out = len(records) - len(items)
    told = f"{len(items)} {cls.__name__.lower()} of {path}, format {name}"
    assert note == told + (f", {left_out} left out" if left_out else "")
    assert everything(cls, path, format=name)[0] == found
    if cls is Dialogues:  # for messages to people; it is no part of what is learnt
        assert [item.id for item in found] == [str(tmp_path / place) for place in places[: len(items)]]


def test_every_format_is_tried():
    for formats, cases in ((DIALOGUE_FORMATS, DIALOGUES), (PROMPT_FORMATS, PROMPTS), (RANKING_FORMATS, RANKINGS)):
        assert {one.name for one in formats} == {name for name, _, _ in cases.values()}


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "c.parquet"):
        write(tmp_path / name, [{"prompt": f"{name} {i}"} for i in (1, 2)])
    found, _ = everything(Prompts, tmp_path / "*")
    names = ("a.jsonl.gz", "b.jsonl", "c.parquet")
    assert [prompt.text for prompt in found] == [f"{name} {i}" for name in names for i in (1, 2)]
    assert [prompt.id for prompt in found][::2] == ["a.jsonl.gz:1", "b.jsonl:1", "c.parquet row 1"]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Prepared data sets of dialogues and of rankings, each one split."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features

    class LlmjaxTestRecords(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("dialogues", "rankings")]
        code_path = None

        def _info(self):
            text, many = features.Text(), features.Sequence
            shapes = {
                "dialogues": {"messages": many({"role": text, "content": text})},
                "rankings": {"prompt": text, "answers": many(text), "ranks": many(np.int64)},
            }
            feature = features.FeaturesDict(shapes[self.builder_config.name])
            return tfds.core.DatasetInfo(builder=self, features=feature)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                turns = [{"role": "user", "content": f"é {i}"}, {"role": "assistant", "content": f"a {i}"}]
                ranked = {"prompt": f"é {i}", "answers": ["x", "y", "z"][: 2 + i % 2], "ranks": [1, 0, 0][: 2 + i % 2]}
                yield i, {"messages": turns} if self.builder_config.name == "dialogues" else ranked

    folder = tmp_path_factory.mktemp("tfds")
    for name in ("dialogues", "rankings"):
        LlmjaxTestRecords(config=name, data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize("cls", [Dialogues, Rankings])
def test_tfds(tfds_folder, cls):
    name = f"llmjax_test_records/{cls.__name__.lower()}"
    by_name = cls(path=str(tfds_folder), name=name, validation_fraction=0.2).read(None)
    by_folder = cls(path=str(tfds_folder / name / "1.0.0"), validation_fraction=0.2).read(None)
    train, held_out = list(by_name.train), list(by_name.held_out["validation"])
    assert (len(train), len(held_out)) == (8, 2) and len(list(by_folder.train)) == 8
    assert f"10 {cls.__name__.lower()} of {name}, format" in by_name.note
    if cls is Dialogues:
        want = [Dialogue(talk(f"user: é {i}", f"assistant: a {i}")) for i in range(10)]
        assert sorted(map(str, (d.messages for d in train + held_out))) == sorted(str(d.messages) for d in want)
    else:
        found = {item.prompt.text: (tuple(c.text for c in item.completions), item.ranks) for item in train + held_out}
        assert found == {f"é {i}": (tuple("xyz"[: 2 + i % 2]), ((1, 0), (2, 0, 0))[i % 2]) for i in range(10)}


# ---- what is wrong -----------------------------------------------------------------------------------------------

# A line that is no record of any kind, and what is said of it.
NO_RECORDS = {
    "half an object": (b'{"a": ', "not JSON"), "no JSON": (b"prompt: Hi", "not JSON"),
    "a list": (b"[1, 2]", "a list, not an object"),
    "text": (b'"Hi"', "a str, not an object"), "a number": (b"7", "a int, not an object"), "null": (b"null", "not an object"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"), "no field": (b"{}", "not of format .*; it has no field"),
    "other fields": (b'{"a": 1, "b": 2}', "not of format .*; it has a, b"), "too deep": (b"[" * 100_000, "not JSON"),
}  # fmt: skip

BAD_MESSAGES = {
    "text": ("Hi", "messages is text, not a list of messages"), "null": (None, "messages is null, not a list"),
    "number": (3, "messages is a number, not a list"), "object": ({"a": 1}, "messages is an object, not a list of messages"),
    "ragged columns": ({"role": ["user"], "content": ["a", "b"]}, "messages is an object, not a list"),
    "empty": ([], "messages holds no message"), "of texts": (["Hi"], r"messages\[0\] is text, not an object"),
    "no role": ([{"content": "Hi"}], r"messages\[0\]: no field role or from or speaker; it has content"),
    "unknown role": ([{"role": "alien", "content": "Hi"}], r"messages\[0\]: role='alien' is no role; there is system,"),
    "role of a number": ([{"role": 3, "content": "Hi"}], "role=3 is no role"),
    "no content": ([{"role": "user", "content": "x"}, {"role": "assistant"}], r"messages\[1\]: no content"),
    "null content": ([{"role": "user", "content": None}], r"messages\[0\]: no content"),
    "content of a number": ([{"role": "user", "content": 3}], r"messages\[0\] is a number, not text"),
    "content with a surrogate": ([{"role": "user", "content": "\ud800"}], r"messages\[0\] holds a lone surrogate"),
    "an image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}],
                 "a part of type 'image'; only parts of type 'text'"),
    "parts of text without text": ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\] is null, not text"),
}  # fmt: skip
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
FROM = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
BAD_TEXTS = {
    "null": (None, "is null"), "a number": (3, "is a number"), "empty": ("", "is empty"), "blank": (" \n", "is empty"),
    "truth": (True, "is true or false"), "a surrogate": ("\udfff", "lone surrogate"),
}  # fmt: skip


def bad_fields(good, field, more=()):
    """Records that are right but for one field."""
    for name, (value, error) in BAD_TEXTS.items():
        yield f"{field} {name}", good | {field: value}, f"{field} .*{error}"
    yield f"no {field}", {k: v for k, v in good.items() if k != field}, "not of format"
    for name, value, error in more:
        yield f"{field} {name}", good | {field: value}, error


def bad_dialogues():
    """(format, a good record, name, a bad record, error)."""
    for field in ("messages", "conversations", "turns"):
        good = {field: SAID}
        for name, (value, error) in BAD_MESSAGES.items():
            yield "messages", good, f"{field} {name}", {field: value}, error.replace("messages", field, 1)
        for name, value, error in (
            ("of the user alone", SAID[:1], "no message of the assistant, so there is nothing to learn"),
            ("with empty answers", [SAID[0], SAID[1] | {"content": " "}], "the messages of the assistant are empty"),
        ):
            yield "messages", good, f"{field} {name}", {field: value}, error
    for name, tools, error in (
        ("no JSON", "[", "tools is text but not JSON"), ("a number", 3, "tools is not a list of objects"),
        ("texts", ["a"], "tools is not a list of objects"), ("an object", {"a": 1}, "tools is not a list"),
        ("a text in JSON", '"a"', "tools is not a list of objects"),
    ):  # fmt: skip
        yield "messages", {"messages": SAID}, f"tools {name}", {"messages": SAID, "tools": tools}, error
    good = {"conversations": FROM}
    for name, turn, error in (
        ("unknown", {"from": "robot", "value": "x"}, "from='robot' is no role"),
        ("nobody", {"value": "x"}, "no field role or from"),
        ("silent", {"from": "gpt"}, "no content"), ("number", {"from": "gpt", "value": 3}, "is a number, not text"),
    ):  # fmt: skip
        yield "messages", good, f"ShareGPT {name}", {"conversations": [FROM[0], turn]}, rf"conversations\[1\].*{error}"
    good = {"messages": SAID, "system": "S"}
    yield "messages", good, "system with a surrogate", good | {"system": "\ud800"}, "system holds a lone surrogate"
    good = {"instruction": "Add.", "input": "1", "output": "2"}
    for case in (*bad_fields(good, "instruction"), *bad_fields(good, "output", [("[]", [], "output holds no message")])):
        yield "alpaca", good, *case
    for name, value, error in (("a number", 3, "input is a number"), ("a surrogate", "\ud800", "input holds a lone surrogate")):
        yield "alpaca", good, f"input {name}", good | {"input": value}, error
    yield "alpaca", good, "system of a number", good | {"system": 3}, "system is a number, not text"
    good = {"prompt": "Hi", "completion": "Hello!"}
    for field in good:
        yield from (("prompt/completion", good, *case) for case in bad_fields(good, field, [
            ("[]", [], f"{field} holds no message"), ("an object", {"a": 1}, f"{field} is an object, not a list of messages"),
            ("of aliens", [{"role": "alien", "content": "x"}], rf"{field}\[0\]: role='alien' is no role"),
        ]))  # fmt: skip
    yield "prompt/completion", good, "asked twice", good | {"completion": SAID[:1]}, "no message of the assistant"
    good = {"text": hh("Hi", "Hello!")}
    for name, text, error in (
        ("null", None, "not of format hh-rlhf"), ("number", 3, "not of format hh-rlhf"), ("empty", "", "not of format hh-rlhf"),
        ("other text", "Hi", "not of format hh-rlhf"), ("words before", "x" + hh("Hi", "Hello!"), "not of format hh-rlhf"),
        ("one turn", hh("Hi"), "no message of the assistant"),
        ("silence", hh("Hi", " "), "messages of the assistant are empty"),
        ("a surrogate", hh("Hi", "\ud800"), "text holds a lone surrogate"), ("a list", ["a"], "not of format hh-rlhf"),
        ("one line break", "\nHuman: Hi\n\nAssistant: Ho", "not of format hh-rlhf"),
    ):  # fmt: skip
        yield "hh-rlhf", good, name, {"text": text}, error
    for case in (*bad_chosen(), *bad_chosen_of_prompt()):
        yield "chosen/rejected", *case
    good = {"chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")}
    yield "chosen/rejected", good, "silence", good | {"chosen": hh("Hi", "")}, "messages of the assistant are empty"


def bad_chosen():
    good = {"chosen": hh("Hi", "Hello!"), "rejected": hh("Hi", "Go.")}
    for name, record, error in (
        ("one side", {"chosen": good["chosen"]}, "not of format chosen/rejected"),
        ("null", good | {"rejected": None}, "rejected is null, not text"),
        ("both null", {"chosen": None, "rejected": None}, "chosen is null, not a list of messages"),
        ("number", good | {"chosen": 3}, "chosen is a number, not a list of messages"),
        ("text and messages", good | {"rejected": SAID}, "rejected is a list, not text"),
        ("plain texts", {"chosen": "Hello!", "rejected": "Go."}, r'chosen does not begin with "\\n\\nHuman:"'),
        ("the human last", {"chosen": hh("a", "b", "c"), "rejected": hh("a", "b", "d")},
         "chosen does not end with a message of the assistant"),
        ("a surrogate", good | {"chosen": hh("\ud800", "x")}, "chosen holds a lone surrogate"),
        ("no turn at all", {"chosen": [], "rejected": []}, "chosen holds no message"),
        ("nothing asked", {"chosen": SAID[1:], "rejected": SAID[1:]}, "the prompt does not end with a message that an"),
    ):  # fmt: skip
        yield good, name, record, error


def bad_chosen_of_prompt():
    good = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}
    for name, (value, error) in BAD_TEXTS.items():
        yield good, f"prompt {name}", good | {"prompt": value}, error
    for name, record, error in (
        ("chosen null", good | {"chosen": None}, "chosen is null, not a list of messages"),
        ("chosen number", good | {"chosen": 3}, "chosen is a number, not a list of messages"),
        ("rejected surrogate", good | {"rejected": "\ud800"}, "rejected holds a lone surrogate"),
        ("another prompt inside", good | {"chosen": [{"role": "user", "content": "Ho"}, SAID[1]]},
         "chosen holds 2 messages that do not begin with the prompt"),
        ("no answer inside", good | {"chosen": SAID[:1]}, "chosen does not end with a message of the assistant"),
        ("a call for an answer", good | {"rejected": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
         "rejected has no content"),
    ):  # fmt: skip
        yield good, name, record, error


def bad_prompts():
    for field in ("prompt", "question"):
        good = {field: "Hi", "answer": "x"}
        for case in bad_fields(good, field, [
            ("[]", [], f"{field} holds no message"), ("an object", {"a": 1}, f"{field} is an object, not a list of messages"),
            ("of aliens", [{"role": "alien", "content": "x"}], rf"{field}\[0\]: role='alien' is no role"),
            ("of numbers", [1, 2], rf"{field}\[0\] is a number, not an object"),
            ("answered", SAID, "the prompt does not end with a message that an assistant could answer"),
        ]):  # fmt: skip
            yield "prompt", good, *case
    good = {"messages": SAID[:1]}
    for name, (value, error) in BAD_MESSAGES.items():
        yield "messages", good, name, {"messages": value}, error
    for name, value in (("the answer alone", SAID[1:]), ("two answers", [*SAID, SAID[1]])):
        yield "messages", good, name, {"messages": value}, "the prompt does not end with a message that an assistant could"
    good = {"instruction": "Add.", "input": "1"}
    for case in bad_fields(good, "instruction"):
        yield "alpaca", good, *case
    for name, value, error in (
        ("number", 3, "input is a number"), ("list", ["a"], "input is a list, not text"),
        ("truth", False, "input is true or false"), ("surrogate", "\ud800", "input holds a lone surrogate"),
    ):  # fmt: skip
        yield "alpaca", good, f"input {name}", good | {"input": value}, error
    yield "alpaca", good, "no input", {"instruction": "Add."}, "not of format alpaca"
    yield "alpaca", good, "system of a number", good | {"system": 3}, "system is a number, not text"
    for case in bad_chosen():
        yield "chosen/rejected", *case


def bad_rankings():
    for case in (*bad_chosen(), *bad_chosen_of_prompt()):
        yield "chosen/rejected", *case
    for form, names, in (("ranks", "ranks"), ("scores", "scores")):
        good = {"prompt": "Hi", "answers": ["a", "b", "c"], names: [0, 1, 2]}
        for name, (value, error) in BAD_TEXTS.items():
            yield form, good, f"prompt {name}", good | {"prompt": value}, error
        for name, record, error in (
            ("no prompt", {k: v for k, v in good.items() if k != "prompt"}, f"not of format {form}"),
            ("no answers", {k: v for k, v in good.items() if k != "answers"}, f"not of format {form}"),
            (f"no {names}", {k: v for k, v in good.items() if k != names}, f"not of format {form}"),
            ("null answers", good | {"answers": None}, f"not of format {form}"),
            ("answers in a text", good | {"answers": "abc"}, "answers is text, not a list of answers"),
            ("answers in an object", good | {"answers": NAMED}, "answers is an object, not a list of answers"),
            ("answers of numbers", good | {"answers": [1, 2, 3]}, r"answers\[0\] is a number, not text"),
            ("answer null", good | {"answers": ["a", None, "c"]}, r"answers\[1\] is null, not text"),
            ("answer with a surrogate", good | {"answers": ["a", "b", "\ud800"]}, r"answers\[2\] holds a lone surrogate"),
            ("answers mixed", good | {"answers": ["a", {"text": "b"}, "c"]}, "answers mixes texts and objects"),
            ("objects without text", good | {"answers": [{"a": 1}] * 3}, r"answers\[0\]: no field content or value or text"),
            ("one answer", good | {"answers": ["a"], names: [0]}, "a ranking of 1 answer; it takes two or more"),
            ("none", good | {"answers": [], names: []}, "a ranking of 0 answers; it takes two or more"),
            ("too few", good | {names: [0, 1]}, f"{names} has 2 numbers for 3 answers"),
            ("too many", good | {names: [0, 1, 2, 3]}, f"{names} has 4 numbers for 3 answers"),
            ("a text", good | {names: "0,1,2"}, f"{names} is text, not a list of numbers"),
            ("a number", good | {names: 1}, f"{names} is a number, not a list of numbers"),
            ("texts", good | {names: ["0", "1", "2"]}, rf"{names}\[0\]='0' is not a number"),
            ("truths", good | {names: [0, True, 2]}, rf"{names}\[1\]=True is not a number"),
            ("null", good | {names: [0, None, 2]}, rf"{names}\[1\]=None is not a number"),
            ("not a number", good | {names: [0, 1, math.nan]}, rf"{names}\[2\]=nan is not a number"),
            ("lists", good | {names: [[0], 1, 2]}, rf"{names}\[0\]=\[0\] is not a number"),
        ):  # fmt: skip
            yield form, good, name, record, error
        one = names[:-1]
        good = {"prompt": "Hi", "answers": [{"text": "a", one: 0}, {"text": "b", one: 1}]}
        for name, answers, error in (
            ("missing", [good["answers"][0], {"text": "b"}], f"answer 1: no field {names} or {one}"),
            ("text", [good["answers"][0], {"text": "b", one: "1"}], r"\[1\]='1' is not a number"),
            ("null", [good["answers"][0], {"text": "b", one: None}], r"\[1\]=None is not a number"),
            ("none at all", [{"text": "a"}, {"text": "b"}], f"not of format {form}"),
            ("empty", [], f"not of format {form}"), ("mixed", [good["answers"][0], "b"], "mixes texts and objects"),
        ):  # fmt: skip
            yield form, good, f"inside {name}", good | {"answers": answers}, error
    good = {"prompt": "Hi", "ranking": [["a"], ["b"]]}
    for name, value, error in (
        ("null", None, "ranking is null, not a list of groups"), ("text", "a > b", "ranking is text, not a list"),
        ("object", {"a": 0}, "ranking is an object, not a list"), ("empty", [], "a ranking of 0 answers"),
        ("one", [["a"]], "a ranking of 1 answer"), ("numbers", [[0], [1]], r"ranking\[0\] is a number, not text"),
        ("null inside", [["a"], [None]], r"ranking\[1\] is null, not text"),
        ("a surrogate", [["a"], ["\ud800"]], r"ranking\[1\] holds a lone surrogate"),
        ("too deep", [["a"], [["b"]]], r"ranking\[1\] is a list, not text"),
        ("objects", [["a"], [{"text": "b"}]], r"ranking\[1\] is an object, not text"),
    ):  # fmt: skip
        yield "ranking", good, name, good | {"ranking": value}, error
    good = {"prompt": "Hi", "answers": NAMED, "ranking": [["y"], ["x", "z"]]}
    for name, change, error in (
        ("unknown name", {"ranking": [["y"], ["x", "w"]]}, "ranking names 'w', which is none of answers"),
        ("a name twice", {"ranking": [["y"], ["x", "y"]]}, "ranking names 'y' twice"),
        ("not all", {"ranking": [["y"], ["x"]]}, "ranking orders 2 of 3 answers"),
        ("objects", {"ranking": [["y"], [{"x": 1}]]}, "twice, or not by a name"),
        ("null", {"ranking": [["y"], [None]]}, "ranking names None, which is none of answers"),
        ("answers of numbers", {"answers": {"x": 1, "y": 2, "z": 3}}, r"ranking\[0\] is a number, not text"),
        ("answers in a text", {"answers": "xyz"}, "which is none of answers"),
        ("answers by number", {"answers": ["a", "b"], "ranking": [[0], [2]]}, "ranking names 2, which is none of answers"),
        ("answers by a negative number", {"answers": ["a", "b"], "ranking": [[0], [-1]]}, "ranking names -1, which is none"),
        ("answers by part of a number", {"answers": ["a", "b"], "ranking": [[0], [0.5]]}, "ranking names 0.5, which is none"),
    ):  # fmt: skip
        yield "ranking", good, name, good | change, error


BAD_RECORDS = [
    pytest.param(cls, name, good, json.dumps(bad).encode(), error, id=f"{cls.__name__}, {name}: {what}")
    for cls, cases in ((Dialogues, bad_dialogues()), (Prompts, bad_prompts()), (Rankings, bad_rankings()))
    for name, good, what, bad, error in cases
]
FIRST_GOOD = {(param.values[0], param.values[1]): param.values[2] for param in reversed(BAD_RECORDS)}
BAD_LINES = [
    pytest.param(cls, name, good, *NO_RECORDS[what], id=f"{cls.__name__}, {name}: {what}")
    for (cls, name), good in FIRST_GOOD.items()
    for what in NO_RECORDS
]


@pytest.mark.parametrize(("cls", "name", "good", "line", "error"), BAD_RECORDS + BAD_LINES)
def test_a_bad_record_is_one_line_with_its_place(tmp_path, cls, name, good, line, error):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + line + b"\n" + json.dumps(good).encode() + b"\n")
    message = fails(rf"^.*/a\.jsonl:3: .*({error})", cls, path)
    assert message.startswith(f"{path}:3: ")
    assert len(message) < 400 or "not of format" in message
    write(tmp_path / "b.jsonl", [good, good])
    # Held-out records are looked through too.
    assert fails(".", cls, tmp_path / "b.jsonl", validation_path=str(path)) == message


def test_there_are_at_least_ten_bad_records_of_every_format():
    for cls, formats in ((Dialogues, DIALOGUE_FORMATS), (Prompts, PROMPT_FORMATS), (Rankings, RANKING_FORMATS)):
        for one in formats:
            own = {param.values[3] for param in BAD_RECORDS if param.values[:2] == (cls, one.name)}
            assert len(own) >= 10, one.name


@pytest.mark.parametrize(("cls", "good"), [(Dialogues, {"messages": SAID}), (Prompts, {"prompt": "Hi"}),
                                           (Rankings, {"prompt": "Hi", "ranking": ["a", "b"]})])  # fmt: skip
def test_bad_files_are_one_line(tmp_path, cls, good):
    whole = gzip.compress((json.dumps(good) + "\n").encode() * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    fails(r"a\.jsonl\.gz: not a whole gzip file", cls, tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_text(json.dumps(good))
    fails(r"b\.jsonl\.gz: not a whole gzip file", cls, tmp_path / "b.jsonl.gz")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    fails(r"c\.parquet: not a whole parquet file", cls, tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_text("\n \n")
    fails(r"d\.jsonl: holds no record", cls, tmp_path / "d.jsonl")
    (tmp_path / "e.txt").write_text("Hi")
    fails(r"e\.txt: unknown suffix; files are read as \.jsonl, \.json, \.csv, \.parquet, also", cls, tmp_path / "e.txt")
    fails("matches no file", cls, tmp_path / "f.jsonl")
    fails("is a folder", cls, tmp_path)
    (tmp_path / "g.jsonl").write_bytes(json.dumps(good).encode("utf-16"))
    fails(r"g\.jsonl:1: not UTF-8", cls, tmp_path / "g.jsonl")


CSV = {
    Dialogues: (["prompt", "completion"], ["Hi", "Hello,\n\"you\"!"],
                Dialogue(talk("user: Hi", 'assistant: Hello,\n"you"!'))),
    Prompts: (["id", "question", "answer"], ["7", "1 + 1?", "2"],
              Prompt("7", user("1 + 1?"), {"id": "7", "answer": "2"})),
    Rankings: (["prompt", "chosen", "rejected"], ["Hi", "a", "b"], ranking(user("Hi"), "ab", (0, 1), id="a.csv:3")),
}  # fmt: skip


@pytest.mark.parametrize("cls", CSV)
def test_columns_of_csv_are_fields(tmp_path, cls):
    header, row, item = CSV[cls]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([header, [], row, row])
    found, note = everything(cls, tmp_path / "a.csv")
    assert found[0] == item and len(found) == 2 and note.startswith("2 ")


@pytest.mark.parametrize(("cls", "good"), [(Dialogues, {"messages": SAID}), (Prompts, {"prompt": "Hi"}),
                                           (Rankings, {"prompt": "Hi", "ranking": ["a", "b"]})])  # fmt: skip
def test_lists_in_json_are_records(tmp_path, cls, good):
    write(tmp_path / "a.jsonl", [good] * 3)
    (tmp_path / "b.json").write_text(json.dumps([good] * 3, indent=1))
    one, other = (everything(cls, tmp_path / name)[0] for name in ("a.jsonl", "b.json"))
    without = [str(item).replace("b.json record ", "a.jsonl:") for item in other]
    assert without == [str(item) for item in one]
    (tmp_path / "b.json").write_text(json.dumps([good, 3]))
    fails(r"b\.json record 2: a int, not an object", cls, tmp_path / "b.json")


# ---- skipping what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 7, 19])
@pytest.mark.parametrize(
    "wrong", [b'{"prompt": ', b"[1]", b'{"a": "\xff"}', b'{"foo": 1}', b'{"prompt": 3, "completion": "x"}']
)
def test_bad_records_are_skipped_and_told(tmp_path, wrong, place):
    lines = [json.dumps({"prompt": f"{i}", "completion": f"{i}"}).encode() for i in range(20)]
    lines[place] = wrong
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    first = fails(rf"^.*/a\.jsonl:{place + 1}: ", Dialogues, tmp_path / "a.jsonl")
    found, note = everything(Dialogues, tmp_path / "a.jsonl", skip_bad=True)
    assert [dialogue.messages[0].content for dialogue in found] == [f"{i}" for i in range(20) if i != place]
    if wrong == b'{"foo": 1}':  # once the format is known, the fields are compared with that
        first = f"{tmp_path / 'a.jsonl'}:{place + 1}: not of format prompt/completion, prompt, completion; it has foo"
    skipped = f"1 bad record skipped, the first is {first}"
    assert note == f"19 dialogues of {tmp_path / 'a.jsonl'}, format prompt/completion, {skipped}; validation: {skipped}"
    splits = Dialogues(str(tmp_path / "a.jsonl"), skip_bad=True).read(None)
    assert len(list(splits.train)) + len(list(splits.held_out["validation"])) == 19 and splits.note.endswith(skipped)


@pytest.mark.parametrize(("bad", "good", "fine"), [(1, 9, True), (2, 17, False), (2, 18, True), (5, 0, False), (1, 1, False)])
def test_more_than_a_tenth_is_too_much(tmp_path, bad, good, fine):
    lines = ["{"] * bad + [json.dumps({"prompt": f"{i}"}) for i in range(good)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    if fine:
        assert len(everything(Prompts, tmp_path / "a.jsonl", skip_bad=True)[0]) == good
    elif good:
        told = rf"^path=.*: {bad} of {good + bad} records are bad, more than the 10% that are skipped; the first is .*:1: not"
        fails(told, Prompts, tmp_path / "a.jsonl", skip_bad=True)
        write(tmp_path / "b.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
        fails(told, Prompts, tmp_path / "b.jsonl", skip_bad=True, validation_path=str(tmp_path / "a.jsonl"))
    else:
        fails(r"a\.jsonl:1: not JSON", Prompts, tmp_path / "a.jsonl", skip_bad=True)


def test_a_record_that_a_format_leaves_out_is_not_bad(tmp_path):
    path = write(tmp_path / "a.jsonl", [*QA, *[{"q": "q", "a": "?"}] * 6])
    found, note = everything(Dialogues, path, format=from_q_and_a, skip_bad=True)
    assert len(found) == 4 and note == f"4 dialogues of {path}, format from_q_and_a, 6 left out"


def test_a_bad_row_of_parquet_is_named(tmp_path):
    write(tmp_path / "a.parquet", [{"prompt": "Hi"}, {"prompt": None}])
    fails(r"a\.parquet row 2: prompt is null", Prompts, tmp_path / "a.parquet")


@pytest.mark.parametrize("cls", [Dialogues, Prompts, Rankings])
def test_an_unknown_format_is_refused_with_the_fields_that_are_there(tmp_path, cls):
    write(tmp_path / "a.jsonl", [{"foo": 1, "bar": 2}])
    match = r"a\.jsonl:1: no known format has the fields foo, bar; there is .*; or give a function as format"
    message = fails(match, cls, tmp_path / "a.jsonl")
    assert all(one.shape in message for one in cls.known)
    write(tmp_path / "b.jsonl", [{}])
    fails(r"b\.jsonl:1: no known format has the fields \(none\)", cls, tmp_path / "b.jsonl")


def test_a_format_by_name(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "Hi", "answers": ["a", "b"], "ranks": [0, 1], "scores": [0, 1]}])
    assert [r.ranks for r in everything(Rankings, tmp_path / "a.jsonl")[0]] == [(0, 1)]
    assert [r.ranks for r in everything(Rankings, tmp_path / "a.jsonl", format="scores")[0]] == [(1, 0)]
    fails(r"a\.jsonl:1: not of format ranking, prompt, ranking: .*; it has prompt, answers, ranks, scores", Rankings,
          tmp_path / "a.jsonl", format="ranking")  # fmt: skip
    for cls in (Dialogues, Prompts, Rankings):
        for name in ("auto", *(one.name for one in cls.known)):
            config.validate(cls(path="a.jsonl", format=name))
        with pytest.raises(UserError, match="format='alpca' is none of auto, .*, nor a function"):
            config.validate(cls(path="a.jsonl", format="alpca"))


# ---- functions ---------------------------------------------------------------------------------------------------


def from_q_and_a(record):
    """Another project's dialogues."""
    if record["a"] == "?":
        return None
    return Dialogue(talk(f"user: {record['q']}", f"assistant: {record['a']}"))


QA = [{"q": f"q{i}", "a": f"a{i}"} for i in range(4)]


def test_a_function_as_format(tmp_path):
    path = write(tmp_path / "a.jsonl", [*QA, {"q": "q", "a": "?"}])
    config.validate(Dialogues(path=str(path), format=from_q_and_a))
    found, note = everything(Dialogues, path, format=from_q_and_a)
    assert found == [Dialogue(talk(f"user: q{i}", f"assistant: a{i}")) for i in range(4)]
    assert found[1].id == f"{path}:2" and note == f"4 dialogues of {path}, format from_q_and_a, 1 left out"
    prompts, _ = everything(Prompts, path, format=lambda record: Prompt("", user(record["q"])))
    assert [prompt.id for prompt in prompts] == [f"a.jsonl:{i}" for i in range(1, 6)]
    ranked, _ = everything(Rankings, path, format=lambda r: ranking(user(r["q"]), [r["a"], ""], (0, 1), id=r["q"]))
    assert [one.prompt.id for one in ranked] == ["q0", "q1", "q2", "q3", "q"]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A function with options."""

    field: str = "q"

    def __call__(self, record):
        return Prompt("", user(record[self.field]))


def test_a_function_with_options_as_format(tmp_path):
    path = write(tmp_path / "a.jsonl", QA)
    found, note = everything(Prompts, path, format=Reader("a"))
    assert [prompt.text for prompt in found] == ["a0", "a1", "a2", "a3"] and note.endswith("format Reader")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda record: record["question"], r"format <lambda> fails \(KeyError: 'question'\); mend the record or the format"),
        (lambda record: record["q"] + 1, r"fails \(TypeError: can only concatenate str"),
        (lambda record: int(record["q"]), r"fails \(ValueError: invalid literal"),
        (lambda record: record.q, r"fails \(AttributeError: "), (lambda record: [][0], r"fails \(IndexError: "),
        (lambda record: float("one\ntwo"), r"fails \(ValueError: .*\)"),
        (lambda record: record, "format <lambda> returned a dict; it must return a Dialogue or None"),
        (lambda record: "text", "returned a str; it must return a Dialogue"),
        (lambda record: Prompt("", user("x")), "returned a Prompt; it must return a Dialogue or None"),
        (lambda record: Dialogue, "returned a type"),
        (lambda record: Dialogue(talk("user: \ud800", "assistant: x")), "surrogate"),
    ],
)  # fmt: skip
def test_a_function_that_fails_is_one_line_with_the_place(tmp_path, function, error):
    path = write(tmp_path / "a.jsonl", QA)
    fails(rf"/a\.jsonl:1: .*{error}", Dialogues, path, format=function)


def test_a_function_may_refuse_a_record_in_its_own_words(tmp_path):
    def picky(record):
        if record["q"] == "q2":
            raise UserError("q2 is not nice")
        return from_q_and_a(record)

    fails(r"/a\.jsonl:3: q2 is not nice$", Dialogues, write(tmp_path / "a.jsonl", QA), format=picky)


def test_a_function_that_leaves_all_out(tmp_path):
    path = write(tmp_path / "a.jsonl", QA)
    fails(r"path=.*a\.jsonl: no record to learn from", Dialogues, path, format=lambda record: None)
    fails(r"path=.*a\.jsonl: no validation record; give some, or leave out validation_path", Dialogues, path,
          format=from_q_and_a, validation_path=str(write(tmp_path / "b.jsonl", [{"q": "q", "a": "?"}])))  # fmt: skip


# ---- splits ------------------------------------------------------------------------------------------------------


def records_of(cls, prompts):
    """Two records of each prompt, which differ in the answer."""
    for prompt in prompts:
        for answer in ("a", "b"):
            if cls is Rankings:
                yield {"prompt": prompt, "chosen": answer, "rejected": "x"}
            else:
                yield {"prompt": prompt, "completion": answer}


def sides(cls, path, **fields):
    """The prompts of each side, with how often they are there."""
    splits = cls(path=str(path), **fields).read(None)
    parts = []
    for part in (splits.train, splits.held_out["validation"]):
        items = [item.prompt if isinstance(item, Ranking) else item for item in part]
        parts.append(sorted(item.messages[0].content for item in items))
    return parts


@pytest.mark.parametrize("cls", [Dialogues, Prompts, Rankings])
def test_the_split_is_by_prompt_and_not_by_order(tmp_path, cls):
    records = list(records_of(cls, [f"prompt {i}" for i in range(100)]))
    path = write(tmp_path / "a.jsonl", records)
    train, held_out = sides(cls, path)
    assert len(held_out) == 20 and len(train) == 180
    assert set(train).isdisjoint(held_out) and len(set(held_out)) == 10
    assert sides(cls, path) == [train, held_out]
    random.Random(0).shuffle(records)
    write(path, records)
    assert sides(cls, path) == [train, held_out], "the order of the records does not matter"
    first, second = (write(tmp_path / f"{name}.jsonl", part) for name, part in (("b", records[:77]), ("c", records[77:])))
    assert sides(cls, f"{second},{first}") == [train, held_out], "nor does the file"
    # A record that is added moves few others.
    write(path, [*records, *records_of(cls, ["another"])])
    changed = set(held_out) ^ set(sides(cls, path)[1])
    assert len(changed) <= 2


def test_the_share_that_is_held_out(tmp_path):
    path = write(tmp_path / "a.jsonl", records_of(Prompts, [f"prompt {i}" for i in range(100)]))
    for fraction, count in ((0.5, 100), (0.25, 50), (0.001, 2), (0.999, 198)):
        assert len(sides(Prompts, path, validation_fraction=fraction)[1]) == count
    write(path, records_of(Prompts, ["one", "two"]))
    assert sorted(map(len, sides(Prompts, path))) == [2, 2], "one of two, whatever the share"


def test_dialogues_are_held_out_by_how_they_begin(tmp_path):
    """The whole prompt counts, system message and all, and what is said later does not."""

    def dialogue(number, *later):
        begin = [{"role": "system", "content": "S"}, {"role": "user", "content": f"q{number}"}]
        return {"messages": [*begin, *({"role": role, "content": text} for role, text in later)]}

    endings = ((("assistant", "a"),), (("assistant", "b"), ("user", "c"), ("assistant", "d")))
    path = write(tmp_path / "a.jsonl", [dialogue(i, *ending) for i in range(40) for ending in endings])
    splits = Dialogues(path=str(path), validation_fraction=0.25).read(None)
    begun = [[d.messages[1].content for d in part] for part in (splits.train, splits.held_out["validation"])]
    assert len(begun[1]) == 20 and set(begun[0]).isdisjoint(begun[1])
    answer = {"role": "assistant", "content": "a"}
    roles = [{"messages": [{"role": role, "content": "q"}, answer]} for role in ("system", "user")]
    assert sorted(map(len, sides(Dialogues, write(tmp_path / "b.jsonl", roles)))) == [1, 1], "roles count"


@pytest.mark.parametrize("cls", [Dialogues, Prompts, Rankings])
def test_one_prompt_cannot_be_split(tmp_path, cls):
    path = write(tmp_path / "a.jsonl", records_of(cls, ["one"]))
    fails("all records have one prompt, so none can be held out; give a validation_path", cls, path)
    train, held_out = sides(cls, path, validation_path=str(write(tmp_path / "b.jsonl", records_of(cls, ["one", "two"]))))
    assert (train, held_out) == (["one"] * 2, ["one"] * 2 + ["two"] * 2)


@pytest.mark.parametrize("cls", [Dialogues, Prompts, Rankings])
def test_a_validation_path_is_all_that_is_held_out(tmp_path, cls):
    path = write(tmp_path / "a.jsonl", records_of(cls, [f"prompt {i}" for i in range(9)]))
    other = write(tmp_path / "b.parquet", list(records_of(cls, ["x", "y"])))
    train, held_out = sides(cls, path, validation_path=str(other))
    assert held_out == ["x", "x", "y", "y"] and train == sorted(f"prompt {i}" for i in range(9) for _ in range(2))
    fails("validation_path=.*c.jsonl matches no file", cls, path, validation_path=str(tmp_path / "c.jsonl"))
    write(other, [{"foo": 1}])
    fails(r"b\.parquet row 1: not of format .*; it has foo", cls, path, validation_path=str(other))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({}, "path is empty"), ({"path": "a.jsonl", "validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"name": "x", "validation_path": "a.jsonl"}, "validation_path=a.jsonl goes with files only"),
    ],
)  # fmt: skip
def test_bad_configs(fields, error):
    for cls in (Dialogues, Prompts, Rankings):
        with pytest.raises(UserError, match=error):
            config.validate(cls(**fields))


# ---- mixtures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixture", "error"),
    [
        (Mixture({}), "a mixture of no sources"),
        (Mixture({"a": Dialogues(path="a"), "b": Text(path="b")}), "a mixture of dialogues and documents; mix"),
        (Mixture({"a": Dialogues(path="a")}, {"b": 1.0}), "weights: 'b' is no source; there is a"),
        (Mixture({"a": Dialogues(path="a")}, {"a": 0.0}), "weights.a=0.0 must be positive"),
        (Mixture({"a": Dialogues(path="a")}, {"a": -1.0}), "weights.a=-1.0 must be positive"),
        (Mixture({"a": Dialogues(path="a")}, {"a": math.inf}), "weights.a=inf must be positive"),
        (Mixture({"a": Dialogues(path="a")}, {"a": math.nan}), "weights.a=nan must be positive"),
        (Mixture({"a": Dialogues(path="")}), "a: path is empty"),
        (Mixture({"a": "a.jsonl"}), "sources=.*: expected dict"),
    ],
)
def test_bad_mixtures(mixture, error):
    with pytest.raises(UserError, match=error) as caught:
        config.validate(mixture)
    assert "\n" not in str(caught.value)


def test_a_mixture_is_of_the_kind_of_its_sources():
    for cls in (Dialogues, Prompts, Rankings):
        one, other = cls(path="a"), cls(path="b")
        mixture = Mixture({"one": one, "other": other}, {"one": 0.5})
        config.validate(mixture)
        assert mixture.kind is cls.kind and mixture.parts() == {"one": (one, 0.5), "other": (other, 1.0)}


# ---- real files --------------------------------------------------------------------------------------------------


REAL = {
    "gsm8k/train.jsonl.gz": (Prompts, "prompt", 7473),
    "instructions/dolly_hhrlhf_small.jsonl": (Dialogues, "prompt/completion", 1000),
    "hh_harmless/train.jsonl.gz": (Rankings, "chosen/rejected", None),
    "qa_feedback_k4/train.jsonl.gz": (Rankings, "ranks", None),
    "sgd_dialogues/dev.jsonl.gz": (Dialogues, "messages", 2098),
    "self_instruct/p3_sample.jsonl.gz": (Dialogues, "prompt/completion", 4654),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    root = os.environ.get("LLMJAX_TEST_DATA", "/nonexistent")
    if not pathlib.Path(root, name).is_file():
        pytest.skip(f"set LLMJAX_TEST_DATA to a folder with {name}")
    cls, known, count = REAL[name]
    splits = cls(path=f"{root}/{name}").read(None)
    train, held_out = list(splits.train), list(splits.held_out["validation"])
    assert f"format {known}" in splits.note and 0.05 < len(held_out) / (len(train) + len(held_out)) <= 0.1
    assert count is None or len(train) + len(held_out) == count
