"""Small sources of every format, and images with every fault."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from bdm_jax.data.arrays import to_example


def _picture(number, size=(48, 64), kind="PNG", mode="RGB"):
    """Encoded picture, (height, width) large, whose pixels encode its number."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:] = number % 256, number // 256 % 256, 7
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def _png_claiming(width, height, depth=8):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    pixels = zlib.compress(bytes(height * (1 + 3 * width * depth // 8)) if width * height < 1e6 else bytes(99))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _animation(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


def _noise_jpeg():
    return _encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")


def _encoded(image, kind):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="session")
def faults():
    """Cause -> images that are skipped for it."""
    png = _encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "PNG")
    return {
        "empty file": [b""],
        "unsupported format": [b"no picture", _encoded(Image.new("RGB", (8, 8)), "PPM")],
        "corrupt image": [png[:20], png[: len(png) // 2], _noise_jpeg()[:700], png[:100] + bytes(200) + png[300:]],
        "too large": [_png_claiming(60000, 60000), _png_claiming(2**31 - 1, 2**31 - 1)],
        "CMYK": [_picture(1, kind="JPEG", mode="CMYK")],
        "16-bit": [_encoded(Image.new("I;16", (9, 9)), "PNG"), _png_claiming(9, 9, depth=16)],
        "animated": [_animation("PNG"), _animation("WEBP"), _animation("GIF")],
        "multi-page": [_animation("TIFF")],
    }


@pytest.fixture(scope="session")
def picture():
    """The function (number, size, kind) -> encoded picture."""
    return _picture


@pytest.fixture(scope="session")
def write_tar():
    """A function that writes samples, given as dicts extension -> bytes, as a shard with 6-digit names."""

    def write(path, samples, first=0):
        with tarfile.open(path, "w") as tar:
            for number, files in enumerate(samples, first):
                for kind, data in files.items():
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def write_folder():
    """A function that writes rows (dict with `image` bytes and metadata) as an image folder."""

    def write(folder, rows):
        folder.mkdir(parents=True)
        lines = []
        for number, row in enumerate(rows):
            name = f"{number:05d}.png"
            (folder / name).write_bytes(row["image"])
            lines.append(json.dumps({"file_name": name, **{k: v for k, v in row.items() if k != "image"}}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def write_array():
    """A function that writes records as one array_record file."""

    def write(path, records):
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            writer.write(record if isinstance(record, bytes) else to_example(record))
        writer.close()
        return path

    return write
