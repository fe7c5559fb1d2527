"""Models by name on the command line: resolved after all else is checked, recorded with their commits."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub import environment
from PIL import Image

from bdm_jax.app.arguments import parse
from bdm_jax.app.parts import Parts
from bdm_jax.errors import UserError
from bdm_jax.paths import DEMO

ROOT = Path(__file__).resolve().parents[2]
VAE = {path.name: path.read_bytes() for path in (DEMO / "vae").iterdir()}


@pytest.fixture
def filled(hub):
    """Plug-ins and an autoencoder; their contents are of no matter here."""
    hub.add("art/vae", VAE)
    hub.add("art/ink", {"ink.safetensors": b"of a LoRA", "other.safetensors": b"of another"})
    hub.add("art/cat", {"learned_embeds.bin": b"of a word"})
    hub.add("art/canny", VAE)
    hub.plain["/files/snow.safetensors"] = b"of a third"
    return hub


def test_all_flags(filled, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a,b.png")
    link = f"{filled.url}/files/snow.safetensors"
    parts = Parts(
        vae="art/vae",
        lora=("art/ink:ink.safetensors:0.8:0.5", f"{link}:0.3"),
        embedding=("art/cat=kitten",),
        control=(f"art/canny,{tmp_path}/a,b.png,strength=0.5",),
    )
    parts.check()
    assert not filled.log, "a check asks nobody"
    here = parts.fetched()
    assert here.vae.is_dir() and here.model == DEMO
    assert [Path(text.split(":")[0]).read_bytes() for text in here.lora] == [b"of a LoRA", b"of a third"]
    assert here.lora[0].endswith("/ink.safetensors:0.8:0.5") and here.lora[1].endswith("/snow.safetensors:0.3")
    assert here.embedding[0].endswith("/learned_embeds.bin=kitten")
    assert here.control[0].endswith(f",{tmp_path}/a,b.png,strength=0.5")
    assert here.fetched() == here
    commit = {name: filled.commit(f"art/{name}") for name in ("vae", "ink", "cat", "canny")}
    names = parts.names()
    assert names == here.names()
    assert names["vae"] == f"art/vae@{commit['vae']}"
    assert names["lora"] == f"art/ink@{commit['ink']}:ink.safetensors:0.8:0.5 + {link}:0.3"
    assert names["embedding"] == f"art/cat@{commit['cat']}:learned_embeds.bin=kitten"
    assert names["control"].startswith(f"art/canny@{commit['canny']},a,b.png,strength=0.5,map=")


def test_what_is_replaced_is_not_fetched(filled):
    files = {path.relative_to(DEMO).as_posix(): path.read_bytes() for path in DEMO.rglob("*") if path.is_file()}
    filled.add("art/demo", files)
    here = Parts(model="art/demo", vae="art/vae", branch="art/demo:branch").fetched()
    assert not (here.model / "vae").exists() and (here.branch / "config.json").is_file()
    assert filled.fetched().count("branch/diffusion_pytorch_model.safetensors") == 1
    other = Parts(backbone="art/demo").fetched()
    assert not (other.backbone / "branch_text_encoder").exists() or other.backbone == here.model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vae", "art/nothing"], "^art/nothing: no such file or folder here, and no such model on http"),
        (["--lora", "art/ink:0.8"], "^art/ink: holds several files: name one, as in art/ink:ink.safetensors"),
        (
            ["--lora", "art/ink:no.safetensors:0.8"],
            "^art/ink:no.safetensors: no file or folder no.safetensors in it; it",
        ),
        (["--model", "models/sd15.safetensors"], "^models/sd15.safetensors: no such model folder$"),
        (["--lora", "loras/ink.safetensors:0.8"], "^loras/ink.safetensors: no such file or folder$"),
    ],
)
def test_what_is_said(filled, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        parse(["红灯笼", *flags, "--out", str(tmp_path / "out")])


def test_all_else_is_checked_first(filled, tmp_path):
    with pytest.raises(UserError, match="^steps 0 is less than 1$"):
        parse(["红灯笼", "--vae", "art/vae", "--steps", "0", "--out", str(tmp_path / "out")])
    assert not filled.log
    arguments, *_ = parse(["红灯笼", "--vae", f"{filled.url}/art/vae", "--out", str(tmp_path / "out")])
    assert arguments.parts.vae.is_dir()


def test_a_picture_by_name(hub, tmp_path):
    """sample.py as a person runs it: the environment says which hub; then without one."""
    hub.add("art/demo", DEMO)
    command = [sys.executable, str(ROOT / "sample.py"), "红灯笼", "--model", "art/demo", "--steps", "2"]
    settings = {**os.environ, **environment(hub, tmp_path), "BDM_JAX_CACHE": str(tmp_path / "programs")}

    def run(*more, **environment):
        done = subprocess.run(
            [*command, *more], env={**settings, **environment}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (file,) = re.findall(r"out/.*\.png", done.stdout)
        return tmp_path / file

    first = run()
    assert sorted(hub.fetched()) == sorted({*hub.fetched()}), "nothing twice"
    with Image.open(first) as image:
        assert json.loads(image.text["bdm_jax"])["model"] == f"art/demo@{hub.commit('art/demo')}"
    hub.log.clear()
    second = run(HF_HUB_OFFLINE="1")
    assert second.read_bytes() == first.read_bytes() and not hub.log


def test_parts_are_as_before_without_names(tmp_path):
    """Paths stay what they are, in what is drawn with and in what is recorded."""
    parts = Parts()
    assert parts.fetched() == parts and parts.names() == {"model": "demo"}
    assert replace(parts, vae=DEMO / "vae").names()["vae"] == "vae"
