"""Kolors' UNet and a LoRA of it are trained by its row, and ChatGLM reads Chinese for a branch of SD1.5."""

import jax
import jax.numpy as jnp
import kolors
import numpy as np
import pytest
import reference
from bdm_jax.convert.text_states import text_states

from bdm_jax.errors import UserError
from bdm_jax.models.functional import bind
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers
from bdm_jax.training.config import DataConfig
from bdm_jax.training.objectives.branch import BranchTask
from bdm_jax.training.objectives.finetune import FinetuneTask
from bdm_jax.training.objectives.lora import LoRATask
from bdm_jax.training.objectives.reading import of_tokenizers, reading_of

DATA = DataConfig(style="noto", concepts=40)
TOWERS = '[{"encoder": "branch_text_encoder", "layer": 2}]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("kolors")
    kolors.tiny(tmp_path_factory.mktemp("tokenizer"), request.config.option.seed).save_pretrained(folder)
    return folder


def traced(task, run):
    """A training made ready, whose loss has a gradient for all that is trained, in the shapes that were foretold."""
    job, batch = reference.start(task, run, DATA)
    foretold = task.objective(task.sizes()).shapes()
    for ours, expected in zip((job.params, job.frozen), foretold, strict=True):
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
    gradient = jax.grad(lambda p: job.objective.loss(p, job.frozen, batch, jax.random.key(0))[0])
    assert jax.tree.map(jnp.shape, jax.eval_shape(gradient, job.params)) == jax.tree.map(jnp.shape, job.params)
    return job, batch


def test_both_phases(folder, tmp_path):
    """The first has SDXL's schedule and fresh weights, the second the model's own; what is written says which."""
    fields = {"model": folder, "captions": "zh"}
    first, batch = traced(FinetuneTask(fresh=True, schedule="sdxl", **fields), tmp_path / "first")
    assert first.params.keys() == {"unet"} and batch["texts"]["backbone"].shape == (4, 256)
    first.export(first.params, tmp_path / "export", {})
    concept, whole = (BridgePipeline.from_pretrained(path, "float32") for path in (tmp_path / "export", folder))
    assert concept.schedule.num_train_timesteps == 1000 and whole.schedule.num_train_timesteps == 1100
    assert first.objective.denoising.schedule == concept.schedule
    kernel = "conv_in.kernel"
    assert np.abs(concept.unet.params[kernel] - whole.unet.params[kernel]).max() > 0.01
    second = FinetuneTask(**{**fields, "model": tmp_path / "export"}, schedule="kolors")
    job, _ = reference.start(second, tmp_path / "second", DATA)
    assert job.objective.denoising.schedule == whole.schedule
    np.testing.assert_array_equal(job.params["unet"][kernel], concept.unet.params[kernel])
    with pytest.raises(UserError, match="unknown task.schedule 'sdx': did you mean 'sdxl'"):
        reference.start(FinetuneTask(schedule="sdx", **fields), tmp_path / "third", DATA)


@pytest.mark.parametrize("beforehand", [False, True], ids=["tower", "states"])
def test_texts_are_read_as_where_it_draws(beforehand, folder, tmp_path, assert_parity):
    """Padding first and read too, penultimate states, pooled text; of the tower, and of what was kept of it."""
    texts, parts = ["红灯笼", ""], {}
    if beforehand:
        (kept,) = text_states(folder, tmp_path / "kept", texts[:1])
        parts = {"text_encoder": kept / "text_encoder"}
    system = BridgePipeline.from_pretrained(folder, "float32", **parts)
    reader, sizes = system.readers["backbone"], {name: part.config for name, part in system.networks.items()}
    tokens = readers.read(reader, system.parts, texts)
    expected = readers.encode(reader, system.parts, tokens)
    reading = of_tokenizers(reading_of(reader, system.unet.config, sizes), system.tokenizers)
    params = system.text_encoder.params
    read = jax.jit(lambda p: reading(lambda name: bind(sizes[name], p), tokens[0].ids[:, 0], jnp.float32))
    found = read(params)
    assert_parity(found.tokens, expected.tokens)
    assert_parity(found.pooled, expected.pooled)


def test_a_lora_of_both(folder, tmp_path):
    task = LoRATask(model=folder, captions="zh", networks="both", rank=2, text_modules="query_key_value")
    job, _ = traced(task, tmp_path / "run")
    assert job.params["text_encoder_lora"]["encoder.layers.2.self_attention.query_key_value.up.kernel"].shape == (
        2,
        128,
    )


def test_a_branch_of_sd15_that_reads_with_chatglm(folder, backbone_folder, tmp_path):
    """Through a layer to the backbone's width; exported, it draws from Chinese as it was trained."""
    fields = {"backbone": backbone_folder, "text_encoder": folder / "text_encoder", "tokenizer": folder / "tokenizer"}
    task = BranchTask(**fields, towers=TOWERS, context=16)
    job, batch = traced(task, tmp_path / "run")
    assert batch["texts"]["branch"].shape == (4, 256)
    assert job.params["branch"]["encoder_hid_proj.kernel"].shape == (kolors.WIDTH, 16)
    job.export(job.params, tmp_path / "export", {})
    system = BridgePipeline.from_pretrained(tmp_path / "export", "float32")
    assert system.family.name == "sd15" and system.branch.config.encoder_hid_dim == kolors.WIDTH
    assert system.branch_towers[0].layer == 2 and system.branch_tokenizer.format.left
    (image,) = generate(system, [Request("红灯笼")], Sampling(steps=1))
    assert image.std() > 0
