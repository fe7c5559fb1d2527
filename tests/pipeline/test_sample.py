"""sample.py as a person runs it: good input, bad input, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bdm_jax.paths import DEMO

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
    assert out.split() == ["out/0001-红灯笼-seed9.png"] and list(path.parent.iterdir()) == [path]
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
    names = ["0001-contact-sheet", "0001-猫-seed0", "0002-猫-seed1", "0003-龙-seed0", "0004-龙-seed1"]
    assert sorted(path.stem for path in (tmp_path / "here").iterdir()) == names
    assert run(*arguments)[0] == 0
    assert (tmp_path / "here" / "0005-猫-seed0.png").read_bytes() == (
        tmp_path / "here" / "0001-猫-seed0.png"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompts"),
        (("猫", "--sampler", "dpmp-2m"), "unknown sampler 'dpmp-2m': did you mean 'dpmpp-2m'?"),
        (("猫", "--size", "36x32"), "size 36x32: width and height must be multiples of 8"),
        (("猫", "--size", "big"), "--size big: write it as WIDTHxHEIGHT"),
        (("猫", "--model", "nowhere"), "nowhere: no such model folder"),
        (("猫", "--vae", "nowhere"), "nowhere: no such file or component folder"),
        (("猫", "--bare", "--english", "a cat"), "--bare draws the prompt itself"),
        (("猫", "--out", "file/out"), "file/out: cannot be written"),
        (("猫", "--count", 0), "--count 0"),
        (("猫", "--steps", 0), "steps 0 is outside"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tiny_folder, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    model = () if "--model" in arguments else ("--model", tiny_folder)
    status, out, err = run(*arguments, *model)
    errors = [line for line in err.splitlines() if "error" in line]
    assert status == 2 and out == "" and len(errors) == 1, err
    assert errors[0].startswith("error: ") and message in errors[0]
    assert "Traceback" not in err and not list((tmp_path / "out").glob("*"))


def test_unknown_flag_offers_the_nearest(run):
    status, _, err = run("猫", "--samplr", "ddim")
    assert status == 2 and "--sampler" in err and "Traceback" not in err


def test_help_names_every_flag(run):
    status, out, _ = run("--help")
    flags = (
        "negative english english-negative seed count steps guidance sampler size batch-size bare model backbone vae "
        "branch text-encoder branch-text-encoder variant out"
    ).split()
    assert status == 0 and all(f"--{flag}" in out for flag in flags)


def test_ctrl_c_leaves_finished_pictures_only(start, tiny_folder, tmp_path):
    process = start("猫", "--count", 5000, "--batch-size", 1, "--steps", 2, "--model", tiny_folder)
    out = tmp_path / "out"
    deadline = time.monotonic() + 300
    while len(list(out.glob("0*.png"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    left = sorted(out.iterdir())
    assert 2 <= len(left) < 5000 and all(path.suffix == ".png" and path.name.startswith("0") for path in left)
    for path in left:
        assert json.loads(text(path))["prompt"] == "猫"


def test_demo_draws(run, tmp_path):
    """The README's command, with the model that the repository brings."""
    assert DEMO.is_dir(), "the repository lacks its demo model (assets/demo)"
    status, out, err = run("红灯笼")
    assert status == 0, err
    with Image.open(tmp_path / out.strip()) as image:
        assert image.size[0] >= 64 and len(set(image.convert("L").get_flattened_data())) > 32
