"""Sequences of token ids -> rectangular rows, made when a batch asks for them.

A row of length T holds several segments, numbered 1, 2, ... from the left, then padding (segment 0). Attention stays
inside a segment, positions count from 0 in each, and no target belongs to another document than its input.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from llmjax.data.shards import Shards
from llmjax.errors import UserError

_OPEN_ROWS = 8192  # that first fit looks at; enough that hardly any row is closed too early


class Rows(Protocol):
    """Samples by number: `rows[chosen]` gathers those at the indices `chosen` [B] as arrays [B, ...] by name."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]: ...


class ArrayRows:
    """Rows of arrays [N, ...] by name, of equal N."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        sizes = {name: len(array) for name, array in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"arrays of different numbers of samples: {sizes}")
        self.arrays = dict(arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(array[chosen]) for name, array in self.arrays.items()}


class StreamRows:
    """Documents one after another, cut into rows: pre-training without padding, but at the very end.

    On disk a document d1 ... dn is <bos> d1 ... dn, followed by <eos> where that is another token than <bos>. Each of its
    tokens and its end is a target exactly once, with loss, and the first is predicted from <bos>. A document that a row's
    edge cuts goes on in the next row as a new segment (positions from 0, nothing seen of its beginning) whose first input is
    the last target before the cut.

    Rows are int32 [B, T]: inputs, targets, segment_ids, positions, loss_mask.
    """

    def __init__(self, shards: Shards, length: int, *, bos_id: int, eos_id: int, pad_id: int):
        check_length(length)
        self._shards, self._length = shards, length
        self._bos_id, self._eos_id, self._pad_id = bos_id, eos_id, pad_id

    def __len__(self) -> int:
        return -(-len(self._shards) // self._length)

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        length, total = self._length, len(self._shards)
        text = np.full((len(chosen), length + 1), self._pad_id, np.int32)
        real = np.zeros((len(chosen), length), bool)
        for i, row in enumerate(chosen):
            start = int(row) * length
            tokens, _ = self._shards.read(start, min(start + length + 1, total))
            text[i, : len(tokens)] = tokens
            real[i, : min(length, total - start)] = True
            if len(tokens) <= length:  # the input after the last document would be the next one's <bos>
                text[i, len(tokens)] = self._bos_id
        inputs, targets = text[:, :-1], text[:, 1:]
        begins = (inputs == self._bos_id) & real
        segment_ids = np.cumsum(begins, axis=1) + ~begins[:, :1]
        place = np.arange(length)
        positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        # What follows an <eos> of its own is the next document; one token for both is the end that is to be learnt.
        within = real if self._bos_id == self._eos_id else real & (targets != self._bos_id)
        rows = {
            "inputs": np.where(real, inputs, self._pad_id),
            "targets": np.where(real, targets, self._pad_id),
            "segment_ids": segment_ids * real,
            "positions": positions * real,
            "loss_mask": within,
        }
        return {name: np.ascontiguousarray(array, np.int32) for name, array in rows.items()}


class ExampleRows:
    """Whole examples, several to a row, by first fit in their order (at most 70 % more rows than the best packing).

    An example of n + 1 tokens is one segment of n inputs and n targets, with the loss where the *target* is marked. The
    shards keep loss masks, the first `length` + 1 tokens of each example (see `clip_example`), and how long it was.

    Rows are int32 [B, T]: inputs, targets, segment_ids, positions, loss_mask.
    """

    def __init__(self, shards: Shards, length: int, *, pad_id: int):
        """Raises UserError if there is no example."""
        check_length(length)
        sizes = np.minimum(shards.lengths(), length + 1)
        if not len(sizes):
            raise UserError(f"no example has a target with loss within length={length}; check the data or raise length")
        self._shards, self._length, self._pad_id = shards, length, pad_id
        self._starts = np.cumsum(sizes) - sizes
        self._sizes = sizes
        row_of, self._column_of = first_fit(sizes - 1, length)
        self._by_row = np.argsort(row_of, kind="stable")
        self._first = np.searchsorted(row_of[self._by_row], np.arange(int(row_of.max()) + 2))

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        shape = (len(chosen), self._length)
        rows = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions", "loss_mask")}
        rows |= {name: np.full(shape, self._pad_id, np.int32) for name in ("inputs", "targets")}
        for i, row in enumerate(chosen):
            examples = self._by_row[self._first[int(row)] : self._first[int(row) + 1]]
            for segment, example in enumerate(examples, start=1):
                start, size, column = self._starts[example], self._sizes[example], self._column_of[example]
                tokens, mask = self._shards.read(int(start), int(start + size))
                span = i, slice(column, column + size - 1)
                rows["inputs"][span] = tokens[:-1]
                rows["targets"][span] = tokens[1:]
                rows["segment_ids"][span] = segment
                rows["positions"][span] = np.arange(size - 1)
                rows["loss_mask"][span] = mask[1:]
        return rows


def clip_example(
    tokens: Sequence[int], loss_mask: Sequence[int], length: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The first `length` + 1 tokens and their loss mask; None if no target with loss is left among them.

    An example that is cut has no end of turn to learn.
    """
    if len(tokens) != len(loss_mask):
        raise ValueError(f"{len(tokens)} tokens with a loss mask of {len(loss_mask)}")
    ids, mask = np.asarray(tokens[: length + 1], np.int32), np.asarray(loss_mask[: length + 1], np.int32)
    return (ids, mask) if mask[1:].any() else None


def first_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each size: each goes into the first of the last rows opened that still has room."""
    space = np.full(len(sizes), length, np.int64)
    smallest = int(sizes.min())
    row_of, column_of = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    first_open = num_rows = 0
    for i, size in enumerate(sizes):
        row = first_open + int(np.argmax(space[first_open : num_rows + 1] >= size))
        row_of[i], column_of[i] = row, length - space[row]
        space[row] -= size
        num_rows = max(num_rows, row + 1)
        # Rows too full for anything are not looked at again, which keeps the search short.
        first_open += sum(1 for _ in itertools.takewhile(lambda room: room < smallest, space[first_open:num_rows]))
        first_open = max(first_open, num_rows - _OPEN_ROWS)
    return row_of, column_of


def left_pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens and segment_ids [N, length] int32; each row ends at the right edge; segment 0 is padding."""
    tokens, segment_ids = _empty(rows, length, pad_id)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segment_ids[i, length - len(row) :] = 1
    return tokens, segment_ids


def right_pad(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens and segment_ids [N, length] int32; each row starts at the left edge; segment 0 is padding."""
    tokens, segment_ids = _empty(rows, length, pad_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        segment_ids[i, : len(row)] = 1
    return tokens, segment_ids


def _empty(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    longest = max((len(row) for row in rows), default=0)
    if longest > length:
        raise UserError(f"a text of {longest} tokens does not fit length={length}; raise it")
    return np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), np.int32)


def check_length(length: int) -> None:
    """Raises UserError unless a row has room for a token."""
    if length < 1:
        raise UserError(f"length={length} must be positive")
