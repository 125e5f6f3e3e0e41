"""Ranges of numbers, as part of a field's annotation: `steps: PositiveInt = 100`, `b1: Fraction = 0.9`.

Every number of a config is checked against its range before anything starts; one without a range must be finite.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from llmjax.config.fields import children, field_types, is_config, is_mapping, item_types, members, value_type


@dataclass(frozen=True)
class Range:
    """A number lies in it if least <= number <= most and above < number < below. NaN and infinity lie in none."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, number: float) -> bool:
        return math.isfinite(number) and self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = {"more than": self.above, "at least": self.least, "less than": self.below, "at most": self.most}
        text = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)) or "finite"
        usual = {"more than 0": "positive", "at least 0": "0 or more", "at least 0 and at most 1": "between 0 and 1"}
        return usual.get(text, text)


PositiveInt = Annotated[int, Range(above=0)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    """As `field_types`, with the ranges."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hints[name] for name in field_types(cls)}


def outside(config: Any) -> Iterator[str]:
    """"steps=0 must be positive" for each number in the fields of this dataclass that is out of its range.

    Numbers in tuples and in values of dicts count, those of dataclasses below do not: they have annotations of their own.
    """
    for name, hint in _annotations(type(config)).items():
        yield from _outside(name, hint, getattr(config, name))


def _outside(name: str, hint: Any, value: Any) -> Iterator[str]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        notes = [note for member in members(hint) for note in getattr(member, "__metadata__", ())]
        ranges = [note for note in notes if isinstance(note, Range)] or [Range()]
        if not any(one.holds(value) for one in ranges):
            yield f"{name}={value} must be {' or '.join(map(str, ranges))}"
    elif not is_config(value):
        below = children(value)
        for (key, item), one in zip(below, _below(hint, len(below)), strict=True):
            yield from _outside(f"{name}.{key}", one, item)


def _below(hint: Any, count: int) -> tuple[Any, ...]:
    """Annotations of the `count` items of a tuple or dict annotated `hint`."""
    for member in members(hint):
        if is_mapping(member):
            return (value_type(member),) * count
        if (typing.get_origin(member) or member) is tuple:
            return item_types(member, count) or (Any,) * count
    return (Any,) * count
