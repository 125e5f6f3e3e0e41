"""metrics.jsonl survives crashes and forgets what is done again."""

import json
import re

import pytest
import tiny

from llmjax.errors import UserError
from llmjax.training.metrics import MetricsLog, read_rows


def test_rows_come_back_as_they_were_written(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    log = MetricsLog(path)
    log.write("sft", 1, "train", {"loss": 0.1 + 0.2})
    assert read_rows(path) == [{"stage": "sft", "step": 1, "kind": "train", "loss": 0.1 + 0.2}]  # flushed at once
    log.write("sft", 2, "eval", {"loss": 1, "nan": float("nan")})
    log.close()
    rows = read_rows(path)
    assert len(rows) == 2 and rows[1]["kind"] == "eval" and rows[1]["nan"] != rows[1]["nan"]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_no_file_is_no_rows(tmp_path):
    assert read_rows(str(tmp_path / "metrics.jsonl")) == []


def test_a_line_that_was_cut_off_is_dropped_and_the_next_starts_clean(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"stage": "sft", "step": 1, "kind": "train", "loss": 2.0}\n'
    for cut in ('{"stage": "sft", "st', '{"stage": "sft", "step": 2, "kind": "train", "loss": 1.5}'):
        path.write_text(whole + cut)
        assert [row["step"] for row in read_rows(str(path))] == [1]
        log = MetricsLog(str(path))
        log.write("sft", 2, "train", {"loss": 1.0})
        log.close()
        assert [(row["step"], row["loss"]) for row in read_rows(str(path))] == [(1, 2.0), (2, 1.0)]


@pytest.mark.parametrize("garbage", [
    b"\x00\xff\xfe\x80 rubbish", b"{", b'{"stage": "sft"}', b"3", b'{"stage": "sft", "step": "1", "kind": "train"}', b"\xe2\x28"
])  # fmt: skip
def test_a_broken_line_is_said_and_left_out(tmp_path, garbage):
    path, said = tmp_path / "metrics.jsonl", []
    lines = [json.dumps({"stage": "sft", "step": step, "kind": "train", "loss": 1.0}).encode() for step in (1, 2)]
    path.write_bytes(b"\n".join([lines[0], garbage, lines[1], b"\x00\x00\x00"]))
    log = MetricsLog(str(path), say=said.append)
    assert said == [f"{path}:2: not a JSON object with stage, step, kind; the line is left out"]
    log.rewind("sft", 1)
    log.write("sft", 2, "train", {"loss": 0.5})
    log.close()
    assert len(said) == 1 and [(row["step"], row["loss"]) for row in read_rows(str(path))] == [(1, 1.0), (2, 0.5)]


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path))
    log.write("sft", 1, "train", {"loss": 1.0})
    with tiny.no_room(path.stat().st_size + 10), pytest.raises(UserError) as error:
        log.write("sft", 2, "train", {"loss": 1.0})
    log.close()
    words = r"metrics\.jsonl: cannot be written \(File too large, [\d,.]+ MB are free there\); make room, and the same command"
    assert re.search(words, str(error.value))
    assert path.read_bytes().count(b"\n") == 1 and len(path.read_bytes().split(b"\n")[1]) == 10  # cut off, as by a crash
    again = MetricsLog(str(path))
    again.close()
    assert [row["step"] for row in read_rows(str(path))] == [1]


def test_rewind_forgets_later_rows_of_that_stage_only(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    log = MetricsLog(path)
    for stage in ("pretrain", "sft"):
        for step in (1, 2, 3):
            log.write(stage, step, "train", {"loss": step})
        log.write(stage, 3, "eval", {"loss": 0})
    log.rewind("sft", 2)
    log.write("sft", 3, "train", {"loss": 30})
    log.close()
    rows = [(row["stage"], row["step"], row["loss"]) for row in read_rows(path)]
    first = [("pretrain", 1, 1), ("pretrain", 2, 2), ("pretrain", 3, 3), ("pretrain", 3, 0)]
    assert rows == [*first, ("sft", 1, 1), ("sft", 2, 2), ("sft", 3, 30)]


def test_other_processes_write_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), enabled=False)
    log.write("sft", 1, "train", {"loss": 1})
    log.rewind("sft", 0)
    log.close()
    assert not path.exists()
