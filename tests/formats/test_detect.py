"""What files are, from names and shapes: full-size networks by the shapes that diffusers and transformers give them."""

import diffusers
import numpy as np
import pytest
import torch

from bdm_jax.formats.detect import detect
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.formats.networks.autoencoders import ldm_vae
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.unet import ldm_controlnet, ldm_unet
from bdm_jax.models import config as configs
from bdm_jax.models.functional import abstract

LEVELS, LAYERS = configs.SD15_UNET.transformer_layers, configs.SD15_UNET.layers_per_block


def shapes(config, table=None, prefix=""):
    """Names and shapes of a full-size network in PyTorch's order; one number stands for all of an array."""
    tree = {key: np.broadcast_to(np.float32(0), leaf.shape) for key, leaf in abstract(config).items()}
    tensors = tree_to_torch(tree, table) if table else tree_to_torch(tree)
    return {prefix + key: array.shape for key, array in tensors.items()}


LDM = {
    **shapes(configs.SD15_UNET, ldm_unet(LEVELS, LAYERS), "model.diffusion_model."),
    **shapes(configs.SD15_VAE, ldm_vae(4, 2), "first_stage_model."),
    **shapes(configs.CLIP_L_TEXT, CLIP_TEXT, "cond_stage_model.transformer."),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "alphas_cumprod": (1000,),
}
FULL = {
    "diffusers unet": (shapes(configs.SD15_UNET), {"unet": configs.SD15_UNET}, "SD1.x unet (diffusers)"),
    "controlnet": (shapes(configs.SD15_CONTROLNET), {"controlnet": configs.SD15_CONTROLNET}, "SD1.x controlnet"),
    "original controlnet": (
        shapes(configs.SD15_CONTROLNET, ldm_controlnet(LEVELS, LAYERS), "control_model."),
        {"controlnet": configs.SD15_CONTROLNET},
        "SD1.x controlnet (original)",
    ),
    "360's branch": (shapes(configs.BDM_BRANCH), {"branch": configs.BDM_BRANCH}, "BDM branch (diffusers)"),
    "vae": (shapes(configs.SD15_VAE), {"vae": configs.SD15_VAE}, "SD1.x, SD2.x or SDXL vae (diffusers)"),
    "clip": (shapes(configs.CLIP_L_TEXT), {"text_encoder": configs.CLIP_L_TEXT}, "CLIP ViT-L/14 text_encoder"),
    "chinese": (
        shapes(configs.CHINESE_CLIP_H_TEXT),
        {"branch_text_encoder": configs.CHINESE_CLIP_H_TEXT},
        "Chinese-CLIP ViT-H/14 branch_text_encoder (transformers)",
    ),
    "cn_clip": (
        {**shapes(configs.CHINESE_CLIP_H_TEXT, prefix="bert."), "visual.conv1.weight": (1280, 3, 14, 14)},
        {"branch_text_encoder": configs.CHINESE_CLIP_H_TEXT},
        "Chinese-CLIP ViT-H/14 branch_text_encoder (cn_clip)",
    ),
    "single file": (
        LDM,
        {"unet": configs.SD15_UNET, "vae": configs.SD15_VAE, "text_encoder": configs.CLIP_L_TEXT},
        "SD1.x unet (ldm), SD1.x vae (ldm), CLIP ViT-L/14 text_encoder (ldm)",
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_networks_are_named_and_sized(name):
    file, expected, words = FULL[name]
    found = detect(file)
    assert {part.kind: configs.from_json(part.config) for part in found.parts} == expected
    assert found.name.startswith(words) and not found.others


def unet_of(**values):
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            **{
                "block_out_channels": (32, 64),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 8,
                **values,
            }
        )
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("values", "family"),
    [
        (dict(cross_attention_dim=768), "SD1.x"),
        (dict(cross_attention_dim=768, in_channels=9), "SD1.x inpainting"),
        (dict(cross_attention_dim=768, in_channels=8), "SD1.x instruct-pix2pix"),
        (dict(cross_attention_dim=1024, use_linear_projection=True), "SD2.x"),
        (
            dict(
                cross_attention_dim=2048,
                use_linear_projection=True,
                transformer_layers_per_block=2,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
            ),
            "SDXL",
        ),
    ],
)
def test_families(values, family):
    assert detect(unet_of(**values)).parts[0].family == family


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "LoRA (kohya)"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "LoRA (kohya)"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "LoRA (diffusers or peft)"),
        ("mid_block.attentions.0.attn1.processor.to_q_lora.up.weight", "LoRA (diffusers or peft)"),
        ("string_to_param.*", "Textual Inversion (A1111)"),
        ("<cat>", "Textual Inversion"),
        ("image_proj.proj.weight", "IP-Adapter"),
        ("body.0.in_conv.weight", "T2I-Adapter"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
    ],
)
def test_what_is_no_network_of_ours_is_named(key, name):
    found = detect({key: (4, 4)})
    assert not found.parts and name in found.others


def test_v_prediction_where_the_file_tells():
    file = shapes(configs.SD15_UNET)
    assert detect(file).parts[0].prediction is None
    assert detect({**file, "v_pred": (0,)}).parts[0].prediction == "v_prediction"
    assert detect(file, {"modelspec.prediction_type": "epsilon"}).parts[0].prediction == "epsilon"


def test_network_without_what_tells_its_size_is_damaged_not_a_crash():
    file = shapes(configs.SD15_UNET)
    found = detect({key: shape for key, shape in file.items() if key != "conv_out.weight"})
    assert not found.parts and found.others == ("damaged unet ('conv_out.weight')",)
    assert detect({}).name == detect({"x": (1,)}).name == "unknown"
