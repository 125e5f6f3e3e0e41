"""JSON records on disk by number: a jsonl file, and where each of its lines begins."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.files import writing


class Store:
    """The records of a file that `write` has made, each read when it is asked for."""

    def __init__(self, path: str | os.PathLike):
        """Raises UserError if the file is not there or not whole."""
        self._path = pathlib.Path(path)
        try:
            self._starts = np.load(_index(self._path), allow_pickle=False)
            whole = self._path.stat().st_size == self._starts[-1]
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove {self._path.parent}") from error
        if not whole:
            raise UserError(f"{path}: is not whole; remove {self._path.parent}")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        with open(self._path, "rb") as file:
            file.seek(int(self._starts[index]))
            return json.loads(file.read(int(self._starts[index + 1] - self._starts[index])))

    @staticmethod
    def write(path: str | os.PathLike, records: Iterable[Any]) -> None:
        """Writes one JSON value a line; what JSON does not have becomes text. Raises UserError if it cannot be written."""
        path = pathlib.Path(path)
        starts = [0]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "wb")
        with file:
            for record in records:
                line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
                with writing(path):
                    starts.append(starts[-1] + file.write(line.encode("utf-8", "surrogatepass")))
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path), open(_index(path), "wb") as file:
            np.save(file, np.array(starts, np.int64), allow_pickle=False)


def _index(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".index.npy")
