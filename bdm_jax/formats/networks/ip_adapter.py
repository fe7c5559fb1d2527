"""IP-Adapters (Ye et al. 2023, arXiv 2308.06721) in their authors' names, which are the only ones in use.

A file has an image projection (`image_proj.*`) and keys and values for every cross-attention of one kind of backbone
(`ip_adapter.*`, numbered).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdm_jax.formats.files import Tensors
from bdm_jax.formats.tables import KeyTable

_HEAD = 64  # channels of a Resampler's head in all published files

IMAGE_PROJECTION = KeyTable(modules=(("image_embeds", "proj"),))


def resampler(depth: int) -> KeyTable:
    """The authors' names of Plus' Resampler of `depth` layers, which keeps keys and values in one tensor."""
    pairs, splits = [], []
    for i in range(depth):
        at = f"layers.{i}"
        pairs += [(f"{at}.ln0", f"{at}.0.norm1"), (f"{at}.ln1", f"{at}.0.norm2")]
        pairs += [(f"{at}.attn.to_q", f"{at}.0.to_q"), (f"{at}.attn.to_out.0", f"{at}.0.to_out")]
        pairs += [(f"{at}.ff.0", f"{at}.1.0"), (f"{at}.ff.1.net.0.proj", f"{at}.1.1")]
        pairs.append((f"{at}.ff.1.net.2", f"{at}.1.3"))
        splits.append((tuple(f"{at}.attn.to_{x}.weight" for x in "kv"), f"{at}.0.to_kv.weight"))
    return KeyTable(modules=tuple(pairs), splits=tuple(splits))


class AdapterFile(NamedTuple):
    """What an IP-Adapter's file holds, in PyTorch's layouts.

    Attributes:
      values: the sizes of its image projection: fields of the config of that name, Plus' where it has `hidden_dims`.
      table: the projection's names and ours.
      projection: the projection's tensors, by the file's names without `image_proj.`.
      layers: the cross-attentions', by `<attention>.processor.to_k_ip.0.weight` and `to_v_ip`.
    """

    values: dict[str, int]
    table: KeyTable
    projection: Tensors
    layers: Tensors


def read_original(tensors: Mapping[str, Any], attentions: Sequence[tuple[str, int]], width: int) -> AdapterFile:
    """A file of IP-Adapter's authors, dotted names or nested dicts, for a backbone.

    `attentions` are the backbone's cross-attentions (path, channels) in the order of such files, and `width` is that of
    the text's states. Raises ValueError, in one line, for another variant and for layers that are missing, unknown or
    of another width than the backbone's.
    """
    nested = [(name, part) for name, part in tensors.items() if isinstance(part, Mapping)]
    tensors = {name: part for name, part in tensors.items() if not isinstance(part, Mapping)}
    tensors |= {f"{name}.{key}": array for name, part in nested for key, array in part.items()}
    projection = {key.removeprefix("image_proj."): a for key, a in tensors.items() if key.startswith("image_proj.")}
    layers = {key.removeprefix("ip_adapter."): a for key, a in tensors.items() if key.startswith("ip_adapter.")}
    if not projection or len(projection) + len(layers) < len(tensors):
        raise ValueError("not an IP-Adapter: expected image_proj.* and ip_adapter.*, nothing else")
    try:
        values, table = _projection(projection)
    except (LookupError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"its image projection is damaged: {error}") from error
    names = {}
    for n, (path, _) in enumerate(attentions):
        names |= {f"{2 * n + 1}.to_{x}_ip.weight": f"{path}.processor.to_{x}_ip.0.weight" for x in "kv"}
    if wrong := sorted(names.keys() ^ layers.keys()):
        raise ValueError(f"its cross-attentions are not this backbone's: ip_adapter.{wrong[0]} ({len(wrong)} in all)")
    own = values["output_dims" if "hidden_dims" in values else "cross_attention_dim"]
    if own != width:
        raise ValueError(f"made for another base model: its width is {own}, the backbone's {width}")
    for n, (path, channels) in enumerate(attentions):
        for key in (f"{2 * n + 1}.to_{x}_ip.weight" for x in "kv"):
            if np.shape(layers[key]) != (channels, width):
                found = f"ip_adapter.{key} has the shape {np.shape(layers[key])}"
                raise ValueError(f"made for another base model: {found}, {path} here takes {(channels, width)}")
    return AdapterFile(values, table, projection, {names[key]: array for key, array in layers.items()})


def _projection(found: Mapping[str, np.ndarray]) -> tuple[dict[str, int], KeyTable]:
    if "proj.weight" in found:
        (width,), (rows, inputs) = found["norm.weight"].shape, found["proj.weight"].shape
        sizes = {"image_embed_dim": inputs, "cross_attention_dim": width, "num_image_text_embeds": rows // width}
        return sizes, IMAGE_PROJECTION
    if "latents" not in found:
        faces = "perceiver_resampler.proj_in.weight" in found or "proj.0.weight" in found
        kind = "a full-face or FaceID" if faces else "an unknown"
        raise ValueError(f"{kind} IP-Adapter; this library has the base one and Plus")
    hidden, inputs = found["proj_in.weight"].shape
    sizes = {
        "embed_dims": inputs,
        "output_dims": found["proj_out.weight"].shape[0],
        "hidden_dims": hidden,
        "depth": len({key.split(".")[1] for key in found if key.startswith("layers.")}),
        "dim_head": _HEAD,
        "heads": found["layers.0.0.to_q.weight"].shape[0] // _HEAD,
        "num_queries": found["latents"].shape[1],
        "ffn_ratio": found["layers.0.1.1.weight"].shape[0] // hidden,
    }
    return sizes, resampler(sizes["depth"])
