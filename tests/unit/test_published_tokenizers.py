"""Published vocabularies and chat templates, as the reference libraries read them.

Needs the files themselves: LLMJAX_TEST_DATA names a folder with chat_templates/*.jinja and tokenizers/cs336/.
"""

import gzip
import json
import os
import pathlib

import pytest

from llmjax.data.chat import encode_chat
from llmjax.data.tokenizer import Controls, Tokenizer, TokenizerConfig
from llmjax.errors import UserError
from llmjax.interop.hf_tokenizer import read_tokenizer

DATA = pathlib.Path(os.environ.get("LLMJAX_TEST_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="LLMJAX_TEST_DATA names no folder of published tokenizers")
TEMPLATES = sorted(path.name for path in (DATA / "chat_templates").glob("*.jinja"))
DIALOGUE = [
    {"role": "user", "content": " Hi there "},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is <|im_end|>?"},
    {"role": "assistant", "content": "See you."},
]
# Names of control tokens for which these templates ask.
CONTROLS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>"]
# The prompt for an answer is not how the answer's turn begins (thoughts are taken out of finished turns), or other fields
# than role and content are wanted.
BREAK_THE_PREFIX = ("R1", "deepseek-r1", "command-r-plus", "firefunction")


@pytest.fixture(scope="module", name="base")
def make_base():
    """A byte tokenizer that knows the control tokens of all the templates."""
    own = Tokenizer.train(iter(()), TokenizerConfig(kind="byte"))._serialized
    import tokenizers

    more = tokenizers.Tokenizer.from_str(own)
    more.add_special_tokens(CONTROLS)
    return more.to_str()


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name, base, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = (DATA / "chat_templates" / name).read_text(encoding="utf-8")
    tokenizer = Tokenizer(base, template, Controls("<|pad|>", "<|endoftext|>", "<|im_end|>"))
    tokenizer.save(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    dialogue = DIALOGUE[:3]
    if name.startswith("fireworks"):
        with pytest.raises(UserError, match="'functions' is undefined"):
            encode_chat(tokenizer, dialogue, add_generation_prompt=True)
        return
    got = tokenizer.decode(encode_chat(tokenizer, dialogue, add_generation_prompt=True).tokens)
    if "tool_use" in name:  # theirs hands over tools=None, over which these templates iterate
        assert all(message["content"].strip() in got for message in dialogue)
        return
    assert got == theirs.apply_chat_template(
        dialogue, add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_of_templates(name, base):
    template = (DATA / "chat_templates" / name).read_text(encoding="utf-8")
    tokenizer = Tokenizer(base, template, Controls("<|pad|>", "<|endoftext|>", "<|im_end|>"))
    if any(part in name for part in BREAK_THE_PREFIX):
        with pytest.raises(UserError, match="beginning|undefined"):
            encode_chat(tokenizer, DIALOGUE)
        return
    tokens, mask = encode_chat(tokenizer, DIALOGUE)
    said = tokenizer.decode([token for token, learnt in zip(tokens, mask) if learnt])
    assert "Hello!" in said and "See you." in said and "Hi there" not in said and "What" not in said
    assert any(token in tokenizer.special_ids for token, learnt in zip(tokens, mask) if learnt)


def test_gpt2_from_vocab_and_merges(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = DATA / "tokenizers" / "cs336"
    (tmp_path / "vocab.json").write_bytes(gzip.decompress((folder / "gpt2_vocab.json.gz").read_bytes()))
    (tmp_path / "merges.txt").write_bytes((folder / "gpt2_merges.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    ours = read_tokenizer(str(tmp_path))
    theirs = transformers.GPT2TokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert ours.vocab_size == 50257 and ours.end_id == ours.endoftext_id == 50256
    assert ours.encode("Hello, world!  It's 2026.") == [15496, 11, 995, 0, 220, 632, 338, 1160, 2075, 13]
    for name in ("address.txt", "german.txt", "tinystories_sample.txt", "corpus.en"):
        text = (folder / name).read_text(encoding="utf-8").replace("<|endoftext|>", "")
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
