"""Batches as a pure function of (seed, step), over rows by number; read through Grain.

Nothing here knows of hosts: every host computes the same global batch and places its own part of it, so the order does
not depend on their number, and a resume needs the step alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llmjax.data.packing import Rows
from llmjax.errors import UserError

if TYPE_CHECKING:
    import grain  # takes a second or more, and imports jax: only when the first batch is wanted

_PREFETCH = 4


@dataclass(frozen=True)
class Batches:
    """A data set of batches. passes: the share of each source that a step takes, by name ("" for the only one)."""

    dataset: grain.MapDataset
    passes: Mapping[str, float]

    def __getitem__(self, steps: Any) -> Any:
        return self.dataset[steps]


BatchSource: TypeAlias = "grain.MapDataset | Batches"
"""`source[step]` is the batch of that step, arrays of equal first axis by name; any step, in any order."""


def make_batches(rows: Rows, *, batch_size: int, seed: int, shuffle: bool = True) -> Batches:
    """Endless training batches.

    The samples are taken epoch after epoch, each epoch in a fresh order that (seed, epoch) determines, every sample
    exactly once per epoch; a batch may begin in one epoch and end in the next, so none is left out.

    Args:
        rows: the samples.
        batch_size: rows of a batch, over all hosts.
        seed: of the order.
        shuffle: False keeps the order of the rows in every epoch.

    Returns:
        Batches: source[step] is {name: [batch_size, ...]}, a copy.

    Raises:
        UserError: there are fewer than batch_size samples (a batch would hold one twice), or batch_size is below 1.
    """
    check_enough(len(rows), batch_size)
    # Only row numbers pass through Grain one by one; the samples of a batch are gathered at once.
    dataset = _numbers(len(rows), seed, shuffle).batch(batch_size, batch_fn=np.asarray).map(lambda chosen: rows[chosen])
    return Batches(dataset, {"": batch_size / len(rows)})


def mix_batches(parts: Mapping[str, tuple[Rows, float]], *, batch_size: int, seed: int) -> Batches:
    """Endless training batches of several sources, each row from one of them, in the proportions of their weights.

    parts: (rows, weight) by name. Each source is shuffled and repeated by itself as in `make_batches`; which source the n-th
    row is from is the same whatever the seed. Raises UserError as `make_batches` does, and naming the source.
    """
    import grain

    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    if len(parts) == 1:
        return make_batches(next(iter(parts.values()))[0], batch_size=batch_size, seed=seed)
    sources = [rows for rows, _ in parts.values()]
    for name, (rows, _) in parts.items():
        if not len(rows):
            raise UserError(f"source {name!r} of the mixture has no row; give it more data or leave it out")
    numbered = [
        _numbers(len(rows), seed, True).map(lambda row, source=i: (source, int(row))) for i, rows in enumerate(sources)
    ]
    mixed = grain.MapDataset.mix(numbered, [weight for _, weight in parts.values()])

    def gather(chosen: np.ndarray) -> dict[str, np.ndarray]:
        source_of, row_of = chosen.T
        batch: dict[str, np.ndarray] = {}
        for i in np.unique(source_of):
            at = np.flatnonzero(source_of == i)
            for name, values in sources[i][row_of[at]].items():
                batch.setdefault(name, np.empty((len(chosen), *values.shape[1:]), values.dtype))[at] = values
        return batch

    whole = sum(weight for _, weight in parts.values())
    passes = {name: batch_size * weight / whole / len(rows) for name, (rows, weight) in parts.items()}
    return Batches(mixed.batch(batch_size, batch_fn=np.asarray).map(gather), passes)


def _numbers(count: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """0 ... count - 1, epoch after epoch."""
    import grain

    numbers = grain.MapDataset.range(count).seed(seed)
    return (numbers.shuffle() if shuffle else numbers).repeat(None)


def check_enough(num_samples: int, batch_size: int) -> None:
    """Raises UserError if a batch cannot be filled with different samples."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    if num_samples < batch_size:
        raise UserError(
            f"batch_size={batch_size} is more than the {num_samples} samples there are; "
            "lower batch_size, shorten length or give more data"
        )


def iterate(source: BatchSource, start_step: int, end_step: int) -> Iterator[dict[str, np.ndarray]]:
    """source[start_step], ..., source[end_step - 1], read ahead by a few batches on one thread."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(source[start_step:end_step].to_iter_dataset(options))


def held_out_batches(rows: Rows, batch_size: int, max_batches: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Samples for evaluation, each once, in order. All batches have the same shape: the last is filled up with zeros.

    Args:
        rows: the samples; "loss_mask" among their arrays, so that the zeros count for nothing.
        batch_size: rows of a batch.
        max_batches: of more rows than fit into so many, evenly spread ones are taken, the same each time; 0 for all.

    Returns:
        Batches {name: [batch_size, ...]}.

    Raises:
        UserError: batch_size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    chosen = spread(len(rows), max_batches * batch_size)

    def batch(start: int) -> dict[str, np.ndarray]:
        arrays = rows[chosen[start : start + batch_size]]
        if "loss_mask" not in arrays:
            raise ValueError(f"no loss_mask among {', '.join(arrays)}: rows of padding would count")
        return {name: _filled(array, batch_size) for name, array in arrays.items()}

    return (batch(start) for start in range(0, len(chosen), batch_size))


def spread(count: int, most: int) -> np.ndarray:
    """Numbers below `count`, ascending: all of them, or `most` evenly spread ones if there are more (0: all)."""
    return np.arange(count) if not most or count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((size - len(array), *array.shape[1:]), array.dtype)])
