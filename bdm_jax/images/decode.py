"""Pictures from files that nobody has checked: bounded, of the usual formats, whole or refused by name."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from bdm_jax.errors import BadRecord, UserError

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 28
_FORMATS = ("PNG", "JPEG", "WEBP")


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    name: str = "image",
    background: str = "white",
    *,
    strict: bool = False,
) -> np.ndarray:
    """PNG, JPEG or WebP bytes -> uint8 (H, W, 3); transparent pictures are laid over `background`.

    A photograph is turned upright by its EXIF note; 16-bit pictures become 8-bit ones.

    Args:
        data: encoded bytes, not trusted.
        max_pixels: refuse larger pictures before a pixel is decoded.
        name: what the error message calls the record.
        strict: also refuse what comes out only roughly: CMYK (its colours need a profile), 16 bits, animations.

    Raises:
        BadRecord: empty, unreadable, truncated, of another format, or too large; its `cause` says which.
    """
    with _opened(data, max_pixels, name, strict) as image:
        return np.array(_over(ImageOps.exif_transpose(image), background))


def image_size(data: bytes, max_pixels: int = MAX_PIXELS, name: str = "image") -> tuple[int, int]:
    """Encoded bytes -> (height, width) of the upright picture, from its header alone.

    Raises BadRecord as a strict `decode_image` does, except for what only the pixels show.
    """
    with _opened(data, max_pixels, name, strict=True) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def read_bytes(path: Path, most: int, kind: str) -> bytes:
    """A user's file of at most so many bytes. Raises UserError that names it where it cannot be read or is larger."""
    try:
        with path.open("rb") as file:
            # `read` reserves what is asked for: as much as there is; of a pipe, which tells no size, up to the limit
            data = file.read((min(path.stat().st_size, most) or most) + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > most:
        raise UserError(f"{path}: larger than {most >> 20} MiB, no {kind}")
    return data


def read_picture(path: str | Path) -> np.ndarray:
    """A picture's file -> uint8 (H, W, 3), upright by its camera's note. Raises UserError as `decode_image` does."""
    return decode_image(read_bytes(Path(path), MAX_BYTES, "picture"), name=str(path))


def read_mask(path: str | Path) -> np.ndarray:
    """A mask's file -> uint8 (H, W): white where something is to happen, black (or transparent) where not."""
    picture = decode_image(read_bytes(Path(path), MAX_BYTES, "picture"), name=str(path), background="black")
    return np.array(Image.fromarray(picture).convert("L"))


def covering(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W) or (H,W,3) uint8 made (height, width) large, without distortion: what is over is cut off evenly."""
    if picture.shape[:2] == size:
        return picture
    return np.array(ImageOps.fit(Image.fromarray(picture), size[::-1], Image.Resampling.LANCZOS))


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int, name: str, strict: bool) -> Iterator[Image.Image]:
    """The picture, its header read and found good; whatever goes wrong with it from there on is a BadRecord as well."""
    if not data:
        raise BadRecord(name, "empty file", "the image cannot be read (the file is empty)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    told = f"{image.width} x {image.height} pixels exceed the limit of {max_pixels}"
                    raise BadRecord(name, "too large", told)
                if strict and (cause := _rough(image, data)):
                    raise BadRecord(name, cause, f"a picture of the kind {cause}")
                yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord(name, "too large", f"the image cannot be read ({error})") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(_FORMATS)
        raise BadRecord(name, "another format", f"the image cannot be read (none of {kinds})") from error
    except Exception as error:  # what a damaged file makes PIL's decoders raise is no fixed list
        raise BadRecord(name, "broken picture", f"the image cannot be read ({error})") from error


def _rough(image: Image.Image, data: bytes) -> str | None:
    if getattr(image, "n_frames", 1) > 1:
        return "animated"
    if image.mode == "CMYK":
        return "CMYK"
    wide = image.mode.startswith("I") or image.mode == "F"
    # a PNG of 16 bits and several channels comes out of PIL with 8: only its header tells
    return "16 bits" if wide or (image.format == "PNG" and data[24] > 8) else None


def _over(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: PIL cuts them off at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")
