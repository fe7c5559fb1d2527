"""The tables of other layouts against diffusers' own converters, and there and back by name."""

import diffusers
import pytest
from diffusers.loaders import single_file_utils as theirs

from bdm_jax.formats.detect import detect
from bdm_jax.formats.files import write_json, write_safetensors
from bdm_jax.formats.layouts import tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.autoencoders import OLD_VAE, ldm_vae
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.unet import ldm_controlnet, ldm_unet
from bdm_jax.models import config as configs
from bdm_jax.models.functional import abstract

UNETS = {
    "sd15 plan": dict(block_out_channels=(8, 16, 16, 16), transformer_layers=(1, 1, 1, 0)),
    "two levels": dict(block_out_channels=(8, 16), transformer_layers=(0, 1), layers_per_block=1),
    "attention everywhere": dict(block_out_channels=(8, 8, 16), transformer_layers=(1, 1, 1), layers_per_block=3),
}
SIZES = dict(num_heads=2, norm_num_groups=4, cross_attention_dim=12)


def values(config):
    return {key: value for key, value in configs.to_json(config).items() if key != "bdm_branch"}


@pytest.mark.parametrize("name", UNETS)
def test_ldm_unet_is_what_diffusers_converts(name, rng, drawn, same, as_torch):
    config = configs.UNetConfig(**UNETS[name], **SIZES)
    tree = drawn(config, rng)
    ldm = tree_to_torch(tree, ldm_unet(config.transformer_layers, config.layers_per_block))
    prefixed = as_torch({f"model.diffusion_model.{key}": array for key, array in ldm.items()})
    same(tree_to_torch(tree), theirs.convert_ldm_unet_checkpoint(prefixed, values(config)))


@pytest.mark.parametrize("name", UNETS)
def test_original_controlnet_is_what_diffusers_converts(name, rng, drawn, same, as_torch):
    config = configs.ControlNetConfig(**UNETS[name], **SIZES)
    tree = drawn(config, rng)
    original = tree_to_torch(tree, ldm_controlnet(config.transformer_layers, config.layers_per_block))
    prefixed = as_torch({f"control_model.{key}": array for key, array in original.items()})
    same(tree_to_torch(tree), theirs.convert_controlnet_checkpoint(prefixed, values(config)))


@pytest.mark.parametrize("plan", [((4, 8, 8, 8), 2), ((4, 8), 1), ((4, 4, 8, 8, 8), 3)])
def test_ldm_vae_is_what_diffusers_converts(plan, rng, drawn, same, as_torch):
    config = configs.VAEConfig(block_out_channels=plan[0], layers_per_block=plan[1], norm_num_groups=4)
    tree = drawn(config, rng)
    ldm = tree_to_torch(tree, ldm_vae(len(plan[0]), plan[1]))
    assert ldm["decoder.mid.attn_1.q.weight"].ndim == 4
    prefixed = as_torch({f"first_stage_model.{key}": array for key, array in ldm.items()})
    same(tree_to_torch(tree), theirs.convert_ldm_vae_checkpoint(prefixed, values(config)))


def test_ldm_text_tower_is_what_diffusers_converts(rng, drawn, same, as_torch):
    config = configs.CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    tree = drawn(config, rng)
    ldm = {f"cond_stage_model.transformer.{key}": array for key, array in tree_to_torch(tree, CLIP_TEXT).items()}
    same(tree_to_torch(tree), theirs.convert_ldm_clip_checkpoint(as_torch(ldm)))


def test_attention_names_before_diffusers_015(rng, tmp_path, drawn, same):
    """What diffusers reads from a file with the old names is what is read here."""
    config = configs.VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4)
    tree = drawn(config, rng)
    old = tree_to_torch(tree, OLD_VAE)
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", old, {"format": "pt"})
    write_json(tmp_path / "config.json", values(config))
    same(tree_to_torch(tree), diffusers.AutoencoderKL.from_pretrained(tmp_path).state_dict())
    same(tree_from_torch(old, abstract(config), "old", OLD_VAE), tree)


@pytest.mark.parametrize("name", UNETS)
def test_every_name_comes_back(name, rng, drawn, same):
    """Reading what was written gives the tree, and the file alone tells the plan."""
    for cls, make, prefix in (
        (configs.UNetConfig, ldm_unet, "model.diffusion_model."),
        (configs.ControlNetConfig, ldm_controlnet, "control_model."),
    ):
        config = cls(**UNETS[name], **SIZES)
        tree = drawn(config, rng)
        file = tree_to_torch(tree, make(config.transformer_layers, config.layers_per_block))
        (part,) = detect({prefix + key: array.shape for key, array in file.items()}).parts
        same(tree_from_torch(file, abstract(config), name, part.table), tree)
        told = configs.from_json({**part.config, "attention_head_dim": 2, "norm_num_groups": 4})
        assert told == config
