"""The world on disk: complete or absent, quiet, and read back as it was made."""

import os
import subprocess
import sys

import pytest

from llmjax.data import builder
from llmjax.data.builder import open_world, prepare_world
from llmjax.data.dialogues import Question, demonstrations, questions
from llmjax.data.world import documents, make_world
from llmjax.errors import UserError

SMALL = dict(seed=1, num_documents=60, num_dialogues=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_world(tmp_path_factory.mktemp("world"), **SMALL)


def test_what_is_read_is_what_was_made(folder):
    world = make_world(1)
    assert sorted(open_world(folder, "documents", "train")) == sorted(documents(world, 60, 0))
    asked = open_world(folder, "questions", "validation")
    assert isinstance(asked[0], Question)
    assert sorted(asked, key=lambda q: q.id) == sorted(questions(world, "validation"), key=lambda q: q.id)
    read = [str(example["messages"]) for example in open_world(folder, "dialogues", "train")]
    assert sorted(read) == sorted(str(list(d.messages)) for d in demonstrations(world, "train", 40, 0))
    assert (
        len(open_world(folder, "documents", "validation")) == len(open_world(folder, "dialogues", "validation")) == 20
    )


def test_random_access(folder):
    source = open_world(folder, "documents", "train")
    texts = list(source)
    assert len(source) == len(texts) == 60 and all(isinstance(text, str) for text in texts)
    assert source[7] == texts[7] and source[-1] == texts[-1] and source[3:5] == texts[3:5]
    assert source.__getitems__([5, 2]) == [texts[5], texts[2]]
    with pytest.raises(IndexError):
        source[60]


def test_preparing_again_changes_nothing_and_other_sizes_build_beside(folder):
    root = os.path.dirname(folder)
    before = os.stat(folder).st_mtime_ns
    assert prepare_world(root, **SMALL) == folder
    assert os.stat(folder).st_mtime_ns == before
    assert open_world(root, "questions", "train")[0] == open_world(folder, "questions", "train")[0]
    other = prepare_world(root, **SMALL | {"num_documents": 61})
    assert other != folder and len(open_world(other, "documents", "train")) == 61
    assert len(open_world(folder, "documents", "train")) == 60
    with pytest.raises(UserError, match="holds 2 worlds"):
        open_world(root, "questions", "train")


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(builder, "demonstrations", fail)
        with pytest.raises(RuntimeError, match="cut off"):
            prepare_world(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []
    prepare_world(tmp_path, **SMALL)
    assert len(list(tmp_path.iterdir())) == 1


def test_mistakes_are_one_line(tmp_path, folder):
    cases = [
        ("num_documents=0", lambda: prepare_world(tmp_path, seed=0, num_documents=0, num_dialogues=1)),
        ("no world", lambda: open_world(tmp_path, "documents", "train")),
        ("kind='texts'", lambda: open_world(folder, "texts", "train")),
        ("split='test'", lambda: open_world(folder, "documents", "test")),
    ]
    (tmp_path / "file").write_text("")
    cases.append(("cannot be written", lambda: prepare_world(tmp_path / "file", **SMALL)))
    for message, call in cases:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_quiet_and_light(tmp_path):
    """A fresh process builds and reads the world without a word, TensorFlow, torch or jax."""
    code = (
        "import sys\n"
        "from llmjax.data.builder import open_world, prepare_world\n"
        f"prepare_world({str(tmp_path)!r}, seed=0, num_documents=30, num_dialogues=20)\n"
        f"open_world({str(tmp_path)!r}, 'documents', 'train')[0]\n"
        "sys.exit(len({'tensorflow', 'torch', 'jax'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
