"""Pictures of written Chinese with captions that say the text, as Kolors learns to write from in its first phase.

A set is a folder with one small file of rules, synthetic_text.json, which `records.open_source` reads as any other set:
its pictures are drawn when they are read, each from (seed, number) alone, and take no space. The command that writes
the rules is `python -m bdm_jax.data.synthetic_text`.
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from bdm_jax.errors import UserError
from bdm_jax.formats.plain_text import decode_text
from bdm_jax.images.pictures import drawable, font

RULES = "synthetic_text.json"
_SMALLEST = 8  # pixels of a character: below it, strokes run into each other
_BASELINE = 0.88  # of the font: where Latin letters would stand, from the top of a character's square
_SHADE = 12  # how far a channel lies from its colour's, at most
_CONTRAST = 100  # of luminances from 0 to 255, between ink and ground
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Colour(NamedTuple):
    """A colour that captions name."""

    rgb: tuple[int, int, int]
    zh: str

    @property
    def luminance(self) -> float:
        """0 .. 255."""
        return float(np.dot(self.rgb, _LUMINANCE))


COLOURS = {
    "black": Colour((16, 16, 16), "黑"),
    "white": Colour((242, 242, 242), "白"),
    "red": Colour((200, 32, 36), "红"),
    "blue": Colour((28, 60, 170), "蓝"),
    "green": Colour((24, 120, 56), "绿"),
    "yellow": Colour((246, 214, 60), "黄"),
}
PAIRS = tuple(  # ink, ground
    (ink, ground)
    for ink, ground in permutations(COLOURS, 2)
    if abs(COLOURS[ink].luminance - COLOURS[ground].luminance) >= _CONTRAST
)


@dataclass(frozen=True)
class Rules:
    """What a set's pictures follow from.

    words: what is written, each alike often. count: number of pictures. seed: other pictures. size: their side in
    pixels. scale: the text's size, between these shares of the largest that fits. grounds: colours of the background.
    """

    words: tuple[str, ...]
    count: int = 1_000_000
    seed: int = 0
    size: int = 64
    scale: tuple[float, float] = (0.5, 1.0)
    grounds: tuple[str, ...] = tuple(COLOURS)

    def __post_init__(self):
        if not self.words:
            raise UserError("words: there are none to write")
        if self.count < 1 or self.size < 1 or self.seed < 0:
            raise UserError(f"count={self.count}, size={self.size}, seed={self.seed}: must be at least 1, 1 and 0")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale={self.scale}: two shares of the largest size, the smaller first, from 0 to 1")
        if not self.grounds or set(self.grounds) - set(COLOURS):
            raise UserError(f"grounds={self.grounds}: some of {', '.join(COLOURS)}")
        for word in self.words:
            if not word or drawable(word) != word:
                raise UserError(f"words: {word!r} cannot be drawn: the bundled font shows it as {drawable(word)!r}")
        longest = max(self.words, key=len)
        if self.size * self.scale[0] < _SMALLEST * len(longest):
            needed = -int(-_SMALLEST * len(longest) // self.scale[0])
            raise UserError(f"size={self.size}: too small to write {longest!r} legibly, it needs {needed} pixels")


class Writing(NamedTuple):
    """One picture: its text, ink and ground (keys of `COLOURS`), height of its characters in pixels, where its box
    begins in what is left free (0 .. 1 across and down), shades of ink and ground (3,) each.
    """

    word: str
    ink: str
    ground: str
    pixels: int
    at: tuple[float, float]
    shades: np.ndarray


class SyntheticText:
    """A `Source` of pictures of text: `captions` in Chinese and in English, without and with the colours; `word`,
    `ink`, `ground`; `image` as BMP bytes, which cost nothing to write.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self.fingerprint = self.contents()[:16]

    def __len__(self) -> int:
        return self.rules.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = io.BytesIO()
        Image.fromarray(draw(self.writing(index), self.rules.size)).save(picture, "BMP")
        return {**self.words(index), "image": picture.getvalue()}

    def words(self, index: int) -> dict[str, Any]:
        """A record without its image."""
        writing = self.writing(index)
        told = {"word": writing.word, "ink": writing.ink, "ground": writing.ground}
        return {"key": f"text {int(index)}", "captions": captions(writing), **told}

    def writing(self, index: int) -> Writing:
        """What picture `index` shows, whatever was drawn before."""
        if not 0 <= index < self.rules.count:
            raise IndexError(index)
        rules, rng = self.rules, np.random.default_rng([self.rules.seed, int(index)])
        word = rules.words[int(rng.integers(len(rules.words)))]
        pairs = [pair for pair in PAIRS if pair[1] in rules.grounds]
        ink, ground = pairs[int(rng.integers(len(pairs)))]
        pixels = int(rng.uniform(*rules.scale) * rules.size / len(word))
        at = (float(rng.random()), float(rng.random()))
        return Writing(word, ink, ground, pixels, at, rng.integers(-_SHADE, _SHADE + 1, (2, 3)))

    def contents(self) -> str:
        """See `Source`."""
        told = repr((asdict(self.rules), sorted(COLOURS.items()), _SHADE))
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"SyntheticText({len(self.rules.words)} words, {len(self)} pictures)"


def draw(writing: Writing, size: int) -> np.ndarray:
    """The picture, uint8 (size, size, 3): ink over ground, mixed by how much of a pixel a stroke covers."""
    covered = coverage(writing.word, writing.pixels)
    height, width = covered.shape
    x, y = (round(share * (size - side)) for share, side in zip(writing.at, (width, height), strict=True))
    ink, ground = (
        np.clip(np.add(COLOURS[name].rgb, shade), 0, 255)
        for name, shade in zip((writing.ink, writing.ground), writing.shades, strict=True)
    )
    canvas = np.broadcast_to(ground.astype(np.float32), (size, size, 3)).copy()
    part = canvas[y : y + height, x : x + width]
    part += covered[..., None] * (ink - part)
    return (canvas + np.float32(0.5)).astype(np.uint8)


@lru_cache(maxsize=4096)
def coverage(word: str, pixels: int) -> np.ndarray:
    """A text in the bundled font, float32 (pixels, pixels * characters) in 0 .. 1: how much of each pixel is ink. Every
    character has a square; not to be written to.
    """
    canvas = Image.new("L", (pixels * len(word), pixels))
    pen, letters = ImageDraw.Draw(canvas), font(pixels)
    for number, character in enumerate(word):
        pen.text((pixels * (number + 0.5), pixels * _BASELINE), character, 255, letters, anchor="ms")
    return np.asarray(canvas, np.float32) / 255


def captions(writing: Writing) -> list[str]:
    """In Chinese and in English, without and with the colours."""
    ink, ground = COLOURS[writing.ink].zh, COLOURS[writing.ground].zh
    return [
        f'写着"{writing.word}"',
        f'{ground}底{ink}字"{writing.word}"',
        f'the Chinese text "{writing.word}"',
        f'the Chinese text "{writing.word}" in {writing.ink} on {writing.ground}',
    ]


def read_rules(data: bytes, name: str) -> Rules:
    """The text of a `synthetic_text.json`; what it leaves out is as in `Rules`. Raises UserError, naming the file."""
    try:
        values = json.loads(decode_text(data, name, name))
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return Rules(**{**values, **lists})
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: cannot be read as rules of pictures of text ({error})") from error
