"""A backbone trained on pixels, without an autoencoder; and one whose UNet adds a pooled text and size ids."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig
from bdm_jax.models.functional import init
from bdm_jax.paths import EMOJI, TOKENIZERS
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.loop import train
from bdm_jax.training.objectives.backbone import BackboneTask
from bdm_jax.training.objectives.branch import BranchTask

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    sample_size=16,
    block_out_channels=(8, 16),
    transformer_layers=(0, 1),
    layers_per_block=1,
    num_heads=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def task():
    """A UNet of pixels, 16 x 16, and a text encoder of the bundled English tokenizer."""
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / "english")
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=tokenizer.length,
        bos_token_id=tokenizer.start,
        eos_token_id=tokenizer.end,
        pad_token_id=tokenizer.pad,
        **TEXT,
    )
    return BackboneTask(unet=UNET, text_encoder=text, vae=None)


def test_the_schedule_is_the_tasks(task):
    """Kolors' second phase: the last alpha^2 as computed from its published config."""
    kolors = replace(task, num_train_timesteps=1100, beta_end=0.014, prediction_type="epsilon").schedule
    assert len(kolors.alphas_cumprod) == 1100 and kolors.alphas_cumprod[-1] == pytest.approx(1.1827e-3, abs=1e-7)
    assert (
        task.schedule.alphas_cumprod[-1] == pytest.approx(4.6601e-3, abs=1e-7)
        and len(task.schedule.noise_levels) == 1000
    )


def test_pixels_are_trained_on_drawn_and_saved(task, tmp_path):
    """A few steps bring the loss down; the folder opens as a system without a vae, and draws images of 16 x 16."""
    config = TrainConfig(
        task=task,
        run=tmp_path / "run",
        steps=12,
        batch_size=4,
        log_every=4,
        sample_every=1000,
        checkpoint_every=1000,
        data=DataConfig(style="fluent", concepts=40),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=1),
    )
    assert train(config)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] < 0.8 * rows[0]
    assert (tmp_path / "run" / "samples" / "0000012.png").is_file()
    system = BridgePipeline.from_pretrained(tmp_path / "run" / "export", "float32")
    assert system.family.name == "pixels" and system.vae is None and system.factor == 1
    (image,) = generate(system, [Request("", english="red apple", seed=1)], Sampling(steps=4))
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and image.std() > 0


def test_the_noisy_pixels_are_those_of_the_image(task, tmp_path):
    """At the first timestep almost nothing but the image, scaled to [-1,1]."""
    objective = replace(task, prediction_type="epsilon").objective(task.sizes())
    source = open_source(EMOJI)
    images = np.stack([resize_to_cover(decode_image(source[i]["image"]), (16, 16)) for i in range(3)])
    batch = {"image": images, "place": np.arange(3, dtype=np.int32)}
    first = replace(objective.denoising.schedule, num_train_timesteps=1)  # all draws are timestep 0
    x, t, noise = replace(objective.denoising, schedule=first).noised(batch, jax.random.key(0))
    alpha, sigma = first.alpha_sigma(t)
    assert not np.any(t) and float(sigma.max()) < 0.05
    np.testing.assert_allclose((x - sigma * noise) / alpha, images / 127.5 - 1, atol=1e-5)


def test_a_unet_of_latents_cannot_train_on_pixels(task, tmp_path):
    config = TrainConfig(
        task=replace(task, unet=replace(UNET, in_channels=4)), run=tmp_path, steps=1, data=DataConfig(style="fluent")
    )
    with pytest.raises(UserError, match="task.vae=None trains on pixels: task.unet needs 3 channels in and out, not 4"):
        train(config)


def added(unet, pooled):
    """The UNet with SDXL's additions: a pooled text and six size ids of 8 channels each."""
    return replace(unet, addition_time_embed_dim=8, projection_class_embeddings_input_dim=pooled + 48)


def test_a_pooled_text_and_size_ids_reach_the_unet(task):
    """The loss depends on what makes the pooled text alone, and on the image's size through the size ids."""
    task = replace(task, unet=added(UNET, 12), text_encoder=replace(task.text_encoder, projection_dim=12))
    objective = task.objective(task.sizes())
    params = {name: init(task.sizes()[name], 0) for name in ("unet", "text_encoder")}
    ids = Tokenizer.from_pretrained(TOKENIZERS / "english")(["a dog", "red"])
    x, t = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([10, 500])

    def predict(projection, x):
        changed = {**params["text_encoder"], "text_projection.kernel": projection}
        return objective.predict({**params, "text_encoder": changed}, {}, ids, x, t)

    projection = params["text_encoder"]["text_projection.kernel"]
    assert np.abs(predict(projection, x) - predict(0 * projection, x)).max() > 1e-3
    small = objective._with_sizes(objective._read(params, {}, ids, x), "unet", x[:, :8])
    np.testing.assert_array_equal(small.time_ids, [[8, 16, 0, 0, 8, 16]] * 2)


def test_a_branch_of_such_a_backbone_reads_the_first_state_as_its_pooled_text():
    """Traced from configs alone: BDM-SDXL's form of a branch, the backbone's own pooled text of the prompt ""."""
    sizes = {
        "unet": added(replace(UNET, in_channels=4, out_channels=4), 12),
        "vae": VAEConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2),
        "text_encoder": CLIPTextConfig(max_position_embeddings=7, **TEXT),
        "branch_text_encoder": RobertaConfig(max_position_embeddings=16, **TEXT),
    }
    task = BranchTask(tokenizer=TOKENIZERS / "chinese")
    objective = task.objective(task.sizes(lambda name, _: sizes[name]))
    trained, frozen = objective.shapes()
    assert frozen["empty"].tokens.shape == (1, 7, 16) and frozen["empty"].pooled.shape == (1, 12)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), objective.row(32))
    loss = jax.eval_shape(lambda p, f, b: objective.loss(p, f, b, jax.random.key(0))[0], trained, frozen, batch)
    assert loss.shape == () and loss.dtype == jnp.float32
    branch = objective.sizes["branch"]
    assert branch.prompt_embeds_dim == branch.pooled_prompt_embeds_dim == 16
