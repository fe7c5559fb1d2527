"""Near twins among emoji: the same artwork in another sex, direction, colour or hour.

Told by Unicode's own sequences (UTS 51) and CLDR's English names, not by the pictures:

  sex        the sequences differ in the female and male signs, in who begins them (person, man, woman), or are one of
             the pairs that Unicode encodes apart (boy and girl, prince and princess, ...)
  direction  one of the sequences ends in the arrow to the right (ZWJ, U+27A1)
  hour       both are clock faces, U+1F550 to U+1F567
  colour     the names are equal but for a colour that both have ("red heart", "blue heart")
"""

import re

_JOINER, _ARROW = "200d", "27a1"
_SIGNS = ("2640", "2642")
# Who is encoded apart by sex, first the one that stands for all (UTS 51, table of gendered emoji).
_PEOPLE = (
    *(("1f9d1", "1f468", "1f469"), ("1f9d2", "1f466", "1f467"), ("1f9d3", "1f474", "1f475")),
    *(("1fac5", "1f934", "1f478"), ("1f9d1-200d-1f384", "1f385", "1f936"), ("1fac4", "1fac3", "1f930")),
    *(("1f57a", "1f483"), ("1f46b", "1f46c", "1f46d")),
)
_NEUTRAL = {one: group[0] for group in _PEOPLE for one in group}
_HOURS = range(0x1F550, 0x1F568)
_COLOURS = re.compile(
    r"\b(light blue|red|orange|yellow|green|blue|purple|brown|black|white|gr[ae]y|pink|blond)\b", re.IGNORECASE
)


def twins(one: dict, other: dict) -> bool:
    """Whether two records (with `id`, `en`), whose artwork may differ, are near twins; False for one and itself."""
    if one["id"] == other["id"]:
        return False
    colours = [_colourless(record["en"]) for record in (one, other)]
    return _family(one["id"]) == _family(other["id"]) or (colours[0] is not None and colours[0] == colours[1])


def _family(id_: str) -> str:
    """The sequence without sex, direction and hour."""
    id_ = id_.removesuffix(f"-{_JOINER}-{_ARROW}")
    for sign in _SIGNS:
        id_ = id_.removesuffix(f"-{_JOINER}-{sign}")
    if id_ in _NEUTRAL:
        return _NEUTRAL[id_]
    first, *rest = id_.split("-")
    if not rest and int(first, 16) in _HOURS:
        return "clock"
    return "-".join([_NEUTRAL.get(first, first), *rest])


def _colourless(name: str) -> str | None:
    """The English name without its colour; None for a name without one."""
    bare = _COLOURS.sub("", name)
    return None if bare == name else " ".join(bare.split())
