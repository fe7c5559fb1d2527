"""Tags of Stable Diffusion's web UIs that name a network in a prompt: `<lora:name:0.8>`, which are no text of it.

| form | effect |
|---|---|
| `<lora:name>`, `<lora:name:0.8>` | the LoRA of that name, with that strength (1 without) |
| `<lora:name:0.5:0.8>`, `<lora:name:te=0.5:unet=0.8>` | with a strength in the text encoder and one in the UNet |
| `<lyco:...>` | the same |

Upper case and full-width ＜ ： ＞ mean the same; a backslash before a tag makes it text.
"""

import math
import re
from typing import NamedTuple

from bdm_jax.errors import UserError, short

_TAG = re.compile(r"(?<!\\)[<＜](lora|lyco|hypernet)[:：]([^<>＜＞]*)([>＞]?)", re.IGNORECASE)


class LoraTag(NamedTuple):
    """A LoRA that a prompt asks for."""

    name: str
    strength: float = 1.0
    text_strength: float = 1.0


def without_folder(tag: LoraTag) -> UserError:
    """The error for a LoRA that nobody says where to find."""
    return UserError(f"the prompt names the LoRA {tag.name!r}: give its folder, with --lora-dir (in Python, lora_dir)")


def take_tags(text: str) -> tuple[str, list[LoraTag]]:
    """A prompt -> its text without the tags, and these. Raises UserError for tags that are not understood."""
    found = [_tag(match) for match in _TAG.finditer(text)]
    return (_TAG.sub("", text), found) if found else (text, found)


def _tag(match: re.Match) -> LoraTag:
    name, *values = re.split("[:：]", match[2])
    if not match[3]:
        raise UserError(rf"{short(match[0])}: the tag has no > at its end; write <lora:NAME:STRENGTH>, or \< for text")
    if match[1].lower() == "hypernet":
        raise UserError(f"{match[0]}: hypernetworks are not supported; LoRAs are")
    plain = [value for value in values if "=" not in value]
    named = dict(value.split("=", 1) for value in values if "=" in value)
    if name.strip() and len(plain) <= 2 and named.keys() <= {"te", "unet"}:
        try:
            text = float(named.get("te", (plain or ["1"])[0]))
            unet = float(named.get("unet", plain[1] if len(plain) > 1 else text))
            if math.isfinite(text) and math.isfinite(unet):
                return LoraTag(name.strip(), unet, text)
        except ValueError:
            pass
    raise UserError(rf"{match[0]}: write it as <lora:NAME:STRENGTH> or <lora:NAME:TEXT:UNET>, or \< for text")
