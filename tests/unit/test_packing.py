"""llmjax.data.packing: invariants over ragged random documents."""

from collections import Counter

import numpy as np
import pytest

from llmjax.data import packing
from llmjax.data.packing import ArrayRows, ExampleRows, StreamRows, clip_example, first_fit, left_pad, right_pad
from llmjax.data.records import Dialogue, Message
from llmjax.data.shards import Block, write_shards
from llmjax.data.tokenizer import Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.stages.datasets import encode_dialogues

PAD, BOS, EOS = 0, 1, 2
VOCAB = 30_000
NAMES = ("inputs", "targets", "segment_ids", "positions", "loss_mask")


@pytest.fixture(name="stream")
def make_stream(tmp_path_factory):
    """Rows of documents without control tokens; eos_id: another than BOS stands behind each."""

    def make(docs, length, eos_id=BOS, **options):
        end = [] if eos_id == BOS else [eos_id]
        blocks = [Block(np.array([BOS, *doc, *end], np.int32), 1) for doc in docs if doc]
        folder = tmp_path_factory.mktemp("stream")
        shards = write_shards(folder, lambda skip: blocks[skip:], vocab_size=VOCAB, **options)
        return StreamRows(shards, length, bos_id=BOS, eos_id=eos_id, pad_id=PAD)

    return make


@pytest.fixture(name="packed")
def make_packed(tmp_path_factory):
    """Rows of examples (tokens, loss mask), as the library clips and keeps them."""

    def make(examples, length, **options):
        blocks = []
        for tokens, mask in examples:
            clipped = clip_example(tokens, mask, length)
            if clipped is not None:
                blocks.append(Block(clipped[0], 1, np.array([len(tokens)]), clipped[1]))
        folder = tmp_path_factory.mktemp("examples")
        shards = write_shards(folder, lambda skip: blocks[skip:], vocab_size=VOCAB, masked=True, **options)
        return ExampleRows(shards, length, pad_id=PAD)

    return make


def everything(rows):
    return rows[np.arange(len(rows))]


def random_docs(seed, num=40, longest=30):
    """Documents whose tokens are all different, so that each can be traced."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, longest, size=num)
    tokens = iter(range(10, 10 + int(sizes.sum())))
    return [[next(tokens) for _ in range(size)] for size in sizes]


def segments(arrays):
    """(inputs, targets, positions, loss_mask) of every segment, row by row, left to right."""
    for row, ids in enumerate(arrays["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            place = np.flatnonzero(ids == segment)
            assert np.array_equal(place, np.arange(place[0], place[-1] + 1)), "a segment is in one piece"
            yield tuple(arrays[name][row, place].tolist() for name in ("inputs", "targets", "positions", "loss_mask"))


def check_layout(arrays, count, length):
    assert set(arrays) == set(NAMES)
    for name, array in arrays.items():
        assert array.dtype == np.int32 and array.shape == (count, length), name
    padding = arrays["segment_ids"] == 0
    for name in ("inputs", "targets", "positions", "loss_mask"):
        assert not arrays[name][padding].any(), name
    for row in arrays["segment_ids"]:
        real = row[row > 0]
        assert real.size and np.array_equal(row[: real.size], real), "padding is on the right"
        assert real[0] == 1 and set(np.diff(real)) <= {0, 1}
    for *_, positions, _ in segments(arrays):
        assert positions == list(range(len(positions)))


# ---- documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_id", [BOS, EOS])
@pytest.mark.parametrize(("seed", "length"), [(0, 8), (1, 16), (2, 31), (3, 1), (4, 1000)])
def test_stream_invariants(stream, seed, length, eos_id):
    docs = random_docs(seed)
    rows = stream(docs, length, eos_id)
    arrays = everything(rows)
    check_layout(arrays, len(rows), length)
    document_of = {token: i for i, doc in enumerate(docs) for token in doc}
    targets = Counter()
    for inputs, target, _, mask in segments(arrays):
        # Only what follows an end of its own is no target: the next document's beginning.
        assert mask == [int(eos_id == BOS or token != EOS) for token in inputs]
        learnt = [token for token, counts in zip(target, mask) if counts]
        targets.update(learnt)
        owners = {document_of[token] for token in inputs + learnt if token not in (BOS, EOS)}
        assert len(owners) == 1 or inputs == [EOS], "a segment holds one document only"
        if owners:
            chain = [BOS, *docs[owners.pop()], eos_id]
            start = 0 if inputs[0] == BOS else chain.index(inputs[0])
            assert inputs == chain[start : start + len(inputs)]
            assert learnt == chain[start + 1 : start + 1 + len(inputs)]
    assert targets == Counter([token for doc in docs if doc for token in [*doc, eos_id]])
    assert (arrays["segment_ids"][:-1] > 0).all(), "only the last row is padded"


def test_stream_by_hand(stream):
    arrays = everything(stream([[5, 6], [], [7, 8, 9]], 4))
    assert arrays["inputs"].tolist() == [[1, 5, 6, 1], [7, 8, 9, 0]]
    assert arrays["targets"].tolist() == [[5, 6, 1, 7], [8, 9, 1, 0]]
    assert arrays["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 0]]
    assert arrays["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert arrays["loss_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_stream_with_an_end_of_its_own_by_hand(stream):
    arrays = everything(stream([[5, 6], [7, 8, 9]], 4, EOS))
    assert arrays["inputs"].tolist() == [[1, 5, 6, 2], [1, 7, 8, 9], [2, 0, 0, 0]]
    assert arrays["targets"].tolist() == [[5, 6, 2, 1], [7, 8, 9, 2], [1, 0, 0, 0]]
    assert arrays["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert arrays["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert arrays["loss_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_stream_that_fills_its_rows_has_no_padding(stream):
    rows = stream([[5, 6, 7], [8, 9, 10]], 4)
    arrays = everything(rows)
    assert len(rows) == 2
    assert arrays["inputs"].tolist() == [[1, 5, 6, 7], [1, 8, 9, 10]]
    assert arrays["targets"].tolist() == [[5, 6, 7, 1], [8, 9, 10, 1]]


# ---- examples ----------------------------------------------------------------------------------------------------


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
def test_examples_stay_whole_and_come_once(packed, seed, length):
    examples = random_examples(seed)
    rows = packed(examples, length)
    arrays = everything(rows)
    check_layout(arrays, len(rows), length)
    found = {inputs[0]: (inputs, target, mask) for inputs, target, _, mask in segments(arrays)}
    assert len(found) == len(examples)
    for tokens, mask in examples:
        assert found[tokens[0]] == (tokens[:-1], tokens[1:], mask[1:])


def fit_by_hand(sizes, length):
    """Row and column of each size, by the definition of first fit."""
    rooms, places = [], []
    for size in sizes:
        row = next((i for i, room in enumerate(rooms) if room >= size), len(rooms))
        rooms += [length] if row == len(rooms) else []
        places.append((row, length - rooms[row]))
        rooms[row] -= size
    return places


def test_first_fit_is_first_fit():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        length = int(rng.integers(1, 40))
        sizes = rng.integers(1, length + 1, size=int(rng.integers(1, 150)))
        assert list(zip(*first_fit(sizes, length))) == fit_by_hand(sizes, length)


def test_first_fit_looks_at_the_last_rows_only(monkeypatch):
    """So that millions of examples take no quadratic time; they still do not overlap."""
    sizes, length = np.random.default_rng(0).integers(1, 33, size=500), 32
    monkeypatch.setattr(packing, "_OPEN_ROWS", 3)
    row_of, column_of = first_fit(sizes, length)
    used = np.zeros((row_of.max() + 1, length), int)
    for row, column, size in zip(row_of, column_of, sizes):
        assert used[row + 3 :].sum() == 0
        used[row, column : column + size] += 1
        assert column + size <= length
    assert used.max() == 1 and used.any(axis=1).all()
    assert used.mean() > 0.8


def test_first_fit_leaves_no_room_that_a_later_example_could_have_taken(packed):
    arrays = everything(packed(random_examples(3, num=200), 24))
    space = (arrays["segment_ids"] == 0).sum(axis=1)
    first_of_row = (arrays["segment_ids"] == 1).sum(axis=1)
    assert all(first_of_row[row] > space[:row].max() for row in range(1, len(space)))
    by_hand = everything(packed([([9] * (n + 1), [1] * (n + 1)) for n in (6, 5, 4, 3, 1)], 10))
    assert by_hand["segment_ids"].tolist() == [[1] * 6 + [2] * 4, [1] * 5 + [2] * 3 + [3, 0]]


def test_long_examples_lose_their_end(packed):
    examples = [
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 1, 1]),  # one token too many
        ([1, 7, 8, 9, 5, 6], [0, 0, 0, 0, 0, 1]),  # nothing to learn from what is left
        ([1, 2, 3], [1, 0, 0]),  # a mark on the first token, which is no target
        ([1, 2, 3, 4, 6], [0, 0, 0, 0, 1]),  # just fits
    ]
    arrays = everything(packed(examples, 4))
    assert arrays["targets"].tolist() == [[2, 3, 4, 5], [2, 3, 4, 6]]
    assert arrays["loss_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert clip_example(*examples[1], 4) is None and clip_example(*examples[2], 4) is None


def test_what_is_cut_and_left_out_of_dialogues_is_counted():
    tokenizer = Tokenizer.train(iter(()), TokenizerConfig(kind="byte"))

    def dialogue(asked, answered):
        return Dialogue((Message("user", "a" * asked), Message("assistant", "b" * answered)))

    # <bos> <user> a... <end> <assistant> b... <end>: five tokens more than the letters.
    dialogues = [dialogue(2, 3), dialogue(2, 4), dialogue(2, 30), dialogue(7, 1), dialogue(6, 1)]
    (block,) = encode_dialogues(tokenizer, dialogues, length=10)
    assert dict(block.counts) == {"kept": 4, "truncated": 2, "dropped": 1, "left_out_of_tokens_13": 1} and block.consumed == 5
    assert block.lengths.tolist() == [10, 11, 37, 12]
    assert len(block.tokens) == len(block.loss_mask) == 10 + 11 + 11 + 11
    assert block.loss_mask.tolist() == [*[0] * 6, *[1] * 4, *[0] * 6, *[1] * 5, *[0] * 6, *[1] * 5, *[0] * 10, 1]
    (rest,) = encode_dialogues(tokenizer, dialogues, length=10, skip=3)
    assert dict(rest.counts) == {"kept": 1, "truncated": 1, "dropped": 1, "left_out_of_tokens_13": 1}


def test_a_dialogue_that_cannot_be_written_is_named():
    tokenizer = Tokenizer.train(iter(()), TokenizerConfig(kind="byte"))
    turns = (Message("user", "x"), Message("system", "y"), Message("assistant", "z"))
    with pytest.raises(UserError, match=r"^chats\.jsonl:3: chat template: a system message can only be the first"):
        list(encode_dialogues(tokenizer, [Dialogue(turns, id="chats.jsonl:3")], length=10))


# ---- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "packed"])
def test_rows_are_made_one_by_one_from_files_of_any_size(kind, request):
    """What a batch gets does not depend on which other rows it asks for, nor on where a file ends."""
    make = request.getfixturevalue(kind)
    data = random_docs(5) if kind == "stream" else random_examples(5)
    whole = make(data, 19)
    arrays = everything(whole)
    cut = make(data, 19, shard_tokens=50)
    assert len(list(cut._shards.folder.glob("*.bin"))) > 5
    chosen = np.array([3, 0, len(whole) - 1, 3])
    for rows in (whole, cut):
        for name, array in rows[chosen].items():
            np.testing.assert_array_equal(array, arrays[name][chosen], err_msg=name)


def test_errors(tmp_path, stream, packed):
    with pytest.raises(UserError, match="no example has a target with loss within length=1"):
        packed([([1, 2, 3], [0, 0, 1])], 1)
    with pytest.raises(UserError, match="length=0"):
        stream([[1]], 0)
    with pytest.raises(UserError, match="length=0"):
        packed([([1, 2], [0, 1])], 0)
    with pytest.raises(ValueError, match="3 tokens with a loss mask of 2"):
        clip_example([1, 2, 3], [0, 1], 4)


def test_array_rows():
    rows = ArrayRows({"a": np.arange(6).reshape(3, 2), "b": np.arange(3)})
    assert len(rows) == 3
    chosen = rows[np.array([2, 0])]
    assert chosen["a"].tolist() == [[4, 5], [0, 1]] and chosen["b"].tolist() == [2, 0]
    with pytest.raises(ValueError, match="different numbers of samples"):
        ArrayRows({"a": np.zeros(3), "b": np.zeros(4)})


def test_padding_on_either_side():
    tokens, segment_ids = left_pad([[5, 6], [], [7, 8, 9]], 3, PAD)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 0], [7, 8, 9]] and tokens.dtype == np.int32
    assert segment_ids.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 1]] and segment_ids.dtype == np.int32
    tokens, segment_ids = right_pad([[5, 6], [], [7, 8, 9]], 3, 4)
    assert tokens.tolist() == [[5, 6, 4], [4, 4, 4], [7, 8, 9]]
    assert segment_ids.tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert left_pad([], 3, PAD)[0].shape == (0, 3)
    for pad in (left_pad, right_pad):
        with pytest.raises(UserError, match="a text of 4 tokens does not fit length=3"):
            pad([[1], [1, 2, 3, 4]], 3, PAD)
