"""What a run reads is looked at when it goes on; images that cannot be read are counted, replaced and noted."""

import io
import json
import shutil
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image

from bdm_jax.data.records import open_source
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.formats.files import DIFFUSERS_WEIGHTS, read_json, write_json
from bdm_jax.latents.moments import record_moments
from bdm_jax.models.config import VAEConfig, from_json
from bdm_jax.models.functional import init
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component, load_component, save_component
from bdm_jax.training.inputs import check_inputs, of_part
from bdm_jax.training.loop import train
from bdm_jax.training.objectives import autoencoder
from bdm_jax.training.objectives.backbone import BackboneTask
from bdm_jax.training.objectives.branch import BranchTask
from bdm_jax.training.objectives.controlnet import ControlNetTask
from bdm_jax.training.objectives.dreambooth import DreamBoothTask, class_moments
from bdm_jax.training.objectives.lora import LoRATask
from bdm_jax.training.objectives.sample import read_image
from bdm_jax.training.sets import DataConfig, Sets


def noise(number, size=toy.SIZE):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path):
    """A plain folder of twenty captioned images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(noise(number))
        (folder / f"{number:02d}.txt").write_text(f"红灯笼{number}", encoding="utf-8")
    return folder


@pytest.fixture
def model(backbone_folder, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(backbone_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def toys(pictures, model, monkeypatch, tmp_path):
    """A function that trains two steps on them, or goes on with that."""
    monkeypatch.setenv("TOY_SETS", str(pictures))
    monkeypatch.setenv("TOY_VAE", str(model / "vae"))
    return lambda: train(toy.config(tmp_path / "run", steps=2, log_every=1))


def halve(folder, path):
    """One weight of a network, in place; all are written in another type."""
    config, params = load_component(folder, "float32")
    save_component(folder, config, {**params, path: params[path] * 0.5}, dtype="float32")


def test_a_run_goes_on_with_what_it_began_with_only(toys, pictures, model, tmp_path, capsys):
    assert toys()
    config = read_json(tmp_path / "run" / "config.json")
    assert {*config["inputs"]} == {"vae", "data.folder"}
    assert toys(), "nothing has changed"

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            toys()
        assert "\n" not in str(error.value) and "put the old files back, or begin a new run" in str(error.value)

    image, text = pictures / "03.png", pictures / "04.txt"
    kept = image.read_bytes(), text.read_bytes()
    image.write_bytes(noise(99))
    refused(rf"^data.folder \({pictures}\) is not what the run in .*run has been trained with")
    image.write_bytes(kept[0])
    text.write_text("红灯泡4", encoding="utf-8")
    refused(r"^data.folder ")
    text.write_bytes(kept[1])
    weights = (model / "vae" / DIFFUSERS_WEIGHTS).read_bytes()
    halve(model / "vae", "decoder.conv_out.kernel")
    refused(rf"^vae \({model / 'vae'}\) is not")
    (model / "vae" / DIFFUSERS_WEIGHTS).write_bytes(weights)
    assert toys()
    capsys.readouterr()
    write_json(tmp_path / "run" / "config.json", {name: value for name, value in config.items() if name != "inputs"})
    assert toys()
    assert "kept no digests of networks and data" in capsys.readouterr().err
    assert read_json(tmp_path / "run" / "config.json")["inputs"] == config["inputs"]


def test_before_the_first_checkpoint_anything_may_change(toys, pictures, tmp_path):
    """A run that ended before it had learned something begins with what is there now."""
    assert toys()
    before = read_json(tmp_path / "run" / "config.json")["inputs"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (pictures / "03.png").write_bytes(noise(99))
    assert toys()
    after = read_json(tmp_path / "run" / "config.json")["inputs"]
    assert before["vae"] == after["vae"] and before["data.folder"] != after["data.folder"]


def test_a_refused_run_leaves_nothing_that_the_next_one_trips_over(toys, pictures, tmp_path):
    """No captions, then some; and cached latents of other images under the same names."""
    kept = {path: path.read_bytes() for path in pictures.glob("*.txt")}
    run = tmp_path / "run"
    config = toy.config(run, steps=2)

    def refused(record, rng):
        raise BadRecord("00.png", "no caption", "none")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "_sample", refused)
        for path in kept:
            path.unlink()
        with pytest.raises(BadRecord):
            train(replace(config, batch_size=4))
    before = read_json(run / "config.json")["inputs"]
    stale = (run / "latents-0.npz").read_bytes()
    for path, text in kept.items():
        path.write_bytes(text)
    (pictures / "03.png").write_bytes(noise(99))
    assert toys(), "with another batch size, captions and an image"
    assert read_json(run / "config.json")["inputs"]["data.folder"] != before["data.folder"]
    assert (run / "latents-0.npz").read_bytes() != stale


def test_data_and_networks_may_move(toys, pictures, model, tmp_path, monkeypatch):
    assert toys()
    for name, folder in (("TOY_SETS", pictures), ("TOY_VAE", model / "vae")):
        monkeypatch.setenv(name, str(folder.rename(tmp_path / f"moved-{folder.name}")))
    assert toys()


def digests(task, run):
    """Of what a task reads, but for the records."""
    sets = SimpleNamespace(latents=lambda *a, **k: [], skip_rate=0.0)
    training = task.start(sets, run, 0, jnp.dtype("float32"))
    return check_inputs(run, training.inputs, {})


SYSTEM = {"unet", "vae", "text_encoder", "tokenizer", "schedule", "prompts"}


@pytest.mark.parametrize("kind", ["branch", "lora", "controlnet", "backbone"])
def test_every_part_that_a_task_reads_has_a_digest(model, backbone_folder, tmp_path, kind):
    """Those that change are those that were changed."""
    tower = tmp_path / "tower"
    shutil.copytree(backbone_folder.parent / "tower", tower)
    small = [from_json(read_json(model / part / "config.json")) for part in ("unet", "text_encoder")]
    task, expected = {
        "branch": (
            BranchTask(backbone=model, text_encoder=tower, tokenizer=TOKENIZERS / "chinese"),
            SYSTEM | {"branch_text_encoder", "branch_tokenizer"},
        ),
        "lora": (LoRATask(model=model), SYSTEM),
        "controlnet": (ControlNetTask(model=model, hint_widths=(4, 4, 8, 8, 8)), SYSTEM),
        "backbone": (
            BackboneTask(*small, vae=model / "vae", tokenizer=model / "tokenizer"),
            {"vae", "tokenizer"},
        ),
    }[kind]
    before = digests(task, tmp_path)
    assert {*before} == expected
    halve(model / "unet", "conv_out.kernel")
    halve(tower, "embeddings.word_embeddings.embedding")
    scheduler = read_json(model / "scheduler" / "scheduler_config.json")
    write_json(model / "scheduler" / "scheduler_config.json", {**scheduler, "beta_end": 0.013})
    words = read_json(model / "tokenizer" / "tokenizer.json")
    merges = words["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]
    write_json(model / "tokenizer" / "tokenizer.json", words)
    after = digests(task, tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"unet", "schedule", "branch_text_encoder", "tokenizer"} & expected


def test_a_field_of_a_later_version_changes_no_digest():
    @dataclass(frozen=True)
    class Old:
        width: int = 4
        depth: int = 2

    later = dataclass(frozen=True)(type("Old", (Old,), {"__annotations__": {"later": bool}, "later": False}))
    assert of_part(later(depth=3), "x").digest() == of_part(Old(depth=3), "x").digest()
    assert of_part(later(later=True), "x").digest() != of_part(Old(), "x").digest()


@pytest.fixture(scope="module")
def vae():
    config = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=32)
    return Component(config, init(config, 0))


def test_a_truncated_image_is_counted_replaced_and_noted(toys, pictures, tmp_path, monkeypatch):
    """One of twenty, while latents are made in memory: at a rate of 0.05 the run goes on, and again from the cache."""
    (pictures / "07.png").write_bytes(noise(7)[:900])
    with pytest.raises(UserError, match=r"1 of 20 records cannot be used \(07.png: .*--data.skip-rate, now 0.01"):
        toys()
    assert not (tmp_path / "run" / "config.json").exists()
    config = toy.config(tmp_path / "run", steps=3)
    config = replace(config, data=replace(config.data, skip_rate=0.05), sample_every=3)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 20 records cannot be used \(07.png: .*take their places"):
            assert train(config)
    told = [json.loads(line) for line in (tmp_path / "run" / "left_out-0.jsonl").read_text().splitlines()]
    assert {(line["record"], line["cause"]) for line in told} == {("07.png", "corrupt image")}


def test_latents_of_images_of_several_sizes_are_of_one(vae, pictures, tmp_path):
    """Those of the image resized to cover and cropped; where all are alike nothing is resized."""
    data, one = DataConfig(pictures), (32, 48)
    (same,) = Sets(data, "zh").latents(vae, tmp_path, common_size=one)
    assert same.bucket == toy.SIZE
    (pictures / "05.png").write_bytes(noise(5, (80, 40)))
    with pytest.raises(UserError, match=r"05.png: 40 x 80 pixels, those before it 64 x 64: bring them to one size"):
        Sets(data, "zh").latents(vae, tmp_path)
    with pytest.warns(UserWarning, match="all are resized to cover 48 x 32 and cropped"):
        (part,) = Sets(data, "zh").latents(vae, tmp_path, common_size=one)
    wanted = record_moments(vae, open_source(pictures), None, one)
    assert part.bucket == one
    np.testing.assert_array_equal(np.stack([part.source[i]["moments"] for i in range(20)]), wanted)


def test_repeats_are_the_order_and_no_latents_more(vae, tmp_path):
    for name, count in (("3_红灯笼", 2), ("1_猫", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "set" / name / f"{number}.png").write_bytes(noise(number))
    sets = Sets(DataConfig(tmp_path / "set"), "zh")
    (part,) = sets.latents(vae, tmp_path)
    assert len(part.source) == 3 and sorted(part.indices) == [0, 1, 1, 1, 2, 2, 2]
    assert sorted(sets.images()[0].indices) == sorted(part.indices)
    assert part.source[0]["captions"] == ["猫"]


def test_the_first_record_may_be_the_bad_one(vae, pictures, tmp_path):
    """Sets look at one record to know their kind; an index may name an image that is not there."""
    lines = [{"file_name": f"{number:02d}.png", "text": "红灯笼"} for number in range(-1, 20)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sets = Sets(DataConfig(pictures, skip_rate=0.05), "zh", ("03.png", "04.png"))
    assert [len(part.source) for part in sets.images()] == [2]
    with pytest.warns(UserWarning, match=r"1 of 21 .*-1.png: no such file"):
        (part,) = Sets(DataConfig(pictures, skip_rate=0.05), "zh").latents(vae, tmp_path)
    with pytest.raises(BadRecord, match="no such file"):
        part.source[0]
    assert part.source[1]["moments"].any()


def test_class_images_and_the_autoencoders_own_are_looked_at_too(vae, pictures, tmp_path):
    (pictures / "07.png").write_bytes(noise(7)[:900])
    ready = SimpleNamespace(system=SimpleNamespace(vae=vae, factor=2, unet=SimpleNamespace(config=None)))
    ready.system.unet.config = SimpleNamespace(sample_size=16)
    task = DreamBoothTask(class_images=pictures)
    with pytest.raises(UserError, match="1 of 20 records cannot be used"):
        class_moments(task, ready, tmp_path, 0.01)
    with pytest.warns(UserWarning, match="others take their places"):
        assert len(class_moments(task, ready, tmp_path, 0.05)) == 19
    source = open_source(pictures)
    assert len(autoencoder._good_moments(vae, source, (32, 32))) == 19
    parts = Sets(DataConfig(pictures), "zh").images()
    assert autoencoder._one_size(parts, vae.config) == toy.SIZE
    (pictures / "05.png").write_bytes(noise(5, (80, 40)))
    with pytest.warns(UserWarning, match="images of 2 sizes: all are resized to cover 32 x 32"):
        size = autoencoder._one_size(parts, vae.config)
    assert read_image(size, source[5])["image"].shape == (32, 32, 3)
