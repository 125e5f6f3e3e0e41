"""Documents and dialogues -> rectangular arrays of packed segments, made once when a data set is built.

A row of length T holds several segments, numbered 1, 2, ... from the left, then padding (segment 0). Attention stays
inside a segment, positions count from 0 in each, and no target belongs to another document than its input.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from llmjax.errors import UserError
from llmjax.files import read_json, whole_folder

_COUNTS_FILE = "packed.json"


@dataclass(frozen=True)
class Packed:
    """N rows of T tokens. The arrays are int32 [N, T]; where segment_ids is 0 all of them are padding.

    Attributes:
        inputs: what the model reads.
        targets: what it is to predict at each place, the token after the input in the same document.
        segment_ids: 1, 2, ... from the left of each row; 0 is padding.
        positions: place of the token in its segment, from 0.
        loss_mask: 1 where the target counts.
        num_truncated: examples whose end was cut off because they are longer than a row.
        num_dropped: examples left out because no target with loss remained.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    num_truncated: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def arrays(self) -> dict[str, np.ndarray]:
        """The five arrays by name: a batch of the language-model loss, N rows long."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes one .npy file per array and the counts, all or nothing. Raises UserError if it cannot."""
        with whole_folder(folder) as new:
            for name, array in self.arrays().items():
                np.save(new / f"{name}.npy", array, allow_pickle=False)
            counts = {"num_truncated": self.num_truncated, "num_dropped": self.num_dropped}
            (new / _COUNTS_FILE).write_text(json.dumps(counts) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike, mmap: bool = True) -> "Packed":
        """Reads what `save` wrote; mmap: leaves the arrays on disk (read-only). Raises UserError if it is not there."""
        folder = pathlib.Path(folder)
        arrays = {}
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{path}: not a packed array ({reason}); remove {folder} and build it anew") from error
        if len({array.shape for array in arrays.values()}) != 1:
            raise UserError(f"{folder}: arrays of different shapes; remove the folder and build it anew")
        return cls(**arrays, **read_json(folder / _COUNTS_FILE))


_ARRAYS = tuple(field.name for field in fields(Packed) if field.type is np.ndarray)


def pack_stream(docs: Iterable[Sequence[int]], length: int, *, endoftext_id: int, pad_id: int) -> Packed:
    """Documents one after another, cut into rows of `length`: pre-training without padding (but at the very end).

    A document d1 ... dn becomes the inputs <|endoftext|> d1 ... dn with the targets d1 ... dn <|endoftext|>: each of
    its tokens, and its end, is a target exactly once, with loss, and the first is predicted from <|endoftext|>. A
    document that a row's edge cuts goes on in the next row as a new segment (positions from 0, nothing seen of its
    beginning) whose first input is the last target before the cut. Empty documents are left out.

    Args:
        docs: token ids of each document, without control tokens.
        length: T, tokens per row.
        endoftext_id, pad_id: ids of <|endoftext|> and of padding.

    Raises:
        UserError: length is not positive, or there is no token at all.
    """
    _check_length(length)
    docs = [doc for doc in (np.asarray(doc, np.int32) for doc in docs) if doc.size]
    if not docs:
        raise UserError("no tokens to pack: the corpus is empty; check the data")
    end = np.array([endoftext_id], np.int32)
    inputs = np.concatenate([part for doc in docs for part in (end, doc)])
    sizes = np.array([doc.size + 1 for doc in docs])
    # The input after a document's last token is the next document's <|endoftext|>, which is just the target wanted.
    targets = np.append(inputs[1:], end)
    document = np.repeat(np.arange(len(docs)), sizes)
    place = np.arange(inputs.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def rows(flat: np.ndarray, fill: int) -> np.ndarray:
        padding = np.full(-flat.size % length, fill, flat.dtype)
        return np.concatenate([flat, padding]).reshape(-1, length)

    real = rows(np.ones(inputs.size, np.int32), 0)
    document_rows = rows(document, 0)
    return Packed(
        inputs=rows(inputs, pad_id),
        targets=rows(targets, pad_id),
        segment_ids=((document_rows - document_rows[:, :1] + 1) * real).astype(np.int32),
        positions=np.minimum(rows(place, 0), np.arange(length)).astype(np.int32),
        loss_mask=real,
    )


def pack_examples(examples: Iterable[tuple[Sequence[int], Sequence[int]]], length: int, *, pad_id: int) -> Packed:
    """Whole examples, several to a row, by first fit in their order (at most 70 % more rows than the best packing).

    An example (tokens, loss_mask) becomes the inputs tokens[:-1] with the targets tokens[1:] and the loss where the
    *target* is marked, as one segment of one row. An example of more than `length` + 1 tokens keeps the first of them
    (and so has no end of turn to learn) and is counted in num_truncated; one that then has no target with loss is left
    out and counted in num_dropped.

    Raises:
        UserError: length is not positive, or no example has a target with loss.
    """
    _check_length(length)
    kept, num_truncated, num_dropped = [], 0, 0
    for tokens, loss_mask in examples:
        if len(tokens) != len(loss_mask):
            raise ValueError(f"{len(tokens)} tokens with a loss mask of {len(loss_mask)}")
        num_truncated += len(tokens) > length + 1
        tokens, loss_mask = np.asarray(tokens[: length + 1], np.int32), np.asarray(loss_mask[: length + 1], np.int32)
        if loss_mask[1:].any():
            kept.append((tokens, loss_mask))
        else:
            num_dropped += 1
    if not kept:
        raise UserError(f"no example has a target with loss within length={length}; check the data or raise length")
    row_of, column_of, num_rows = _first_fit([len(tokens) - 1 for tokens, _ in kept], length)
    arrays = {name: np.zeros((num_rows, length), np.int32) for name in _ARRAYS}
    arrays["inputs"][:] = arrays["targets"][:] = pad_id
    segments = np.zeros(num_rows, np.int32)
    for (tokens, loss_mask), row, column in zip(kept, row_of, column_of, strict=True):
        segments[row] += 1
        span = row, slice(column, column + len(tokens) - 1)
        arrays["inputs"][span] = tokens[:-1]
        arrays["targets"][span] = tokens[1:]
        arrays["segment_ids"][span] = segments[row]
        arrays["positions"][span] = np.arange(len(tokens) - 1)
        arrays["loss_mask"][span] = loss_mask[1:]
    return Packed(**arrays, num_truncated=num_truncated, num_dropped=num_dropped)


def _first_fit(sizes: Sequence[int], length: int) -> tuple[list[int], list[int], int]:
    """Row and column of each size, and the number of rows: each goes into the first row that still has room."""
    space = np.full(len(sizes), length, np.int64)
    smallest = min(sizes)
    first_open, row_of, column_of = 0, [], []
    for size in sizes:
        row = first_open + int(np.argmax(space[first_open:] >= size))
        row_of.append(row)
        column_of.append(int(length - space[row]))
        space[row] -= size
        # Rows too full for anything are not looked at again, which keeps the search short.
        first_open += sum(1 for _ in itertools.takewhile(lambda room: room < smallest, space[first_open:]))
    return row_of, column_of, max(row_of) + 1


def _check_length(length: int) -> None:
    if length < 1:
        raise UserError(f"length={length} must be positive")
