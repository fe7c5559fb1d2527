"""Training on SDXL: a branch's step is PyTorch's, texts are read as they are where it draws, a run goes through."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from bridge import noisy
from reference import SystemXL, assert_same_gradients, key_of, scaling
from sdxl import CHINESE, JOINT, ChineseTexts, ControlNetBDM

from bdm_jax.errors import UserError
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.models.functional import abstract, bind, init
from bdm_jax.plugins.lora import load_lora
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.branch import BranchTask
from bdm_jax.training.objectives.finetune import FinetuneTask
from bdm_jax.training.objectives.inversion import InversionTask
from bdm_jax.training.objectives.lora import LoRATask
from bdm_jax.training.objectives.reading import of_tokenizers, reading_of

DATA = DataConfig(style="noto", concepts=40)


@pytest.fixture(scope="module")
def backbone(sdxl_folder, tmp_path_factory):
    """The tiny SDXL with a UNet of one level, which compiles in half the time."""
    system = BridgePipeline.from_pretrained(sdxl_folder)
    one = dict(block_out_channels=(16,), transformer_layers=(1,), num_heads=(2,))
    config = replace(system.unet.config, **one, projection_class_embeddings_input_dim=24 + 6 * 8)
    folder = tmp_path_factory.mktemp("sdxl") / "backbone"
    unet = Component(config, noisy(init(config, 1), 1))
    system.replace(unet=unet).save_pretrained(folder, "float32")
    return folder


@pytest.fixture(scope="module")
def task(backbone, sdxl_bridge_folder):
    """A branch on it, reading the tiny towers."""
    names = {"text_encoder": "branch_text_encoder", "text_encoder_2": "branch_text_encoder_2"}
    folders = {field: sdxl_bridge_folder / part for field, part in {**names, "tokenizer": "branch_tokenizer"}.items()}
    return BranchTask(backbone=backbone, **folders)


def test_a_step_of_a_branch_is_torch_s(task, sdxl_bridge_folder, load_chinese_tower, rng, tmp_path):
    """Its loss and gradients: those of diffusers' UNet, 360's branch and transformers' towers."""
    job, batch = reference.start(task, tmp_path / "run", DATA)
    assert batch["texts"]["branch"].shape == (reference.BATCH, 16)
    params = {
        "branch": {
            path: value + 0.05 * rng.standard_normal(value.shape, np.float32)
            for path, value in job.params["branch"].items()
        }
    }
    loss = jax.jit(jax.value_and_grad(lambda p: job.objective.loss(p, job.frozen, batch, key_of())[0]))
    value, gradients = loss(params)
    system, config = SystemXL(task.backbone), job.objective.sizes["branch"]
    assert (config.prompt_embeds_dim, config.pooled_prompt_embeds_dim) == (sum(CHINESE), JOINT)
    branch = ControlNetBDM.of(config)
    state = tree_to_torch(params["branch"])
    branch.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    texts = ChineseTexts(sdxl_bridge_folder, load_chinese_tower)
    states, pooled = texts(torch.from_numpy(np.asarray(batch["texts"]["branch"])).long())
    with torch.enable_grad():
        theirs = system.loss(
            batch["moments"], scaling(job), key_of(), 16, 8, lambda x, t, sizes: branch(x, t, states, pooled, sizes)
        )
        theirs.backward()
    ours, weights = tree_to_torch(gradients["branch"]), dict(branch.named_parameters())
    assert ours.keys() == weights.keys() and float(value) == pytest.approx(float(theirs), rel=1e-5)
    assert_same_gradients([(name, ours[name], weight.grad.numpy()) for name, weight in weights.items()])


@pytest.mark.parametrize("source", ["backbone", "branch"])
def test_texts_are_read_as_where_it_draws(source, sdxl_bridge, assert_parity):
    """Two tokenizers and penultimate layers, zeros for an empty prompt; two towers of one tokenizer, hidden padding."""
    masked, texts = source == "branch", ["red lantern 红灯笼", ""]
    reader = sdxl_bridge.readers[source]
    network = sdxl_bridge.unet if source == "backbone" else sdxl_bridge.branch
    sizes = {name: part.config for name, part in sdxl_bridge.networks.items()}
    reading = of_tokenizers(reading_of(reader, network.config, sizes), sdxl_bridge.tokenizers, masked)
    tokens = readers.read(reader, sdxl_bridge.parts, texts, masked=masked)
    expected = readers.encode(reader, sdxl_bridge.parts, tokens)
    ids = [one.ids[:, 0] for one in tokens][: len(reader.tokenizers)]
    ids = np.stack(ids, axis=1) if len(ids) > 1 else ids[0]
    assert ids.shape[1:] == reading.shape

    @jax.jit
    def read(params):
        return reading(lambda name: bind(sizes[name], params[name]), ids, jnp.float32)

    found = read({name: sdxl_bridge.parts[name].params for name in reader.encoders})
    assert_parity(found.tokens, expected.tokens)
    assert_parity(found.pooled, expected.pooled)
    if masked:
        np.testing.assert_array_equal(found.mask, expected.mask)
    else:
        assert found.mask is None and not np.any(found.tokens[1]) and not np.any(found.pooled[1])


@pytest.mark.parametrize(
    ("kind", "fields", "trained"),
    [
        (FinetuneTask, {"text_encoder": True}, {"unet", "text_encoder", "text_encoder_2"}),
        (LoRATask, {"networks": "both"}, {"unet_lora", "text_encoder_lora", "text_encoder_2_lora"}),
        (LoRATask, {"target": "branch", "networks": "both"},
         {"branch_lora", "branch_text_encoder_lora", "branch_text_encoder_2_lora"}),
    ],
)  # fmt: skip
def test_other_kinds_of_training(kind, fields, trained, sdxl_bridge_folder, tmp_path):
    """Traced: what is foretold is what is made, and every trained array has a gradient."""
    task = kind(model=sdxl_bridge_folder, **fields)
    job, batch = reference.start(task, tmp_path / "run", DATA)
    source = "branch" if "target" in fields else "backbone"
    assert batch["texts"][source].shape == ((4, 16) if source == "branch" else (4, 2, 16))
    foretold = task.objective(task.sizes()).shapes()
    for ours, expected in zip((job.params, job.frozen), foretold, strict=True):
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
    assert job.params.keys() == trained
    loss = jax.grad(lambda p: job.objective.loss(p, job.frozen, batch, jax.random.key(0))[0])
    assert jax.tree.map(jnp.shape, jax.eval_shape(loss, job.params)) == jax.tree.map(jnp.shape, job.params)
    if kind is LoRATask:  # each text encoder's layers under a name of its own, which is read again
        job.export(job.params, tmp_path / "style" / "export", {})
        (path,) = (tmp_path / "style" / "export").iterdir()
        names = [name.removesuffix("_lora") for name in trained]
        networks = {name: abstract(job.objective.sizes[name]) for name in names}
        assert load_lora(path, networks).deltas.keys() == networks.keys()


@pytest.mark.slow
def test_a_run_goes_through(task, tmp_path):
    """Trained, sampled and exported: a whole BDM-SDXL, whose towers are read as the run read them."""
    towers = '[{"encoder": "branch_text_encoder_2", "pooled": "raw"}, {"encoder": "branch_text_encoder", "layer": 2}]'
    config = TrainConfig(
        task=replace(task, towers=towers, guidance=4.0),
        run=tmp_path / "run",
        steps=1,
        batch_size=2,
        sample_every=1000,
        data=DataConfig(style="fluent", concepts=20),
        optimizer=OptimizerConfig(warmup_steps=1),
    )
    assert train(config)
    assert (tmp_path / "run" / "samples" / "0000001.png").is_file()
    system = BridgePipeline.from_pretrained(tmp_path / "run" / "export", "float32")
    assert system.family.name == "sdxl" and system.guidance == 4.0
    assert [(one.encoder, one.layer, one.pooled) for one in system.branch_towers] == [
        ("branch_text_encoder_2", 1, "raw"),
        ("branch_text_encoder", 2, False),
    ]
    assert system.branch.config.pooled_prompt_embeds_dim == CHINESE[1]
    assert BranchTask().beside(tmp_path / "run" / "export")["towers"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_encoder_2": None}, "task.text_encoder_2: a branch of SDXL needs one: give --task.text-encoder-2"),
        ({"towers": "[]"}, "task.towers: _bdm_branch_towers: expected a list"),
        ({"towers": "["}, "task.towers=.*: no JSON"),
        ({"family": "sdx"}, "unknown task.family 'sdx': did you mean 'sdxl'"),
    ],
)
def test_bad_input_is_named(fields, message, task):
    with pytest.raises(UserError, match=message):
        replace(task, **fields).sizes()


def test_a_word_is_trained_for_one_encoder(sdxl_folder):
    task = InversionTask(model=sdxl_folder)
    with pytest.raises(UserError, match="SDXL reads with text_encoder and text_encoder_2; a word is trained for one"):
        task.objective(task.sizes())
