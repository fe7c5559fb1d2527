"""kolors-concept on TPU v5p: UNet and ChatGLM3 over the eight chips of a group.

python train.py kolors-base-v5p --data.folder DIR
python -m bdm_jax.plan kolors-base-v5p --topology v5p:4x4x8
Hardware: 128 chips v5p, 16 pictures each. Compiled for 1024 px, not run: 49 of 95 GB, which are 5.2 for the train
state, 1.5 for ChatGLM3 and 41.9 for all else; 2.3 s a step at 45% of the peak, 27.6 GB sent per chip.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import kolors_concept

CONFIG = replace(kolors_concept.CONFIG, run=Path("runs/kolors-base-v5p"), mesh=MeshConfig(fsdp=8))
