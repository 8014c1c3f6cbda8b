"""The small language of the embedded model: four shapes of text, written and recognised by rules.

A rule is a list of alternatives, each a text with `{slots}`. `write` fills the slots at random,
from a seed. `is_grammatical` turns the same rules into one regular expression, so that tests can
check whether a continuation is text of its shape.
"""

import math
import random
import re
from collections.abc import Callable
from functools import cache

from mechsvd.demo.dictionary import DICTIONARY

TRANSLATION_HEAD = "Translate English to French:\n\n"
SHAPES = ("reflection", "explanation", "message", "translation")

RULES: dict[str, list[str]] = {
    # "I believe the meaning of life is": a reflective sentence that goes on
    "reflection": [
        "{believe} {topic}{tail}. {second}. {third}.",
        "{believe} {topic}{tail}. {third}.",
        "{believe} {topic}, but {believe_too} {topic}. {second}.",
    ],
    "believe": [
        "I believe", "I think", "I have always thought", "We believe", "My mother believes", "My teacher thinks",
        "Some people say", "Many people believe", "An old friend told me",
    ],
    "believe_too": ["I also think", "my sister says", "others believe", "I know", "my brothers say"],
    "topic": ["the {meaning} of {life} is to {act}", "the {meanings} of {life} are {noun} and {noun}"],
    "meaning": ["meaning", "purpose", "secret", "point", "beauty", "best part"],
    "meanings": ["secrets", "great gifts", "quiet joys", "hard lessons", "only rules"],
    "life": ["life", "love", "work", "friendship", "a long journey", "growing old", "every day", "learning"],
    "act": [
        "{help} {others}", "find {noun}", "look for {noun} and {noun}", "give {others} {noun}", "make {others} happy",
        "learn from {others}", "grow a little every {day}", "walk slowly and listen", "share {noun} with {others}",
    ],
    "help": ["help", "love", "understand", "forgive", "listen to", "care for"],
    "others": [
        "others", "your friends", "the people around you", "your family", "a stranger", "those who need it", "children",
        "your neighbours",
    ],
    "noun": [
        "joy", "peace", "hope", "kindness", "patience", "courage", "time", "trust", "wonder", "truth", "laughter", "silence",
        "honesty", "curiosity",
    ],
    "day": ["day", "morning", "year", "season", "evening"],
    "tail": ["", ", even when {hard}", ", because {because}", ", and {because}"],
    "hard": [
        "it is hard", "nobody is watching", "the road is long", "the nights are cold", "you are tired", "others laugh",
        "everything seems lost",
    ],
    "because": [
        "nothing lasts for ever", "we are all alone without it", "time is short", "every {day} is a gift",
        "{noun} grows when you share it", "nobody can do it for you", "the heart needs {noun}", "{noun} is worth more than gold",
    ],
    "second": [
        "It is not easy to {act}, but {because}", "When {hard}, I try to {act}", "If you {act}, you will find {noun}",
        "Without {noun} there is no {noun}",
    ],
    "third": [
        "That is what I want to remember", "In the end, {because}", "So {every} I try to {act}", "Perhaps {noun} is enough",
        "That is why I am grateful for {others}", "And yet I still look for {noun}",
    ],
    "every": ["every {day}", "each {day}", "from time to time", "once again"],
    # "Simply put, the theory of relativity states that": popular science; what follows depends on the theory
    "explanation": [
        "{lead} {relativity_name} {states} that {relativity}. {therefore} {relativity}.{ending}",
        "{lead} {evolution_name} {states} that {evolution}. {therefore} {evolution}.{ending}",
        "{lead} {atoms_name} {states} that {atoms}. {therefore} {atoms}.{ending}",
        "{lead} {plates_name} {states} that {plates}. {therefore} {plates}.{ending}",
        "{lead} {germs_name} {states} that {germs}. {therefore} {germs}.{ending}",
    ],
    "lead": ["Simply put,", "In short,", "In simple words,", "To a first approximation,", "As every student learns,"],
    "states": ["states", "says", "tells us", "holds", "shows"],
    "therefore": ["In other words,", "This means that", "As a result,", "For example,", "It follows that", "In the same way,"],
    "ending": [
        "", " {who} {found} this in {year}.", " It took many years to find this.",
        " {who} tested this with {instrument}, and {outcome}.",
    ],
    "who": ["A young clerk", "A careful sailor", "Two students", "A doctor", "Several scientists", "One patient teacher"],
    "found": ["first noticed", "proved", "discovered", "described"],
    "year": ["1687", "1859", "1861", "1905", "1912", "1915"],
    "instrument": ["a clock", "a telescope", "a microscope", "a simple balance", "a glass of water", "two mirrors"],
    "outcome": ["it was true", "nobody was surprised", "the numbers agreed", "the result was clear"],
    "relativity_name": ["the theory of relativity", "Einstein's theory"],
    "relativity": [
        "{light} is the same for {observer}", "time passes more slowly for {mover}", "{mass} {bends} space and time",
        "nothing can travel faster than light", "energy and mass are the same thing", "no {observer_noun} is special",
        "{mover} seems shorter to {observer}",
    ],
    "light": ["the speed of light", "the law of motion", "the order of cause and effect"],
    "observer": ["every observer", "all observers", "a person at rest", "anyone who moves steadily"],
    "observer_noun": ["observer", "clock", "place", "direction"],
    "mover": ["a moving clock", "a fast rocket", "a traveller near a star", "a train close to the speed of light"],
    "mass": ["a heavy star", "every mass", "a planet", "the sun"],
    "bends": ["bends", "curves", "stretches"],
    "evolution_name": ["the theory of evolution", "Darwin's theory"],
    "evolution": [
        "{animals} that {fit} have more young", "{animals} {inherit} {trait} from their parents",
        "small changes add up over many generations", "all living things share one ancestor",
        "{animals} with {trait} survive longer", "new species come from old ones",
    ],
    "animals": ["birds", "fish", "moths", "flowers", "wolves", "finches", "plants", "beetles"],
    "fit": ["fit their world", "hide well", "find food quickly", "run fast", "resist the cold"],
    "inherit": ["inherit", "get", "receive"],
    "trait": ["long wings", "dark colours", "strong teeth", "thick fur", "deep roots", "a good memory", "sharp eyes"],
    "atoms_name": ["the theory of atoms", "atomic theory"],
    "atoms": [
        "{matter} is made of tiny particles", "the particles of {matter} are always moving",
        "heat makes the particles of {matter} move faster", "{matter} turns into gas when it is hot enough",
        "each element has its own kind of atom", "atoms join in simple numbers", "no atom is ever lost",
    ],
    "matter": ["water", "air", "iron", "salt", "every stone", "sugar", "a drop of oil", "the whole world"],
    "plates_name": ["the theory of plates", "plate theory"],
    "plates": [
        "{land} moves a little every year", "{land} once touched {land}", "mountains rise where two plates meet",
        "the sea floor spreads from a long crack", "earthquakes follow the edges of the plates",
        "{land} floats on hot rock",
    ],
    "land": ["Africa", "South America", "the land under our feet", "India", "Europe", "a continent", "the ocean floor"],
    "germs_name": ["the theory of germs", "germ theory"],
    "germs": [
        "{illness} is caused by tiny living things", "{illness} spreads through {medium}",
        "clean hands protect us from {illness}", "boiling {medium} kills germs", "a weak germ can teach the body to fight",
        "bad smells do not cause {illness}",
    ],
    "illness": ["illness", "a fever", "a cold", "an infection", "the plague"],
    "medium": ["water", "milk", "dirty hands", "a cough", "old food"],
    # "A brief message congratulating the team on the launch:": a short mail with line breaks
    "message": [
        "A {brief} message {about_good}:\n\n{hello} {people},\n\nI just {just_good}. {praise}{plan}\n\n{bye},\n{name}",
        "A {brief} message {about_bad}:\n\n{hello} {people},\n\nI just {just_bad}. {comfort}{plan}\n\n{bye},\n{name}",
    ],
    "brief": ["brief", "short", "friendly", "quick"],
    "about_good": [
        "congratulating the team on {event}", "thanking the team for {event}", "inviting the office to celebrate {event}",
    ],
    "about_bad": ["telling the team about a delay of {event}", "apologising to the team for a problem with {event}"],
    "event": ["the launch", "the release", "the new website", "the report", "the move", "the first sale", "the summer party"],
    "hello": ["Hi", "Hello", "Dear", "Good morning"],
    "people": ["everyone", "team", "all", "friends", "colleagues"],
    "just_good": [
        "wanted to {say} {well_done}", "heard that {event} went {well}", "saw the {numbers} and {feeling}",
        "came back from {meeting} and {feeling}",
    ],
    "say": ["say", "tell you all", "write a few words to say"],
    "well_done": ["well done", "thank you", "how proud I am", "that {event} was a success"],
    "well": ["well", "very well", "better than planned", "perfectly"],
    "numbers": ["numbers", "first results", "photos", "comments"],
    "feeling": ["I am delighted", "could not stop smiling", "had to write to you", "was truly impressed"],
    "meeting": ["the meeting", "a call with our partners", "my holiday", "the board"],
    "praise": [
        "You worked {hard_way} for {weeks}, and it shows. ", "This would not have been possible without {whom}. ",
        "Our customers are {pleased}. ", "",
    ],
    "hard_way": ["hard", "late", "with great care", "as one team"],
    "weeks": ["weeks", "months", "the whole winter", "more than a year"],
    "whom": ["each of you", "the support team", "our designers", "the night shift", "Anna and Paul"],
    "pleased": ["very happy", "thrilled", "already asking for more", "full of praise"],
    "just_bad": [
        "heard that {event} will be late", "learned that {something} is broken", "spoke with {whom} about {event}",
        "wanted to say sorry about {event}",
    ],
    "something": ["the server", "the printer", "a test", "the heating", "the contract"],
    "comfort": ["Nobody is to blame. ", "We will fix it by {when}. ", "Please do not worry. ", "Thank you for your patience. "],
    "plan": [
        "Let us meet {where} {when}.", "There will be {treat} {where} {when}.", "Please send me your ideas by {when}.",
        "Take {when} off, you have earned it.",
    ],
    "where": ["in the kitchen", "on the roof", "in room seven", "at the cafe", "in the garden"],
    "when": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "tomorrow", "next week"],
    "treat": ["cake", "coffee", "pizza", "a small party", "ice cream", "fresh bread"],
    "bye": ["Best", "Best wishes", "Kind regards", "Cheers", "Yours", "With thanks"],
    "name": ["Anna", "Paul", "Maria", "Tom", "Lena", "Omar", "Sofia", "David"],
}

Choose = Callable[[list[str]], str]
_SLOT = re.compile(r"\{(\w+)\}")


def write(shape: str, rng: random.Random) -> tuple[str, float]:
    """Write one text of a shape, and measure the information in its choices.

    Returns:
        The text, and the sum of ln(number of alternatives) over its choices, in nats. This is the
        surprise for a reader who knows the language exactly. A model's held-out loss cannot be
        lower, up to texts that two derivations share.
    """
    if shape == "translation":
        return _write_translation(rng)
    choices: list[float] = []
    text = _filled(shape, rng, choices)
    return text, sum(choices)


def _filled(name: str, rng: random.Random, choices: list[float]) -> str:
    """Write one part of a text, and note the nats of each choice."""
    choices.append(math.log(len(RULES[name])))
    return _SLOT.sub(lambda slot: _filled(slot[1], rng, choices), rng.choice(RULES[name]))


def kinds(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Different texts of each shape."""
    rng = random.Random(seed)
    texts: dict[str, list[str]] = {}
    for shape in SHAPES:
        own: dict[str, None] = {}
        while len(own) < count:
            own[write(shape, rng)[0]] = None
        texts[shape] = list(own)
    return texts


def is_grammatical(text: str, shape: str) -> bool:
    """Whether `write` can produce this whole text for this shape."""
    if shape == "translation":
        return _is_translation(text)
    return re.compile(_pattern(shape)).fullmatch(text) is not None


def translation_prompt(english: str, examples: list[tuple[str, str]]) -> str:
    """The few-shot list: head, examples, and a last line without its French word."""
    return TRANSLATION_HEAD + "".join(f"{en} => {fr}\n" for en, fr in examples) + f"{english} =>"


def _write_translation(rng: random.Random) -> tuple[str, float]:
    count = rng.randint(4, 9)
    entries = rng.sample(sorted(DICTIONARY.items()), count)
    nats = math.log(6) + sum(math.log(len(DICTIONARY) - i) for i in range(count))
    return TRANSLATION_HEAD + "\n".join(f"{en} => {fr}" for en, fr in entries), nats


def _is_translation(text: str) -> bool:
    if not text.startswith(TRANSLATION_HEAD):
        return False
    pairs = [line.partition(" => ") for line in text[len(TRANSLATION_HEAD) :].split("\n")]
    return all(DICTIONARY.get(english) == french for english, _, french in pairs)


@cache
def _pattern(name: str) -> str:
    parts = [_SLOT.split(text) for text in RULES[name]]  # fixed text at even places, slot names at odd ones
    alternatives = ["".join(_pattern(p) if i % 2 else re.escape(p) for i, p in enumerate(ps)) for ps in parts]
    return "(?:" + "|".join(alternatives) + ")"
