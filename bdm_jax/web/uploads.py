"""Pictures as they come in requests: base64, untrusted."""

import base64
import binascii
import io
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import decode_image, decode_mask

_one_at_a_time = threading.Lock()  # large pictures are so never decoded side by side


def from_base64(text: str, name: str) -> bytes:
    """`data:image/png;base64,...`, or the base64 alone. Raises UserError for what is neither."""
    head, comma, rest = text.partition(",")
    data = rest if comma and head.startswith("data:") else text
    try:
        found = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: no base64 of a picture") from error
    if not found:
        raise UserError(f"{name}: empty")
    return found


def image(text: str, max_pixels: int, name: str = "image") -> np.ndarray:
    """An uploaded picture -> (H,W,3) uint8. Raises UserError, in one line."""
    data = from_base64(text, name)
    with _one_at_a_time:
        return decode_image(data, max_pixels, name)


def mask(text: str, max_pixels: int, name: str = "mask") -> np.ndarray:
    """An uploaded mask -> (H,W) uint8, 255 where the picture is repainted. Raises UserError, in one line."""
    data = from_base64(text, name)
    with _one_at_a_time:
        return decode_mask(data, max_pixels, name)


def text_chunks(text: str, name: str = "image") -> dict[str, str]:
    """The texts inside an uploaded picture by keyword; no pixel is decoded. Raises UserError, in one line."""
    data = from_base64(text, name)
    try:
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
                info = {**picture.info, **getattr(picture, "text", {})}
    except UnidentifiedImageError as error:
        raise BadRecord(name, "corrupt image", "not one of PNG, JPEG, WebP") from error
    except Exception as error:  # what a damaged file makes PIL raise is no fixed list
        raise BadRecord(name, "corrupt image", f"the picture cannot be read ({error})") from error
    return {key: value for key, value in info.items() if isinstance(key, str) and isinstance(value, str)}


def to_base64(data: bytes) -> str:
    """As both APIs send pictures."""
    return base64.b64encode(data).decode("ascii")


def png_bytes(pixels: np.ndarray) -> bytes:
    """A small PNG, as of a preview (H,W,3) uint8."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png", compress_level=1)
    return out.getvalue()
