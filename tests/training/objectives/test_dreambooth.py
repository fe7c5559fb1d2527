"""DreamBooth and fine-tuning: a step is PyTorch's, the class is kept by its own pictures, the rest stays as it was."""

from dataclasses import replace

import diffusers
import jax
import numpy as np
import pytest
import reference
import torch
from PIL import Image
from reference import System, assert_same_step, key_of, scaling, step

from bdm_jax.errors import UserError
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.systems.components import load_component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.config import DataConfig, TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.dreambooth import DreamBoothTask
from bdm_jax.training.objectives.finetune import FinetuneTask

DATA = DataConfig(style="noto")
ONLY = ("1f408-200d-2b1b",)


@pytest.fixture
def class_images(tmp_path, rng):
    """Six pictures, of other sizes than the model's."""
    folder = tmp_path / "class"
    folder.mkdir()
    for number in range(6):
        pixels = rng.integers(0, 256, (140, 160 + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return folder


def dreambooth(model, **fields):
    return DreamBoothTask(model=model, prompts=("a sks cat",), class_prompt="a cat", only=ONLY, **fields)


@pytest.mark.parametrize("tower", [True])
def test_a_step_is_pytorch_s(backbone_folder, class_images, tmp_path, tower):
    """diffusers' script: subject and class in one pass, their mean errors added, both networks' gradients clipped."""
    task = dreambooth(backbone_folder, class_images=class_images, prior_weight=0.7, text_encoder=tower)
    job, batch = reference.start(task, tmp_path / "run", DATA)
    with np.load(tmp_path / "run" / "class-latents.npz") as cached:
        assert cached["moments"].shape == (6, 8, 8, 8)
    gradients, after = step(job, batch, job.params)
    system, factor = System(backbone_folder), scaling(job)
    with torch.enable_grad():
        networks = {"unet": system.unet, "text_encoder": system.text}
        for network in networks.values():
            network.requires_grad_(True)
        noisy = [
            system.noised(batch["moments"], factor, key_of()),
            system.noised(batch["class_moments"], factor, jax.random.fold_in(key_of(), 3)),
        ]
        x, t, target = (torch.cat(pair) for pair in zip(*noisy, strict=True))
        ids = torch.from_numpy(np.concatenate([batch["texts"]["backbone"], batch["class_ids"]])).long()
        predicted = system.unet(x, t, encoder_hidden_states=system.text(ids).last_hidden_state).sample
        subject, prior = torch.chunk(predicted, 2)
        target, target_prior = torch.chunk(target, 2)
        mse = torch.nn.functional.mse_loss
        (mse(subject, target) + 0.7 * mse(prior, target_prior)).backward()
    weights = {
        (part, name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"): parameter
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    theirs = {name: parameter.grad.numpy().copy() for name, parameter in weights.items()}
    reference.adamw(weights.values())
    ours = {part: tree_to_torch(tree) for part, tree in gradients.items()}
    moved = {part: tree_to_torch(tree) for part, tree in after.items()}
    assert {part: set(tree) for part, tree in ours.items()} == {
        part: {name for other, name in weights if other == part} for part in networks
    }
    assert_same_step(
        (f"{part} {name}", ours[part][name], theirs[part, name], moved[part][name], weight.detach().numpy())
        for (part, name), weight in weights.items()
    )


def test_without_prior_it_is_fine_tuning(backbone_folder, tmp_path):
    fields = {"model": backbone_folder, "prompts": ("a sks cat",), "only": ONLY, "caption_dropout": 0.0}
    found = []
    for task in (DreamBoothTask(prior_weight=0.0, **fields), FinetuneTask(**fields)):
        job, batch = reference.start(task, tmp_path / type(task).__name__, DATA)
        found.append(
            jax.jit(lambda p, job=job, batch=batch: job.objective.loss(p, job.frozen, batch, key_of()))(job.params)[0]
        )
    assert found[0] == found[1]


def digest(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_draws_its_class_and_writes_a_backbone(backbone_folder, tmp_path):
    """The class's pictures are drawn once; of the folder written, only the UNet is another."""
    before = digest(backbone_folder)
    task = dreambooth(backbone_folder, class_count=3)
    optimizer = replace(reference.OPTIMIZER, learning_rate=0.01)
    config = TrainConfig(
        task=task, run=tmp_path / "run", steps=2, batch_size=2, log_every=1, data=DATA, optimizer=optimizer
    )
    assert not train(replace(config, minutes=1e-6))
    drawn = digest(tmp_path / "run" / "class-images")
    assert sorted(drawn) == ["00000.png", "00001.png", "00002.png"]
    assert train(config)
    assert digest(tmp_path / "run" / "class-images") == drawn and digest(backbone_folder) == before
    written = digest(tmp_path / "run" / "export")
    assert {name for name in written if written[name] != before.get(name)} == {
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert set(before) == set(written)
    plain, ours = (BridgePipeline.from_pretrained(folder) for folder in (backbone_folder, tmp_path / "run" / "export"))
    assert any(not np.array_equal(plain.unet.params[path], ours.unet.params[path]) for path in ours.unet.params)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "run" / "export" / "unet")
    tensors = tree_to_torch(ours.unet.params)
    assert all(np.array_equal(value.float().numpy(), tensors[name]) for name, value in theirs.state_dict().items())


def test_frozen_trees_stay_byte_for_byte(backbone_folder, tmp_path):
    task = FinetuneTask(model=backbone_folder)
    job, batch = reference.start(task, tmp_path / "run", replace(DATA, concepts=40))
    assert set(job.params) == {"unet"} and set(job.frozen) == {"text_encoder"}
    before = {path: np.asarray(value).tobytes() for path, value in job.frozen["text_encoder"].items()}
    step(job, batch, job.params)
    assert {path: np.asarray(value).tobytes() for path, value in job.frozen["text_encoder"].items()} == before
    same = load_component(backbone_folder / "unet", "float32").params
    assert all(np.array_equal(same[path], value) for path, value in job.params["unet"].items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prior_weight": -1.0}, "task.prior_weight=-1.0"),
        ({"class_count": 0}, "task.class_count=0"),
    ],
)
def test_bad_input_is_named(backbone_folder, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        reference.start(dreambooth(backbone_folder, **fields), tmp_path / "run", DATA)


def test_an_empty_class_folder_is_named(backbone_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no records"):
        reference.start(dreambooth(backbone_folder, class_images=tmp_path / "empty"), tmp_path / "run", DATA)
