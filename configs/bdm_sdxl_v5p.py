"""bdm-sdxl on TPU v5p: the whole train state on every chip, batches in one part.

python train.py bdm-sdxl-v5p --data.folder DIR
python -m bdm_jax.plan bdm-sdxl-v5p --topology v5p:4x4x8
Hardware: 128 chips v5p, 16 pictures of 1024 x 1024 each. Compiled, not run: 63 of 95 GB, which are 20.1 for the train
state, 6.0 for the frozen networks and 36.8 for all else; 1.9 s a step at 45% of the peak, 5.0 GB sent per chip.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import bdm_sdxl

CONFIG = replace(bdm_sdxl.CONFIG, run=Path("runs/bdm-sdxl-v5p"), mesh=MeshConfig())
