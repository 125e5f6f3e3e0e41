"""Byte-level BPE over HF `tokenizers`: any valid UTF-8 text round-trips, and control tokens cannot be typed.

The pre-tokenisation is GPT-2's (Radford et al. 2019): a word with its leading space, digits, punctuation, white space.
"""

import codecs
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmjax.data.chat import DEFAULT_TEMPLATE
from llmjax.errors import UserError
from llmjax.files import read_json, read_text, whole_folder

PAD, ENDOFTEXT, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = (
    "<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)
"""Padding; between documents, and the first token of every text; the three roles; the end of a turn. Ids 0 to 5."""

_TOKENIZER_FILE, _TEMPLATE_FILE, _CONFIG_FILE = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"
_MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


@dataclass(frozen=True)
class TokenizerConfig:
    """kind "bpe" learns `vocab_size` tokens, control tokens and the 256 bytes included; "byte" has only these 262."""

    kind: Literal["bpe", "byte"] = "bpe"
    vocab_size: int = 1024

    def validate(self) -> None:
        """Raises UserError if the vocabulary cannot hold every byte and every control token."""
        if self.kind == "bpe" and self.vocab_size < _MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is less than {_MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} "
                f"control tokens); use at least {_MIN_VOCAB_SIZE}, or kind=byte"
            )


@dataclass(frozen=True)
class Controls:
    """Names of the control tokens that training needs: padding; between documents and first of a text; end of a turn."""

    pad: str = PAD
    endoftext: str = ENDOFTEXT
    end: str = END


class Tokenizer:
    """Text <-> token ids. Immutable. Made by `train` or `load`, or from a Hugging Face folder (`llmjax.interop`).

    Attributes:
        chat_template: jinja2 source that `llmjax.data.chat.encode_chat` renders.
        controls: which of its tokens mean what.
    """

    def __init__(self, serialized: str, chat_template: str = DEFAULT_TEMPLATE, controls: Controls = Controls()):
        """From the text of a tokenizer.json whose model is a byte-level BPE with the tokens of `controls`."""
        # Two copies of one model: they differ only in whether the text of a control token becomes its id.
        self._template = tokenizers.Tokenizer.from_str(serialized)
        self._plain = tokenizers.Tokenizer.from_str(serialized)
        self._plain.encode_special_tokens = True
        self._serialized = serialized
        self.chat_template = chat_template
        self.controls = controls
        for token in (controls.pad, controls.endoftext, controls.end):
            if self._plain.token_to_id(token) is None:
                raise UserError(f"the tokenizer has no control token {token!r}; train one with llmjax")
        decoder = self._template.decoder
        if decoder is None or "ByteLevel" not in str(decoder):
            raise UserError("the tokenizer is not a byte-level BPE, the only kind whose tokens are plain bytes")

    @classmethod
    def train(cls, texts: Iterable[str], cfg: TokenizerConfig) -> "Tokenizer":
        """Learns the merges from `texts` (read once). The same texts in the same order give the same tokenizer.

        A corpus too small for cfg.vocab_size merges gives a smaller vocabulary. "byte" reads no text; byte b has id
        b + 6. Raises UserError if cfg is not valid.
        """
        cfg.validate()
        if cfg.kind == "byte":
            names = list(SPECIAL_TOKENS) + list(_byte_to_char().values())
            tokenizer = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
            tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        else:
            tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        if cfg.kind == "bpe":
            trainer = trainers.BpeTrainer(
                vocab_size=cfg.vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            )
            tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads what `save` wrote. Raises UserError if a file is missing or is not what it should be."""
        folder = pathlib.Path(folder)
        serialized, template = read_text(folder / _TOKENIZER_FILE), read_text(folder / _TEMPLATE_FILE)
        config = read_json(folder / _CONFIG_FILE)
        try:
            return cls(serialized, template, Controls(*(config[f"{name}_token"] for name in ("pad", "bos", "eos"))))
        except UserError as error:
            raise UserError(f"{folder / _TOKENIZER_FILE}: {error}") from error
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise UserError(f"{folder / _TOKENIZER_FILE}: not a tokenizer ({error}); restore or retrain it") from error

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, chat_template.jinja and tokenizer_config.json, all or nothing.

        transformers' `AutoTokenizer.from_pretrained(folder)` reads them, offline. Raises UserError if the folder cannot
        be written or holds other files.
        """
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "pad_token": self.controls.pad, "bos_token": self.controls.endoftext, "eos_token": self.controls.end,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        with whole_folder(folder) as new:
            (new / _TOKENIZER_FILE).write_text(self._serialized, encoding="utf-8")
            (new / _TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
            (new / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """16 hex digits that change with the vocabulary, the merges or the chat template."""
        return hashlib.sha256(f"{self._serialized}\0{self.chat_template}".encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, of which nothing is a control token: "<|end|>" in it is seven plain characters.

        Raises UserError if `text` holds a lone surrogate, which UTF-8 cannot express.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return _encode(self._plain, texts)

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted `text`, in which "<|end|>" is the control token. Not for the text of a user or of a corpus."""
        return _encode(self._template, [text])[0]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; decode(encode(text)) == text. Bytes that are not UTF-8 become U+FFFD.

        skip_special: control tokens become nothing rather than their text. So does an id beyond the vocabulary, which a
        model may produce whose table of embeddings was padded.
        """
        hidden = self.special_ids if skip_special else frozenset()
        return b"".join(b"" if i in hidden else self.bytes_of(i) for i in ids).decode("utf-8", "replace")

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; for a control token its text; b"" beyond the vocabulary."""
        return self._bytes[token] if token < len(self._bytes) else b""

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """Id -> the bytes it stands for; for a control token its text."""
        char_to_byte = {char: byte for byte, char in _byte_to_char().items()}
        table = [b""] * self.vocab_size
        added = self._plain.get_added_tokens_decoder()
        for token, i in self._plain.get_vocab().items():
            table[i] = token.encode() if i in added else bytes(char_to_byte[char] for char in token)
        return table

    def token_bytes(self) -> np.ndarray:
        """[V] int32: UTF-8 bytes of each token, 0 for control tokens; nats / (bytes * ln 2) is bits per byte."""
        return np.array([0 if i in self.special_ids else len(b) for i, b in enumerate(self._bytes)], np.int32)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included; the largest id and one, where a vocabulary has gaps."""
        return max(self._plain.get_vocab().values()) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(i for i, token in self._plain.get_added_tokens_decoder().items() if token.special)

    @property
    def template_variables(self) -> dict[str, str]:
        """Names of control tokens that a chat template may use."""
        return {"bos_token": self.controls.endoftext, "eos_token": self.controls.end, "pad_token": self.controls.pad}

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self._plain.token_to_id(self.controls.pad)

    @property
    def endoftext_id(self) -> int:
        """Id of the token between documents, which is also the first of every text."""
        return self._plain.token_to_id(self.controls.endoftext)

    @property
    def end_id(self) -> int:
        """Id of the end of a turn."""
        return self._plain.token_to_id(self.controls.end)


class DecodeStream:
    """Text of tokens as they come; a character whose bytes are not yet all there is withheld.

    The pieces of `step` and `finish`, joined, are `tokenizer.decode(ids, skip_special)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._bytes_of = tokenizer.bytes_of
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        return "" if token in self._hidden else self._decoder.decode(self._bytes_of(token))

    def finish(self) -> str:
        """What is still withheld, as U+FFFD; the stream can then be used anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError as error:
        bad = next((text for text in texts if isinstance(text, str) and re.search("[\ud800-\udfff]", text)), None)
        if bad is None:
            raise
        raise UserError(f"text {bad[:20]!r} holds a lone surrogate, not valid Unicode; remove it") from error


def _byte_to_char() -> dict[int, str]:
    """GPT-2's byte -> printable character: itself where printable, else the next unused code point from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return dict(sorted(table.items()))
