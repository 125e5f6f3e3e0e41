"""llmjax.data.batches: a pure function of seed and step; every sample once per epoch."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from llmjax.data.batches import iterate, make_batches, sequential_batches
from llmjax.errors import UserError

N = 23
ARRAYS = {"inputs": np.arange(N * 3, dtype=np.int32).reshape(N, 3), "loss_mask": np.ones((N, 3), np.int32)}


def rows(source, steps):
    """The sample numbers that the batches of `steps` hold."""
    return [row // 3 for step in steps for row in source[step]["inputs"][:, 0].tolist()]


def test_every_sample_once_per_epoch_in_a_fresh_order():
    source = make_batches(ARRAYS, batch_size=5, seed=7)
    stream = rows(source, range(N * 3))
    epochs = [tuple(stream[i * N : (i + 1) * N]) for i in range(15)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    assert tuple(range(N)) not in epochs


def test_pure_function_of_seed_and_step():
    steps = [40, 3, 0, 3, 11]
    one, other = (make_batches(ARRAYS, batch_size=5, seed=7) for _ in range(2))
    assert rows(one, steps) == rows(other, steps)
    assert rows(one, [3]) == rows(one, range(4))[15:]
    assert rows(make_batches(ARRAYS, batch_size=5, seed=8), range(4)) != rows(one, range(4))
    # The order of the samples does not depend on how they are cut into batches.
    assert rows(make_batches(ARRAYS, batch_size=1, seed=7), range(20)) == rows(one, range(4))


def test_batches_are_copies_of_aligned_rows():
    arrays = {"a": np.arange(8), "b": np.arange(8) * 10}
    source = make_batches(arrays, batch_size=4, seed=0)
    batch = source[0]
    assert (batch["b"] == batch["a"] * 10).all()
    batch["a"][:] = -1
    assert arrays["a"].tolist() == list(range(8))
    assert (source[0]["a"] >= 0).all()


def test_no_shuffle_keeps_the_order():
    source = make_batches(ARRAYS, batch_size=4, seed=0, shuffle=False)
    assert rows(source, range(7)) == [i % N for i in range(28)]


def test_memory_mapped_arrays(tmp_path):
    np.save(tmp_path / "a.npy", ARRAYS["inputs"])
    mapped = {"inputs": np.load(tmp_path / "a.npy", mmap_mode="r")}
    batch = make_batches(mapped, batch_size=5, seed=7)[2]["inputs"]
    np.testing.assert_array_equal(batch, make_batches(ARRAYS, batch_size=5, seed=7)[2]["inputs"])
    assert type(batch) is np.ndarray


def test_iterate_is_the_steps_in_order_from_anywhere():
    source = make_batches(ARRAYS, batch_size=5, seed=7)
    for start, end in ((0, 9), (4, 9), (9, 9)):
        batches = list(iterate(source, start, end))
        assert [b["inputs"].tolist() for b in batches] == [source[i]["inputs"].tolist() for i in range(start, end)]
    endless = iterate(source, 2, 10**9)
    first_two = [b["inputs"].tolist() for b in itertools.islice(endless, 2)]
    assert first_two == [source[i]["inputs"].tolist() for i in (2, 3)]


def test_sequential_batches_cover_all_once_with_one_shape():
    batches = list(sequential_batches(ARRAYS, 5))
    assert len(batches) == 5
    assert {b["inputs"].shape for b in batches} == {(5, 3)}
    real = np.concatenate([b["inputs"][b["loss_mask"][:, 0] == 1] for b in batches])
    np.testing.assert_array_equal(real, ARRAYS["inputs"])
    assert batches[-1]["loss_mask"].sum() == 9
    assert batches[-1]["inputs"].dtype == np.int32
    assert len(list(sequential_batches(ARRAYS, N))) == 1


def test_errors():
    with pytest.raises(UserError, match="batch_size=24 is more than the 23 samples"):
        make_batches(ARRAYS, batch_size=24, seed=0)
    with pytest.raises(UserError, match="batch_size=0"):
        make_batches(ARRAYS, batch_size=0, seed=0)
    with pytest.raises(UserError, match="batch_size=0"):
        sequential_batches(ARRAYS, 0)
    with pytest.raises(ValueError, match="no loss_mask"):
        sequential_batches({"inputs": ARRAYS["inputs"]}, 5)
    with pytest.raises(ValueError, match="different numbers"):
        make_batches({"a": np.zeros(3), "b": np.zeros(4)}, batch_size=1, seed=0)


def test_importing_the_data_modules_loads_neither_jax_nor_grain():
    modules = "tokenizer, chat, sources, packing, batches"
    code = f"import sys; from llmjax.data import {modules}; from llmjax.evals import ngram; " \
           "print([m for m in ('jax', 'grain', 'tensorflow', 'tensorflow_datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
