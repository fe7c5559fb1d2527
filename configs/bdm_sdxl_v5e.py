"""bdm-sdxl on TPU v5e."""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import bdm_sdxl

CONFIG = replace(
    bdm_sdxl.CONFIG,
    run=Path("runs/bdm-sdxl-v5e"),
    accumulate=4,
    mesh=MeshConfig(fsdp=16, strategy="zero1"),
)
