"""Joining and rendering, on two icons made here."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data.emoji import artwork, render_emoji
from bdm_jax.errors import UserError
from bdm_jax.images import decode
from bdm_jax.paths import EMOJI


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def packages(tmp_path):
    icons = {"lantern": {"body": '<path fill="#f00" d="M0 0h32v32H0z"/>'}, "wave": {"body": ""}}
    icons["tall"] = {"body": '<path fill="#00f" d="M0 0h32v40H0z"/>', "height": 40}
    for package in artwork.STYLES.values():
        write(tmp_path / package / "icons.json", {"icons": icons, "width": 32, "height": 32})
        chars = {"1f3ee": "lantern", "262f-fe0f": "tall", "1f44b-1f3fb": "wave", "1f9ff": "wave"}
        write(tmp_path / package / "chars.json", chars)
    for language, names in {"zh": ("红灯笼", "阴阳"), "en": ("red paper lantern", "yin yang")}.items():
        words = {"🏮": {"default": ["灯", names[0], "唵"], "tts": [names[0]]}, "☯": {"default": [], "tts": [names[1]]}}
        words["👋🏻"] = {"default": [], "tts": ["x: light skin tone"]}
        base = {"annotations": {"annotations": words}}
        write(tmp_path / f"cldr-annotations-full/annotations/{language}/annotations.json", base)
        derived = {"annotationsDerived": {"annotations": {}}}
        write(tmp_path / f"cldr-annotations-derived-full/annotationsDerived/{language}/annotations.json", derived)
    return tmp_path


def test_joins_by_code_point_without_skin_tones(packages):
    pytest.importorskip("resvg_py")
    rows = list(artwork.records(packages, styles=("fluent",), size=16))
    assert [row["id"] for row in rows] == ["1f3ee", "262f"]
    assert rows[0]["zh_keywords"] == ["灯"] and rows[0]["zh_only"]
    assert (decode.decode_image(rows[0]["image"]) == [255, 0, 0]).all()
    tall = decode.decode_image(rows[1]["image"])
    assert tall.shape == (16, 16, 3) and (tall[:, 0] == 255).all() and (tall[:, 8] == [0, 0, 255]).all()


def test_artwork_keeps_its_transparency(packages):
    pytest.importorskip("resvg_py")
    filled, tall = (decode.decode_cutout(row["image"]) for row in artwork.records(packages, ("noto",), 16))
    assert (filled == [255, 0, 0, 255]).all(), "a cut-out too, with nothing around it"
    assert (tall[:, 0, 3] == 0).all() and (tall[:, 8] == [0, 0, 255, 255]).all()


def test_a_missing_package_is_named(packages):
    (packages / "@iconify-json/fluent-emoji-flat/icons.json").unlink()
    with pytest.raises(UserError, match="npm install @iconify-json/fluent-emoji-flat@1.2.6"):
        list(artwork.records(packages, size=16))


def test_png_is_exact_where_there_are_few_colours():
    few = np.zeros((32, 32, 4), np.uint8)
    few[..., 1] = np.arange(32) * 7
    few[::2, :, 3], few[1::2, :, 3] = 255, 100
    few[5:9, :, 3] = 0
    expected = few.copy()
    expected[5:9] = (255, 255, 255, 0)  # so that readers that know no transparency see white
    data = artwork.encode_png(few)
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert np.array_equal(decode.decode_cutout(data), expected)


def test_png_is_true_to_noise():
    noise = np.random.default_rng(0).integers(1, 256, (64, 64, 4), dtype=np.uint8)
    assert np.array_equal(decode.decode_cutout(artwork.encode_png(noise)), noise)


def test_summary_counts():
    assert "1594 in at least two styles" in render_emoji.summary(EMOJI)
