"""The Stable-Diffusion UNet, in two separate calls: `encode` and `decode` (Rombach et al. 2022; diffusers'
UNet2DConditionModel).

Whatever is added to the skips and to the middle (the BDM branch, ControlNets) is added between the two calls; what is
added inside the encoder (T2I-Adapters) is an argument of the first. Both can stop short of the lower levels, where an
earlier step's result stands in for them: `encode_first` and `decode_last` (DeepCache, arXiv 2312.00858).

`merge` is the share of the first level's tokens that its self-attention does without (`merging`), 0 for none.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.linear import Linear
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.models.unet.config import EncoderConfig, UNetConfig
from bdm_jax.models.unet.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimeEmbedding,
    Transformer2D,
    Upsample,
    conv,
    repeat,
    timestep_embedding,
)

# What the timesteps add in each resnet, by its path: (B, O). Rows may be taken out of those of many timesteps.
TimeShifts = dict[str, jax.Array]


class Block(nnx.Module):
    """Resnets, each followed by a transformer where the level has attention; then perhaps one change of resolution."""

    def __init__(self, config: EncoderConfig, inputs: list[int], level: int, rngs: nnx.Rngs):
        outputs = config.block_out_channels[level]
        self.resnets = nnx.List(
            [
                ResnetBlock(i, outputs, config.norm_num_groups, config.norm_eps, rngs, config.time_embed_dim)
                for i in inputs
            ]
        )
        if layers := config.transformer_layers[level]:
            self.attentions = nnx.List([_transformer(config, level, layers, rngs) for _ in inputs])

    def layer(
        self, index: int, x: jax.Array, shifts: TimeShifts, cond: Conditioning, path: str, merge: float = 0.0
    ) -> jax.Array:
        """Layer `index` of the block at `path`: (B,H,W,I) -> (B,H,W,O)."""
        x = self.resnets[index](x, shifts[f"{path}.resnets.{index}"])
        if not hasattr(self, "attentions"):
            return x
        return self.attentions[index](x, cond.below(f"{path}.attentions.{index}"), merge)


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width = config.block_out_channels[-1]
        self.resnets = nnx.List(
            [
                ResnetBlock(width, width, config.norm_num_groups, config.norm_eps, rngs, config.time_embed_dim)
                for _ in range(2)
            ]
        )
        self.attentions = nnx.List([_transformer(config, config.levels - 1, config.mid_layers, rngs)])

    def __call__(self, x, shifts, cond):
        x = self.resnets[0](x, shifts["mid_block.resnets.0"])
        x = self.attentions[0](x, cond.below("mid_block.attentions.0"))
        return self.resnets[1](x, shifts["mid_block.resnets.1"])


def _transformer(config: EncoderConfig, level: int, layers: int, rngs: nnx.Rngs) -> Transformer2D:
    return Transformer2D(
        config.block_out_channels[level],
        layers,
        config.heads[level],
        config.cross_attention_dim,
        config.norm_num_groups,
        config.use_linear_projection,
        rngs,
    )


class UNetEncoder(nnx.Module):
    """The first half, shared by the backbone, the branch and ControlNets."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], rngs)
        self.time_embedding = TimeEmbedding(widths[0], config.time_embed_dim, rngs)
        if config.has_addition:
            inputs = config.projection_class_embeddings_input_dim
            self.add_embedding = TimeEmbedding(inputs, config.time_embed_dim, rngs)
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = Linear(config.encoder_hid_dim, config.cross_attention_dim, rngs=rngs)
        self.down_blocks = nnx.List([])
        previous = widths[0]
        for level, width in enumerate(widths):
            inputs = [previous] + [width] * (config.layers_per_block - 1)
            block = Block(config, inputs, level, rngs)
            if level < config.levels - 1:
                block.downsamplers = nnx.List([Downsample(width, rngs)])
            self.down_blocks.append(block)
            previous = width
        self.mid_block = MidBlock(config, rngs)

    def time_shifts(self, t: jax.Array, cond: Conditioning, dtype: jnp.dtype) -> TimeShifts:
        """What the timesteps t (B,) add in every resnet. `encode` and `decode` take it, or rows of it, in place of t:
        so it can be made for all steps at once.

        A network with an addition (SDXL) also reads the text's pooled vector and its size ids: the rows are then as
        many as the larger of both has, each of the fewer for several. Raises ValueError where `cond` lacks them.
        """
        temb = self._time(t, dtype)
        if self.config.has_addition:
            added = self._added(cond, dtype)
            rows = max(len(temb), len(added))
            temb = repeat(temb, rows) + repeat(added, rows)
        return self._shifts(temb)

    def time_shift_rows(self, t: jax.Array, cond: Conditioning, dtype: jnp.dtype) -> TimeShifts:
        """`time_shifts` for each of the timesteps t (N,) alone: (N,1,O), or (N,B,O) where a text of B rows plays a part
        in it; row i of every array stands in place of t in `encode` and `decode`.
        """
        temb = self._time(t, dtype)
        if not self.config.has_addition:
            return {path: shift[:, None] for path, shift in self._shifts(temb).items()}
        return self._shifts(temb[:, None] + self._added(cond, dtype))

    def with_keys(self, cond: Conditioning) -> Conditioning:
        """The text with its keys and values for every cross-attention of this network, so that no step makes them."""
        states = self._states(cond.tokens)
        keys = {
            f"{path}.attentions.{index}.transformer_blocks.{number}": layer.attn2.keys(states)
            for path, block in self._blocks()
            for index, transformer in enumerate(getattr(block, "attentions", ()))
            for number, layer in enumerate(transformer.transformer_blocks)
        }
        return replace(cond, keys=keys)

    def encode(
        self,
        latents: jax.Array,
        t: jax.Array | TimeShifts,
        cond: Conditioning,
        hint: jax.Array | None = None,
        features: Sequence[jax.Array] | None = None,
        merge: float = 0.0,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Noisy latents (B,H,W,C) at timesteps t (B,) -> (skip tensors in the order they are made, output of the
        middle).

        `hint`, already embedded to the width of the first level, is added after the first convolution (ControlNet).
        `features` (1,h,w,C), one per level, are added to what the level's last layer returns, or, where the level reads
        no text, its downsampler, in its skip too; one more is added to the middle's output (T2I-Adapter).

        The text may have U times as many rows as the latents: each row of the latents then stands for U, one after the
        other, and what comes before the text is first read (by its states or its pooled vector) is computed once for
        them. What is returned has B*U rows.
        """
        shifts, cond = self._read(t, cond, latents.dtype)
        skips = self._first(latents, shifts, cond, hint, features, merge)
        for level, block in enumerate(self.down_blocks):
            if level > 0:
                skips += self._level(level, skips[-1], shifts, cond, features)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](skips[-1])
                skips.append(x if features is None or hasattr(block, "attentions") else x + features[level])
        mid = self.mid_block(skips[-1], shifts, cond)
        if features is not None and len(features) > self.config.levels:
            mid += features[-1]
        return tuple(repeat(skip, len(mid)) for skip in skips), mid

    def encode_first(
        self,
        latents: jax.Array,
        t: jax.Array | TimeShifts,
        cond: Conditioning,
        hint: jax.Array | None = None,
        features: Sequence[jax.Array] | None = None,
        merge: float = 0.0,
    ) -> list[jax.Array]:
        """The first level of `encode` alone: its skip tensors, all that the decoder's last block takes.

        They have as many rows as the latents where no text is read at this level.
        """
        return self._first(latents, *self._read(t, cond, latents.dtype), hint, features, merge)

    def _first(self, latents, shifts, cond, hint, features, merge) -> list[jax.Array]:
        x = self.conv_in(latents)
        if hint is not None:
            x += hint
        return [x, *self._level(0, x, shifts, cond, features, merge)]

    def _level(self, level, x, shifts, cond, features, merge=0.0) -> list[jax.Array]:
        """What each layer of a level returns."""
        outputs, block = [], self.down_blocks[level]
        for index in range(len(block.resnets)):
            x = block.layer(index, x, shifts, cond, f"down_blocks.{level}", merge)
            outputs.append(x)
        if features is not None and (hasattr(block, "attentions") or not hasattr(block, "downsamplers")):
            outputs[-1] = x + features[level]
        return outputs

    def _read(self, t, cond: Conditioning, dtype: jnp.dtype) -> tuple[TimeShifts, Conditioning]:
        """Timesteps and text as the layers take them: shifts, and states of the width that cross-attention reads."""
        shifts = t if isinstance(t, dict) else self.time_shifts(t, cond, dtype)
        return shifts, cond if cond.keys is not None else replace(cond, tokens=self._states(cond.tokens))

    def _time(self, t, dtype):
        return self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).astype(dtype))

    def _added(self, cond: Conditioning, dtype: jnp.dtype) -> jax.Array:
        """What the pooled text and the size ids add to the time embedding (B,E)."""
        name, config = type(self).__name__, self.config
        pooled, ids = self._pooled(cond.need("pooled", name)), cond.need("time_ids", name)
        angles = timestep_embedding(ids.reshape(-1), config.addition_time_embed_dim).reshape(len(ids), -1)
        given, taken = pooled.shape[-1] + angles.shape[-1], config.projection_class_embeddings_input_dim
        if given != taken:
            raise ValueError(
                f"{name}: a pooled text of {pooled.shape[-1]} and {ids.shape[-1]} size ids of "
                f"{config.addition_time_embed_dim} make {given} numbers, not {taken}"
            )
        rows = max(len(pooled), len(angles))
        both = [repeat(part.astype(dtype), rows) for part in (pooled, angles)]
        return self.add_embedding(jnp.concatenate(both, axis=-1))

    def _shifts(self, temb: jax.Array) -> TimeShifts:
        temb = jax.nn.silu(temb)
        return {
            f"{path}.resnets.{index}": resnet.time_emb_proj(temb)
            for path, block in self._blocks()
            for index, resnet in enumerate(block.resnets)
        }

    def _states(self, tokens: jax.Array) -> jax.Array:
        """The text's states as cross-attention reads them (B,S,cross_attention_dim)."""
        return self.encoder_hid_proj(tokens) if hasattr(self, "encoder_hid_proj") else tokens

    def _pooled(self, pooled: jax.Array) -> jax.Array:
        """The pooled text as the addition reads it."""
        return pooled

    def _blocks(self):
        """Blocks that hold resnets, with their paths."""
        yield from ((f"down_blocks.{level}", block) for level, block in enumerate(self.down_blocks))
        yield "mid_block", self.mid_block


class UNet(UNetEncoder):
    """The whole backbone. Parameter paths equal diffusers' keys."""

    config: UNetConfig

    def __init__(self, config: UNetConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        widths = config.block_out_channels
        skips = list(config.skip_channels)
        self.up_blocks = nnx.List([])
        previous = widths[-1]
        for level in reversed(range(config.levels)):
            inputs = []
            for _ in range(config.layers_per_block + 1):
                inputs.append(previous + skips.pop())
                previous = widths[level]
            block = Block(config, inputs, level, rngs)
            if level > 0:
                block.upsamplers = nnx.List([Upsample(widths[level], rngs)])
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, epsilon=config.norm_eps)
        self.conv_out = conv(widths[0], config.out_channels, rngs)

    def decode(
        self,
        skips: tuple[jax.Array, ...],
        mid: jax.Array,
        t: jax.Array | TimeShifts,
        cond: Conditioning,
        merge: float = 0.0,
    ) -> jax.Array:
        """What `encode` returned (with residuals added, where there are any) -> prediction (B,H,W,C).

        Timesteps and text may have fewer rows, each for several of the others, one after the other.
        """
        shifts, cond = self._read(t, cond, mid.dtype)
        deep = self._deep(skips, mid, shifts, cond)
        return self._last(skips[: self.first_skips], deep, shifts, cond, merge)

    def decode_deep(
        self, skips: tuple[jax.Array, ...], mid: jax.Array, t: jax.Array | TimeShifts, cond: Conditioning
    ) -> jax.Array:
        """`decode` as far as its last block, which takes what this returns (B,H,W,C') and the first skips."""
        return self._deep(skips, mid, *self._read(t, cond, mid.dtype))

    def _deep(self, skips, mid, shifts, cond):
        skips = list(skips)
        x = mid
        for number in range(len(self.up_blocks) - 1):
            x = self._up(number, x, skips, shifts, cond)
            x = self.up_blocks[number].upsamplers[0](x, skips[-1].shape[1:3])
        return x

    def decode_last(
        self,
        skips: Sequence[jax.Array],
        deep: jax.Array,
        t: jax.Array | TimeShifts,
        cond: Conditioning,
        merge: float = 0.0,
    ) -> jax.Array:
        """The last block of `decode`: the skips of `encode_first` and what `decode_deep` returned -> prediction."""
        return self._last(skips, deep, *self._read(t, cond, deep.dtype), merge)

    def _last(self, skips, deep, shifts, cond, merge):
        x = self._up(len(self.up_blocks) - 1, deep, list(skips), shifts, cond, merge)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    @property
    def first_skips(self) -> int:
        """How many skip tensors `encode_first` makes."""
        return len(self.down_blocks[0].resnets) + 1

    def _up(self, number, x, skips, shifts, cond, merge=0.0):
        """The layers of a block of the decoder; takes its skips off the list."""
        block = self.up_blocks[number]
        for index in range(len(block.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = block.layer(index, x, shifts, cond, f"up_blocks.{number}", merge)
        return x

    def _blocks(self):
        yield from super()._blocks()
        yield from ((f"up_blocks.{number}", block) for number, block in enumerate(self.up_blocks))

    def __call__(self, latents, t, cond, residuals=None):
        t = t if isinstance(t, dict) else self.time_shifts(t, cond, latents.dtype)
        skips, mid = self.encode(latents, t, cond)
        if residuals is not None:
            skips, mid = residuals.add_to(skips, mid)
        return self.decode(skips, mid, t, cond)
