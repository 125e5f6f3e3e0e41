"""The bytes that each token of a vocabulary stands for, read from the tokenizer's own decoder."""

from __future__ import annotations

import json
import re

import tokenizers

from llmjax.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PLAIN = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
_ANCHOR = "a"


def check_decoder(tokenizer: tokenizers.Tokenizer) -> None:
    """Raises UserError unless every token of `tokenizer` stands for the same bytes wherever it is."""
    kinds = _decoder_kinds(tokenizer)
    unknown = [kind for kind in kinds if kind != "ByteLevel" and kind not in _PLAIN]
    if unknown or not kinds:
        raise UserError(
            f"the tokenizer decodes by {unknown[0] if unknown else 'nothing'}; supported are byte-level BPE, SentencePiece "
            "and WordPiece"
        )


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> list[str]:
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def token_table(tokenizer: tokenizers.Tokenizer, size: int) -> list[bytes]:
    """Id -> bytes within a text; of a control token its name, b"" for ids that are not used."""
    to_bytes = _byte_level(tokenizer) if "ByteLevel" in _decoder_kinds(tokenizer) else _by_decoder(tokenizer)
    table = [b""] * size
    for token, i in tokenizer.get_vocab().items():
        table[i] = to_bytes(token)
    return table


def drops_first_space(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a text loses the space that its first token begins with, because encoding has put it there."""
    if "ByteLevel" in _decoder_kinds(tokenizer):
        return False
    to_bytes = _by_decoder(tokenizer)
    spaced = next((token for token in tokenizer.get_vocab() if re.match(rb" (?! )", to_bytes(token))), None)
    return spaced is not None and not tokenizer.decoder.decode([spaced]).startswith(" ")


def _byte_level(tokenizer: tokenizers.Tokenizer):
    char_to_byte = {char: byte for byte, char in byte_to_char().items()}
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return lambda token: token.encode() if token in added else bytes(char_to_byte[char] for char in token)


def _by_decoder(tokenizer: tokenizers.Tokenizer):
    """What a token adds behind another one."""
    decode, has_bytes = tokenizer.decoder.decode, "ByteFallback" in _decoder_kinds(tokenizer)
    anchor = decode([_ANCHOR])

    def to_bytes(token: str) -> bytes:
        byte = _BYTE.fullmatch(token) if has_bytes else None
        return bytes([int(byte[1], 16)]) if byte else decode([_ANCHOR, token])[len(anchor) :].encode()

    return to_bytes


def byte_to_char() -> dict[int, str]:
    """GPT-2's byte -> printable character: itself where printable, else the next unused code point from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return dict(sorted(table.items()))
