"""What small systems of diffusers have in common: an autoencoder of SDXL's plan, and random weights."""

import diffusers
import torch


def tiny_vae() -> diffusers.AutoencoderKL:
    """Eight pixels a latent, of 32 pixels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025,
    )


def fill(network: torch.nn.Module, generator: torch.Generator) -> None:
    """Random weights of a sensible size."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(scale * noise + float(parameter.ndim == 1 and name.endswith("weight")))
    network.eval()
