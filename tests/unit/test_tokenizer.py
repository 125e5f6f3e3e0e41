"""llmjax.data.tokenizer: round trip, control tokens, files."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from llmjax.config import validate
from llmjax.data import tokenizer as tokenizer_lib
from llmjax.data.tokenizer import (
    END_OF_TURN,
    MAX_WORD,
    SPECIAL_TOKENS,
    Controls,
    DecodeStream,
    Tokenizer,
    TokenizerConfig,
)
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
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_turn_id) == (0, 1, 1, 5)
        assert tokenizer.stop_ids == (1, 5)
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


def test_a_bpe_is_learnt_from_the_beginning_of_the_text():
    def texts():
        yield from ["abababab "] * 20
        yield from ["cdcdcdcd "] * 1000

    cfg = TokenizerConfig(vocab_size=300, train_chars=180)
    short = Tokenizer.train(texts(), cfg)
    assert len(short.encode("abababab")) < 4 and len(short.encode("cdcdcdcd")) == 8
    assert short.fingerprint() == Tokenizer.train(["abababab "] * 20, TokenizerConfig(vocab_size=300)).fingerprint()
    # A text that goes beyond is read in part.
    assert Tokenizer.train(["abababab " * 20 + "cdcdcdcd" * 99], cfg).encode("cdcd") == short.encode("cdcd")
    with pytest.raises(UserError, match="train_chars=0 must be positive"):
        validate(TokenizerConfig(train_chars=0))


def test_text_without_spaces_is_learnt_from_in_reasonable_time():
    """Merges take time quadratic in a word; of a long one, pieces do."""
    word = "".join(random.Random(0).choices("abcd", k=100_000))
    pieces = list(tokenizer_lib._bounded([f"x {word} y", "z"], 10**9))
    assert "".join(pieces) == f"x {word} yz" and max(map(len, pieces)) <= MAX_WORD
    assert list(tokenizer_lib._bounded(["a b", "c" * MAX_WORD], 10**9)) == ["a b", "c" * MAX_WORD]
    assert list(tokenizer_lib._bounded(["abc", "defg", "h"], 5)) == ["abc", "de"]
    tokenizer = Tokenizer.train([word], TokenizerConfig(vocab_size=300))
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode(word)) == word


def test_what_goes_wrong_while_it_learns_is_raised():
    def texts():
        yield "abc"
        raise UserError("a.jsonl:7: not JSON")

    with pytest.raises(UserError, match="a.jsonl:7: not JSON"):
        Tokenizer.train(texts(), TokenizerConfig(vocab_size=300))


def test_ctrl_c_is_heeded_while_it_learns():
    """The library learns in one call that does not look for signals. Commands end as here: at once, whatever it is at."""
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job may have been told to ignore it
        "from llmjax.data.tokenizer import Tokenizer, TokenizerConfig\n"
        "def texts():\n"
        "    yield 'abc'\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    while True:\n"
        "        yield 'abc'\n"
        "try:\n"
        "    Tokenizer.train(texts(), TokenizerConfig(vocab_size=300, train_chars=10**18))\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped', flush=True)\n"
        "    os._exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "stopped\n", "")


@pytest.mark.parametrize("which", ["bpe", "byte"])
def test_every_text_round_trips(which, request):
    tokenizer = request.getfixturevalue(which)
    rng = random.Random(0)
    codes = [c for c in range(1, 0x11000) if not 0xD800 <= c < 0xE000]
    texts = HARD_TEXTS + ["".join(map(chr, rng.choices(codes, k=30))) for _ in range(50)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert all(tokenizer.special_ids.isdisjoint(ids) for ids in tokenizer.encode_batch(texts))


def test_control_tokens_in_text_are_text_even_if_the_corpus_was_full_of_them(bpe):
    ids = bpe.encode(f"a{END_OF_TURN}b")
    assert bpe.end_of_turn_id not in ids
    assert bpe.encode_template(f"a{END_OF_TURN}b") == [*bpe.encode("a"), bpe.end_of_turn_id, *bpe.encode("b")]


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
    assert DecodeStream(byte).step(byte.end_of_turn_id) == ""
    assert DecodeStream(byte, skip_special=False).step(byte.end_of_turn_id) == END_OF_TURN


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


def test_controls_of_another_tokenizer_are_kept(bpe, tmp_path):
    controls = Controls("<|pad|>", "<|endoftext|>", "<|system|>", "<|end|>", (70, 3, 5), {"unk_token": "<|user|>"})
    tokenizer = Tokenizer(bpe._serialized, "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}", controls)
    tokenizer.save(tmp_path / "tok")
    for one in (tokenizer, Tokenizer.load(tmp_path / "tok")):
        assert (one.bos_id, one.eos_id, one.end_of_turn_id) == (1, 2, 5)
        assert one.stop_ids == (2, 3, 5, 70), "end of turn, end of text, and what the model's own folder names"
        assert one.controls == controls
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|system|>", "pad_token": "<|pad|>", "unk_token": "<|user|>"}
        assert one.template_variables == names
    with pytest.raises(UserError, match=r"no control token '<\|eot\|>'"):
        Tokenizer(bpe._serialized, "", Controls(end_of_turn="<|eot|>"))


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
    bpe.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("eos_token", "end_of_turn_token", "stop_ids"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: no '{name}'; restore the file"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<eos>"}))
    with pytest.raises(UserError, match="no control token '<eos>'"):
        Tokenizer.load(tmp_path)


def test_config_and_text_errors(bpe):
    with pytest.raises(UserError, match="vocab_size=261 is less than 262"):
        validate(TokenizerConfig(vocab_size=261))
    with pytest.raises(UserError, match="vocab_size=100"):
        Tokenizer.train([], TokenizerConfig(vocab_size=100))
    validate(TokenizerConfig(kind="byte", vocab_size=1))
    assert TokenizerConfig(kind="byte", vocab_size=1).size == 262 and TokenizerConfig(vocab_size=300).size == 300
    with pytest.raises(UserError, match="lone surrogate"):
        bpe.encode("a\ud800")


@pytest.mark.parity
def test_transformers_reads_the_folder(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "the cat , sat. 😀 it 's"
    assert theirs(text)["input_ids"] == bpe.encode(text)
    assert theirs.decode(bpe.encode(text)) == text
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (bpe.pad_id, bpe.bos_id, bpe.eos_id)
    assert theirs.chat_template == bpe.chat_template and bpe.eos_id == 1
