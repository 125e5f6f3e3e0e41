"""metrics.jsonl, the ground truth of a run: one JSON object a line, {"stage", "step", "kind", name: number, ...}."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from llmjax.files import read_text, write_text_atomic


class MetricsLog:
    """Appends rows to `path`; each line is flushed, so a crash loses at most the line being written.

    With `enabled=False` (processes other than 0) nothing is written.
    """

    def __init__(self, path: str, enabled: bool = True):
        self.path = path
        self._file = None
        if enabled:
            rows = read_rows(path)
            if os.path.exists(path):  # drops a line cut off by a crash
                write_text_atomic(path, "".join(_line(row) for row in rows))
            self._file = open(path, "a", encoding="utf-8")

    def write(self, stage: str, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """kind: "train" (one step) or "eval" (held-out data after that step)."""
        if self._file is None:
            return
        row = {"stage": stage, "step": step, "kind": kind} | {k: float(v) for k, v in values.items()}
        self._file.write(_line(row))
        self._file.flush()

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` logged after `step`: those steps are about to be done again."""
        if self._file is None:
            return
        kept = [row for row in read_rows(self.path) if row["stage"] != stage or row["step"] <= step]
        self._file.close()
        write_text_atomic(self.path, "".join(_line(row) for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_rows(path: str) -> list[dict[str, Any]]:
    """All complete rows of a metrics file; none if there is no file. An unfinished last line is left out."""
    if not os.path.exists(path):
        return []
    return [json.loads(line) for line in read_text(path).split("\n")[:-1] if line]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
