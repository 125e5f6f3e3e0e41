"""Dialogues -> tokens and loss mask, through a jinja2 chat template, with no way to forge a control token.

The text of a message is marked with private-use characters before the template is rendered. The result, without the marks,
is encoded as one text, as the reference libraries do it. Only if a control token would stand where a message speaks is the
text cut there, and the message encoded without control tokens: "<|end|>" typed by a user stays text. A template that takes such
a message apart is refused.
"""

import bisect
import functools
import itertools
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmjax.config import did_you_mean
from llmjax.data.records import ROLES, Message
from llmjax.errors import UserError

if typing.TYPE_CHECKING:
    from llmjax.data.tokenizer import Tokenizer

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
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
) -> ChatTokens:
    """Tokens and loss mask of a dialogue in `tokenizer.chat_template`.

    Args:
        tokenizer: gives the template and the two encodings.
        messages: control tokens in their content are text.
        tools: definitions of tools that the assistant may call, as JSON values.
        add_generation_prompt: ends in the header of the assistant, ready to be continued. The same tokens begin the
            dialogue with the assistant's turn added.

    Raises:
        UserError: no message, a wrong role, a control token in a tool's call or definition, or a template that fails. Where
            the assistant speaks: a template that has no {% generation %} block and by which no turn of the assistant adds
            to the prompt in front of it, or that ends no turn with a control token.
    """
    marked = _marks(tokenizer, messages)
    if not marked:
        raise UserError("the dialogue has no message; give at least one")
    _check_extras(tokenizer, messages, tools)
    variables = dict(
        tools=[dict(tool) for tool in tools] or None, documents=None, strftime_now=tokenizer.now, **tokenizer.template_variables
    )
    chat = _encode(tokenizer, marked, add_generation_prompt, variables)
    _check_not_forged(tokenizer, messages, chat, add_generation_prompt, variables)
    return chat


def _check_extras(tokenizer: "Tokenizer", messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Calls and definitions of tools go through the template as they are, so they must not hold a control token."""
    for where, value in (("tools", tools), *((f"message {n}", m.extra) for n, m in enumerate(messages, start=1))):
        for text in _strings(value):
            found = next((name for name in tokenizer.control_names if name in text), None)
            if found:
                raise UserError(f"{where}: {text[:40]!r} holds the control token {found!r}; remove it")


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain(value, *map(_strings, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain(*map(_strings, value))


def _check_not_forged(tokenizer: "Tokenizer", messages: Sequence[Message], chat: ChatTokens, prompt: bool, variables) -> None:
    """A template that takes texts apart loses their marks: then a typed control token would be one. Refuses that."""
    names = [name for name in tokenizer.control_names if any(name in (message.content or "") for message in messages)]
    if not names:
        return
    pattern = re.compile("|".join(map(re.escape, names)))
    harmless = [Message(m.role, m.content and pattern.sub("x", m.content), m.extra) for m in messages]
    want = _encode(tokenizer, _marks(tokenizer, harmless), prompt, variables).tokens
    counts = [sum(token in tokenizer.control_ids for token in tokens) for tokens in (chat.tokens, want)]
    if counts[0] != counts[1]:
        raise UserError(f"chat template: it takes apart a message that says {names[0]!r}; mend it so that texts stay whole")


def _encode(tokenizer: "Tokenizer", marked: list[dict[str, Any]], add_generation_prompt: bool, variables) -> ChatTokens:
    def render(count: int, prompt: bool) -> str:
        return _render(
            tokenizer.chat_template, dict(messages=marked[:count], add_generation_prompt=prompt, **variables)
        )

    text, said, generated = _unmark(render(len(marked), add_generation_prompt))
    if generated or all(message["role"] != "assistant" for message in marked):
        return _encode_spans(tokenizer, text, said, generated)
    generated = _spans_by_prefixes(text, marked, render)
    if add_generation_prompt:  # nobody learns from a prompt, but its tokens are those of the dialogue
        tokens = _encode_spans(tokenizer, text, said, generated).tokens
        return ChatTokens(tokens, [0] * len(tokens))
    if not generated:
        raise UserError(
            "chat template: what it makes of a dialogue's beginning is not the beginning of what it makes of the "
            "dialogue, so the assistant's tokens cannot be told; put {% generation %} around its text"
        )
    chat = _encode_spans(tokenizer, text, said, generated)
    return ChatTokens(chat.tokens, _up_to_end_of_turn(tokenizer, chat))


def _spans_by_prefixes(text: str, marked: list[dict[str, Any]], render) -> list[tuple[int, int]]:
    """What the assistant produces by a template without {% generation %}: what its turn adds to the prompt in front of it.

    A turn whose prompt is not how the dialogue begins is not among them (some templates move the system message or the tools to
    the last question): a model would learn to answer what it is never asked so.
    """
    spans = []
    for number, message in enumerate(marked):
        if message["role"] != "assistant":
            continue
        before, after = (_unmark(render(*given))[0] for given in ((number, True), (number + 1, False)))
        # Some templates close the whole dialogue with a token of its own, which is not there when it goes on.
        end = len(os.path.commonprefix([after, text]))
        if after.startswith(before) and end > len(before):
            spans.append((len(before), end))
    return spans


def _up_to_end_of_turn(tokenizer: "Tokenizer", chat: ChatTokens) -> list[int]:
    """The loss mask without what stands behind the last control token of each stretch, which ends the turn."""
    mask = list(chat.loss_mask)
    stretches = [list(group) for on, group in itertools.groupby(range(len(mask)), key=mask.__getitem__) if on]
    for places in stretches:
        controls = [i for i in places if chat.tokens[i] in tokenizer.control_ids]
        if not controls:
            raise UserError("chat template: no control token ends the assistant's turn, so a model could not learn to stop")
        for i in range(controls[-1] + 1, places[-1] + 1):
            mask[i] = 0
    return mask


class _Text(str):
    """A marked text that stays marked when a template strips it."""

    def strip(self, chars: str | None = None) -> str:
        return _marked(self[1:-1].strip(chars))

    def lstrip(self, chars: str | None = None) -> str:
        return _marked(self[1:-1].lstrip(chars))

    def rstrip(self, chars: str | None = None) -> str:
        return _marked(self[1:-1].rstrip(chars))


def _marks(tokenizer: "Tokenizer", messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What a template is given of messages. One that does not know the developer is given what he says as the system's."""
    marked = [_mark(message, f"message {number}") for number, message in enumerate(messages, start=1)]
    if "developer" not in tokenizer.chat_template:
        marked = [message | {"role": "system"} if message["role"] == "developer" else message for message in marked]
    return marked


def _mark(message: Message, where: str) -> dict[str, Any]:
    """One of them; an empty text stays one that `if` takes for false."""
    content = message.content
    if message.role not in ROLES:
        raise UserError(f"{where}: unknown role '{message.role}'; {did_you_mean(message.role, ROLES)}")
    if content and _SPLIT.search(content):
        raise UserError(f"{where}: holds a reserved private-use character (U+F5A30 to U+F5A33); remove it")
    return {**message.extra, "role": message.role, "content": _marked(content) if content else content}


def _marked(text: str) -> str:
    return _Text(f"{_CONTENT_BEGIN}{text}{_CONTENT_END}") if text else ""


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
    functions: dict[str, Any] = environment.globals
    functions["raise_exception"] = _raise_exception
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


def _raise_exception(message: str) -> typing.NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _encode_spans(
    tokenizer: "Tokenizer", text: str, said: list[tuple[int, int]], generated: list[tuple[int, int]]
) -> ChatTokens:
    """Tokens of a rendered dialogue, and which of them the assistant produces.

    said, generated: what messages say, and what the assistant produces, as spans of the text.
    """
    forged: set[tuple[int, int]] = set()
    cuts: set[int] = set()
    while True:
        tokens, places = _encode_between(tokenizer, text, cuts, forged)
        controls = [place for token, place in zip(tokens, places) if token in tokenizer.control_ids]
        found = {span for span in said if any(b < span[1] and e > span[0] for b, e in controls)} - forged
        # A token must not reach over the edge of what the assistant produces: at inference the prompt ends there.
        reached = {edge for span in generated for edge in span if any(b < edge < e for b, e in places)} - cuts
        prompts = {edge for edge, _ in generated} - cuts - reached
        reached |= {edge for edge in prompts if not _same_alone(tokenizer, text, edge, cuts, tokens, places)}
        if not found and not reached:
            return ChatTokens(tokens, _mask(places, generated))
        forged |= found
        cuts |= reached.union(*found)


def _same_alone(
    tokenizer: "Tokenizer", text: str, edge: int, cuts: set[int], tokens: list[int], places: list[tuple[int, int]]
) -> bool:
    """Whether what stands in front of `edge` has the tokens that it has where the text ends there, as a prompt does.

    Line breaks at the end are one token, for example, and two in front of a word. What is in front of a cut or a control token
    does not depend on what is behind it.
    """
    stop = bisect.bisect_left([place for place, _ in places], edge)
    controls = (i for i in reversed(range(stop)) if tokens[i] in tokenizer.control_ids)
    start, first = next(((places[i][0], i) for i in controls), (0, 0))
    cut = max((cut for cut in cuts if cut < edge), default=0)
    if cut > start:
        start, first = cut, bisect.bisect_left([place for place, _ in places], cut)
    return tokenizer.encode_with_offsets(text[start:edge], control_tokens=True)[0] == tokens[first:stop]


def _mask(places: list[tuple[int, int]], generated: list[tuple[int, int]]) -> list[int]:
    """1 for each token that begins in a span of `generated`; both are in order."""
    starts, mask = [place for place, _ in places], [0] * len(places)
    for begin, end in generated:
        first, last = bisect.bisect_left(starts, begin), bisect.bisect_left(starts, end)
        mask[first:last] = [1] * (last - first)
    return mask


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
