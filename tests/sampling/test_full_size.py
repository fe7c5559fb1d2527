"""SD1.5 with BDM's branch at their real sizes, random weights: files that PyTorch wrote, used directly."""

import gc
import json
import re
import subprocess
import sys

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from bdm_jax.convert.conversion import to_torch
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.formats.layouts import fit, tree_to_torch
from bdm_jax.formats.networks.autoencoders import OLD_VAE, ldm_vae
from bdm_jax.formats.networks.bert import CHINESE_TEXT
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.unet import BRANCH, ldm_controlnet, ldm_unet
from bdm_jax.formats.tables import PLAIN
from bdm_jax.formats.weights import read_weights
from bdm_jax.latents.autoencoder import decode
from bdm_jax.models import config as configs
from bdm_jax.models.functional import abstract
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import tokenize

pytestmark = [pytest.mark.slow, pytest.mark.large]

PLAN = configs.SD15_UNET.transformer_layers, configs.SD15_UNET.layers_per_block
LAYOUTS = {
    "diffusers unet": (configs.SD15_UNET, PLAIN),
    "ldm unet": (configs.SD15_UNET, ldm_unet(*PLAN)),
    "diffusers vae": (configs.SD15_VAE, PLAIN),
    "old vae": (configs.SD15_VAE, OLD_VAE),
    "ldm vae": (configs.SD15_VAE, ldm_vae(4, 2)),
    "clip": (configs.CLIP_L_TEXT, CLIP_TEXT),
    "diffusers controlnet": (configs.SD15_CONTROLNET, PLAIN),
    "original controlnet": (configs.SD15_CONTROLNET, ldm_controlnet(*PLAN)),
    "branch": (configs.BDM_BRANCH, BRANCH),
    "chinese": (configs.CHINESE_CLIP_H_TEXT, CHINESE_TEXT),
    "taesd": (configs.TAESD, PLAIN),
}


@pytest.fixture(scope="module")
def numbers(request):
    """More random fp32 numbers than the largest tensor has: every tensor below is a window on them."""
    return np.random.default_rng(request.config.option.seed).standard_normal(2**26, np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_bit_for_bit(name, dtype, numbers):
    config, table = LAYOUTS[name]
    numbers, expected = numbers.astype(dtype), abstract(config)
    zeros = {key: np.broadcast_to(dtype(0), leaf.shape) for key, leaf in expected.items()}
    shapes = {key: array.shape for key, array in tree_to_torch(zeros, table).items()}
    begin = iter(range(len(shapes)))
    file = {
        key: numbers[(start := next(begin)) : start + int(np.prod(shape))].reshape(shape)
        for key, shape in shapes.items()
    }
    found = fit(file, expected, table)
    assert found.tree.keys() == expected.keys()
    assert not (found.missing or found.unknown or found.misshaped or found.ignored or found.duplicates)
    back = tree_to_torch(found.tree, table)
    assert back.keys() == file.keys()
    for key, array in file.items():
        assert back[key].dtype == array.dtype and back[key].shape == array.shape
        assert back[key].tobytes() == array.tobytes(), key
    again = fit(back, expected, table).tree
    assert all(again[key].tobytes() == array.tobytes() for key, array in found.tree.items() if array.size < 10**6)


def half(make, folder, seed, **kind):
    """A module of PyTorch's with random weights, saved as fp16."""
    torch.manual_seed(seed)
    make().half().save_pretrained(folder, **kind)
    gc.collect()


@pytest.fixture(scope="module")
def sd15(tmp_path_factory, request):
    """A folder as PyTorch users have it, written by diffusers and transformers: fp16, the branch as a ControlNet."""
    folder, seed = tmp_path_factory.mktemp("sd15"), request.config.option.seed
    encoder = dict(cross_attention_dim=768, attention_head_dim=8)
    half(lambda: diffusers.UNet2DConditionModel(**encoder, sample_size=64), folder / "unet", seed)
    values = {k: v for k, v in configs.to_json(configs.SD15_VAE).items() if k != "_class_name"}
    half(lambda: diffusers.AutoencoderKL(**values), folder / "vae", seed + 1)
    clip = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    half(lambda: transformers.CLIPTextModel(clip), folder / "text_encoder", seed + 2)
    half(branch, folder / "branch", seed + 3)
    values = {k: v for k, v in configs.to_json(configs.CHINESE_CLIP_H_TEXT).items() if k != "architectures"}

    def chinese():
        return ChineseCLIPTextModel(transformers.ChineseCLIPTextConfig(**values), add_pooling_layer=False)

    half(chinese, folder / "branch_text_encoder", seed + 4)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, final_sigmas_type="zero"
    )
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def branch():
    """A branch with cross width 1024 whose output convolutions are not zero and whose hint network is."""
    model = diffusers.ControlNetModel(cross_attention_dim=1024)
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_cond_embedding"):
            torch.nn.init.zeros_(parameter)
        elif name.startswith("controlnet_") and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.filterwarnings("ignore:.*the hint network in it is left out")
def test_five_steps_equal_diffusers(sd15, tmp_path, monkeypatch):
    """256 x 256, DPM++ 2M, guidance 7.5, a Chinese and an English prompt; the backbone from an LDM single file.

    fp32 on both sides; five steps of random networks multiply rounding, 1e-3 of the largest latent is what is asked.
    """
    (single,) = to_torch(sd15_backbone(sd15, tmp_path), tmp_path / "sd15.safetensors", "ldm")
    pipeline = BridgePipeline.from_pretrained(
        single, branch=sd15 / "branch", branch_text_encoder=sd15 / "branch_text_encoder"
    )
    assert (pipeline.tokenizer.length, pipeline.branch_tokenizer.length) == (77, 52)
    request, steps, size = Request("水墨山水，一叶扁舟", "低质量", "film grain", "blurry", seed=7), 5, (256, 256)
    seen = []
    monkeypatch.setattr(module, "decode", lambda vae, x, tile: seen.append(x) or decode(vae, x, tile))
    (picture,) = generate(pipeline, [request], Sampling(steps, guidance=7.5, size=size))
    ours = np.asarray(seen[0])[0]
    noise = np.asarray(jax.random.normal(jax.random.key(7), (32, 32, 4)))
    english = tokenize(pipeline.tokenizer, [request.english_negative, request.english])[:, 0]
    chinese = tokenize(pipeline.branch_tokenizer, [request.negative, request.prompt])[:, 0]
    del pipeline
    gc.collect()
    latents, image = plain_loop(sd15, single, english, chinese, noise, steps)
    assert np.abs(ours - latents).max() <= 1e-3 * np.abs(latents).max()
    assert np.abs(picture.astype(np.float32) - image).mean() < 1.0
    assert latents.std() > 0.1 and image.std() > 1.0


def plain_loop(sd15, single, english, chinese, noise, steps):
    """The same with diffusers' own reader of single files, networks and scheduler: latents and picture (H,W,C)."""
    load = dict(config=str(sd15 / "unet"), local_files_only=True, torch_dtype=torch.float32)
    unet = diffusers.UNet2DConditionModel.from_single_file(str(single), **load).eval()
    control = diffusers.ControlNetModel.from_pretrained(sd15 / "branch", torch_dtype=torch.float32).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_pretrained(sd15 / "scheduler")
    scheduler.set_timesteps(steps)
    states = [text_states(sd15, single, english), chinese_states(sd15, chinese)]
    x = torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None]
    for t in scheduler.timesteps:
        both = torch.cat([x, x])
        down, mid = control(both, t, states[1], torch.zeros(2, 3, 256, 256), return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        negative, positive = unet(both, t, states[0], **more).sample.chunk(2)
        x = scheduler.step(negative + 7.5 * (positive - negative), t, x).prev_sample
    del unet, control
    gc.collect()
    vae = diffusers.AutoencoderKL.from_single_file(str(single), **{**load, "config": str(sd15 / "vae")}).eval()
    image = vae.decode(x / vae.config.scaling_factor).sample[0].clamp(-1, 1) * 127.5 + 127.5
    return x[0].permute(1, 2, 0).numpy(), image.round().permute(1, 2, 0).numpy()


def text_states(sd15, single, ids):
    """CLIP's states, its weights taken from the single file."""
    tower = transformers.CLIPTextModel.from_pretrained(sd15 / "text_encoder", torch_dtype=torch.float32).eval()
    prefix = "cond_stage_model.transformer."
    weights = {key.removeprefix(prefix): array for key, array in read_weights(single).tensors.items() if prefix in key}
    own = tower.state_dict()
    weights = {key if key in own else key.removeprefix("text_model."): array for key, array in weights.items()}
    tower.load_state_dict({key: torch.from_numpy(array.astype(np.float32)) for key, array in weights.items()})
    return tower(torch.from_numpy(ids.astype(np.int64))).last_hidden_state


def chinese_states(sd15, ids):
    """The Chinese tower's states; from_pretrained sets the padding token's embedding to zero, the file has it."""
    folder = sd15 / "branch_text_encoder"
    tower = ChineseCLIPTextModel.from_pretrained(folder, add_pooling_layer=False, torch_dtype=torch.float32).eval()
    words = read_weights(folder).tensors["embeddings.word_embeddings.weight"].astype(np.float32)
    tower.embeddings.word_embeddings.weight.copy_(torch.from_numpy(words))
    return tower(torch.from_numpy(ids.astype(np.int64))).last_hidden_state


def sd15_backbone(sd15, tmp_path):
    """The folder without the branch's parts, by links."""
    folder = tmp_path / "backbone"
    folder.mkdir()
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        (folder / name).symlink_to(sd15 / name)
    return folder


def test_diffusers_opens_the_single_file_and_the_folder(sd15, tmp_path):
    """diffusers' own StableDiffusionPipeline, from both, with the weights that were there before."""
    (single,) = to_torch(sd15_backbone(sd15, tmp_path), tmp_path / "sd15.safetensors", "ldm")
    to_torch(single, tmp_path / "folder", "diffusers")
    kind = {"torch_dtype": torch.float16, "local_files_only": True}
    for theirs in (
        diffusers.StableDiffusionPipeline.from_single_file(str(single), config=str(tmp_path / "folder"), **kind),
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder", **kind),
    ):
        for part in ("unet", "vae", "text_encoder"):
            before = read_weights(sd15 / part).tensors
            before = {key.removeprefix("text_model."): array for key, array in before.items()}
            after = {
                key.removeprefix("text_model."): value for key, value in getattr(theirs, part).state_dict().items()
            }
            assert before.keys() == after.keys()
            for key, value in after.items():
                np.testing.assert_array_equal(value.numpy(), before[key], err_msg=key)


LOAD = """
import sys
from bdm_jax.systems.components import load_component
before = open("/proc/self/status").read()
component = load_component(sys.argv[1], "float32")
print(sum(value.nbytes for value in component.params.values()))
print(before, open("/proc/self/status").read(), sep="-----")
"""


def test_loading_needs_little_more_than_the_model(sd15):
    """Peak memory over what the process had, less the model itself: at most 1.3 times the file."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(sd15 / "unet")], capture_output=True, text=True, check=True)
    model, status = done.stdout.split("\n", 1)
    before, after = status.split("-----")
    peak = int(re.search(r"VmHWM:\s+(\d+)", after)[1]) - int(re.search(r"VmRSS:\s+(\d+)", before)[1])
    file = sum(path.stat().st_size for path in (sd15 / "unet").glob("*.safetensors"))
    assert json.loads(model) == 859_520_964 * 4
    assert 1024 * peak - int(model) <= 1.3 * file
