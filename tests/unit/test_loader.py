"""llmjax.data.loader: a pure function of seed and step; every sample once per epoch."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from llmjax.data.loader import held_out_batches, iterate, make_batches, mix_batches, spread
from llmjax.data.packing import ArrayRows
from llmjax.errors import UserError

N = 23
INPUTS = np.arange(N * 3, dtype=np.int32).reshape(N, 3)
ROWS = ArrayRows({"inputs": INPUTS, "loss_mask": np.ones((N, 3), np.int32)})


def rows(source, steps):
    """The sample numbers that the batches of `steps` hold."""
    return [row // 3 for step in steps for row in source[step]["inputs"][:, 0].tolist()]


def test_every_sample_once_per_epoch_in_a_fresh_order():
    source = make_batches(ROWS, batch_size=5, seed=7)
    stream = rows(source, range(N * 3))
    epochs = [tuple(stream[i * N : (i + 1) * N]) for i in range(15)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    assert tuple(range(N)) not in epochs


def test_pure_function_of_seed_and_step():
    steps = [40, 3, 0, 3, 11]
    one, other = (make_batches(ROWS, batch_size=5, seed=7) for _ in range(2))
    assert rows(one, steps) == rows(other, steps)
    assert rows(one, [3]) == rows(one, range(4))[15:]
    assert rows(make_batches(ROWS, batch_size=5, seed=8), range(4)) != rows(one, range(4))
    # The order of the samples does not depend on how they are cut into batches.
    assert rows(make_batches(ROWS, batch_size=1, seed=7), range(20)) == rows(one, range(4))


def test_batches_are_copies_of_aligned_rows():
    arrays = {"a": np.arange(8), "b": np.arange(8) * 10}
    source = make_batches(ArrayRows(arrays), batch_size=4, seed=0)
    batch = source[0]
    assert (batch["b"] == batch["a"] * 10).all()
    batch["a"][:] = -1
    assert arrays["a"].tolist() == list(range(8))
    assert (source[0]["a"] >= 0).all()


def test_no_shuffle_keeps_the_order():
    source = make_batches(ROWS, batch_size=4, seed=0, shuffle=False)
    assert rows(source, range(7)) == [i % N for i in range(28)]


def test_memory_mapped_arrays(tmp_path):
    np.save(tmp_path / "a.npy", INPUTS)
    mapped = {"inputs": np.load(tmp_path / "a.npy", mmap_mode="r")}
    batch = make_batches(ArrayRows(mapped), batch_size=5, seed=7)[2]["inputs"]
    np.testing.assert_array_equal(batch, make_batches(ROWS, batch_size=5, seed=7)[2]["inputs"])
    assert type(batch) is np.ndarray


def test_iterate_is_the_steps_in_order_from_anywhere():
    source = make_batches(ROWS, batch_size=5, seed=7)
    for start, end in ((0, 9), (4, 9), (9, 9)):
        batches = list(iterate(source, start, end))
        assert [b["inputs"].tolist() for b in batches] == [source[i]["inputs"].tolist() for i in range(start, end)]
    endless = iterate(source, 2, 10**9)
    first_two = [b["inputs"].tolist() for b in itertools.islice(endless, 2)]
    assert first_two == [source[i]["inputs"].tolist() for i in (2, 3)]


def test_held_out_batches_cover_all_once_with_one_shape():
    batches = list(held_out_batches(ROWS, 5))
    assert len(batches) == 5
    assert {b["inputs"].shape for b in batches} == {(5, 3)}
    real = np.concatenate([b["inputs"][b["loss_mask"][:, 0] == 1] for b in batches])
    np.testing.assert_array_equal(real, INPUTS)
    assert batches[-1]["loss_mask"].sum() == 9
    assert batches[-1]["inputs"].dtype == np.int32 and not batches[-1]["inputs"][3:].any()
    assert len(list(held_out_batches(ROWS, N))) == 1
    assert len(list(held_out_batches(ROWS, 5, max_batches=5))) == 5


def test_few_held_out_batches_are_spread_over_all_of_it():
    """The first rows of a split would be its first document alone."""
    few = list(held_out_batches(ROWS, 4, max_batches=2))
    taken = [row // 3 for batch in few for row in batch["inputs"][:, 0].tolist()]
    assert taken == [0, 3, 6, 9, 12, 15, 18, 22]
    assert all(batch["loss_mask"].all() for batch in few)
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(3, 10).tolist() == spread(3, 0).tolist() == [0, 1, 2]
    for count in range(1, 40):
        for most in range(1, 40):
            chosen = spread(count, most)
            assert len(set(chosen.tolist())) == len(chosen) == min(count, most)
            assert (np.diff(chosen) > 0).all() and chosen[0] == 0 and (most == 1 or chosen[-1] == count - 1)


# ---- mixtures ----------------------------------------------------------------------------------------------------


def numbered(first, count):
    return ArrayRows({"inputs": np.arange(first, first + count, dtype=np.int32)[:, None]})


LARGE, SMALL = numbered(0, 60), numbered(100, 7)


def mixed(source, steps):
    return np.concatenate([source[step]["inputs"][:, 0] for step in steps])


def test_a_mixture_has_the_proportions_of_its_weights_in_every_stretch():
    source = mix_batches({"large": (LARGE, 3.0), "small": (SMALL, 1.0)}, batch_size=8, seed=3)
    stream = mixed(source, range(50))
    small = np.cumsum(stream >= 100)
    assert small[-1] == 100
    assert np.abs(small - np.arange(1, 401) / 4).max() < 2
    # Weights count as they are to each other.
    again = mix_batches({"large": (LARGE, 0.75), "small": (SMALL, 0.25)}, batch_size=8, seed=3)
    np.testing.assert_array_equal(mixed(again, range(50)), stream)


def test_each_source_of_a_mixture_is_repeated_by_itself():
    source = mix_batches({"large": (LARGE, 3.0), "small": (SMALL, 1.0)}, batch_size=4, seed=3)
    stream = mixed(source, range(140))
    small, large = stream[stream >= 100].tolist(), stream[stream < 100].tolist()
    epochs = [small[i : i + 7] for i in range(0, 140, 7)]
    assert all(sorted(epoch) == list(range(100, 107)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 10
    assert all(sorted(large[i : i + 60]) == list(range(60)) for i in range(0, 420, 60))


def test_a_mixture_is_a_pure_function_of_seed_and_step():
    parts = {"large": (LARGE, 3.0), "small": (SMALL, 1.0)}
    one, other, seeded = (mix_batches(parts, batch_size=8, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(mixed(one, [9, 2, 9]), mixed(other, [9, 2, 9]))
    np.testing.assert_array_equal(mixed(one, [9]), mixed(other, range(10))[72:])
    first, second = mixed(one, range(20)), mixed(seeded, range(20))
    assert (first != second).any()
    np.testing.assert_array_equal(first >= 100, second >= 100)
    np.testing.assert_array_equal([b["inputs"][0, 0] for b in iterate(one, 3, 6)], mixed(one, [3, 4, 5])[::8])


def test_a_mixture_of_one_is_its_source_and_rows_stay_aligned():
    alone = mix_batches({"only": (LARGE, 5.0)}, batch_size=8, seed=3)
    np.testing.assert_array_equal(mixed(alone, range(9)), mixed(make_batches(LARGE, batch_size=8, seed=3), range(9)))

    def pairs(count):
        return ArrayRows({"a": np.arange(count), "b": np.stack([np.arange(count) * 10] * 2, axis=1)})

    batch = mix_batches({"x": (pairs(5), 1.0), "y": (pairs(9), 1.0)}, batch_size=12, seed=0)[1]
    assert batch["a"].shape == (12,) and batch["b"].shape == (12, 2)
    np.testing.assert_array_equal(batch["b"], np.stack([batch["a"] * 10] * 2, axis=1))


def test_a_mixture_may_have_fewer_rows_than_a_batch_but_not_none():
    source = mix_batches({"large": (LARGE, 1.0), "small": (SMALL, 1.0)}, batch_size=30, seed=0)
    assert (source[0]["inputs"] >= 100).sum() == 15
    with pytest.raises(UserError, match="source 'none' of the mixture has no row"):
        mix_batches({"large": (LARGE, 1.0), "none": (numbered(0, 0), 1.0)}, batch_size=4, seed=0)


def test_the_share_of_the_rows_that_a_step_takes_is_known():
    assert make_batches(LARGE, batch_size=8, seed=0).passes == {"": 8 / 60}
    source = mix_batches({"large": (LARGE, 3.0), "small": (SMALL, 1.0)}, batch_size=8, seed=3)
    assert source.passes == {"large": 6 / 60, "small": 2 / 7}
    small = mixed(source, range(70))
    assert (small >= 100).sum() == 70 * source.passes["small"] * 7


def test_a_mixture_refuses_a_batch_of_nothing():
    with pytest.raises(UserError, match="batch_size=0"):
        mix_batches({"large": (LARGE, 1.0), "small": (SMALL, 1.0)}, batch_size=0, seed=0)


def test_errors():
    with pytest.raises(UserError, match="batch_size=24 is more than the 23 samples"):
        make_batches(ROWS, batch_size=24, seed=0)
    with pytest.raises(UserError, match="batch_size=0"):
        make_batches(ROWS, batch_size=0, seed=0)
    with pytest.raises(UserError, match="batch_size=0"):
        held_out_batches(ROWS, 0)
    with pytest.raises(ValueError, match="no loss_mask"):
        list(held_out_batches(ArrayRows({"inputs": INPUTS}), 5))
    with pytest.raises(ValueError, match="different numbers"):
        ArrayRows({"a": np.zeros(3), "b": np.zeros(4)})


def test_importing_the_data_modules_loads_neither_jax_nor_grain():
    modules = "tokenizer, template, formats, sources, packing, loader"
    code = f"import sys; from llmjax.data import {modules}; from llmjax.evals import ngram; " \
           "print([m for m in ('jax', 'grain', 'tensorflow', 'tensorflow_datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
