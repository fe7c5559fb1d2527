"""Reading: hostile pictures, order and resume of the loader, clear errors."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data import records
from bdm_jax.data.loader import MixturePart, mix_loader
from bdm_jax.errors import UserError
from bdm_jax.images import decode
from bdm_jax.paths import EMOJI


def make_loader(source, indices, *arguments, **options):
    """Of one part."""
    return mix_loader([MixturePart(source, indices)], *arguments, **options)


class Numbers:
    """A source of records without pictures."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"number": index}


def draw(record, rng):
    return {"number": np.int64(record["number"]), "noise": rng.random(2)}


def take(loader, count):
    return [next(loader) for _ in range(count)]


def equal(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_every_epoch_is_another_permutation_of_the_indices():
    indices = np.array([3, 5, 8, 13, 21, 34])
    batches = take(make_loader(Numbers(50), indices, draw, 4, seed=1), 6)
    numbers = np.concatenate([batch["number"] for batch in batches]).reshape(4, 6)
    assert all(sorted(epoch) == indices.tolist() for epoch in numbers)
    assert len({tuple(epoch) for epoch in numbers}) > 1


def test_same_seed_same_batches_whatever_the_threads():
    one = take(make_loader(Numbers(50), range(50), draw, 8, seed=1, threads=1, prefetch=1), 20)
    many = take(make_loader(Numbers(50), range(50), draw, 8, seed=1, threads=8), 20)
    other = take(make_loader(Numbers(50), range(50), draw, 8, seed=2), 20)
    assert equal(one, many) and not equal(one, other)


def test_noise_depends_on_the_position_not_on_the_batch_size():
    small = take(make_loader(Numbers(10), range(10), draw, 2, seed=1), 12)
    large = take(make_loader(Numbers(10), range(10), draw, 8, seed=1), 3)
    joined = [np.concatenate([batch["noise"] for batch in batches]) for batches in (small, large)]
    assert np.array_equal(*joined) and len(np.unique(joined[0])) == joined[0].size


def test_resume_is_exact():
    whole = take(make_loader(Numbers(50), range(50), draw, 8, seed=1), 20)
    first = make_loader(Numbers(50), range(50), draw, 8, seed=1)
    take(first, 9)
    state = first.get_state()
    second = make_loader(Numbers(50), range(50), draw, 8, seed=1)
    second.set_state(state)
    assert equal(take(second, 11), whole[9:])
    assert equal(take(make_loader(Numbers(50), range(50), draw, 8, seed=1, start_step=9), 11), whole[9:])


def test_processes_share_the_global_batches():
    whole = take(make_loader(Numbers(50), range(50), draw, 8, seed=1), 10)
    parts = [
        take(make_loader(Numbers(50), range(50), draw, 8, seed=1, process_index=i, process_count=2), 10)
        for i in range(2)
    ]
    for batch, even, odd in zip(whole, *parts, strict=True):
        assert np.array_equal(batch["noise"][0::2], even["noise"])
        assert np.array_equal(batch["noise"][1::2], odd["noise"])


def test_loads_pictures_of_the_bundled_set():
    source = records.open_source(EMOJI)
    batches = make_loader(
        source, [0, 1, 2], lambda record, rng: {"image": decode.decode_image(record["image"])}, 6, seed=0
    )
    batch = next(batches)
    assert batch["image"].shape == (6, 128, 128, 3) and batch["image"].dtype == np.uint8


@pytest.mark.parametrize(("indices", "batch_size", "count"), [([], 4, 1), ([1], 0, 1), ([1], 3, 2)])
def test_impossible_loaders_are_refused(indices, batch_size, count):
    with pytest.raises(UserError):
        make_loader(Numbers(5), indices, draw, batch_size, seed=0, process_count=count)


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width, height):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


PICTURE = encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
HOSTILE = {
    "empty": b"",
    "text": b"not a picture at all",
    "truncated png": PICTURE[: len(PICTURE) // 2],
    "truncated jpeg": encoded(Image.open(io.BytesIO(PICTURE)), "JPEG")[:700],
    "cut in the header": PICTURE[:20],
    "damaged pixels": PICTURE[:100] + bytes(200) + PICTURE[300:],
    "bomb": png_claiming(60000, 60000),
    "beyond any limit": png_claiming(2**31 - 1, 2**31 - 1),
    "no width": png_claiming(0, 10),
    "unsupported format": encoded(Image.new("RGB", (8, 8)), "PPM"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pictures_give_one_error_that_names_the_record(kind):
    with pytest.raises(UserError, match="record 7") as error:
        decode.decode_image(HOSTILE[kind], name="record 7")
    assert "\n" not in str(error.value)


def test_own_pixel_limit():
    with pytest.raises(UserError, match="64 x 64 pixels"):
        decode.decode_image(PICTURE, max_pixels=64 * 63)
    assert decode.decode_image(PICTURE, max_pixels=64 * 64).shape == (64, 64, 3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (5, 3)) if mode == "I;16" else Image.new("RGBA", (5, 3), "red").convert(mode)
    picture = decode.decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert picture.shape == (3, 5, 3) and picture.dtype == np.uint8


def test_transparency_is_laid_over_white():
    assert (decode.decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))) == 255).all()


def test_opening_a_wrong_folder_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="dataset_info.json"):
        records.open_source(tmp_path)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        records.open_source(EMOJI, "test")
