"""llmjax.data.store: JSON records by number."""

import numpy as np
import pytest

from llmjax.data.store import Store
from llmjax.errors import UserError

RECORDS = [
    {"id": "a/0", "text": "naïve 東京 😀\n\"quoted\"\u2028\x00", "fields": {"n": [1, 2.5, None, True], "deep": {"x": []}}},
    {}, "text", [1, [2]], None, 7, {"long": "x" * 100_000}, {"é": "é"},
]  # fmt: skip


@pytest.fixture(name="path")
def make_path(tmp_path):
    Store.write(tmp_path / "store" / "records.jsonl", iter(RECORDS))
    return tmp_path / "store" / "records.jsonl"


def fails(path, match):
    with pytest.raises(UserError, match=match) as caught:
        Store(path)
    assert "\n" not in str(caught.value)


def test_round_trip_in_any_order(path):
    store = Store(path)
    assert len(store) == len(RECORDS)
    assert [store[i] for i in range(len(store))] == RECORDS
    assert [store[i] for i in (6, 0, 6, 3)] == [RECORDS[i] for i in (6, 0, 6, 3)]
    assert store[-1] == RECORDS[-1] and store[np.int64(3)] == RECORDS[3]
    for index in (len(RECORDS), -len(RECORDS) - 1):
        with pytest.raises(IndexError):
            store[index]


def test_the_file_is_plain_jsonl(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == len(RECORDS) + 1 and lines[-1] == "" and lines[-2] == '{"é": "é"}'


def test_nothing_at_all(tmp_path):
    Store.write(tmp_path / "a.jsonl", [])
    assert len(Store(tmp_path / "a.jsonl")) == 0


def test_what_json_does_not_have_becomes_text(tmp_path):
    Store.write(tmp_path / "a.jsonl", [{"when": np.datetime64("2026-01-02")}])
    assert Store(tmp_path / "a.jsonl")[0] == {"when": "2026-01-02"}


def test_half_a_character_is_kept(tmp_path):
    """JSON may hold a lone surrogate: in a field that no model sees it harms nobody."""
    Store.write(tmp_path / "a.jsonl", [{"note": "\ud800"}, {"note": "é"}])
    assert [Store(tmp_path / "a.jsonl")[i] for i in (0, 1)] == [{"note": "\ud800"}, {"note": "é"}]


def test_writing_again_replaces(path):
    Store.write(path, [{"a": 1}])
    assert len(Store(path)) == 1 and Store(path)[0] == {"a": 1}


def test_a_writer_that_was_cut_off_is_noticed(path):
    """The index is written last, so what was half replaced does not pass for whole."""

    def breaks():
        yield {"a": 1}
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError):
        Store.write(path, breaks())
    fails(path, "is not whole; remove .*store")


def test_damage_is_one_line(path):
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"\n"):
        path.write_bytes(damaged)
        fails(path, r"records\.jsonl: is not whole; remove .*store")
    path.write_bytes(data)
    index = path.with_suffix(".index.npy")
    index.write_bytes(index.read_bytes()[:-8])
    fails(path, r"records\.jsonl: cannot be read")
    index.unlink()
    fails(path, r"records\.jsonl: cannot be read .*No such file")
    path.unlink()
    fails(path, r"records\.jsonl: cannot be read")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        Store.write(tmp_path / "file" / "records.jsonl", [])
    assert "\n" not in str(caught.value)


def test_a_source_that_cannot_be_read_is_not_taken_for_the_place(tmp_path):
    def broken():
        yield {"a": 1}
        raise PermissionError(13, "Permission denied", "/their/text.jsonl")

    with pytest.raises(PermissionError, match="text.jsonl"):
        Store.write(tmp_path / "records.jsonl", broken())
