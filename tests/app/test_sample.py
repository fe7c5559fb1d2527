"""sample.py as a person runs it: good input, bad input, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdm_jax.paths import DEMO
from bdm_jax.systems.components import Component

SCRIPT = Path(__file__).resolve().parents[2] / "sample.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache, tmp_path):
    """Start sample.py in an empty folder."""

    def popen(*arguments):
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "BDM_JAX_CACHE": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's are deaf to it
            encoding="utf-8",
        )

    return popen


@pytest.fixture
def run(start):
    """Run sample.py to its end: (exit status, stdout, stderr)."""

    def finish(*arguments):
        process = start(*arguments)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    return finish


def text(path, key="bdm_jax"):
    with Image.open(path) as image:
        image.load()
        return image.text[key]


def test_one_prompt_makes_one_picture(run, tiny_folder, tmp_path):
    status, out, err = run(
        "红灯笼", "--model", tiny_folder, "--steps", 2, "--guidance", 2, "--size", "48x32", "--seed", 9
    )
    assert status == 0, err
    path = tmp_path / "out" / "0001-红灯笼-seed9.png"
    assert out.split() == ["out/0001-红灯笼-seed9.png"]
    assert sorted(path.parent.iterdir()) == [path, path.with_name("pictures.jsonl")]
    with Image.open(path) as image:
        assert image.size == (48, 32)
    settings = json.loads(text(path))
    assert settings["prompt"] == "红灯笼" and settings["steps"] == 2 and settings["seed"] == 9
    assert text(path, "parameters").startswith("红灯笼\nSteps: 2, Sampler: DPM++ 2M, CFG scale: 2.0, Seed: 9")


def test_prompts_times_count_and_a_contact_sheet(run, tiny_folder, tmp_path):
    arguments = (
        "猫",
        "龙☃",
        "--count",
        2,
        "--steps",
        2,
        "--out",
        "here",
        "--negative",
        "低质量",
        "--model",
        tiny_folder,
    )
    status, out, err = run(*arguments)
    assert status == 0, err
    assert "note: the prompt '龙☃' has characters that the vocabulary lacks: ☃" in err
    names = ["0001-contact-sheet", "0001-猫-seed0", "0002-猫-seed1", "0003-龙-seed0", "0004-龙-seed1", "pictures"]
    assert sorted(path.stem for path in (tmp_path / "here").iterdir()) == names
    assert run(*arguments)[0] == 0
    assert (tmp_path / "here" / "0005-猫-seed0.png").read_bytes() == (
        tmp_path / "here" / "0001-猫-seed0.png"
    ).read_bytes()


def test_from_repeats_a_picture_bit_for_bit(run, tiny_folder, tmp_path):
    Image.effect_noise((48, 32), 90).convert("RGB").save(tmp_path / "a.png")
    Image.linear_gradient("L").resize((48, 32)).save(tmp_path / "m.png")
    images = ("--image", "a.png", "--mask", "m.png")
    how = ("--steps", 4, "--sampler", "euler-a", "--guidance", 2, "--seed", 5, "--english", "a cat", "--guess", *images)
    assert run("（红：1.3）灯笼", "--negative", "低质量", "--strength", 0.9, "--model", tiny_folder, *how)[0] == 0
    drawn = next((tmp_path / "out").glob("*.png"))
    status, _, err = run("--from", drawn, "--model", tiny_folder, "--out", "again", *images)
    assert status == 0 and "note" not in err, err
    assert (tmp_path / "again" / drawn.name).read_bytes() == drawn.read_bytes()
    status, _, err = run(
        "猫", "--from", drawn, "--model", tiny_folder, "--no-guess", "--out", "other", *images[:2], *("--mask", "a.png")
    )
    values = json.loads(text(next((tmp_path / "other").glob("*.png"))))
    assert status == 0 and "a.png is another mask than the one" in err
    assert (values["prompt"], values["guess"], values["seed"], values["sampler"]) == ("猫", False, 5, "euler-a")
    status, _, err = run("--from", drawn, "--model", tiny_folder)
    assert (status, err) == (2, f"error: {drawn} was drawn with the image a.png: give it with --image\n")


def test_a_file_of_prompts_and_a_range_of_seeds(run, tiny_folder, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,seed\n猫,\n龙,9\n", encoding="utf-8")
    arguments = ("--prompts", "p.csv", "--seed", "3,5-6", "--steps", 2, "--model", tiny_folder)
    status, out, err = run(*arguments)
    names = ["0001-猫-seed3", "0001-猫-seed5", "0001-猫-seed6", "0002-龙-seed9"]
    assert status == 0 and [Path(line).stem for line in out.split()] == [*names, "contact-sheet"], err
    assert re.search(r"loaded in [\d.]+ s, first picture after [\d.]+ s, then [\d.]+ s each\n", err), err
    status, out, err = run(*arguments)
    assert status == 0 and "note: 4 of 4 pictures are there already" in err
    status, out, err = run(*arguments, "--guidance", 2)
    assert status == 2 and "0001-猫-seed3.png is there already, drawn with guidance 3.0, not 2.0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("猫", "--sampler", "dpmp-2m"), "unknown sampler 'dpmp-2m': did you mean 'dpmpp-2m'?"),
        (("猫", "--size", "36x32"), "size 36x32: width and height must be multiples of 8"),
        (("猫", "--vae", "nowhere"), "nowhere: no such file or component folder"),
        (("猫", "--steps", 2000), "steps 2000 is outside"),
        (("猫", "--image", "small.png"), "an image of 4x4 pixels is too small; give a size"),
        (("猫", "--samplr", "ddim"), "--sampler"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tiny_folder, tmp_path, arguments, message):
    """As far as the model has a say; the rest is in test_arguments.py."""
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    status, out, err = run(*arguments, "--model", tiny_folder)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and out == "" and len(errors) == 1, err
    assert errors[0].startswith("error: ") and message in errors[0]
    assert "Traceback" not in err and not list((tmp_path / "out").glob("*"))


def test_nan_is_one_line_and_no_black_picture(run, tiny, tmp_path):
    vae = Component(tiny.vae.config, {name: value * np.nan for name, value in tiny.vae.params.items()})
    tiny.replace(vae=vae).save_pretrained(tmp_path / "nan", "float32")
    status, out, err = run("红灯笼", "--model", "nan", "--steps", 2)
    assert status == 2 and out == "" and "error: the picture for '红灯笼' came out as NaN" in err
    assert "Traceback" not in err and not list((tmp_path / "out").iterdir())


def test_help_names_every_flag(run):
    status, out, _ = run("--help")
    flags = (
        "negative english english-negative seed count steps guidance sampler size batch-size bare model backbone vae "
        "branch text-encoder branch-text-encoder variant out prompts image mask from preview-every strength hires"
    ).split()
    assert status == 0 and all(f"--{flag}" in out for flag in flags)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_finished_pictures_only(start, tiny_folder, tmp_path, sent):
    more = ("--preview-every", 1, "--model", tiny_folder)
    process = start("猫", "--count", 5000, "--batch-size", 1, "--steps", 2, *more)
    out = tmp_path / "out"
    deadline = time.monotonic() + 300
    while len(list(out.glob("0*.png"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    lines = [json.loads(line)["file"] for line in (out / "pictures.jsonl").read_text(encoding="utf-8").splitlines()]
    left = sorted(set(out.iterdir()) - {out / "pictures.jsonl"})
    assert 2 <= len(left) < 5000 and [path.name for path in left][: len(lines)] == lines and len(left) - len(lines) < 2
    for path in left:
        assert json.loads(text(path))["prompt"] == "猫"


def test_demo_draws(run, tmp_path):
    """The README's command, with the model that the repository brings."""
    assert DEMO.is_dir(), "the repository lacks its demo model (assets/demo)"
    status, out, err = run("红灯笼")
    assert status == 0, err
    with Image.open(tmp_path / out.strip()) as image:
        assert image.size[0] >= 64 and len(set(image.convert("L").get_flattened_data())) > 32
