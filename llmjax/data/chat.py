"""Dialogues -> tokens and loss mask, through a jinja2 chat template, with no way to forge a control token.

The text of a message is marked with private-use characters before the template is rendered. The result, without the marks,
is encoded as one text, as the reference libraries do it. Only if a control token would stand where a message speaks is the
text cut there, and the message encoded without control tokens: "<|end|>" typed by a user stays text. A template that takes such
a message apart is refused.
"""

import functools
import itertools
import json
import re
import typing
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmjax.annotations import did_you_mean
from llmjax.errors import UserError

if typing.TYPE_CHECKING:
    from llmjax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

DEFAULT_TEMPLATE = """\
<|endoftext|>
{%- for message in messages %}
    {%- if message.role == "system" %}
        {%- if not loop.first %}{{ raise_exception("a system message can only be the first") }}{% endif %}
        {{- "<|system|>" + message.content + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|user|>" + message.content + "<|end|>" }}
    {%- elif message.role == "assistant" %}
        {{- "<|assistant|>" }}
        {%- generation %}{{ message.content + "<|end|>" }}{% endgeneration %}
    {%- else %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}
"""
"""BOS, then each turn as <|role|>text<|end|>. The text and <|end|> of the assistant are generated. Every turn ends in a
control token, across which nothing merges, so the tokens of a dialogue's beginning are the beginning of its tokens."""

_CONTENT_BEGIN, _CONTENT_END, _GENERATION_BEGIN, _GENERATION_END = _MARKS = [chr(0xF5A30 + i) for i in range(4)]
_SPLIT = re.compile(f"([{''.join(_MARKS)}])")


class ChatTokens(NamedTuple):
    """tokens: ids. loss_mask, of the same length: 1 on what the assistant is to produce, its end of turn included."""

    tokens: list[int]
    loss_mask: list[int]


def encode_chat(
    tokenizer: "Tokenizer", messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> ChatTokens:
    """Tokens and loss mask of a dialogue in `tokenizer.chat_template`.

    Args:
        tokenizer: gives the template and the two encodings.
        messages: dicts with exactly "role" (one of ROLES) and "content" (any text; control tokens in it are text).
        add_generation_prompt: ends in the header of the assistant, ready to be continued. The same tokens begin the
            dialogue with the assistant's turn added.

    Raises:
        UserError: no message, a wrong role or field, or a template that fails. Where the assistant speaks: a template
            that has no {% generation %} block and whose rendering of a dialogue's beginning is not the beginning of its
            rendering of the dialogue, or that ends no turn with a control token.
    """
    marked = [_mark(message, number) for number, message in enumerate(messages, start=1)]
    if not marked:
        raise UserError("the dialogue has no message; give at least one")
    chat = _encode(tokenizer, marked, add_generation_prompt)
    _check_not_forged(tokenizer, messages, chat, add_generation_prompt)
    told = any(chat.loss_mask) or all(message["role"] != "assistant" for message in messages)
    if told or add_generation_prompt:  # nobody learns from a prompt
        return chat
    return _masked_by_prefixes(tokenizer, marked, chat)


def _check_not_forged(tokenizer: "Tokenizer", messages, chat: ChatTokens, add_generation_prompt: bool) -> None:
    """A template that takes texts apart loses their marks: then a typed control token would be one. Refuses that."""
    names = [name for name in tokenizer.control_names if any(name in message["content"] for message in messages)]
    if not names:
        return
    pattern = re.compile("|".join(map(re.escape, names)))
    harmless = [dict(message, content=pattern.sub("x", message["content"])) for message in messages]
    marked = [_mark(message, number) for number, message in enumerate(harmless, start=1)]
    want = _encode(tokenizer, marked, add_generation_prompt).tokens
    counts = [sum(token in tokenizer.control_ids for token in tokens) for tokens in (chat.tokens, want)]
    if counts[0] != counts[1]:
        raise UserError(f"chat template: it takes apart a message that says {names[0]!r}; mend it so that texts stay whole")


def _encode(tokenizer: "Tokenizer", marked: list[dict[str, str]], add_generation_prompt: bool) -> ChatTokens:
    variables = dict(messages=marked, add_generation_prompt=add_generation_prompt, **tokenizer.template_variables)
    return _encode_pieces(tokenizer, _render(tokenizer.chat_template, variables))


def _masked_by_prefixes(tokenizer: "Tokenizer", marked: list[dict[str, str]], chat: ChatTokens) -> ChatTokens:
    """The mask of a template without {% generation %}: what an assistant's turn adds to the prompt in front of it, up to
    the last control token, which ends the turn."""
    mask = [0] * len(chat.tokens)
    for number, message in enumerate(marked):
        if message["role"] != "assistant":
            continue
        before = _encode(tokenizer, marked[:number], True).tokens
        after = _encode(tokenizer, marked[: number + 1], False).tokens
        # Some templates close the whole dialogue with a token of its own, which is not there when it goes on.
        after = [here for here, there in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(after, chat.tokens))]
        if after[: len(before)] != before:
            raise UserError(
                "chat template: what it makes of a dialogue's beginning is not the beginning of what it makes of the "
                "dialogue, so the assistant's tokens cannot be told; put {% generation %} around its text"
            )
        controls = [i for i in range(len(before), len(after)) if after[i] in tokenizer.control_ids]
        if not controls:
            raise UserError("chat template: no control token ends the assistant's turn, so a model could not learn to stop")
        mask[len(before) : controls[-1] + 1] = [1] * (controls[-1] + 1 - len(before))
    return ChatTokens(chat.tokens, mask)


class _Text(str):
    """A marked text that stays marked when a template strips it."""

    def strip(self, chars=None):
        return _Text(f"{_CONTENT_BEGIN}{self[1:-1].strip(chars)}{_CONTENT_END}")

    def lstrip(self, chars=None):
        return _Text(f"{_CONTENT_BEGIN}{self[1:-1].lstrip(chars)}{_CONTENT_END}")

    def rstrip(self, chars=None):
        return _Text(f"{_CONTENT_BEGIN}{self[1:-1].rstrip(chars)}{_CONTENT_END}")


def _mark(message: Mapping[str, str], number: int) -> dict[str, str]:
    where = f"message {number}"
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise UserError(f"{where}: {key}={message.get(key)!r} is not text; give role and content")
    if message["role"] not in ROLES:
        raise UserError(f"{where}: unknown role '{message['role']}'; {did_you_mean(message['role'], ROLES)}")
    unknown = [key for key in message if key not in ("role", "content")]
    if unknown:
        raise UserError(f"{where}: unknown field '{unknown[0]}'; a message has role and content")
    if _SPLIT.search(message["content"]):
        raise UserError(f"{where}: holds a reserved private-use character (U+F5A30 to U+F5A33); remove it")
    return {"role": message["role"], "content": _Text(f"{_CONTENT_BEGIN}{message['content']}{_CONTENT_END}")}


def _render(template: str, variables: dict) -> str:
    try:
        return _compile(template).render(variables)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template line {error.lineno}: {error.message}; mend the template") from error
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        reason = _SPLIT.sub("", " ".join(str(error).split()))
        raise UserError(f"chat template: {reason}; mend the dialogue or the template") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _tojson  # jinja2's own escapes < and > for HTML
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: the body, marked as what the assistant produces (as in transformers)."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller) -> str:
        return f"{_GENERATION_BEGIN}{caller()}{_GENERATION_END}"


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _encode_pieces(tokenizer: "Tokenizer", rendered: str) -> ChatTokens:
    text, said, generated = _unmark(rendered)
    forged: set[tuple[int, int]] = set()
    cuts: set[int] = set()
    while True:
        tokens, places = _encode_between(tokenizer, text, cuts, forged)
        controls = [place for token, place in zip(tokens, places) if token in tokenizer.control_ids]
        found = {span for span in said if any(b < span[1] and e > span[0] for b, e in controls)} - forged
        # A token must not reach over the edge of what the assistant produces: at inference the prompt ends there.
        reached = {edge for span in generated for edge in span if any(b < edge < e for b, e in places)}
        if not found and not reached:
            return ChatTokens(tokens, [int(any(b <= at < e for b, e in generated)) for at, _ in places])
        forged |= found
        cuts |= reached.union(*found)


def _unmark(rendered: str) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
    """The text, and as spans in it: what messages say, what the assistant produces."""
    text, said, generated = "", [], []
    opened: dict[str, int] = {}
    for piece in _SPLIT.split(rendered):
        if piece in (_CONTENT_BEGIN, _CONTENT_END):
            if (_CONTENT_BEGIN in opened) == (piece == _CONTENT_BEGIN):
                raise UserError("chat template: it takes a message's text apart; mend it so that texts stay whole")
            if piece == _CONTENT_BEGIN:
                opened[piece] = len(text)
            else:
                said.append((opened.pop(_CONTENT_BEGIN), len(text)))
        elif piece == _GENERATION_BEGIN:
            opened[piece] = len(text)
        elif piece == _GENERATION_END:
            generated.append((opened.pop(_GENERATION_BEGIN), len(text)))
        else:
            text += piece
    if opened:
        raise UserError("chat template: it takes a message's text apart; mend it so that texts stay whole")
    return text, said, generated


def _encode_between(
    tokenizer: "Tokenizer", text: str, cuts: set[int], forged: set[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the text between the cuts, and their spans; those of `forged` spans without control tokens."""
    tokens, places = [], []
    for begin, end in itertools.pairwise(sorted({0, len(text)} | cuts)):
        plain = any(b <= begin and end <= e for b, e in forged)
        ids, offsets = tokenizer.encode_with_offsets(text[begin:end], control_tokens=not plain)
        tokens += ids
        places += [(begin + start, begin + stop) for start, stop in offsets]
    return tokens, places
