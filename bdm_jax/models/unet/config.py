"""Sizes of the denoising networks and of what is built for them: UNet, branch, ControlNet, adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from bdm_jax.models.values import check, pick, plain

# Original size, crop and target size of an image, two numbers each, on which SDXL and Kolors are conditioned.
SIZE_IDS = 6
_ADAPTER_TYPES = ("full_adapter", "light_adapter", "full_adapter_xl")


@dataclass(frozen=True)
class EncoderConfig:
    """What the backbone, the branch and a ControlNet have in common: the first half of a Stable-Diffusion UNet.

    Attributes:
      transformer_layers: blocks in each transformer of a level, 0 for a level without attention. The middle has as many
        as the last level with attention.
      num_heads: of the attention, for all levels or for each; the middle has the last level's.
      use_linear_projection: transformers project with a dense layer in place of a 1x1 convolution.
      addition_time_embed_dim, projection_class_embeddings_input_dim: width of a size id's sinusoids, and of all of them
        together with the pooled text: they are added to the time embedding (SDXL). None where nothing is added.
      encoder_hid_dim: width of the text's states where a dense layer takes them to `cross_attention_dim` first
        (Kolors), else None.
    """

    in_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)
    layers_per_block: int = 2
    num_heads: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    encoder_hid_dim: int | None = None

    def __post_init__(self):
        for name in ("transformer_layers", "num_heads"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.levels:
                raise ValueError(
                    f"{name} has {len(value)} entries, block_out_channels has {self.levels}: they must agree"
                )
        for channels, layers, heads in zip(self.block_out_channels, self.transformer_layers, self.heads, strict=True):
            if channels % self.norm_num_groups or layers and channels % heads:
                raise ValueError(
                    f"block_out_channels: {channels} must be a multiple of norm_num_groups ({self.norm_num_groups}) "
                    f"and of the number of attention heads ({heads})"
                )
        if self.block_out_channels[-1] % self.heads[-1]:
            raise ValueError(
                f"block_out_channels: the middle's {self.block_out_channels[-1]} must be a multiple of its number of "
                f"attention heads ({self.heads[-1]})"
            )
        if (self.addition_time_embed_dim is None) != (self.projection_class_embeddings_input_dim is None):
            raise ValueError(
                "addition_time_embed_dim and projection_class_embeddings_input_dim belong together: give both or none"
            )
        if self.has_addition and self.projection_class_embeddings_input_dim <= SIZE_IDS * self.addition_time_embed_dim:
            raise ValueError(
                f"projection_class_embeddings_input_dim: {self.projection_class_embeddings_input_dim} leaves nothing "
                f"for a pooled text beside {SIZE_IDS} size ids of {self.addition_time_embed_dim} each"
            )

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads,) * self.levels

    @property
    def mid_layers(self) -> int:
        """Blocks in the middle's transformer."""
        return next((layers for layers in reversed(self.transformer_layers) if layers), 1)

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding after its two layers."""
        return 4 * self.block_out_channels[0]

    @property
    def has_addition(self) -> bool:
        """Whether a pooled text and size ids are added to the time embedding."""
        return self.projection_class_embeddings_input_dim is not None

    @property
    def text_dim(self) -> int:
        """Width of the text's states that the network is given."""
        return self.encoder_hid_dim or self.cross_attention_dim

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled text that the network is given, None where it reads none."""
        if not self.has_addition:
            return None
        return self.projection_class_embeddings_input_dim - SIZE_IDS * self.addition_time_embed_dim

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Latents, on a side, for one number of what a T2I-Adapter adds to each level: before the level's downsampler
        where it reads the text, else after.
        """
        levels = enumerate(self.transformer_layers)
        return tuple(2 ** min(level + (not layers), self.levels - 1) for level, layers in levels)

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
    """The BDM branch: a UNet encoder with zero convolutions, reading another language's text states.

    `prompt_embeds_dim` and `pooled_prompt_embeds_dim` are the widths of states and pooled text that BDM-SDXL's two
    bias-free layers take to the backbone's; None where there are no such layers.
    """

    cross_attention_dim: int = 1024
    prompt_embeds_dim: int | None = None
    pooled_prompt_embeds_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.pooled_prompt_embeds_dim is not None and not self.has_addition:
            raise ValueError("pooled_prompt_embeds_dim needs addition_time_embed_dim: nothing else reads a pooled text")
        if self.prompt_embeds_dim is not None and self.encoder_hid_dim is not None:
            raise ValueError("prompt_embeds_dim and encoder_hid_dim both say how wide the text is: give one")

    @property
    def text_dim(self) -> int:
        """Width of the text's states that the branch is given."""
        return self.prompt_embeds_dim or super().text_dim

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled text that the branch is given, None where it reads none."""
        return self.pooled_prompt_embeds_dim or super().pooled_dim


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """A stock ControlNet: the branch plus an embedding of its image, whose layers' widths come last."""

    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    conditioning_channels: int = 3


@dataclass(frozen=True)
class T2IAdapterConfig:
    """A T2I-Adapter: `full_adapter` of SD1.x, the small `light_adapter`, whose last level is one more of the last
    width, or `full_adapter_xl` of SDXL, which halves its resolution once only, before the third level.
    """

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    def __post_init__(self):
        if self.adapter_type not in _ADAPTER_TYPES:
            raise ValueError(f"adapter_type {self.adapter_type!r} is not implemented ({', '.join(_ADAPTER_TYPES)} are)")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each feature."""
        return self.channels + self.channels[-1:] * (self.adapter_type == "light_adapter")

    @property
    def halved(self) -> tuple[bool, ...]:
        """Which levels begin with half the resolution of the one before."""
        xl = self.adapter_type == "full_adapter_xl"
        return tuple(level == 2 if xl else level > 0 for level in range(len(self.widths)))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image, on a side, for one of each feature."""
        return tuple(self.downscale_factor * 2**halvings for halvings in accumulate(self.halved))


@dataclass(frozen=True)
class ImageProjectionConfig:
    """IP-Adapter's base: one vector of an image becomes a few tokens of context."""

    image_embed_dim: int = 1024
    cross_attention_dim: int = 768
    num_image_text_embeds: int = 4


@dataclass(frozen=True)
class ResamplerConfig:
    """IP-Adapter Plus: `num_queries` tokens of context from the tokens of an image; `hidden_dims` wide inside."""

    embed_dims: int = 1280
    output_dims: int = 768
    hidden_dims: int = 768
    depth: int = 4
    dim_head: int = 64
    heads: int = 12
    num_queries: int = 16
    ffn_ratio: int = 4


_SDXL = dict(
    block_out_channels=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    num_heads=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)

SD15_UNET = UNetConfig()
SD15_CONTROLNET = ControlNetConfig()
BDM_BRANCH = BranchConfig()
SDXL_UNET = UNetConfig(**_SDXL, sample_size=128)
BDM_SDXL_BRANCH = BranchConfig(**_SDXL, prompt_embeds_dim=1792, pooled_prompt_embeds_dim=1024)
KOLORS_UNET = UNetConfig(
    **{**_SDXL, "projection_class_embeddings_input_dim": 5632}, encoder_hid_dim=4096, sample_size=128
)


def branch_config(
    unet: UNetConfig, text_width: int, pooled_width: int | None = None, context: int | None = None
) -> BranchConfig:
    """The branch of a backbone for a text whose states are `text_width` wide (and its pooled vector `pooled_width`).

    `context`: a dense layer takes the states to this width first, as Kolors' UNet has one.

    A backbone that adds a pooled text gives BDM-SDXL's form: both are first projected to the backbone's widths.

    Raises:
        ValueError: such a backbone, and no `pooled_width`.
    """
    shared = {f.name: getattr(unet, f.name) for f in fields(EncoderConfig)} | {"encoder_hid_dim": None}
    if not unet.has_addition:
        projected = {} if context is None else {"encoder_hid_dim": text_width}
        return BranchConfig(**{**shared, "cross_attention_dim": context or text_width, **projected})
    if context is not None:
        raise ValueError("this backbone's branch has a projection of its own: leave the context's width out")
    if pooled_width is None:
        raise ValueError("this backbone adds a pooled text to its time embedding: its branch needs one too")
    return BranchConfig(**shared, prompt_embeds_dim=text_width, pooled_prompt_embeds_dim=pooled_width)


# ------------------------------------------------------------------------------------------------------- config.json

# Values that config.json may carry and that the networks here are built for: (key, accepted values).
ENCODER_FIXED = {
    "act_fn": ("silu",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_scale_factor": (1,),
    "center_input_sample": (False,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "class_embed_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "encoder_hid_dim_type": (None, "text_proj", "ip_image_proj"),  # the last where an IP-Adapter is saved in it
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "attention_type": (None, "default"),
    "cross_attention_norm": (None,),
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
    "is_xl": (False, None, True),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
_XL_WIDTHS = {"prompt_embeds_dim": 1792, "pooled_prompt_embeds_dim": 1024}  # written into 360's code, not its config


def _encoder_to_json(config: EncoderConfig) -> dict[str, Any]:
    values = {key: value for key, value in plain(config).items() if value is not None}
    layers = values.pop("transformer_layers")
    values["attention_head_dim"] = values.pop("num_heads")  # diffusers' name for the number of heads
    values["down_block_types"] = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layers]
    if not values["use_linear_projection"]:
        del values["use_linear_projection"]
    if len(depths := set(layers) - {0}) > 1:
        # Where there is no attention the number plays no part, but the last one is the middle's.
        after = max(level for level, depth in enumerate(layers) if depth)
        values["transformer_layers_per_block"] = [
            depth or (config.mid_layers if level > after else 1) for level, depth in enumerate(layers)
        ]
    elif depths - {1}:
        values["transformer_layers_per_block"] = config.mid_layers
    if config.has_addition:
        values["addition_embed_type"] = "text_time"
    if config.encoder_hid_dim is not None:
        values["encoder_hid_dim_type"] = "text_proj"
    values |= {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1}
    if isinstance(config, UNetConfig):
        values["up_block_types"] = _mirrored(values["down_block_types"])
        return {"_class_name": "UNet2DConditionModel", **values}
    if isinstance(config, BranchConfig):
        values |= {"bdm_branch": True, **({"is_xl": True} if config.prompt_embeds_dim else {})}
    return {"_class_name": "ControlNetModel", **values}


def _encoder_from_json(cls: type, values: Mapping[str, Any]) -> EncoderConfig:
    check(values, ENCODER_FIXED)
    types = values.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    for block in types:
        if block not in ("CrossAttnDownBlock2D", "DownBlock2D"):
            raise ValueError(f"config.json: down_block_types holds {block!r}, which is not implemented")
    if cls is UNetConfig and list(values.get("up_block_types") or _mirrored(types)) != _mirrored(types):
        raise ValueError(f"config.json: up_block_types={values['up_block_types']!r} do not mirror down_block_types")
    depths = values.get("transformer_layers_per_block") or 1
    depths = list(depths) if isinstance(depths, list | tuple) else [depths] * len(types)
    if len(depths) != len(types) or not all(type(depth) is int and depth > 0 for depth in depths):
        raise ValueError(
            f"config.json: transformer_layers_per_block={values['transformer_layers_per_block']!r} is not a valid "
            f"value for {len(types)} levels"
        )
    values = {
        **values,
        "transformer_layers": [d if t == "CrossAttnDownBlock2D" else 0 for d, t in zip(depths, types, strict=True)],
        "num_heads": values.get("num_attention_heads") or values.get("attention_head_dim", 8),
    }
    if values.get("addition_embed_type") is None:
        values |= {"addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None}
    if values.get("encoder_hid_dim_type") == "text_proj" and values.get("encoder_hid_dim") is None:
        raise ValueError("config.json: encoder_hid_dim_type without encoder_hid_dim")
    if cls is BranchConfig and values.get("is_xl"):
        values = {**_XL_WIDTHS, **values}
    elif values.get("is_xl"):
        raise ValueError("config.json: is_xl=True is a branch's")
    config = pick(cls, values)
    if config.mid_layers != depths[-1]:
        raise ValueError(
            f"config.json: transformer_layers_per_block={depths} gives the middle {depths[-1]}; only as many as the "
            f"last level with attention ({config.mid_layers}) is implemented"
        )
    return config


def _mirrored(down_block_types: list[str]) -> list[str]:
    return [name.replace("Down", "Up") for name in reversed(down_block_types)]


def _control_from_json(values: Mapping[str, Any]) -> BranchConfig | ControlNetConfig:
    branch = values.get("bdm_branch") or values.get("_class_name") == "ControlNetModelBDM"
    return _encoder_from_json(BranchConfig if branch else ControlNetConfig, values)


def _unet_from_json(values: Mapping[str, Any]) -> UNetConfig:
    return _encoder_from_json(UNetConfig, values)


def _adapter_from_json(values: Mapping[str, Any]) -> T2IAdapterConfig:
    return pick(T2IAdapterConfig, values)


def _adapter_to_json(config: T2IAdapterConfig) -> dict[str, Any]:
    return {"_class_name": "T2IAdapter", **plain(config)}


# How a config.json is read, by its _class_name or model_type, and how a config is written.
READERS = {
    "UNet2DConditionModel": _unet_from_json,
    "ControlNetModel": _control_from_json,
    "ControlNetModelBDM": _control_from_json,
    "T2IAdapter": _adapter_from_json,
}
WRITERS = {
    UNetConfig: _encoder_to_json,
    BranchConfig: _encoder_to_json,
    ControlNetConfig: _encoder_to_json,
    T2IAdapterConfig: _adapter_to_json,
}
