"""The gold judge: a program that scores any answer to a question of the embedded world, in the human annotator's stead.

Every judgement is deterministic: a function of the question, the text and whether the answer ended itself. It reads
words, not tokens, and never the world: a Question carries all that is true. `gold`, `correct` and `instruction_following`
are the judgements as rewards; `other_fact` is an annotator's smallest edit, which changes the truth of an answer and nothing
else.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmjax.data.records import Completion, Prompt
from llmjax.tasks.world import language
from llmjax.tasks.world.dialogues import Question
from llmjax.tasks.world.stories import pick

WEIGHTS = {"right": 0.6, "to_the_point": 0.1, "complete": 0.1, "polite": 0.1, "ended": 0.1}  # of a right answer
ATTEMPT = 0.1  # what an answer earns that is wrong, but an answer
MAX_WORDS = 24
MAX_SENTENCES = 3

_TOKEN = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|\d+|[^\sA-Za-z\d]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|\d+")
_CONTROL = re.compile(r"<\|.*?\|>|<\||\|>|\x00|\ufffd")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_NEGATIONS = frozenset(
    {"not", "no", "never", "nor", "neither", "nobody", "nothing", "isn't", "doesn't", "don't", "without"}
)
_HEDGES = frozenset(
    {"maybe", "perhaps", "probably", "possibly", "might", "may", "could", "would", "or", "either", "guess", "think", "believe",
     "unsure", "unknown", "seems", "wrong", "false", "lie"}
)  # fmt: skip
_OPERATORS = {"+": "plus", "-": "minus", "plus": "plus", "minus": "minus"}
_COURTESIES = tuple(phrase.lower().strip(".!") for phrase in (*language.COURTESY_FIRST, *language.COURTESY_LAST))
_KNOWN_EXTRA = frozenset(
    {"he", "she", "it", "they", "his", "her", "its", "and", "also", "too", "very", "yes", "answer"}
)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Each aspect in [0, 1], and the score that they make (`judge`)."""

    right: float
    to_the_point: float
    complete: float
    polite: float
    ended: float
    score: float


def judge(question: Question, answer: str, ended: bool) -> Judgement:
    """The gold judgement of `answer`; `ended` says that the model stopped by itself, not at the length limit.

    A right answer scores the sum of its aspects with WEIGHTS, from 0.6 to 1: how it is said counts only if it is right. A
    wrong one scores ATTEMPT if it is an answer at all (`follows_instruction`), else 0. The aspects:
    right: names a right value and no wrong one of the asked type, nobody else in the subject's place, no negation, no
      hedge ("perhaps", "or"), and no word that the world does not know: what is not understood is not right; a sum has
      its own numbers and operator; an open question needs a sentence with a true fact about the subject and no false one.
    to_the_point: one statement, at most two courtesy phrases, at most 24 words, nothing twice; each word that the world
      does not know takes 1/4 off per tenth of the words. 0 where nothing of the asked type is named.
    complete: some sentence with capital and final period, 3 words or more, names the subject and a value and reads like
      the language: each three words in a row are found in the phrasings of world_language (names and values by type).
    polite: one of the world's courtesy phrases as a sentence (or before a comma) beside an answer; more earn no more.
    ended: as given.
    """
    text = _CONTROL.sub(" ~ ", answer).strip()
    if not _WORD.search(text.lower()):
        return Judgement(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    statements, courtesies = _split(text)
    addressed = _addresses(question, statements)
    aspects = {
        "right": float(addressed and _right(question, statements)),
        "to_the_point": _to_the_point(question, text, statements, courtesies) if addressed else 0.0,
        "complete": float(any(_complete(question, sentence) for sentence in statements)),
        "polite": float(addressed and courtesies > 0),
        "ended": float(ended),
    }
    if aspects["right"]:
        score = round(sum(WEIGHTS[name] * value for name, value in aspects.items()), 6)
    else:
        score = ATTEMPT * follows_instruction(question, answer, ended)
    return Judgement(**aspects, score=score)


def follows_instruction(question: Question, answer: str, ended: bool) -> bool:
    """Whether the answer is one at all, right or wrong: it ended, has no control tokens, is 1-3 sentences, and names a
    candidate of the asked type (open questions: mentions the subject)."""
    if not ended or _CONTROL.search(answer) or not answer.strip():
        return False
    sentences = [s for s in _SENTENCE_END.split(answer.strip()) if _WORD.search(s.lower())]
    return 0 < len(sentences) <= MAX_SENTENCES and _addresses(question, sentences)


def question_of(prompt: Prompt) -> Question:
    """The question that a prompt of the world stands for."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in prompt.fields.items()}
    return Question(prompt.id, prompt.text, **fields)


def gold(prompt: Prompt, completion: Completion) -> float:
    """The gold score of an answer, 0 to 1 (`judge`)."""
    return judge(question_of(prompt), completion.text, completion.ended).score


def correct(prompt: Prompt, completion: Completion) -> bool:
    """Whether an answer is right (`judge`)."""
    return judge(question_of(prompt), completion.text, completion.ended).right > 0


def instruction_following(prompt: Prompt, completion: Completion) -> bool:
    """Whether an answer is one at all, right or wrong (`follows_instruction`)."""
    return follows_instruction(question_of(prompt), completion.text, completion.ended)


def other_fact(prompt: Prompt, completion: Completion, rng: np.random.Generator) -> str | None:
    """The answer with another value in the place of its own: a right one made wrong, a wrong one right. None where it names no
    value, or several."""
    question, text = question_of(prompt), completion.text
    right = correct(prompt, completion)
    if question.kind in ("sum", "difference"):
        numbers = list(re.finditer(r"\d+", text))
        if not numbers:
            return None
        place, own = numbers[-1].span(), numbers[-1].group()
        others = [v for v in question.candidates if v not in question.answers and v != own]
    else:
        found = {name.lower(): name for name in question.candidates if name.lower() in _words(text)}
        match = re.search(rf"\b{next(iter(found))}\b", text, re.IGNORECASE) if len(found) == 1 else None
        if match is None:
            return None
        place, own = match.span(), match.group()
        others = [v for v in question.candidates if v not in question.answers]
    if question.kind == "open":  # of the same type, so that the sentence stays one
        kind = language.TYPE_OF_VALUE.get(own.lower())
        others, answers = (
            [v for v in values if language.TYPE_OF_VALUE.get(v.lower()) == kind] for values in (others, question.answers)
        )
    else:
        answers = list(question.answers)
    choices = others if right else answers
    if not choices:
        return None
    new = pick(rng, choices)
    new = language.capitalise(new) if own[:1].isupper() else new
    edited = text[: place[0]] + new + text[place[1] :]
    changed = correct(prompt, Completion(edited, ended=completion.ended)) != right
    return edited if changed else None


def _split(text: str) -> tuple[list[str], int]:
    """The sentences that are not courtesies, and the number of courtesy phrases."""
    statements, courtesies = [], 0
    for sentence in _SENTENCE_END.split(text):
        rest = sentence.strip()
        while rest:
            plain = rest.lower().strip(" ,.!?")
            if plain in _COURTESIES:
                courtesies, rest = courtesies + 1, ""
                break
            opening = next((c for c in _COURTESIES if rest.lower().startswith(c + ",")), None)
            if opening is None:
                break
            courtesies, rest = courtesies + 1, rest[len(opening) + 1 :].strip()
        if _WORD.search(rest.lower()):
            statements.append(rest)
    return statements, courtesies


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _named(names: Sequence[str], text: str) -> set[str]:
    """Those of `names` that stand in the text as words, in lower case."""
    return {name.lower() for name in names} & set(_words(text))


def _addresses(question: Question, sentences: Sequence[str]) -> bool:
    text = " ".join(sentences)
    return bool(_named((question.subject,) if question.kind == "open" else question.candidates, text))


def _right(question: Question, statements: Sequence[str]) -> bool:
    text = " ".join(statements)
    words = set(_words(text))
    if words & _HEDGES or not all(_understood(question, sentence) for sentence in statements):
        return False
    if question.kind in ("sum", "difference"):
        return _right_number(question, text)
    if words & _NEGATIONS:
        return False
    true, every = {a.lower() for a in question.answers}, (*question.candidates,)
    if question.kind != "open":
        named = _named(every, text)
        return bool(named) and named <= true and not _named(question.rivals, text)
    found = False
    for sentence in statements:
        words = set(_words(sentence))
        if question.subject.lower() not in words and not words & {"she", "he", "it"}:
            continue
        named = _named(every, sentence)
        if not named <= true or _named(question.rivals, sentence):
            return False
        found = found or (bool(named) and _fluent(question, sentence))
    return found


def _understood(question: Question, sentence: str) -> bool:
    """Whether the world knows all words of a sentence; names that the question says nothing of may stand beside its answer (an
    open one's may have any, which `_fluent` and its candidates judge)."""
    unknown = [token for token in _TOKEN.findall(sentence) if token[0].isalpha() and token.lower() not in _known(question)]
    foreign = "~" in sentence or any(not token[0].isupper() for token in unknown)
    return not foreign and not (unknown and question.kind != "open" and _named(question.candidates, sentence))


def _right_number(question: Question, text: str) -> bool:
    """The result alone, or with the operands in an order that makes the statement true, and with the right operator."""
    first, operator, second = question.subject.split()
    result = question.answers[0]
    tokens = [token.lower() for token in _TOKEN.findall(text)]
    if {_OPERATORS[token] for token in tokens if token in _OPERATORS} - {operator} or {"not", "no"} & set(tokens):
        return False
    numbers = tuple(token for token in tokens if token.isdigit())
    orders = [(first, second), (second, first)] if operator == "plus" else [(first, second)]
    return numbers == (result,) or any(numbers in ((*order, result), (result, *order)) for order in orders)


def _to_the_point(question: Question, text: str, statements: Sequence[str], courtesies: int) -> float:
    words = _words(" ".join(statements))
    if len(statements) != 1 or courtesies > 2 or len(_words(text)) > MAX_WORDS or _repeats(statements[0]):
        return 0.0
    known = _known(question)
    unknown = sum(not (word in known or word.isdigit()) for word in words) + text.count("~")
    return max(0.0, 1.0 - 2.5 * unknown / len(words))


@functools.lru_cache(maxsize=4096)
def _known(question: Question) -> frozenset[str]:
    """The words, in lower case, that an answer to a question may be made of."""
    names = (*question.candidates, *question.rivals, *question.answers, *_words(question.subject))
    return _vocabulary() | {name.lower() for name in names}


def _repeats(sentence: str) -> bool:
    """A word twice in a row, or the same two words (numbers aside) twice in the sentence."""
    words = _words(sentence)
    pairs = [pair for pair in itertools.pairwise(words) if not (pair[0].isdigit() and pair[1].isdigit())]
    return any(a == b and not a.isdigit() for a, b in pairs) or len(pairs) != len(set(pairs))


def _complete(question: Question, sentence: str) -> bool:
    words = _words(sentence)
    if len(words) < 3 or not (sentence[0].isupper() or sentence[0].isdigit()) or not sentence.endswith("."):
        return False
    if question.kind in ("sum", "difference"):
        value = sum(word.isdigit() for word in words) == 3
    else:
        value = bool(_named(question.candidates, sentence))
    subject = {part for part in _words(question.subject) if part not in _OPERATORS}
    return value and subject <= set(words) and _fluent(question, sentence)


def _fluent(question: Question, sentence: str) -> bool:
    """Whether all three tokens in a row, names and values replaced by their type, occur in the language's phrasings."""
    types = {} if question.kind in ("sum", "difference") else _types_of_names(question)
    typed = ["<start>", *(_typed(token, types) for token in _TOKEN.findall(sentence)), "<end>"]
    return set(zip(typed, typed[1:], typed[2:], strict=False)) <= _grammar()


def _typed(token: str, types: dict[str, str]) -> str:
    low = token.lower()
    if low.isdigit():
        return "<number>"
    found = types.get(low) or language.TYPE_OF_VALUE.get(low)
    return f"<{found}>" if found else low


def _types_of_names(question: Question) -> dict[str, str]:
    """Lower-case name -> "person" or "place", from what the question asks: values have their types in the language."""
    attribute = language.BY_NAME.get(question.attribute)
    if attribute is None:
        subject = "person" if question.kind == "open" and kind_of_open(question) == "person" else "place"
        other = "place" if subject == "person" else "person"
    elif question.kind == "reverse":
        subject, other = attribute.type, attribute.kind
    else:
        subject, other = attribute.kind, attribute.type
    names = {name.lower(): other for name in question.candidates}
    names |= {name.lower(): subject for name in (question.subject, *question.rivals)}
    return {name: kind for name, kind in names.items() if name not in language.TYPE_OF_VALUE}


def kind_of_open(question: Question) -> str:
    """What an open question asks about: "person", "place" or "thing"."""
    types = {language.TYPE_OF_VALUE.get(value.lower()) for value in question.candidates}
    return "person" if "job" in types else "place" if "river" in types else "thing"


@functools.cache
def _sentences() -> frozenset[str]:
    """Every phrasing of the language as a full sentence, subject and value replaced by their types."""
    found = set()
    for attribute in language.BY_NAME.values():
        subject = "the <thing>" if attribute.kind == "thing" else f"<{attribute.kind}>"
        phrases = tuple("{s} " + phrase + "." for phrase in attribute.phrases)
        for template in (*attribute.answers, *attribute.reverse_answers, *attribute.reverse, *phrases):
            found.add(template.format(s=subject, v=f"<{attribute.type}>"))
    for template in (*language.SUM_ANSWERS, *language.DIFFERENCE_ANSWERS):
        found.add(template.format(a="<number>", b="<number>", r="<number>"))
    return frozenset(found)


@functools.cache
def _grammar() -> frozenset[tuple[str, str, str]]:
    """All triples of neighbouring tokens in `_sentences`, with marks for start and end."""
    triples = set()
    for sentence in _sentences():
        typed = ["<start>", *(t.lower() for t in re.findall(r"<\w+>|[A-Za-z']+|[^\s\w]", sentence)), "<end>"]
        triples |= set(zip(typed, typed[1:], typed[2:], strict=False))
    return frozenset(triples)


@functools.cache
def _vocabulary() -> frozenset[str]:
    """The words of the language, in lower case, without names."""
    asked = [q for a in language.BY_NAME.values() for q in (*a.questions, *a.reverse_questions)]
    text = " ".join((*_sentences(), *_COURTESIES, *asked)).lower()
    return frozenset(re.findall(r"[a-z']+", re.sub(r"<\w+>|\{\w+\}", " ", text))) | set(language.TYPE_OF_VALUE) | _KNOWN_EXTRA
