"""A SentencePiece model (tokenizer.model of Llama-2, Mistral, Gemma) as the tokenizer.json that computes the same.

arXiv:1808.06226. Pieces and settings are read by SentencePiece's own schema; encoding is that of `tokenizers`.
"""

from __future__ import annotations

import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llmjax.errors import UserError

_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"


def tokenizer_json(path: str, prefix_each_section: bool = True) -> str:
    """The serialized tokenizer. prefix_each_section: the space in front of a text also stands behind each control token
    ("legacy" in tokenizer_config.json). Raises UserError if the file is no SentencePiece model of the BPE kind."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyrefly: ignore[missing-attribute]
    try:
        model.ParseFromString(pathlib.Path(path).read_bytes())
    except Exception as error:  # protobuf's own, which is no subclass of another
        raise UserError(f"{path}: not a SentencePiece model ({error})") from error
    kind, normalizer = model.trainer_spec.model_type, model.normalizer_spec
    if kind != _BPE or not model.pieces:
        raise UserError(f"{path}: SentencePiece model_type={kind} is not supported; BPE (2) is")
    tokenizer = tokenizers.Tokenizer(_bpe(model))
    in_normalizer = normalizer.add_dummy_prefix and prefix_each_section
    steps = [normalizers.Precompiled(normalizer.precompiled_charsmap)] if normalizer.precompiled_charsmap else []
    if normalizer.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if in_normalizer else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if normalizer.add_dummy_prefix and not prefix_each_section:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    # Such symbols are looked for behind normalisation; a prefix put before them there would hide them.
    own = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=not in_normalizer) for name in own])
    return tokenizer.to_str()


def _bpe(model) -> models.BPE:
    """Any two pieces that make a third one merge, the better-scored result first."""
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []
    for piece in model.pieces:
        if piece.type not in (_NORMAL, _USER_DEFINED):
            continue
        halves = ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += [(-piece.score, pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    merges.sort(key=lambda merge: merge[0])
    return models.BPE(
        vocab=ids,
        merges=[pair for _, pair in merges],
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )
