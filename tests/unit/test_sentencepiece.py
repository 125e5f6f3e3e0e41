"""A tokenizer.model gives the ids and texts that the sentencepiece library gives."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models

from llmjax.data.tokenizer import Controls, DecodeStream, Tokenizer
from llmjax.errors import UserError
from llmjax.interop.hf_tokenizer import read_tokenizer

TEXT = "the cat sat on a mat while two dogs (old ones) ate 42 naïve pies, didn't they? In 1999: über-Größe!"
SYMBOLS = ["<turn>", "\n"]
TEXTS = [
    "the cat", " the  cats ate\n\nthem", "東京 😀 \t x\u200d", "<turn>two<turn>\n", "</s><s>", "<0x41>", "", " ", "a",
    "didn't they? naïve über",
]  # fmt: skip


def trained(folder, **options):
    """(our tokenizer, sentencepiece's) of one model trained here."""
    rng, out = random.Random(0), io.BytesIO()
    lines = (" ".join(rng.choices(TEXT.split(), k=12)) for _ in range(300))
    options = dict(model_type="bpe", vocab_size=400, byte_fallback=True, normalization_rule_name="identity",
                   remove_extra_whitespaces=False) | options  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, minloglevel=2, **options)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return read_tokenizer(str(folder)), sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


CASES = {
    "llama": dict(),
    "gemma": dict(add_dummy_prefix=False, user_defined_symbols=SYMBOLS),
    "tidy": dict(remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc"),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_and_texts(name, tmp_path):
    ours, theirs = trained(tmp_path, **CASES[name])
    assert ours.vocab_size == theirs.vocab_size()
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        if name != "tidy":
            assert ours.decode(ids) == text
        stream = DecodeStream(ours)
        assert "".join([*map(stream.step, ids), stream.finish()]) == ours.decode(ids)
    assert ours.drops_first_space == (name != "gemma")


def test_the_space_in_front_of_a_text(tmp_path):
    ours, _ = trained(tmp_path)
    the = ours.encode("the")
    assert ours.decode(the) == "the" and ours.decode([*ours.encode("a"), *the]) == "a the"
    assert ours.bytes_of(the[0]).startswith(b" ")
    every = ours.encode_template("a</s>a")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "legacy": False}))
    first = read_tokenizer(str(tmp_path)).encode_template("a</s>a")
    assert every == [*ours.encode("a"), ours.eos_id, *ours.encode("a")] != first
    assert first[:2] == every[:2] and ours.decode(first[2:]) == "a"


def test_where_generation_stops(tmp_path):
    """What the folder's own configuration names, beside the end of a text and of a turn."""
    ours, _ = trained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.end_of_turn_id, ours.stop_ids) == (1, 2, 2, (2,))
    for ids, want in ((7, (2, 7)), ([9, 2, 7], (2, 7, 9)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert read_tokenizer(str(tmp_path)).stop_ids == want
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert read_tokenizer(str(tmp_path)).stop_ids == (2, 5)
    for bad in ("</s>", [1, "x"], -1):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.* is neither an id nor a list of ids"):
            read_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"\xff\xff\xff", {}, "not a SentencePiece model"),
        (b"", {}, r"model_type=1 is not supported; BPE \(2\) is"),
        (None, dict(model_type="unigram", hard_vocab_limit=False), "model_type=1 is not supported"),
    ],
)
def test_other_files_are_refused_in_one_line(content, options, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        if content is None:
            trained(tmp_path, **options)
        (tmp_path / "tokenizer.model").write_bytes(content)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
        read_tokenizer(str(tmp_path))
    assert "tokenizer.model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_in_which_control_tokens_can_be_typed_is_refused():
    """A unigram model looks its own control tokens up like any piece."""
    model = tokenizers.Tokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -3.0)], 0, False))
    model.decoder = decoders.Metaspace()
    model.add_special_tokens(["<s>", "</s>"])
    with pytest.raises(UserError, match="makes a control token of the plain text '</?s>'"):
        Tokenizer(model.to_str(), "", Controls("</s>", "</s>", "</s>", "</s>"))


def test_other_decoders_are_refused(tmp_path):
    model = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    model.add_special_tokens(["</s>"])
    for decoder, words in ((None, "decodes by nothing"), (decoders.CTC(), "decodes by CTC; supported are byte-level BPE")):
        if decoder is not None:
            model.decoder = decoder
        with pytest.raises(UserError, match=words):
            Tokenizer(model.to_str(), "", Controls("</s>", "</s>", "</s>", "</s>"))
