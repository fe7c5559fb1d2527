"""The BDM branch (arXiv 2309.00952) and the ControlNet it descends from (arXiv 2302.05543).

Both are a UNet encoder whose features leave through 1x1 convolutions that start at zero. A ControlNet also reads
an image; the branch reads none: all that it adds is a text in another language.
"""

import re
from dataclasses import dataclass

import jax
from flax import nnx

from bdm_jax.models.linear import Linear
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.models.unet.config import BranchConfig, ControlNetConfig, EncoderConfig
from bdm_jax.models.unet.layers import conv, repeat
from bdm_jax.models.unet.unet import TimeShifts, UNetEncoder

# What a branch does not take over from the backbone.
REINITIALISED = re.compile(r"^(controlnet|(pooled_)?prompt_embeds_projection|encoder_hid_proj)|\.attn2\.to_[kv]\.")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """What is added to the backbone between `encode` and `decode`: one tensor per skip, and one for the middle."""

    skips: tuple[jax.Array, ...]
    mid: jax.Array

    def add_to(self, skips: tuple[jax.Array, ...], mid: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The backbone's skips and middle with these residuals added; each row of either may stand for several."""
        return tuple(add_repeating(s, r) for s, r in zip(skips, self.skips, strict=True)), add_repeating(mid, self.mid)


def add_repeating(x: jax.Array, residual: jax.Array) -> jax.Array:
    """A sum whose two sides have the same rows, or one side fewer, each for several of the other's."""
    batch = max(len(x), len(residual))
    return repeat(x, batch) + repeat(residual, batch)


class ResidualEncoder(UNetEncoder):
    """A UNet encoder with its zero convolutions (diffusers calls them controlnet_down_blocks, controlnet_mid_block)."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.controlnet_down_blocks = nnx.List([conv(width, width, rngs, kernel=1) for width in config.skip_channels])
        width = config.block_out_channels[-1]
        self.controlnet_mid_block = conv(width, width, rngs, kernel=1)

    def residuals(self, latents, t, cond, hint=None, merge: float = 0.0) -> Residuals:
        """Noisy latents (B,H,W,C), timesteps (B,), text, perhaps an embedded hint -> residuals (see `encode`)."""
        skips, mid = self.encode(latents, t, cond, hint, merge=merge)
        skips = tuple(zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True))
        return Residuals(skips, self.controlnet_mid_block(mid))


class Branch(ResidualEncoder):
    """The trainable half of a Bridge Diffusion Model. BDM-SDXL's first takes states and pooled text to the backbone's
    widths.
    """

    config: BranchConfig

    def __init__(self, config: BranchConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        if (states := config.prompt_embeds_dim) is not None:
            self.prompt_embeds_projection = Linear(states, config.cross_attention_dim, use_bias=False, rngs=rngs)
        if (pooled := config.pooled_prompt_embeds_dim) is not None:
            width = EncoderConfig.pooled_dim.fget(config)
            self.pooled_prompt_embeds_projection = Linear(pooled, width, use_bias=False, rngs=rngs)

    def __call__(
        self, latents: jax.Array, t: jax.Array | TimeShifts, cond: Conditioning, merge: float = 0.0
    ) -> Residuals:
        return self.residuals(latents, t, cond, merge=merge)

    def _states(self, tokens):
        if hasattr(self, "prompt_embeds_projection"):
            return self.prompt_embeds_projection(tokens)
        return super()._states(tokens)

    def _pooled(self, pooled):
        if hasattr(self, "pooled_prompt_embeds_projection"):
            return self.pooled_prompt_embeds_projection(pooled)
        return pooled


class HintEmbedding(nnx.Module):
    """A ControlNet's image (B, 2^k H, 2^k W, 3) in [0, 1] -> (B, H, W, width of the first level); k strides of
    two.
    """

    def __init__(self, config: ControlNetConfig, rngs: nnx.Rngs):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], rngs)
        self.blocks = nnx.List([])
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            self.blocks.append(conv(narrow, narrow, rngs))
            self.blocks.append(conv(narrow, wide, rngs, stride=2))
        self.conv_out = conv(widths[-1], config.block_out_channels[0], rngs)

    def __call__(self, hint):
        x = jax.nn.silu(self.conv_in(hint))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(ResidualEncoder):
    """A stock ControlNet: reads the backbone's own text and an image."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.controlnet_cond_embedding = HintEmbedding(config, rngs)

    def __call__(self, latents: jax.Array, t: jax.Array, cond: Conditioning, hint: jax.Array) -> Residuals:
        return self.residuals(latents, t, cond, self.controlnet_cond_embedding(hint.astype(latents.dtype)))


def init_branch_from_unet(branch: dict[str, jax.Array], unet: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Start a branch from a backbone: every tensor of the same name is copied but those of `REINITIALISED`.

    These are the zero convolutions and the keys and values of the text (14 tensors at SD1.5's sizes): the two text
    spaces are unrelated, even where they are of one width. The zero convolutions make that safe at step 0.
    """
    return {path: value if REINITIALISED.search(path) else unet[path] for path, value in branch.items()}
