"""FormFields of the page to jobs and back: what sample.py would be told, and what a picture's file says."""

import numpy as np
import pytest

from bdm_jax.app.metadata import describe
from bdm_jax.app.parts import Parts
from bdm_jax.app.service import ModelsFolder
from bdm_jax.errors import UserError
from bdm_jax.paths import DEMO
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.web.page.fields import BARE, FormFields, PickedControl, as_flags, from_picture, to_job


@pytest.fixture
def models(tmp_path):
    for name in ("loras/style/ink.safetensors", "embeddings/old.pt", "controlnet/canny.safetensors", "branches/b.bin"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return ModelsFolder(tmp_path)


def job(models, **fields):
    return to_job(FormFields(**{"prompt": "红灯笼", **fields}), models, Parts())


def test_fields_as_they_are_when_the_page_opens(models):
    made = job(models)
    assert made.settings == Sampling() and made.parts == Parts()
    (request,) = made.requests
    assert request.prompt == "红灯笼" and 0 <= request.seed < 2**31


def test_seeds_are_those_of_the_command_line(models):
    def seeds(**fields):
        return [request.seed for request in job(models, **fields).requests]

    assert seeds(seed="7", count=3) == [7, 8, 9]
    assert seeds(seed="3,5-6") == [3, 5, 6]
    assert len(set(seeds(seed="-1", count=4))) == 4


def test_every_setting_reaches_the_job(models):
    image = np.zeros((64, 64, 3), np.uint8)
    made = job(
        models,
        steps=7,
        sampler="ddim",
        guidance="3.5",
        size="64×96",
        branch_strength=0.5,
        strength=0.4,
        image=image,
        more="--hires 2 --guess --timesteps 999 500",
    )
    assert made.settings == Sampling(
        steps=7,
        sampler="ddim",
        guidance=3.5,
        size=(96, 64),
        branch_strength=0.5,
        strength=0.4,
        hires=2.0,
        guess=True,
        timesteps=(999, 500),
    )
    assert made.requests[0].image is image


def test_parts_are_looked_up_in_the_models_folder(models, tmp_path):
    control = PickedControl("canny.safetensors", "/tmp/map.png", "line", 0.7)
    made = job(
        models,
        model="demo",
        branch="b.bin",
        loras=(("style/ink.safetensors", 0.8),),
        embeddings=("old.pt",),
        control=control,
    )
    assert made.parts == Parts(
        model=DEMO,
        branch=tmp_path / "branches/b.bin",
        lora=(f"{tmp_path}/loras/style/ink.safetensors:0.8",),
        embedding=(f"{tmp_path}/embeddings/old.pt",),
        control=(f"{tmp_path}/controlnet/canny.safetensors,/tmp/map.png,strength=0.7,from=line",),
    )
    assert job(models, branch=BARE).settings.bare


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"seed": "x"}, "seed x: write seeds as"),
        ({"seed": "1-3", "count": 2}, "3 seeds and 2 pictures"),
        ({"count": 0}, "0 pictures: expected 1 or more"),
        ({"guidance": "7,5"}, "guidance 7,5: expected a number"),
        ({"size": "512"}, "512: write it as WIDTHxHEIGHT"),
        ({"more": "--steps 3"}, "--steps: this setting has a field of its own"),
        ({"more": "--hires two"}, "--hires two: expected a number"),
        ({"more": "--out /etc"}, "--out"),
        ({"more": "--help"}, "--help"),
        ({"more": "'"}, "No closing quotation"),
        ({"loras": (("../../etc/passwd", 1.0),)}, "unknown lora"),
        ({"model": "/etc"}, "unknown model"),
        ({"control": PickedControl("canny.safetensors", None)}, "needs a map"),
    ],
)
def test_what_is_not_valid_is_one_line(models, fields, said):
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        job(models, **fields)
    assert said in str(caught.value)


def test_no_more_pictures_than_the_server_allows(models):
    for fields in ({"count": 9}, {"seed": "0-8"}):
        with pytest.raises(UserError, match="9 pictures: expected 1 to 8"):
            to_job(FormFields(prompt="红灯笼", **fields), models, Parts(), most=8)


def test_a_picture_gives_its_fields_back(models):
    settings = Sampling(
        steps=9,
        sampler="ddim",
        guidance=2.5,
        size=(96, 64),
        branch_strength=0.5,
        hires=2.0,
        masked=True,
        sigmas=(3.0, 0.0),
    )
    request = Request("红灯笼", "盘子", "red", "blue", 7)
    parts = {"model": "demo", "lora": "ink.safetensors:0.8", "embedding": "old.pt", "branch": "b.bin"}
    restored = from_picture(describe(request, settings, parts), models, Parts(), "en")
    assert restored.notes == []
    made = to_job(restored.fields, models, Parts())
    assert made.requests == (request,) and made.settings == settings
    assert made.parts.names() == parts


def test_what_a_picture_cannot_give_is_said(models):
    parts = {"model": "sd15.safetensors", "vae": "other.pt", "lora": "gone.pt:1", "control": "canny.safetensors,a.png"}
    values = describe(Request("红灯笼", image=np.zeros((2, 2, 3), np.uint8)), Sampling(), parts, {"image": "abc"})
    restored = from_picture(values, models, Parts(), "en")
    assert restored.fields.loras == () and restored.fields.control.name == "canny.safetensors"
    said = "\n".join(restored.notes)
    for word in ("image", "sd15.safetensors", "other.pt", "gone.pt", "map"):
        assert word in said


def test_a_lora_that_the_prompt_names_is_not_there_twice(models):
    values = describe(Request("红灯笼<lora:ink:0.8>"), Sampling(), {"model": "demo", "lora": "ink.safetensors:0.8:0.8"})
    assert from_picture(values, models, Parts(), "zh").fields.loras == ()


def test_settings_without_a_field_are_flags():
    assert as_flags(Sampling()) == ""
    settings = Sampling(hires=1.5, guess=True, timesteps=(9, 4), masked=False, clip_skip=2)
    assert as_flags(settings) == "--guess --clip-skip 2 --hires 1.5 --masked False --timesteps 9 4"
