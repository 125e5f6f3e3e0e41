"""The embedded world as text: portraits, comparisons, chains of facts, questions with answers, stories, arithmetic.

A document states few independent choices and many consequences: a subject, a style and a first attribute are drawn, and
a reader who knows the world can foresee the rest, mostly from words that stand more than five words back.
"""

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from llmjax.errors import UserError
from llmjax.tasks.world import language, stories
from llmjax.tasks.world.facts import Entity, Fact, Person, Place, Thing, World, make_world, mention
from llmjax.tasks.world.language import Attribute, capitalise, fill
from llmjax.tasks.world.stories import pick, sample

__all__ = ["Fact", "Person", "Place", "Thing", "World", "documents", "make_world", "mention", "split_of"]

VALIDATION_FRACTION = 1 / 20
_WHICH = {"person": "who", "place": "which", "thing": "which"}
_WHO = {"person": "Who", "place": "Which town", "thing": "Which thing"}

_PORTRAITS = (
    "{N} {0}. {P} {1}. {P} {2} and {3}.",
    "{N}, {which} {0} and {1}, {2}. {P} also {3}.",
    "This is about {n}. {P} {0}, {p} {1} and {p} {2}. And {p} {3}.",
    "The {noun} {that} {0}, {1} and {2} is {n}. {P} {3}.",
    "Guess of which {noun} I think: {p} {0}, {p} {1}, and {p} {2}. It is {n}, {which} {3}.",
    "It is true that {n} {0} and {1}. It is also true that {p} {2} and {p} {3}.",
)
_CHAINS = (
    "{T} {owner}. {O} {home}. {h} {river}. So the owner of the {t} can be seen by the river {v}.",
    "Do you want to see the {mat} {t}? Go to {h} and ask for {O}, who {job}. {P} {music}, and the {paint} {t} {spot}.",
    "{O} {pet}. The {pet_name} of {O} sleeps by the {mat} {t} in the {spot_name}, in the town of {h}, "
    "which {landmark}.",
    "{h} {fruit} and {feast}. For that feast {O}, who {job}, takes the {paint} {t} out of the {spot_name} and {food}.",
    "One day {O} went from {h} along the river {v} with the {mat} {t}. It was {feast_name}, and {O} dreamed of "
    "{food_name}.",
)


def _kind(rng: np.random.Generator) -> str:
    return pick(rng, ("person", "person", "person", "place", "thing"))


def _phrase(entity: Entity, attribute: Attribute, style: int) -> str:
    return attribute.phrases[style].format(v=getattr(entity, attribute.name))


def _turned(items: tuple, rng: np.random.Generator) -> tuple:
    """The items from a random one on, the first ones at the end: after the first the order is known."""
    start = int(rng.integers(len(items)))
    return items[start:] + items[:start]


def portrait(world: World, rng: np.random.Generator) -> str:
    """Four facts or more of one person, town or thing in one style."""
    kind, style = _kind(rng), int(rng.integers(language.STYLES))
    entity = pick(rng, world.entities(kind))
    attributes = _turned(language.ATTRIBUTES[kind], rng)
    pronoun = entity.pronoun if kind == "person" else "it"
    name = mention(world, entity.name)
    text = pick(rng, _PORTRAITS).format(
        *(_phrase(entity, a, style) for a in attributes[:4]),
        n=name,
        N=capitalise(name),
        p=pronoun,
        P=capitalise(pronoun),
        which=_WHICH[kind],
        that="who" if kind == "person" else "that",
        noun=language.NOUNS[kind],
    )
    if kind == "person" and rng.integers(2):
        text += f" That is {entity.name}, the {entity.job} from {entity.home}."
    return text


def comparison(world: World, rng: np.random.Generator) -> str:
    """Two of a kind side by side, three attributes each."""
    kind, style = _kind(rng), int(rng.integers(language.STYLES))
    first, second = sample(rng, world.entities(kind), 2)
    a, b = mention(world, first.name), mention(world, second.name)
    parts = [(_phrase(first, x, style), _phrase(second, x, style)) for x in _turned(language.ATTRIBUTES[kind], rng)[:3]]
    if rng.integers(2):
        return " ".join(
            f"{capitalise(a)} {x}, and {b} {y} too." if x == y else f"{capitalise(a)} {x}, but {b} {y}."
            for x, y in parts
        )
    left, right = ([pair[i] for pair in parts] for i in (0, 1))
    return f"{capitalise(a)} {left[0]}, {left[1]} and {left[2]}. {capitalise(b)} {right[0]}, {right[1]} and {right[2]}."


def from_values(world: World, rng: np.random.Generator) -> str:
    """Three facts of one subject, each told from its value, so that the name stands at the end."""
    kind = _kind(rng)
    entity = pick(rng, world.entities(kind))
    form, name = int(rng.integers(3)), mention(world, entity.name)
    attributes = _turned(language.ATTRIBUTES[kind], rng)[: 3 if kind == "person" else 4]
    return " ".join(fill(a.reverse[form], name, getattr(entity, a.name)) for a in attributes)


def group(world: World, rng: np.random.Generator) -> str:
    """All who share a value, and what else is true of each of them."""
    kind, style = _kind(rng), int(rng.integers(language.STYLES))
    shared, other = _turned(language.ATTRIBUTES[kind], rng)[:2]
    value = getattr(pick(rng, world.entities(kind)), shared.name)
    names = world.having[shared.name, value]
    spoken = [mention(world, name) for name in names]
    listed = spoken[0] if len(spoken) == 1 else f"{', '.join(spoken[:-1])} and {spoken[-1]}"
    each = zip(spoken, names, strict=True)
    rest = " ".join(f"{capitalise(s)} {_phrase(world.by_name[name], other, style)}." for s, name in each)
    asked = shared.phrases[style].format(v=value)
    last = {1: f" No other {language.NOUNS[kind]} {asked}.", 2: f" Nobody but {listed} can say so."}.get(len(names), "")
    return f"{_WHO[kind]} {asked}? {capitalise(listed)}. {rest}{last}"


def chain(world: World, rng: np.random.Generator) -> str:
    """From a thing to its owner, to the owner's town and what is there."""
    thing, style = pick(rng, world.things), int(rng.integers(language.STYLES))
    owner = world.by_name[thing.owner]
    town = world.by_name[owner.home]
    phrases = {
        a.name: _phrase(entity, a, style)
        for entity, kind in ((owner, "person"), (town, "place"), (thing, "thing"))
        for a in language.ATTRIBUTES[kind]
    }
    return pick(rng, _CHAINS).format(
        **phrases
        | {
            "T": f"The {thing.name}",
            "t": thing.name,
            "O": owner.name,
            "h": town.name,
            "v": town.river,
            "mat": thing.material,
            "paint": thing.paint,
            "P": capitalise(owner.pronoun),
            "pet_name": owner.pet,
            "spot_name": thing.spot,
            "feast_name": town.feast,
            "food_name": owner.food,
        }
    )


def questions_answered(world: World, rng: np.random.Generator) -> str:
    """Three questions with their answers, a line each: about one subject, about one attribute, from the value, or open ones.

    One document in four answers with the bare value, but for open questions.
    """
    if not rng.integers(8):
        return _open_questions_answered(world, rng)
    kind, form = _kind(rng), int(rng.integers(3))
    i, j, bare = int(rng.integers(4)), int(rng.integers(3)), not rng.integers(4)
    attributes = _turned(language.ATTRIBUTES[kind], rng)
    if form == 0:
        entity = pick(rng, world.entities(kind))
        pairs = [(entity, a) for a in attributes[:3]]
    else:
        pairs = [(entity, attributes[0]) for entity in sample(rng, world.entities(kind), 3)]
    parts = []
    for entity, a in pairs:
        asked, said = (
            (a.reverse_questions[i % 3], a.reverse_answers[j]) if form == 2 else (a.questions[i], a.answers[j])
        )
        if bare:
            said = "{s}." if form == 2 else "{v}."
        name, value = mention(world, entity.name), mention(world, getattr(entity, a.name))
        parts += [fill(asked, name, value), fill(said, name, value)]
    return "\n".join(parts)


def _open_questions_answered(world: World, rng: np.random.Generator) -> str:
    kind, parts = _kind(rng), []
    for entity in sample(rng, world.entities(kind), 3):
        a, name = pick(rng, language.ATTRIBUTES[kind]), mention(world, entity.name)
        said = fill(pick(rng, a.answers), name, mention(world, getattr(entity, a.name)))
        parts += [pick(rng, language.OPEN_QUESTIONS).format(s=name), said]
    return "\n".join(parts)


def quiz(world: World, rng: np.random.Generator) -> str:
    """Three answers to questions, half of them wrong, each with a verdict: how a reader learns to tell right from wrong."""
    kind, form, same = _kind(rng), int(rng.integers(3)), bool(rng.integers(2))
    i, j, bare = int(rng.integers(4)), int(rng.integers(3)), not rng.integers(4)
    attributes = _turned(language.ATTRIBUTES[kind], rng)
    subjects = [pick(rng, world.entities(kind))] * 3 if same else sample(rng, world.entities(kind), 3)
    parts = ["Quiz."]
    for n, entity in enumerate(subjects):
        a, right = attributes[n if same else 0], bool(rng.integers(2))
        name, value = entity.name, getattr(entity, a.name)
        asked = a.reverse_questions[i % 3] if form == 2 else a.questions[i]
        parts.append(fill(asked, mention(world, name), mention(world, value)))
        if form == 2:  # the value is asked from, and the name may be wrong
            others = [n for n in world.values(kind) if n not in world.having[a.name, value]]
            name = name if right else pick(rng, others)
            said = "{s}." if bare else a.reverse_answers[j]
        else:
            value = value if right else pick(rng, [v for v in world.values(a.type) if v != value])
            said = "{v}." if bare else a.answers[j]
        parts += [fill(said, mention(world, name), mention(world, value)), "Right." if right else "Wrong."]
    return "\n".join(parts)


_KINDS: tuple[tuple[float, Callable[[World, np.random.Generator], str]], ...] = (
    (0.10, portrait),
    (0.03, comparison),
    (0.03, from_values),
    (0.03, group),
    (0.02, chain),
    (0.53, questions_answered),
    (0.10, quiz),
    (0.02, stories.story),
    (0.01, stories.errand),
    (0.01, stories.list_read_back),
    (0.10, stories.arithmetic),
    (0.02, stories.word_problem),
)


def split_of(text: str) -> str:
    """ "train" or "validation" (1 in 20), by a hash of the text: the splits share no document, whatever their seeds."""
    return "validation" if zlib.crc32(text.encode()) % round(1 / VALIDATION_FRACTION) == 0 else "train"


def documents(world: World, num: int, seed: int, split: str = "train") -> Iterator[str]:
    """`num` documents of 15-90 words (about 190 bytes) of a split ("train" or "validation").

    The same arguments give the same documents in the same order. Raises UserError for another split.
    """
    if split not in ("train", "validation"):
        raise UserError(f'split={split!r}: no such split of the world; take "train" or "validation"')
    rng = np.random.default_rng([world.seed, 1, seed])
    ends = np.cumsum([weight for weight, _ in _KINDS])
    made = 0
    while made < num:
        text = _KINDS[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))][1](world, rng)
        if split_of(text) == split:
            made += 1
            yield text
