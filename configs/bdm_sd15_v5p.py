"""bdm-sd15 on TPU v5p: the whole train state on every chip, batches in one part.

python train.py bdm-sd15-v5p --data.folder DIR
python -m bdm_jax.plan bdm-sd15-v5p --topology v5p:4x4x8
Hardware: 128 chips v5p, 24 pictures each. As compiled (docs/scaling.md; not run): 38 of 95 GB, 0.27 s a step, 11,500
pictures/s; 1.0 days and 3,100 chip-hours for 10^9 pairs.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import bdm_sd15

CONFIG = replace(bdm_sd15.CONFIG, run=Path("runs/bdm-sd15-v5p"), accumulate=1, mesh=MeshConfig())
