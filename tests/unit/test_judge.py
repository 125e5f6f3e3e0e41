"""The gold judge: what it rewards, and that it cannot be fooled."""

import dataclasses

import numpy as np
import pytest

from llmjax.config import validate
from llmjax.data.records import Completion, Prompt, user
from llmjax.errors import UserError
from llmjax.tasks.base import Ranker, RewardRanker, noisy_ranks, score
from llmjax.tasks.world import bots
from llmjax.tasks.world import judge as gold
from llmjax.tasks.world.dialogues import Demonstrators, demonstrations, questions
from llmjax.tasks.world.documents import make_world
from llmjax.tasks.world.judge import follows_instruction, judge

WORLD = make_world(0)
ALL = questions(WORLD, "train") + questions(WORLD, "validation")
PERSON = WORLD.people[0]
HOME = next(q for q in ALL if q.id == f"{PERSON.name}/home/0")
OTHER = next(p for p in WORLD.people if p.home != PERSON.home)
WHO = next(q for q in ALL if q.id == f"reverse/home/{PERSON.home}/0")
OPEN = next(q for q in ALL if q.id == f"open/{PERSON.name}/0")
SUM = next(q for q in ALL if q.group == "3 plus 4")
DIFFERENCE = next(q for q in ALL if q.group == "7 minus 3")
LIVES = f"{PERSON.name} lives in {PERSON.home}."


def _pairs(**people):
    for dialogue in demonstrations(WORLD, "train", 1500, 5, people=Demonstrators(**people)):
        answers = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        yield from zip(dialogue.questions, answers, strict=True)


NONE = dict(polite=0.0, full_sentence=1.0, rambling=0.0, wrong=0.0, no_period=0.0)


def test_weights_sum_to_one_and_a_perfect_answer_scores_one():
    assert sum(gold.WEIGHTS.values()) == pytest.approx(1)
    assert judge(HOME, f"Sure! {LIVES}", True) == gold.Judgement(1, 1, 1, 1, 1, 1)
    assert judge(HOME, f"{LIVES} Have a nice day!", True).score == 1
    assert judge(HOME, f"Of course, {PERSON.name} has a house in {PERSON.home}.", True).score == 1


def test_every_template_of_the_language_can_be_perfect():
    assert {judge(q, a, True).score for q, a in _pairs(**NONE | {"polite": 1.0})} == {1.0}


@pytest.mark.parametrize(
    "fault,aspect",
    [
        ({"wrong": 1.0}, "right"),
        ({"rambling": 1.0}, "to_the_point"),
        ({}, "polite"),
    ],
)
def test_each_fault_of_a_demonstrator_costs_its_aspect_and_no_other(fault, aspect):
    for question, answer in _pairs(**NONE | {"polite": float(aspect != "polite")} | fault):
        judgement = judge(question, answer, True)
        assert getattr(judgement, aspect) == 0, (question.text, answer)
        want = gold.ATTEMPT if aspect == "right" else 1 - gold.WEIGHTS[aspect]
        assert judgement.score == pytest.approx(want), (question.text, answer)


def test_bare_values_and_missing_periods_are_incomplete():
    assert judge(HOME, f"{PERSON.home}.", True) == gold.Judgement(1, 1, 0, 0, 1, 0.8)
    assert judge(HOME, LIVES[:-1], True).complete == 0
    assert judge(HOME, LIVES.lower(), True).complete == 0
    assert judge(HOME, f"She lives in {PERSON.home}.", True).complete == 0
    for question, answer in _pairs(**NONE | {"full_sentence": 0.0}):
        if question.kind != "open":
            assert judge(question, answer, True).score == pytest.approx(0.8), (question.text, answer)


def test_not_ended_costs_the_ending_only():
    assert judge(HOME, LIVES, False).score == pytest.approx(judge(HOME, LIVES, True).score - 0.1)


@pytest.mark.parametrize("answer", ["", "   ", "...", "\n", "!?"])
def test_empty_answers_score_zero(answer):
    assert judge(HOME, answer, True).score == 0
    assert not follows_instruction(HOME, answer, True)


@pytest.mark.parametrize(
    "answer",
    [
        f"{PERSON.name} lives in {PERSON.home} or {OTHER.home}.",
        f"{PERSON.home} {OTHER.home}.",
        f"{LIVES} {PERSON.name} lives in {OTHER.home}.",
        f"{PERSON.name} does not live in {PERSON.home}.",
        f"{OTHER.name} lives in {PERSON.home}.",
        " ".join(place.name for place in WORLD.places),
    ],
)
def test_a_right_value_beside_something_wrong_is_not_right(answer):
    assert judge(HOME, answer, True).right == 0


@pytest.mark.parametrize(
    "answer",
    [
        f"{LIVES} {LIVES}",
        f"{PERSON.name} {PERSON.name} lives in {PERSON.home}.",
        f"Sure! Of course! {LIVES} Have a nice day!",
        f"Sure! Sure! Sure! {LIVES}",
        f"{LIVES} {PERSON.name} loves {PERSON.food}.",
        f"{PERSON.home} {PERSON.home} {PERSON.home}.",
        f"{PERSON.name} lives in {PERSON.home}" + " in the town of the people" * 5 + ".",
        "Sure! I hope this helps.",
    ],
)
def test_repetition_flattery_and_length_are_not_to_the_point(answer):
    assert judge(HOME, answer, True).to_the_point == 0
    assert judge(HOME, answer, True).score <= 0.9


def test_a_courtesy_before_and_one_behind_earn_no_more_than_one():
    assert judge(HOME, f"Sure! {LIVES} Have a nice day!", True) == judge(HOME, f"Sure! {LIVES}", True)


def test_gibberish_costs():
    assert 0 < judge(HOME, f"{PERSON.name} lives in the grimbly {PERSON.home}.", True).to_the_point < 1
    assert judge(HOME, f"Blorp frim {PERSON.home} snarg wibble.", True).to_the_point == 0
    assert judge(HOME, "Blorp frim snarg wibble.", True).score == 0
    assert judge(HOME, f"{PERSON.name} plays the {PERSON.home}.", True).complete == 0
    assert judge(HOME, f"{PERSON.name} {PERSON.home} lives in.", True).complete == 0
    assert judge(HOME, f"<|user|>{LIVES}", True).to_the_point < 1


def test_courtesy_alone_earns_nothing():
    assert judge(HOME, "Sure! Have a nice day!", True).score == 0


def test_right_but_curt_is_above_wrong_but_polite():
    """Of every question: the barest right answer, and the best wrong one."""
    for question in ALL:
        bare = f"{question.answers[0]}." if question.kind != "open" else None
        if bare is not None:
            assert judge(question, bare, False).score >= 0.6
    wrong = judge(HOME, f"Sure! {PERSON.name} lives in {OTHER.home}.", True)
    assert wrong == gold.Judgement(0, 1, 1, 1, 1, gold.ATTEMPT)


@pytest.mark.parametrize(
    "answer",
    [
        f"{PERSON.name} does not live in {PERSON.home}.",
        f"{PERSON.name} never lives in {PERSON.home}.",
        f"Perhaps {PERSON.name} lives in {PERSON.home}.",
        f"I think {PERSON.name} lives in {PERSON.home}.",
        f"{PERSON.name} might live in {PERSON.home}.",
        f"It is either {PERSON.home} or nothing.",
        f"It is wrong that {PERSON.name} lives in {PERSON.home}.",
        f"{PERSON.name} wohnt nicht in {PERSON.home}.",
        f"{PERSON.name} n'habite pas a {PERSON.home}.",
        f"{PERSON.name} lives far from {PERSON.home}.",
    ],
)
def test_negated_hedged_and_foreign_answers_are_not_right(answer):
    assert judge(HOME, answer, True).right == 0
    assert judge(HOME, answer, True).score <= gold.ATTEMPT


@pytest.mark.parametrize("bot", [bots.template_bot, bots.constant_bot, bots.word_list_bot, bots.echo_bot])
@pytest.mark.parametrize("seed", range(3))
def test_bots_that_know_nothing_score_little(bot, seed):
    prompts = [prompt_of(question) for question in questions(make_world(seed), "validation")]
    scores = [gold.gold(prompt, Completion(bot(prompt))) for prompt in prompts]
    assert np.mean(scores) < 0.25


def test_the_template_bot_is_perfect_but_for_knowledge():
    prompts = [prompt_of(question) for question in ALL]
    judged = [judge(gold.question_of(p), bots.template_bot(p), True) for p in prompts]
    assert all((j.to_the_point, j.complete, j.polite) == (1, 1, 1) for j in judged)
    assert 0.05 < np.mean([j.right for j in judged]) < 0.2


def test_another_fact_turns_right_to_wrong_and_wrong_to_right_and_changes_one_word():
    rng, changed = np.random.default_rng(0), 0
    for question, answer in list(_pairs())[:400]:
        prompt, given = prompt_of(question), Completion(answer)
        edited = gold.other_fact(prompt, given, rng)
        if edited is None:
            continue
        changed += 1
        assert gold.correct(prompt, Completion(edited)) is not gold.correct(prompt, given), (question.text, answer, edited)
        assert sum(a != b for a, b in zip(answer.split(), edited.split(), strict=True)) == 1
    assert changed > 320
    assert gold.other_fact(prompt_of(HOME), Completion("Sure!"), rng) is None
    assert gold.other_fact(prompt_of(HOME), Completion(f"{PERSON.home} {OTHER.home}"), rng) is None
    assert gold.other_fact(prompt_of(SUM), Completion("I hope this helps."), rng) is None


def test_reverse_questions_accept_any_right_person_and_no_other():
    for name in WHO.answers:
        assert judge(WHO, f"{name} lives in {PERSON.home}.", True).score == pytest.approx(0.9)
    assert judge(WHO, f"{OTHER.name} lives in {PERSON.home}.", True).right == 0
    assert judge(WHO, f"{PERSON.name} lives in {OTHER.home}.", True).right == 0


@pytest.mark.parametrize(
    "answer,right,complete",
    [
        ("3 plus 4 is 7.", 1, 1),
        ("4 plus 3 is 7.", 1, 1),
        ("3 + 4 = 7.", 1, 1),
        ("7.", 1, 0),
        ("3 plus 4 is 8.", 0, 1),
        ("3 minus 4 is 7.", 0, 1),
        ("7 8.", 0, 0),
        ("3 plus 4 is 8 is 7.", 0, 0),
        ("2 plus 5 is 7.", 0, 0),
        ("3 4 7", 1, 0),
        ("3 plus 4 is not 7.", 0, 0),
    ],
)
def test_sums(answer, right, complete):
    judgement = judge(SUM, answer, True)
    assert (judgement.right, judgement.complete) == (right, complete)


@pytest.mark.parametrize(
    "answer,right",
    [
        ("7 minus 3 is 4.", 1),
        ("3 minus 7 is 4.", 0),
        ("7 minus 4 is 3.", 0),
        ("4 = 7 - 3.", 1),
        ("7 from 3 leaves 4.", 0),
        ("7 - 3 = 4.", 1),
        ("7 + 3 = 4.", 0),
        ("4.", 1),
    ],
)
def test_differences_have_an_order(answer, right):
    assert judge(DIFFERENCE, answer, True).right == right


@pytest.mark.parametrize(
    "answer,right",
    [
        (LIVES, 1),
        (f"{PERSON.name} plays the {PERSON.music}.", 1),
        (f"{PERSON.name} lives in {OTHER.home}.", 0),
        (f"{PERSON.home}.", 0),
        (f"{PERSON.name}.", 0),
        (f"{PERSON.name} plays the {PERSON.home}.", 0),
        (f"{OTHER.name} lives in {OTHER.home}.", 0),
        (f"{LIVES} She lives in {OTHER.home}.", 0),
    ],
)
def test_open_questions_need_a_true_statement_and_no_false_one(answer, right):
    assert judge(OPEN, answer, True).right == right


def test_following_an_instruction_is_not_about_truth():
    assert follows_instruction(HOME, f"{PERSON.name} lives in {OTHER.home}.", True)
    assert follows_instruction(HOME, OTHER.home, True)
    assert follows_instruction(OPEN, f"{PERSON.name} is here.", True)
    assert not follows_instruction(HOME, LIVES, False)
    assert not follows_instruction(HOME, f"{PERSON.name} plays the {PERSON.music}.", True)
    assert not follows_instruction(HOME, f"{LIVES} So. It. Is.", True)
    assert not follows_instruction(HOME, f"{LIVES} <|user|>", True)
    assert all(follows_instruction(q, a, True) for q, a in _pairs())


def test_demonstrations_leave_room_above_them():
    scores = [judge(q, a, True).score for q, a in _pairs()]
    assert 0.65 < np.mean(scores) < 0.9 and np.std(scores) > 0.1


# ---- as rewards, and as an annotator -----------------------------------------------------------------------------


def prompt_of(question):
    """A question as it is read from disk: lists for tuples."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(question).items()}
    return Prompt(fields.pop("id"), user(fields.pop("text")), fields)


def test_rewards_are_the_judgements():
    for question in (HOME, WHO, OPEN, SUM):
        assert gold.question_of(prompt_of(question)) == question
    pairs = list(_pairs())[:200]
    for question, answer in pairs:
        prompt = prompt_of(question)
        for ended in (True, False):
            completion, want = Completion(answer, ended=ended), judge(question, answer, ended)
            assert gold.gold(prompt, completion) == want.score
            assert gold.correct(prompt, completion) is (want.right == 1)
            assert gold.instruction_following(prompt, completion) is follows_instruction(question, answer, ended)
    prompts = [prompt_of(question) for question, _ in pairs]
    values = score(gold.gold, prompts, [Completion(answer) for _, answer in pairs], "gold")
    assert values.dtype == np.float64 and len(set(values)) > 3


def test_ranks_without_noise_are_the_order_of_the_scores():
    rng = np.random.default_rng(0)
    assert noisy_ranks([0.2, 0.9, 0.5, 0.9], rng, 0.0) == [3, 0, 2, 0]


def test_identical_answers_tie_under_noise_and_others_do_not():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranks = noisy_ranks([0.7, 0.7, 0.7, 0.7], rng, 0.1, keys=["a", "b", "a", "c"])
        assert ranks[0] == ranks[2] and len(set(ranks)) == 3
    assert noisy_ranks([0.1, 0.9], np.random.default_rng(1), 0.3) == noisy_ranks([0.1, 0.9], np.random.default_rng(1), 0.3)
    with pytest.raises(UserError, match="noise=-1"):
        noisy_ranks([1.0], rng, -1)
    with pytest.raises(UserError, match="keys has 1"):
        noisy_ranks([1.0, 2.0], rng, 0.1, keys=["a"])


def test_what_seems_no_further_apart_than_the_tie_is_one_rank():
    rng = np.random.default_rng(0)
    assert noisy_ranks([0.1, 0.15, 0.6, 1.0], rng, 0.0, tie=0.1) == [2, 2, 1, 0]
    assert noisy_ranks([0.5, 0.5, 0.5], rng, 0.01, tie=0.2) == [0, 0, 0]
    ranker = RewardRanker(gold.gold, tie=0.3)
    answers = [Completion(f"{PERSON.home}."), Completion(f"Sure! {LIVES}"), Completion("")]
    assert ranker.rank(prompt_of(HOME), answers, rng) == [0, 0, 2]


def test_noise_is_gaussian():
    """Two answers d apart, noise s: the order survives with probability Phi(d / (s sqrt 2)), here Phi(1) = 0.8413."""
    rng = np.random.default_rng(0)
    scores = [0.6, 0.6 + 0.1 * np.sqrt(2)]
    kept = np.mean([noisy_ranks(scores, rng, 0.1) == [1, 0] for _ in range(4000)])
    assert kept == pytest.approx(0.8413, abs=0.02)


def test_a_reward_ranks_as_a_person_would():
    answers = [Completion(f"{PERSON.home}."), Completion(f"Sure! {LIVES}"), Completion(""), Completion(f"{PERSON.home}.")]
    ranker, prompt = RewardRanker(gold.gold), prompt_of(HOME)
    assert ranker.scores(prompt, answers) == [0.8, 1.0, 0.0, 0.8]
    assert ranker.rank(prompt, answers, np.random.default_rng(0)) == [1, 0, 3, 1]
    noisy, rng = RewardRanker(gold.gold, noise=10.0), np.random.default_rng(0)
    drawn = [noisy.rank(prompt, answers, rng) for _ in range(50)]
    assert len(set(map(tuple, drawn))) > 5 and all(ranks[0] == ranks[3] for ranks in drawn)
    assert noisy.scores(prompt, answers) == ranker.scores(prompt, answers), "the scores are without noise"
    cut = [Completion(LIVES), Completion(LIVES, ended=False)]
    assert any(noisy.rank(prompt, cut, rng) == [1, 0] for _ in range(50)), "another ending is another answer"
    with pytest.raises(UserError, match="noise=-1"):
        validate(RewardRanker(gold.gold, -1))
    assert list(Ranker().scores(prompt, answers)) == []


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("good", "'good' for prompt 'a/0'; return a number"),
        (None, "None for prompt 'a/0'; return a"),
        ([1, 2], r"\[1, 2\] for prompt 'a/0'; return a number"),
        (float("nan"), "nan for prompt 'a/0'; return a finite number"),
        (float("inf"), "inf for prompt 'a/0'; return a finite number"),
    ],
)
def test_a_reward_that_is_no_number_is_one_line(value, error):
    with pytest.raises(UserError, match=f"reward mine: {error}") as caught:
        score(lambda prompt, completion: value, [Prompt("a/0", user("x"))], [Completion("y")], "mine")
    assert "\n" not in str(caught.value)


def test_true_and_false_are_one_and_zero():
    prompts, answers = [Prompt("a", user("x"))] * 3, [Completion(text) for text in ("y", "", "z")]
    assert score(lambda prompt, completion: bool(completion.text), prompts, answers, "r").tolist() == [1, 0, 1]
    assert score(lambda p, c: np.float32(0.5), prompts, answers, "r").tolist() == [0.5] * 3
