"""Text <-> tokens over HF `tokenizers`: control tokens cannot be typed, and what is trained here round-trips any UTF-8 text.

Trained are byte-level BPEs with GPT-2's pre-tokenisation (Radford et al. 2019): a word with its leading space, digits,
punctuation, white space. Loaded are others too.
"""

import codecs
import datetime
import functools
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmjax.config import PositiveInt, validate
from llmjax.data.template import DEFAULT_TEMPLATE
from llmjax.data.vocabulary import byte_to_char, check_decoder, drops_first_space, token_table
from llmjax.errors import UserError
from llmjax.files import read_json, read_text, whole_folder

PAD, END_OF_TEXT, SYSTEM, USER, ASSISTANT, END_OF_TURN = SPECIAL_TOKENS = (
    "<|pad|>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)
"""Padding; between documents, and the first token of every text; the three roles; the end of a turn. Ids 0 to 5."""

_TOKENIZER_FILE, _TEMPLATE_FILE, _CONFIG_FILE = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"
_MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
MAX_WORD = 512  # characters; longer runs without white space are cut where merges are learnt
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")
OTHER_TOKENS = ("unk_token", "sep_token", "cls_token", "mask_token")
"""Further control tokens that a published tokenizer names, and a chat template may."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that an experiment trains on the text of its first stage, where it does not start from a model's own.

    kind: "bpe" learns tokens, "byte" has the 256 bytes and the control tokens only. vocab_size: of a BPE, control tokens and
    the 256 bytes included. train_chars: a BPE is learnt from so many characters, from the beginning of the text.
    """

    kind: Literal["bpe", "byte"] = "bpe"
    vocab_size: PositiveInt = 1024
    train_chars: PositiveInt = 2**28

    def validate(self) -> None:
        """Raises UserError if the vocabulary cannot hold every byte and every control token."""
        if self.kind == "bpe" and self.vocab_size < _MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is less than {_MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} "
                f"control tokens); use at least {_MIN_VOCAB_SIZE}, or kind=byte"
            )

    @property
    def size(self) -> int:
        """Number of ids that the tokenizer is going to have, if its text is large enough."""
        return self.vocab_size if self.kind == "bpe" else _MIN_VOCAB_SIZE


@dataclass(frozen=True)
class Controls:
    """The control tokens that training and generation need, by name.

    pad: padding. bos: in front of every text. eos: behind every document. end_of_turn: what ends an assistant's turn in the
    chat template; may be eos. stop_ids: further ids at which generation stops. others: what else a template may name
    ("unk_token": "<unk>"). assumed: which of "pad" and "bos" the model itself does not have; eos stands in for them, but not
    in a template.
    """

    pad: str = PAD
    bos: str = END_OF_TEXT
    eos: str = END_OF_TEXT
    end_of_turn: str = END_OF_TURN
    stop_ids: tuple[int, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


class Tokenizer:
    """Text <-> token ids. Immutable. Made by `train` or `load`, or from a Hugging Face folder (`llmjax.interop`).

    Attributes:
        chat_template: jinja2 source that `llmjax.data.template.encode_chat` renders.
        controls: which of its tokens mean what.
        date: what strftime_now of a chat template tells, "2026-01-31"; "" for the day on which it is rendered.
    """

    def __init__(
        self, serialized: str, chat_template: str = DEFAULT_TEMPLATE, controls: Controls = Controls(), date: str = ""
    ):
        """From the text of a tokenizer.json that has the tokens of `controls`."""
        # Two copies of one model: they differ only in whether the text of a control token becomes its id.
        self._template = tokenizers.Tokenizer.from_str(serialized)
        self._plain = tokenizers.Tokenizer.from_str(_with_template_tokens_special(serialized, chat_template))
        self._plain.encode_special_tokens = True
        for copy in (self._template, self._plain):  # a published file may carry both
            copy.no_truncation()
            copy.no_padding()
            copy.post_processor = None  # it adds tokens that are not wanted, or takes the spaces out of offsets
        self._serialized = serialized
        self.chat_template = chat_template
        self.controls = controls
        self.date = date
        for token in (controls.pad, controls.bos, controls.eos, controls.end_of_turn):
            self._id(token)
        check_decoder(self._plain)
        names = sorted(self.control_names)
        for name, *found in zip(names, self.encode_batch(names), self.encode_batch([f"x{name}x" for name in names])):
            if any(self._plain.token_to_id(name) in ids for ids in found):
                raise UserError(f"the tokenizer makes a control token of the plain text {name!r}; use a BPE")

    def _id(self, control: str) -> int:
        found = self._plain.token_to_id(control)
        if found is None:
            raise UserError(f"the tokenizer has no control token {control!r}; train one with llmjax")
        return found

    @classmethod
    def train(cls, texts: Iterable[str], cfg: TokenizerConfig) -> "Tokenizer":
        """Learns the merges from `texts` (read once). The same texts in the same order give the same tokenizer.

        A corpus too small for cfg.vocab_size merges gives a smaller vocabulary. "byte" reads no text; byte b has id
        b + 6. Ctrl-C is heeded. Raises UserError if cfg is not valid.
        """
        validate(cfg)
        if cfg.kind == "byte":
            names = list(SPECIAL_TOKENS) + list(byte_to_char().values())
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
            words = _bounded(texts, cfg.train_chars)
            _interruptible(lambda: tokenizer.train_from_iterator(words, trainer))
        return cls(tokenizer.to_str())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads what `save` wrote. Raises UserError if a file is missing or is not what it should be."""
        folder = pathlib.Path(folder)
        serialized, template = read_text(folder / _TOKENIZER_FILE), read_text(folder / _TEMPLATE_FILE)
        config = read_json(folder / _CONFIG_FILE)
        try:
            pad, bos, eos, end_of_turn = (config[f"{name}_token"] for name in ("pad", "bos", "eos", "end_of_turn"))
            others = {name: config[name] for name in OTHER_TOKENS if name in config}
            assumed = tuple(name for name, token in (("pad", pad), ("bos", bos)) if token is None)
            controls = Controls(pad or eos, bos or eos, eos, end_of_turn, tuple(config["stop_ids"]), others, assumed)
            return cls(serialized, template, controls, config["date"])
        except KeyError as error:
            missing = error.args[0]
            raise UserError(f"{folder / _CONFIG_FILE}: no {missing!r}; restore the file or train the tokenizer anew") from error
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
            "pad_token": None, "bos_token": None, **self.template_variables, "date": self.date,
            "end_of_turn_token": self.controls.end_of_turn, "stop_ids": list(self.controls.stop_ids),
            "model_input_names": ["input_ids", "attention_mask"],
        }  # fmt: skip
        with whole_folder(folder) as new:
            (new / _TOKENIZER_FILE).write_text(self._serialized, encoding="utf-8")
            (new / _TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
            (new / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """16 hex digits that change with the vocabulary, the merges, the chat template or its date."""
        return hashlib.sha256(f"{self._serialized}\0{self.chat_template}\0{self.date}".encode()).hexdigest()[:16]

    def on(self, date: str) -> "Tokenizer":
        """The same with another `date`."""
        return Tokenizer(self._serialized, self.chat_template, self.controls, date)

    def now(self, form: str) -> str:
        """`date`, or the time of day, by the rules of strftime."""
        now = datetime.datetime.fromisoformat(self.date) if self.date else datetime.datetime.now()
        return now.strftime(form)

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

    def encode_with_offsets(self, text: str, control_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [begin, end) of `text` that it stands for.

        control_tokens: as in `encode_template`, else as in `encode`.
        """
        encoding = _encodings(self._template if control_tokens else self._plain, [text], "encode_batch")[0]
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; decode(encode(text)) == text. Bytes that are not UTF-8 become U+FFFD.

        skip_special: control tokens become nothing rather than their text. So does an id beyond the vocabulary, which a
        model may produce whose table of embeddings was padded.
        """
        hidden = self.special_ids if skip_special else frozenset()
        text = b"".join(b"" if i in hidden else self.bytes_of(i) for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; for a control token its text; b"" beyond the vocabulary."""
        return self._bytes[token] if token < len(self._bytes) else b""

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """Id -> the bytes it stands for; for a control token its text."""
        return token_table(self._plain, self.vocab_size)

    @functools.cached_property
    def drops_first_space(self) -> bool:
        """Whether encoding puts a space in front of a text (SentencePiece), which decoding takes away again."""
        return drops_first_space(self._plain)

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
        return frozenset(i for i, token in self._template.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that no message may contain: the control tokens, and other added tokens that the chat template writes."""
        unknown = getattr(self._plain.model, "unk_token", None)
        added = self._plain.get_added_tokens_decoder().items()
        return frozenset(i for i, token in added if token.special and token.content != unknown)

    @functools.cached_property
    def control_names(self) -> frozenset[str]:
        """The texts of `control_ids`."""
        return frozenset(name for i in self.control_ids if (name := self._plain.id_to_token(i)) is not None)

    @property
    def template_variables(self) -> dict[str, str]:
        """The control tokens that a chat template may name: those that the model has."""
        own = {"bos": self.controls.bos, "eos": self.controls.eos, "pad": self.controls.pad}
        named = {f"{name}_token": token for name, token in own.items() if name not in self.controls.assumed}
        return named | dict(self.controls.others)

    @property
    def pad_id(self) -> int:
        """Id of padding."""
        return self._id(self.controls.pad)

    @property
    def bos_id(self) -> int:
        """Id of the first token of every text."""
        return self._id(self.controls.bos)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document; may be bos_id."""
        return self._id(self.controls.eos)

    @property
    def end_of_turn_id(self) -> int:
        """Id of the token that ends the assistant's turn."""
        return self._id(self.controls.end_of_turn)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which an answer ends, sorted: end of turn, end of document, and what the model's own folder names."""
        return tuple(sorted({self.end_of_turn_id, self.eos_id, *self.controls.stop_ids}))


class DecodeStream:
    """Text of tokens as they come; a character whose bytes are not yet all there is withheld.

    The pieces of `step` and `finish`, joined, are `tokenizer.decode(ids, skip_special)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._bytes_of = tokenizer.bytes_of
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_first_space = self._at_beginning = tokenizer.drops_first_space

    def step(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        if token in self._hidden:
            return ""
        text = self._decoder.decode(self._bytes_of(token))
        if text and self._at_beginning:
            text, self._at_beginning = text.removeprefix(" "), False
        return text

    def finish(self) -> str:
        """What is still withheld, as U+FFFD; the stream can then be used anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_beginning = self._drops_first_space
        return rest


def _bounded(texts: Iterable[str], most: int) -> Iterator[str]:
    """The first `most` characters of all texts together, long words cut: learning merges takes time quadratic in a word."""
    for text in texts:
        text = text[:most]
        most -= len(text)
        start = 0
        for word in _LONG_WORD.finditer(text):
            yield text[start : word.start()]
            yield from (word[0][i : i + MAX_WORD] for i in range(0, len(word[0]), MAX_WORD))
            start = word.end()
        yield text[start:] if start else text
        if most <= 0:
            return


def _interruptible(work: Callable[[], None]) -> None:
    """Runs `work`, which may not look for signals for minutes, so that Ctrl-C raises KeyboardInterrupt at once.

    The thread it leaves behind then ends with the process.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # handed on below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if raised:
        raise raised[0]


def _with_template_tokens_special(serialized: str, chat_template: str) -> str:
    """The same tokenizer, in which added tokens that the template writes are special even if the file does not say so."""
    contents = json.loads(serialized)
    written = [t for t in contents.get("added_tokens") or [] if t["content"].strip() and t["content"] in chat_template]
    if all(token["special"] for token in written):
        return serialized
    for token in written:
        token["special"] = True
    return json.dumps(contents)


def _encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in _encodings(tokenizer, texts, "encode_batch_fast")]


def _encodings(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], method: str) -> list[tokenizers.Encoding]:
    try:
        return getattr(tokenizer, method)(texts, add_special_tokens=False)
    except TypeError as error:
        bad = next((text for text in texts if isinstance(text, str) and re.search("[\ud800-\udfff]", text)), None)
        if bad is None:
            raise
        raise UserError(f"text {bad[:20]!r} holds a lone surrogate, not valid Unicode; remove it") from error
