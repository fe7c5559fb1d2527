"""Pictures of written Chinese as a set to train on: `python -m bdm_jax.data.synthetic_text OUT [--words FILE ...]`.

OUT is a folder for --data.folder or --data.also; see `lettering` for what it holds.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bdm_jax import command_line
from bdm_jax.data.lettering import RULES, Rules, SyntheticText, captions, draw
from bdm_jax.data.records import open_source
from bdm_jax.formats.files import write_json
from bdm_jax.formats.plain_text import decode_text
from bdm_jax.images.decode import read_bytes
from bdm_jax.images.pictures import contact_sheet, write_png
from bdm_jax.paths import EMOJI, check_output

_HAN = re.compile("[\u4e00-\u9fff]{1,4}")
_MAX_WORDS = 64 << 20  # bytes of a list of words
_SHOWN = 32


@dataclass(frozen=True)
class WriteArgs:
    """Make a set of pictures of text: its rules; the pictures are drawn when they are read."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """folder of the set, for --data.folder and --data.also"""
    words: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """a text file with one word per line (default: Chinese names and keywords of the bundled set)"""
    count: int = Rules.count
    """number of pictures"""
    seed: int = Rules.seed
    """other pictures"""
    size: int = Rules.size
    """their side in pixels"""
    scale: tuple[float, float] = Rules.scale
    """the text's size, between these shares of the largest that fits"""
    grounds: tuple[str, ...] = Rules.grounds
    """colours of the background"""
    sheet: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the first pictures here as PNG, to look at"""


def main(args: Sequence[str] | None = None) -> int:
    """Write the rules and say how many words there are; 2 after bad input (one line on stderr)."""

    def command() -> None:
        asked = command_line.parse(WriteArgs, args, prog="python -m bdm_jax.data.synthetic_text")
        check_output("--sheet", asked.sheet)
        words = bundled_words() if asked.words is None else read_words(asked.words)
        rules = Rules(words, asked.count, asked.seed, asked.size, asked.scale, asked.grounds)
        source = SyntheticText(rules)
        write_json(asked.out / RULES, asdict(rules))
        print(f"{len(source)} pictures of {len(words)} words in {asked.out}")
        if asked.sheet:
            writings = [source.writing(index) for index in range(min(_SHOWN, len(source)))]
            pictures = [draw(writing, rules.size) for writing in writings]
            write_png(asked.sheet, contact_sheet(pictures, [captions(writing)[1] for writing in writings], 8))

    return command_line.run(command)


def read_words(path: Path) -> tuple[str, ...]:
    """The words of a text file, one per line, each once. Raises FileError for a file that cannot be read."""
    lines = decode_text(read_bytes(path, _MAX_WORDS, "list of words"), str(path)).splitlines()
    return tuple(dict.fromkeys(word for line in lines if (word := line.strip())))


def bundled_words() -> tuple[str, ...]:
    """Chinese names and keywords of the bundled set, of up to four characters, in order of code points."""
    source = open_source(EMOJI)
    records = (source[index] for index in range(len(source)))
    names = {name for record in records for name in (record["zh"], *record["zh_keywords"])}
    return tuple(sorted(name for name in names if _HAN.fullmatch(name)))


if __name__ == "__main__":
    sys.exit(main())
