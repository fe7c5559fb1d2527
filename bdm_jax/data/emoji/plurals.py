"""English plurals of short names of things: "panda" -> "pandas", "woman running" -> "women running".

A small set of rules. What they do not know has no plural here: mass nouns, names with a colon, titles of signs.
"""

import re

_PLAIN = re.compile(r"[^\W\d_][\w’'-]*( [^\W\d_][\w’'-]*)*")
_AFTER = frozenset(
    "with without of in on at under over behind between for from by to beside near inside that who which "
    "tilted pointed not done showing wearing holding facing".split()
)
_PEOPLE = {"man": "men", "woman": "women", "child": "children", "person": "people"}
_IRREGULAR = {
    **_PEOPLE,
    **{"foot": "feet", "tooth": "teeth", "goose": "geese", "mouse": "mice", "ox": "oxen", "knife": "knives"},
    **{"wolf": "wolves", "leaf": "leaves", "elf": "elves", "scarf": "scarves", "loaf": "loaves", "wife": "wives"},
    **{"potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "hero": "heroes", "mosquito": "mosquitoes"},
    **{"die": "dice", "sheaf": "sheaves", "merperson": "merpeople", "rhinoceros": "rhinoceroses"},
    **{"buffalo": "buffaloes", "superhero": "superheroes", "volcano": "volcanoes", "tornado": "tornadoes"},
}
_PLURAL = frozenset({*_IRREGULAR.values(), "skis", "maracas", "pyjamas", "fleur-de-lis"})
_SAME = frozenset(  # the same in the plural, or without one
    "fish blowfish jellyfish deer sheep bison moose shrimp squid salmon aircraft bread flatbread rice butter "
    "salt garlic broccoli popcorn baggage luggage spaghetti sushi sake oden dango soap wood yarn thread ice "
    "coral fog fire dna om collision information infinity biohazard vacancy confetti football baseball "
    "basketball softball hockey volleyball tennis badminton lacrosse polo bowling cricket camping cooking "
    "litter lightning rain snow poo milk tea corn custard fondue falafel seaweed jewelry volume voltage "
    "alternation lowercase uppercase clock thirty left right up down reverse discount amount away crossing "
    "horizontally vertically off together hugging multiply divide plus minus eighteen emergency plenty done "
    "control claim exchange construction high bacon dizzy foggy wireless radioactive laughing water salute "
    "smoking money food polish pong yang struck fuji moai".split()
)
_NOUNS_IN_ING = frozenset(
    "ring king wing string spring thing building dumpling seedling duckling sibling wedding".split()
)
_NOUNS_IN_ED = frozenset("bed sled seed weed reed shed".split())
_ADVERBS = ("ly", "ing", "wards", "-")  # before a word in -ing that belongs to what follows: "slightly smiling face"


def plural(name: str) -> str:
    """The plural of an English name; the name itself where the rules know none, or where it is one already."""
    words, head = _split(name)
    if head is None:
        return name
    both = {0, head} if words[0] in ("man", "woman") else {head}  # "women artists"
    return " ".join(_of_word(word) if i in both else word for i, word in enumerate(words))


def is_plural(name: str) -> bool:
    """Whether its noun stands in the plural already, as in "grapes" or "hands"."""
    words, head = _split(name)
    return head is not None and _is_plural_word(words[head])


def _split(name: str) -> tuple[list[str], int | None]:
    """Words, and the place of the noun that has a plural."""
    words = name.split(" ")
    if not _PLAIN.fullmatch(name) or {"and", "or", "no"} & {*words}:
        return words, None
    if words[0] in _PEOPLE and any(word.endswith("ing") for word in words[1:]):
        return words, 0
    after = [i for i in range(1, len(words)) if words[i] in _AFTER or _is_participle(words, i)]
    head = (after[0] if after else len(words)) - 1
    word = words[head]
    last = word.rpartition("-")[2].lower()
    nameless = word[0].isupper() and not (head == 0 and len(words) > 1)  # zodiac signs, Santa Claus, OK
    verbal = (last.endswith("ing") and last not in _NOUNS_IN_ING) or (last.endswith("ed") and last not in _NOUNS_IN_ED)
    return words, None if nameless or verbal or last in _SAME or "’" in word else head


def _is_participle(words: list[str], i: int) -> bool:
    """A word in -ing behind what it tells of: "woman running", but not "office building" or "slightly smiling face"."""
    return (
        words[i].endswith("ing")
        and words[i] not in {*_NOUNS_IN_ING, "viewing", "playing", "racing"}
        and not words[i - 1].endswith(_ADVERBS)
    )


def _is_plural_word(word: str) -> bool:
    return word in _PLURAL or (word.endswith("s") and not word.endswith(("ss", "us", "is", "as", "eros")))


def _of_word(word: str) -> str:
    if _is_plural_word(word):
        return word
    begin, hyphen, last = word.rpartition("-")
    if last in _IRREGULAR:
        new = _IRREGULAR[last]
    elif last.endswith("man") and last not in ("human", "shaman", "talisman"):
        new = last[:-3] + "men"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        new = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        new = last[:-1] + "ies"
    else:
        new = last + "s"
    return begin + hyphen + new
