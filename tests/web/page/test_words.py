"""The words of textual inversions in a prompt."""

import pytest

from bdm_jax.web.page.words import weight_of, with_word, without_word, word_of


def test_a_word_is_its_files_name():
    assert word_of("style/ink.safetensors") == "ink"


@pytest.mark.parametrize(
    "prompt, weight, written",
    [
        ("", 1.0, "ink"),
        ("a lantern", 1.0, "a lantern, ink"),
        ("a lantern, ", 0.8, "a lantern, (ink:0.8)"),
        ("INK, red", 0.5, "(ink:0.5), red"),
        ("(ink:0.5), red", 1.0, "ink, red"),
        ("pink inky ink-blot", 1.2, "pink inky ink-blot, (ink:1.2)"),
    ],
)
def test_it_is_written_once_and_found_again(prompt, weight, written):
    assert with_word(prompt, "ink", weight) == written
    assert weight_of(written, "ink") == weight
    assert with_word(written, "ink", weight) == written


def test_it_goes_with_its_weight_and_comma():
    for prompt in ("red, (ink:0.8)", "(ink:0.8), red", "red, ink", "red"):
        assert without_word(prompt, "ink") == "red"
    assert weight_of("red", "ink") is None
