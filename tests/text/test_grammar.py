"""The prompt grammar: the specification's cases, and random brackets against a slow implementation of its rules."""

import random
import time

import pytest

from bdm_jax.text.grammar import MAX_WEIGHT, WeightedText, parse

DOWN = 1 / 1.1


def segments(prompt, **options):
    """Of a prompt without BREAK."""
    (part,) = parse(prompt, **options)
    return [tuple(segment) for segment in part]


BOTH = [
    ("", []),
    ("()", []),
    ("a", [("a", 1)]),
    ("(a)", [("a", 1.1)]),
    ("(a:1.3)", [("a", 1.3)]),
    ("[a]", [("a", DOWN)]),
    ("((a))", [("a", 1.21)]),
    ("[[a]]", [("a", DOWN**2)]),
    ("((a:1.5) b)c", [("a", 1.65), (" b", 1.1), ("c", 1)]),
    ("(a:1.3", [("a:1.3", 1.1)]),
    ("x (a", [("x ", 1), ("a", 1.1)]),
    ("x [a", [("x ", 1), ("a", DOWN)]),
    ("((a:2) b", [("a", 2.2), (" b", 1.1)]),
    ("b:1.3)", [("b:1.3)", 1)]),
    ("a) b]", [("a) b]", 1)]),
    ("[a:1.3]", [("a:1.3", DOWN)]),
    ("[a:1.3)", [("a:1.3)", DOWN)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", DOWN)]),
    ("(a)(b)", [("ab", 1.1)]),
    ("(a:1)b", [("ab", 1)]),
    ("(([a]))(b)", [("ab", 1.1)]),
    (r"\(a\) \[b\] \\", [(r"(a) [b] \ "[:-1], 1)]),
    (r"(a\):2)", [("a)", 2)]),
    (r"\\(a)", [("\\", 1), ("a", 1.1)]),
    (r"a\b", [("ab", 1)]),
    (r"红\灯", [("红灯", 1)]),
    ("\\", []),
    ("a\\", [("a", 1)]),
    (r"\\\a", [(r"\a", 1)]),
    (r"(a\b:2)\c", [("ab", 2), ("c", 1)]),
    ("a: b", [("a: b", 1)]),
    ("(a:0)", [("a", 0)]),
    ("(a:-.5)(b:+2.)", [("a", -0.5), ("b", 2)]),
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(a:)", [("a:", 1.1)]),
    ("(红:1.3)灯笼", [("红", 1.3), ("灯笼", 1)]),
    ("【红】：灯笼，“好”", [("【红】：灯笼，“好”", 1)]),
]


@pytest.mark.parametrize(("prompt", "expected"), BOTH)
def test_table(prompt, expected):
    for reference in (False, True):
        found = segments(prompt, reference=reference)
        assert [text for text, _ in found] == [text for text, _ in expected]
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("（红）灯笼", [("红", 1.1), ("灯笼", 1)]),
        ("（红：1.3）灯笼", [("红", 1.3), ("灯笼", 1)]),
        ("(红：1.3）灯笼", [("红", 1.3), ("灯笼", 1)]),
        ("（红:１.５)", [("红", 1.5)]),
        ("［红］", [("红", DOWN)]),
        (r"\（红\）\：", [("（红）：", 1)]),
        ("红）", [("红）", 1)]),
        ("(a: 1.3 )", [("a", 1.3)]),
    ],
)
def test_full_width_signs_and_blanks_around_a_weight(prompt, expected):
    assert segments(prompt) == [(text, pytest.approx(weight)) for text, weight in expected]


@pytest.mark.parametrize("prompt", ["（红）灯笼", "（红：1.3）", "［红］", "a BREAK b", r"\（红\）"])
def test_the_reference_knows_neither_full_width_signs_nor_break(prompt):
    assert parse(prompt, reference=True) == [[WeightedText(prompt.replace("\\", ""), 1.0)]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("红BREAK灯", [[("红", 1)], [("灯", 1)]]),
        ("(a BREAK b:2) c", [[("a ", 2)], [(" b", 2), (" c", 1)]]),
        ("BREAK", [[], []]),
        ("a,BREAK,BREAK", [[("a,", 1)], [(",", 1)], []]),
        ("(BREAK)", [[], []]),
        *(
            (word, [[(word, 1)]])
            for word in ("BREAKS", "break", "Break", "OUTBREAK", "TIE-BREAK", "BREAK_2", "BREAK'S")
        ),
    ],
)
def test_break(prompt, expected):
    assert parse(prompt) == expected


def direct(text):
    """(character, weight) pairs: each bracket is paired by scanning, every character asks all brackets around it.

    Written from the rules, in time n^2, for half-width signs.
    """
    signs, i = [], 0  # (sign or None, characters, weight)
    while i < len(text):
        if text[i] == "\\" and text[i + 1 : i + 2] and text[i + 1] in "()[]:\\":
            signs.append((None, text[i + 1], None))
            i += 2
        elif text[i] == "\\":
            i += 1
        elif text[i] == ":" and (number := closed_number(text[i + 1 :])):
            signs.append((")", text[i : i + len(number) + 2], float(number)))
            i += len(number) + 2
        else:
            signs.append((text[i] if text[i] in "()[]" else None, text[i], None))
            i += 1
    ranges, marks = [], set()  # (first, last, factor) and the places of brackets that mean something
    for opening, closing, default in (("(", ")", 1.1), ("[", "]", 1 / 1.1)):
        waiting = []
        for place, (sign, _, weight) in enumerate(signs):
            if sign == opening:
                waiting.append(place)
            elif sign == closing and waiting:
                ranges.append((waiting.pop(), place, default if weight is None else weight))
                marks.add(place)
        ranges += [(place, len(signs), default) for place in waiting]
    marks |= {first for first, _, _ in ranges}
    pairs = []
    for place, (_, characters, _) in enumerate(signs):
        weight = 1.0
        for first, last, factor in ranges:
            weight *= factor if first < place < last else 1.0
        pairs += [] if place in marks else [(character, weight) for character in characters]
    return pairs


def closed_number(rest):
    """The number that a round bracket closes right at the beginning of `rest`, or None."""
    number, closing, _ = rest.partition(")")
    digits = number.removeprefix("+") if number.startswith("+") else number.removeprefix("-")
    plain = digits.replace(".", "", 1)
    return number if closing and plain.isascii() and plain.isdigit() else None


@pytest.mark.parametrize("reference", [False, True])
def test_random_brackets(reference, seed):
    draw = random.Random(seed)
    pieces = [
        "(",
        ")",
        "[",
        "]",
        "(",
        ")",
        ":",
        "\\",
        "a",
        "b ",
        "红",
        ":1.3)",
        ":0.5)",
        ":-2)",
        ":.5",
        "1.",
        ":0)",
        ")",
    ]
    for _ in range(2000):
        prompt = "".join(draw.choices(pieces, k=draw.randrange(1, 25)))
        found = segments(prompt, reference=reference)
        expected = direct(prompt)
        if reference and "\\:" in prompt:
            continue  # the reference does not escape a colon
        assert "".join(text for text, _ in found) == "".join(character for character, _ in expected), prompt
        weights = [weight for text, weight in found for _ in text]
        assert weights == pytest.approx([weight for _, weight in expected], rel=1e-9), prompt
        assert all(text for text, _ in found)
        assert all(a != pytest.approx(b, rel=1e-9, abs=0) for (_, a), (_, b) in zip(found, found[1:], strict=False))


HOSTILE = {
    "round": "(" * 100_000,
    "round, text": "(" * 100_000 + "a",
    "square, text": "[" * 100_000 + "a",
    "closing": ")" * 100_000,
    "nested": "(a" * 30_000 + ":0.9)" * 30_000,
    "mixed": "([" * 20_000 + "a" + ":0)]" * 20_000,
    "colons": ":" * 100_000,
    "blanks": "(a:" + " " * 100_000,
    "digits": "(a:" + "1" * 100_000,
    "digits closed": "(a:" + "1" * 100_000 + ")",
    "dots": "(a:" + "1." * 50_000 + ")",
    "backslashes": "\\" * 100_001,
    "breaks": "BREAK " * 20_000,
    "nearly breaks": "BREAK" * 20_000,
}


@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_hostile_prompts_take_no_time_and_stay_finite(prompt):
    """100,000 characters take 0.1 s to 1 s; anything quadratic would take minutes."""
    for reference in (False, True):
        began = time.process_time()
        parts = parse(prompt, reference=reference)
        assert time.process_time() - began < 10
        assert all(abs(weight) <= MAX_WEIGHT for part in parts for _, weight in part)
