"""The tiny autoencoder against diffusers' AutoencoderTiny, with random and with the real weights."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.formats.layouts import tree_from_torch
from bdm_jax.models import functional
from bdm_jax.models.config import TAESD, CLIPTextConfig, TinyVAEConfig, UNetConfig, from_json, to_json
from bdm_jax.paths import TOKENIZERS
from bdm_jax.sampling.batching import default_size
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component
from bdm_jax.systems.families import FAMILIES
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer

REAL = Path(__file__).parents[4] / "shared" / "data" / "taesd"
DIGESTS = {
    "taesd_encoder.safetensors": "a6b8c0fda4aad50784e543389e0239c72c5e31e9775c9e612ea8333bf3a77dcb",
    "taesd_decoder.safetensors": "d903e7cc3ae58f21d985a3498a841fa8b230edccff7ac5d27607b0c557945c6f",
}
TWO_LEVELS = TinyVAEConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(12, 12),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(2, 1),
    latent_channels=5,
)
CASES = {
    "two-levels": (TWO_LEVELS, (2, 12, 20)),
    "four-levels": (
        TinyVAEConfig(encoder_block_out_channels=(10,) * 4, decoder_block_out_channels=(6,) * 4),
        (1, 40, 24),
    ),
}


def build(config):
    """diffusers' network, made from our config.json."""
    return AutoencoderTiny.from_config(json.loads(json.dumps(to_json(config))))


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode_equal_diffusers(name, randomised, torch_params, apply, assert_parity, nhwc, nchw, rng):
    config, (batch, height, width) = CASES[name]
    reference = randomised(build(config))
    params = torch_params(reference, config)
    images = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    mean, logvar = apply(config, params, images, method="encode")
    assert_parity(mean, nhwc(reference.encode(nchw(images)).latents))
    assert logvar.shape == mean.shape and (logvar == -30).all()

    shape = (batch, height // config.factor, width // config.factor, config.latent_channels)
    assert mean.shape == shape
    latents = 3 * rng.standard_normal(shape).astype(np.float32)  # beyond 3, where they are bent
    assert_parity(apply(config, params, latents, method="decode"), nhwc(reference.decode(nchw(latents)).sample))


def test_preset_is_diffusers_default():
    with torch.device("meta"):
        state = AutoencoderTiny().state_dict()
    ours = functional.abstract(TAESD)
    zeros = {key: np.zeros(value.shape, np.float32) for key, value in state.items()}
    tree_from_torch(zeros, ours, "AutoencoderTiny")  # every key, every shape
    halves = [{k: v for k, v in ours.items() if k.startswith(part)} for part in ("encoder.", "decoder.")]
    assert [len(half) for half in halves] == [67, 67]
    assert [functional.count(half) for half in halves] == [1_222_532, 1_222_531]
    assert TAESD.factor == 8 and TAESD.scaling_factor == 1.0


@pytest.mark.parametrize("config", [TAESD, *(config for config, _ in CASES.values())])
def test_config_that_diffusers_wrote(config, tmp_path):
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    build(config).save_config(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert from_json(theirs) == config
    ours = to_json(config)
    assert {key: theirs[key] for key in ours} == ours
    assert theirs.keys() - ours.keys() == {"_diffusers_version", "block_out_channels"}
    assert from_json({**dict(AutoencoderTiny.load_config(tmp_path)), "shift_factor": None}) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "silu"}, "act_fn='silu' is not implemented"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4 is not implemented"),
        ({"latent_magnitude": 1}, "latent_magnitude=1 is not implemented"),
        ({"force_upcast": True}, "force_upcast=True is not implemented"),
        ({"block_out_channels": [64, 64]}, r"block_out_channels=\[64, 64\] is not implemented"),
        ({"num_encoder_blocks": [1, 3, 3]}, "num_encoder_blocks has 3 entries"),
        ({"num_encoder_blocks": [1, 3, 3, 10**6]}, "num_encoder_blocks=1000000 is not a valid value"),
        ({"encoder_block_out_channels": [64, 64, 64, 32]}, "encoder_block_out_channels: .* one width"),
    ],
)
def test_config_of_another_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_json({**to_json(TAESD), **change})


def test_pipeline_with_a_tiny_vae(seed, tmp_path):
    """Saved, read again and drawn with; to diffusers it is a StableDiffusionPipeline with an AutoencoderTiny."""
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / "english")
    ids = dict(bos_token_id=tokenizer.start, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    widths = dict(block_out_channels=(8, 16), transformer_layers=(1, 0), num_heads=2, norm_num_groups=4)
    channels = TWO_LEVELS.latent_channels
    configs = {
        "unet": UNetConfig(
            **widths,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            cross_attention_dim=16,
            sample_size=4,
        ),
        "vae": TWO_LEVELS,
        "text_encoder": CLIPTextConfig(
            **text, **ids, vocab_size=tokenizer.vocab_size, max_position_embeddings=tokenizer.length
        ),
    }
    parts = {name: Component(config, functional.init(config, seed)) for name, config in configs.items()}
    system = BridgePipeline(FAMILIES["sd15"], {**parts, "tokenizer": tokenizer}, DiscreteSchedule())
    system.save_pretrained(tmp_path, "float32")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(theirs.vae, AutoencoderTiny)

    pipeline = BridgePipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config == TWO_LEVELS
    assert default_size(pipeline) == (8, 8)
    (picture,) = generate(pipeline, [Request("a cat")], Sampling(steps=2, guidance=2.0))
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8


def test_real_weights_decode_and_encode_as_in_diffusers(torch_params, apply, assert_parity, nhwc, nchw, rng):
    tensors = {}
    for name, shift in (("taesd_encoder.safetensors", 0), ("taesd_decoder.safetensors", -1)):
        if not (REAL / name).is_file():
            pytest.skip(f"{REAL / name} is not here")
        assert hashlib.sha256((REAL / name).read_bytes()).hexdigest() == DIGESTS[name]
        for key, tensor in load_file(REAL / name).items():
            index, rest = key.split(".", 1)
            tensors[f"{name[6:13]}.layers.{int(index) + shift}.{rest}"] = tensor.float()
    reference = AutoencoderTiny().eval()
    reference.load_state_dict(tensors)
    params = torch_params(reference, TAESD)
    latents = rng.standard_normal((1, 6, 8, 4)).astype(np.float32)
    images = apply(TAESD, params, latents, method="decode")
    expected = reference.decode(nchw(latents)).sample
    assert_parity(images, nhwc(expected))
    mean, _ = apply(TAESD, params, nhwc(expected), method="encode")
    assert_parity(mean, nhwc(reference.encode(expected).latents))
