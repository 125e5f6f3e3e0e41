"""The tokenizer of a Hugging Face folder, with its chat template.

That is tokenizer.json, else a SentencePiece tokenizer.model, else GPT-2's vocab.json and merges.txt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llmjax.data.records import Message
from llmjax.data.template import encode_chat
from llmjax.data.tokenizer import OTHER_TOKENS, Controls, Tokenizer
from llmjax.errors import UserError
from llmjax.files import read_json, read_text
from llmjax.interop.sentencepiece_model import tokenizer_json

PLAIN_TEMPLATE = """\
{{- bos_token or eos_token }}
{%- for message in messages %}
    {{- {"system": "System", "user": "User", "assistant": "Assistant"}[message.role] + ": " }}
    {%- if message.role == "assistant" %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content + "\\n\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "Assistant: " }}{% endif %}
"""
"""For a base model, which has no template: roles in words, so that no token is needed that it does not know."""


def read_tokenizer(folder: str, model: Mapping[str, Any] | None = None) -> Tokenizer:
    """Tokenizer, chat template and control tokens of a folder. model: its config.json, where the folder does not hold that.

    The end of a turn is the last control token that the template writes behind an assistant's text, else eos_token.
    Generation stops there, at eos_token, and at what eos_token_id of generation_config.json and config.json names. Raises
    UserError, naming the file, if there is no tokenizer, or none of a supported kind.
    """
    config = _optional_json(os.path.join(folder, "tokenizer_config.json"))
    path, serialized = _serialized(folder, config)
    names = {name: _token(config.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
    eos = names["eos"] or names["bos"]
    if eos is None:
        raise UserError(f"{folder}: tokenizer_config.json names no eos_token, so a model could not learn to stop")
    others = {name: token for name in OTHER_TOKENS if (token := _token(config.get(name))) is not None}
    assumed = tuple(name for name in ("pad", "bos") if names[name] is None)
    controls = Controls(names["pad"] or eos, names["bos"] or eos, eos, eos, _stop_ids(folder, model or {}), others, assumed)
    template = _template(folder, config) or PLAIN_TEMPLATE
    try:
        tokenizer = Tokenizer(serialized, template, controls)
        turn = (Message("user", "hello"), Message("assistant", "hello"))
        ends = [i for i, produced in zip(*encode_chat(tokenizer, turn)) if produced and i in tokenizer.control_ids]
        return Tokenizer(serialized, template, replace(controls, end_of_turn=tokenizer.decode(ends[-1:]) or eos))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:  # the tokenizers library raises bare Exception for any malformed file
        raise UserError(f"{path}: not a tokenizer ({error})") from error


def _stop_ids(folder: str, model: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids at which the model's own configuration ends a text."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        known = _optional_json(path) or (model if name == "config.json" else {})
        ids = known.get("eos_token_id")
        for one in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if not isinstance(one, int) or one < 0:
                raise UserError(f"{path}: eos_token_id={ids!r} is neither an id nor a list of ids; mend the file")
            found.add(one)
    return tuple(sorted(found))


def _serialized(folder: str, config: dict[str, Any]) -> tuple[str, str]:
    """The file with the vocabulary, and the text of a tokenizer.json."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        return path, read_text(path)
    path = os.path.join(folder, "tokenizer.model")
    if os.path.exists(path):
        return path, tokenizer_json(path, prefix_each_section=config.get("legacy") is not False)
    return os.path.join(folder, "vocab.json"), _gpt2(folder)


def _optional_json(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.exists(path) else {}


def _token(value: Any) -> str | None:
    """A token's text, which may stand there alone or as the field of an object."""
    return value["content"] if isinstance(value, dict) else value


def has_chat_template(folder: str) -> bool:
    """Whether the folder says how a dialogue is written; that of a base model says nothing."""
    return bool(_template(folder, _optional_json(os.path.join(folder, "tokenizer_config.json"))))


def _template(folder: str, config: dict[str, Any]) -> str:
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.exists(path):
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or ""


def _gpt2(folder: str) -> str:
    vocab, merges = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt"))
    if not (os.path.exists(vocab) and os.path.exists(merges)):
        raise UserError(f"{folder}: holds no tokenizer.json, tokenizer.model, nor vocab.json with merges.txt")
    lines = [line for line in read_text(merges).split("\n") if line and not line.startswith("#version")]
    pairs: Any = [tuple(line.split(" ")) for line in lines]
    ids = read_json(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in ids if token.startswith("<|") and token.endswith("|>")])
    return tokenizer.to_str()
