"""Whether a drawing can fit into the device's memory at all: before it is begun, from sizes alone."""

import os

import jax

from bdm_jax.errors import UserError
from bdm_jax.models.config import Config, EncoderConfig, VAEConfig
from bdm_jax.models.convolution import prepare
from bdm_jax.models.functional import Params, input_dtype
from bdm_jax.sampling.settings import Sampling
from bdm_jax.systems.pipeline import BridgePipeline

_HELD = 2  # arrays of a network's widest level that are there at once at least: what a layer reads and what it writes


def check_memory(pipeline: BridgePipeline, settings: Sampling, size: tuple[int, int], batch: int) -> None:
    """Raises UserError where `batch` pictures of `size` (height, width) need more than the device has, whatever a
    compiler does: by the arrays that one layer of the UNet, or of the autoencoder's decoder, reads and writes.
    """
    available = device_memory()
    devices = max(jax.local_device_count(), 1)
    needed, what, hint = max(_needs(pipeline, settings, size, -(-batch // devices), available))
    if available and needed > available:
        height, width = size
        raise UserError(
            f"size {width}x{height}, {batch} at a time: {what} needs more than {gb(needed)} of memory, and there are "
            f"{gb(available)}: {hint}"
        )


def device_memory() -> int:
    """Bytes of the device that draws, as far as it tells: an accelerator's own, or the machine's; 0 where unknown."""
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return machine_memory()


def machine_memory() -> int:
    """Bytes of the machine's memory; 0 where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def prepared(config: Config, params: Params, size: tuple[int, int]) -> Params:
    """A network's parameters as it draws fastest at latents of `size` (see `models.convolution.prepare`), where there
    is room: prepared filters take up to as much as the network, which should have a third of the memory at most.
    """
    if not isinstance(config, EncoderConfig | VAEConfig):
        return params  # a text encoder, which may be in int8
    roomy = 3 * sum(x.nbytes for x in params.values()) < machine_memory()
    return prepare(config, params, size) if roomy else params


def gb(size: float) -> str:
    """Bytes in 10^9."""
    return f"{size / 1e9:,.1f} GB"


def _needs(
    pipeline: BridgePipeline, settings: Sampling, size: tuple[int, int], batch: int, available: int
) -> list[tuple[int, str, str]]:
    """(bytes, of what, what to change) at the widest place of each network."""
    pixels, unet = size[0] * size[1], pipeline.unet
    width = unet.config.block_out_channels[0] * input_dtype(unet.params).itemsize
    smaller = "take a smaller --size" + (" or --batch-size" if batch > 1 else "")
    found = [(_HELD * batch * pixels // pipeline.factor**2 * width, "the UNet", smaller)]
    if pipeline.vae is not None:
        # one picture at a time, where it is large; in tiles, what they are put together in (fp32)
        width = getattr(pipeline.vae.config, "block_out_channels", (3,))[0] * input_dtype(pipeline.vae.params).itemsize
        tiled = 0 < settings.vae_tile < max(size)
        together = 3 * 4 * pixels
        tiles_fit = not tiled and together <= available and found[0][0] <= available
        hint = f"add --vae-tile 512, or {smaller}" if tiles_fit else smaller
        found.append((together if tiled else _HELD * width * pixels, "the autoencoder", hint))
    return found
