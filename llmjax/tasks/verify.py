"""Rewards that come with the project: 1 if an answer passes a test, else 0."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from llmjax.config import NonNegativeFloat, NonNegativeInt
from llmjax.data.records import Completion, Prompt
from llmjax.errors import UserError

_NUMBER = re.compile(r"(?<![\w.])[-\u2212]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def numbers(text: str) -> list[Decimal]:
    """The numbers that stand in `text`, in order: 1,234.5 and -3 and $7, each as its exact value."""
    return [Decimal(found.replace(",", "").replace("$", "").replace("\u2212", "-")) for found in _NUMBER.findall(text)]


@dataclass(frozen=True)
class Number:
    """Whether the last number of the answer is the last number of a field of the prompt, or of one of a list of them: for sums,
    gsm8k ("#### 72").

    field: of the prompt's record. tolerance: largest difference that still counts. only: the answer must hold no other number.
    """

    field: str = "answer"
    tolerance: NonNegativeFloat = 0.0
    only: bool = False

    def __call__(self, prompt: Prompt, completion: Completion) -> bool:
        references = [numbers(reference) for reference in _references(prompt, self.field)]
        expected = [reference[-1] for reference in references if reference]
        if not expected:
            raise UserError(f"prompt {prompt.id!r}: field {self.field!r} holds no number; name another field")
        found = numbers(completion.text)
        if not found or (self.only and len(found) > 1):
            return False
        return any(abs(found[-1] - right) <= Decimal(str(self.tolerance)) for right in expected)


@dataclass(frozen=True)
class Exact:
    """Whether the answer is a field of the prompt, or one of a list of them, white space around it aside.

    field: of the prompt's record. ignore_case: capitals are forgiven.
    """

    field: str = "answer"
    ignore_case: bool = False

    def __call__(self, prompt: Prompt, completion: Completion) -> bool:
        answer, *right = (text.strip() for text in (completion.text, *_references(prompt, self.field)))
        return answer in right or (self.ignore_case and answer.casefold() in [text.casefold() for text in right])


@dataclass(frozen=True)
class Matches:
    """Whether a regular expression is found in the answer; `whole`: it must describe all of it."""

    pattern: str
    whole: bool = False

    def validate(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pattern={self.pattern!r} is not a regular expression ({error})") from error

    def __call__(self, prompt: Prompt, completion: Completion) -> bool:
        find = re.fullmatch if self.whole else re.search
        return find(self.pattern, completion.text.strip(), re.DOTALL) is not None


@dataclass(frozen=True)
class Length:
    """Whether the answer ended itself and has between `least` and `most` words."""

    least: NonNegativeInt = 1
    most: NonNegativeInt = 100

    def validate(self) -> None:
        if self.least > self.most:
            raise UserError(f"least={self.least} must not exceed most={self.most}")

    def __call__(self, prompt: Prompt, completion: Completion) -> bool:
        del prompt
        return completion.ended and self.least <= len(completion.text.split()) <= self.most


def _references(prompt: Prompt, field: str) -> list[str]:
    """The right answers that the prompt's record names: one, or all of a list."""
    value = prompt.fields.get(field)
    if value is None or (isinstance(value, (list, tuple)) and not value):
        there = ", ".join(prompt.fields) or "none"
        raise UserError(f"prompt {prompt.id!r} has no field {field!r}; its record has {there}")
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
