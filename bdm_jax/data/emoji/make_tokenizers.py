"""Rebuild the bundled tokenizer folders: `python -m bdm_jax.data.emoji.make_tokenizers`.

`clip` is CLIP's own tokenizer, for Stable Diffusion files that come without one. The demo uses the vocabularies of the
real text encoders, so that it tokenizes like them: CLIP's BPE truncated to its first merges (`english`), and the full
BERT vocabulary of Chinese-CLIP (`chinese`). They come from the packages open-clip-torch 3.3.0 and cn-clip 1.6.0
(`pip install --no-deps` is enough), or from files given with --bpe and --vocab.
"""

import gzip
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bdm_jax import command_line
from bdm_jax.errors import UserError
from bdm_jax.paths import TOKENIZERS

MERGES = 8000
ALL_MERGES = 48894
MAX_LENGTH = 16
BPE = ("open-clip-torch", "open_clip/bpe_simple_vocab_16e6.txt.gz")
BPE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
VOCAB = ("cn-clip", "cn_clip/clip/vocab.txt")
VOCAB_SHA256 = "45bbac6b341c319adc98a532532882e91a9cefc0329aa57bac9ae761c27b291c"
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TokenizerArgs:
    """Rebuild the bundled tokenizer folders."""

    bpe: Path | None = None
    """CLIP's bpe_simple_vocab_16e6.txt.gz (default: from the package open-clip-torch)"""
    vocab: Path | None = None
    """Chinese-CLIP's vocab.txt (default: from the package cn-clip)"""
    out: Path = TOKENIZERS
    """folder to write to"""
    merges: int = MERGES
    """CLIP merges to keep"""


def main(args: Sequence[str] | None = None) -> int:
    """Write `clip/`, `english/` and `chinese/` below `--out`."""
    return command_line.run(
        lambda: make(command_line.parse(TokenizerArgs, args, prog="python -m bdm_jax.data.emoji.make_tokenizers"))
    )


def make(asked: TokenizerArgs) -> None:
    """Write the folders. Raises UserError for vocabularies that are missing or not those that are known."""
    bpe = _checked(asked.bpe or _in_package(*BPE), BPE_SHA256)
    vocab = _checked(asked.vocab or _in_package(*VOCAB), VOCAB_SHA256)
    bpe = gzip.decompress(bpe).decode("utf-8")
    write_english(asked.out / "clip", bpe, ALL_MERGES, 77)
    write_english(asked.out / "english", bpe, asked.merges)
    write_chinese(asked.out / "chinese", vocab)


def write_english(folder: Path, bpe: str, merges: int = MERGES, max_length: int = MAX_LENGTH) -> None:
    """Write CLIP's tokenizer with its first `merges` merges, for transformers' CLIPTokenizer.

    Ids as in CLIP: 256 bytes, 256 bytes with end-of-word mark, the merges in order, start, end (also the padding).
    """
    lines = bpe.split("\n")[1 : merges + 1]
    units = _byte_units()
    tokens = units + [unit + "</w>" for unit in units] + ["".join(line.split()) for line in lines] + [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)}, indent=None)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    _write_json(folder / "tokenizer_config.json", config)


def write_chinese(folder: Path, vocab: bytes, max_length: int = MAX_LENGTH) -> None:
    """Write Chinese-CLIP's tokenizer (BERT WordPiece, 21,128 tokens), for transformers' BertTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_bytes(vocab)
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    _write_json(folder / "tokenizer_config.json", config)


def _byte_units() -> list[str]:
    """The 256 printable characters that represent bytes in CLIP's vocabulary, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _in_package(package: str, name: str) -> Path:
    try:
        return Path(importlib.metadata.distribution(package).locate_file(name))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{name} is missing: pip install --no-deps {package}, or give the file by its flag") from error


def _checked(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is not the expected file: its SHA-256 is not {sha256}")
    return data


def _write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
