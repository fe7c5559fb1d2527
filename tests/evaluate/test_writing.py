"""Reading back what is written."""

from types import SimpleNamespace

import cv2
import numpy as np

from bdm_jax.data.lettering import Rules, SyntheticText, Writing, draw
from bdm_jax.evaluate import writing
from bdm_jax.evaluate.writing import WordReader, WritingArgs, measure

WORDS = ("大", "人", "天", "木", "灯笼")
RULES = Rules(WORDS, count=10, size=32, scale=(0.8, 1.0))


def test_the_best_correlation_is_that_of_the_whole_picture():
    reader = WordReader(WORDS[:2], 32, (0.8, 1.0))
    picture = draw(Writing("人", "black", "white", 28, (0.5, 1.0), np.zeros((2, 3))), 32)
    row, score = reader.read(picture)
    assert row == 1 and score > 0.999  # up to the rounding of pixels
    row, score = WordReader(WORDS[:1], 32, (0.8, 0.85)).read(picture)
    grey = 242.0 - picture[..., 0]
    by_hand = max(  # pasted at every place of an empty picture, in every size
        np.corrcoef(grey.ravel(), np.pad(t, ((y, 32 - len(t) - y), (x, 32 - len(t) - x))).ravel())[0, 1]
        for pixels in (25, 26, 27)
        for t in [writing.coverage("大", pixels)]
        for y in range(33 - pixels)
        for x in range(33 - pixels)
    )
    assert row == 0 and abs(score - by_hand) < 1e-4  # fp32 sums of a thousand values
    assert reader.read(np.full((32, 32, 3), 7, np.uint8)) == (0, 0.0)


def test_any_colours_and_some_blur_are_read():
    source, reader = SyntheticText(Rules(WORDS, count=40, size=32, scale=(0.8, 1.0))), WordReader(WORDS, 32, (0.8, 1.0))
    pictures = [cv2.GaussianBlur(draw(source.writing(i), 32), (0, 0), 1.0) for i in range(40)]
    assert [WORDS[reader.read(picture)[0]] for picture in pictures] == [source.words(i)["word"] for i in range(40)]


def test_figures(monkeypatch):
    def generate(pipeline, requests, settings, batch_size):
        """Writes everything but what it is asked to write second: that comes out as the first."""
        for number, request in enumerate(requests):
            word = WORDS[0] if number == 1 else request.prompt[3:-1]
            yield draw(Writing(word, "white", "blue", 32 // len(word), (0, 0.5), np.zeros((2, 3))), 32)

    monkeypatch.setattr(writing, "generate", generate)
    found = measure(SimpleNamespace(parts={}), SyntheticText(RULES), WritingArgs(seeds=2))
    assert found["right"] == {"drawn": [0.8, 0.8], "rendered": [1.0, 1.0]} and found["chance"] == 0.2
    assert found["by_word"] == {"大": 1, "人": 0, "天": 1, "木": 1, "灯笼": 1}
    assert [read for _, read in found["pictures"]] == [0, 0, 2, 3, 4]


def test_errors(tmp_path, capsys):
    assert writing.main(["--data", str(writing.HANZI), "--seeds", "0"]) == 2
    assert "--seeds 0" in capsys.readouterr().err
