"""English texts in the reference mode: ids equal those of CLIP's slow tokenizer with ftfy, which it installs.

The slow algorithm is written here from its description. Its ids for all of these texts, and for the 870 prompts, were
those of transformers 4.57.6 with ftfy 6.1.1 when this was written.
"""

import itertools
import json
import unicodedata
from functools import cache
from pathlib import Path

import ftfy
import numpy as np
import pytest

from bdm_jax.paths import TOKENIZERS
from bdm_jax.text.encode import read
from bdm_jax.text.grammar import parse
from bdm_jax.text.tokenizer import Tokenizer

PROMPTS = Path(__file__).parents[3] / "shared/data/prompts/BDM_870.json"
CLIP = TOKENIZERS / "clip"


@pytest.fixture(scope="module")
def clip():
    return Tokenizer.from_pretrained(CLIP)


class Slow:
    """CLIP's byte pairs, rank by rank."""

    CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")

    def __init__(self):
        self.vocab = json.loads((CLIP / "vocab.json").read_text("utf-8"))
        merges = (CLIP / "merges.txt").read_text("utf-8").splitlines()[1:]
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(merges)}
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in plain]
        self.letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        self.word = cache(self.word)

    def __call__(self, text):
        words = self.words(" ".join(ftfy.fix_text(text).split()).lower())
        return [id_ for word in words for id_ in self.word(word)]

    def words(self, text):
        """Contractions, runs of letters, single digits, runs of anything else."""
        while text:
            size = next((len(end) for end in self.CONTRACTIONS if text.startswith(end)), 0)
            kind = kind_of(text[0])
            if not size and kind in ("letter", "other"):
                size = next((i for i, letter in enumerate(text) if kind_of(letter) != kind), len(text))
            size = size or 1
            if kind != "blank":
                yield text[:size]
            text = text[size:]

    def word(self, word):
        pieces = [self.letters[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            rank = min(self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(pieces))
            if rank == len(self.ranks):
                break
            merged, i = [], 0
            while i < len(pieces):
                both = self.ranks.get(tuple(pieces[i : i + 2])) == rank
                merged.append("".join(pieces[i : i + 1 + both]))
                i += 1 + both
            pieces = merged
        return [self.vocab[piece] for piece in pieces]


def kind_of(letter):
    if letter.isspace():
        return "blank"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(letter)[0], "other")


@pytest.fixture(scope="module")
def slow():
    return Slow()


HARD = {
    "mojibake": "a cafÃ© in the snow",
    "mojibake of quotes": "â€œred lanternâ€\x9d",
    "mojibake of Cyrillic": "ÐºÐ¾Ñ‚ Ð¸ ÑÐ¾Ð±Ð°ÐºÐ°",
    "its mark": "ï»¿marked",
    "curly quotes": "it’s “a red lantern” — 5 o’clock ‘’ ‚x„",
    "full width": "ｒｅｄ　ｌａｎｔｅｒｎ，１２３：（ａ）！？",
    "half width": "｡｢ｶﾀｶﾅ｣",
    "ligatures": "ﬁne ﬂowers in the oﬃce ǆ Ǆ ĳ Ĳ ŉ",
    "entities": "cats &amp; dogs at l&rsquo;&eacute;toile",
    "escaped tag": "&lt;lora:ink:0.8&gt; a cat",
    "tags keep entities": "a <b>cat &amp; dog</b>",
    "blanks": "no\u00a0break\u2003space zero\u200bwidth\ufeff soft\u00adhyphen",
    "line ends": "line\u2028separator\r\nnew\x85line",
    "combining": "e\u0301toile and ａ\u0301 n\u0303",
    "case": "İstanbul ΟΔΟΣ",
    "terminal": "\x1b[31mred\x1b[0m lantern",
    "lossy": "ŕéd \ufffd lantern",
    "emoji": "a😀b ❤️ … ½ ²",
    "units": "㎏ ㈱ ℃ Ω K",
    "NUL": "x\x00y",
    "contractions": "I'LL say it's they've 'tis",
    "plain": "Batman: Dark Knight, 2020 (Poster)",
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_ids(text, clip, slow):
    assert clip.content([text], mended=True) == [slow(text)]


def test_only_the_reference_mode_mends(clip):
    curly, straight = "it’s", "it's"
    assert clip.content([curly]) != clip.content([straight]) == clip.content([curly], mended=True)
    ids = {reference: read(clip, [curly, straight], reference=reference).ids for reference in (False, True)}
    assert (ids[True][0] == ids[True][1]).all() and (ids[False][0] != ids[False][1]).any()
    chinese = Tokenizer.from_pretrained(TOKENIZERS / "chinese")
    assert chinese.content(["红　，灯：（笼）"], mended=True) == chinese.content(["红　，灯：（笼）"])


def test_brackets_are_read_before_texts_are_mended(clip):
    """So that full-width ones stay text."""
    assert (read(clip, ["（red）"], reference=True).weights == 1).all()
    assert (read(clip, ["（red）"], reference=True).ids == read(clip, [r"\(red\)"], reference=True).ids).all()


def test_the_870_prompts(clip, slow):
    if not PROMPTS.is_file():
        pytest.skip(f"{PROMPTS} is not there")
    prompts = [row[4] for row in json.loads(PROMPTS.read_text("utf-8"))]
    ids = read(clip, prompts, reference=True).ids[:, :, 1:-1].reshape(len(prompts), -1)
    expected = np.full_like(ids, clip.pad)
    for row, prompt in zip(expected, prompts, strict=True):
        (segments,) = parse(prompt, reference=True)
        content = [id_ for segment in segments for id_ in slow(segment.text)]
        row[: len(content)] = content
    assert len(prompts) == 870 and (ids == expected).all()
