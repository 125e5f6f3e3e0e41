"""llmjax.data.shards: what is read is what was written, and a writer that was cut off goes on."""

import itertools
import json
import os

import numpy as np
import pytest

from llmjax.data.shards import Block, Shards, is_complete, write_shards
from llmjax.errors import UserError


def random_blocks(seed, count=40, vocab_size=1000, masked=False):
    """Blocks of 1 to 3 sequences; some blocks hold no token at all."""
    rng = np.random.default_rng(seed)
    blocks = []
    for i in range(count):
        sizes = rng.integers(1, 20, size=int(rng.integers(1, 4))) if i % 7 else np.empty(0, np.int64)
        tokens = rng.integers(0, vocab_size, size=int(sizes.sum()))
        mask = rng.integers(0, 2, size=len(tokens)) if masked else None
        lengths = sizes + 100 * rng.integers(0, 2, size=len(sizes)) if masked else None  # longer before they were cut
        blocks.append(Block(tokens, 1, lengths, mask, {"documents": len(sizes)}))
    return blocks


def stream(blocks):
    return lambda skip: itertools.islice(blocks, skip, None)


def flat(blocks, name="tokens"):
    return np.concatenate([getattr(block, name) for block in blocks])


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fails(match, call):
    with pytest.raises(UserError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab_size", "masked", "size"),
    [(2, False, 2), (2**16, False, 2), (2**16 + 1, False, 4), (2**15, True, 2), (2**15 + 1, True, 4), (2**31, True, 4)],
)
def test_two_bytes_a_token_where_ids_and_mask_fit(tmp_path, vocab_size, masked, size):
    tokens = np.array([0, 1, vocab_size - 1, vocab_size // 2])
    mask = np.array([0, 1, 1, 0]) if masked else None
    block = Block(tokens, 1, np.array([4]) if masked else None, mask)
    shards = write_shards(tmp_path, stream([block]), vocab_size=vocab_size, masked=masked)
    assert (tmp_path / "00000.bin").stat().st_size == 4 * size
    ids, read_mask = shards.read(0, 4)
    assert ids.tolist() == tokens.tolist() and ids.dtype == read_mask.dtype == np.int32
    assert read_mask.tolist() == (mask.tolist() if masked else [1] * 4)
    assert shards.masked == masked


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shard_tokens", [1, 30, 10**6])
def test_any_stretch_over_any_number_of_files(tmp_path, masked, shard_tokens):
    blocks = random_blocks(0, masked=masked)
    shards = write_shards(tmp_path, stream(blocks), vocab_size=1000, masked=masked, shard_tokens=shard_tokens)
    tokens = flat(blocks)
    mask = flat(blocks, "loss_mask") if masked else np.ones(len(tokens), np.int32)
    assert len(shards) == len(tokens)
    sizes = [path.stat().st_size // 2 for path in sorted(tmp_path.glob("*.bin"))]
    assert sum(sizes) == len(tokens) and all(shard_tokens <= size < shard_tokens + 60 for size in sizes[:-1])
    rng = np.random.default_rng(1)
    edges = np.cumsum([0, *map(len, (block.tokens for block in blocks))])
    for start, stop in [*rng.integers(0, len(tokens) + 1, (200, 2)), *itertools.pairwise(edges), (0, len(tokens))]:
        ids, read_mask = shards.read(int(start), int(stop))
        np.testing.assert_array_equal(ids, tokens[start:stop])
        np.testing.assert_array_equal(read_mask, mask[start:stop])
    again = Shards(tmp_path)
    np.testing.assert_array_equal(again.read(0, len(tokens))[0], tokens)
    if masked:
        np.testing.assert_array_equal(again.lengths(), flat(blocks, "lengths"))
        assert again.lengths().dtype == np.int64


def test_reading_leaves_the_files_on_disk(tmp_path):
    shards = write_shards(tmp_path, stream(random_blocks(0)), vocab_size=1000)
    assert all(isinstance(file, np.memmap) for file in shards._files)
    ids, _ = shards.read(3, 9)
    ids[:] = -1  # a copy
    assert (shards.read(3, 9)[0] >= 0).all()


def test_counts_are_summed_and_what_stands_beside_is_kept(tmp_path):
    blocks = random_blocks(0)
    said = []
    about = {"length": 7, "name": "é"}
    shards = write_shards(
        tmp_path, stream(blocks), vocab_size=1000, shard_tokens=30, about=about, progress=said.append
    )
    assert shards.counts["documents"] == sum(block.counts["documents"] for block in blocks) > 40
    assert shards.about == Shards(tmp_path).about == about
    assert said == np.cumsum([len(block.tokens) for block in blocks]).tolist()


def test_a_stream_of_nothing(tmp_path):
    for name, blocks in (("none", []), ("empty", [Block(np.empty(0, np.int32), 3, np.empty(0), np.empty(0))])):
        shards = write_shards(tmp_path / name, stream(blocks), vocab_size=9, masked=True)
        assert len(shards) == 0 and shards.lengths().tolist() == [] and shards.read(0, 5)[0].tolist() == []
        assert is_complete(tmp_path / name)


def test_what_is_complete_is_not_read_again(tmp_path):
    write_shards(tmp_path, stream(random_blocks(0)), vocab_size=1000)
    before = files(tmp_path)

    def never(skip):
        raise AssertionError("the stream is not wanted")

    shards = write_shards(tmp_path, never, vocab_size=1000)
    assert files(tmp_path) == before and len(shards) == len(flat(random_blocks(0)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 9, 25, 39])
def test_a_writer_that_was_cut_off_goes_on_and_leaves_the_same_files(tmp_path, cut, masked):
    blocks = random_blocks(3, masked=masked)
    options = dict(vocab_size=1000, masked=masked, shard_tokens=40, about={"a": 1})
    write_shards(tmp_path / "whole", stream(blocks), **options)
    skipped = []

    def breaks(skip):
        yield from blocks[skip:cut]
        raise RuntimeError("cut off")

    def resumes(skip):
        skipped.append(skip)
        yield from blocks[skip:]

    folder = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="cut off"):
        write_shards(folder, breaks, **options)
    assert not is_complete(folder)
    if (folder / "index.json").exists():
        fails("was not written to its end; remove it and start again", lambda: Shards(folder))
        for path in folder.glob("*.bin"):  # what the index does not know may be half a file
            if int(path.stem) >= len(json.loads((folder / "index.json").read_text())["shards"]):
                path.write_bytes(b"half")
    write_shards(folder, resumes, **options)
    assert files(folder) == files(tmp_path / "whole")
    assert skipped[0] <= cut and (skipped[0] > 0) == (cut >= 9)


def test_a_file_that_was_half_written_is_written_anew(tmp_path):
    blocks = random_blocks(3)
    write_shards(tmp_path / "whole", stream(blocks), vocab_size=1000, shard_tokens=40)
    index = json.loads((tmp_path / "whole" / "index.json").read_text())
    folder = tmp_path / "cut"
    folder.mkdir()
    first, second = ((tmp_path / "whole" / f"0000{i}.bin").read_bytes() for i in (0, 1))
    (folder / "00000.bin").write_bytes(first)
    (folder / "00001.bin").write_bytes(second[:-7])
    (folder / "index.json").write_text(json.dumps(index | {"complete": False, "shards": index["shards"][:1]}))
    write_shards(folder, stream(blocks), vocab_size=1000, shard_tokens=40)
    assert files(folder) == files(tmp_path / "whole")


@pytest.fixture(name="folder")
def make_folder(tmp_path):
    write_shards(
        tmp_path / "shards", stream(random_blocks(0, masked=True)), vocab_size=1000, masked=True, shard_tokens=100
    )
    return tmp_path / "shards"


@pytest.mark.parametrize("change", [-1, 2])
def test_a_file_of_another_size_is_one_line(folder, change):
    path = folder / "00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"ab")
    fails(rf"00001\.bin: {len(data) + change} bytes, not {len(data)}; remove .*shards", lambda: Shards(folder))


def test_a_file_that_is_gone_is_one_line(folder):
    (folder / "00002.bin").unlink()
    fails(r"00002\.bin: cannot be read \(No such file", lambda: Shards(folder))
    (folder / "index.json").write_text('{"complete": true,\n')
    fails(r"index\.json:2: not JSON", lambda: Shards(folder))
    (folder / "index.json").unlink()
    fails(r"index\.json: no such file", lambda: Shards(folder))
    assert not is_complete(folder)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_damaged_lengths_are_one_line(folder, damage):
    path = folder / "00001.lengths"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-4])
    fails(r"00001\.lengths: ", lambda: Shards(folder).lengths())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "shards", tmp_path / "file"):
        fails("cannot be written", lambda: write_shards(folder, stream(random_blocks(0)), vocab_size=1000))
    assert os.listdir(tmp_path) == ["file"]


def test_a_source_that_cannot_be_read_is_not_taken_for_the_place(tmp_path):
    def broken(skip):
        yield random_blocks(0)[1]
        raise PermissionError(13, "Permission denied", "/their/text.jsonl")

    with pytest.raises(PermissionError, match="text.jsonl"):
        write_shards(tmp_path / "a", broken, vocab_size=1000)
