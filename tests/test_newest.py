"""What every supported Python and JAX must do, one command of each kind: `.ci/run` tries this on the newest ones too.

That environment has neither PyTorch nor conftest.py's fixtures: nothing here needs them.
"""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from bdm_jax.convert import __main__ as convert
from PIL import Image

from bdm_jax.commands import sample, train
from bdm_jax.formats.files import read_safetensors
from bdm_jax.paths import DEMO
from bdm_jax.plan import command as plan
from bdm_jax.runtime import programs
from bdm_jax.training import loop

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for name in ("bdm_jax", "configs", "convert") for path in sorted((ROOT / name).rglob("*.py"))]
# Packages that only some installations have, each behind an extra of setup.cfg.
EXTRAS = {"torch", "diffusers", "peft", "qwix", "apache_beam", "resvg_py"}
EXTRAS |= {"fastapi", "starlette", "uvicorn", "h11", "pydantic", "anyio", "prometheus_client", "gradio"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_platforms")}
    yield tmp_path
    programs.keep(None)
    for name, value in before.items():
        jax.config.update(name, value)


def test_every_module_can_be_imported():
    assert len(SOURCES) > 100
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "bdm_jax" else ("bdm_jax", *parts)).removesuffix(".__init__")
        try:
            importlib.import_module(name)
        except ImportError as error:
            assert error.name in EXTRAS, (name, error)


def test_a_picture_and_its_program(here):
    arguments = ["红灯笼", "--steps", "2", "--size", "64x64", "--out", "out"]
    assert sample.main(arguments) == 0 and sample.main(arguments) == 0
    first, second = (np.asarray(Image.open(path)) for path in sorted((here / "out").glob("000?-红灯笼*.png")))
    assert first.shape == (64, 64, 3) and first.std() > 5
    np.testing.assert_array_equal(first, second)
    assert any((here / "cache" / "programs").iterdir())


def test_a_training_and_its_export(here, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "training"))
    assert loop.train(importlib.import_module("toy").config(here / "run", 4))
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert rows and all(np.isfinite(row["loss"]) for row in rows)
    assert any((here / "run" / "export").iterdir())
    assert train.main(["emoji-vae", "--explain"]) == 0
    assert "params/vae/decoder" in capsys.readouterr().out


def test_a_plan(here, capsys):
    assert plan.main(["emoji-lora", "--topology", "v5e:2x2", "--shapes", "--size", "64", "--json", "plan.json"]) == 0
    assert json.loads((here / "plan.json").read_text("utf-8"))["memory"]["state"] > 0
    assert "per chip" in capsys.readouterr().out


def test_there_and_back(here, capsys):
    assert convert.main(["inspect", str(DEMO / "unet")]) == 0
    assert convert.main(["to-jax", str(DEMO / "unet"), "ours"]) == 0
    assert convert.main(["to-torch", "ours", "theirs"]) == 0
    before, after = (
        read_safetensors(next(folder.glob("*.safetensors"))) for folder in (DEMO / "unet", here / "theirs")
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
