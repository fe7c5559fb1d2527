"""Safe decoding of untrusted image files: bounded size, common formats, errors that name the file and the cause."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from bdm_jax.errors import BadRecord, UserError

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 28
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""File names of images end so, in any case; what is in a file is recognised by its bytes."""

_WIDTH, _HEIGHT, _DEPTHS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 258, 262, 322, 323  # tags of TIFF
_WHITE_IS_ZERO = 0
_ONE_COLOUR = 8  # levels that colours may differ by, after alpha has been taken out of them
_SOMETHING = 8  # levels: what is darker is the black of a JPEG, or a mask of zeros and ones
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def decode_image(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    name: str = "image",
    background: str = "white",
    *,
    strict: bool = False,
) -> np.ndarray:
    """PNG, JPEG, WebP, BMP, GIF or TIFF bytes -> uint8 (H, W, 3); transparent images are composited over `background`.

    Images are rotated by their EXIF orientation; 16-bit images become 8-bit; of several frames or pages the first is
    taken.

    Args:
        data: encoded bytes, untrusted.
        max_pixels: limit on height x width, checked before decoding.
        name: name of the record in error messages.
        strict: also refuse images that are decoded only approximately: CMYK (needs a colour profile), 16-bit,
            animated, of several pages.

    Raises:
        BadRecord: empty, unreadable, truncated, of an unsupported format, or too large; its `cause` says which.
    """
    with _open(data, max_pixels, name, strict) as image:
        return image_pixels(image, background)


def image_pixels(image: Image.Image, background: str = "white") -> np.ndarray:
    """An image of PIL's -> uint8 (H, W, 3), as `decode_image`."""
    image = _upright(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return np.array(image.convert("RGB"))


def decode_cutout(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image with transparency -> uint8 (H, W, 4): RGB, not multiplied by alpha, and alpha.

    Raises:
        BadRecord: as `decode_image`, and for an image that has no transparency.
    """
    with _open(data, max_pixels, name, strict=False) as image:
        _check_transparency(image, name)
        return np.array(_upright(image).convert("RGBA"))


def check_cutout(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS, *, full: bool = False) -> None:
    """Decodes an image that things are cut out of, for its alpha.

    Args:
        full: the thing may fill its picture, so that nothing is transparent.

    Raises:
        BadRecord: as `decode_cutout`, and for an image that is transparent everywhere or, unless `full`, nowhere.
    """
    alpha = decode_cutout(data, name, max_pixels)[..., 3]
    if not alpha.any():
        raise BadRecord(name, "nothing visible", "all of it is transparent; a cut-out shows a thing")
    if not full and alpha.min() == 255:
        message = "nothing in it is transparent; a cut-out is a PNG or WebP whose ground is transparent"
        raise BadRecord(name, "no transparency", message)


def array_image(array: np.ndarray, name: str) -> Image.Image:
    """Pixels as Python programs hold them -> an image of PIL's: (H,W), (H,W,1), (H,W,3) or (H,W,4), of uint8 in 0 ..
    255, of floats in 0 .. 1, or bool. Raises UserError for any other array.
    """
    shape = array.shape
    if not (array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        raise UserError(f"{name}: an array of shape {shape}; expected (height, width), with 1, 3 or 4 channels or none")
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float32)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN included
            raise UserError(f"{name}: floats from {values.min():g} to {values.max():g}; expected 0 to 1, or uint8")
        array = np.round(values * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"{name}: an array of {array.dtype}; expected uint8, or floats from 0 to 1")
    return Image.fromarray(array[..., 0] if shape[2:] == (1,) else array)


def mask_pixels(image: Image.Image, name: str = "the mask") -> np.ndarray:
    """A mask as an image of PIL's -> uint8 (H, W): white is repainted, black or transparent is kept.

    Where all that is visible has one colour, as in strokes on a transparent ground, alpha is the mask, whatever the
    colour. Where both differ from place to place the colours are the mask, with a note.

    Raises UserError for a mask without anything to repaint.
    """
    image = _upright(image)
    if image.mode == "RGBA" and image.getextrema()[-1][0] < 255:
        colours, alpha = np.array(image.convert("RGB")), np.array(image.getchannel("A"))
        clear = colours[alpha >= 128]  # pale edges have lost their colour
        if len(clear) and (np.ptp(clear, axis=0) > _ONE_COLOUR).any():
            _note(f"{name} has colours and transparency: white is repainted, black and transparent are kept")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        else:
            image = Image.fromarray(alpha)
    mask = np.array(image.convert("L"))
    check_mask(mask, name)
    return mask


def check_mask(mask: np.ndarray, name: str = "the mask") -> None:
    """Raises UserError for a mask uint8 (H, W) that leaves nothing to repaint."""
    if mask.max() < _SOMETHING:
        raise UserError(
            f"{name}: nothing to repaint, its brightest value is {mask.max()} of 255; "
            "a mask is white where the image is repainted"
        )


def image_size(data: bytes, max_pixels: int = MAX_PIXELS, name: str = "image") -> tuple[int, int]:
    """Encoded bytes -> (height, width) after EXIF rotation, from the header alone.

    Raises BadRecord as a strict `decode_image` does, except for damage in the pixel data.
    """
    with _open(data, max_pixels, name, strict=True) as image:
        width, height = _stored_size(image)
        return (width, height) if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else (height, width)


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
    """A mask file -> uint8 (H, W), 255 where the image is repainted. Raises UserError as `decode_image` and
    `mask_pixels` do.
    """
    return decode_mask(read_bytes(Path(path), MAX_BYTES, "image file"), name=str(path))


def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS, name: str = "the mask") -> np.ndarray:
    """A mask's bytes, untrusted -> uint8 (H, W), 255 where the image is repainted. Raises UserError as `decode_image`
    and `mask_pixels` do.
    """
    with _open(data, max_pixels, name, strict=False) as image:
        return mask_pixels(image, name)


def resize_to_cover(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H,W) or (H,W,3) uint8 resized to cover (height, width) and centre-cropped to it, without distortion."""
    if image.shape[:2] == size:
        return image
    return np.array(ImageOps.fit(Image.fromarray(image), size[::-1], Image.Resampling.LANCZOS))


@cache
def _note(message: str) -> None:
    """A warning that comes once, however often a file is read."""
    warnings.warn(message, stacklevel=1)


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
                _check_tiff(image, max_pixels, name)
                if strict and (cause := _approximate(image, data)):
                    raise BadRecord(name, cause, f"{cause} images are not supported here; convert it to 8-bit RGB")
                yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRecord(name, "too large", f"the image cannot be read ({error})") from error
    except UnidentifiedImageError as error:
        formats = f"not one of {', '.join(_FORMATS)}, or a variant of it that is not read"
        raise BadRecord(name, "unsupported format", f"the image cannot be read ({formats})") from error
    except Exception as error:  # PIL's decoders raise all kinds of errors on damaged files
        raise BadRecord(name, "corrupt image", f"the image cannot be read ({error})") from error


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before rotation; of a TIFF, some versions of PIL give the size after it."""
    tags = getattr(image, "tag_v2", None)
    return image.size if tags is None else (tags[_WIDTH], tags[_HEIGHT])


def _check_tiff(image: Image.Image, max_pixels: int, name: str) -> None:
    """What a TIFF can have that the other formats cannot. Raises BadRecord."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    if width * height > max_pixels:
        raise BadRecord(name, "too large", f"its tiles of {width} x {height} pixels exceed the limit of {max_pixels}")
    if tags and image.mode in ("I", "F"):  # the scale of its values is nowhere said
        message = "signed, 32-bit and floating-point images are not supported; convert it to 8-bit RGB"
        raise BadRecord(name, "32-bit", message)


def _approximate(image: Image.Image, data: bytes) -> str | None:
    # a JPEG with more pictures behind it (a phone's preview or depth: PIL's MPO) is still a photo
    if getattr(image, "is_animated", False) and image.format != "MPO":
        return "multi-page" if image.format == "TIFF" else "animated"
    if image.mode == "CMYK":
        return "CMYK"
    # PIL reduces 16-bit images with several channels to 8 bits: only the header shows it
    depth = data[24] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(_DEPTHS, (8,)))
    return "16-bit" if image.mode.startswith("I") or depth > 8 else None


def _transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _check_transparency(image: Image.Image, name: str) -> None:
    if not _transparent(image):
        message = "it has no transparency; a cut-out is a PNG or WebP whose ground is transparent"
        raise BadRecord(name, "no transparency", message)


def _upright(image: Image.Image) -> Image.Image:
    """8-bit RGB, or RGBA where anything is transparent, rotated by the EXIF orientation."""
    if image.mode in ("F", "I"):
        raise UserError(f"an image of mode {image.mode}: 32-bit values have no range that is known; convert it to RGB")
    inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _to_8_bit(image, inverted)
    return image.convert("RGBA" if _transparent(image) else "RGB")


def _to_8_bit(image: Image.Image, inverted: bool) -> Image.Image:
    """16-bit grey -> 8-bit, which PIL would clip at 255 and not invert; with alpha where a value is transparent."""
    values = np.asarray(image, np.float64)
    grey = (values / 257).clip(0, 255).round().astype(np.uint8)
    found = Image.fromarray(255 - grey if inverted else grey)
    if isinstance(transparent := image.info.get("transparency"), int):
        found.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return found
