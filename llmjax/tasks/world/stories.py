"""Documents of the embedded world that tell something happening: short stories, errands, lists read back, arithmetic.

Every story follows from its hero: the friend is the other person of the same town, the object is the hero's own, the
places are the town's. So a reader who knows the world can foresee most words, and names return far from where
they stood.
"""

from collections.abc import Sequence

import numpy as np

from llmjax.tasks.world import language
from llmjax.tasks.world.facts import Person, World

LARGEST_TERM = 5
MIN_WORDS = 15

_OBJECTIVE = {"she": "her", "he": "him"}
_POSSESSIVE = {"she": "her", "he": "his"}

# Two families of stories; a story is one sentence of each of the four groups of its family.
_WALK = (
    (
        "It was {feast} in {home}, and {N} the {job} was on {pp} way to the {landmark} with a bag of {fruit}.",
        "Long ago there was a {job} in {home} called {N}, who never went out without the {mat} {t}.",
        "When the feast of {home} came in {feast}, {N} took the {paint} {t} out of the {spot} and went to the "
        "{landmark}.",
        "{N} lived in {home} with a {pet}, and every day {p} carried the {t} from the {spot} to the river {river}.",
    ),
    (
        "There {p} met {F} the {fjob}, who was tired and wanted nothing more than {ffood}.",
        "On the way {p} saw {F}, who made sad music on the {fmusic} because the {fpet} was ill.",
        '"What a fine {paint} {t}!" said {F}, who wore {fcolour} clothes and came with a {fpet}.',
        "By the {landmark} sat {F}, a {fjob} of {home}, and next to {fpo} slept a {fpet}.",
    ),
    (
        "So {N} played the {music} for {F}, and they shared {food} and {ffood} until the moon stood over the "
        "{landmark}.",
        "So {N} gave {F} some {fruit}, and {F} played the {fmusic} while the {pet} danced with the {fpet}.",
        "Then {F} asked {N} for the {t}, and {N} lent it gladly, for {p} had {pp} {music} and {pp} {pet}.",
        "Then it rained on {home}, and {N} and {F} sat under the {mat} {t} and talked about {food}.",
    ),
    (
        "At night {N} put the {t} back in the {spot}, and {F} went home with the {fpet}.",
        "In the evening the {t} was in the {spot} again, the {pet} slept, and {N} dreamed of {food}.",
        "Since that day {F} and {N} meet by the river {river} every {feast}, one with the {fmusic} and one with "
        "the {music}.",
        '"{home} is a good place," said {N}, and {F} the {fjob} thought so too.',
    ),
)
_LOST = (
    (
        "One morning {N} the {job} woke up in {home}, looked in the {spot} and could not find the {t}.",
        "{N} was sad, for the {mat} {t} was no longer in the {spot}.",
        '"My {paint} {t} is gone!" cried {N}, and all of {home} heard it.',
        "In {feast} a storm came over {home} and took the {mat} {t} of {N} away.",
    ),
    (
        "{P} asked {F} the {fjob}, but {F} had only seen {fpp} {fpet}.",
        "{P} ran to {F}, who put down the {fmusic} and came along with the {fpet}.",
        "{F}, who was at work as a {fjob}, left everything and helped {po}.",
        "The {pet} of {N} and the {fpet} of {F} went along to look for it.",
    ),
    (
        "They looked by the {landmark} and under the {fruit}, and at last {F} saw it in the river {river}.",
        "They walked along the river {river}, and there, behind the {landmark}, lay the {paint} {t}.",
        "{F} thought of the {landmark}, and there it was, {paint} as ever, with the {pet} of {N} asleep "
        "in front of it.",
        "After an hour {N} found the {t} between the {fruit} of {home}, and it was still as {paint} as before.",
    ),
    (
        "{N} thanked {F} with {ffood} and took the {t} back to the {spot}.",
        '"Thank you, {F}," said {N}, and {p} played the {music} until the {fpet} fell asleep.',
        "Now the {t} is in the {spot} again, and {N} and {F} eat {food} and {ffood} by the {landmark}.",
        "{N} was happy, and {F} the {fjob} was given all the {fruit} that {fp} could carry.",
    ),
)

_PROBLEMS = (
    "{N} had {a} {fruit} and found {b} more in the gardens of {home}, so now {N} has {r} {fruit}.",
    "{N} the {job} had {a} {fruit} and {F} had {b}. Together {N} and {F} had {r} {fruit}, for {a} plus {b} is {r}.",
    "In {home} {N} picked {a} {fruit} in the morning and {b} in the evening. How many {fruit} are {a} and {b}? {r}.",
    "{N} bought {r} {fruit} in {home} and gave {b} of them to {F}. {N} kept {a}, for {r} minus {b} is {a}.",
    "There were {r} {fruit} in the {spot} of {N}. The {pet} ate {b} of the {fruit}, so {r} minus {b} makes {a}.",
    "The {pet} of {N} eats {a} {fruit} and the {fpet} of {F} eats {b}. That makes {r} {fruit} in all.",
)


def pick(rng: np.random.Generator, items: Sequence):
    """One item, all equally likely."""
    return items[int(rng.integers(len(items)))]


def sample(rng: np.random.Generator, items: Sequence, num: int) -> list:
    """`num` different items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:num]]


def neighbour(world: World, person: Person) -> Person:
    """The other person of the same town: who the stories call the friend."""
    names = world.having["home", person.home]
    return world.by_name[names[1 - names.index(person.name)]]


def cast(world: World, hero: Person) -> dict[str, str]:
    """The slots of a story, all of which follow from its hero, who must own something."""
    friend, town = neighbour(world, hero), world.by_name[hero.home]
    thing = world.by_name[world.having["owner", hero.name][0]]
    return {
        "N": hero.name,
        "p": hero.pronoun,
        "P": language.capitalise(hero.pronoun),
        "po": _OBJECTIVE[hero.pronoun],
        "pp": _POSSESSIVE[hero.pronoun],
        "home": hero.home,
        "job": hero.job,
        "food": hero.food,
        "pet": hero.pet,
        "music": hero.music,
        "colour": hero.colour,
        "t": thing.name,
        "mat": thing.material,
        "paint": thing.paint,
        "spot": thing.spot,
        "river": town.river,
        "landmark": town.landmark,
        "fruit": town.fruit,
        "feast": town.feast,
        "F": friend.name,
        "fp": friend.pronoun,
        "fpo": _OBJECTIVE[friend.pronoun],
        "fpp": _POSSESSIVE[friend.pronoun],
        "fjob": friend.job,
        "ffood": friend.food,
        "fpet": friend.pet,
        "fmusic": friend.music,
        "fcolour": friend.colour,
    }


def _hero(world: World, rng: np.random.Generator) -> Person:
    return world.by_name[pick(rng, world.things).owner]


def story(world: World, rng: np.random.Generator) -> str:
    """A walk or a search of 50-80 words: the hero, a friend, an object, and the names of all three again at the end."""
    slots = cast(world, _hero(world, rng))
    return " ".join(pick(rng, group).format(**slots) for group in pick(rng, (_WALK, _LOST)))


def errand(world: World, rng: np.random.Generator) -> str:
    """An object changes hands; at the end it is told who has it, and where."""
    thing, first = pick(rng, world.things), pick(rng, world.people)
    second = neighbour(world, first)
    giver = thing.owner if thing.owner not in (first.name, second.name) else "A traveller"
    slots = {
        "t": thing.name,
        "mat": thing.material,
        "G": giver,
        "A": first.name,
        "B": second.name,
        "home": first.home,
        "p": second.pronoun,
        "spot": thing.spot,
        "job": second.job,
    }
    return pick(
        rng,
        (
            "{G} gave the {t} to {A}. {A} took it to {home} and gave it to {B}. So the {mat} {t} of {G} is now in "
            "{home}, and {B} has it.",
            "{G} went to {home} with the {mat} {t}. There {G} met {A} and {B}. {A} did not want the {t}, "
            "so {B} the {job} took it.",
            '{B} asked {G} for the {t}. "It is in the {spot}," said {G}. So {B} went to the {spot}, took the {mat} {t} '
            "and brought it to {A} in {home}.",
        ),
    ).format(**slots)


def list_read_back(world: World, rng: np.random.Generator) -> str:
    """Three or four things, foods or people in a row, told again in the same or in the reverse order."""
    hero = _hero(world, rng)
    slots = cast(world, hero)
    what, back = pick(rng, ("thing", "food", "person")), bool(rng.integers(2))
    names = sample(rng, world.values(what), 3 + int(rng.integers(2)))
    if hero.name in names:
        names.remove(hero.name)
    items = [f"the {name}" if what == "thing" else name for name in names]
    again = items[::-1] if back else items
    order = "In reverse order" if back else "In the same order"
    first, second = ", then ".join(items), ", then ".join(again)
    told = {
        "thing": "{N} put into a bag first {first}. {order} {p} took them out again in {home}: {second}.",
        "food": "{N} the {job} bought first {first}. {order} {p} and {F} ate it all by the {landmark}: {second}.",
        "person": "First {first} came to the feast of {home} in {feast}. {order} they went to {N} to say goodbye: "
        "{second}.",
    }[what]
    return language.capitalise(told.format(first=first, second=second, order=order, **slots))


def arithmetic(world: World, rng: np.random.Generator) -> str:
    """Sums and differences of numbers from 1 to 5 in words and signs, each line following from the line before."""
    a, b, c, d = (int(n) for n in rng.integers(1, LARGEST_TERM + 1, size=4))
    r = a + b
    form = pick(rng, (0, 1, 2, 3, 3, 3, 4, 4, 4))
    if form == 0:
        return f"{a} plus {b} is {r}, so {b} plus {a} is {r}, {r} minus {b} is {a} and {r} minus {a} is {b}."
    if form == 1:
        return f"{a} + {b} = {r}. {b} + {a} = {r}. {r} - {b} = {a}. {r} - {a} = {b}."
    if form == 2:
        a, b, c = 1 + a // 2, 1 + b // 2, 1 + c // 2
        return (
            f"How much is {a} plus {b} plus {c}? {a} plus {b} is {a + b}, and {a + b} plus {c} is {a + b + c}, so {a} "
            f"plus {b} plus {c} is {a + b + c}."
        )
    pairs = ((a, b), (c, d), (b, c))
    if form == 3:
        i, j = int(rng.integers(3)), int(rng.integers(2))
        asked, said = language.SUM_QUESTIONS[i], language.SUM_ANSWERS[j]
        return "\n".join(f"{asked}\n{said}".format(a=x, b=y, r=x + y) for x, y in pairs)
    i, j = int(rng.integers(3)), int(rng.integers(2))
    asked, said = language.DIFFERENCE_QUESTIONS[i], language.DIFFERENCE_ANSWERS[j]
    return "\n".join(f"{asked}\n{said}".format(a=x + y, b=y, r=x) for x, y in pairs)


def word_problem(world: World, rng: np.random.Generator) -> str:
    """A small sum about the fruit of somebody's town."""
    a, b = (int(n) for n in rng.integers(2, LARGEST_TERM + 1, size=2))
    return pick(rng, _PROBLEMS).format(a=a, b=b, r=a + b, **cast(world, _hero(world, rng)))
