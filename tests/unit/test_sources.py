"""llmjax.data.sources: every kind of file, the splits, and one line for every mistake."""

import gzip
import json
import os
import pathlib
import random
import shutil

import numpy as np
import pytest

from llmjax import config
from llmjax.data import reading, sources
from llmjax.data.base import First, Mixture
from llmjax.data.packing import StreamRows
from llmjax.data.reading import TFDSRecords
from llmjax.data.shards import write_shards
from llmjax.data.sources import Piece, Text
from llmjax.data.tokenizer import Controls, Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_tokenizer import read_tokenizer
from llmjax.stages import datasets
from llmjax.stages.datasets import encode_text


def splits_of(path, **fields):
    return Text(path=str(path), **fields).read(None)


def read(path, **fields):
    """The documents of the two parts."""
    splits = splits_of(path, **fields)
    assert list(splits.held_out) == ["validation"]
    train, validation = (joined(part) for part in (splits.train, splits.held_out["validation"]))
    assert (joined(splits.train), joined(splits.held_out["validation"])) == (train, validation), "read as often as one likes"
    return train, validation


def joined(texts):
    """Whole documents of texts, of which long ones come in pieces."""
    documents, goes_on = [], False
    for text in texts:
        documents = [*documents[:-1], documents[-1] + text] if goes_on else [*documents, str(text)]
        goes_on = isinstance(text, Piece)
    assert not goes_on, "the last document has an end"
    return documents


def fails(path, match, **fields):
    with pytest.raises(UserError, match=match) as caught:
        splits_of(path, **fields)
    assert "\n" not in str(caught.value)


def write_jsonl(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_parquet(path, columns):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)


# ---- config ------------------------------------------------------------------------------------------------------


def test_what_is_read_follows_from_what_is_given(tmp_path):
    assert not Text(path="a.txt").is_tfds
    assert Text(name="pg19").is_tfds and Text(name="pg19", path="folder").is_tfds
    assert not Text(path=str(tmp_path)).is_tfds
    (tmp_path / "dataset_info.json").write_text("{}")
    assert Text(path=str(tmp_path)).is_tfds


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"path": "a.txt", "validation_fraction": 0.0}, "validation_fraction=0.0"),
        ({"path": "a.txt", "validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({}, "path is empty; give the path of your files, a glob, or the name of a TFDS data set"),
        ({"name": "pg19", "validation_path": "a.txt"}, "validation_path=a.txt goes with files only"),
        ({"name": "pg19", "skip_bad": True}, "skip_bad goes with files only"),
        ({"path": "a.txt", "text_key": ""}, "text_key is empty"),
        ({"path": "a.txt", "document_separator": "words"}, "document_separator='words'"),
    ],
)
def test_bad_configs(fields, error):
    with pytest.raises(UserError, match=error):
        config.validate(Text(**fields))
    config.validate(Text(path="a.txt"))
    config.validate(Text(name="pg19", path="folder"))


# ---- plain text --------------------------------------------------------------------------------------------------


def test_text_is_split_at_a_character_and_loses_nothing(tmp_path):
    text = "\n".join(f"line {i} é" for i in range(100)) + "\r\n end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    parts = read(tmp_path / "a.txt")
    assert parts == ([text[: int(len(text) * 0.9)]], [text[int(len(text) * 0.9) :]])
    gz = tmp_path / "b.txt.gz"
    gz.write_bytes(gzip.compress(text.encode()))
    assert read(gz) == parts


def test_several_text_files_are_one_stretch_in_order_of_name(tmp_path):
    for name, text in (("c", "C" * 30), ("a", "A" * 50), ("b", "B" * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
    assert read(tmp_path / "*.txt", validation_fraction=0.4) == (["A" * 50, "B" * 10], ["B" * 10, "C" * 30])
    both = f"{tmp_path / 'a.txt'}, {tmp_path / 'c*'},{tmp_path / 'a*'}"
    assert read(both, validation_fraction=0.5) == (["A" * 40], ["A" * 10, "C" * 30])


def test_lines_and_blank_lines_are_never_cut(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\r\n\ntwo\n  \nthree\u2028x\n\nfour\n", encoding="utf-8", newline="")
    parts = read(tmp_path / "a.txt", document_separator="lines", validation_fraction=0.3)
    assert parts == (["one", "two", "three\u2028x"], ["four"])
    (tmp_path / "b.txt").write_text("one\nmore\n\n\ntwo\n \t\nthree\n")
    parts = read(tmp_path / "b.txt", document_separator="blank_lines", validation_fraction=0.01)
    assert parts == (["one\nmore", "two"], ["three"])


def test_validation_path_holds_nothing_out_of_path(tmp_path):
    (tmp_path / "a.txt").write_text("train text")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "held out"}])
    assert read(tmp_path / "a.txt", validation_path=str(tmp_path / "b.jsonl")) == (["train text"], ["held out"])
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    for paths in (("a.txt", "c.jsonl"), ("c.jsonl", "a.txt")):  # both are looked through before anything is learnt
        fails(tmp_path / paths[0], r"c\.jsonl:2: no field 'text'", validation_path=str(tmp_path / paths[1]))
    (tmp_path / "d.jsonl").write_text('{"text": " "}\n')
    fails(tmp_path / "a.txt", "no validation text", validation_path=str(tmp_path / "d.jsonl"))


def test_bad_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    fails(tmp_path / "a.txt", r"a\.txt: not UTF-8 \(byte 3\)")
    (tmp_path / "b.txt.gz").write_bytes(b"plain")
    fails(tmp_path / "b.txt.gz", r"b\.txt\.gz: not a whole gzip file")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(os.urandom(9000).hex().encode())[:-100])
    fails(tmp_path / "c.txt.gz", r"c\.txt\.gz: not a whole gzip file")
    (tmp_path / "d.txt").write_text(" \n")
    fails(tmp_path / "d.txt", "the corpus is empty")
    (tmp_path / "e.doc").write_text("a,b")
    fails(tmp_path / "e.doc", r"e\.doc: unknown suffix; files are read as \.txt, \.md, \.jsonl, ")
    (tmp_path / "f.txt").write_text("one line\n")
    fails(tmp_path / "f.txt", "the corpus has no (train|validation) text; give more text", document_separator="lines")


def test_where_a_file_is_not_utf8_in_blocks(tmp_path, monkeypatch):
    """A character of several bytes may lie across the edge of a block; the place of a bad byte is that in the file."""
    monkeypatch.setattr(reading, "_BLOCK", 5)
    text = "\ufeff" + "añ東😀\r\n" * 30
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(reading.text_blocks(str(tmp_path / "a.txt"))) == text[1:]
    (tmp_path / "b.txt").write_bytes(text.encode() + b"abc\xe6\x9dx")
    fails(tmp_path / "b.txt", rf"b\.txt: not UTF-8 \(byte {len(text.encode()) + 3}\)")
    (tmp_path / "c.txt").write_bytes(text.encode()[:-3])
    fails(tmp_path / "c.txt", rf"c\.txt: not UTF-8 \(byte {len(text.encode()) - 6}\)")


def test_globs_that_match_nothing(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    fails(tmp_path / "corpsu.txt", r"path=.*corpsu\.txt matches no file; did you mean 'corpus\.txt'")
    fails(tmp_path / "no" / "*.txt", "matches no file; there is no folder")
    fails(tmp_path, r"is a folder; name its files")
    fails(tmp_path / "corpus.txt", "validation_path=nothing matches no file", validation_path="nothing")


def test_a_comma_may_be_part_of_a_name(tmp_path):
    for name, letter in (("a, b.txt", "A"), ("c.txt", "C"), ("d,e,f.txt", "D"), ("x[1].txt", "X"), ("y,.txt", "Y")):
        (tmp_path / name).write_text(letter * 10)
    whole = {"validation_path": str(tmp_path / "c.txt")}

    def found(pattern):
        return [text[0] for text in read(pattern, **whole)[0]]

    assert found(tmp_path / "a, b.txt") == ["A"]
    assert found(f"{tmp_path / 'c.txt'},{tmp_path / 'd,e,f.txt'}, {tmp_path / 'a, b.txt'},") == ["A", "C", "D"]
    assert found(tmp_path / "?,?,?.txt") == ["D"] and found(tmp_path / "y,*.txt") == ["Y"]
    assert found(tmp_path / "x[1].txt") == ["X"]
    fails(f"{tmp_path / 'c.txt'},{tmp_path / 'g,h.txt'}", r"path=.*/g matches no file; ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    fails(tmp_path / "a.txt", r"a\.txt: cannot be read \(Permission denied\)")


# ---- long documents ----------------------------------------------------------------------------------------------


LINES = [
    "the cat sat on the mat", "a man, a plan: 1 + 22 = 23", "naïve café 東京 😀", "  two  spaces and\ttabs ",
    "didn't they? It's 1999!",
]  # fmt: skip
SPACED = " and so on ".join(LINES * 8)


@pytest.fixture(name="pieces")
def short_pieces(monkeypatch):
    """Documents of more than 80 characters come in pieces, and files are read 64 bytes at a time."""
    monkeypatch.setattr(sources, "PIECE", 40)
    monkeypatch.setattr(reading, "_BLOCK", 64)


@pytest.fixture(scope="module", name="tokenizer")
def make_tokenizer():
    return Tokenizer.train(LINES * 20, TokenizerConfig(vocab_size=350))


TEXTS = {
    "spaced": SPACED, "lines": "\n".join(LINES * 8), "no letters": " 12 34" * 100, "no spaces": "abcdefgh" * 99,
    "newlines only": "x" + "ab1\n" * 99 + "c", "crlf": "\r\n".join(LINES * 8), "short": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("separator", ["file", "lines", "blank_lines"])
def test_long_documents_come_in_pieces_that_are_the_text(tmp_path, pieces, name, separator):
    text = TEXTS[name]
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_text("held out")
    parts = splits_of(tmp_path / "a.txt", document_separator=separator, validation_path=str(tmp_path / "b.txt"))
    found = list(parts.train)
    assert max(map(len, found)) <= 2 * 40
    want = [line.removesuffix("\r") for line in text.split("\n")] if separator == "lines" else [text]
    assert joined(found) == want


def test_documents_of_many_pieces_stay_apart(tmp_path, pieces):
    long = "".join(random.Random(0).choices("abc d\n1", k=900))
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name + long)
    train, validation = read(tmp_path / "*.txt", validation_fraction=0.2)
    cut = int(3 * 901 * 0.8)
    assert train == ["a" + long, "b" + long, ("c" + long)[: cut - 2 * 901]]
    assert validation == [("c" + long)[cut - 2 * 901 :]]
    for fraction in (0.001, 0.1, 1 / 3, 0.5, 0.77, 0.99):  # wherever the cut lies to the edges of pieces
        train, validation = read(tmp_path / "*.txt", validation_fraction=fraction)
        assert "".join(train + validation) == f"a{long}b{long}c{long}"
        assert sum(map(len, train)) == int(3 * 901 * (1 - fraction))


@pytest.mark.parametrize("separator", ["lines", "blank_lines"])
def test_a_long_document_is_not_cut_where_documents_are_whole(tmp_path, pieces, separator):
    """The last document is held out even if it is most of the text."""
    short, long = "one two three", SPACED.replace("\t", " ")
    for first, second in ((short, long), (long, short), (long, long)):
        (tmp_path / "a.txt").write_text(f"{first}\n\n{second}\n")
        assert read(tmp_path / "a.txt", document_separator=separator, validation_fraction=0.1) == ([first], [second])


def tokens_of(blocks):
    return np.concatenate([block.tokens for block in blocks]).tolist()


@pytest.mark.parametrize("name", ["spaced", "lines", "crlf"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_long_document_has_the_tokens_of_the_whole_text(tmp_path, pieces, tokenizer, name, suffix):
    text = TEXTS[name]
    if suffix == "txt":
        (tmp_path / "a.txt").write_bytes(text.encode())
    else:
        write_jsonl(tmp_path / "a.jsonl", [{"text": text}])
    (tmp_path / "b.txt").write_text("held out")
    documents = list(splits_of(tmp_path / f"a.{suffix}", validation_path=str(tmp_path / "b.txt")).train)
    assert len(documents) > 5 or suffix == "jsonl"
    blocks = list(encode_text(tokenizer, documents))
    assert tokens_of(blocks) == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert sum(block.counts["documents"] for block in blocks) == 1
    assert sum(block.counts["bytes"] for block in blocks) == len(text.encode())
    assert sum(block.consumed for block in blocks) == len(documents)


@pytest.mark.parametrize("size", [500, 300_000])
def test_text_without_spaces_neither_stalls_nor_is_lost(tmp_path, tokenizer, monkeypatch, size):
    monkeypatch.setattr(sources, "PIECE", 40 if size == 500 else 2**16)
    text = "".join(random.Random(0).choices("thecatsonm", k=size))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("held out")
    documents = splits_of(tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt")).train
    found = tokens_of(encode_text(tokenizer, documents))
    assert found[0] == tokenizer.bos_id and tokenizer.decode(found[1:]) == text
    assert found.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("own_end", [False, True])
def test_a_resume_goes_on_within_a_document(pieces, tokenizer, monkeypatch, own_end):
    monkeypatch.setattr(datasets, "ENCODE_CHARS", 100)
    if own_end:
        tokenizer = Tokenizer(tokenizer._serialized, controls=Controls(eos="<|system|>"))
    texts = ["one", SPACED, "", "two", TEXTS["no spaces"], "three"]
    documents = [piece for text in texts for piece in sources.cut_pieces(text)]
    blocks = list(encode_text(tokenizer, documents))
    want = []
    for text in filter(None, texts):
        want += [tokenizer.bos_id, *tokenizer.encode(text), *([tokenizer.eos_id] if own_end else [])]
    if own_end:
        assert tokenizer.eos_id != tokenizer.bos_id
    got = tokens_of(blocks)
    assert [tokenizer.decode(part) for part in split_at(got, tokenizer.bos_id)] == [
        tokenizer.decode(part) for part in split_at(want, tokenizer.bos_id)
    ]
    assert sum(block.counts["documents"] for block in blocks) == 5 and len(blocks) > 10
    skip = 0
    for number, block in enumerate(blocks):
        rest = list(encode_text(tokenizer, documents, skip))
        assert tokens_of(rest) == tokens_of(blocks[number:])
        assert [b.consumed for b in rest] == [b.consumed for b in blocks[number:]]
        skip += block.consumed
    assert list(encode_text(tokenizer, documents, skip)) == []


def test_documents_of_a_folder_whose_bos_and_eos_differ_end_in_eos(tmp_path):
    (tmp_path / "tokenizer.json").write_text(Tokenizer.train([], TokenizerConfig(kind="byte"))._serialized)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|user|>", "eos_token": "<|endoftext|>"}))
    own = read_tokenizer(str(tmp_path))
    shards = write_shards(tmp_path / "shards", lambda skip: encode_text(own, ["ab", "c"], skip), vocab_size=own.vocab_size)
    row = {k: v[0].tolist() for k, v in StreamRows(
        shards, 8, bos_id=own.bos_id, eos_id=own.eos_id, pad_id=own.pad_id)[np.array([0])].items()}  # fmt: skip
    learnt = [token for token, on in zip(row["targets"], row["loss_mask"]) if on]
    assert learnt == [*own.encode("ab"), own.eos_id, *own.encode("c"), own.eos_id] and own.eos_id != own.bos_id


def split_at(ids, token):
    parts = []
    for one in ids:
        parts = [*parts, []] if one == token else [*parts[:-1], [*parts[-1], one]]
    return parts


# ---- jsonl and parquet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_records_are_split_by_document(tmp_path, name):
    texts = [f"document {i} é" for i in range(25)]
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {"id": list(range(25)), "body": texts})
    else:
        write_jsonl(tmp_path / name, [{"id": i, "body": text} for i, text in enumerate(texts)])
    train, validation = read(tmp_path / name, text_key="body", validation_fraction=0.2)
    assert validation == texts[4::5]
    assert sorted(train + validation) == sorted(texts)
    assert len(read(tmp_path / name, text_key="body", validation_fraction=0.001)[1]) == 1


def packed(path, data):
    """Writes bytes, compressed as the name says; .zst in two frames, as parallel compressors leave them."""
    if path.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        data = b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:9], data[9:]))
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


BODIES = [f"document {i} é, \"{i}\"\n{i}" for i in range(25)]
WRITTEN = {
    "jsonl": "".join(json.dumps({"body": text}) + "\n" for text in BODIES),
    "json": json.dumps([{"id": 1, "body": text} for text in BODIES], indent=2),
    "lines.json": "".join(json.dumps({"body": text}) + "\n" for text in BODIES),
    "csv": "\ufeffid, body\r\n" + "".join(f'7,"{text.replace(chr(34), chr(34) * 2)}"\r\n' for text in BODIES),
}  # fmt: skip


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_records_of_every_kind_of_file(tmp_path, kind, packing):
    path = tmp_path / f"a.{kind}{packing}"
    packed(path, WRITTEN[kind].encode())
    train, validation = read(path, text_key="body", validation_fraction=0.2)
    assert validation == BODIES[4::5] and sorted(train + validation) == sorted(BODIES)
    whole = path.read_bytes()
    if packing:
        path.write_bytes(whole[:-12])
        fails(path, rf"a\.{kind}\{packing}: not a whole {'gzip' if packing == '.gz' else 'zst'} file", text_key="body")
        path.write_bytes(b"plain text")
        fails(path, rf"a\.{kind}\{packing}: not a whole", text_key="body")


@pytest.mark.parametrize("name", ["a.md", "a.MD", "a.md.gz", "a.txt.zst", "a.md.zst"])
def test_plain_text_of_every_kind_of_file(tmp_path, name):
    packed(tmp_path / name, ("# é\n\n" + "x" * 93).encode())
    assert read(tmp_path / name, validation_fraction=0.5) == (["# é\n\n" + "x" * 44], ["x" * 49])


@pytest.mark.parametrize(("text", "error"), [
    ('[{"text": "a"},\n{"text": }]', r"a\.json:2: not JSON \(Expecting value\); mend the file"),
    ('[{"text": "a"}, 7]', r"a\.json record 2: a int, not an object"),
    ('[{"text": "a"}, {"txt": "b"}]', r"a\.json record 2: no field 'text'; did you mean 'txt'"),
    ('{\n "data": [\n', r"a\.json:1: not JSON \(.*\); write a list of records, or one object a line"),
    ("[" * 100_000, r"a\.json:1: not JSON"), (b'["\xff"]', r"a\.json: not UTF-8 \(byte 2\)"), ("[]", "the corpus is empty"),
])  # fmt: skip
def test_bad_json(tmp_path, text, error):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(tmp_path / "a.json", error)


@pytest.mark.parametrize(("text", "error"), [
    ("id,text\n1,a\n2\n", r"a\.csv:3: 1 values for the 2 columns of the header; mend the row"),
    ("id,text\n1,a\n2,b,c\n", r"a\.csv:3: 3 values for the 2 columns"),
    ('id,text\n1,"a\nb\nc"\n2\n', r"a\.csv:5: 1 values"),
    ('id,text\n1,"a"b\n2,c\n', r"a\.csv:2: not CSV \(.*\); mend the quotes"),
    ('id,text\n1,"a\n2,b\n', r"a\.csv:2: not CSV \(unexpected end of data\)"),
    ("id,text\n1,a\rb\n", r"a\.csv:2: not CSV"), ("id,id\n1,a\n", r"a\.csv:1: the first row must name each .*'id'"),
    ("id,,text\n1,2,a\n", r"a\.csv:1: the first row must name each column once, in UTF-8; '' does not"),
    (b"id,text\n1,\xff\n", r"a\.csv:2: not UTF-8"), (b"id,\xff\n1,a\n", r"a\.csv:1: the first row"),
    ("id,txt\n1,a\n", r"a\.csv:2: no field 'text'; did you mean 'txt'"), ("id,text\n", "the corpus is empty"), ("", "is empty"),
])  # fmt: skip
def test_bad_csv(tmp_path, text, error):
    (tmp_path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(tmp_path / "a.csv", error)


def test_bad_documents_are_skipped_and_told(tmp_path):
    lines = [json.dumps({"text": f"{i}"}) for i in range(40)]
    lines[3], lines[20] = '{"text": 3}', "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    fails(tmp_path / "a.jsonl", r"a\.jsonl:4: 'text' is a int")
    wrong = f"{tmp_path / 'a.jsonl'}:4: 'text' is a int, not text; set text_key or mend it"
    skipped = f"2 bad records skipped, the first is {wrong}"
    splits = splits_of(tmp_path / "a.jsonl", skip_bad=True)
    assert sorted([*splits.train, *splits.held_out["validation"]], key=int) == [f"{i}" for i in range(40) if i not in (3, 20)]
    assert splits.note == skipped and splits_of(tmp_path / "a.jsonl", skip_bad=True, text_key="text").note == skipped
    (tmp_path / "b.csv").write_text("text\n" + "".join(f"{i}\n" for i in range(18)) + '1,2\n"a"b\n')
    assert splits_of(tmp_path / "b.csv", skip_bad=True).note.startswith("2 bad records skipped, the first is ")
    both = splits_of(tmp_path / "a.jsonl", skip_bad=True, validation_path=str(tmp_path / "b.csv"))
    assert both.note.startswith(f"{skipped}; 2 bad records skipped, the first is {tmp_path / 'b.csv'}:20: 2 values")
    (tmp_path / "b.csv").write_text("text\n" + "".join(f"{i}\n" for i in range(17)) + '1,2\n"a"b\n')
    fails(tmp_path / "b.csv", "path=.*: 2 of 19 records are bad, more than the 10% that are skipped; the", skip_bad=True)
    (tmp_path / "c.csv").write_text('text\n' + "x\n" * 20 + '"a\n' + "y\n" * 200)  # nobody knows how much that quote holds
    fails(tmp_path / "c.csv", r"c\.csv:22: not CSV \(unexpected end of data\)", skip_bad=True)


def test_blank_lines_and_empty_texts_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n\n{"text": " "}\n{"text": "b"}\n', encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == (["a"], ["b"])


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
    write_parquet(tmp_path / "a.parquet", {"txt": ["a", "b"], "id": [1, 2]})
    fails(tmp_path / "a.parquet", r"a\.parquet row 1: no field 'text'; did you mean 'txt'\? \(it has txt, id\)")
    fails(tmp_path / "a.parquet", r"a\.parquet row 1: 'id' is a int", text_key="id")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    fails(tmp_path / "b.parquet", r"b\.parquet: not a whole parquet file")
    write_parquet(tmp_path / "c.parquet", {"text": [f"{i} " * 100 for i in range(500)]})
    whole = (tmp_path / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:-200])
    fails(tmp_path / "c.parquet", r"c\.parquet: not a whole parquet file")
    (tmp_path / "c.parquet").write_bytes(whole[:100] + bytes(200) + whole[300:])
    fails(tmp_path / "c.parquet", r"c\.parquet: (not a whole parquet file|cannot be read) \(")
    write_parquet(tmp_path / "d.parquet", {"text": ["a", None, "c"]})
    fails(tmp_path / "d.parquet", r"d\.parquet row 2: 'text' is a NoneType, not text")


def test_text_and_records_together(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, {"text": "y"}])
    assert read(tmp_path / "*") == (["012345678", "x"], ["9", "y"])


# ---- mixtures ----------------------------------------------------------------------------------------------------


def test_a_mixture_has_parts_with_weights(tmp_path):
    one, other = Text(path="a.txt"), Text(path="b.txt")
    mixture = Mixture({"one": one, "other": other}, {"other": 3.0})
    config.validate(mixture)
    assert mixture.kind is str and mixture.parts() == {"one": (one, 1.0), "other": (other, 3.0)}
    assert one.parts() == {"": (one, 1.0)}


def test_the_first_records_of_each_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(40)])
    whole = Text(path=str(tmp_path / "a.jsonl"))
    splits = First(whole, 2).read(None)
    assert list(splits.train) == list(splits.train) == ["0", "1"]
    assert list(splits.held_out["validation"]) == ["9", "19"] and First(whole, 2).kind is str
    assert First(Mixture({"a": whole}, {"a": 2.0}), 2).parts() == {"a": (First(whole, 2), 2.0)}


# ---- TFDS --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A small prepared data set with one split, and one with two."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class LlmjaxTestText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("one", "two")]
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"story": tfds.features.Text(), "id": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            splits = {"train": self._generate_examples("story", 20)}
            return splits | ({"valid": self._generate_examples("other", 5)} if self.builder_config.name == "two" else {})

        def _generate_examples(self, word, count):
            yield from ((i, {"story": f"{word} {i} é", "id": i}) for i in range(count))

    folder = tmp_path_factory.mktemp("tfds")
    for name in ("one", "two"):
        LlmjaxTestText(config=name, data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tfds_by_name_and_by_folder(tfds_folder):
    train, validation = by_name = read(tfds_folder, name="llmjax_test_text/one", text_key="story", validation_fraction=0.2)
    assert (len(train), len(validation)) == (16, 4)
    assert sorted([*train, *validation]) == sorted(f"story {i} é" for i in range(20))
    folder = tfds_folder / "llmjax_test_text" / "one" / "1.0.0"
    assert read(folder, text_key="story", validation_fraction=0.2) == by_name


def test_tfds_with_a_validation_split(tfds_folder):
    train, validation = read(tfds_folder, name="llmjax_test_text/two", text_key="story")
    assert sorted(train) == sorted(f"story {i} é" for i in range(20))
    assert sorted(validation) == sorted(f"other {i} é" for i in range(5))


def test_tfds_mistakes(tfds_folder, tmp_path):
    fails(tfds_folder, "name=llmjax_test_text/one: no field 'text'; it has", name="llmjax_test_text/one")
    near = "name=tinyshakespeare: TFDS has no such data set.*did you mean 'tiny_shakespeare'"
    fails(tfds_folder, near, name="tinyshakespeare")
    fails(tfds_folder, "name=a b/c: cannot be prepared", name="a b/c")
    fails(tfds_folder, "name=huggingface:a/b: Hugging Face data sets are not read by name", name="huggingface:a/b")
    fails(tfds_folder / "nothing" / "*", "matches no file")


@pytest.mark.parametrize("damage", ["info", "features", "data"])
def test_a_damaged_tfds_folder_is_one_line(tfds_folder, tmp_path, damage):
    folder = tmp_path / "1.0.0"
    shutil.copytree(tfds_folder / "llmjax_test_text" / "one" / "1.0.0", folder)
    if damage == "data":
        for path in folder.glob("*.array_record*"):
            path.unlink()
    else:
        (folder / {"info": "dataset_info.json", "features": "features.json"}[damage]).write_text("{")
    fails(folder, "path=.*1.0.0( train 0)?: ", text_key="story")


def test_tfds_that_needs_a_missing_package(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    def needs_tensorflow(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds, "builder", needs_tensorflow)
    fails(tfds_folder, "name=lm1b: TFDS needs the package tensorflow for it, which is not installed", name="lm1b")


def test_tfds_records_are_plain_values_and_a_bad_one_is_named():
    nested = {"a": [b"x", {"b": np.array([1, 2])}], "c": np.float32(0.5), "d": "str"}
    records = TFDSRecords([nested, {"t": b"\xff"}], where="name=x train")
    assert len(records) == 2
    assert next(iter(records)) == ("name=x train 0", {"a": ["x", {"b": [1, 2]}], "c": 0.5, "d": "str"})
    with pytest.raises(UserError, match=r"name=x train 1: not UTF-8 \(byte 0\)"):
        list(records)


def test_real_files():
    root = os.environ.get("LLMJAX_TEST_DATA")
    if not root or not pathlib.Path(root, "tinyshakespeare", "input.txt").is_file():
        pytest.skip("set LLMJAX_TEST_DATA to a folder with tinyshakespeare and tinystories_lc")
    train, validation = read(f"{root}/tinyshakespeare/input.txt")
    assert [len(text) for text in train + validation] == [1_003_854, 111_540]
    stories = read(f"{root}/tinystories_lc/train.txt.gz", document_separator="lines",
                   validation_path=f"{root}/tinystories_lc/val.txt")  # fmt: skip
    assert len(stories[0]) > 3_000 and len(stories[1]) > 100
