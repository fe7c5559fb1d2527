"""Models by name in training: fetched before anything is read, recorded with their commits, resumed with these."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from bdm_jax import command_line, configs
from bdm_jax.errors import UserError
from bdm_jax.paths import DEMO
from bdm_jax.plan.shapes import parse_networks
from bdm_jax.systems.fetch import local
from bdm_jax.training.config import TrainConfig, settle
from bdm_jax.training.objectives.autoencoder import VAETask
from bdm_jax.training.objectives.backbone import BackboneTask
from bdm_jax.training.objectives.branch import BranchTask


@pytest.fixture
def demo(hub):
    """The bundled demo as a repository; its commit."""
    return hub.add("art/demo", DEMO)


def test_paths_and_records(hub, demo, tmp_path):
    task = BranchTask(
        backbone="art/demo", text_encoder="art/demo:branch_text_encoder", tokenizer="art/demo:branch_tokenizer"
    )
    config = settle(TrainConfig(task, tmp_path / "run", 1))
    assert (config.task.backbone / "unet" / "config.json").is_file()
    assert (
        config.task.sizes()
        == replace(
            task, backbone=DEMO, text_encoder=DEMO / "branch_text_encoder", tokenizer=DEMO / "branch_tokenizer"
        ).sizes()
    )
    recorded = config.to_json()["task"]
    assert recorded["backbone"] == f"art/demo@{demo}"
    assert recorded["text_encoder"] == f"art/demo@{demo}:branch_text_encoder"
    here = replace(task, backbone=DEMO, text_encoder=DEMO / "branch_text_encoder", tokenizer=DEMO / "branch_tokenizer")
    assert config.digest() == replace(config, task=here).digest(), "where it lies is free"


def test_of_a_tokenizer_no_weights(hub, demo, tmp_path):
    task = BranchTask(backbone=DEMO, text_encoder=DEMO / "branch_text_encoder", tokenizer="art/demo:branch_tokenizer")
    settle(TrainConfig(task, tmp_path, 1))
    assert set(hub.fetched()) == {"branch_tokenizer/tokenizer.json", "branch_tokenizer/tokenizer_config.json"}


def test_a_run_resumes_with_the_commit_that_it_began_with(hub, demo, tmp_path):
    config = settle(TrainConfig(VAETask(start_from="art/demo:vae"), tmp_path / "run", 1))
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_json()))
    later = hub.add("art/demo", {**hub.repositories["art/demo"]["main"], "README.md": b"new"})
    local.__globals__["_known"].clear()
    again = TrainConfig(VAETask(start_from=Path("art/demo:vae")), tmp_path / "run", 1)
    assert settle(again).to_json()["task"]["start_from"] == f"art/demo@{demo}:vae"
    fresh = replace(again, run=tmp_path / "other")
    assert settle(fresh).to_json()["task"]["start_from"] == f"art/demo@{later}:vae"

    hub.repositories.clear()  # it needs the weights no more
    local.__globals__["_known"].clear()
    for path in Path(config.task.start_from).parents[2].rglob("*"):
        path.unlink() if not path.is_dir() else None
    assert settle(again).task.vae == config.task.vae
    with pytest.raises(UserError, match="^art/demo:vae: no such file or folder here, and no such model on http"):
        settle(fresh)


def test_flags_keep_links(hub):
    default = configs.load("emoji-backbone")
    marks = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    given = ["--task.vae", "https://example.org//vae.safetensors", "--task.start-from", "art/demo@v1"]
    task = command_line.parse(TrainConfig, given, default=default, config=marks).task
    assert isinstance(task, BackboneTask)
    assert (task.vae, task.start_from) == ("https://example.org//vae.safetensors", Path("art/demo@v1"))
    assert command_line.parse(TrainConfig, [], default=default, config=marks).task == default.task


def test_a_plan_reads_configs_alone(hub, demo):
    assert parse_networks(("unet=art/demo:unet",)) == parse_networks((f"unet={DEMO / 'unet'}",))
    assert hub.fetched() == ["unet/config.json"]
