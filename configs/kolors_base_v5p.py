"""kolors-concept on TPU v5p: UNet and ChatGLM3 sharded over the chips of a group."""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import kolors_concept

CONFIG = replace(kolors_concept.CONFIG, run=Path("runs/kolors-base-v5p"), mesh=MeshConfig(fsdp=8))
