"""What the keys of community files are called here: one table per layout, used in both directions.

The library's own names are diffusers' and transformers' names, so that most tables are short. A table of another layout
lists modules, (ours, theirs); what lies below a module is called the same in both.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class KeyTable:
    """How the keys of one kind of file differ from this library's.

    Attributes:
      prefix: what this library's keys begin with, and what is written.
      accepted: prefixes that a file may have in its place; "" stands for none.
      ignored: patterns of keys that carry nothing the network needs (buffers, parts of a larger file).
      modules: (ours, theirs), names of modules without the prefix.
      convolutions: pattern of our names of the linear layers that the file keeps as 1x1 convolutions.
    """

    prefix: str = ""
    accepted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    modules: Pairs = ()
    convolutions: str = r"(?!)"

    def here(self, key: str) -> str | None:
        """The library's name of a file's key; None for one that is ignored."""
        if any(re.fullmatch(pattern, key) for pattern in self.ignored):
            return None
        if not (self.prefix and key.startswith(self.prefix)):
            for prefix in sorted(self.accepted, key=len, reverse=True):
                if key.startswith(prefix):
                    key = self.prefix + key.removeprefix(prefix)
                    break
        return self.prefix + _rename(key.removeprefix(self.prefix), self._ours)

    def there(self, key: str) -> str:
        """The file's name of a key of the library's: the inverse of `here`, with `prefix`."""
        return self.prefix + _rename(key.removeprefix(self.prefix), self._theirs)

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.modules}

    @cached_property
    def _theirs(self) -> dict[str, str]:
        return dict(self.modules)


def _rename(key: str, names: Mapping[str, str]) -> str:
    """The longest module that the key lies in, renamed."""
    end = len(key) if names else -1
    while end > 0:
        if key[:end] in names:
            return names[key[:end]] + key[end:]
        end = key.rfind(".", 0, end)
    return key


PLAIN = KeyTable()
# transformers 5 writes CLIP text keys without their prefix and reads both; earlier ones kept position_ids as a buffer.
CLIP_TEXT = KeyTable(prefix="text_model.", accepted=("",), ignored=(r"(.*\.)?position_ids",))
# The vision tower with its projection.
CLIP_VISION = KeyTable(ignored=(r"(.*\.)?position_ids",))
# The Chinese tower alone, or as a part of a whole Chinese-CLIP; its pooler and projection play no part in BDM. The
# cn_clip package calls it bert.
CHINESE_TEXT = KeyTable(
    accepted=("text_model.", "bert."),
    ignored=(
        r"(.*\.)?position_ids",
        r"((text_model|bert)\.)?pooler\..*",
        r"(vision_model|visual_projection|text_projection|visual)(\..*)?|logit_scale",
    ),
)
# A branch has no hint network; a ControlNet file used as one may still carry it.
BRANCH = KeyTable(ignored=(r"controlnet_cond_embedding\..*",))

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

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def ldm_unet(attention: Sequence[bool], layers: int) -> KeyTable:
    """CompVis' names of a UNet (`model.diffusion_model.` removed) whose levels have so many layers, with attention or
    without.
    """
    return KeyTable(modules=(*_ldm_encoder(attention, layers), *_ldm_decoder(attention, layers)))


def ldm_controlnet(attention: Sequence[bool], layers: int, hints: int = 6) -> KeyTable:
    """lllyasviel's names of a ControlNet (`control_model.` removed) whose hint network has so many inner layers."""
    hint = "controlnet_cond_embedding"
    pairs = [(f"{hint}.conv_in", "input_hint_block.0"), (f"{hint}.conv_out", f"input_hint_block.{2 * hints + 2}")]
    pairs += [(f"{hint}.blocks.{i}", f"input_hint_block.{2 * i + 2}") for i in range(hints)]
    pairs += [(f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0") for i in range(len(attention) * (layers + 1))]
    return KeyTable(modules=(*_ldm_encoder(attention, layers), *pairs, ("controlnet_mid_block", "middle_block_out.0")))


def ldm_vae(levels: int, layers: int) -> KeyTable:
    """CompVis' names of an AutoencoderKL (`first_stage_model.` removed), its attention made of 1x1 convolutions."""
    pairs = []
    for half, side, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        sampler = f"{side}sample"
        for level in range(levels):
            ours = f"{half}.{side}_blocks.{level}"
            theirs = f"{half}.{side}.{level if side == 'down' else levels - 1 - level}"
            for layer in range(count):
                at = f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}"
                pairs += [at, (f"{at[0]}.conv_shortcut", f"{at[1]}.nin_shortcut")]
            pairs.append((f"{ours}.{sampler}rs.0.conv", f"{theirs}.{sampler}.conv"))
        mid = f"{half}.mid_block"
        pairs += [(f"{mid}.resnets.{i}", f"{half}.mid.block_{i + 1}") for i in range(2)]
        names = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
        pairs += [(f"{mid}.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}") for ours, theirs in names]
        pairs.append((f"{half}.conv_norm_out", f"{half}.norm_out"))
    return KeyTable(modules=tuple(pairs), convolutions=r"\w+\.mid_block\.attentions\.0\.to_\w+(\.0)?\.weight")


def original_t2i_adapter(levels: int, layers: int, light: bool = False) -> KeyTable:
    """TencentARC's names of a T2I-Adapter with so many levels (a light one's last included), of so many layers."""
    pairs = []
    for i in range(levels):
        ours, first = f"adapter.body.{i}", i * layers
        inner = [f"body.{i}.body.{j}" if light else f"body.{first + j}" for j in range(layers)]
        pairs += [(f"{ours}.resnets.{j}", theirs) for j, theirs in enumerate(inner)]
        pairs.append((ours, f"body.{i}") if light else (f"{ours}.in_conv", f"body.{first}.in_conv"))
    return KeyTable(modules=(*pairs, *(() if light else (("adapter.conv_in", "conv_in"),))))


def table_for(config: Mapping[str, Any], keys: Iterable[str] = ()) -> KeyTable:
    """The table of the network that a component's config.json describes, in the layout that the keys are in."""
    if config.get("_class_name") == "AutoencoderKL" and any(".attentions.0.query." in key for key in keys):
        return OLD_VAE
    return BRANCH if config.get("bdm_branch") else _BY_TYPE.get(config.get("model_type"), PLAIN)


def _ldm_encoder(attention: Sequence[bool], layers: int) -> list[tuple[str, str]]:
    pairs = [("conv_in", "input_blocks.0.0")]
    pairs += [("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2")]
    for level, has in enumerate(attention):
        for layer in range(layers):
            at = f"input_blocks.{1 + level * (layers + 1) + layer}"
            pairs += _resnet(f"down_blocks.{level}.resnets.{layer}", f"{at}.0")
            pairs += [(f"down_blocks.{level}.attentions.{layer}", f"{at}.1")] if has else []
        at = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        pairs += [(f"down_blocks.{level}.downsamplers.0.conv", at)] if level < len(attention) - 1 else []
    pairs += _resnet("mid_block.resnets.0", "middle_block.0") + _resnet("mid_block.resnets.1", "middle_block.2")
    return [*pairs, ("mid_block.attentions.0", "middle_block.1")]


def _ldm_decoder(attention: Sequence[bool], layers: int) -> list[tuple[str, str]]:
    pairs = [("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    for level, has in enumerate(reversed(attention)):
        for layer in range(layers + 1):
            at = f"output_blocks.{level * (layers + 1) + layer}"
            pairs += _resnet(f"up_blocks.{level}.resnets.{layer}", f"{at}.0")
            pairs += [(f"up_blocks.{level}.attentions.{layer}", f"{at}.1")] if has else []
        at = f"output_blocks.{level * (layers + 1) + layers}.{2 if has else 1}.conv"
        pairs += [(f"up_blocks.{level}.upsamplers.0.conv", at)] if level < len(attention) - 1 else []
    return pairs


def _resnet(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESNET]


_BY_TYPE = {
    "clip": CLIP_TEXT,
    "clip_text_model": CLIP_TEXT,
    "clip_vision_model": CLIP_VISION,
    "bert": CHINESE_TEXT,
    "chinese_clip": CHINESE_TEXT,
    "chinese_clip_text_model": CHINESE_TEXT,
}
