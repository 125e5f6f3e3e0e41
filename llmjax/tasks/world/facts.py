"""The facts of the embedded world: who lives where, what grows there, who owns the lantern. One seed, one world."""

import collections
import dataclasses
import functools
from typing import Any

import numpy as np

from llmjax.errors import UserError
from llmjax.tasks.world import language

NUM_PEOPLE = 16
NUM_PLACES = 8
NUM_THINGS = 14
_PEOPLE_PER_PLACE = NUM_PEOPLE // NUM_PLACES

_FIRST = (
    "Be", "Bru", "Da", "Dre", "Fi", "Fo", "Ga", "Gri", "Ho", "Ja", "Ju", "Ka", "Klo", "Li", "Lu", "Ma", "Mo", "Ne", "O",
    "Pa", "Pli", "Ra", "Ro", "Sa", "Sto", "Ta", "Tri", "U", "Va", "Vi", "Wa", "Ya", "Ze",
)
_SHE_LAST = ("bella", "dia", "lina", "mira", "nika", "ressa", "sha", "via", "ska", "thea", "lotta", "runa")
_HE_LAST = ("bert", "dan", "mar", "lor", "mund", "rulf", "sko", "ton", "vik", "zek", "nard", "rik")
_PLACE_FIRST = (
    "Al", "Bar", "Cal", "Dun", "El", "Fen", "Hol", "Kel", "Lan", "Mar", "Nor", "Os", "Pen", "Quil", "Ros", "Sel", "Tor",
    "Ul", "Wen", "Yor",
)
_PLACE_LAST = ("wick", "ford", "dale", "ham", "mere", "stead", "by", "port", "ton", "field", "gate", "bury")


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody in the valley. Every field but the pronoun is a fact that the documents state."""

    name: str
    pronoun: str
    home: str
    job: str
    food: str
    pet: str
    colour: str
    music: str


@dataclasses.dataclass(frozen=True)
class Place:
    """A town: its river, its one landmark, the fruit it grows and the season of its feast."""

    name: str
    river: str
    landmark: str
    fruit: str
    feast: str


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object (`name` is its noun): what it is made of, who owns it, its colour and the room in which it is kept."""

    name: str
    material: str
    owner: str
    paint: str
    spot: str


Entity = Person | Place | Thing


@dataclasses.dataclass(frozen=True)
class Fact:
    """`attribute` (a key of `world_language.BY_NAME`) of `subject` (a name) is `value`."""

    subject: str
    attribute: str
    value: str


@dataclasses.dataclass(frozen=True)
class World:
    """All that there is. Tuples are in a fixed order; `seed` made them."""

    seed: int
    people: tuple[Person, ...]
    places: tuple[Place, ...]
    things: tuple[Thing, ...]

    def entities(self, kind: str) -> tuple[Entity, ...]:
        """The people, places or things; `kind` is "person", "place" or "thing"."""
        return {"person": self.people, "place": self.places, "thing": self.things}[kind]

    @functools.cached_property
    def by_name(self) -> dict[str, Any]:
        """Name -> entity; names are unique over all kinds."""
        return {entity.name: entity for entity in (*self.people, *self.places, *self.things)}

    @functools.cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every (subject, attribute, value) of the world, in a fixed order."""
        return tuple(
            Fact(entity.name, attribute.name, getattr(entity, attribute.name))
            for kind, attributes in language.ATTRIBUTES.items()
            for entity in self.entities(kind)
            for attribute in attributes
        )

    @functools.cached_property
    def having(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """(attribute, value) -> the names of all subjects that have it, in the order of the world."""
        found: dict[tuple[str, str], tuple[str, ...]] = collections.defaultdict(tuple)
        for fact in self.facts:
            found[fact.attribute, fact.value] += (fact.subject,)
        return dict(found)

    def values(self, type_name: str) -> tuple[str, ...]:
        """All values of a type: a key of `world_language.VALUES` or a kind of entity."""
        if type_name in language.ATTRIBUTES:
            return tuple(entity.name for entity in self.entities(type_name))
        return language.VALUES[type_name]


def mention(world: World, name: str) -> str:
    """How running text calls a name or value: things with an article ("the lantern"), all else as it is."""
    return f"the {name}" if isinstance(world.by_name.get(name), Thing) else name


def make_world(seed: int) -> World:
    """The world of `seed`: 16 people with 6 attributes, 8 places with 4, 14 things with 4.

    Values are dealt out evenly (two people in each town, one landmark each), so that many questions have
    several right answers and a guess is as seldom right as it can be. Raises UserError for a negative seed.
    """
    if seed < 0:
        raise UserError(f"data.seed={seed}: a world needs a seed of 0 or more; choose another")
    rng = np.random.default_rng([seed, 0])
    people_names, place_names = _people_names(rng), _place_names(rng)
    homes = [str(name) for name in rng.permutation(np.repeat(place_names, _PEOPLE_PER_PLACE))]
    dealt = {
        a.name: _deal(language.VALUES[a.type], NUM_PEOPLE, rng)
        for a in language.ATTRIBUTES["person"]
        if a.name != "home"
    }
    people = tuple(
        Person(name, pronoun, homes[i], **{attribute: values[i] for attribute, values in dealt.items()})
        for i, (name, pronoun) in enumerate(people_names)
    )
    columns = [_deal(language.VALUES[a.type], NUM_PLACES, rng) for a in language.ATTRIBUTES["place"]]
    places = tuple(Place(*row) for row in zip(place_names, *columns, strict=True))
    nouns = language.VALUES["thing"][:NUM_THINGS]
    owners = [people_names[i][0] for i in rng.permutation(NUM_PEOPLE)[: len(nouns)]]
    material, paint, spot = (_deal(language.VALUES[t], len(nouns), rng) for t in ("material", "colour", "spot"))
    things = tuple(Thing(*row) for row in zip(nouns, material, owners, paint, spot, strict=True))
    return World(seed, people, places, things)


def _deal(values: tuple[str, ...], num: int, rng: np.random.Generator) -> list[str]:
    """`num` values in random order, each used equally often as far as that goes."""
    decks = [rng.permutation(values) for _ in range(-(-num // len(values)))]
    return [str(value) for value in rng.permutation(np.concatenate(decks)[:num])]


def _people_names(rng: np.random.Generator) -> list[tuple[str, str]]:
    """(name, pronoun) of 16 people; no two share their first syllable, no ending is used twice."""
    first = rng.permutation(_FIRST)[:NUM_PEOPLE]
    last = [(end, "she") for end in _SHE_LAST] + [(end, "he") for end in _HE_LAST]
    order = rng.permutation(len(last))[:NUM_PEOPLE]
    return [(f"{first[i]}{last[j][0]}", last[j][1]) for i, j in enumerate(order)]


def _place_names(rng: np.random.Generator) -> list[str]:
    """8 names of towns; each first part and no ending is used twice."""
    first, last = rng.permutation(_PLACE_FIRST)[:NUM_PLACES], rng.permutation(_PLACE_LAST)[:NUM_PLACES]
    return [f"{start}{end}" for start, end in zip(first, last, strict=True)]
