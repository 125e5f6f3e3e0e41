"""Records as people keep them -> dialogues, rankings, prompts. A format is recognised by its fields.

To add one, write a function from a record (a dict) to a `Dialogue`, `Ranking` or `Prompt`, and give it to the data as `format`,
or enter it in a list below. A reader raises UserError for what is wrong with a record; place and file are added by its caller.
None leaves a record out, counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmjax.data.records import ROLES, Completion, Dialogue, Message, Prompt, Ranking, user
from llmjax.errors import UserError

Record = Mapping[str, Any]

_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip
_DIALOGUE_FIELDS = ("messages", "conversations", "conversation", "dialogue", "turns")
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from", "speaker"), ("content", "value", "text")
_PROMPT_FIELDS = ("prompt", "question", "query", "instruction")
_COMPLETION_FIELDS = ("completion", "response", "answer", "output")
_ANSWERS_FIELDS = ("answers", "completions", "responses")
_RANK_FIELDS, _SCORE_FIELDS = ("ranks", "rank"), ("scores", "score", "ratings", "rewards")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Format:
    """One way to write a record. name: for `format=`. shape: the fields, for people. fits: whether a record has them, right or
    wrong inside. read: the record's meaning."""

    name: str
    shape: str
    fits: Callable[[Record], bool]
    read: Callable[[Record], Any]


def recognise(formats: Sequence[Format], record: Record) -> Format:
    """The first format that fits. Raises UserError, naming the fields that there are, if none does."""
    for one in formats:
        if one.fits(record):
            return one
    known = "; ".join(one.shape for one in formats)
    fields = ", ".join(record) or "(none)"
    raise UserError(f"no known format has the fields {fields}; there is {known}; or give a function as format")


# ---- messages -----------------------------------------------------------------------------------------------------


def messages(value: Any, what: str) -> tuple[Message, ...]:
    """Messages of a list of objects with role (or from) and content (or value, text), or of a text: one of the user's."""
    if isinstance(value, str):
        return user(_text(value, what))
    if isinstance(value, Mapping):  # columns instead of rows, as TFDS has them
        value = _rows(value, what)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{what} is {_kind(value)}, not a list of messages")
    if not value:
        raise UserError(f"{what} holds no message")
    return tuple(_message(item, f"{what}[{i}]") for i, item in enumerate(value))


def _message(item: Any, what: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{what} is {_kind(item)}, not an object with role and content")
    role_field, content_field = _field(item, _ROLE_FIELDS, what), _first(item, _CONTENT_FIELDS)
    role = item[role_field]
    if not isinstance(role, str) or role.lower() not in _ROLE_NAMES:
        raise UserError(f"{what}: {role_field}={role!r} is no role; there is {', '.join(_ROLE_NAMES)}")
    extra = {k: v for k, v in item.items() if k not in (role_field, content_field) and v is not None}
    content = item[content_field] if content_field else None
    if content is None and not extra.get("tool_calls"):
        raise UserError(f"{what}: no content; a message without tool_calls has some")
    return Message(_ROLE_NAMES[role.lower()], content if content is None else _content(content, what), extra)


def _content(content: Any, what: str) -> str:
    """Text, or the joined texts of a list of parts."""
    if isinstance(content, (list, tuple)):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
                raise UserError(f"{what}: a part of type {kind!r}; only parts of type 'text' can be read")
        content = "".join(_text(part.get("text"), what) for part in content)
    return _text(content, what)


def _rows(columns: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    sizes = {len(column) if isinstance(column, (list, tuple)) else -1 for column in columns.values()}
    if len(sizes) != 1 or -1 in sizes:
        raise UserError(f"{what} is an object, not a list of messages")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def hh_messages(text: Any, what: str) -> tuple[Message, ...]:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ..." (Bai et al. 2022, arXiv:2204.05862)."""
    parts = _HH_TURN.split(_text(text, what))
    if len(parts) < 3 or parts[0].strip():
        raise UserError(f'{what} does not begin with "\\n\\nHuman:" or "\\n\\nAssistant:"')
    names = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(names[role], content.strip()) for role, content in zip(parts[1::2], parts[2::2]))


SURROGATE = re.compile("[\ud800-\udfff]")


# ---- small checks -------------------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", tuple: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {_kind(value)}, not text")
    if SURROGATE.search(value):
        raise UserError(f"{what} holds a lone surrogate, which is no valid Unicode")
    return value


def _first(record: Record, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record), None)


def _field(record: Record, names: Sequence[str], what: str = "") -> str:
    name = _first(record, names)
    if name is None:
        raise UserError(f"{what + ': ' if what else ''}no field {' or '.join(names)}; it has {', '.join(record) or 'none'}")
    return name


def _nonempty(text: str, what: str) -> str:
    if not text.strip():
        raise UserError(f"{what} is empty")
    return text


def _tools(record: Record) -> tuple[Mapping[str, Any], ...]:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else ()
        except ValueError as error:
            raise UserError(f"tools is text but not JSON ({error})") from error
    if not tools:
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("tools is not a list of objects")
    return tuple(tools)


# ---- dialogues ----------------------------------------------------------------------------------------------------


def _dialogue(turns: Sequence[Message], tools: tuple[Mapping[str, Any], ...] = ()) -> Dialogue:
    spoken = [turn for turn in turns if turn.role == "assistant"]
    if not spoken:
        raise UserError("no message of the assistant, so there is nothing to learn")
    if not any((turn.content or "").strip() or turn.extra.get("tool_calls") for turn in spoken):
        raise UserError("the messages of the assistant are empty")
    return Dialogue(tuple(turns), tools)


def _read_messages(record: Record) -> Dialogue:
    name = _field(record, _DIALOGUE_FIELDS)
    if isinstance(record[name], str):
        raise UserError(f"{name} is text, not a list of messages")
    turns = messages(record[name], name)
    if isinstance(record.get("system"), str) and record["system"] and turns[0].role != "system":
        turns = (Message("system", _text(record["system"], "system")), *turns)
    return _dialogue(turns, _tools(record))


def _answered(prompt: tuple[Message, ...], answer: Any, what: str) -> tuple[Message, ...]:
    """The prompt and the assistant's answer to it, which may be text or messages."""
    if isinstance(answer, str):
        return (*prompt, Message("assistant", _nonempty(_text(answer, what), what)))
    return (*prompt, *messages(answer, what))


def _read_pair(record: Record) -> Dialogue:
    question, answer = _field(record, _PROMPT_FIELDS), _field(record, _COMPLETION_FIELDS)
    return _dialogue(_answered(_prompt_messages(record, question), record[answer], answer), _tools(record))


def _prompt_messages(record: Record, name: str) -> tuple[Message, ...]:
    turns = messages(record[name], name)
    if isinstance(record[name], str):
        _nonempty(record[name], name)
    return turns


def _alpaca_prompt(record: Record) -> tuple[Message, ...]:
    text = _nonempty(_text(record["instruction"], "instruction"), "instruction")
    more = record.get("input")
    if more is not None and _text(more, "input").strip():
        text = f"{text}\n\n{more}"
    system = record.get("system")
    return ((Message("system", _text(system, "system")),) if system else ()) + user(text)


def _read_alpaca(record: Record) -> Dialogue:
    return _dialogue(_answered(_alpaca_prompt(record), record["output"], "output"))


def _read_hh(record: Record) -> Dialogue:
    name = _field(record, ("chosen", "text"))
    return _dialogue(hh_messages(record[name], name))


def _read_chosen(record: Record) -> Dialogue | None:
    """The better one of two."""
    ranking = _read_chosen_rejected(record)
    if ranking is None:
        return None
    best = ranking.completions[ranking.ranks.index(0)]
    return _dialogue((*ranking.prompt.messages, Message("assistant", best.text)))


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and _HH_TURN.match(value) is not None


def _has(*fields: Sequence[str]) -> Callable[[Record], bool]:
    """Whether a record has one of each of these lists of fields."""
    return lambda record: all(_first(record, names) is not None for names in fields)


DIALOGUE_FORMATS = (
    Format("messages", 'messages: [{"role", "content"}, ...]', _has(_DIALOGUE_FIELDS), _read_messages),
    Format("alpaca", "instruction, input, output", _has(["instruction"], ["output"]), _read_alpaca),
    Format("prompt/completion", "prompt, completion", _has(_PROMPT_FIELDS, _COMPLETION_FIELDS), _read_pair),
    Format("chosen/rejected", "chosen, rejected", _has(["chosen"], ["rejected"]), _read_chosen),
    Format("hh-rlhf", 'text: "\\n\\nHuman: ...\\n\\nAssistant: ..."',
           lambda record: _is_hh(record.get("text")) or _is_hh(record.get("chosen")), _read_hh),
)  # fmt: skip


# ---- prompts ------------------------------------------------------------------------------------------------------


def _id(record: Record) -> str:
    name = _first(record, ("id", "_id", "prompt_id"))
    return "" if name is None or record[name] is None else str(record[name])


def _prompt(record: Record, turns: tuple[Message, ...], read: Sequence[str], **fields: Any) -> Prompt:
    if not turns or turns[-1].role == "assistant":
        raise UserError("the prompt does not end with a message that an assistant could answer")
    return Prompt(_id(record), turns, {k: v for k, v in record.items() if k not in read} | fields, _tools(record))


def _read_prompt(record: Record) -> Prompt:
    name = _field(record, _PROMPT_FIELDS)
    return _prompt(record, _prompt_messages(record, name), (name,))


def _read_prompt_alpaca(record: Record) -> Prompt:
    return _prompt(record, _alpaca_prompt(record), ("instruction", "input", "system"))


def _read_prompt_messages(record: Record) -> Prompt:
    """A dialogue up to its last message of the assistant, which becomes the field "answer"."""
    name = _field(record, _DIALOGUE_FIELDS)
    if isinstance(record[name], str):
        raise UserError(f"{name} is text, not a list of messages")
    turns = messages(record[name], name)
    if turns[-1].role != "assistant":
        return _prompt(record, turns, (name,))
    return _prompt(record, turns[:-1], (name,), **({} if "answer" in record else {"answer": turns[-1].content or ""}))


def _read_prompt_chosen(record: Record) -> Prompt | None:
    ranking = _read_chosen_rejected(record)
    return None if ranking is None else ranking.prompt


PROMPT_FORMATS = (
    Format("messages", 'messages: [{"role", "content"}, ...]', _has(_DIALOGUE_FIELDS), _read_prompt_messages),
    Format("alpaca", "instruction, input", _has(["instruction"], ["input"]), _read_prompt_alpaca),
    Format("prompt", "prompt (text or messages), or question", _has(_PROMPT_FIELDS), _read_prompt),
    Format("chosen/rejected", "chosen, rejected", _has(["chosen"], ["rejected"]), _read_prompt_chosen),
)


# ---- rankings -----------------------------------------------------------------------------------------------------


def _ranking(
    record: Record, prompt: tuple[Message, ...], texts: Sequence[str], ranks: Sequence[float], read: Sequence[str]
) -> Ranking:
    """read: the fields that are prompt and answers; the others are the prompt's."""
    if len(texts) < 2:
        raise UserError(f"a ranking of {len(texts)} answer{'' if len(texts) == 1 else 's'}; it takes two or more")
    better = tuple(sum(other < rank for other in ranks) for rank in ranks)
    return Ranking(_prompt(record, prompt, read), tuple(Completion(text) for text in texts), better)


def _ranking_prompt(record: Record) -> tuple[str, tuple[Message, ...]]:
    name = _field(record, (*_PROMPT_FIELDS, *_DIALOGUE_FIELDS))
    return name, _prompt_messages(record, name)


def _read_chosen_rejected(record: Record) -> Ranking | None:
    sides = [record["chosen"], record["rejected"]]
    name = _first(record, _PROMPT_FIELDS)
    read = ("chosen", "rejected", name or "")
    if name is not None:
        prompt = _prompt_messages(record, name)
        texts = [_only_answer(side, prompt, what) for side, what in zip(sides, ("chosen", "rejected"))]
        return _ranking(record, prompt, texts, (0, 1), read)
    parse = hh_messages if isinstance(sides[0], str) else messages
    turns = [parse(side, what) for side, what in zip(sides, ("chosen", "rejected"))]
    for side, what in zip(turns, ("chosen", "rejected")):
        if side[-1].role != "assistant":
            raise UserError(f"{what} does not end with a message of the assistant")
    if turns[0][:-1] != turns[1][:-1]:
        return None  # answers to different prompts, as some of HH-RLHF are
    return _ranking(record, turns[0][:-1], [_spoken(side[-1], "its last message") for side in turns], (0, 1), read)


def _only_answer(side: Any, prompt: tuple[Message, ...], what: str) -> str:
    """The text of an answer that is given as text, as the assistant's message, or behind a copy of the prompt."""
    if isinstance(side, str):
        return _text(side, what)
    turns = messages(side, what)
    if len(turns) > 1 and turns[:-1] != prompt:
        raise UserError(f"{what} holds {len(turns)} messages that do not begin with the prompt")
    if turns[-1].role != "assistant":
        raise UserError(f"{what} does not end with a message of the assistant")
    return _spoken(turns[-1], what)


def _spoken(message: Message, what: str) -> str:
    if message.content is None:
        raise UserError(f"{what} has no content")
    return message.content


def _answers(value: Any, what: str) -> tuple[list[str], list[Record]]:
    """Texts of a list of texts, or of objects with a text, and these objects."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{what} is {_kind(value)}, not a list of answers")
    texts, objects = [], []
    for i, item in enumerate(value):
        where = f"{what}[{i}]"
        if isinstance(item, Mapping):
            objects.append(item)
            item = item[_field(item, (*_CONTENT_FIELDS, *_COMPLETION_FIELDS), where)]
        texts.append(_text(item, where))
    if objects and len(objects) != len(texts):
        raise UserError(f"{what} mixes texts and objects")
    return texts, objects


def _numbers(record: Record, names: Sequence[str], objects: list[Record], count: int) -> list[float] | None:
    """One number for each answer, of the record or of the answers' objects; None where they are null."""
    if any(name in record for name in names):
        name = _field(record, names)
        values = record[name]
        if values is None:
            return None
        if not isinstance(values, (list, tuple)):
            raise UserError(f"{name} is {_kind(values)}, not a list of numbers")
    else:
        values = [item[_field(item, names, f"answer {i}")] for i, item in enumerate(objects)]
        name = names[0]
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise UserError(f"{name}[{i}]={value!r} is not a number")
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} numbers for {count} answers")
    return list(values)


def _read_ranked(names: Sequence[str], sign: int) -> Callable[[Record], Ranking | None]:
    def read(record: Record) -> Ranking | None:
        (name, prompt), answers = _ranking_prompt(record), _field(record, _ANSWERS_FIELDS)
        texts, objects = _answers(record[answers], answers)
        values = _numbers(record, names, objects, len(texts))
        if values is None:
            return None
        return _ranking(record, prompt, texts, [sign * value for value in values], (name, answers, *names))

    return read


def _read_tiers(record: Record) -> Ranking:
    """Groups of answers, the best first: texts, or names of `answers` that is an object, or numbers of one that is a list."""
    name, prompt = _ranking_prompt(record)
    tiers, field = record["ranking"], _first(record, _ANSWERS_FIELDS)
    if not isinstance(tiers, (list, tuple)):
        raise UserError(f"ranking is {_kind(tiers)}, not a list of groups of answers")
    named = record[field] if field else ()
    texts, ranks, seen = [], [], set()
    for rank, tier in enumerate(tiers):
        for item in tier if isinstance(tier, (list, tuple)) else (tier,):
            if field:
                if isinstance(item, (Mapping, list)) or item in seen:
                    raise UserError(f"ranking names {item!r} twice, or not by a name")
                seen.add(item)
                item = _named(named, item, field)
            texts.append(_text(item, f"ranking[{rank}]"))
            ranks.append(rank)
    if field and len(seen) != len(named):
        raise UserError(f"ranking orders {len(seen)} of {len(named)} {field}")
    return _ranking(record, prompt, texts, ranks, (name, "ranking", field or ""))


def _named(answers: Any, key: Any, field: str) -> Any:
    if isinstance(answers, Mapping) and key in answers:
        return answers[key]
    if isinstance(answers, (list, tuple)) and isinstance(key, int) and 0 <= key < len(answers):
        return answers[key]
    raise UserError(f"ranking names {key!r}, which is none of {field}")


def _with_objects(names: Sequence[str]) -> Callable[[Record], bool]:
    """Whether a record has prompt and answers, and `names` beside them or in each of them."""

    def fits(record: Record) -> bool:
        answers = record.get(_first(record, _ANSWERS_FIELDS) or "")
        inside = isinstance(answers, list) and bool(answers) and isinstance(answers[0], Mapping) and _has(names)(answers[0])
        asked = _has((*_PROMPT_FIELDS, *_DIALOGUE_FIELDS))(record)
        return answers is not None and asked and (inside or _has(names)(record))

    return fits


RANKING_FORMATS = (
    Format("chosen/rejected", "[prompt], chosen, rejected", _has(["chosen"], ["rejected"]), _read_chosen_rejected),
    Format("ranking", 'prompt, ranking: [["best"], ["second", "equal to it"], ...]',
           _has((*_PROMPT_FIELDS, *_DIALOGUE_FIELDS), ["ranking"]), _read_tiers),
    Format("ranks", "prompt, answers, ranks (0 is best)", _with_objects(_RANK_FIELDS), _read_ranked(_RANK_FIELDS, 1)),
    Format("scores", "prompt, answers, scores (higher is better)", _with_objects(_SCORE_FIELDS),
           _read_ranked(_SCORE_FIELDS, -1)),
)  # fmt: skip
