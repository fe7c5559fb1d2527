"""T2I-Adapters: diffusers' names and TencentARC's."""

from collections.abc import Mapping

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import PLAIN, KeyTable

KINDS = {"T2IAdapter": "t2i_adapter"}
TABLES: dict[str, KeyTable] = {}


def original_t2i_adapter(levels: int, layers: int, light: bool = False) -> KeyTable:
    """TencentARC's names of a T2I-Adapter of some levels (a light one's last included) and layers in each."""
    pairs = []
    for i in range(levels):
        ours, first = f"adapter.body.{i}", i * layers
        inner = [f"body.{i}.body.{j}" if light else f"body.{first + j}" for j in range(layers)]
        pairs += [(f"{ours}.resnets.{j}", theirs) for j, theirs in enumerate(inner)]
        pairs.append((ours, f"body.{i}") if light else (f"{ours}.in_conv", f"body.{first}.in_conv"))
    return KeyTable(modules=(*pairs, *(() if light else (("adapter.conv_in", "conv_in"),))))


def find_adapter(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """T2I-Adapters. The downscale factor does not follow from the channels: 8 for SD1.x, 16 for SDXL."""
    if "adapter.body.0.resnets.0.block1.weight" in shapes:
        table, layout = PLAIN, "diffusers"
    elif "body.0.body.0.block1.weight" in shapes:
        levels, layers = (count(shapes, pattern) for pattern in (r"body\.(\d+)\..*", r"body\.0\.body\.(\d+)\..*"))
        table, layout = original_t2i_adapter(levels, layers, light=True), "original"
    elif "body.0.block1.weight" in shapes:
        blocks = count(shapes, r"body\.(\d+)\..*")
        wider = [i for i in range(blocks) if f"body.{i}.in_conv.weight" in shapes]
        layers = wider[0] if wider else 2
        table, layout = original_t2i_adapter(blocks // layers, layers), "original"
    else:
        return []
    ours, body = in_our_names(shapes, "", table), "adapter.body"
    light = f"{body}.0.out_conv.weight" in ours
    levels = count(ours, r"adapter\.body\.(\d+)\..*") - light
    inputs = ours[f"{body}.0.in_conv.weight" if light else "adapter.conv_in.weight"][1]
    sdxl = inputs in (3 * 16**2, 16**2)  # pixels of a map in colour, or grey
    settings = recorded(metadata, "t2i_adapter")
    factor = settings.get("downscale_factor", 16 if sdxl else 8)
    last = "out_conv" if light else "resnets.0.block1"
    config = {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if sdxl else "full_adapter",
        "channels": [ours[f"{body}.{i}.{last}.weight"][0] for i in range(levels)],
        "num_res_blocks": count(ours, r"adapter\.body\.0\.resnets\.(\d+)\..*"),
        "downscale_factor": factor,
        "in_channels": inputs // factor**2,
        **settings,
    }
    return [NetworkInFile("t2i_adapter", layout, "SDXL" if sdxl else "SD1.x", "", table, config)]
