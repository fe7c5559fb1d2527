"""The model in the repository: what it was trained on, that PyTorch reads it, that it draws what it is told."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from bdm_jax.configs import demo as making
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from bdm_jax import configs
from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.images.decode import decode_image
from bdm_jax.models.functional import bind
from bdm_jax.paths import ASSETS, DEMO, EMOJI
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import encode, tokenize

MOST_BYTES = 75_000_000


@pytest.fixture(scope="module")
def demo():
    """The bundled pipeline."""
    return BridgePipeline.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def training():
    """What was written down when it was trained."""
    return json.loads((DEMO / "training.json").read_text())


def close(ours, reference):
    reference = reference.numpy()
    return np.abs(np.asarray(ours) - reference).max() <= 1e-4 * np.abs(reference).max()


def test_all_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= MOST_BYTES


def test_record_of_the_training(training):
    """All concepts of the set, those of Chinese culture among them; what each stage took and how its loss fell."""
    source = open_source(EMOJI)
    rows = [source[i] for i in range(len(source))]
    assert set(training["concepts"]) == {row["id"] for row in rows}
    assert len({row["id"] for row in rows if row["zh_only"]}) >= 25
    assert list(training["stages"]) == ["vae", "backbone", "text", "branch"]
    for stage in training["stages"].values():
        samples = stage["seconds"] * stage["samples_per_second"]
        assert stage["steps"] * stage["batch"] == pytest.approx(samples, rel=0.01)
        assert all(0 < stage["final"]["loss"] < point["loss"] for point in stage["curve"][:1])


def test_pytorch_predicts_the_same(demo, rng):
    """Text tower, UNet and autoencoder, each opened by its own library; fp32 on both sides."""
    text, unet, vae = (
        cls.from_pretrained(DEMO / name, torch_dtype=torch.float32).eval()
        for cls, name in ((CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    prompts = ["red heart", "a cat with wry smile"]
    ids = torch.from_numpy(tokenize(demo.tokenizer, prompts)[:, 0]).long()
    cond, states = encode(demo.tokenizer, *demo.text_encoder, prompts), text(ids).last_hidden_state
    assert close(cond.tokens, states)

    x = rng.standard_normal((2, 8, 8, demo.unet.config.in_channels), np.float32)
    t = np.array([999, 250])
    ours = jax.jit(lambda p, *a: bind(demo.unet.config, p)(*a))(demo.unet.params, x, t, cond)
    x_bchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    assert close(ours, unet(x_bchw, torch.from_numpy(t), states).sample.permute(0, 2, 3, 1))

    pixels = jax.jit(lambda p, z: bind(demo.vae.config, p).decode(z))(demo.vae.params, x)
    assert close(pixels, vae.decode(x_bchw).sample.permute(0, 2, 3, 1))


@pytest.mark.slow
def test_a_red_lantern_is_drawn(demo, training):
    """Among the artwork of all concepts, the lantern's is the nearest to the picture, pixel by pixel."""
    source = open_source(EMOJI)
    rows = [source[int(i)] for i in concepts(source, training["style"], language="zh")]
    artwork = np.stack([decode_image(row["image"])[::4, ::4] for row in rows]).astype(np.float32)
    picture = next(generate(demo, [Request("红灯笼")]))[::4, ::4].astype(np.float32)
    distance = np.square(artwork - picture).mean(axis=(1, 2, 3))
    assert rows[int(distance.argmin())]["zh"] == "红灯笼"


def small(name):
    """The run of that name with narrow networks: a few steps on a few scenes."""
    config = configs.load(name)
    task, data = config.task, replace(config.data, scenes=48)
    if name == "emoji-vae":
        task = replace(task, vae=replace(task.vae, block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
    if name == "emoji-backbone":
        task = replace(task, unet=replace(task.unet, block_out_channels=(16, 32), norm_num_groups=8, num_heads=2))
    return replace(config, task=task, data=data, steps=3, batch_size=4, log_every=1)


@pytest.mark.slow
def test_all_of_it_is_made_by_one_command(tmp_path, monkeypatch, training):
    """In sessions, from nothing: a folder that draws, and a record of what the stages took."""
    monkeypatch.setattr(making, "load", small)
    settings = making.DemoArgs(minutes=1e-4, runs=tmp_path / "runs", out=tmp_path / "demo")
    assert making.make(settings) == making.MORE_SESSIONS and not settings.out.exists()
    assert making.make(replace(settings, minutes=None)) == 0
    record = json.loads((settings.out / "training.json").read_text())
    assert record.keys() == training.keys() and record["concepts"] == training["concepts"]
    for stage in record["stages"].values():
        assert (stage["steps"], stage["batch"]) == (3, 4)
        assert [point["step"] for point in stage["curve"]] == [1, 2, 3] and np.isfinite(stage["final"]["loss"])
    made = BridgePipeline.from_pretrained(settings.out)
    assert next(generate(made, [Request("红灯笼")])).shape == (128, 128, 3)
    assert making.make(settings) == 0  # nothing is left to do


def test_a_budget_is_shared_as_the_bundled_demo_took_it(monkeypatch, tmp_path, training):
    """Each stage gets the steps that its share has room for; one that has begun keeps its own."""
    measured = {}

    def steps_within(config, seconds):
        measured[config.run.name] = seconds
        return len(measured)

    begun = []
    monkeypatch.setattr(making, "steps_within", steps_within)
    monkeypatch.setattr(making, "check", lambda config: begun.append((config.run.name, config.steps)))
    monkeypatch.setattr(making, "train", lambda config: (config.run / "export").mkdir(parents=True) or True)
    monkeypatch.setattr(making, "assemble", lambda runs, out: None)
    (tmp_path / "emoji-text").mkdir()
    (tmp_path / "emoji-text" / "config.json").write_text('{"steps": 77}')
    assert making.make(making.DemoArgs(budget=60, runs=tmp_path, out=tmp_path / "demo")) == 0
    assert begun == [("emoji-vae", 1), ("emoji-backbone", 2), ("emoji-text", 77), ("emoji-branch", 3)]
    stage = training["stages"]
    took = {name: stage[name]["seconds"] + stage[name]["compile_s"] for name in stage}
    for name in ("vae", "backbone", "branch"):
        assert measured[f"emoji-{name}"] == pytest.approx(3600 * took[name] / sum(took.values()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--minutes", "0"), "error: --minutes 0.0: must be a positive number"),
        (("--minutes", "-3"), "error: --minutes -3.0: must be a positive number"),
        (("--budget", "nan"), "error: --budget nan: must be a positive number"),
        (("--out", "theirs"), "error: --out theirs: is there already and holds no model made here"),
        (("--out", "theirs/thesis.txt"), "error: --out theirs/thesis.txt: is there already and holds no model"),
    ],
)
def test_nothing_of_others_is_replaced(flags, message, tmp_path, monkeypatch, capsys):
    """Before anything is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    assert making.main(flags) == 2
    assert " ".join(capsys.readouterr().err.split()).startswith(message)
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "thesis.txt"]
