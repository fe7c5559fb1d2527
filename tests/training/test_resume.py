"""A run that is killed and started again is the run that was never interrupted, bit for bit (on one machine's CPU)."""

import json
import multiprocessing
import time
from dataclasses import replace

import pytest

from bdm_jax.errors import UserError
from bdm_jax.formats.files import DIFFUSERS_WEIGHTS, read_header, read_json, write_json
from bdm_jax.training.config import TrainConfig, remember
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.backbone import BackboneTask

FROZEN = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PATIENCE = 600  # seconds for one process to start, compile and take a few steps, on a busy machine


def files(folder):
    """Relative path -> bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(run):
    """Step -> what was logged, speed aside."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: value for key, value in row.items() if key != "images_per_second"} for row in rows}


def kill_after(config, step):
    """Train in another process and kill it (SIGKILL) once it has logged that step and its first checkpoint is there."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=(config,))
    process.start()
    deadline = time.monotonic() + PATIENCE
    metrics, checkpoint = config.run / "metrics.jsonl", config.run / "checkpoints" / str(config.checkpoint_every)
    while not (metrics.is_file() and f'"step": {step},' in metrics.read_text() and checkpoint.is_dir()):
        assert process.is_alive() and time.monotonic() < deadline, "the run to be killed did not get that far"
        time.sleep(0.01)
    process.kill()
    process.join()


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit_and_frozen_parts_stay(branch_run, backbone_folder, tmp_path):
    whole, killed = branch_run(tmp_path / "whole"), branch_run(tmp_path / "killed")
    assert train(whole)
    kill_after(killed, step=3)
    assert not (killed.run / "export").exists()
    assert train(replace(killed, export_only=True))
    _, told = read_header(killed.run / "export" / "branch" / DIFFUSERS_WEIGHTS)
    assert told["bdm_jax.step"] in ("2", "4") and told["bdm_jax.config"] == killed.digest()
    assert (
        files(killed.run / "export")["branch/" + DIFFUSERS_WEIGHTS]
        != files(whole.run / "export")["branch/" + DIFFUSERS_WEIGHTS]
    )
    assert train(killed)

    assert losses(killed.run) == losses(whole.run)
    assert sorted(losses(whole.run)) == [1, 2, 3, 4, 5, 6]
    exported = files(whole.run / "export")
    assert files(killed.run / "export") == exported

    before = files(backbone_folder)
    for path, content in before.items():
        if path.startswith(FROZEN):
            assert exported[path] == content, path
    assert {path.split("/")[0] for path in exported} > {"branch", "branch_text_encoder", "branch_tokenizer", *FROZEN}


def test_a_run_with_other_settings_is_refused(branch_run, tmp_path):
    """Its folder says which settings differ, before anything is loaded or compiled; a folder that moved is none."""
    config = branch_run(tmp_path / "run")
    remember(replace(config, seed=1))
    remember(config)  # without a checkpoint anything may change
    (config.run / "checkpoints" / "2").mkdir(parents=True)
    remember(replace(config, minutes=9.0, sample_every=7))
    moved = replace(config, data=replace(config.data, folder=tmp_path / "moved"))
    remember(moved)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        remember(replace(config, seed=1))
    with pytest.raises(UserError, match=r"other settings \(data.also\)"):
        remember(replace(config, data=replace(config.data, also=(tmp_path / "more",))))
    with pytest.raises(UserError, match=r"other settings \(optimizer.learning_rate, task.caption_dropout\)"):
        optimizer = replace(config.optimizer, learning_rate=0.5)
        remember(replace(config, optimizer=optimizer, task=replace(config.task, caption_dropout=0.5)))


def test_a_run_of_an_older_version_with_other_fields_says_which(tmp_path):
    """A UNet's attention_levels became transformer_layers: such a run is not resumed."""
    config = TrainConfig(task=BackboneTask(style_in_caption=True), run=tmp_path / "run", steps=5)
    remember(config)
    (config.run / "checkpoints" / "2").mkdir(parents=True)
    values = read_json(config.run / "config.json")
    for name in ("num_train_timesteps", "beta_end"):  # which came later, with the values that there were
        assert values["task"].pop(name) == getattr(config.task.schedule, name)
    assert values["data"].pop("balance") is None
    values["task"]["unet"]["attention_levels"] = [True, True, True, False]
    del values["task"]["unet"]["transformer_layers"]
    write_json(config.run / "config.json", {**values, "digest": "of another version"})
    message = r"task.unet.attention_levels, which an older version had, task.unet.transformer_layers, which is new\)"
    with pytest.raises(UserError, match=rf"other settings \({message}"):
        remember(config)
