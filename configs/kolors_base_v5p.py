"""kolors-concept on TPU v5p: UNet and ChatGLM3 over the eight chips of a group.

python train.py kolors-base-v5p --data.folder DIR
python -m bdm_jax.plan kolors-base-v5p --topology v5p:4x4x8 --shapes
Hardware: 128 chips v5p, 16 pictures each. By shapes (not compiled, not run): 15.1 of 95 GB, which are 5.2 for the train
state, 1.5 for ChatGLM3, 1.9 for weights and gradients, 1.1 gathered, 5.4 at most for activations.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import kolors_concept

CONFIG = replace(kolors_concept.CONFIG, run=Path("runs/kolors-base-v5p"), mesh=MeshConfig(fsdp=8))
