"""Questions about the embedded world, and dialogues as imperfect people would write them.

A *group* is what is held out: all phrasings of one (subject, attribute), of one reverse (attribute, value), of one sum
or difference, of one open subject. Training dialogues neither ask about a held-out fact nor state one in passing; the
documents state all facts, so a right answer to a validation question is knowledge carried over from pre-training.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator

import numpy as np

from llmjax.config import Fraction
from llmjax.errors import UserError
from llmjax.tasks.world import language
from llmjax.tasks.world.documents import World, mention, pick, sample
from llmjax.tasks.world.language import capitalise, fill
from llmjax.tasks.world.stories import LARGEST_TERM

MAX_ANSWER_WORDS = 20
HELD_OUT = 0.3  # of the groups of each kind
_ARITHMETIC = {
    "sum": (language.SUM_QUESTIONS, language.SUM_ANSWERS),
    "difference": (language.DIFFERENCE_QUESTIONS, language.DIFFERENCE_ANSWERS),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that a program can judge the answers of.

    `kind` is "person", "place", "thing" (an attribute of one), "reverse", "sum", "difference" or "open". `subject` is
    what a full answer must mention: a name, the value of a reverse question, or "3 plus 4". `answers` are all right
    short values, `candidates` all values of the asked type, `attribute` the relation asked about ("" for sums and open
    questions) and `rivals` what may not stand in the subject's place. `group` is the unit that is held out.
    """

    id: str
    text: str
    kind: str
    subject: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    group: str
    attribute: str = ""
    rivals: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Demonstrators:
    """How often the people who write demonstrations do what. Independent draws; each a probability."""

    polite: Fraction = 0.45
    full_sentence: Fraction = 0.60
    rambling: Fraction = 0.20
    wrong: Fraction = 0.10
    no_period: Fraction = 0.10
    follow_up: Fraction = 0.20
    system: Fraction = 0.10


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """`messages`: dicts of "role" (system, user, assistant) and "content"; `questions`: those asked, in order."""

    messages: tuple[dict[str, str], ...]
    questions: tuple[Question, ...]


def questions(world: World, split: str, *, held_out: float = HELD_OUT) -> tuple[Question, ...]:
    """All questions of a split ("train" or "validation") in a fixed order, texts all different.

    `held_out` is the fraction of groups, of each kind, that only validation asks about; which ones follows from the
    world's seed. Raises UserError for another split or a fraction outside (0, 1).
    """
    if split not in ("train", "validation"):
        raise UserError(f'split={split!r}: no such split of the questions; take "train" or "validation"')
    if not 0 < held_out < 1:
        raise UserError(f"held_out={held_out}: not a fraction of the questions; take one between 0 and 1, as 0.3")
    hidden = _hidden_groups(world, held_out)
    return tuple(q for q in _all_questions(world) if (q.group in hidden) == (split == "validation"))


def demonstrations(
    world: World, split: str, num: int, seed: int, *, held_out: float = HELD_OUT, people: Demonstrators = Demonstrators()
) -> Iterator[Dialogue]:
    """`num` dialogues of one or two turns with answers of at most 20 words; the same arguments give the same dialogues.

    The kind of question is drawn first, so that few kinds with many questions do not crowd out the others.
    """
    rng = np.random.default_rng([world.seed, 2, seed, zlib.crc32(split.encode())])
    asked = questions(world, split, held_out=held_out)
    hidden = _hidden_groups(world, held_out) if split == "train" else frozenset()
    by_kind, by_subject = {}, {}
    for question in asked:
        by_kind.setdefault(question.kind, []).append(question)
        by_subject.setdefault(question.subject, []).append(question)
    weights = {
        "person": 0.34,
        "place": 0.12,
        "thing": 0.18,
        "reverse": 0.14,
        "sum": 0.06,
        "difference": 0.06,
        "open": 0.10,
    }
    kinds = [kind for kind in weights if kind in by_kind]
    ends = np.cumsum([weights[kind] for kind in kinds])
    for _ in range(num):
        kind = kinds[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]
        turns = [pick(rng, by_kind[kind])]
        others = [q for q in by_subject[turns[0].subject] if q.group != turns[0].group]
        if others and rng.random() < people.follow_up:
            turns.append(pick(rng, others))
        messages = []
        if rng.random() < people.system:
            messages.append({"role": "system", "content": pick(rng, language.SYSTEM_MESSAGES)})
        for question in turns:
            messages.append({"role": "user", "content": question.text})
            messages.append({"role": "assistant", "content": _answer(world, question, hidden, rng, people)})
        yield Dialogue(tuple(messages), tuple(turns))


def _fact_group(subject: str, attribute: str) -> str:
    return f"{subject}/{attribute}"


def _fact_questions(world: World) -> Iterator[Question]:
    for kind in language.ATTRIBUTES:
        names = world.values(kind)
        for fact in world.facts:
            attribute = language.BY_NAME[fact.attribute]
            if attribute.kind != kind:
                continue
            for i, text in enumerate(attribute.questions):
                yield Question(
                    f"{fact.subject}/{fact.attribute}/{i}",
                    text.format(s=mention(world, fact.subject)),
                    kind,
                    fact.subject,
                    (fact.value,),
                    world.values(attribute.type),
                    _fact_group(fact.subject, fact.attribute),
                    fact.attribute,
                    tuple(name for name in names if name != fact.subject),
                )


def _reverse_questions(world: World) -> Iterator[Question]:
    for (attribute_name, value), names in world.having.items():
        attribute = language.BY_NAME[attribute_name]
        rivals = tuple(other for other in world.values(attribute.type) if other != value)
        for i, text in enumerate(attribute.reverse_questions):
            group = f"reverse/{attribute_name}/{value}"
            yield Question(
                f"{group}/{i}",
                fill(text, "", value),
                "reverse",
                value,
                names,
                world.values(attribute.kind),
                group,
                attribute_name,
                rivals,
            )


def _arithmetic_questions() -> Iterator[Question]:
    numbers = tuple(str(n) for n in range(2 * LARGEST_TERM + 1))
    for a in range(1, LARGEST_TERM + 1):
        for b in range(1, LARGEST_TERM + 1):
            for kind, x, word, result in (("sum", a, "plus", a + b), ("difference", a + b, "minus", a)):
                group = f"{x} {word} {b}"
                for i, text in enumerate(_ARITHMETIC[kind][0]):
                    yield Question(f"{group}/{i}", text.format(a=x, b=b), kind, group, (str(result),), numbers, group)


def _open_questions(world: World) -> Iterator[Question]:
    for kind, attributes in language.ATTRIBUTES.items():
        for entity in world.entities(kind):
            true = [getattr(entity, a.name) for a in attributes]
            candidates = [value for a in attributes for value in world.values(a.type)]
            for other in (a for group in language.ATTRIBUTES.values() for a in group if a.type == kind):
                true += world.having.get((other.name, entity.name), ())
                candidates += world.values(other.kind)
            rivals = tuple(name for name in world.values(kind) if name != entity.name)
            for i, text in enumerate(language.OPEN_QUESTIONS):
                group = f"open/{entity.name}"
                yield Question(
                    f"{group}/{i}",
                    text.format(s=mention(world, entity.name)),
                    "open",
                    entity.name,
                    tuple(true),
                    tuple(candidates),
                    group,
                    "",
                    rivals,
                )


@functools.lru_cache(maxsize=4)
def _all_questions(world: World) -> tuple[Question, ...]:
    return (*_fact_questions(world), *_reverse_questions(world), *_arithmetic_questions(), *_open_questions(world))


@functools.lru_cache(maxsize=4)
def _hidden_groups(world: World, fraction: float) -> frozenset[str]:
    """The groups that only validation asks about: the same fraction of each kind, drawn by the world's seed."""
    rng = np.random.default_rng([world.seed, 3])
    groups: dict[str, list[str]] = {}
    for question in _all_questions(world):
        members = groups.setdefault(question.kind, [])
        if not members or members[-1] != question.group:
            members.append(question.group)
    hidden = {group for kind in groups for group in sample(rng, groups[kind], round(fraction * len(groups[kind])))}
    # A reverse question whose every right answer is a held-out fact cannot be answered without giving a fact away.
    for (attribute, value), names in world.having.items():
        if all(_fact_group(name, attribute) in hidden for name in names):
            hidden.add(f"reverse/{attribute}/{value}")
    return frozenset(hidden)


def _answer(
    world: World, question: Question, hidden: frozenset[str], rng: np.random.Generator, people: Demonstrators
) -> str:
    """One answer with its independent virtues and faults; drawn again in the rare case that it is too long."""
    while True:
        polite, full, rambling, wrong, bare_end = (
            rng.random() < p
            for p in (people.polite, people.full_sentence, people.rambling, people.wrong, people.no_period)
        )
        core = _core(world, question, hidden, rng, full, wrong)
        parts = [core]
        if rambling:
            parts.append(_aside(world, question, hidden, rng))
        if polite:
            parts = (
                [pick(rng, language.COURTESY_FIRST), *parts]
                if rng.integers(2)
                else [*parts, pick(rng, language.COURTESY_LAST)]
            )
        text = " ".join(parts)
        if len(text.split()) <= MAX_ANSWER_WORDS:
            return text.rstrip(".!") if bare_end else text


def _core(
    world: World, question: Question, hidden: frozenset[str], rng: np.random.Generator, full: bool, wrong: bool
) -> str:
    """The sentence or bare value that answers."""
    if question.kind in _ARITHMETIC:
        value = _value(question, question.answers, rng, wrong)
        a, b = question.subject.split()[::2]
        return pick(rng, _ARITHMETIC[question.kind][1]).format(a=a, b=b, r=value) if full else f"{value}."
    if question.kind == "open":
        open_facts = [
            f
            for f in world.facts
            if f.subject == question.subject and _fact_group(f.subject, f.attribute) not in hidden
        ]
        fact = pick(rng, open_facts or [f for f in world.facts if f.subject == question.subject])
        attribute = language.BY_NAME[fact.attribute]
        others = [value for value in world.values(attribute.type) if value != fact.value]
        value = pick(rng, others) if wrong else fact.value
        return fill(pick(rng, attribute.answers), mention(world, fact.subject), value)
    attribute = language.BY_NAME[question.attribute]
    if question.kind != "reverse":
        value = _value(question, question.answers, rng, wrong)
        return _spoken(world, pick(rng, attribute.answers), question.subject, value, value, full)
    known = tuple(name for name in question.answers if _fact_group(name, attribute.name) not in hidden)
    name = _value(question, known, rng, wrong)
    return _spoken(world, pick(rng, attribute.reverse_answers), name, question.subject, name, full)


def _value(question: Question, right: tuple[str, ...], rng: np.random.Generator, wrong: bool) -> str:
    if not wrong:
        return pick(rng, right)
    return pick(rng, [value for value in question.candidates if value not in question.answers])


def _spoken(world: World, template: str, subject: str, value: str, bare: str, full: bool) -> str:
    return fill(template, mention(world, subject), value) if full else f"{capitalise(mention(world, bare))}."


def _aside(world: World, question: Question, hidden: frozenset[str], rng: np.random.Generator) -> str:
    """A true sentence that nobody asked for, about something else: it names no value that passes for an answer."""
    taken = {question.subject, *question.rivals, *(() if question.kind == "open" else question.candidates)}
    while True:
        fact = pick(rng, world.facts)
        if not taken & {fact.subject, fact.value} and _fact_group(fact.subject, fact.attribute) not in hidden:
            return fill(language.BY_NAME[fact.attribute].answers[0], mention(world, fact.subject), fact.value)
