"""What sample.py is told: good command lines, contradictory ones, all of it before JAX is loaded."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app.arguments import parse, parse_seeds
from bdm_jax.app.metadata import describe, text_chunks
from bdm_jax.errors import UserError
from bdm_jax.images.pictures import write_png
from bdm_jax.sampling.settings import Request, Sampling


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to be in, with an image, a mask of another size, and prompts."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((32, 24), 90).convert("RGB").save("image.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    (tmp_path / "p.txt").write_text("红灯笼\n猫\n", encoding="utf-8")
    (tmp_path / "e.csv").write_text("prompt,english\n猫,a cat\n", encoding="utf-8")
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:200])
    (tmp_path / "file").touch()
    parts = {"model": "other", "vae": "x.safetensors", "branch_lora": "ink.safetensors:0.8:0.8"}
    settings = describe(Request("龙", seed=8), Sampling(size=(8, 8)), parts)
    write_png("ours.png", np.zeros((8, 8, 3), np.uint8), text_chunks(settings))
    return tmp_path


def test_jax_is_not_loaded():
    code = "import sys; from bdm_jax.app.arguments import parse; parse(['猫']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", (7,)),
        ("0-3", (0, 1, 2, 3)),
        ("1,5,20-22", (1, 5, 20, 21, 22)),
        ("4294967295", (2**32 - 1,)),
        ("3-3", (3,)),
        ("-1", (-1,)),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "-2", "-1,5", "5,-1", "a", "1-", "3-1", "1,1", "0-2,1", "4294967296", "0-99999999", "1.5", "²"]
)
def test_what_is_no_seed(text):
    with pytest.raises(ValueError, match="seed"):
        parse_seeds(text)


@pytest.mark.parametrize("given", [["--seed", "-1"], ["--seed=-1"]])
def test_any_seed(given):
    assert [r.seed for r in parse(["猫", *given])[1]] == [-1]
    assert [r.seed for r in parse(["猫", *given, "--count", "3"])[1]] == [-1] * 3


def test_requests():
    arguments, requests, rows = parse(["猫", "龙", "--seed", "3", "--count", "2", "--size", "48x32", "--negative", "x"])
    assert rows is None and arguments.settings == Sampling(size=(32, 48))
    assert requests == [Request(p, "x", seed=s) for p in ("猫", "龙") for s in (3, 4)]
    _, requests, rows = parse(["--prompts", "p.txt", "--seed=5,1", "--image", "image.png", "--strength", "0.5"])
    assert rows == [1, 1, 2, 2] and [r.seed for r in requests] == [5, 1] * 2
    assert {r.image for r in requests} == {Path("image.png")}


def test_a_pictures_settings_are_defaults():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments, requests, _ = parse(["--from", "ours.png", "--steps=9"])
    assert requests == [Request("龙", seed=8)] and arguments.settings == Sampling(steps=9, size=(8, 8))
    notes = [str(note.message) for note in caught]
    assert notes == [
        "ours.png was drawn with --model other, not with demo",
        "ours.png was drawn with --vae x.safetensors: give it with that flag",
        "ours.png was drawn with --branch-lora ink.safetensors:0.8:0.8: give it with that flag",
    ]
    assert parse(["猫", "--from=ours.png", "--seed", "1-2"])[1] == [Request("猫", seed=1), Request("猫", seed=2)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no prompts"),
        (["猫", "--prompts", "p.txt"], "not both"),
        (["--prompts", "p.txt", "--from", "ours.png"], "--from repeats one picture"),
        (["--from", "image.png"], "image.png: has no settings of ours"),
        (["--from", "broken.png"], "broken.png"),
        (["--from", "nix.png"], "nix.png: cannot be read"),
        (["--from"], "--from"),
        (["--prompts", "nix.txt"], "nix.txt: cannot be read"),
        (["a\udcff"], "the prompt 'a?' holds bytes that are no UTF-8"),
        (["猫", "--mask", "mask.png"], "--mask without --image"),
        (["猫", "--image", "image.png", "--mask", "mask.png"], "the mask has 32x32 pixels, the image 32x24"),
        (["猫", "--image", "p.txt"], "p.txt: the image cannot be read"),
        (["猫", "--image", "broken.png"], "broken.png: the image cannot be read"),
        (["猫", "--image", "nix.png"], "nix.png: cannot be read"),
        (["猫", "--strength", "0.75"], "--strength has no effect"),
        (["猫", "--strength=0.75"], "--strength has no effect"),
        (["猫", "--timesteps", "--steps", "9"], "--timesteps without a number"),
        (["猫", "--hires-strength", "0.5"], "--hires-strength has no effect"),
        (["猫", "--bare", "--english", "a cat"], "--bare draws the prompt itself"),
        (["--prompts", "e.csv", "--bare"], "--bare draws the prompt itself"),
        (["猫", "--bare", "--branch-strength", "0.5"], "branch strength 0.5 has no effect"),
        (["猫", "--reference", "--sampler", "ddim"], "sampler ddim has no effect"),
        (["--prompts", "p.txt", "--reference"], "--batch-size 1"),
        (["猫", "--seed", "1-3", "--count", "2"], "--seed names 3 seeds already"),
        (["猫", "--seed", "4294967295", "--count", "2"], "seed 4294967296 is outside"),
        (["猫", "--seed", "x"], "--seed: x: write seeds as"),
        (["猫", "--count", "0"], "--count 0"),
        (["猫", "--count", "99999999"], "--count 99999999"),
        (["猫", "--batch-size", "0"], "--batch-size 0"),
        (["猫", "--preview-every", "-1"], "--preview-every"),
        (["猫", "--size", "big"], "--size: big: write it as WIDTHxHEIGHT"),
        (["猫", "--steps", "many"], "--steps"),
        (["猫", "--steps", "0"], "steps 0 is less than 1"),
        (["猫", "--guidance", "nan"], "guidance nan"),
        (["猫", "--branch-every", "0"], "branch every 0 is less than 1"),
        (["猫", "--cache-every", "2.5"], "--cache-every"),
        (["猫", "--cache-every", "2", "--branch-every", "2"], "branch every 2 has no effect: cache every 2"),
        (["猫", "--merge-tokens", "1"], "merge tokens 1.0 is outside 0 .. 0.75"),
        (["猫", "--vae-tile", "-64"], "VAE tile -64"),
        (["猫", "--branch-start", "0.5", "--branch-end", "0.5"], "branch start 0.5 is not before branch end 0.5"),
        (["猫", "--samplr", "ddim"], "--sampler"),
        (["猫", "--model", "nowhere"], "nowhere: no such model folder"),
        (["猫", "--out", "file/out"], "file/out: cannot be written"),
    ],
)
def test_what_cannot_be_is_one_line(folder, given, message):
    with pytest.raises(UserError) as error:
        parse(given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "out").exists()
