"""ControlNets made here: no effect at step 0, a step is diffusers', and the folder is one that diffusers opens."""

from dataclasses import replace

import cv2
import diffusers
import numpy as np
import pytest
import reference
import torch
from reference import System, assert_same_step, key_of, scaling, step

from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.models.functional import bind
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.systems.components import load_component
from bdm_jax.training.config import DataConfig, TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.controlnet import ControlNetTask, Hints

DATA = DataConfig(style="fluent", concepts=40)
WIDTHS = (4, 4, 6, 6, 8)


def task_for(folder, **fields):
    return ControlNetTask(**{"model": folder, "hint_widths": WIDTHS, "caption_dropout": 0.0, **fields})


@pytest.fixture
def made(backbone_folder, tmp_path):
    return reference.start(task_for(backbone_folder), tmp_path / "run", DATA)


def test_at_step_0_it_changes_nothing(made, backbone_folder, rng):
    job, batch = made
    assert batch["hint"].shape == (4, 128, 128, 3) and set(np.unique(batch["hint"])) == {0, 255}
    x, t = rng.standard_normal((4, 8, 8, 4), np.float32), np.array([0, 10, 500, 999])
    sizes = job.objective.system.sizes
    text = Conditioning(bind(sizes["text_encoder"], job.frozen["text_encoder"])(batch["texts"]["backbone"]))
    plain = bind(sizes["unet"], job.frozen["unet"])(x, t, text)
    np.testing.assert_array_equal(job.objective.predict(job.params, job.frozen, batch, x, t), plain)


def test_it_begins_as_diffusers_from_unet(made, backbone_folder):
    job, _ = made
    theirs = diffusers.ControlNetModel.from_unet(System(backbone_folder).unet, "rgb", WIDTHS).state_dict()
    ours = tree_to_torch(job.params["controlnet"])
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        if not name.startswith("controlnet_cond_embedding"):
            np.testing.assert_array_equal(ours[name], value.numpy(), err_msg=name)
    assert not np.any(ours["controlnet_cond_embedding.conv_out.weight"])


def test_a_step_is_diffusers(made, backbone_folder, rng):
    """From zero convolutions that are no longer zero, so that every tensor has a gradient."""
    job, batch = made
    params = {
        "controlnet": {
            path: value + 0.05 * rng.standard_normal(value.shape, np.float32)
            for path, value in job.params["controlnet"].items()
        }
    }
    gradients, after = step(job, batch, params)
    system = System(backbone_folder)
    network = diffusers.ControlNetModel.from_unet(system.unet, "rgb", WIDTHS)
    network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in tree_to_torch(params["controlnet"]).items()})
    hint = torch.from_numpy(batch["hint"]).permute(0, 3, 1, 2) / 255

    def residuals(noisy, t, states):
        down, mid = network(noisy, t, encoder_hidden_states=states, controlnet_cond=hint, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    with torch.enable_grad():
        network.requires_grad_(True).eval()
        factor = scaling(job)
        system.loss(batch["moments"], batch["texts"]["backbone"], factor, key_of(), residuals).backward()
    weights = dict(network.named_parameters())
    theirs = {name: weight.grad.numpy().copy() for name, weight in weights.items()}
    reference.adamw(weights.values())
    ours, moved = (tree_to_torch(tree["controlnet"]) for tree in (gradients, after))
    assert_same_step((n, ours[n], theirs[n], moved[n], weight.detach().numpy()) for n, weight in weights.items())


def test_the_folder_is_diffusers_and_the_backbone_stays(backbone_folder, tmp_path, rng, assert_parity):
    run = tmp_path / "run"
    optimizer = replace(reference.OPTIMIZER, learning_rate=0.05)
    config = TrainConfig(
        task=task_for(backbone_folder), run=run, steps=2, batch_size=2, log_every=1, data=DATA, optimizer=optimizer
    )
    assert train(config)
    assert (run / "samples" / "0000002.png").is_file()
    ours = load_component(run / "export" / "controlnet", "float32", "controlnet")
    theirs = diffusers.ControlNetModel.from_pretrained(run / "export" / "controlnet", torch_dtype=torch.float32)
    x, t = rng.standard_normal((1, 8, 8, 4), np.float32), np.array([500])
    states = rng.standard_normal((1, 16, 16), np.float32)
    hint = rng.random((1, 128, 128, 3), np.float32)
    found = bind(*ours)(x, t, Conditioning(states), hint)
    down, mid = theirs(
        reference.nchw(x),
        torch.from_numpy(t),
        encoder_hidden_states=torch.from_numpy(states),
        controlnet_cond=reference.nchw(hint),
        return_dict=False,
    )
    for one, other in zip((*found.skips, found.mid), (*down, mid), strict=True):
        assert_parity(one, other.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(found.mid)).max() > 1e-3, "it was trained"


def test_a_ready_map_and_an_image_of_another_size(backbone_folder, tmp_path):
    record = open_source(DATA.folder)[0]
    _, batch = reference.start(task_for(backbone_folder, hint_column="image"), tmp_path / "other", DATA)
    assert batch["hint"].shape == (4, 128, 128, 3)
    canny, ready = Hints((128, 128), "canny", None), Hints((128, 128), "canny", "image")
    big = cv2.imencode(".png", np.zeros((300, 200, 3), np.uint8))[1].tobytes()
    assert ready({**record, "image": big}).shape == canny({**record, "image": big}).shape == (128, 128, 3)
    with pytest.raises(UserError, match="field depth holds no image"):
        Hints((128, 128), "canny", "depth")(record)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hint": "cany"}, "did you mean 'canny'"),
        ({"hint_widths": (16, 32, 96, 256)}, "5 widths are needed, for maps 16 times as large"),
    ],
)
def test_bad_input_is_named(backbone_folder, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        reference.start(task_for(backbone_folder, **fields), tmp_path / "run", DATA)
