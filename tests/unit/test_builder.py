"""The world on disk: complete or absent, quiet, and read back as it was made."""

import dataclasses
import os
import subprocess
import sys

import pytest

from llmjax import config
from llmjax.data.records import Dialogue, Message, Prompt, user
from llmjax.errors import UserError
from llmjax.tasks.world import builder
from llmjax.tasks.world.builder import WorldRecords, prepare_world
from llmjax.tasks.world.data import WorldDialogues, WorldPrompts, WorldText
from llmjax.tasks.world.dialogues import demonstrations, questions
from llmjax.tasks.world.documents import documents, make_world
from llmjax.tasks.world.judge import question_of

SEED, DOCUMENTS, DIALOGUES = 1, 60, 40
SIZES = {"documents": DOCUMENTS, "dialogues": DIALOGUES, "questions": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


def opened(folder, kind, split, **options):
    return WorldRecords(folder, kind, split, **{"seed": SEED, "size": SIZES[kind]} | options)


def as_dialogue(demonstration):
    return Dialogue(tuple(Message(m["role"], m["content"]) for m in demonstration.messages))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_read_is_what_was_made(folder, split):
    world, held_out = make_world(SEED), split == "validation"
    made = documents(world, 20 if held_out else DOCUMENTS, int(held_out), split)
    assert sorted(opened(folder, "documents", split)) == sorted(made)
    asked = list(opened(folder, "questions", split))
    assert all(isinstance(prompt, Prompt) for prompt in asked)
    by_id = {question.id: question for question in questions(world, split)}
    assert len(asked) == len(by_id)
    for prompt in asked:
        question = by_id[prompt.id]
        assert prompt.messages == user(question.text)
        assert {"kind", "subject", "answers", "group"} <= set(prompt.fields)
        assert question_of(prompt) == question
    spoken = list(opened(folder, "dialogues", split))
    made = map(as_dialogue, demonstrations(world, split, 20 if held_out else DIALOGUES, 0))
    assert sorted(map(str, spoken)) == sorted(map(str, made))


def test_sizes_are_known_before_anything_is_built(tmp_path):
    sizes = {(k, s): len(opened(tmp_path, k, s)) for k in builder.KINDS for s in builder.SPLITS}
    assert list(tmp_path.iterdir()) == []
    assert {key: len(list(opened(tmp_path, *key))) for key in sizes} == sizes
    assert sizes["documents", "train"] == DOCUMENTS and sizes["dialogues", "train"] == DIALOGUES
    assert sizes["documents", "validation"] == sizes["dialogues", "validation"] == 20
    assert len(opened(tmp_path, "documents", "validation", size=4000)) == 200
    assert len(opened(tmp_path, "dialogues", "validation", size=4000)) == 400


def test_random_access(folder):
    source = opened(folder, "documents", "train")
    texts = list(source)
    assert len(source) == len(texts) == 60 and all(isinstance(text, str) for text in texts)
    assert source[7] == texts[7] and source[-1] == texts[-1] and source[3:5] == texts[3:5]
    assert source.__getitems__([5, 2]) == [texts[5], texts[2]]
    assert list(source) == texts
    for index in (60, -61):
        with pytest.raises(IndexError):
            source[index]


def test_preparing_again_changes_nothing_and_other_sizes_build_beside(tmp_path):
    one = prepare_world(tmp_path, "documents", seed=SEED, size=60)
    before = os.stat(one).st_mtime_ns
    assert prepare_world(tmp_path, "documents", seed=SEED, size=60) == one
    assert os.stat(one).st_mtime_ns == before
    others = [
        prepare_world(tmp_path, "documents", seed=SEED, size=61),
        prepare_world(tmp_path, "documents", seed=SEED + 1, size=60),
        prepare_world(tmp_path, "dialogues", seed=SEED, size=60),
    ]
    assert len({one, *others}) == len(list(tmp_path.iterdir())) == 4
    assert len(list(opened(tmp_path, "documents", "train", size=61))) == 61
    assert len(list(opened(tmp_path, "documents", "train"))) == 60
    assert set(opened(tmp_path, "documents", "train", seed=2)) != set(opened(tmp_path, "documents", "train"))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "demonstrations", fail)
        with pytest.raises(RuntimeError, match="cut off"):
            prepare_world(tmp_path, "dialogues", seed=SEED, size=30)
    assert list(tmp_path.iterdir()) == []
    prepare_world(tmp_path, "dialogues", seed=SEED, size=30)
    assert len(list(tmp_path.iterdir())) == 1


def test_mistakes_are_one_line(tmp_path):
    cases = [
        ("num_documents=0", lambda: prepare_world(tmp_path, "documents", seed=0, size=0)),
        ("num_dialogues=-1", lambda: prepare_world(tmp_path, "dialogues", seed=0, size=-1)),
        ("kind='texts'", lambda: WorldRecords(tmp_path, "texts", "train", seed=0)),
        ("split='test'", lambda: opened(tmp_path, "documents", "test")),
    ]
    (tmp_path / "file").write_text("")
    cases.append(("cannot be written", lambda: prepare_world(tmp_path / "file", "questions", seed=0)))
    for message, call in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_quiet_and_light(tmp_path):
    """A fresh process builds and reads the world without a word, TensorFlow, torch or jax."""
    code = (
        "import sys\n"
        "from llmjax.tasks.world.builder import WorldRecords\n"
        f"WorldRecords({str(tmp_path)!r}, 'documents', 'train', seed=0, size=30)[0]\n"
        f"WorldRecords({str(tmp_path)!r}, 'questions', 'train', seed=0)[0]\n"
        "sys.exit(len({'tensorflow', 'torch', 'jax'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- as data -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """The `Place` of a run."""

    folder: str
    seed: int = 7

    def data_path(self, *parts):
        return os.path.join(self.folder, *parts)


@pytest.mark.parametrize(
    ("data", "kind", "sizes"),
    [
        (WorldText(num_documents=60, seed=SEED), str, (60, 20)),
        (WorldDialogues(num_dialogues=40, seed=SEED), Dialogue, (40, 20)),
        (WorldPrompts(seed=SEED), Prompt, tuple(len(questions(make_world(SEED), s)) for s in ("train", "validation"))),
    ],
)
def test_the_world_as_data(tmp_path, data, kind, sizes):
    config.validate(data)
    splits = data.read(Run(str(tmp_path)))
    assert data.kind is kind and list(splits.held_out) == ["validation"]
    train, held_out = list(splits.train), list(splits.held_out["validation"])
    assert (len(train), len(held_out)) == sizes and f"{sizes[0]:,}" in splits.note
    assert all(isinstance(record, kind) for record in train + held_out)
    assert list(splits.train) == train
    assert set(map(str, train)).isdisjoint(map(str, held_out))
    assert os.listdir(tmp_path) == ["world"], "what it keeps lies below the run's data"


def test_kinds_of_questions(tmp_path):
    splits = WorldPrompts(kinds=("sum", "difference"), seed=SEED).read(Run(str(tmp_path)))
    for split, prompts in (("train", splits.train), ("validation", splits.held_out["validation"])):
        wanted = {q.id for q in questions(make_world(SEED), split) if q.kind in ("sum", "difference")}
        assert {prompt.id for prompt in prompts} == wanted and len(wanted) > 10


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (WorldText(num_documents=0), "num_documents=0"),
        (WorldDialogues(num_dialogues=0), "num_dialogues=0"),
        (WorldPrompts(kinds=("sum", "product")), "'product' is no kind of question; there is person,"),
    ],
)
def test_bad_configs(data, error):
    with pytest.raises(UserError, match=error):
        config.validate(data)
