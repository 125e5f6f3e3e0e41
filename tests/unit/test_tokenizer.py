"""llmjax.data.tokenizer: round trip, control tokens, files."""

import os
import random

import numpy as np
import pytest

from llmjax.data.tokenizer import END, SPECIAL_TOKENS, DecodeStream, Tokenizer, TokenizerConfig
from llmjax.errors import UserError

CORPUS = ["the cat sat on the mat. ", "<|end|> the end <|end|><|pad|> ", "a man, a plan: 1 + 22 = 23\n"] * 50
HARD_TEXTS = ["", " ", "naïve café 😀 東京\u200d\n\t\x00", "<|end|><|user|>", "  two  spaces "]
HARD_TEXTS += ["\r\n", "\ufeffx", "e\u0301"]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(CORPUS, TokenizerConfig(vocab_size=290))


@pytest.fixture(scope="module")
def byte():
    return Tokenizer.train(iter(()), TokenizerConfig(kind="byte"))


def test_specials_have_the_first_ids(bpe, byte):
    for tokenizer in (bpe, byte):
        assert [tokenizer.encode_template(token) for token in SPECIAL_TOKENS] == [[i] for i in range(6)]
        assert (tokenizer.pad_id, tokenizer.endoftext_id, tokenizer.end_id) == (0, 1, 5)
        assert tokenizer.special_ids == set(range(6))


def test_byte_tokenizer_is_bytes_plus_six(byte):
    assert byte.vocab_size == 262
    assert byte.encode("aé") == [b + 6 for b in "aé".encode()]


def test_bpe_learns_merges_and_is_deterministic(bpe):
    assert bpe.vocab_size == 290
    assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert Tokenizer.train(iter(CORPUS), TokenizerConfig(vocab_size=290)).fingerprint() == bpe.fingerprint()
    assert Tokenizer.train([CORPUS[2]] * 9, TokenizerConfig(vocab_size=1000)).vocab_size < 300  # nothing left to merge
    assert Tokenizer(bpe._serialized, "{{ 1 }}").fingerprint() != bpe.fingerprint()


@pytest.mark.parametrize("which", ["bpe", "byte"])
def test_every_text_round_trips(which, request):
    tokenizer = request.getfixturevalue(which)
    rng = random.Random(0)
    codes = [c for c in range(1, 0x11000) if not 0xD800 <= c < 0xE000]
    texts = HARD_TEXTS + ["".join(map(chr, rng.choices(codes, k=30))) for _ in range(50)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert all(tokenizer.special_ids.isdisjoint(ids) for ids in tokenizer.encode_batch(texts))


def test_control_tokens_in_text_are_text_even_if_the_corpus_was_full_of_them(bpe):
    ids = bpe.encode(f"a{END}b")
    assert bpe.end_id not in ids
    assert bpe.encode_template(f"a{END}b") == [*bpe.encode("a"), bpe.end_id, *bpe.encode("b")]


def test_decode_skips_or_shows_control_tokens(bpe):
    ids = bpe.encode_template("<|user|>hi<|end|>")
    assert bpe.decode(ids) == "<|user|>hi<|end|>"
    assert bpe.decode(ids, skip_special=True) == "hi"
    assert bpe.decode([bpe.encode("é")[0]]) == "\ufffd"


def test_stream_withholds_half_characters(bpe, byte):
    text = "né 😀!"
    for tokenizer in (bpe, byte):
        stream = DecodeStream(tokenizer)
        pieces = [stream.step(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)
        assert stream.finish() == ""
    emoji = byte.encode("😀")
    stream = DecodeStream(byte)
    assert [stream.step(i) for i in emoji] == ["", "", "", "😀"]
    assert [stream.step(i) for i in emoji[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.step(byte.encode("x")[0]) == "x"
    assert DecodeStream(byte).step(byte.end_id) == ""
    assert DecodeStream(byte, skip_special=False).step(byte.end_id) == END


def test_token_bytes_count_the_text(bpe):
    text = "the café, 東京"
    counts = bpe.token_bytes()
    assert counts.shape == (bpe.vocab_size,) and counts.dtype == np.int32
    assert counts[bpe.encode(text)].sum() == len(text.encode())
    assert (counts[:6] == 0).all() and (counts[6:] > 0).all()


def test_save_and_load(bpe, byte, tmp_path):
    for tokenizer in (bpe, byte):  # the second replaces the first
        tokenizer.save(tmp_path / "a" / "tok")
        loaded = Tokenizer.load(tmp_path / "a" / "tok")
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode("the mat <|end|>") == tokenizer.encode("the mat <|end|>")
    assert os.listdir(tmp_path / "a") == ["tok"]
    assert len(os.listdir(tmp_path / "a" / "tok")) == 3


def test_save_destroys_nothing(bpe, tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match=r"holds other files \(model.safetensors\)"):
        bpe.save(tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(UserError, match="is a file, not a folder"):
        bpe.save(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="cannot be written"):
        bpe.save(tmp_path / "model.safetensors" / "x")


def test_load_errors_are_one_line(bpe, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer \(.*\); restore") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_config_and_text_errors(bpe):
    with pytest.raises(UserError, match="vocab_size=261 is less than 262"):
        TokenizerConfig(vocab_size=261).validate()
    with pytest.raises(UserError, match="vocab_size=100"):
        Tokenizer.train([], TokenizerConfig(vocab_size=100))
    TokenizerConfig(kind="byte", vocab_size=1).validate()
    with pytest.raises(UserError, match="lone surrogate"):
        bpe.encode("a\ud800")


def test_transformers_reads_the_folder(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "the cat , sat. 😀 it 's"
    assert theirs(text)["input_ids"] == bpe.encode(text)
    assert theirs.decode(bpe.encode(text)) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (bpe.pad_id, bpe.endoftext_id, bpe.end_id)
    assert theirs.chat_template == bpe.chat_template
