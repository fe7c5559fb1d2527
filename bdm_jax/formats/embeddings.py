"""Readers of Textual Inversion embeddings: the token vectors that Stable Diffusion's trainers save.

| written by | content |
|---|---|
| diffusers (`learned_embeds.bin`, `.safetensors`) | `{token: (m,D) or (D,)}` |
| AUTOMATIC1111 `.pt` | `string_to_token`, `string_to_param {"*": (m,D)}`, `name`, `step`, `sd_checkpoint...` |
| AUTOMATIC1111 picture | the same as base64 of JSON in the text chunk `sd-ti-embedding`, or in the pixels |
| original LDM `.pt` | `string_to_token`, `string_to_param {"*" or the token: (m,D)}`; no name |
| kohya, SD1 | `{"emb_params": (m,D)}` |
| kohya, SDXL | `{"clip_l": (m,768), "clip_g": (m,1280)}`: one token for two text encoders |
| diffusers' SDXL script | two files, `learned_embeds` and `learned_embeds_2`, each like diffusers' own |

A bare tensor is read too, and the tokens that cloneofsimo's LoRA files carry beside their layers.
"""

import base64
import json
import re
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from PIL import Image

from bdm_jax.errors import FileError
from bdm_jax.formats.files import read_safetensors, shown
from bdm_jax.formats.pickles import is_checkpoint, read_checkpoint

_MAX_FILE = 64 * 2**20  # the largest embeddings known have a megabyte; a LoRA file with tokens some tens
_MAX_JSON = 64 * 2**20
_MAX_PIXELS = 2**24
_MAX_VECTORS = 4096
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"RIFF")
_CHUNK = "sd-ti-embedding"
_LORA = re.compile(r"\w+:\d+:(up|down)")


class Inversion(NamedTuple):
    """One embedding of a file.

    name: what the file calls it; None where it does not say.
    vectors: text encoder -> (m, D) float32. It is "" where the file knows only one, else clip_l or clip_g.
    """

    name: str | None
    vectors: dict[str, np.ndarray]


def read_embeddings(path: str | Path, encoders: Sequence[str] = ()) -> list[Inversion]:
    """All embeddings of a file: one, but for files of several tokens.

    `encoders`: what files for several text encoders call them (`systems.families.embedding_names`).

    Raises FileError for a file without any, for anything in it that is not known, for vectors that are empty, not
    numbers or not finite, and for what `read_checkpoint` and `read_safetensors` refuse.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if size > _MAX_FILE:
        raise FileError(f"{path}: {size} bytes, too large for an embedding; at most {_MAX_FILE} are read")
    if head.startswith(_PICTURES):
        return _inversions(path, _in_picture(path), encoders)
    value = read_checkpoint(path) if is_checkpoint(path) else dict(read_safetensors(path))
    return _inversions(path, value, encoders)


def is_picture(path: Path) -> bool:
    """Whether a file is of a kind of picture that web interfaces keep embeddings in."""
    with path.open("rb") as file:
        return file.read(8).startswith(_PICTURES)


def _inversions(path: Path, value: Any, encoders: Sequence[str]) -> list[Inversion]:
    if isinstance(value, np.ndarray):
        return [Inversion(None, {"": _vectors(path, "the tensor", value)})]
    if not isinstance(value, dict) or not value:
        raise FileError(f"{path}: no embedding, but {'nothing' if value == {} else f'a {type(value).__name__}'}")
    if "string_to_param" in value:
        return [_web_ui(path, value)]
    if any(name in value for name in encoders):
        _only(path, value, encoders)
        return [Inversion(None, {name: _vectors(path, name, value[name]) for name in encoders if name in value})]
    names = [name for name in value if not (isinstance(name, str) and _LORA.fullmatch(name))]
    if not names:
        raise FileError(f"{path}: a LoRA file without tokens of its own")
    if len(names) > 1 or len(names) < len(value):  # of several tokens: a mark tells them from layers of a network
        _only(path, value, [name for name in value if re.fullmatch(r"<.+>", str(name)) or name not in names])
    nameless = ("emb_params", "*")
    found = {name: _vectors(path, str(name), value[name]) for name in names}
    return [Inversion(None if name in nameless else str(name), {"": v}) for name, v in found.items()]


def _web_ui(path: Path, value: dict[Any, Any]) -> Inversion:
    """AUTOMATIC1111's and LDM's dict, in which the token that was trained is called "*"."""
    known = ("string_to_token", "string_to_param")
    _only(path, value, [key for key, part in value.items() if key in known or not isinstance(part, dict | np.ndarray)])
    parameters, name = value["string_to_param"], value.get("name")
    if not isinstance(parameters, dict) or len(parameters) != 1:
        count = len(parameters) if isinstance(parameters, dict) else "no"
        raise FileError(f"{path}: string_to_param holds {count} parameters; one is expected")
    (key, vectors), *_ = parameters.items()
    if not (name is None or isinstance(name, str)):
        raise FileError(f"{path}: its name is a {type(name).__name__}, not a text")
    placeholder = key if isinstance(key, str) and key != "*" else None  # LDM's may be trained with a word of its own
    return Inversion(name or placeholder, {"": _vectors(path, f"string_to_param {key}", vectors)})


def _only(path: Path, value: dict[Any, Any], known: Any) -> None:
    if others := [key for key in value if key not in known]:
        raise FileError(f"{path}: {shown(others[0])} belongs to no embedding ({len(others)} such keys in all)")


def _vectors(path: Path, name: str, value: Any) -> np.ndarray:
    """(m, D) float32 of a parameter of one axis or two."""
    if not isinstance(value, np.ndarray) or value.ndim not in (1, 2) or 0 in value.shape:
        kind = f"of shape {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise FileError(f"{path}: {shown(name)} is {kind}; expected vectors (m, D)")
    if not (np.issubdtype(value.dtype, np.floating) or value.dtype == ml_dtypes.bfloat16):
        raise FileError(f"{path}: {shown(name)} is of {value.dtype}; expected floating-point numbers")
    rows = value.reshape(-1, value.shape[-1])
    if len(rows) > _MAX_VECTORS:
        raise FileError(f"{path}: {shown(name)} has {len(rows)} vectors; at most {_MAX_VECTORS} are read")
    with np.errstate(over="ignore"):
        rows = np.array(rows, np.float32)
    if not np.isfinite(rows).all():
        raise FileError(f"{path}: {shown(name)} has values that are not finite")
    return rows


# AUTOMATIC1111's pictures (modules/textual_inversion/image_embedding.py). The pixels hold, left and right of the
# preview and one black column from it, the low and the high halves of the bytes of compressed JSON: in the low four
# bits of each channel, under a fixed sequence of pseudo-random bits; the high four bits are ornament.


def _in_picture(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # sizes are bounded here
            picture = Image.open(path, formats=("PNG", "WEBP"))
        with picture:
            width, height = picture.size
            text = picture.info.get(_CHUNK)
            if text:
                text = base64.b64decode(text, validate=True)
            elif width * height <= _MAX_PIXELS:
                text = _from_pixels(np.asarray(picture.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"{path}: a damaged picture ({shown(error)})") from error
    if not text:
        where = "" if width * height <= _MAX_PIXELS else f"'s texts; {width}x{height} pixels are too many to look into"
        raise FileError(f"{path}: no embedding in this picture{where}")
    if len(text) > _MAX_JSON:
        raise FileError(f"{path}: its embedding unfolds into more than {_MAX_JSON} bytes")
    try:
        return json.loads(text.decode("utf-8"), object_hook=_tensor)
    except (ValueError, TypeError, RecursionError) as error:
        raise FileError(f"{path}: its embedding is not the JSON of one ({shown(error)})") from error


def _tensor(value: dict[str, Any]) -> Any:
    return np.array(value["TORCHTENSOR"]) if "TORCHTENSOR" in value else value


def _from_pixels(pixels: np.ndarray) -> bytes | None:
    """JSON from pixels (H,W,3) uint8; None where they hold none."""
    lit = (pixels > 0).all(axis=2)
    if not lit.any():
        return None
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    low_bits = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 15
    black = np.flatnonzero(~low_bits.any(axis=(0, 2)))
    if len(black) < 2:
        return None
    low, high = _unmasked(low_bits[:, : black[0]]), _unmasked(low_bits[:, black[-1] + 1 :])
    if low.size != high.size:
        return None
    try:
        return zlib.decompressobj().decompress((high << 4 | low).tobytes(), _MAX_JSON + 1)
    except zlib.error:
        return None  # an ordinary picture may well have two black columns


def _unmasked(block: np.ndarray) -> np.ndarray:
    """Four-bit numbers of a block in reading order, without the pseudo-random bits: x <- 1664525 x + 1013904223."""
    factors = np.full(block.size, 1664525, np.uint32)
    factors[:1] = 1
    powers = np.cumprod(factors, dtype=np.uint32)
    states = np.cumsum(powers, dtype=np.uint32) * np.uint32(1013904223)
    return block.reshape(-1) ^ (states % 255 & 15).astype(np.uint8)
