"""Token lists of different lengths -> rectangular arrays. Prompts are padded on the left, whole texts on the right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmjax.errors import UserError


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


def _empty(rows, length, pad_id):
    longest = max((len(row) for row in rows), default=0)
    if longest > length:
        raise UserError(f"a prompt of {longest} tokens does not fit prompt_length={length}; raise prompt_length")
    return np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), np.int32)
