"""AutoencoderKL and TAESD: diffusers' names, CompVis' (LDM), diffusers' before 0.15, TAESD's author's."""

import re
from collections.abc import Mapping
from dataclasses import replace

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import PLAIN, KeyTable

# The attention of autoencoders written before diffusers 0.15.
_OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
_VAE_ATTENTIONS = tuple(f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder"))
OLD_VAE = KeyTable(
    modules=tuple((f"{at}.{ours}", f"{at}.{theirs}") for at in _VAE_ATTENTIONS for ours, theirs in _OLD_ATTENTION)
)

# Its author's two files (`weights.read_weights` reads both, under these names): positions in a list, of which the
# decoder's first, a clamp, has no number in diffusers.
TAESD = KeyTable(
    modules=tuple(
        (f"{half}.layers.{i}", f"taesd_{half}.{i + shift}")
        for half, layers, shift in (("encoder", 15, 0), ("decoder", 19, 1))
        for i in range(layers)
    )
)

# What the family tells: shapes are the same in SD1.x's autoencoder and SDXL's.
_OF_SD = {"scaling_factor": 0.18215, "sample_size": 512}
_OF_SDXL = {"scaling_factor": 0.13025, "sample_size": 1024}
FAMILIES = {"SD1.x": _OF_SD, "SD2.x": _OF_SD, "SDXL": _OF_SDXL, "Kolors": _OF_SDXL}

KINDS = {"AutoencoderKL": "vae", "AutoencoderTiny": "vae"}
TABLES: dict[str, KeyTable] = {}


def ldm_vae(levels: int, layers: int) -> KeyTable:
    """CompVis' names of an AutoencoderKL (`first_stage_model.` removed), its attention made of 1x1 convolutions."""
    pairs = []
    for half, side, resnets in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        sampler = f"{side}sample"
        for level in range(levels):
            ours = f"{half}.{side}_blocks.{level}"
            theirs = f"{half}.{side}.{level if side == 'down' else levels - 1 - level}"
            for layer in range(resnets):
                at = f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}"
                pairs += [at, (f"{at[0]}.conv_shortcut", f"{at[1]}.nin_shortcut")]
            pairs.append((f"{ours}.{sampler}rs.0.conv", f"{theirs}.{sampler}.conv"))
        mid = f"{half}.mid_block"
        pairs += [(f"{mid}.resnets.{i}", f"{half}.mid.block_{i + 1}") for i in range(2)]
        names = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
        pairs += [(f"{mid}.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}") for ours, theirs in names]
        pairs.append((f"{half}.conv_norm_out", f"{half}.norm_out"))
    return KeyTable(modules=tuple(pairs), convolutions=r"\w+\.mid_block\.attentions\.0\.to_\w+(\.0)?\.weight")


def find_vae(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The AutoencoderKL of a file, if there is one."""
    for prefix in ("first_stage_model.", "", "vae."):
        if f"{prefix}decoder.up.0.block.0.conv1.weight" in shapes and f"{prefix}quant_conv.weight" in shapes:
            levels = count(shapes, rf"{re.escape(prefix)}encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
            layers = count(shapes, rf"{re.escape(prefix)}encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
            table = ldm_vae(levels, layers)
            return [_vae_part(in_our_names(shapes, prefix, table), "ldm", prefix, table, metadata)]
        if f"{prefix}decoder.up_blocks.0.resnets.0.conv1.weight" in shapes and f"{prefix}quant_conv.weight" in shapes:
            old = f"{prefix}decoder.mid_block.attentions.0.query.weight" in shapes
            table = OLD_VAE if old else PLAIN
            layout = "diffusers before 0.15" if old else "diffusers"
            return [_vae_part(in_our_names(shapes, prefix, table), layout, prefix, table, metadata)]
    return []


def of_family(part: NetworkInFile, family: str, metadata: Mapping[str, str]) -> NetworkInFile:
    """The autoencoder of a file whose denoising network is of this family; one that is not AutoencoderKL as it is."""
    if part.config.get("_class_name") != "AutoencoderKL" or part.config["latent_channels"] != 4:
        return part
    config = {**part.config, **FAMILIES[family], **recorded(metadata, "vae")}
    return replace(part, family=family, config=config)


def _vae_part(ours: Shapes, layout: str, prefix: str, table: KeyTable, metadata: Mapping[str, str]) -> NetworkInFile:
    levels = count(ours, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": ours["encoder.conv_in.weight"][1],
        "out_channels": ours["decoder.conv_out.weight"][0],
        "block_out_channels": [ours[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": count(ours, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        "latent_channels": ours["quant_conv.weight"][0] // 2,
        **recorded(metadata, "vae"),
    }
    family = "SD1.x, SD2.x or SDXL" if config["latent_channels"] == 4 else f"{config['latent_channels']}-channel"
    return NetworkInFile("vae", layout, family, prefix, table, config)


def find_taesd(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The TAESD of a file, if there is one."""
    if "encoder.layers.0.weight" in shapes and "decoder.layers.0.weight" in shapes:
        return [_taesd_part("diffusers", PLAIN, shapes)]
    if "taesd_encoder.0.weight" in shapes and "taesd_decoder.1.weight" in shapes:
        return [_taesd_part("original", TAESD, shapes)]
    return []


def _taesd_part(layout: str, table: KeyTable, shapes: Shapes) -> NetworkInFile:
    channels = in_our_names(shapes, "", table)["decoder.layers.0.weight"][1]
    config = {"_class_name": "AutoencoderTiny", "latent_channels": channels}
    return NetworkInFile("vae", layout, "TAESD", "", table, config)
