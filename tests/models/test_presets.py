"""The full-size networks, by shape only: names, shapes and counts of the published models."""

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import ChineseCLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers import CLIPTextConfig as HFCLIPTextConfig
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.models import functional
from bdm_jax.models.config import (
    BDM_BRANCH,
    BDM_SDXL_BRANCH,
    CHINESE_CLIP_H_TEXT,
    CLIP_L_TEXT,
    KOLORS_UNET,
    OPENCLIP_BIGG_TEXT,
    SD15_CONTROLNET,
    SD15_UNET,
    SD15_VAE,
    SDXL_UNET,
    branch_config,
)

WIDTHS = (320, 640, 1280, 1280)
SDXL = dict(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
)
SDXL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

# Our preset, the reference network written out by hand (not from our config.json), tensors, parameters.
# The Chinese tower: bdm.md counts 2,048 more; transformers' own class is the authority.
PRESETS = {
    "sd15-unet": (
        SD15_UNET,
        lambda: UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=WIDTHS, attention_head_dim=8
        ),
        686,
        859_520_964,
    ),
    "bdm-branch": (
        BDM_BRANCH,
        lambda: ControlNetModel(cross_attention_dim=1024, block_out_channels=WIDTHS, attention_head_dim=8),
        324,
        363_141_760,
    ),
    "sd15-controlnet": (
        SD15_CONTROLNET,
        lambda: ControlNetModel(cross_attention_dim=768, block_out_channels=WIDTHS, attention_head_dim=8),
        340,
        361_279_120,
    ),
    "sd15-vae": (
        SD15_VAE,
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ),
        248,
        83_653_863,
    ),
    "clip-l-text": (
        CLIP_L_TEXT,
        lambda: CLIPTextModel(
            HFCLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        ),
        196,
        123_060_480,
    ),
    "sdxl-unet": (
        SDXL_UNET,
        lambda: UNet2DConditionModel(**SDXL, up_block_types=SDXL_UP, projection_class_embeddings_input_dim=2816),
        1680,
        2_567_463_684,
    ),
    "kolors-unet": (
        KOLORS_UNET,
        lambda: UNet2DConditionModel(
            **SDXL,
            up_block_types=SDXL_UP,
            projection_class_embeddings_input_dim=5632,
            encoder_hid_dim=4096,
            encoder_hid_dim_type="text_proj",
        ),
        1682,
        2_579_458_820,
    ),
    "openclip-bigg-text": (
        OPENCLIP_BIGG_TEXT,
        lambda: CLIPTextModelWithProjection(
            HFCLIPTextConfig(
                vocab_size=49408,
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
            )
        ),
        517,
        694_659_840,
    ),
    "chinese-clip-h-text": (
        CHINESE_CLIP_H_TEXT,
        lambda: ChineseCLIPTextModel(
            ChineseCLIPTextConfig(
                vocab_size=21128,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
            ),
            add_pooling_layer=False,
        ),
        389,
        324_472_832,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_tensors(name):
    config, build, tensors, parameters = PRESETS[name]
    with torch.device("meta"):
        expected = expected_shapes(build())
    if name == "bdm-branch":
        expected = {key: shape for key, shape in expected.items() if not key.startswith("controlnet_cond_embedding.")}
    if name == "clip-l-text":
        expected = {"text_model." + key.removeprefix("text_model."): shape for key, shape in expected.items()}
    ours = functional.abstract(config)
    assert {key: value.shape for key, value in ours.items()} == expected
    assert len(ours) == tensors
    assert functional.count(ours) == parameters


def test_bdm_sdxl_branch_has_the_published_size():
    """An SDXL ControlNet without its hint network, behind two projections without bias (bdm.md, part 5)."""
    with torch.device("meta"):
        expected = expected_shapes(ControlNetModel(**SDXL, projection_class_embeddings_input_dim=2816))
    expected = {key: shape for key, shape in expected.items() if not key.startswith("controlnet_cond_embedding.")}
    expected |= {
        "prompt_embeds_projection.kernel": (1792, 2048),
        "pooled_prompt_embeds_projection.kernel": (1024, 1280),
    }
    ours = functional.abstract(BDM_SDXL_BRANCH)
    assert {key: value.shape for key, value in ours.items()} == expected
    assert (len(ours), functional.count(ours)) == (830, 1_254_908_416)
    assert branch_config(SDXL_UNET, 1792, 1024) == BDM_SDXL_BRANCH
    with pytest.raises(ValueError, match="pooled text"):
        branch_config(SDXL_UNET, 1792)


def test_vae_encoder_has_the_published_size():
    """What training needs of the autoencoder when latents are not cached: encoder and quant_conv."""
    vae = functional.abstract(SD15_VAE)
    half = {key: value for key, value in vae.items() if key.startswith(("encoder.", "quant_conv."))}
    assert functional.count(half) == 34_163_664


def expected_shapes(module):
    """Our path and shape of every parameter of a torch module, from the kind of layer that holds it."""
    shapes = {}
    for prefix, layer in module.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if isinstance(layer, nn.Conv2d) and leaf == "weight":
                leaf, shape = "kernel", (*shape[2:], shape[1], shape[0])
            elif isinstance(layer, nn.Linear) and leaf == "weight":
                leaf, shape = "kernel", shape[::-1]
            elif isinstance(layer, nn.Embedding):
                leaf = "embedding"
            elif leaf == "weight":
                leaf = "scale"
            shapes[f"{prefix}.{leaf}"] = shape
    return shapes
