"""Can a backbone write? `python -m bdm_jax.evaluate.writing [--model runs/hanzi/export] [--sheet FILE]`

Draws every word of a set of pictures of text (`bdm_jax.data.lettering`) from several seeds, with the prompt 写着"...",
and reads the pictures back: each is compared with all words of the set, rendered in the same font in all sizes that the
set has and at all places, by normalised correlation. A picture is right when the best is the word that was asked for.
Beside it, what the reading itself can do: the set's own pictures of the same words, and these through the autoencoder
and back.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro

from bdm_jax import command_line
from bdm_jax.data.lettering import PAIRS, SyntheticText, Writing, captions, coverage, draw
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.images.pictures import contact_sheet, write_png
from bdm_jax.latents.autoencoder import decode, encode
from bdm_jax.paths import HANZI, check_output
from bdm_jax.runtime import compile_cache
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.fetch import local
from bdm_jax.systems.pipeline import BridgePipeline

_COLUMNS = 10  # of the sheet


@dataclass(frozen=True)
class WritingArgs:
    """Read back what a backbone writes."""

    model: command_line.ModelPath = Path("runs/hanzi/export")
    """pipeline folder"""
    data: Path = HANZI
    """set of pictures of text that it was trained on"""
    seeds: int = 4
    """samplings: every word is drawn so many times, from other noise"""
    steps: int = 25
    guidance: float | None = None
    """the pipeline's own where left out"""
    batch_size: int = 25
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the figures here, word by word"""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the first sampling here as PNG, wrong pictures with what they were read as"""


class WordReader:
    """Reads which of some words a picture shows.

    Args:
        words: all there are.
        size: side of the pictures in pixels.
        scale: the text's size, between these shares of the largest that fits.
    """

    def __init__(self, words: Sequence[str], size: int, scale: tuple[float, float]):
        self._words, self._size = tuple(words), size
        self._templates = [(row, template) for row, word in enumerate(words) for template in self._all(word, scale)]

    def read(self, picture: np.ndarray) -> tuple[int, float]:
        """(H,W,3) uint8 -> the word's number and the correlation, at most 1, of where it fits best.

        A pixel counts by how far it is from the ground, the median colour of the picture's edge.
        """
        picture = picture.astype(np.float32)
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        ink = np.linalg.norm(picture - np.median(edge, axis=0), axis=2)
        ink -= ink.mean()
        if not (length := np.linalg.norm(ink)):
            return 0, 0.0
        scores = [(self._best(ink / length, template), row) for row, template in self._templates]
        score, row = max(scores)
        return row, score

    def _all(self, word: str, scale: tuple[float, float]) -> Iterable[np.ndarray]:
        """The word in every size."""
        first, last = (int(share * self._size / len(word)) for share in scale)
        return (coverage(word, pixels) for pixels in range(first, last + 1))

    def _best(self, ink: np.ndarray, template: np.ndarray) -> float:
        """The largest correlation, over all places, with a picture that is empty around the template."""
        sums = cv2.matchTemplate(ink.astype(np.float32), template, cv2.TM_CCORR)
        energy = float(np.square(template).sum() - template.sum() ** 2 / self._size**2)
        return float(sums.max()) / energy**0.5


def measure(pipeline: BridgePipeline, source: SyntheticText, asked: WritingArgs) -> dict[str, Any]:
    """The figures (plain values), and under "pictures" those of the first sampling with what each was read as."""
    rules = source.rules
    words, reader = rules.words, WordReader(rules.words, rules.size, rules.scale)
    settings = Sampling(steps=asked.steps, guidance=asked.guidance, size=(rules.size, rules.size))
    prompts = [captions(Writing(word, *PAIRS[0], rules.size, (0, 0), np.zeros((2, 3))))[0] for word in words]
    right, first = [], []
    for sampling in range(asked.seeds):
        requests = [Request(prompt, seed=len(words) * sampling + row) for row, prompt in enumerate(prompts)]
        drawn = list(generate(pipeline, requests, settings, batch_size=asked.batch_size))
        read = [reader.read(picture)[0] for picture in drawn]
        right.append([found == row for row, found in enumerate(read)])
        first = first or list(zip(drawn, read, strict=True))
    rendered = [np.stack(_rendered(source, sampling)) for sampling in range(asked.seeds)]
    vae = pipeline.parts.get("vae")
    passed = [] if vae is None else [decode(vae, encode(vae, pictures))[0] for pictures in rendered]
    shares = {"drawn": [float(np.mean(one)) for one in right]}
    for name, sets in (("rendered", rendered), ("rendered, through the autoencoder", passed)):
        if sets:
            shares[name] = [_share(reader, pictures) for pictures in sets]
    return {
        "words": len(words),
        "chance": 1 / len(words),
        "right": shares,
        "by_word": {word: float(np.mean([one[row] for one in right])) for row, word in enumerate(words)},
        "pictures": first,
    }


def _rendered(source: SyntheticText, sampling: int) -> list[np.ndarray]:
    """One picture of every word, with size, place and colours as the set has them, from beyond its own pictures."""
    words, found = source.rules.words, []
    first = source.rules.count + sampling * len(words)
    longer = SyntheticText(replace(source.rules, count=first + len(words)))
    for row, word in enumerate(words):
        writing = longer.writing(first + row)
        pixels = writing.pixels * len(writing.word) // len(word)
        found.append(draw(writing._replace(word=word, pixels=pixels), source.rules.size))
    return found


def _share(reader: WordReader, pictures: Iterable[np.ndarray]) -> float:
    return float(np.mean([reader.read(picture)[0] == row for row, picture in enumerate(pictures)]))


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures; 2 after bad input (one line on stderr)."""
    return command_line.run(
        lambda: _report(command_line.parse(WritingArgs, args, prog="python -m bdm_jax.evaluate.writing"))
    )


def _report(asked: WritingArgs) -> None:
    for name in ("seeds", "steps", "batch_size"):
        if getattr(asked, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(asked, name)}: must be at least 1")
    check_output("--json", asked.json)
    check_output("--sheet", asked.sheet)
    source = open_source(asked.data)
    if not isinstance(source, SyntheticText):
        raise UserError(f"--data {asked.data}: no pictures of text, which bdm_jax.data.synthetic_text makes")
    compile_cache.enable()
    found = measure(BridgePipeline.from_pretrained(local(asked.model)), source, asked)
    pictures = found.pop("pictures")
    for name, values in found["right"].items():
        spread = f"{min(values):.1%} - {max(values):.1%}" if len(set(values)) > 1 else ""
        print(f"{name:36} {np.mean(values):6.1%} read back right   {spread}")
    print(f"{'chance':36} {found['chance']:6.1%}   ({found['words']} words, {asked.seeds} samplings)")
    if asked.json:
        write_json(asked.json, found)
    if asked.sheet:
        words = source.rules.words
        read = [words[found] for _, found in pictures]
        labels = [one if one == other else f"{one} ≠ {other}" for one, other in zip(words, read, strict=True)]
        write_png(asked.sheet, contact_sheet([picture for picture, _ in pictures], labels, _COLUMNS), palette=True)


if __name__ == "__main__":
    sys.exit(main())
