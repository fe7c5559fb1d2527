"""bdm-sdxl on TPU v5p."""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import bdm_sdxl

CONFIG = replace(bdm_sdxl.CONFIG, run=Path("runs/bdm-sdxl-v5p"), mesh=MeshConfig())
