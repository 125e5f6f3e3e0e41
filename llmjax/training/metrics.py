"""metrics.jsonl, the ground truth of a run: one JSON object a line, {"stage", "step", "kind", name: number, ...}."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from llmjax.files import cannot_write, read_json_lines, write_text_atomic
from llmjax.results import ROW

Row = Mapping[str, Any]


class Sink(Protocol):
    """Where the rows are shown beside the file; see `llmjax.training.sinks`."""

    def begin(self, rows: Sequence[Row]) -> None:
        """These rows are all that hold: at the start, and when a stage goes on from an earlier step."""

    def write(self, row: Row) -> None:
        """One more."""

    def close(self) -> None:
        """No more."""


class MetricsLog:
    """Appends rows to `path`, unbuffered, so that a crash loses at most the line being written.

    enabled: False (processes other than 0) writes nothing. say: gets a line for each broken line of the file, which is left
    out. sinks: are given the rows too.

    Raises UserError where the file cannot be read or written.
    """

    def __init__(
        self, path: str, enabled: bool = True, say: Callable[[str], None] = lambda text: None, sinks: Sequence[Sink] = ()
    ):
        self.path = path
        self._file = None
        self._sinks = sinks if enabled else ()
        if enabled:
            rows, broken = read_json_lines(path, ROW)
            for line in broken:
                say(line)
            self._keep(rows)

    def write(self, stage: str, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """kind: "train" (one step) or "eval" (held-out data after that step)."""
        if self._file is None:
            return
        row = {"stage": stage, "step": step, "kind": kind} | {k: float(v) for k, v in values.items()}
        left = memoryview(_line(row).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error
        for sink in self._sinks:
            sink.write(row)

    def rewind(self, stage: str, step: int) -> None:
        """Forgets what `stage` logged after `step`: those steps are about to be done again."""
        if self._file is not None:
            self._keep([row for row in read_rows(self.path) if row["stage"] != stage or row["step"] <= step])

    def _keep(self, rows: Sequence[Row]) -> None:
        """Makes these rows all that there are; a line that was cut off goes with the others."""
        self._close_file()
        write_text_atomic(self.path, "".join(map(_line, rows)))
        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        for sink in self._sinks:
            sink.begin(rows)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self._close_file()
        for sink in self._sinks:
            sink.close()


def read_rows(path: str) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; none if there is no file."""
    return read_json_lines(path, ROW)[0]


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
