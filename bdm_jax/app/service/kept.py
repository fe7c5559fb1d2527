"""Systems in memory: those drawn with last, as many as it has room for."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bdm_jax.app.parts import Parts
from bdm_jax.app.preview import latent_colours
from bdm_jax.errors import out_of_memory
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.memory import device_memory
from bdm_jax.systems.pipeline import BridgePipeline

_PICTURED = ("control", "adapter", "image_prompt")  # parts with a picture of their own beside the network
_SHARE = 0.4  # of the memory for systems that wait; drawing needs the rest, prepared filters included
_UNKNOWN = 8 << 30  # bytes, where a system does not say how much memory it has


@dataclass
class KeptSystem:
    """A pipeline with what was read or computed for it once."""

    parts: Parts
    pipeline: BridgePipeline

    def __post_init__(self):
        self._pictured: tuple[Parts, list[Control | ImagePrompt]] | None = None

    @cached_property
    def colours(self) -> np.ndarray:
        """For previews, see `preview.latent_colours`."""
        return latent_colours(self.pipeline.vae)

    @cached_property
    def size(self) -> int:
        """Bytes of its networks."""
        networks = self.pipeline.networks.values()
        return sum(leaf.nbytes for network in networks for leaf in network.params.values())

    def controls(self, parts: Parts) -> list[Control | ImagePrompt]:
        """Those that were asked for last are kept. Raises UserError or FileError."""
        if not any(getattr(parts, name) for name in _PICTURED):
            return []
        if self._pictured is None or self._pictured[0] != parts:
            self._pictured = None  # their networks go before others come
            self._pictured = parts, parts.load_controls()
        return self._pictured[1]


class KeptSystems:
    """Keeps the systems that were asked for last; always the latest one. For one thread."""

    def __init__(self):
        self._systems: OrderedDict[tuple[Parts, str], KeptSystem] = OrderedDict()

    def __len__(self) -> int:
        return len(self._systems)

    def get(self, parts: Parts, dtype: str) -> KeptSystem:
        """The system of these parts, read where it is not there. Raises UserError or FileError as `Parts.load`."""
        plain = replace(parts, **dict.fromkeys(_PICTURED, ()))
        key = plain, dtype
        if key not in self._systems:
            self._make_room(max((system.size for system in self._systems.values()), default=0))
            try:
                system = KeptSystem(plain, plain.load(dtype))
            except Exception as error:
                if not self._systems or out_of_memory(error) is None:
                    raise
                self._systems.clear()
                system = KeptSystem(plain, plain.load(dtype))
            self._systems[key] = system
        self._systems.move_to_end(key)
        return self._systems[key]

    def keep_only_latest(self) -> bool:
        """Let go of all but the latest one; whether there were any."""
        others = len(self._systems) > 1
        while len(self._systems) > 1:
            self._systems.popitem(last=False)
        return others

    def _make_room(self, size: int) -> None:
        """For one more, which may be as large as the largest."""
        room = (device_memory() or _UNKNOWN) * _SHARE - size
        while self._systems and sum(system.size for system in self._systems.values()) > room:
            self._systems.popitem(last=False)
