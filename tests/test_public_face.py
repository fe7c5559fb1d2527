"""What the README shows: the public names, and a pipeline that draws when it is called."""

import numpy as np
import pytest
from PIL import Image

import bdm_jax
from bdm_jax import BridgePipeline, Request, Sampling, generate
from bdm_jax.app.arguments import parse
from bdm_jax.app.metadata import read_settings
from bdm_jax.errors import UserError
from bdm_jax.paths import DEMO
from bdm_jax.systems import pipeline as systems


@pytest.fixture(scope="module")
def demo():
    return BridgePipeline.from_pretrained(DEMO)


def test_the_readmes_lines(demo, tmp_path):
    """The same pixels as by `generate`; saved, the file has the settings that draw it again."""
    pipeline = BridgePipeline.from_pretrained(DEMO)
    image = pipeline("红灯笼", seed=0).images[0]

    (expected,) = generate(pipeline, [Request("红灯笼", seed=0)], Sampling())
    assert isinstance(image, Image.Image) and np.array_equal(np.asarray(image), expected)
    assert image.info["parameters"].startswith("红灯笼\nSteps: 25")


def test_saved_images_can_be_drawn_again(demo, tmp_path):
    output = demo(["红灯笼", "猫"], seed=[3, 4], steps=2, guidance=2.0, size=(64, 80), negative="低质量")
    files = output.save(tmp_path / "out")
    names = ["0001-红灯笼-seed3.png", "0002-红灯笼-seed4.png", "0003-猫-seed3.png", "0004-猫-seed4.png"]
    assert [file.name for file in files] == names and len(output.images) == 4
    values = read_settings(files[3])
    assert (values["prompt"], values["seed"], values["height"], values["width"]) == ("猫", 4, 64, 80)
    arguments, requests, _ = parse(["--from", str(files[3]), "--out", str(tmp_path / "again")])
    again = next(generate(demo, requests, arguments.settings))
    with Image.open(files[3]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(output.images[3]))
    assert np.abs(again.astype(int) - np.asarray(output.images[3])).max() <= 1  # alone, where it was one of four
    assert output.save(tmp_path / "out")[0].name == "0005-红灯笼-seed3.png"


def test_an_image_to_begin_from_is_described(demo, tmp_path):
    start = Image.new("RGB", (64, 64), (200, 200, 200))
    output = demo("猫", image=start, strength=0.5, steps=2, seed=np.int64(0), negative=None)
    assert output.settings[0]["image_sha256"] and output.settings[0]["width"] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"guidance_scale": 3.0}, "'guidance_scale': it is called guidance here"),
        ({"num_inference_steps": 3}, "it is called steps here"),
        ({"steps": 0}, "steps 0 is less than 1"),
        ({"seed": 2**32}, "seed 4294967296 is outside"),
        ({"seed": "12"}, "seed '12': expected a whole number"),
        ({"seed": [1.7]}, "seed 1.7: expected a whole number"),
        ({"english": ["a"]}, r"english \['a'\]: expected a text"),
        ({"size": 128}, "size 128: expected .height, width. in pixels"),
        ({"size": "128x128"}, "size '128x128': expected .height, width. in pixels"),
        ({"image": np.zeros((64, 64, 3), np.uint16)}, "image: an array of uint16"),
        ({"image": np.full((64, 64, 3), -1.0)}, "image: floats from -1 to -1"),
        ({"image": Image.new("F", (64, 64))}, "an image of mode F"),
    ],
)
def test_options_that_there_are_not(demo, options, message):
    with pytest.raises(UserError, match=message):
        demo("猫", **options)


@pytest.mark.parametrize("requests", [["红灯笼"], Request("红灯笼"), "红灯笼"])
def test_requests_of_another_kind(demo, requests):
    with pytest.raises(UserError, match="expected a list of Request"):
        generate(demo, requests, Sampling(steps=1))


def test_names():
    assert set(bdm_jax.__all__) <= set(dir(bdm_jax))
    with pytest.raises(AttributeError, match="nothing"):
        bdm_jax.nothing  # noqa: B018
    assert bdm_jax.BridgePipeline is systems.BridgePipeline
