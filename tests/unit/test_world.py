"""The embedded world, its documents, its questions and its demonstrations."""

import collections
import re

import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.tasks.world import dialogues, language
from llmjax.tasks.world.dialogues import demonstrations, questions
from llmjax.tasks.world.documents import documents, make_world, mention, split_of
from llmjax.tasks.world.judge import judge

WORLD = make_world(0)


def _distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("seed", range(5))
def test_world_has_the_promised_size_and_unlike_names(seed):
    world = make_world(seed)
    assert [len(world.entities(kind)) for kind in ("person", "place", "thing")] == [16, 8, 14]
    assert len(world.facts) == 16 * 6 + 8 * 4 + 14 * 4
    names = [p.name for p in world.people + world.places]
    assert min(_distance(a, b) for a in names for b in names if a != b) >= 2
    assert all(re.fullmatch(r"[A-Z][a-z]{2,9}", name) for name in names)
    assert set(collections.Counter(p.home for p in world.people).values()) == {2}
    assert len({t.owner for t in world.things}) == 14


def test_seed_decides_the_world():
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)
    with pytest.raises(UserError, match="seed=-1"):
        make_world(-1)


def test_values_are_single_words_of_one_type_that_no_template_contains():
    values = [v.lower() for group in language.VALUES.values() for v in group]
    assert len(values) == len(set(values)) and all(v.isalpha() for v in values)
    for a in language.BY_NAME.values():
        assert len(a.phrases) == language.STYLES and len(a.questions) == 4 and len(a.answers) >= 3
        for text in (*a.phrases, *a.reverse, *a.questions, *a.answers, *a.reverse_questions, *a.reverse_answers):
            assert not set(re.findall(r"[a-z]+", text.lower())) & set(values), text


def test_documents_are_short_deterministic_and_plain():
    texts = list(documents(WORLD, 3000, 0))
    assert texts == list(documents(WORLD, 3000, 0))
    assert texts != list(documents(WORLD, 3000, 1))
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 12 and max(lengths) <= 90 and 25 < np.mean(lengths) < 50
    assert all(text.isascii() and "{" not in text and "  " not in text and text[-1] in '.!?"' for text in texts)
    assert not [text for text in texts if re.search(r"\ban? [aeiou]", text)]
    names = {p.name for p in WORLD.people + WORLD.places}
    words = {word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text) if word not in names}
    assert 300 < len(words) < 500


def test_splits_of_documents_are_disjoint():
    train, validation = (set(documents(WORLD, n, 0, split)) for n, split in ((4000, "train"), (200, "validation")))
    assert not train & validation
    assert {split_of(text) for text in validation} == {"validation"}
    with pytest.raises(UserError, match="test"):
        next(documents(WORLD, 1, 0, "test"))


def test_documents_state_every_fact_in_one_sentence_many_times():
    counts = collections.Counter()
    wanted = collections.defaultdict(list)
    for fact in WORLD.facts:
        wanted[fact.subject].append(fact)
    for text in documents(WORLD, 4000, 0):
        for sentence in re.split(r"(?<=[.!?])\s", text):
            words = set(re.findall(r"[A-Za-z]+", sentence))
            for subject in words & wanted.keys():
                counts.update(fact for fact in wanted[subject] if fact.value in words)
    assert min(counts[fact] for fact in WORLD.facts) >= 5


def test_documents_contradict_no_fact():
    """Each sentence that an attribute's own phrasing makes about a name says what is true."""
    patterns = []
    for a in language.BY_NAME.values():
        for phrase in a.phrases:
            subject = "[Tt]he (?P<s>[a-z]+)" if a.kind == "thing" else "(?P<s>[A-Z][a-z]+)"
            patterns.append((a.name, re.compile(rf"{subject} {phrase.format(v='(?P<v>[A-Za-z]+)')}(?=[.,]| and )")))
    seen = 0
    for text in documents(WORLD, 1500, 2):
        if text.startswith("Quiz."):
            continue
        for attribute, pattern in patterns:
            for match in pattern.finditer(text):
                entity = WORLD.by_name.get(match["s"])
                # "Oska is a painter" and "the map is red" overlap in form with phrases of other attributes.
                if hasattr(entity, attribute) and match["v"] in WORLD.values(language.BY_NAME[attribute].type):
                    assert getattr(entity, attribute) == match["v"], text
                    seen += 1
    assert seen > 1000


def test_verdicts_of_a_quiz_are_right_and_half_of_the_answers_wrong():
    """Each answer before a verdict, asked for in the words of its question, by the gold judge."""
    by_text = {q.text: q for q in questions(WORLD, "train") + questions(WORLD, "validation")}
    verdicts = []
    for text in documents(WORLD, 3000, 4):
        if not text.startswith("Quiz.\n"):
            continue
        for part in re.findall(r"(.*?\n.*?)\n(Right|Wrong)\.(?:\n|$)", text.removeprefix("Quiz.\n")):
            question, answer = part[0].split("\n")
            assert (judge(by_text[question], answer, True).right == 1) is (part[1] == "Right"), part
            verdicts.append(part[1])
    assert len(verdicts) > 600 and 0.45 < verdicts.count("Right") / len(verdicts) < 0.55


def test_arithmetic_in_documents_is_right():
    equations = 0
    for text in documents(WORLD, 4000, 0):
        for a, sign, b, r in re.findall(r"(?<!plus )\b(\d+) (plus|minus|\+|-) (\d+) (?:is|=|makes) (\d+)", text):
            assert int(r) == (int(a) + int(b) if sign in ("plus", "+") else int(a) - int(b)), text
            equations += 1
    assert equations > 300


def test_questions_are_many_distinct_and_split_by_group():
    train, validation = questions(WORLD, "train"), questions(WORLD, "validation")
    assert len(train) >= 900 and len(validation) >= 400
    everything = train + validation
    assert len({q.id for q in everything}) == len({q.text for q in everything}) == len(everything)
    assert not {q.group for q in train} & {q.group for q in validation}
    facts = {q.group for q in everything if q.kind in language.ATTRIBUTES}
    held_out = {q.group for q in validation if q.kind in language.ATTRIBUTES}
    assert 0.28 <= len(held_out) / len(facts) <= 0.32 and len({q.group for q in validation}) > 120
    kinds = {"person", "place", "thing", "reverse", "sum", "difference", "open"}
    assert {q.kind for q in train} == {q.kind for q in validation} == kinds
    assert all(set(q.answers) <= set(q.candidates) and q.text[-1] in "?." for q in everything)
    assert any(len(q.answers) > 1 for q in train if q.kind == "reverse")


def test_questions_know_the_truth():
    for q in questions(WORLD, "train"):
        if q.kind in language.ATTRIBUTES:
            assert q.answers == (getattr(WORLD.by_name[q.subject], q.attribute),)
            assert mention(WORLD, q.subject) in q.text
        elif q.kind in ("sum", "difference"):
            a, sign, b = q.subject.split()
            assert int(q.answers[0]) == (int(a) + int(b) if sign == "plus" else int(a) - int(b)) <= 20
        elif q.kind == "reverse":
            assert {e.name for e in WORLD.by_name.values() if getattr(e, q.attribute, None) == q.subject} == set(
                q.answers
            )


def test_bad_splits_and_fractions_are_refused():
    with pytest.raises(UserError, match="split='test'"):
        questions(WORLD, "test")
    with pytest.raises(UserError, match="held_out=0"):
        questions(WORLD, "train", held_out=0.0)


def test_demonstrations_are_short_well_formed_and_deterministic():
    made = list(demonstrations(WORLD, "train", 1500, 0))
    assert made == list(demonstrations(WORLD, "train", 1500, 0))
    assert made != list(demonstrations(WORLD, "train", 1500, 1))
    allowed = {q.id for q in questions(WORLD, "train")}
    for dialogue in made:
        roles = [m["role"] for m in dialogue.messages if m["role"] != "system"]
        assert roles == ["user", "assistant"] * len(dialogue.questions) and len(dialogue.questions) in (1, 2)
        assert [q.text for q in dialogue.questions] == [m["content"] for m in dialogue.messages if m["role"] == "user"]
        assert {q.id for q in dialogue.questions} <= allowed
        assert all(1 <= len(m["content"].split()) <= 20 for m in dialogue.messages if m["role"] == "assistant")
    follow_ups = np.mean([len(d.questions) == 2 for d in made])
    systems = np.mean([d.messages[0]["role"] == "system" for d in made])
    assert 0.12 < follow_ups < 0.25 and 0.05 < systems < 0.15


def test_training_dialogues_state_no_held_out_fact():
    hidden = {(q.subject, q.answers[0]) for q in questions(WORLD, "validation") if q.kind in language.ATTRIBUTES}
    right = dialogues.Demonstrators(wrong=0.0)
    for dialogue in demonstrations(WORLD, "train", 2500, 0, people=right):
        for message in dialogue.messages:
            for sentence in re.split(r"(?<=[.!?]) ", message["content"]):
                words = set(re.findall(r"[A-Za-z]+", sentence))
                assert not [pair for pair in hidden if set(pair) <= words], sentence
