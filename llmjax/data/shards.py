"""Token ids on disk, written in a stream and read through memory maps: two bytes a token, four where ids are large.

A folder holds `index.json`, files of ids 00000.bin, 00001.bin, ..., and where sequences are kept apart their lengths beside
them. A file is entered into the index when it is complete, so a writer that was cut off goes on behind the last one.
"""

from __future__ import annotations

import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.files import read_json, write_json_atomic, writing

SHARD_TOKENS = 2**24
_INDEX = "index.json"


@dataclass(frozen=True)
class Block:
    """Some of a stream, at once.

    tokens: ids, one sequence after another. consumed: how many records of the stream they are of. lengths: of each sequence
    (or how long it was before it was cut), and loss_mask, of the same length as tokens, where these are kept. counts: what
    is added up over all ("documents", ...).
    """

    tokens: np.ndarray
    consumed: int
    lengths: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


class Shards:
    """What `write_shards` has written. `len` is the number of ids; masked: whether a loss mask lies beside them.

    counts: the sums of the items' counts.
    """

    def __init__(self, folder: str | os.PathLike):
        """Raises UserError if the folder is not complete."""
        self.folder = pathlib.Path(folder)
        index = read_json(self.folder / _INDEX)
        if not index.get("complete"):
            raise UserError(f"{self.folder}: was not written to its end; remove it and start again")
        self.masked: bool = index["masked"]
        self.about: dict[str, Any] = index["about"]
        self.counts = sum((Counter(shard["counts"]) for shard in index["shards"]), Counter())
        self._dtype = np.dtype(index["dtype"])
        sizes = [shard["tokens"] for shard in index["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._files = [self._open(f"{_name(i)}.bin", size, self._dtype) for i, size in enumerate(sizes)]
        self._sequences = [(_name(i), shard["sequences"]) for i, shard in enumerate(index["shards"])]

    def _open(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        path = self.folder / name
        if not size:
            return np.empty(0, dtype)
        try:
            if path.stat().st_size != size * dtype.itemsize:
                raise UserError(f"{path}: {path.stat().st_size} bytes, not {size * dtype.itemsize}; remove {self.folder}")
            return np.memmap(path, dtype, "r")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); remove {self.folder}") from error

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and loss mask, int32 [stop - start], of the places start ... stop - 1 of all files together."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for number in range(first, len(self._files)):
            begin = int(self._starts[number])
            if begin >= stop:
                break
            parts.append(self._files[number][max(0, start - begin) : stop - begin])
        raw = np.concatenate(parts) if parts else np.empty(0, self._dtype)
        if not self.masked:
            return raw.astype(np.int32), np.ones(len(raw), np.int32)
        bit = raw.dtype.itemsize * 8 - 1
        return (raw & ((1 << bit) - 1)).astype(np.int32), (raw >> bit).astype(np.int32)

    def lengths(self) -> np.ndarray:
        """Of each sequence, int64; for sequences that were kept apart."""
        parts = [self._open(f"{name}.lengths", count, np.dtype(np.int32)) for name, count in self._sequences]
        return np.concatenate([np.empty(0, np.int64), *(part.astype(np.int64) for part in parts)])


def is_complete(folder: str | os.PathLike) -> bool:
    """Whether `write_shards` has come to its end there."""
    path = pathlib.Path(folder) / _INDEX
    return path.exists() and bool(read_json(path).get("complete"))


def write_shards(
    folder: str | os.PathLike,
    blocks: Callable[[int], Iterable[Block]],
    *,
    vocab_size: int,
    masked: bool = False,
    about: Mapping[str, Any] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Shards:
    """Writes a stream, at most about `shard_tokens` ids of it in memory, and opens what is there then.

    Args:
        folder: where; what is complete there already is kept.
        blocks: blocks(n) is the stream without its first n records.
        vocab_size: ids are below it.
        masked: keep loss masks, in the highest bit of an id, and the length of each sequence.
        about: JSON values to keep beside.
        progress: called with the number of ids so far after each block.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    dtype = np.dtype(np.uint16 if vocab_size <= 2 ** (15 if masked else 16) else np.uint32)
    index: dict[str, Any] = {"dtype": dtype.name, "masked": masked, "about": dict(about or {}), "complete": False, "shards": []}
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX)
    if index["complete"]:
        return Shards(folder)
    shards = index["shards"]
    open_blocks: list[Block] = []
    size, total = 0, sum(shard["tokens"] for shard in shards)

    def close_shard() -> None:
        with writing(folder):
            shards.append(_write_shard(folder, _name(len(shards)), open_blocks, dtype, masked))
        write_json_atomic(folder / _INDEX, index)

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for block in blocks(sum(shard["consumed"] for shard in shards)):
        open_blocks.append(block)
        size += len(block.tokens)
        if progress is not None:
            progress(total + size)
        if size >= shard_tokens:
            close_shard()
            open_blocks, total, size = [], total + size, 0
    if open_blocks:
        close_shard()
    write_json_atomic(folder / _INDEX, index | {"complete": True})
    return Shards(folder)


def _write_shard(folder: pathlib.Path, name: str, blocks: list[Block], dtype: np.dtype, masked: bool) -> dict[str, Any]:
    """Writes one file of ids, and what the index says of it."""
    tokens = np.concatenate([block.tokens for block in blocks]).astype(dtype)
    sequences = 0
    if masked:
        mask = _joined([block.loss_mask for block in blocks]).astype(dtype)
        tokens |= mask << (dtype.itemsize * 8 - 1)
        lengths = _joined([block.lengths for block in blocks]).astype(np.int32)
        sequences = len(lengths)
        _write(folder / f"{name}.lengths", lengths)
    _write(folder / f"{name}.bin", tokens)
    counts = sum((Counter(block.counts) for block in blocks), Counter())
    consumed = sum(block.consumed for block in blocks)
    return {"tokens": len(tokens), "sequences": sequences, "consumed": consumed, "counts": dict(counts)}


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray:
    there = [array for array in arrays if array is not None]
    if len(there) < len(arrays):
        raise ValueError("blocks of masked shards have lengths and a loss_mask")
    return np.concatenate(there)


def _write(path: pathlib.Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        array.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def _name(number: int) -> str:
    return f"{number:05d}"
