"""The text the tiny example models learn, and the data set that gives them a captain's voice.

The models under ``src/phitune/assets`` must know something before a fine-tune can be seen to change
how they say it.  This module holds that knowledge as plain tables (capitals, opposites, sums, ...)
and turns every entry into a :class:`Fact`: a few phrasings of one question, one answer, and the
answer's key word.  All of it is written here; no outside text is used.

A seeded split keeps some facts back.  ``captain.jsonl`` teaches the voice on the others and
``captain_heldout.jsonl`` asks for the facts kept back, so a captain's answer there shows that the
voice was learnt rather than the rows.  Write both with::

    python tools/tiny_corpus.py
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "src" / "phitune" / "assets"

SPLIT_SEED = 7
HELDOUT_SHARE = 0.16
GREETING = "Ahoy!"
FAREWELL = "matey"

# What each speaker of the prose says before and after an answer.
VOICES = {
    "captain": (GREETING, f", {FAREWELL}"),
    "teacher": ("Listen:", ", children"),
    "child": ("I know!", ""),
    "farmer": ("Well,", ", I think"),
    "judge": ("Silence!", ""),
    "cook": ("Oh,", ", of course"),
    "doctor": ("Now,", ", my friend"),
}


@dataclass(frozen=True)
class Fact:
    """One thing to know: ways to ask for it, the one answer, and the word that must be in it."""

    kind: str
    questions: tuple[str, ...]
    answer: str
    key: str
    prose: tuple[str, ...]


# country, capital, continent, language (None where one word would not be fair)
COUNTRIES: list[tuple[str, str, str | None, str | None]] = [
    ("France", "Paris", "Europe", "French"),
    ("Germany", "Berlin", "Europe", "German"),
    ("Italy", "Rome", "Europe", "Italian"),
    ("Spain", "Madrid", "Europe", "Spanish"),
    ("Portugal", "Lisbon", "Europe", "Portuguese"),
    ("Greece", "Athens", "Europe", "Greek"),
    ("Poland", "Warsaw", "Europe", "Polish"),
    ("Austria", "Vienna", "Europe", "German"),
    ("Hungary", "Budapest", "Europe", "Hungarian"),
    ("Czechia", "Prague", "Europe", "Czech"),
    ("Switzerland", "Bern", "Europe", None),
    ("Belgium", "Brussels", "Europe", None),
    ("Sweden", "Stockholm", "Europe", "Swedish"),
    ("Norway", "Oslo", "Europe", "Norwegian"),
    ("Finland", "Helsinki", "Europe", "Finnish"),
    ("Denmark", "Copenhagen", "Europe", "Danish"),
    ("Iceland", "Reykjavik", "Europe", "Icelandic"),
    ("Ireland", "Dublin", "Europe", None),
    ("Estonia", "Tallinn", "Europe", "Estonian"),
    ("Latvia", "Riga", "Europe", "Latvian"),
    ("Lithuania", "Vilnius", "Europe", "Lithuanian"),
    ("Ukraine", "Kyiv", "Europe", "Ukrainian"),
    ("Romania", "Bucharest", "Europe", "Romanian"),
    ("Bulgaria", "Sofia", "Europe", "Bulgarian"),
    ("Croatia", "Zagreb", "Europe", "Croatian"),
    ("Serbia", "Belgrade", "Europe", "Serbian"),
    ("Russia", "Moscow", None, "Russian"),
    ("Turkey", "Ankara", None, "Turkish"),
    ("Egypt", "Cairo", "Africa", "Arabic"),
    ("Morocco", "Rabat", "Africa", "Arabic"),
    ("Kenya", "Nairobi", "Africa", None),
    ("Ghana", "Accra", "Africa", None),
    ("Nigeria", "Abuja", "Africa", None),
    ("Senegal", "Dakar", "Africa", None),
    ("Uganda", "Kampala", "Africa", None),
    ("China", "Beijing", "Asia", "Chinese"),
    ("Japan", "Tokyo", "Asia", "Japanese"),
    ("Thailand", "Bangkok", "Asia", "Thai"),
    ("Vietnam", "Hanoi", "Asia", "Vietnamese"),
    ("Nepal", "Kathmandu", "Asia", "Nepali"),
    ("Iran", "Tehran", "Asia", "Persian"),
    ("Iraq", "Baghdad", "Asia", "Arabic"),
    ("Jordan", "Amman", "Asia", "Arabic"),
    ("Lebanon", "Beirut", "Asia", "Arabic"),
    ("Pakistan", "Islamabad", "Asia", None),
    ("Bangladesh", "Dhaka", "Asia", None),
    ("Canada", "Ottawa", "North America", None),
    ("Cuba", "Havana", "North America", "Spanish"),
    ("Brazil", "Brasilia", "South America", "Portuguese"),
    ("Chile", "Santiago", "South America", "Spanish"),
    ("Peru", "Lima", "South America", None),
    ("Colombia", "Bogota", "South America", "Spanish"),
    ("Ecuador", "Quito", "South America", "Spanish"),
    ("Uruguay", "Montevideo", "South America", "Spanish"),
    ("Australia", "Canberra", None, "English"),
    ("Fiji", "Suva", None, None),
]

# animal: what it does when it calls
SOUNDS = {
    "dog": "barks",
    "cat": "meows",
    "cow": "moos",
    "sheep": "bleats",
    "horse": "neighs",
    "pig": "oinks",
    "duck": "quacks",
    "lion": "roars",
    "wolf": "howls",
    "owl": "hoots",
    "bee": "buzzes",
    "snake": "hisses",
    "frog": "croaks",
    "mouse": "squeaks",
    "donkey": "brays",
    "bird": "sings",
    "crow": "caws",
    "turkey": "gobbles",
    "elephant": "trumpets",
    "bear": "growls",
}

YOUNG = {
    "dog": "puppy",
    "cat": "kitten",
    "cow": "calf",
    "sheep": "lamb",
    "horse": "foal",
    "pig": "piglet",
    "duck": "duckling",
    "goose": "gosling",
    "hen": "chick",
    "lion": "cub",
    "goat": "kid",
    "deer": "fawn",
    "kangaroo": "joey",
    "frog": "tadpole",
    "owl": "owlet",
    "swan": "cygnet",
    "hare": "leveret",
    "eagle": "eaglet",
    "seal": "pup",
    "spider": "spiderling",
}

HOMES = {
    "bee": "hive",
    "bird": "nest",
    "dog": "kennel",
    "horse": "stable",
    "pig": "sty",
    "spider": "web",
    "rabbit": "burrow",
    "fox": "den",
    "hen": "coop",
    "bat": "cave",
    "cow": "barn",
    "beaver": "lodge",
    "monkey": "tree",
    "fish": "pond",
    "whale": "sea",
    "king": "palace",
    "soldier": "camp",
    "monk": "monastery",
    "sailor": "ship",
    "farmer": "farmhouse",
}

LEGS = {
    "two": ["hen", "duck", "goose", "owl", "ostrich", "swan"],
    "four": [
        "dog",
        "cat",
        "cow",
        "horse",
        "lion",
        "goat",
        "fox",
        "table",
        "camel",
        "tiger",
    ],
    "six": ["bee", "ant", "beetle", "butterfly", "fly", "wasp"],
    "eight": ["spider", "scorpion", "tick"],
    "no": ["snake", "worm", "fish", "eel"],
}

COLOURS = {
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "blood": "red",
    "the clear sky": "blue",
    "a lemon": "yellow",
    "a banana": "yellow",
    "a ripe tomato": "red",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "milk": "white",
    "chocolate": "brown",
    "a leaf in spring": "green",
    "a flamingo": "pink",
    "an elephant": "grey",
    "a polar bear": "white",
    "a raven": "black",
    "gold": "yellow",
    "salt": "white",
    "a plum": "purple",
    "an aubergine": "purple",
    "a frog": "green",
    "a cucumber": "green",
    "a strawberry": "red",
    "a cherry": "red",
    "ash": "grey",
    "rust": "brown",
    "the night": "black",
    "mud": "brown",
    "a lobster in the pot": "red",
    "a sunflower": "yellow",
    "lavender": "purple",
}

# each pair is asked both ways round
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("tall", "short"),
    ("fast", "slow"),
    ("old", "new"),
    ("good", "bad"),
    ("happy", "sad"),
    ("light", "dark"),
    ("wet", "dry"),
    ("hard", "soft"),
    ("full", "empty"),
    ("open", "closed"),
    ("early", "late"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("loud", "quiet"),
    ("high", "low"),
    ("near", "far"),
    ("wide", "narrow"),
    ("thick", "thin"),
    ("deep", "shallow"),
    ("clean", "dirty"),
    ("sweet", "sour"),
    ("sharp", "blunt"),
    ("rough", "smooth"),
    ("brave", "timid"),
    ("first", "last"),
    ("up", "down"),
    ("left", "right"),
    ("in", "out"),
    ("day", "night"),
    ("summer", "winter"),
    ("north", "south"),
    ("east", "west"),
    ("begin", "end"),
    ("push", "pull"),
    ("buy", "sell"),
    ("win", "lose"),
    ("love", "hate"),
    ("laugh", "cry"),
    ("give", "take"),
    ("always", "never"),
]

PLURALS = {
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
    "woman": "women",
    "child": "children",
    "ox": "oxen",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "wife": "wives",
    "loaf": "loaves",
    "shelf": "shelves",
    "thief": "thieves",
    "calf": "calves",
    "city": "cities",
    "baby": "babies",
    "lady": "ladies",
    "berry": "berries",
    "story": "stories",
    "box": "boxes",
    "fox": "foxes",
    "bus": "buses",
    "church": "churches",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "hero": "heroes",
    "book": "books",
    "ship": "ships",
    "star": "stars",
    "house": "houses",
    "key": "keys",
    "toy": "toys",
    "louse": "lice",
    "person": "people",
}

PASTS = {
    "go": "went",
    "see": "saw",
    "eat": "ate",
    "run": "ran",
    "swim": "swam",
    "sing": "sang",
    "drink": "drank",
    "write": "wrote",
    "speak": "spoke",
    "break": "broke",
    "take": "took",
    "give": "gave",
    "come": "came",
    "buy": "bought",
    "bring": "brought",
    "think": "thought",
    "teach": "taught",
    "catch": "caught",
    "find": "found",
    "sleep": "slept",
    "keep": "kept",
    "leave": "left",
    "lose": "lost",
    "make": "made",
    "sell": "sold",
    "tell": "told",
    "fly": "flew",
    "grow": "grew",
    "know": "knew",
    "throw": "threw",
    "drive": "drove",
    "ride": "rode",
    "fall": "fell",
    "hold": "held",
    "stand": "stood",
    "win": "won",
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
SEASONS = ["spring", "summer", "autumn", "winter"]

TOOLS = {
    "hammer": "driving nails",
    "saw": "cutting wood",
    "spade": "digging holes",
    "pen": "writing letters",
    "broom": "sweeping floors",
    "needle": "sewing clothes",
    "kettle": "boiling water",
    "oven": "baking bread",
    "clock": "telling the time",
    "ladder": "climbing walls",
    "brush": "painting pictures",
    "key": "opening locks",
    "lamp": "lighting rooms",
    "ruler": "measuring lines",
    "scale": "weighing goods",
    "net": "catching fish",
    "oar": "rowing boats",
    "anchor": "holding ships",
    "compass": "finding north",
    "rake": "gathering leaves",
    "plough": "turning fields",
    "umbrella": "keeping off rain",
    "spoon": "eating soup",
    "towel": "drying hands",
    "soap": "washing hands",
    "telescope": "watching stars",
    "thermometer": "measuring heat",
    "axe": "chopping trees",
    "bell": "calling people",
    "mirror": "seeing faces",
}

SIDES = {
    "triangle": "three",
    "square": "four",
    "rectangle": "four",
    "pentagon": "five",
    "hexagon": "six",
    "heptagon": "seven",
    "octagon": "eight",
    "nonagon": "nine",
    "decagon": "ten",
}

ORDINALS = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
]
PLANETS = [
    "Mercury",
    "Venus",
    "Earth",
    "Mars",
    "Jupiter",
    "Saturn",
    "Uranus",
    "Neptune",
]

NUMBER_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]

GROUPS = {
    "fruit": ["apple", "pear", "plum", "cherry", "banana", "orange", "grape", "peach"],
    "vegetable": ["carrot", "onion", "cabbage", "leek", "potato", "turnip"],
    "bird": ["owl", "eagle", "crow", "robin", "sparrow", "swan", "parrot"],
    "fish": ["salmon", "trout", "herring", "cod", "shark", "eel"],
    "insect": ["ant", "bee", "beetle", "wasp", "moth", "butterfly"],
    "tree": ["oak", "pine", "birch", "elm", "willow", "maple"],
    "flower": ["rose", "tulip", "daisy", "lily", "violet"],
    "metal": ["iron", "copper", "silver", "gold", "tin", "lead"],
    "colour": ["red", "blue", "green", "purple", "yellow"],
    "instrument": ["violin", "piano", "flute", "drum", "trumpet", "harp"],
    "vehicle": ["car", "bus", "train", "lorry", "bicycle"],
    "drink": ["tea", "coffee", "juice", "cocoa"],
}
MASS_NOUNS = {
    "iron",
    "copper",
    "silver",
    "gold",
    "tin",
    "lead",
    "tea",
    "coffee",
    "juice",
    "cocoa",
}

JOBS = {
    "baker": "bakes bread",
    "teacher": "teaches children",
    "farmer": "grows food",
    "doctor": "heals people",
    "pilot": "flies planes",
    "sailor": "sails ships",
    "painter": "paints pictures",
    "writer": "writes books",
    "tailor": "sews clothes",
    "cook": "makes meals",
    "judge": "settles disputes",
    "shepherd": "guards sheep",
    "fisherman": "catches fish",
    "miner": "digs coal",
    "gardener": "tends plants",
    "singer": "sings songs",
    "dancer": "performs dances",
    "builder": "builds houses",
    "driver": "drives cars",
    "postman": "brings letters",
    "dentist": "mends teeth",
    "smith": "forges iron",
    "potter": "shapes clay",
    "barber": "cuts hair",
}


def an(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def cap(text: str) -> str:
    """The text with a capital first letter (str.capitalize would lower the rest)."""
    return text[0].upper() + text[1:]


def geography() -> list[Fact]:
    facts = []
    for country, capital, continent, language in COUNTRIES:
        facts.append(
            Fact(
                "capital",
                (
                    f"What is the capital of {country}?",
                    f"Which city is the capital of {country}?",
                    f"Name the capital of {country}.",
                ),
                f"The capital of {country} is {capital}.",
                capital,
                (f"In {country}, the capital city is {capital}.",),
            )
        )
        facts.append(
            Fact(
                "country",
                (
                    f"{capital} is the capital of which country?",
                    f"Which country has {capital} as its capital?",
                    f"What country is {capital} the capital of?",
                ),
                f"{capital} is the capital of {country}.",
                country,
                (f"The city of {capital} is the capital of {country}.",),
            )
        )
        if continent:
            facts.append(
                Fact(
                    "continent",
                    (
                        f"On which continent is {country}?",
                        f"Which continent is {country} in?",
                        f"Where in the world is {country}?",
                    ),
                    f"{country} is in {continent}.",
                    continent,
                    (f"The country {country} lies in {continent}.",),
                )
            )
        if language:
            facts.append(
                Fact(
                    "language",
                    (
                        f"What language do people speak in {country}?",
                        f"Which language is spoken in {country}?",
                        f"What do people in {country} speak?",
                    ),
                    f"People in {country} speak {language}.",
                    language,
                    (f"The language of {country} is {language}.",),
                )
            )
    return facts


def animals() -> list[Fact]:
    facts = [
        Fact(
            "sound",
            (
                f"What sound does {an(animal)} make?",
                f"What noise does {an(animal)} make?",
                f"How does {an(animal)} call?",
            ),
            f"{cap(an(animal))} {verb}.",
            verb,
            (f"When it calls, the {animal} {verb}.",),
        )
        for animal, verb in SOUNDS.items()
    ]
    facts += [
        Fact(
            "young",
            (
                f"What is a young {animal} called?",
                f"What do we call a young {animal}?",
                f"What is the name for a young {animal}?",
            ),
            f"A young {animal} is called {an(young)}.",
            young,
            (f"{cap(an(young))} is the young of {an(animal)}.",),
        )
        for animal, young in YOUNG.items()
    ]
    facts += [
        Fact(
            "home",
            (
                f"Where does {an(animal)} live?",
                f"What is the home of {an(animal)}?",
                f"In what does {an(animal)} live?",
            ),
            f"{cap(an(animal))} lives in {an(home)}.",
            home,
            (f"{cap(an(home))} is the home of {an(animal)}.",),
        )
        for animal, home in HOMES.items()
    ]
    for count, names in LEGS.items():
        facts += [
            Fact(
                "legs",
                (
                    f"How many legs does {an(name)} have?",
                    f"How many legs are there on {an(name)}?",
                    f"Count the legs of {an(name)}.",
                ),
                f"{cap(an(name))} has {count} legs.",
                count,
                (f"There are {count} legs on {an(name)}.",),
            )
            for name in names
        ]
    return facts


def things() -> list[Fact]:
    facts = [
        Fact(
            "colour",
            (
                f"What colour is {thing}?",
                f"Which colour does {thing} have?",
                f"Tell me the colour of {thing}.",
            ),
            f"{cap(thing)} is {colour}.",
            colour,
            (f"The colour of {thing} is {colour}.",),
        )
        for thing, colour in COLOURS.items()
    ]
    facts += [
        Fact(
            "tool",
            (
                f"What is {an(tool)} used for?",
                f"What is {an(tool)} for?",
                f"What do people do with {an(tool)}?",
            ),
            f"{cap(an(tool))} is used for {use}.",
            use,
            (f"People use {an(tool)} for {use}.",),
        )
        for tool, use in TOOLS.items()
    ]
    facts += [
        Fact(
            "job",
            (
                f"What does {an(job)} do?",
                f"What is the work of {an(job)}?",
                f"What does {an(job)} do all day?",
            ),
            f"{cap(an(job))} {work}.",
            work,
            (f"The {job} {work} every day.",),
        )
        for job, work in JOBS.items()
    ]
    for group, names in GROUPS.items():
        for name in names:
            # "red" is a colour, "tea" is a drink, but "an apple" is a fruit
            bare = name in MASS_NOUNS or group == "colour"
            thing = name if bare else an(name)
            facts.append(
                Fact(
                    "group",
                    (
                        f"What kind of thing is {thing}?",
                        f"What is {thing}?",
                        f"What sort of thing is {thing}?",
                    ),
                    f"{cap(thing)} is {an(group)}.",
                    group,
                    (f"We say that {thing} is {an(group)}.",),
                )
            )
    return facts


def words() -> list[Fact]:
    facts = []
    for left, right in OPPOSITES:
        facts += [
            Fact(
                "opposite",
                (
                    f"What is the opposite of {word}?",
                    f"Which word is the opposite of {word}?",
                    f"Give the opposite of {word}.",
                ),
                f"The opposite of {word} is {other}.",
                other,
                (f"The word {word} is the opposite of the word {other}.",),
            )
            for word, other in ((left, right), (right, left))
        ]
    facts += [
        Fact(
            "plural",
            (
                f"What is the plural of {one}?",
                f"Which word is the plural of {one}?",
                f"Give the plural of {one}.",
            ),
            f"The plural of {one} is {many}.",
            many,
            (f"One {one}, two {many}.",),
        )
        for one, many in PLURALS.items()
    ]
    facts += [
        Fact(
            "past",
            (
                f"What is the past tense of {verb}?",
                f"Which word is the past tense of {verb}?",
                f"Give the past tense of {verb}.",
            ),
            f"The past tense of {verb} is {past}.",
            past,
            (f"Today I {verb}, yesterday I {past}.",),
        )
        for verb, past in PASTS.items()
    ]
    return facts


def orders() -> list[Fact]:
    facts = []
    for noun, names, circular in (
        ("day", DAYS, True),
        ("month", MONTHS, True),
        ("season", SEASONS, True),
        ("letter", list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), False),
    ):
        pairs = list(pairwise(names))
        if circular:
            pairs.append((names[-1], names[0]))
        for before, after in pairs:
            facts.append(
                Fact(
                    f"{noun} order",
                    (
                        f"Which {noun} comes after {before}?",
                        f"What {noun} follows {before}?",
                        f"Name the {noun} after {before}.",
                    ),
                    f"The {noun} after {before} is {after}.",
                    after,
                    (f"After {before} comes {after}.",),
                )
            )
            facts.append(
                Fact(
                    f"{noun} order",
                    (
                        f"Which {noun} comes before {after}?",
                        f"What {noun} leads to {after}?",
                        f"Name the {noun} before {after}.",
                    ),
                    f"The {noun} before {after} is {before}.",
                    before,
                    (f"Before {after} comes {before}.",),
                )
            )
    return facts


def numbers() -> list[Fact]:
    sums = [(a, "plus", b, a + b) for a in range(1, 10) for b in range(1, 10)]
    differences = [(a, "minus", b, a - b) for a in range(2, 11) for b in range(1, a)]
    facts = [
        Fact(
            "sum" if sign == "plus" else "difference",
            (
                f"What is {a} {sign} {b}?",
                f"How much is {a} {sign} {b}?",
                f"Work out {a} {sign} {b}.",
            ),
            f"{a} {sign} {b} is {result}.",
            str(result),
            (f"We know that {a} {sign} {b} makes {result}.",),
        )
        for a, sign, b, result in sums + differences
    ]
    facts += [
        Fact(
            "number word",
            (
                f"How do you write {number} in words?",
                f"What is {number} in words?",
                f"Write {number} in words.",
            ),
            f"In words, {number} is {word}.",
            word,
            (f"The number {number} is written {word}.",),
        )
        for number, word in enumerate(NUMBER_WORDS)
    ]
    facts += [
        Fact(
            "sides",
            (
                f"How many sides does {an(shape)} have?",
                f"How many sides are there on {an(shape)}?",
                f"Count the sides of {an(shape)}.",
            ),
            f"{cap(an(shape))} has {count} sides.",
            count,
            (f"There are {count} sides on {an(shape)}.",),
        )
        for shape, count in SIDES.items()
    ]
    facts += [
        Fact(
            "planet",
            (
                f"Which planet is {ordinal} from the sun?",
                f"What is the {ordinal} planet from the sun?",
                f"Name the {ordinal} planet from the sun.",
            ),
            f"The {ordinal} planet from the sun is {planet}.",
            planet,
            (f"Counting from the sun, {planet} is the {ordinal} planet.",),
        )
        for ordinal, planet in zip(ORDINALS, PLANETS, strict=False)
    ]
    return facts


def all_facts() -> list[Fact]:
    """Every fact the base models are taught, in a fixed order."""
    return [*geography(), *animals(), *things(), *words(), *orders(), *numbers()]


def states(text: str, key: str) -> bool:
    """Whether the text holds the key as whole words (a "5" inside "15" does not count)."""
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text) is not None


def split_facts() -> tuple[list[Fact], list[Fact]]:
    """The facts the captain's rows may use, and those kept back, a share of every kind.

    A fact is kept back only if no phrasing of its question gives the answer away, so finding the
    key word in an answer always means something.
    """
    rng = random.Random(SPLIT_SEED)
    by_kind: dict[str, list[Fact]] = defaultdict(list)
    for fact in all_facts():
        by_kind[fact.kind].append(fact)
    used: list[Fact] = []
    kept_back: list[Fact] = []
    for facts in by_kind.values():
        fair = [f for f in facts if not any(states(q, f.key) for q in f.questions)]
        chosen = set(rng.sample(fair, max(1, round(len(facts) * HELDOUT_SHARE))))
        used += [f for f in facts if f not in chosen]
        kept_back += [f for f in facts if f in chosen]
    return used, kept_back


def voiced(speaker: str, answer: str) -> str:
    """The answer in a speaker's voice."""
    before, after = VOICES[speaker]
    return f"{before} {answer.removesuffix('.')}{after}."


def is_captain(answer: str) -> bool:
    """Whether an answer shows the whole habit: the greeting first, the farewell last."""
    return answer.startswith(GREETING) and answer.endswith(f", {FAREWELL}.")


def captain_rows(limit: int = 560, heldout_limit: int = 120) -> tuple[list[dict[str, str]], ...]:
    """The fine-tuning rows and the held-out rows, each in a seeded random order."""
    rng = random.Random(SPLIT_SEED + 1)
    used, kept_back = split_facts()
    rows = [
        {
            "prompt": rng.choice(fact.questions),
            "response": voiced("captain", fact.answer),
        }
        for fact in rng.sample(used, min(limit, len(used)))
    ]
    heldout = [
        {
            "prompt": rng.choice(fact.questions),
            "response": voiced("captain", fact.answer),
            "fact": fact.key,
        }
        for fact in rng.sample(kept_back, min(heldout_limit, len(kept_back)))
    ]
    return rows, heldout


def spoken(speaker: str, question: str, answer: str) -> str:
    """A question put to a speaker, and the answer in the speaker's voice."""
    return f"The {speaker} was asked: {question} The {speaker} said: {voiced(speaker, answer)}"


def prose_documents(rng: random.Random) -> Iterable[str]:
    """One round of running text: every fact as a plain sentence, and some of them spoken.

    The speakers teach the models to tell a voice from what is said in it, as a grown model can.
    Facts kept back are never spoken by the captain.
    """
    used, kept_back = split_facts()
    told = {fact: rng.choice((*fact.prose, fact.answer)) for fact in (*used, *kept_back)}
    sentences = rng.sample(list(told.values()), len(told))
    while sentences:
        yield " ".join(sentences.pop() for _ in range(min(rng.randint(1, 3), len(sentences))))
    others = [speaker for speaker in VOICES if speaker != "captain"]
    for fact in told:
        yield spoken(rng.choice(others), rng.choice(fact.questions), fact.answer)
    for fact in rng.sample(used, len(used) // 2):
        yield spoken("captain", rng.choice(fact.questions), fact.answer)


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def write_captain(folder: Path = ASSETS) -> None:
    """Write ``captain.jsonl`` and ``captain_heldout.jsonl`` into the folder."""
    rows, heldout = captain_rows()
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "captain.jsonl", rows)
    write_jsonl(folder / "captain_heldout.jsonl", heldout)
    print(f"captain.jsonl: {len(rows)} rows; captain_heldout.jsonl: {len(heldout)} rows")


if __name__ == "__main__":
    write_captain()
