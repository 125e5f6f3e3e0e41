"""metrics.jsonl survives crashes and forgets what is done again."""

import json

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
