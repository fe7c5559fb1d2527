"""Every format that people keep images in: the right pixels, within bounds."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import (
    array_image,
    decode_image,
    image_pixels,
    image_size,
    mask_pixels,
    read_image,
    read_mask,
)

LOSSLESS = ("PNG", "BMP", "GIF", "TIFF")
EXACT = {"WEBP": {"lossless": True}}
ORIENTED = {  # EXIF's orientation: how the stored picture is turned
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.fixture
def pixels(rng):
    """Of few colours, as a GIF can keep them."""
    return rng.choice([0, 85, 170, 255], (6, 9, 3)).astype(np.uint8)


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(values, bits, photometric, order="<", **more):
    """An uncompressed TIFF of one channel, of tags that PIL's own writer does not choose."""
    data = np.ascontiguousarray(values).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags |= {int(tag): value for tag, value in more.items()}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return header + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_pixels_and_size_of_a_format(kind, pixels, tmp_path):
    data = encoded(pixels, kind)
    np.testing.assert_array_equal(decode_image(data, strict=True), pixels)
    assert image_size(data) == (6, 9)
    (tmp_path / "x.dat").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "x.dat"), pixels)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_frame_or_page_is_taken(kind, pixels):
    pages = [Image.fromarray(pixels), Image.new("RGB", (9, 6), "red")]
    data = encoded(
        pages[0], kind, save_all=True, append_images=pages[1:], **{"lossless": True} if kind == "WEBP" else {}
    )
    np.testing.assert_array_equal(decode_image(data), pixels)
    with pytest.raises(BadRecord, match="multi-page" if kind == "TIFF" else "animated"):
        image_size(data)


def test_a_photo_with_a_second_picture_behind_it_is_a_photo(pixels):
    """As phones save them, with a preview or a depth map: PIL calls it MPO."""
    pages = [Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))), Image.new("RGB", (72, 48))]
    data = encoded(pages[0], "MPO", save_all=True, append_images=pages[1:])
    assert image_size(data) == (48, 72)
    assert np.abs(decode_image(data, strict=True).astype(int) - np.asarray(pages[0])).mean() < 20


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_transparency_is_laid_over_the_background(kind, pixels):
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, 4:] = 255
    image = Image.fromarray(np.dstack([pixels, alpha]))
    data = encoded(image, kind, **EXACT.get(kind, {}))
    for background, value in (("white", 255), ("black", 0)):
        expected = np.where(alpha[..., None] == 255, pixels, value)
        np.testing.assert_array_equal(decode_image(data, background=background), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_palettes(kind, pixels):
    image = Image.fromarray(pixels).quantize(64)
    np.testing.assert_array_equal(decode_image(encoded(image, kind)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PNG", {})])
def test_orientation(kind, options, orientation, pixels):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(pixels, kind, exif=exif, **options)
    expected = ORIENTED[orientation](pixels)
    np.testing.assert_array_equal(decode_image(data), expected)
    assert image_size(data) == expected.shape[:2]


@pytest.mark.parametrize("order", "<>")
def test_16_bits(order, rng):
    values = rng.integers(0, 2**16, (5, 7), dtype=np.uint16)
    wide = tiff(values.astype(f"{order}u2"), 16, 1, order)
    expected = np.repeat(np.round(values / 257)[..., None], 3, axis=2)
    for data in (wide, encoded(values, "PNG")):
        np.testing.assert_array_equal(decode_image(data), expected)
        with pytest.raises(BadRecord, match="16-bit"):
            decode_image(data, strict=True)


@pytest.mark.parametrize("bits", [8, 16])
def test_white_is_zero(bits, rng):
    values = rng.integers(0, 2**bits, (5, 7)).astype(f"<u{bits // 8}")
    inverted, plain = (decode_image(tiff(values, bits, photometric)) for photometric in (0, 1))
    np.testing.assert_array_equal(inverted, 255 - plain)


def test_a_transparent_value_of_16_bits(rng):
    values = rng.integers(1, 2**16, (5, 7), dtype=np.uint16)
    values[2, 3] = 0
    assert (decode_image(encoded(values, "PNG", transparency=0))[2, 3] == 255).all()


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_values_without_a_scale_are_named(dtype):
    with pytest.raises(BadRecord, match="floating-point images are not supported; convert it to 8-bit RGB"):
        decode_image(encoded(np.ones((4, 4), dtype), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    """Colours of print without their profile: right where they are pure."""
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)
    assert np.abs(decode_image(data).astype(int) - [255, 0, 0]).max() <= 3
    with pytest.raises(BadRecord, match="CMYK"):
        decode_image(data, strict=True)


def claiming(kind, width, height):
    """A small file whose header says another size."""
    data = bytearray(encoded(Image.new("L", (4, 4)), kind))
    if kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    else:
        data = tiff(np.zeros((4, 4), np.uint8), 8, 1, **{"256": width, "257": height})
    return bytes(data)


HOSTILE = {
    **{f"{kind} bomb": claiming(kind, 60000, 60000) for kind in ("BMP", "GIF", "TIFF")},
    "BMP without an end": claiming("BMP", 2**31 - 1, 2**31 - 1),
    "GIF whose frame is larger than the file says": claiming("GIF", 4, 4).replace(
        b"\x2c\0\0\0\0\4\0\4\0", b"\x2c\0\0\0\0\xff\xff\xff\xff"
    ),
    "TIFF of one tile of 2**30 pixels": tiff(
        np.zeros((4, 4), np.uint8), 8, 1, **{"322": 2**15, "323": 2**15, "324": 8, "325": 16}
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind):
    for strict in (False, True):
        with pytest.raises(UserError, match="record 7: .*limit") as error:
            decode_image(HOSTILE[kind], name="record 7", strict=strict)
        assert "\n" not in str(error.value)


def test_pages_in_a_ring():
    ring = tiff(np.zeros((4, 4), np.uint8), 8, 1)[:-4] + struct.pack("<I", 24)
    assert decode_image(ring).shape == (4, 4, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_damaged_files_give_one_line_or_a_picture(kind, rng):
    """Cut anywhere, or with any byte changed."""
    data = encoded(Image.effect_noise((24, 16), 50), kind)
    damaged = [data[:length] for length in rng.integers(1, len(data), 60)]
    for at, value in zip(rng.integers(0, len(data), 200), rng.integers(0, 256, 200), strict=True):
        damaged.append(data[:at] + bytes([value]) + data[at + 1 :])
    for one in damaged:
        try:
            assert decode_image(one, max_pixels=1 << 16).ndim == 3
        except BadRecord as error:
            assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------- masks

STROKES = np.zeros((6, 9), np.uint8)
STROKES[2:4, 1:8] = 255
STROKES[3, 4] = 90  # an edge


def rgba(colours, alpha):
    return Image.fromarray(np.dstack([np.broadcast_to(np.uint8(colours), (*alpha.shape, 3)), alpha]))


def masked(tmp_path, image, kind="PNG", **options):
    (tmp_path / "mask").write_bytes(encoded(image, kind, **options))
    return read_mask(tmp_path / "mask")


@pytest.mark.parametrize("colour", [0, 128, 255, (200, 30, 30)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_strokes_on_a_transparent_ground_are_the_mask(colour, kind, tmp_path):
    """As drawing tools in browsers save them, whatever their colour; hidden pixels have any."""
    image = rgba(colour, STROKES)
    np.testing.assert_array_equal(masked(tmp_path, image, kind, **EXACT.get(kind, {})), STROKES)
    hidden = np.array(image)
    hidden[STROKES == 0, :3] = 77
    np.testing.assert_array_equal(masked(tmp_path, hidden), STROKES)


def test_strokes_in_grey_or_a_palette(tmp_path):
    np.testing.assert_array_equal(masked(tmp_path, rgba(0, STROKES).convert("LA")), STROKES)
    palette = Image.fromarray((STROKES > 128).astype(np.uint8), "P")
    palette.putpalette([0] * 6)
    np.testing.assert_array_equal(masked(tmp_path, palette, "GIF", transparency=0), np.where(STROKES > 128, 255, 0))


def test_opaque_masks_are_their_colours(tmp_path):
    expected = np.where(STROKES > 128, 255, 0).astype(np.uint8)
    for image in (STROKES, rgba(STROKES[..., None], np.full_like(STROKES, 255)), np.dstack([STROKES] * 3)):
        np.testing.assert_array_equal(masked(tmp_path, image), STROKES)
    for kind in ("BMP", "GIF", "TIFF", "PNG"):
        np.testing.assert_array_equal(masked(tmp_path, Image.fromarray(expected).convert("1"), kind), expected)


def test_where_colours_and_transparency_differ_the_colours_are_the_mask(tmp_path):
    """White on black with a transparent border: white is repainted."""
    alpha = np.full_like(STROKES, 255)
    alpha[:, 6:] = 0
    with pytest.warns(UserWarning, match="mask has colours and transparency: white is repainted"):
        found = masked(tmp_path, rgba(np.where(STROKES > 0, 255, 0)[..., None], alpha))
    np.testing.assert_array_equal(found, np.where((STROKES > 0) & (alpha > 0), 255, 0))


@pytest.mark.parametrize("value", [0, 1, 7])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_a_mask_of_nothing_is_an_error(value, mode, tmp_path):
    """All black; of zeros and ones; nearly black, as JPEG makes it; or all transparent."""
    image = Image.new("L", (9, 6), value).convert(mode)
    if mode.endswith("A"):
        image.putalpha(0 if value == 0 else 255)
    with pytest.raises(UserError, match=f"mask: nothing to repaint, its brightest value is {value} of 255"):
        masked(tmp_path, image)


def test_a_mask_of_everything_is_fine(tmp_path):
    assert (masked(tmp_path, Image.new("L", (9, 6), 255)) == 255).all()


def test_pixels_as_programs_hold_them(rng):
    """uint8, or floats in 0 .. 1, with any number of channels that an image has: what PIL's image of them gives."""
    pixels = rng.integers(0, 256, (6, 7, 4), np.uint8)
    for array in (pixels, pixels[..., :3], pixels[..., 0], pixels[..., :1]):
        expected = image_pixels(Image.fromarray(array.squeeze(-1) if array.shape[2:] == (1,) else array))
        for held in (array, array / 255, (array / 255).astype(np.float32)):
            np.testing.assert_array_equal(image_pixels(array_image(held, "image")), expected)
    mask = rng.integers(0, 2, (6, 7)).astype(bool)
    np.testing.assert_array_equal(mask_pixels(array_image(mask, "the mask")), np.where(mask, 255, 0))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.uint16), "image: an array of uint16; expected uint8, or floats from 0 to 1"),
        (np.full((4, 4, 3), -1.0), "image: floats from -1 to -1; expected 0 to 1, or uint8"),
        (np.full((4, 4), np.nan), "image: floats from nan to nan"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"image: an array of shape \(1, 4, 4, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"image: an array of shape \(3, 4, 5\)"),
    ],
)
def test_arrays_that_are_no_pixels(array, message):
    with pytest.raises(UserError, match=message):
        array_image(array, "image")


def test_an_image_of_floats_is_named():
    with pytest.raises(UserError, match="an image of mode F: 32-bit values have no range"):
        image_pixels(Image.fromarray(np.zeros((4, 4), np.float32)))
