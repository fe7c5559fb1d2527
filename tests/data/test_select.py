"""Filters and aspect-ratio buckets."""

from collections import Counter

import numpy as np
import pytest

from bdm_jax.data import records
from bdm_jax.data.captions import is_written_in
from bdm_jax.data.select import Filters, make_buckets, nearest, select
from bdm_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "zh", "en"),
    [
        ("水墨山水，一叶扁舟", True, False),
        ("华为 P60 手机壳", True, False),
        ("a red lantern", False, True),
        ("red lantern 灯", False, True),
        ("赤い提灯が並ぶ夜", False, False),
        ("빨간 등불 燈", False, False),
        ("красный фонарь", False, False),
        ("1234 !!", False, False),
        ("𠮷野家", True, False),
    ],
)
def test_language_by_script(text, zh, en):
    assert (is_written_in(text, "zh"), is_written_in(text, "en")) == (zh, en)


@pytest.fixture
def folder(tmp_path, picture, write_folder):
    rows = [
        {"image": picture(0, (64, 64)), "text": "红灯笼", "aesthetic": 6.0},
        {"image": picture(1, (64, 128)), "captions": ["a red lantern", "红灯"], "aesthetic_score": 5},
        {"image": picture(2, (128, 64)), "text": "a lantern", "aesthetic": 6.0},
        {"image": picture(3, (64, 64)), "text": "灯", "aesthetic": 6.0},
        {"image": picture(4, (16, 64)), "text": "红灯笼", "aesthetic": 6.0},
        {"image": picture(5, (64, 64)), "text": "红灯笼", "aesthetic": 4.0},
        {"image": picture(6, (64, 64)), "text": "红灯笼"},
        {"image": b"", "text": "红灯笼", "aesthetic": 6.0},
        {"image": picture(8, (120, 60)), "text": "红灯笼", "aesthetic": 9.0, "width": 999, "height": 1},
        {"image": picture(9, (64, 64)), "text": "红灯笼" * 50, "aesthetic": 9.0},
    ]
    return write_folder(tmp_path / "set", rows)


def test_filters_count_what_they_leave_out(folder, tmp_path):
    source = records.open_source(folder)
    filters = Filters(language="zh", shortest=2, longest=20, aesthetic=5, side=32)
    buckets = ((32, 64), (48, 48), (64, 32))
    for _ in range(2):  # made, then read
        chosen = select(source, filters, buckets, tmp_path / "cache")
        assert chosen.indices.tolist() == [0, 1, 8] and chosen.bucket.tolist() == [1, 0, 2]
        assert chosen.left_out == {
            "language": 1,
            "caption length": 2,
            "resolution": 1,
            "aesthetic score": 1,
            "no aesthetic score": 1,
            "empty file": 1,
        }
    assert isinstance(chosen.indices, np.memmap)
    parts = chosen.parts(source, weight=0.6)
    assert [part.bucket for part in parts] == list(buckets) and sum(part.weight for part in parts) == pytest.approx(0.6)
    assert parts[0].source[1]["captions"] == ["红灯"]
    assert len(select(source, Filters(), cache=tmp_path / "cache").indices) == 9
    with pytest.raises(UserError, match="no record passes the filters.*aesthetic score"):
        select(source, Filters(aesthetic=99))


def test_threads_do_not_change_the_selection(folder):
    source = records.open_source(folder)
    one, many = (select(source, Filters(side=32), threads=threads) for threads in (1, 8))
    assert np.array_equal(one.indices, many.indices) and one.left_out == many.left_out


def test_buckets_have_about_as_many_pixels_and_cover_the_ratios():
    buckets = make_buckets(512, 64, 2.0)
    assert (512, 512) in buckets and len(buckets) == len(set(buckets)) <= 12
    for height, width in buckets:
        assert height % 64 == width % 64 == 0 and 0.8 * 512**2 < height * width <= 512**2
        assert max(height, width) <= 2 * min(height, width) and (width, height) in buckets
    assert buckets[nearest((1000, 1000), buckets)] == (512, 512)
    assert buckets[nearest((300, 3000), buckets)] == buckets[0] and buckets[nearest((9, 1), buckets)] == buckets[-1]
    found = Counter(nearest((h, w), buckets) for h in range(200, 400, 7) for w in range(200, 400, 7))
    assert set(found) == set(range(len(buckets)))
    with pytest.raises(UserError, match="multiple"):
        make_buckets(500, 64)
