"""Sizes of the networks: frozen dataclasses whose fields carry the names of diffusers' and transformers' config.json.

`to_json` writes what `from_pretrained` of those libraries reads; `from_json` reads what they write and refuses, by
name, a value that these networks do not implement.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class EncoderConfig:
    """What the backbone, the branch and a ControlNet have in common: the first half of a Stable-Diffusion UNet."""

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: int = 2
    num_heads: int = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self):
        if len(self.attention_levels) != len(self.block_out_channels):
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} entries, "
                f"block_out_channels has {len(self.block_out_channels)}: they must agree"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or channels % self.num_heads:
                raise ValueError(
                    f"block_out_channels: {channels} must be a multiple of norm_num_groups ({self.norm_num_groups}) "
                    f"and of the number of attention heads ({self.num_heads})"
                )

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding after its two layers."""
        return 4 * self.block_out_channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of the skip tensors, in the order in which the encoder makes them."""
        channels = [self.block_out_channels[0]]
        for level, width in enumerate(self.block_out_channels):
            channels += [width] * (self.layers_per_block + (level < self.levels - 1))
        return tuple(channels)


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """The backbone: a Stable-Diffusion UNet. `sample_size` is the latents' side it was trained at."""

    out_channels: int = 4
    sample_size: int = 64


@dataclass(frozen=True)
class BranchConfig(EncoderConfig):
    """The BDM branch: a UNet encoder with zero convolutions, reading another language's text states."""

    cross_attention_dim: int = 1024


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """A stock ControlNet: the branch plus an embedding of its picture, whose layers' widths come last."""

    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    conditioning_channels: int = 3


@dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL. `scaling_factor` takes its latents to the unit-variance space in which diffusion happens."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TinyVAEConfig:
    """AutoencoderTiny (TAESD). Its latents are scaled already: `scaling_factor` is 1.

    Convolutions between levels keep the width, so that all of an encoder's or a decoder's levels have the same.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0

    def __post_init__(self):
        levels = len(self.encoder_block_out_channels)
        for part in ("decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"):
            if len(getattr(self, part)) != levels:
                raise ValueError(
                    f"{part} has {len(getattr(self, part))} entries, encoder_block_out_channels has {levels}: "
                    "they must agree"
                )
        for part in ("encoder_block_out_channels", "decoder_block_out_channels"):
            if len(set(getattr(self, part))) != 1:
                raise ValueError(f"{part}: {getattr(self, part)} must be one width throughout")

    @property
    def factor(self) -> int:
        """Pixels per latent, on each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's text tower (causal, pre-norm)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407


@dataclass(frozen=True)
class CLIPVisionConfig:
    """CLIP's vision tower with its projection; the sizes are those of ViT-H/14, which IP-Adapters for SD1.5 use."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class RobertaConfig:
    """The text tower of Chinese-CLIP: a BERT encoder without pooler (post-norm, bidirectional)."""

    vocab_size: int = 21128
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter for SD1.x: `full_adapter`, or the small `light_adapter`, whose last level is one more of the last
    width.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    def __post_init__(self):
        if self.adapter_type not in ("full_adapter", "light_adapter"):
            raise ValueError(f"adapter_type {self.adapter_type!r} is not implemented (full_adapter or light_adapter)")


@dataclass(frozen=True)
class ImageProjectionConfig:
    """IP-Adapter's base: one vector of a picture becomes a few tokens of context."""

    image_embed_dim: int = 1024
    cross_attention_dim: int = 768
    num_image_text_embeds: int = 4


@dataclass(frozen=True)
class ResamplerConfig:
    """IP-Adapter Plus: `num_queries` tokens of context from the tokens of a picture; `hidden_dims` wide inside."""

    embed_dims: int = 1280
    output_dims: int = 768
    hidden_dims: int = 768
    depth: int = 4
    dim_head: int = 64
    heads: int = 12
    num_queries: int = 16
    ffn_ratio: int = 4


_System = UNetConfig | BranchConfig | ControlNetConfig | VAEConfig | TinyVAEConfig | CLIPTextConfig | RobertaConfig
Config = _System | T2IAdapterConfig | CLIPVisionConfig

SD15_UNET = UNetConfig()
SD15_VAE = VAEConfig()
TAESD = TinyVAEConfig()
CLIP_L_TEXT = CLIPTextConfig()
CHINESE_CLIP_H_TEXT = RobertaConfig()
BDM_BRANCH = BranchConfig()
SD15_CONTROLNET = ControlNetConfig()

_MOST_LAYERS = 256
_LARGEST = 2**24

# Values that config.json may carry and that the networks here take for granted: (key, accepted values).
_ENCODER_FIXED = {
    "act_fn": ("silu",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1,),
    "center_input_sample": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "transformer_layers_per_block": (1,),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (None,),
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
    "is_xl": (False, None),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
_VAE_FIXED = {
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_TINY_VAE_FIXED = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "latent_magnitude": (3,),
    "latent_shift": (0.5,),
    "shift_factor": (0.0, None),
    "force_upcast": (False,),
}
_CLIP_FIXED = {"hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,)}
_ROBERTA_FIXED = {"position_embedding_type": ("absolute",), "hidden_act": ("gelu",)}


def to_json(config: Config) -> dict[str, Any]:
    """The config.json of diffusers or transformers for this config."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    if isinstance(config, EncoderConfig):
        return _encoder_to_json(config, values)
    if isinstance(config, VAEConfig):
        levels = len(config.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **values,
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    if isinstance(config, TinyVAEConfig):
        granted = {key: accepted[0] for key, accepted in _TINY_VAE_FIXED.items()}
        return {"_class_name": "AutoencoderTiny", **values, **granted}
    if isinstance(config, CLIPTextConfig):
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **values}
    if isinstance(config, CLIPVisionConfig):
        return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", **values}
    if isinstance(config, T2IAdapterConfig):
        return {"_class_name": "T2IAdapter", **values}
    granted = {"hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"architectures": ["ChineseCLIPTextModel"], "model_type": "chinese_clip_text_model", **values, **granted}


def from_json(values: dict[str, Any]) -> Config:
    """The config that a config.json describes.

    Raises:
        ValueError: an unknown class, a value that cannot be, or a setting that these networks do not implement (named).
    """
    name = values.get("_class_name") or values.get("model_type")
    if name == "UNet2DConditionModel":
        return _encoder_from_json(UNetConfig, values)
    if name in ("ControlNetModel", "ControlNetModelBDM"):
        branch = values.get("bdm_branch") or name == "ControlNetModelBDM"
        return _encoder_from_json(BranchConfig if branch else ControlNetConfig, values)
    if name == "AutoencoderKL":
        _check(values, _VAE_FIXED)
        return _pick(VAEConfig, values)
    if name == "AutoencoderTiny":
        _check(values, _TINY_VAE_FIXED)
        config = _pick(TinyVAEConfig, values)
        widths = config.decoder_block_out_channels  # diffusers writes them twice
        _check(values, {"block_out_channels": (list(widths), widths)})
        return config
    if name in ("clip_text_model", "clip"):
        values = _text_config(values) if name == "clip" else values
        _check(values, _CLIP_FIXED)
        return _pick(CLIPTextConfig, values)
    if name == "clip_vision_model":
        _check(values, _CLIP_FIXED)
        return _pick(CLIPVisionConfig, values)
    if name == "T2IAdapter":
        return _pick(T2IAdapterConfig, values)
    if name in ("chinese_clip_text_model", "chinese_clip", "bert"):
        values = _text_config(values) if name == "chinese_clip" else values
        _check(values, _ROBERTA_FIXED)
        return _pick(RobertaConfig, values)
    raise ValueError(f"config.json: {name!r} is not a network this library has")


def _encoder_to_json(config: EncoderConfig, values: dict[str, Any]) -> dict[str, Any]:
    attention = values.pop("attention_levels")
    values["attention_head_dim"] = values.pop("num_heads")  # diffusers' name for the number of heads
    values["down_block_types"] = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    granted = {
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }
    if isinstance(config, UNetConfig):
        values["up_block_types"] = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
        return {"_class_name": "UNet2DConditionModel", **values, **granted}
    if isinstance(config, BranchConfig):
        values["bdm_branch"] = True
    return {"_class_name": "ControlNetModel", **values, **granted}


def _encoder_from_json(cls: type, values: dict[str, Any]):
    _check(values, _ENCODER_FIXED)
    types = values.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    for block in types:
        if block not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise ValueError(f"config.json: down_block_types holds {block!r}, which is not implemented")
    heads = values.get("num_attention_heads") or values.get("attention_head_dim", 8)
    if not isinstance(heads, int):
        raise ValueError(f"config.json: attention_head_dim={heads!r}: only one number for all levels is implemented")
    return _pick(cls, {**values, "attention_levels": [t == "CrossAttnDownBlock2D" for t in types], "num_heads": heads})


def _check(values: dict[str, Any], fixed: dict[str, tuple]) -> None:
    for key, accepted in fixed.items():
        if key in values and values[key] not in accepted:
            raise ValueError(f"config.json: {key}={values[key]!r} is not implemented (only {accepted[0]!r})")


def _text_config(values: dict[str, Any]) -> dict[str, Any]:
    """The text tower's part of the config of a whole CLIP."""
    if not isinstance(values.get("text_config"), dict):
        raise ValueError("config.json: a whole CLIP without text_config")
    return values["text_config"]


def _pick(cls: type, values: dict[str, Any]):
    chosen, kinds = {}, get_type_hints(cls)
    for f in fields(cls):
        value = values.get(f.name, MISSING)
        if value is not MISSING and value is not None:
            chosen[f.name] = _value(f.name, value, kinds[f.name])
    return cls(**chosen)


def _value(name: str, value: Any, kind: Any) -> Any:
    """The value, if it is of its kind and of a size that a network may have; a config may come from anywhere."""
    if item := get_args(kind):
        if isinstance(value, list | tuple) and 0 < len(value) <= _MOST_LAYERS:
            return tuple(_value(name, part, item[0]) for part in value)
    elif kind is float and type(value) in (int, float) and 0 < value < _LARGEST:
        return float(value)
    elif kind is int and type(value) is int:
        least = 0 if name.endswith("_token_id") else 1
        most = _MOST_LAYERS if "layers" in name or name.endswith("_blocks") else _LARGEST
        if least <= value <= most:
            return value
    elif kind in (bool, str) and type(value) is kind:
        return value
    raise ValueError(f"config.json: {name}={value!r} cannot be")
