"""Batches as a pure function of (seed, step), over arrays of samples; read through Grain.

Nothing here knows of hosts: every host computes the same global batch and places its own part of it, so the order does
not depend on their number, and a resume needs the step alone.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmjax.errors import UserError

if TYPE_CHECKING:
    import grain  # takes a second or more, and imports jax: only when the first batch is wanted

_PREFETCH = 4


class BatchSource(Protocol):
    """`source[step]` is the batch of that step, arrays of equal first axis by name; any step, in any order."""

    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...


def make_batches(
    arrays: Mapping[str, np.ndarray], *, batch_size: int, seed: int, shuffle: bool = True
) -> "grain.MapDataset":
    """Endless training batches.

    The samples are taken epoch after epoch, each epoch in a fresh order that (seed, epoch) determines, every sample
    exactly once per epoch; a batch may begin in one epoch and end in the next, so none is left out.

    Args:
        arrays: [N, ...] by name, of equal N; may be memory-mapped, and are then read as needed.
        batch_size: rows of a batch, over all hosts.
        seed: of the order.
        shuffle: False keeps the order of the arrays in every epoch.

    Returns:
        A `BatchSource`: source[step] is {name: [batch_size, ...]}, a copy.

    Raises:
        UserError: there are fewer than batch_size samples (a batch would hold one twice), or batch_size is below 1.
    """
    import grain

    num_samples = _num_samples(arrays)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    if num_samples < batch_size:
        raise UserError(
            f"batch_size={batch_size} is more than the {num_samples} samples there are; "
            "lower batch_size, shorten length or give more data"
        )
    rows = grain.MapDataset.range(num_samples).seed(seed)
    if shuffle:
        rows = rows.shuffle()
    # Only row numbers pass through Grain one by one; the samples of a batch are gathered at once.
    rows = rows.repeat(None).batch(batch_size, batch_fn=np.asarray)
    return rows.map(lambda chosen: {name: np.asarray(array[chosen]) for name, array in arrays.items()})


def iterate(source: "grain.MapDataset", start_step: int, end_step: int) -> Iterator[dict[str, np.ndarray]]:
    """source[start_step], ..., source[end_step - 1], read ahead by a few batches on one thread."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(source[start_step:end_step].to_iter_dataset(options))


def sequential_batches(arrays: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All samples once, in order, for evaluation. All batches have the same shape: the last is filled up with zeros.

    Args:
        arrays: [N, ...] by name, of equal N; "loss_mask" among them, so that the zeros count for nothing.
        batch_size: rows of a batch.

    Returns:
        ceil(N / batch_size) batches {name: [batch_size, ...]}.

    Raises:
        UserError: batch_size is below 1.
    """
    num_samples = _num_samples(arrays)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be positive")
    if "loss_mask" not in arrays:
        raise ValueError(f"no loss_mask among {', '.join(arrays)}: rows of padding would count")

    def batch(start: int, array: np.ndarray) -> np.ndarray:
        rows = np.asarray(array[start : start + batch_size])
        return np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), rows.dtype)])

    starts = range(0, num_samples, batch_size)
    return ({name: batch(start, array) for name, array in arrays.items()} for start in starts)


def _num_samples(arrays: Mapping[str, np.ndarray]) -> int:
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arrays of different numbers of samples: {sizes}")
    return next(iter(sizes.values()))
