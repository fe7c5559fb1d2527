"""What is inside a picture: all of it, read back as it was, and never trusted."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bdm_jax.app.metadata import (
    complete_settings,
    describe,
    digest,
    read_settings,
    restore,
    text_chunks,
    web_ui_parameters,
)
from bdm_jax.errors import UserError
from bdm_jax.images.pictures import write_png
from bdm_jax.sampling.settings import Request, Sampling

REQUEST = Request("红灯笼，雪", "低质量", "film grain, night", seed=7)
SETTINGS = Sampling(
    guidance=4.5,
    size=(32, 48),
    residual_strengths=(0.5, 1.0),
    masked=True,
    hires=1.5,
    clip_skip=2,
    english_guidance=2.0,
    cache_every=3,
    merge_tokens=0.5,
    vae_tile=64,
)
PIXELS = np.zeros((32, 48, 3), np.uint8)
VALUES = describe(REQUEST, SETTINGS, {"model": "demo", "vae": "other.safetensors"})


def test_every_setting_comes_back(tmp_path):
    write_png(tmp_path / "x.png", PIXELS, text_chunks(VALUES))
    found = read_settings(tmp_path / "x.png")
    assert found == complete_settings(tmp_path / "x.png") == VALUES
    assert restore(found) == (REQUEST, SETTINGS)
    assert restore(describe(REQUEST, Sampling(), {})) == (REQUEST, Sampling())


def test_images_are_named_and_known_by_their_pixels(tmp_path):
    request = replace(REQUEST, image=tmp_path / "secret" / "x.jpg", mask=PIXELS[..., 0])
    values = describe(request, SETTINGS, {}, {"image": "ab", "mask": "cd"})
    assert (values["image"], values["image_sha256"], values["mask"], values["mask_sha256"]) == ("x.jpg", "ab", "", "cd")
    assert "secret" not in json.dumps(values)
    assert digest(PIXELS) == digest(PIXELS.copy()) != digest(PIXELS.transpose(1, 0, 2))


def pairs(values):
    """AUTOMATIC1111's parser: the last line is name: value pairs, those with commas quoted."""
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', values.split("\n")[-1])
    return dict(found)


def test_parameters_are_what_web_uis_read_back():
    plain = web_ui_parameters(describe(REQUEST, Sampling(guidance=4.5, size=(32, 48)), {"model": "demo"}))
    assert plain.split("\n")[:2] == ["红灯笼，雪", "Negative prompt: 低质量"]
    assert pairs(plain) == {
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "48x32",
        "Model": "demo",
        "English prompt": '"film grain, night"',
    }
    more = pairs(web_ui_parameters(VALUES))
    expected = {
        "Clip skip": "2",
        "Hires upscale": "1.5",
        "Hires upscaler": "Lanczos",
        "Denoising strength": "0.5",
        "Residual strengths": '"0.5, 1.0"',
        "English guidance": "2.0",
        "Masked": "True",
        "Cache every": "3",
        "Merge tokens": "0.5",
        "VAE": "other.safetensors",
    }
    assert expected.items() <= more.items()
    image = {**VALUES, "image": "x.png", "image_sha256": "ab"}
    assert pairs(web_ui_parameters(image))["Denoising strength"] == "0.75"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("DPM++ 2M Karras", "DPM++ 2M Karras"), ("k_euler_a", "Euler a"), ("plms", "PLMS"), ("ddim-trailing", None)],
)
def test_samplers_have_the_web_uis_names(name, shown):
    values = describe(REQUEST, Sampling(sampler=name, size=(8, 8)), {"model": "demo"})
    assert pairs(web_ui_parameters(values))["Sampler"] == (shown or name)


def test_older_pictures_say_less(tmp_path):
    older = {k: VALUES[k] for k in ("prompt", "negative", "seed", "steps", "guidance", "width", "height", "model")}
    assert restore(older) == (Request("红灯笼，雪", "低质量", seed=7), Sampling(guidance=4.5, size=(32, 48)))


def png(path, text):
    info = PngInfo()
    if text is not None:
        info.add_itxt("bdm_jax", text)
    Image.fromarray(PIXELS).save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no settings of ours"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not those of one image"),
        ('{"sheet": []}', "not those of one image"),
        ('{"prompt": 1}', "prompt is not of the kind str"),
        ('{"prompt": "", "steps": "1"}', "steps is not of the kind int"),
        ('{"prompt": "", "steps": true}', "steps is not of the kind int"),
        ('{"prompt": "", "steps": 1e999}', "steps is not of the kind int"),
        ('{"prompt": "", "guidance": NaN}', "guidance is not of the kind float"),
        ('{"prompt": "", "bare": 1}', "bare is not of the kind bool"),
        ('{"prompt": "", "seed": [1]}', "seed is not of the kind int"),
        ('{"prompt": "", "residual_strengths": [[]]}', "residual_strengths is not of the kind float"),
        ('{"prompt": "", "width": "8", "height": 8}', "width is not of the kind int"),
        ('{"prompt": "", "model": {}}', "model is not of the kind str"),
        ('{"prompt": "", "guidance": 1' + "0" * 5000 + "}", "cannot be read"),
    ],
)
def test_strangers_settings_are_refused(tmp_path, text, message):
    png(tmp_path / "x.png", text)
    for read in (read_settings, complete_settings):
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path / "x.png")
        assert str(tmp_path / "x.png") in str(error.value)


def test_too_much_text_is_refused(tmp_path):
    png(tmp_path / "x.png", json.dumps({"prompt": "x" * 2_000_000}))
    with pytest.raises(UserError, match="x.png"):
        read_settings(tmp_path / "x.png")


@pytest.mark.parametrize("damage", ["cut", "empty", "not a png", "flipped", "no end"])
def test_what_does_not_open_is_not_complete(tmp_path, rng, damage):
    path = tmp_path / "x.png"
    write_png(path, rng.integers(0, 256, (32, 48, 3), np.uint8), text_chunks(VALUES))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-100] ^= 255
    changed = {"cut": data[:-200], "empty": b"", "not a png": b"GIF89a" + data, "no end": data[:-12]}.get(damage, data)
    path.write_bytes(changed)
    assert complete_settings(path) is None


def test_no_file(tmp_path):
    for name, message in (("nix.png", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_settings(tmp_path / name)
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(UserError, match="not a PNG"):
        read_settings(tmp_path / "x.png")
