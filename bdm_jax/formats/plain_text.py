"""Text files that a person wrote, in whatever encoding their editor has."""

import codecs
import warnings

from bdm_jax.errors import FileError

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", "；": "full-width semicolons", "，": "full-width commas"}


class EncodingNote(UserWarning):
    """A text file's encoding was a guess."""


def decode_text(data: bytes, name: str, noted_as: str | None = None) -> str:
    """The content of a text file -> its text: UTF-16 by its mark, else UTF-8 with or without one, else GBK.

    GBK is read as GB 18030, which contains it and GB 2312, and warned of with EncodingNote: text in another encoding
    may pass for it. Line ends stay as they are.

    Args:
      name: the file's name in errors.
      noted_as: its name in the warning, where another is better: that of a folder whose files are noted once.

    Raises FileError, naming the line, for what is none of these, and for NUL characters, which no text holds.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _decode(data, "utf-16", name, "not UTF-16, though its mark says so")
    try:
        return _without_nul(data.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        if b"\0" in data:  # UTF-16 without its mark has line ends with a zero byte
            raise FileError(f"{name}: no text, it holds NUL bytes; save the file as UTF-8") from error
    text = _decode(data, "gb18030", name, "neither UTF-8 nor GBK")
    message = f"{noted_as or name}: not UTF-8, read as GBK; if characters come out wrong, save it as UTF-8"
    warnings.warn(message, EncodingNote, stacklevel=2)
    return text


def wrong_separator(header: str) -> str | None:
    """What the first line of a table is separated by in place of commas, as Excel and editors write it; None for
    commas, or a single column."""
    return next((name for sign, name in _SEPARATORS.items() if sign in header), None)


def _decode(data: bytes, encoding: str, name: str, why: str) -> str:
    try:
        return _without_nul(data.decode(encoding), name)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise FileError(f"{name}, line {line}: {why}; save the file as UTF-8") from error


def _without_nul(text: str, name: str) -> str:
    if "\0" in text:
        raise FileError(f"{name}: no text, it holds NUL characters; save the file as UTF-8")
    return text
