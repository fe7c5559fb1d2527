"""SDXL's files: recognised at full size, there and back bit for bit, named as diffusers' converter has them."""

import re

import ml_dtypes
import numpy as np
import pytest
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from bdm_jax.formats.detect import detect, kind_of, table_for
from bdm_jax.formats.files import write_safetensors
from bdm_jax.formats.layouts import fit, tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.autoencoders import ldm_vae
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.openclip import openclip_text
from bdm_jax.formats.networks.unet import ldm_controlnet, ldm_unet
from bdm_jax.formats.tables import PLAIN
from bdm_jax.models import config as configs
from bdm_jax.models.functional import abstract

# A network, its table, and the prefix in a file.
LAYOUTS = {
    "diffusers unet": (configs.SDXL_UNET, PLAIN, ""),
    "ldm unet": (configs.SDXL_UNET, ldm_unet((0, 2, 10), 2), "model.diffusion_model."),
    "ldm vae": (configs.SDXL_VAE, ldm_vae(4, 2), "first_stage_model."),
    "clip-l": (configs.CLIP_L_TEXT, CLIP_TEXT, ""),
    "ldm clip-l": (configs.CLIP_L_TEXT, CLIP_TEXT, "conditioner.embedders.0.transformer."),
    "bigg": (configs.OPENCLIP_BIGG_TEXT, CLIP_TEXT, ""),
    "openclip bigg": (configs.OPENCLIP_BIGG_TEXT, openclip_text(32), "conditioner.embedders.1.model."),
    "branch": (configs.BDM_SDXL_BRANCH, PLAIN, ""),
    "kolors unet": (configs.KOLORS_UNET, PLAIN, ""),
}
TINY = configs.UNetConfig(
    block_out_channels=(8, 16, 16),
    transformer_layers=(0, 1, 2),
    num_heads=(1, 2, 2),
    norm_num_groups=4,
    cross_attention_dim=12,
    use_linear_projection=True,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=34,
)
TINY_TEXT = configs.CLIPTextConfig(
    vocab_size=40,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_act="gelu",
    projection_dim=8,
)


def full_size(config, table):
    """A file of a full-size network that takes next to no memory (but for what is fused, a byte a number)."""
    return tree_to_torch({key: of_shape(leaf.shape) for key, leaf in abstract(config).items()}, table)


def of_shape(shape):
    return np.broadcast_to(np.int8(0), shape)


def shapes_of(tensors):
    return {key: array.shape for key, array in tensors.items()}


def kinds(file):
    """The smallest tensor of each kind: by its rank and the last two parts of its name, numbers aside."""
    found = {}
    for key, array in sorted(file.items(), key=lambda item: item[1].size):
        found.setdefault((array.ndim, re.sub(r"\d+", "0", ".".join(key.split(".")[-2:]))), key)
    return list(found.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back_is_exact_at_full_size(name, dtype, rng):
    """Every name and shape; and the bits of one real tensor of each kind, fused and transposed ones among them."""
    config, table, _ = LAYOUTS[name]
    expected, file = abstract(config), full_size(config, table)
    real = {}
    for key in kinds(file):
        size = int(np.dtype(dtype).itemsize * file[key].size)
        real[key] = np.frombuffer(rng.bytes(size), dtype).reshape(file[key].shape)
    tree = tree_from_torch({**file, **real}, expected, name, table)
    assert shapes_of(tree) == shapes_of(expected)
    # What is fused can only be of one type: the parts of the tensors that stay abstract are left out.
    back = tree_to_torch({key: array for key, array in tree.items() if array.dtype == np.dtype(dtype)}, table)
    assert back.keys() == real.keys()
    for key, array in real.items():
        assert back[key].dtype == array.dtype and back[key].tobytes() == array.tobytes(), key
    whole = tree_to_torch({key: of_shape(array.shape) for key, array in tree.items()}, table)
    assert shapes_of(whole) == shapes_of(file)


def in_file(*names):
    """Shapes of a file that holds these networks."""
    parts = ((LAYOUTS[name][2], full_size(*LAYOUTS[name][:2])) for name in names)
    return {prefix + key: array.shape for prefix, file in parts for key, array in file.items()}


def test_single_file_is_sdxl():
    shapes = in_file("ldm unet", "ldm vae", "ldm clip-l", "openclip bigg")
    shapes["conditioner.embedders.1.model.logit_scale"] = ()
    shapes["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = (1, 77)
    found = detect(shapes)
    assert found.family == "SDXL" and not found.others
    assert {part.kind: configs.from_json(part.config) for part in found.parts} == {
        "unet": configs.SDXL_UNET,
        "vae": configs.SDXL_VAE,
        "text_encoder": configs.CLIP_L_TEXT,
        "text_encoder_2": configs.OPENCLIP_BIGG_TEXT,
    }
    assert found.name == (
        "SDXL unet (ldm), SDXL vae (ldm), CLIP ViT-L/14 text_encoder (ldm), "
        "OpenCLIP ViT-bigG/14 text_encoder_2 (openclip)"
    )
    for part in found.parts:
        config = configs.from_json(part.config)
        tensors = {key: of_shape(shape) for key, shape in part.of(shapes).items()}
        result = fit(tensors, abstract(config), part.table)
        assert not (result.missing or result.unknown or result.misshaped or result.duplicates), part.kind


@pytest.mark.parametrize(
    ("name", "family", "kind"),
    [
        ("diffusers unet", "SDXL", "unet"),
        ("kolors unet", "Kolors", "unet"),
        ("branch", "BDM-SDXL", "branch"),
        ("clip-l", "CLIP ViT-L/14", "text_encoder"),
        ("bigg", "OpenCLIP ViT-bigG/14", "text_encoder_2"),
    ],
)
def test_components_by_themselves(name, family, kind):
    (part,) = detect(in_file(name)).parts
    assert (part.family, part.kind) == (family, kind)
    assert configs.from_json(part.config) == LAYOUTS[name][0]


def test_a_lone_autoencoder_keeps_its_own_counsel():
    """Its shapes are those of SD1.x; only the UNet beside it tells that its latents are scaled otherwise."""
    (part,) = detect(in_file("ldm vae")).parts
    assert part.family == "SD1.x, SD2.x or SDXL" and "scaling_factor" not in part.config
    told = detect(in_file("ldm vae", "ldm unet"), {"bdm_jax.vae": '{"scaling_factor": 0.5}'})
    assert {part.kind: part for part in told.parts}["vae"].config["scaling_factor"] == 0.5


@pytest.mark.parametrize("kind", ["unet", "controlnet"])
def test_ldm_names_are_what_diffusers_converts(kind, drawn, same, as_torch, rng):
    shared = {name: getattr(TINY, name) for name in configs.EncoderConfig.__dataclass_fields__}
    config = TINY if kind == "unet" else configs.ControlNetConfig(**shared)
    make, convert, prefix = {
        "unet": (ldm_unet, theirs.convert_ldm_unet_checkpoint, "model.diffusion_model."),
        "controlnet": (ldm_controlnet, theirs.convert_controlnet_checkpoint, "control_model."),
    }[kind]
    tree = drawn(config, rng)
    file = tree_to_torch(tree, make(config.transformer_layers, config.layers_per_block))
    assert "label_emb.0.2.bias" in file and "input_blocks.7.1.transformer_blocks.1.norm1.bias" in file
    found = convert(as_torch({prefix + key: a for key, a in file.items()}), configs.to_json(config))
    if kind == "controlnet":  # diffusers' converter leaves its added embeddings out
        pairs = ((f"linear_{i}.{leaf}", f"{2 * i - 2}.{leaf}") for i in (1, 2) for leaf in ("weight", "bias"))
        names = [(f"add_embedding.{ours}", f"label_emb.0.{others}") for ours, others in pairs]
        found |= {ours: file[other] for ours, other in names}
    same(tree_to_torch(tree), found)
    (part,) = detect({prefix + key: array.shape for key, array in file.items()}).parts
    same(tree_from_torch(file, abstract(config), kind, part.table), tree)
    sizes = {"attention_head_dim": [1, 2, 2], "norm_num_groups": 4, "addition_time_embed_dim": 4, "sample_size": 64}
    assert configs.from_json({**part.config, **sizes}) == config


def test_openclip_names_are_what_diffusers_converts(drawn, same, as_torch, rng):
    tree, prefix = drawn(TINY_TEXT, rng), "conditioner.embedders.1.model."
    file = tree_to_torch(tree, openclip_text(2))
    assert file["transformer.resblocks.1.attn.in_proj_weight"].shape == (24, 8)
    module = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs.to_json(TINY_TEXT)))
    found = theirs.convert_open_clip_checkpoint(module, as_torch({prefix + k: a for k, a in file.items()}), prefix)
    same(tree_to_torch(tree, CLIP_TEXT), {key: value for key, value in found.items() if "position_ids" not in key})
    same(tree_from_torch(file, abstract(TINY_TEXT), "file", openclip_text(2)), tree)


def test_rows_that_cannot_be_shared_out_are_misshaped(drawn, rng):
    file = tree_to_torch(drawn(TINY_TEXT, rng), openclip_text(2))
    key = "transformer.resblocks.0.attn.in_proj_bias"
    found = fit({**file, key: np.zeros(25, np.float32)}, abstract(TINY_TEXT), openclip_text(2))
    assert found.misshaped == [f"{key} (25,) instead of (24,)"]
    assert not found.missing and not found.unknown


def test_a_single_file_with_fused_tensors_comes_back_byte_for_byte(drawn, tmp_path, rng):
    from bdm_jax.convert.conversion import to_jax, to_torch

    small = configs.CLIPTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    networks = (
        ("model.diffusion_model.", TINY, ldm_unet((0, 1, 2), 2)),
        ("conditioner.embedders.0.transformer.", small, CLIP_TEXT),
        ("conditioner.embedders.1.model.", TINY_TEXT, openclip_text(2)),
    )
    file = {}
    for prefix, config, table in networks:
        file |= {prefix + key: array for key, array in tree_to_torch(drawn(config, rng), table).items()}
    file["conditioner.embedders.1.model.logit_scale"] = np.float32(4.6)
    before, between, after = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_safetensors(before, file, {"format": "pt"})
    to_jax(before, between)
    to_torch(between, after)
    assert before.read_bytes() == after.read_bytes()


def test_kinds_and_tables_of_configs():
    for config, kind in (
        (configs.SDXL_UNET, "unet"),
        (configs.BDM_SDXL_BRANCH, "branch"),
        (configs.SD15_CONTROLNET, "controlnet"),
        (configs.TAESD, "vae"),
        (configs.OPENCLIP_BIGG_TEXT, "text_encoder"),
        (configs.CHINESE_CLIP_H_TEXT, "branch_text_encoder"),
        (configs.CLIPVisionConfig(), "image_encoder"),
        (configs.T2IAdapterConfig(), "t2i_adapter"),
    ):
        values = configs.to_json(config)
        table = table_for(values)
        assert kind_of(values) == kind
        assert fit(full_size(config, table), abstract(config), table).tree.keys() == abstract(config).keys()
    assert kind_of({"_class_name": "ControlNetModelBDM"}) == "branch"
    assert kind_of({"model_type": "t5"}) is None and kind_of({"_class_name": ["UNet2DConditionModel"]}) is None
