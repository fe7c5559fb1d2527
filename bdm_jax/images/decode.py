"""Safe decoding of untrusted image files: bounded size, common formats, errors that name the file and the cause."""

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
    """PNG, JPEG or WebP bytes -> uint8 (H, W, 3); transparent images are composited over `background`.

    Images are rotated by their EXIF orientation; 16-bit images become 8-bit.

    Args:
        data: encoded bytes, untrusted.
        max_pixels: limit on height x width, checked before decoding.
        name: name of the record in error messages.
        strict: also refuse images that are decoded only approximately: CMYK (needs a colour profile), 16-bit, animated.

    Raises:
        BadRecord: empty, unreadable, truncated, of an unsupported format, or too large; its `cause` says which.
    """
    with _open(data, max_pixels, name, strict) as image:
        return np.array(_to_rgb(ImageOps.exif_transpose(image), background))


def image_size(data: bytes, max_pixels: int = MAX_PIXELS, name: str = "image") -> tuple[int, int]:
    """Encoded bytes -> (height, width) after EXIF rotation, from the header alone.

    Raises BadRecord as a strict `decode_image` does, except for damage in the pixel data.
    """
    with _open(data, max_pixels, name, strict=True) as image:
        transposed = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.width, image.height) if transposed else (image.height, image.width)


def read_bytes(path: Path, max_bytes: int, kind: str) -> bytes:
    """The content of a user's file of at most `max_bytes`. Raises UserError if it cannot be read or is larger."""
    try:
        with path.open("rb") as file:
            # `read` allocates what it is asked for: the file's size, or for a pipe, whose size is 0, the limit
            data = file.read((min(path.stat().st_size, max_bytes) or max_bytes) + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > max_bytes:
        raise UserError(f"{path}: larger than {max_bytes >> 20} MiB, too large for a {kind}")
    return data


def read_image(path: str | Path) -> np.ndarray:
    """An image file -> uint8 (H, W, 3), rotated by its EXIF orientation. Raises UserError as `decode_image` does."""
    return decode_image(read_bytes(Path(path), MAX_BYTES, "image file"), name=str(path))


def read_mask(path: str | Path) -> np.ndarray:
    """A mask file -> uint8 (H, W): white where the image is repainted, black (or transparent) where it is kept."""
    pixels = decode_image(read_bytes(Path(path), MAX_BYTES, "image file"), name=str(path), background="black")
    return np.array(Image.fromarray(pixels).convert("L"))


def resize_to_cover(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W) or (H,W,3) uint8 resized to cover (height, width) and centre-cropped to it, without distortion."""
    if image.shape[:2] == size:
        return image
    return np.array(ImageOps.fit(Image.fromarray(image), size[::-1], Image.Resampling.LANCZOS))


@contextlib.contextmanager
def _open(data: bytes, max_pixels: int, name: str, strict: bool) -> Iterator[Image.Image]:
    """The image after its header was checked; any error inside the block is raised as BadRecord too."""
    if not data:
        raise BadRecord(name, "empty file", "the image cannot be read (the file is empty)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    message = f"{image.width} x {image.height} pixels exceed the limit of {max_pixels}"
                    raise BadRecord(name, "too large", message)
                if strict and (cause := _approximate(image, data)):
                    raise BadRecord(name, cause, f"{cause} images are not supported here; convert it to 8-bit RGB")
                yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord(name, "too large", f"the image cannot be read ({error})") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(_FORMATS)
        raise BadRecord(name, "unsupported format", f"the image cannot be read (not one of {formats})") from error
    except Exception as error:  # PIL's decoders raise all kinds of errors on damaged files
        raise BadRecord(name, "corrupt image", f"the image cannot be read ({error})") from error


def _approximate(image: Image.Image, data: bytes) -> str | None:
    if getattr(image, "n_frames", 1) > 1:
        return "animated"
    if image.mode == "CMYK":
        return "CMYK"
    wide = image.mode.startswith("I") or image.mode == "F"
    # PIL reduces 16-bit PNGs with several channels to 8 bits: only the header shows it
    return "16-bit" if wide or (image.format == "PNG" and data[24] > 8) else None


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")
