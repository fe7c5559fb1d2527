"""Sizes of the autoencoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdm_jax.models.values import check, pick, plain


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


SD15_VAE = VAEConfig()
SDXL_VAE = VAEConfig(sample_size=1024, scaling_factor=0.13025)
TAESD = TinyVAEConfig()

# Values that config.json may carry and that the networks here are built for: (key, accepted values).
VAE_FIXED = {
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
TINY_VAE_FIXED = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "latent_magnitude": (3,),
    "latent_shift": (0.5,),
    "shift_factor": (0.0, None),
    "force_upcast": (False,),
}


def _vae_from_json(values: Mapping[str, Any]) -> VAEConfig:
    check(values, VAE_FIXED)
    return pick(VAEConfig, values)


def _vae_to_json(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **plain(config),
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _tiny_from_json(values: Mapping[str, Any]) -> TinyVAEConfig:
    check(values, TINY_VAE_FIXED)
    config = pick(TinyVAEConfig, values)
    widths = config.decoder_block_out_channels  # diffusers writes them twice
    check(values, {"block_out_channels": (list(widths), widths)})
    return config


def _tiny_to_json(config: TinyVAEConfig) -> dict[str, Any]:
    fixed = {key: accepted[0] for key, accepted in TINY_VAE_FIXED.items()}
    return {"_class_name": "AutoencoderTiny", **plain(config), **fixed}


# How a config.json is read, by its _class_name, and how a config is written.
READERS = {"AutoencoderKL": _vae_from_json, "AutoencoderTiny": _tiny_from_json}
WRITERS = {VAEConfig: _vae_to_json, TinyVAEConfig: _tiny_to_json}
