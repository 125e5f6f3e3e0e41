"""llmjax.tasks.verify: which answers pass, over what people and models write."""

from decimal import Decimal

import pytest

from llmjax import config
from llmjax.data.records import Completion, Prompt, user
from llmjax.errors import UserError
from llmjax.tasks.base import score
from llmjax.tasks.verify import Exact, Length, Matches, Number, numbers


def prompt(**fields):
    return Prompt("q/1", user("What is it?"), fields)


def passes(verify, text, ended=True, **fields):
    verdict = verify(prompt(**fields), Completion(text, ended=ended))
    assert isinstance(verdict, bool)
    return verdict


def fails(match, verify, **fields):
    with pytest.raises(UserError, match=match) as caught:
        verify(prompt(**fields), Completion("7"))
    assert "\n" not in str(caught.value)


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []), ("no number", []), ("7", ["7"]), ("It is 7.", ["7"]), ("007", ["7"]), ("3 and 4", ["3", "4"]),
        ("1,234,567.50", ["1234567.5"]), ("1,23", ["1", "23"]), ("1, 234", ["1", "234"]), ("1,2345", ["1", "2345"]),
        ("-3", ["-3"]), ("\u22123", ["-3"]), ("x = -3.25!", ["-3.25"]), (".5", ["0.5"]), ("-.5", ["-0.5"]), ("3.", ["3"]),
        ("$72", ["72"]), ("-$1,000.05", ["-1000.05"]), ("$ 72", ["72"]), ("(12)", ["12"]), ("50%", ["50"]),
        ("#### 72", ["72"]), ("48/2 = <<48/2=24>>24", ["48", "2", "48", "2", "24", "24"]),
        ("7\n8", ["7", "8"]), ("**42**", ["42"]), ("x2", []),
        ("5 - 3", ["5", "3"]), ("5-3", ["5", "3"]), ("the years 1990-1995", ["1990", "1995"]), ("2\u22121", ["2", "1"]),
        ("0.1 0.2", ["0.1", "0.2"]),
    ],
)  # fmt: skip
def test_numbers_that_stand_in_a_text(text, found):
    assert numbers(text) == [Decimal(one) for one in found]


def test_numbers_are_exact():
    assert numbers("0.1")[0] == Decimal("0.1") != Decimal(0.1)
    assert numbers("123456789012345678901") == [Decimal("123456789012345678901")]


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("72", "72", True), ("72", "The answer is 72.", True), ("72", "72.0", True), ("72", "$72.00", True),
        ("72", "7,2", False), ("72", "", False), ("72", "seventy-two", False), ("72", "720", False), ("72", "-72", False),
        ("72", "First 48, then 24, so 72", True), ("72", "72 is what I found, not 71", False),
        ("Natalia sold 48/2 = 24 clips.\n#### 72", "So it is 72 clips", True), ("#### 72", "24", False),
        ("#### 1,234", "1234", True), ("1234", "1,234", True), ("#### -5", "\u22125", True), ("#### -5", "5", False),
        (72, "72", True), (0.5, ".5", True), (-3, "-3", True), (["72"], "72", True), ("0", "-0", True),
        ("100000000000000000001", "100000000000000000000", False),
    ],
)  # fmt: skip
def test_the_last_number_decides(answer, text, right):
    assert passes(Number(), text, answer=answer) is right


def test_a_list_of_right_numbers():
    """Any of them will do, as with `Exact`."""
    assert [passes(Number(), text, answer=["7", "about 8"]) for text in ("7", "8", "9")] == [True, True, False]


def test_options_of_number():
    assert passes(Number(tolerance=0.01), "3.14", answer="3.1416") and not passes(Number(), "3.14", answer="3.1416")
    assert passes(Number(tolerance=0.1), "0.3", answer="0.2") and not passes(Number(tolerance=0.1), "0.31", answer="0.2")
    assert passes(Number(only=True), "It is 7.", answer="7") and not passes(Number(only=True), "3 + 4 is 7", answer="7")
    assert passes(Number(field="solution"), "7", solution="7", answer="8")
    with pytest.raises(UserError, match="tolerance=-1 must be 0 or more"):
        config.validate(Number(tolerance=-1))


def test_prompts_without_the_field_are_one_line():
    for verify in (Number(), Exact()):
        fails(r"prompt 'q/1' has no field 'answer'; its record has source, level$", verify, source="x", level=3)
        fails("its record has none", verify)
        for nothing in (None, [], ()):
            fails("has no field 'answer'", verify, answer=nothing)
    fails("prompt 'q/1': field 'answer' holds no number; name another field", Number(), answer="seven")


# ---- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "right", "forgiven"),
    [
        ("Paris", "Paris", True, True), ("Paris", " Paris\n", True, True), (" Paris ", "Paris", True, True),
        ("Paris", "paris", False, True), ("PARIS", "paris", False, True), ("Straße", "STRASSE", False, True),
        ("Paris", "Paris.", False, False), ("Paris", "In Paris", False, False), ("Paris", "", False, False),
        (["Paris", "the city of light"], "the city of light", True, True), (["Paris", "Lyon"], "Rome", False, False),
        (("Paris", "Lyon"), "lyon", False, True), (7, "7", True, True), ([7, 8], "8", True, True), (7, "7.0", False, False),
        (True, "True", True, True), ("", "", True, True),
    ],
)  # fmt: skip
def test_exact(answer, text, right, forgiven):
    assert passes(Exact(), text, answer=answer) is right
    assert passes(Exact(ignore_case=True), text, answer=answer) is forgiven
    assert passes(Exact("city"), text, city=answer, answer="other") is right


def test_matches():
    assert passes(Matches(r"\d{4}"), "In 1999, I think") and not passes(Matches(r"\d{4}"), "In 199")
    whole = Matches(r"yes|no", whole=True)
    assert [passes(whole, text) for text in ("yes", " no\n", "yes.", "no, yes", "")] == [True, True, False, False, False]
    assert passes(Matches("<think>.*</think>"), "<think>one\ntwo</think> three"), "a dot is any character"
    assert passes(Matches("a$"), "banana ") and not passes(Matches("Yes"), "yes") and passes(Matches("(?i)Yes"), "yes")
    with pytest.raises(UserError, match=r"pattern='\(' is not a regular expression \(.*\)$"):
        config.validate(Matches("("))


def test_length():
    assert [passes(Length(2, 4), " ".join("w" * n)) for n in range(6)] == [False, False, True, True, True, False]
    assert not passes(Length(), "") and passes(Length(), "one") and passes(Length(0), "")
    assert passes(Length(), "w " * 100) and not passes(Length(), "w " * 101)
    assert not passes(Length(), "cut off", ended=False)
    for bad in (Length(5, 4), Length(-1, 4)):
        with pytest.raises(UserError, match="least=5 must not exceed most=4|least=-1 must be 0 or more"):
            config.validate(bad)


def test_verifiers_are_rewards():
    prompts = [prompt(answer="7"), prompt(answer="8")]
    answers = [Completion("It is 7."), Completion("It is 7.")]
    for verify, want in ((Number(), [1, 0]), (Exact(), [0, 0]), (Matches("7"), [1, 1]), (Length(3, 3), [1, 1])):
        config.validate(verify)
        assert score(verify, prompts, answers, "r").tolist() == want
