"""llmjax.data.packing: invariants over ragged random documents."""

import os
from collections import Counter
from functools import partial

import numpy as np
import pytest

from llmjax.data import packing
from llmjax.data.packing import Packed
from llmjax.errors import UserError

EOT = 1


pack_stream = partial(packing.pack_stream, endoftext_id=1, pad_id=0)
pack_examples = partial(packing.pack_examples, pad_id=0)


def random_docs(seed, num=40, longest=30):
    """Documents whose tokens are all different, so that each can be traced."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, longest, size=num)
    tokens = iter(range(10, 10 + int(sizes.sum())))
    return [[next(tokens) for _ in range(size)] for size in sizes]


def segments(packed):
    """(inputs, targets, positions, loss_mask) of every segment, row by row, left to right."""
    for row in range(len(packed)):
        ids = packed.segment_ids[row]
        for segment in range(1, ids.max() + 1):
            place = np.flatnonzero(ids == segment)
            assert np.array_equal(place, np.arange(place[0], place[-1] + 1)), "a segment is in one piece"
            names = "inputs", "targets", "positions", "loss_mask"
            yield tuple(getattr(packed, name)[row, place].tolist() for name in names)


def check_layout(packed, length):
    for name, array in packed.arrays().items():
        assert array.dtype == np.int32 and array.shape == (len(packed), length), name
    padding = packed.segment_ids == 0
    for name in ("inputs", "targets", "positions", "loss_mask"):
        assert not getattr(packed, name)[padding].any(), name
    for row in packed.segment_ids:
        real = row[row > 0]
        assert real.size and np.array_equal(row[: real.size], real), "padding is on the right"
        assert real[0] == 1 and set(np.diff(real)) <= {0, 1}
    for *_, positions, _ in segments(packed):
        assert positions == list(range(len(positions)))


@pytest.mark.parametrize(("seed", "length"), [(0, 8), (1, 16), (2, 31), (3, 1), (4, 1000)])
def test_stream_invariants(seed, length):
    docs = random_docs(seed)
    packed = pack_stream(docs, length)
    check_layout(packed, length)
    document_of = {token: i for i, doc in enumerate(docs) for token in doc}
    targets = Counter()
    for inputs, target, _, mask in segments(packed):
        assert all(mask)
        targets.update(target)
        owners = {document_of[token] for token in inputs + target if token != EOT}
        assert len(owners) == 1, "a segment holds one document only"
        doc = docs[owners.pop()]
        chain = [EOT, *doc, EOT]
        start = 0 if inputs[0] == EOT else chain.index(inputs[0])
        assert inputs == chain[start : start + len(inputs)]
        assert target == chain[start + 1 : start + 1 + len(inputs)]
    assert targets == Counter([token for doc in docs if doc for token in [*doc, EOT]])
    assert (packed.segment_ids[:-1] > 0).all(), "only the last row is padded"


def test_stream_by_hand():
    packed = pack_stream([[5, 6], [], [7, 8, 9]], 4)
    assert packed.inputs.tolist() == [[1, 5, 6, 1], [7, 8, 9, 0]]
    assert packed.targets.tolist() == [[5, 6, 1, 7], [8, 9, 1, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2], [1, 1, 1, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert packed.loss_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def random_examples(seed, num=60, longest=20):
    rng = np.random.default_rng(seed)
    examples, token = [], 10
    for size in rng.integers(2, longest + 1, size=num):
        mask = rng.integers(0, 2, size=size)
        mask[-1] = 1
        examples.append((list(range(token, token + size)), mask.tolist()))
        token += size
    return examples


@pytest.mark.parametrize(("seed", "length"), [(0, 19), (1, 32), (2, 128)])
def test_examples_stay_whole_and_come_once(seed, length):
    examples = random_examples(seed)
    packed = pack_examples(iter(examples), length)
    check_layout(packed, length)
    assert (packed.num_truncated, packed.num_dropped) == (0, 0)
    found = {inputs[0]: (inputs, target, mask) for inputs, target, _, mask in segments(packed)}
    assert len(found) == len(examples)
    for tokens, mask in examples:
        assert found[tokens[0]] == (tokens[:-1], tokens[1:], mask[1:])


def test_first_fit_leaves_no_room_that_a_later_example_could_have_taken():
    packed = pack_examples(random_examples(3, num=200), 24)
    space = (packed.segment_ids == 0).sum(axis=1)
    first_of_row = [len(next(s)[0]) for s in (segments(Packed(*(a[i : i + 1] for a in packed.arrays().values())))
                                              for i in range(len(packed)))]
    assert all(first_of_row[row] > space[:row].max() for row in range(1, len(packed)))
    by_hand = pack_examples([([9] * (n + 1), [1] * (n + 1)) for n in (6, 5, 4, 3, 1)], 10)
    assert by_hand.segment_ids.tolist() == [[1] * 6 + [2] * 4, [1] * 5 + [2] * 3 + [3, 0]]


def test_long_examples_lose_their_end_and_are_counted():
    examples = [
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 1, 1]),  # one token too many
        ([1, 7, 8, 9, 5, 6], [0, 0, 0, 0, 0, 1]),  # nothing to learn from what is left
        ([1, 2, 3], [1, 0, 0]),  # a mark on the first token, which is no target
        ([1, 2, 3, 4, 6], [0, 0, 0, 0, 1]),  # just fits
    ]
    packed = pack_examples(examples, 4)
    assert packed.targets.tolist() == [[2, 3, 4, 5], [2, 3, 4, 6]]
    assert packed.loss_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert (packed.num_truncated, packed.num_dropped) == (2, 2)


def test_errors():
    with pytest.raises(UserError, match="no tokens to pack"):
        pack_stream([[], []], 4)
    with pytest.raises(UserError, match="no example has a target with loss within length=1"):
        pack_examples([([1, 2, 3], [0, 0, 1])], 1)
    with pytest.raises(UserError, match="length=0"):
        pack_stream([[1]], 0)
    with pytest.raises(ValueError, match="3 tokens with a loss mask of 2"):
        pack_examples([([1, 2, 3], [0, 1])], 4)


@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(tmp_path, mmap):
    packed = pack_examples(random_examples(4), 16)
    packed.save(tmp_path / "packed")
    packed.save(tmp_path / "packed")
    loaded = Packed.load(tmp_path / "packed", mmap=mmap)
    for name, array in packed.arrays().items():
        np.testing.assert_array_equal(getattr(loaded, name), array)
    assert isinstance(loaded.inputs, np.memmap) == mmap
    assert loaded.num_truncated == packed.num_truncated > 0
    assert os.listdir(tmp_path) == ["packed"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    pack_stream([[5, 6]], 4).save(folder)
    calls = []

    def failing_save(path, array, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", failing_save)
    with pytest.raises(UserError, match="No space left on device"):
        pack_stream([[7, 8]], 4).save(folder)
    assert Packed.load(folder).inputs.tolist() == [[1, 5, 6, 0]]
    assert os.listdir(tmp_path) == ["packed"]


def test_load_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"inputs\.npy: not a packed array \(No such file"):
        Packed.load(tmp_path)
    pack_stream([[5, 6]], 4).save(tmp_path / "a")
    np.save(tmp_path / "a" / "targets.npy", np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.raises(UserError, match=r"targets\.npy: not a packed array"):
        Packed.load(tmp_path / "a")
    np.save(tmp_path / "a" / "targets.npy", np.zeros((2, 4), np.int32))
    with pytest.raises(UserError, match="different shapes"):
        Packed.load(tmp_path / "a")
