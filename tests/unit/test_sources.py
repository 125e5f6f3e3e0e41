"""llmjax.data.sources: every kind of file, the splits, and one line for every mistake."""

import gzip
import json
import os
import pathlib

import numpy as np
import pytest

from llmjax import config
from llmjax.data.sources import Corpus, CorpusConfig, TextView, open_corpus
from llmjax.errors import UserError


def read(path, **fields):
    return open_corpus(CorpusConfig(path=str(path), **fields), "unused")


def fails(path, match, **fields):
    with pytest.raises(UserError, match=match) as caught:
        read(path, **fields)
    assert "\n" not in str(caught.value)


def write_jsonl(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_parquet(path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)


# ---- config ------------------------------------------------------------------------------------------------------


def test_source_follows_from_what_is_given():
    assert CorpusConfig().source == "world"
    assert CorpusConfig(path="a.txt").source == "files"
    assert CorpusConfig(name="pg19").source == "tfds"
    assert CorpusConfig(name="pg19", path="folder").source == "tfds"
    assert CorpusConfig(kind="tfds", path="folder").source == "tfds"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"num_documents": 0}, "num_documents=0"),
        ({"kind": "files"}, "path is empty"),
        ({"kind": "files", "path": "a.txt", "name": "pg19"}, "name=pg19"),
        ({"kind": "tfds"}, "name is empty"),
        ({"validation_path": "a.txt"}, "validation_path=a.txt"),
        ({"path": "a.txt", "text_key": ""}, "text_key is empty"),
        ({"path": "a.txt", "document_separator": "words"}, "document_separator='words'"),
    ],
)
def test_bad_configs(fields, error):
    with pytest.raises(UserError, match=error):
        config.validate(CorpusConfig(**fields))


# ---- plain text --------------------------------------------------------------------------------------------------


def test_text_is_split_at_a_character_and_loses_nothing(tmp_path):
    text = "\n".join(f"line {i} é" for i in range(100)) + "\r\n end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    corpus = read(tmp_path / "a.txt")
    assert corpus.train + corpus.validation == [text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]]
    gz = tmp_path / "b.txt.gz"
    gz.write_bytes(gzip.compress(text.encode()))
    assert read(gz) == corpus


def test_several_text_files_are_one_stretch_in_order_of_name(tmp_path):
    for name, text in (("c", "C" * 30), ("a", "A" * 50), ("b", "B" * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = read(tmp_path / "*.txt", validation_fraction=0.4)
    assert corpus == Corpus(["A" * 50, "B" * 10], ["B" * 10, "C" * 30])
    both = f"{tmp_path / 'a.txt'}, {tmp_path / 'c*'},{tmp_path / 'a*'}"
    assert read(both, validation_fraction=0.5) == Corpus(["A" * 40], ["A" * 10, "C" * 30])


def test_lines_and_blank_lines_are_never_cut(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\ntwo\n  \nthree\u2028x\n\nfour\n", encoding="utf-8", newline="")
    corpus = read(tmp_path / "a.txt", document_separator="lines", validation_fraction=0.3)
    assert corpus == Corpus(["one", "two", "three\u2028x"], ["four"])
    (tmp_path / "b.txt").write_text("one\nmore\n\n\ntwo\n \t\nthree\n")
    corpus = read(tmp_path / "b.txt", document_separator="blank_lines", validation_fraction=0.01)
    assert corpus == Corpus(["one\nmore", "two"], ["three"])


def test_validation_path_holds_nothing_out_of_path(tmp_path):
    (tmp_path / "a.txt").write_text("train text")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "held out"}])
    corpus = read(tmp_path / "a.txt", validation_path=str(tmp_path / "b.jsonl"))
    assert corpus == Corpus(["train text"], ["held out"])


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    fails(tmp_path / "a.txt", r"a\.txt: not UTF-8 \(byte 3\)")
    (tmp_path / "b.txt.gz").write_bytes(b"plain")
    fails(tmp_path / "b.txt.gz", r"b\.txt\.gz: not a whole gzip file")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(os.urandom(9000))[:-100])
    fails(tmp_path / "c.txt.gz", r"c\.txt\.gz: not a whole gzip file")
    (tmp_path / "d.txt").write_text(" \n")
    fails(tmp_path / "d.txt", "the corpus is empty")
    (tmp_path / "e.csv").write_text("a,b")
    fails(tmp_path / "e.csv", r"e\.csv: unknown suffix; files are read as \.txt, \.jsonl")
    (tmp_path / "f.txt").write_text("one line\n")
    fails(tmp_path / "f.txt", "no validation text", document_separator="lines")


def test_globs_that_match_nothing(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    fails(tmp_path / "corpsu.txt", r"path=.*corpsu\.txt matches no file; did you mean 'corpus\.txt'")
    fails(tmp_path / "no" / "*.txt", "matches no file; there is no folder")
    fails(tmp_path, r"is a folder; name its files")
    fails(tmp_path / "corpus.txt", "validation_path=nothing matches no file", validation_path="nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    fails(tmp_path / "a.txt", r"a\.txt: cannot be read \(Permission denied\)")


# ---- jsonl and parquet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_records_are_split_by_document(tmp_path, name):
    texts = [f"document {i} é" for i in range(25)]
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {"id": list(range(25)), "body": texts})
    else:
        write_jsonl(tmp_path / name, [{"id": i, "body": text} for i, text in enumerate(texts)])
    corpus = read(tmp_path / name, text_key="body", validation_fraction=0.2)
    assert corpus.validation == texts[4::5]
    assert sorted(corpus.train + corpus.validation) == sorted(texts)
    assert len(read(tmp_path / name, text_key="body", validation_fraction=0.001).validation) == 1


def test_blank_lines_and_empty_texts_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": " "}\n{"text": "b"}\n')
    assert read(tmp_path / "a.jsonl") == Corpus(["a"], ["b"])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"text": "b"', r"a\.jsonl:2: not JSON \(.*\); mend"),
        (b"[1]", r"a\.jsonl:2: a list, not an object"),
        (b'{"txt": "b", "id": 1}', r"a\.jsonl:2: no field 'text'; did you mean 'txt'\? \(it has txt, id\)"),
        (b'{"q": 1}', r"a\.jsonl:2: no field 'text'; it has q; set text_key"),
        (b'{"text": 3}', r"a\.jsonl:2: 'text' is a int, not text"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 10 of the line\)"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: 'text' has a lone surrogate"),
        (b"[" * 100_000, r"a\.jsonl:2: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, error):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    fails(tmp_path / "a.jsonl", error)


def test_bad_record_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    fails(tmp_path / "a.jsonl.gz", r"a\.jsonl\.gz: not a whole gzip file")
    (tmp_path / "b.jsonl").write_text("")
    fails(tmp_path / "b.jsonl", "the corpus is empty")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "only"}])
    fails(tmp_path / "c.jsonl", "one document cannot be split")


def test_bad_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"txt": ["a"], "id": [1]})
    fails(tmp_path / "a.parquet", r"a\.parquet: no column 'text'; did you mean 'txt'")
    fails(tmp_path / "a.parquet", r"a\.parquet row 1: 'id' is a int", text_key="id")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    fails(tmp_path / "b.parquet", r"b\.parquet: not a whole parquet file")


def test_text_and_records_together(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, {"text": "y"}])
    assert read(tmp_path / "*") == Corpus(["012345678", "x"], ["9", "y"])


# ---- world and TFDS ----------------------------------------------------------------------------------------------


def test_world(tmp_path):
    pytest.importorskip("llmjax.data.builder")
    corpus = open_corpus(CorpusConfig(num_documents=30, num_dialogues=5), tmp_path)
    assert len(corpus.train) == 30 and len(corpus.validation) > 0
    assert all(isinstance(text, str) and text for text in corpus.train)
    assert not set(corpus.train) & set(corpus.validation)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A small prepared data set with one split."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class LlmjaxTestText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"story": tfds.features.Text(), "id": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"story": f"story {i} é", "id": i}) for i in range(20))

    folder = tmp_path_factory.mktemp("tfds")
    LlmjaxTestText(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds_by_name_and_by_folder(tfds_folder):
    by_name = read(tfds_folder, name="llmjax_test_text", text_key="story", validation_fraction=0.2)
    assert (len(by_name.train), len(by_name.validation)) == (16, 4)
    assert sorted([*by_name.train, *by_name.validation]) == sorted(f"story {i} é" for i in range(20))
    assert list(by_name.train[2:4]) == [by_name.train[2], by_name.train[3]]
    by_folder = read(tfds_folder / "llmjax_test_text" / "1.0.0", kind="tfds", text_key="story", validation_fraction=0.2)
    assert list(by_folder.train) == list(by_name.train)


def test_tfds_mistakes(tfds_folder):
    fails(tfds_folder, "name=llmjax_test_text: no feature 'text'; it has", name="llmjax_test_text")
    fails(tfds_folder, "name=tinyshakespeare: TFDS has no such data set.*did you mean 'tiny_shakespeare'",
          name="tinyshakespeare")
    fails(tfds_folder, "name=a b/c: cannot be prepared", name="a b/c")
    fails(tfds_folder, "name=huggingface:a/b: Hugging Face data sets are not read by name", name="huggingface:a/b")
    fails(tfds_folder / "nothing", "path=.*nothing: cannot be prepared", kind="tfds")


def test_tfds_that_needs_a_missing_package(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    def needs_tensorflow(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds, "builder", needs_tensorflow)
    fails(tfds_folder, "name=lm1b: TFDS needs the package tensorflow for it, which is not installed", name="lm1b")


def test_text_view_names_a_bad_record():
    view = TextView([{"t": b"ok"}, {"t": b"\xff"}, {"t": "str"}], "t", where="name=x train")
    assert (view[0], view[-1], len(view)) == ("ok", "str", 3)
    with pytest.raises(UserError, match=r"name=x train 1: not UTF-8 \(byte 0\)"):
        list(view)


def test_real_files():
    root = os.environ.get("LLMJAX_TEST_DATA")
    if not root or not pathlib.Path(root, "tinyshakespeare", "input.txt").is_file():
        pytest.skip("set LLMJAX_TEST_DATA to a folder with tinyshakespeare and tinystories_lc")
    shakespeare = read(f"{root}/tinyshakespeare/input.txt")
    assert [len(text) for text in shakespeare.train + shakespeare.validation] == [1_003_854, 111_540]
    stories = read(f"{root}/tinystories_lc/train.txt.gz", document_separator="lines",
                   validation_path=f"{root}/tinystories_lc/val.txt")
    assert len(stories.train) > 3_000 and len(stories.validation) > 100
