"""Fine-tuning a whole backbone on another set or style: out comes a backbone like any other, for any branch."""

from dataclasses import dataclass, replace
from typing import Any

from bdm_jax.models.config import Config
from bdm_jax.models.functional import abstract
from bdm_jax.training.objectives.job import Trees
from bdm_jax.training.objectives.plugin import LoadedSystem, PluginJob, PluginTask


@dataclass(frozen=True)
class FinetuneTask(PluginTask):
    """Train the backbone's UNet on; text_encoder: its text tower too. Fields: see `PluginTask`."""

    text_encoder: bool = False
    caption_dropout: float = 0.1

    @property
    def trained(self) -> tuple[str, ...]:
        """The networks that are trained."""
        return ("unet", "text_encoder") if self.text_encoder else ("unet",)

    def trained_shapes(self, configs: dict[str, Config]) -> dict[str, Any]:
        return {part: abstract(configs[part]) for part in self.trained}

    def make(self, ready: LoadedSystem) -> "FinetuneJob":
        return FinetuneJob(self, ready, {part: getattr(ready.system, part).params for part in self.trained})


class FinetuneJob(PluginJob):
    """`FinetuneTask` made ready."""

    def pipeline(self, params: Trees):
        return replace(self.system, **{part: self.component(part, params) for part in params})

    def export(self, params, folder, metadata):
        """A whole pipeline folder."""
        self.export_system(params, folder, metadata)
