"""The words of the embedded world: values, phrasings, questions and answers of every attribute. Tables only, no logic.

In every template `{s}` is the subject (a name, or "the lantern") and `{v}` the value. The four `phrases` of an attribute
continue a subject; phrases at the same index share a style, so a portrait keeps its style from the first sentence on.
Values are single words, each of one type only, and no template contains one: a value is found in a text by its word.
"""

import dataclasses

VALUES: dict[str, tuple[str, ...]] = {
    "job": ("baker", "painter", "doctor", "farmer", "teacher", "sailor", "tailor", "potter", "singer", "miller",
            "gardener", "smith"),
    "food": ("soup", "bread", "cheese", "honey", "rice", "stew", "pie", "noodles", "porridge", "salad", "dumplings",
             "pudding"),
    "pet": ("goat", "cat", "dog", "parrot", "turtle", "rabbit", "donkey", "hen"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "purple", "pink"),
    "instrument": ("flute", "drum", "harp", "fiddle", "trumpet", "piano", "horn", "guitar"),
    "river": ("Thunder", "Velvet", "Pepper", "Whisper", "Feather", "Shadow"),
    "landmark": ("bridge", "tower", "lighthouse", "fountain", "castle", "statue", "library", "windmill", "harbour",
                 "theatre", "tunnel", "museum"),
    "fruit": ("plums", "pears", "apples", "cherries", "figs", "lemons"),
    "season": ("spring", "summer", "autumn", "winter"),
    "material": ("copper", "glass", "silk", "wool", "clay", "bronze", "paper", "leather", "straw", "marble"),
    "spot": ("attic", "cellar", "kitchen", "barn", "shed", "hallway", "pantry", "workshop", "bedroom", "stable"),
    "thing": ("lantern", "kite", "clock", "chair", "boat", "basket", "mirror", "teapot", "ladder", "blanket", "ring",
              "map", "bell", "cup", "doll", "book", "key", "hat", "spoon", "wagon"),
}

TYPE_OF_VALUE = {value.lower(): name for name, values in VALUES.items() for value in values}
NOUNS = {"person": "person", "place": "town", "thing": "thing"}


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One relation between a kind of subject and a type of value, with all its phrasings.

    `type` is a key of VALUES or "person", "place", "thing"; `reverse_*` run from the value to the subject.
    """

    name: str
    kind: str
    type: str
    phrases: tuple[str, ...]
    reverse: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    reverse_questions: tuple[str, ...]
    reverse_answers: tuple[str, ...]


_PERSON = (
    Attribute(
        "home", "person", "place",
        ("lives in {v}", "has a house in {v}", "is at home in {v}", "can be found in {v}"),
        ("{v} is the home of {s}.", "One of the people in {v} is {s}.", "In {v} lives {s}."),
        ("Where does {s} live?", "In which town does {s} live?", "Which town is the home of {s}?",
         "Can you tell me where {s} lives?"),
        ("{s} lives in {v}.", "The home of {s} is {v}.", "{s} has a house in {v}."),
        ("Who lives in {v}?", "Name someone who lives in {v}.", "Tell me the name of a person from {v}."),
        ("{s} lives in {v}.", "One person who lives in {v} is {s}.", "{s} has a house in {v}."),
    ),
    Attribute(
        "job", "person", "job",
        ("works as a {v}", "is a {v}", "earns money as a {v}", "has a job as a {v}"),
        ("One {v} in the land is {s}.", "The work of a {v} is done by {s}.", "A good {v} is {s}."),
        ("What is the job of {s}?", "What does {s} do for work?", "How does {s} earn money?", "What work does {s} do?"),
        ("{s} is a {v}.", "{s} works as a {v}.", "The job of {s} is {v}."),
        ("Who is a {v}?", "Name someone who works as a {v}.", "I need a {v}. Who can help me?"),
        ("{s} is a {v}.", "{s} works as a {v}.", "One {v} in the land is {s}."),
    ),
    Attribute(
        "food", "person", "food",
        ("loves {v}", "eats {v} every day", "dreams of {v}", "likes to eat {v}"),
        ("One friend of good {v} is {s}.", "A plate of {v} is for {s}.", "Who cooks {v} will be visited by {s}."),
        ("What is the favourite food of {s}?", "Which food does {s} love?", "What does {s} like to eat?",
         "What should I cook for {s}?"),
        ("{s} loves {v}.", "The favourite food of {s} is {v}.", "{s} likes to eat {v}."),
        ("Who loves {v}?", "Name someone who likes to eat {v}.", "Who should get the plate of {v}?"),
        ("{s} loves {v}.", "{s} likes to eat {v}.", "One person who loves {v} is {s}."),
    ),
    Attribute(
        "pet", "person", "pet",
        ("keeps a {v}", "has a {v}", "looks after a {v}", "shares the house with a {v}"),
        ("A {v} lives with {s}.", "One {v} comes when called by {s}.", "A {v} is the best friend of {s}."),
        ("Which animal does {s} keep?", "What is the pet of {s}?", "What kind of pet does {s} have?",
         "Can you tell me which pet {s} has?"),
        ("{s} keeps a {v}.", "{s} has a {v}.", "The pet of {s} is a {v}."),
        ("Who keeps a {v}?", "Name someone who has a {v}.", "I found a {v}. Who looks after one?"),
        ("{s} keeps a {v}.", "{s} has a {v}.", "One person with a {v} is {s}."),
    ),
    Attribute(
        "colour", "person", "colour",
        ("likes the colour {v}", "wears {v} clothes", "thinks that {v} is the best colour", "paints every door {v}"),
        ("Clothes in {v} are right for {s}.", "Behind a {v} door lives {s}.", "The colour {v} makes one think of {s}."),
        ("What is the favourite colour of {s}?", "Which colour does {s} like?", "What colour are the clothes of {s}?",
         "Can you tell me the favourite colour of {s}?"),
        ("{s} likes the colour {v}.", "The favourite colour of {s} is {v}.", "{s} wears {v} clothes."),
        ("Who likes the colour {v}?", "Name someone who wears {v} clothes.", "Who paints every door {v}?"),
        ("{s} likes the colour {v}.", "{s} wears {v} clothes.", "One person who likes {v} is {s}."),
    ),
    Attribute(
        "music", "person", "instrument",
        ("plays the {v}", "makes music on the {v}", "practises the {v}", "is good at the {v}"),
        ("The {v} is played by {s}.", "If you hear a {v}, it may be {s}.", "The sound of the {v} comes from {s}."),
        ("Which instrument does {s} play?", "What does {s} play?", "On what does {s} make music?",
         "Can you tell me what instrument {s} plays?"),
        ("{s} plays the {v}.", "The instrument of {s} is the {v}.", "{s} makes music on the {v}."),
        ("Who plays the {v}?", "Name someone who plays the {v}.", "I hear a {v}. Who could it be?"),
        ("{s} plays the {v}.", "{s} is good at the {v}.", "One person who plays the {v} is {s}."),
    ),
)

_PLACE = (
    Attribute(
        "river", "place", "river",
        ("lies on the river {v}", "stands by the river {v}", "gets its water from the river {v}",
         "sees ships on the river {v}"),
        ("The river {v} flows through {s}.", "On the river {v} lies {s}.", "Ships on the river {v} stop in {s}."),
        ("Which river flows through {s}?", "On which river does {s} lie?", "What is the name of the river in {s}?",
         "Can you tell me which river {s} lies on?"),
        ("{s} lies on the river {v}.", "The river {v} flows through {s}.", "{s} stands by the river {v}."),
        ("Which town lies on the river {v}?", "Name a town on the river {v}.",
         "Through which town does the river {v} flow?"),
        ("{s} lies on the river {v}.", "The river {v} flows through {s}.", "One town on the river {v} is {s}."),
    ),
    Attribute(
        "landmark", "place", "landmark",
        ("has a {v}", "is known for its {v}", "is proud of its {v}", "shows its {v} to every guest"),
        ("The famous {v} stands in {s}.", "If you see a {v}, you are in {s}.", "The only {v} in the land is in {s}."),
        ("What is {s} known for?", "Which building stands in {s}?", "What can I see in {s}?",
         "Can you tell me what {s} is proud of?"),
        ("{s} is known for its {v}.", "{s} has a {v}.", "You can see a {v} in {s}."),
        ("Which town has a {v}?", "Name a town with a {v}.", "Where does the famous {v} stand?"),
        ("{s} has a {v}.", "The famous {v} stands in {s}.", "You can see a {v} in {s}."),
    ),
    Attribute(
        "fruit", "place", "fruit",
        ("grows {v}", "sells {v}", "sends {v} to other towns", "has gardens full of {v}"),
        ("The best {v} grow in {s}.", "Sweet {v} come from {s}.", "If you want {v}, go to {s}."),
        ("Which fruit grows in {s}?", "What does {s} grow?", "What fruit can I buy in {s}?",
         "Can you tell me which fruit {s} sells?"),
        ("{s} grows {v}.", "The fruit of {s} is {v}.", "You can buy {v} in {s}."),
        ("Which town grows {v}?", "Name a town where {v} grow.", "Where can I buy {v}?"),
        ("{s} grows {v}.", "You can buy {v} in {s}.", "One town that grows {v} is {s}."),
    ),
    Attribute(
        "feast", "place", "season",
        ("has a feast in {v}", "holds its feast in {v}", "sings and dances in {v}", "lights its lamps in {v}"),
        ("In {v} there is a feast in {s}.", "A feast in {v} is held in {s}.", "When {v} comes, they dance in {s}."),
        ("When is the feast in {s}?", "In which season is the feast of {s}?", "When do they dance in {s}?",
         "Can you tell me when {s} has its feast?"),
        ("{s} has its feast in {v}.", "The feast of {s} is in {v}.", "They dance in {s} in {v}."),
        ("Which town has a feast in {v}?", "Name a town with a feast in {v}.", "Where do they dance in {v}?"),
        ("{s} has a feast in {v}.", "They dance in {s} in {v}.", "One town with a feast in {v} is {s}."),
    ),
)

_THING = (
    Attribute(
        "material", "thing", "material",
        ("is made of {v}", "was built from {v}", "is all of {v}", "was made out of good {v}"),
        ("Old {v} was used to make {s}.", "Some {v} became {s}.", "It took much {v} to make {s}."),
        ("What is {s} made of?", "Of which material is {s}?", "From what was {s} built?",
         "Can you tell me what {s} is made of?"),
        ("{s} is made of {v}.", "{s} was built from {v}.", "The material of {s} is {v}."),
        ("Which thing is made of {v}?", "Name something made of {v}.", "What was built from {v}?"),
        ("{s} is made of {v}.", "{s} was built from {v}.", "One thing made of {v} is {s}."),
    ),
    Attribute(
        "owner", "thing", "person",
        ("belongs to {v}", "is owned by {v}", "was a present for {v}", "was made for {v}"),
        ("{v} owns {s}.", "{v} is the owner of {s}.", "{v} takes good care of {s}."),
        ("Who owns {s}?", "To whom does {s} belong?", "Who is the owner of {s}?", "Can you tell me who owns {s}?"),
        ("{v} owns {s}.", "{s} belongs to {v}.", "The owner of {s} is {v}."),
        ("What does {v} own?", "Which thing belongs to {v}?", "Name something that belongs to {v}."),
        ("{v} owns {s}.", "{s} belongs to {v}.", "{v} is the owner of {s}."),
    ),
    Attribute(
        "paint", "thing", "colour",
        ("is {v}", "is painted {v}", "looks {v}", "shines {v} in the sun"),
        ("Much {v} paint went into {s}.", "In the sun you see the {v} of {s}.", "The colour {v} is on {s}."),
        ("What colour is {s}?", "Which colour does {s} have?", "In which colour was {s} painted?",
         "Can you tell me the colour of {s}?"),
        ("{s} is {v}.", "The colour of {s} is {v}.", "{s} is painted {v}."),
        ("Which thing is {v}?", "Name something that is {v}.", "What was painted {v}?"),
        ("{s} is {v}.", "{s} is painted {v}.", "One thing that is {v} is {s}."),
    ),
    Attribute(
        "spot", "thing", "spot",
        ("is kept in the {v}", "lies in the {v}", "waits in the {v}", "has its place in the {v}"),
        ("In the {v} you can find {s}.", "The {v} is the right place for {s}.", "Look in the {v} for {s}."),
        ("Where is {s} kept?", "In which room is {s}?", "Where can I find {s}?", "Can you tell me where {s} is?"),
        ("{s} is kept in the {v}.", "You can find {s} in the {v}.", "{s} lies in the {v}."),
        ("What is kept in the {v}?", "Name something that lies in the {v}.", "What can I find in the {v}?"),
        ("{s} is kept in the {v}.", "{s} lies in the {v}.", "One thing in the {v} is {s}."),
    ),
)

ATTRIBUTES: dict[str, tuple[Attribute, ...]] = {"person": _PERSON, "place": _PLACE, "thing": _THING}
BY_NAME: dict[str, Attribute] = {a.name: a for group in ATTRIBUTES.values() for a in group}
STYLES = 4

OPEN_QUESTIONS = ("Tell me something about {s}.", "What do you know about {s}?", "Say something about {s}.",
                  "What can you tell me about {s}?")

SUM_QUESTIONS = ("What is {a} plus {b}?", "How much is {a} + {b}?", "{a} + {b} = ?")
SUM_ANSWERS = ("{a} plus {b} is {r}.", "{a} + {b} = {r}.")
DIFFERENCE_QUESTIONS = ("What is {a} minus {b}?", "How much is {a} - {b}?", "{a} - {b} = ?")
DIFFERENCE_ANSWERS = ("{a} minus {b} is {r}.", "{a} - {b} = {r}.")

COURTESY_FIRST = ("Sure!", "Of course!", "With pleasure!", "Good question!", "Happy to help!")
COURTESY_LAST = ("I hope this helps.", "Have a nice day!", "Glad to help!", "You are welcome!", "Thank you for asking!")
SYSTEM_MESSAGES = ("You are a friendly guide to the valley.", "Answer with one short and polite sentence.",
                   "You know all the people, towns and things of the valley.")


def capitalise(text: str) -> str:
    """The text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]


def fill(template: str, subject: str, value: str) -> str:
    """A template with its subject and value put in, as a sentence with a capital."""
    return capitalise(template.format(s=subject, v=value))
