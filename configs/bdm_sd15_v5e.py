"""bdm-sd15 on TPU v5e, 16 GB a chip: the train state over eight chips, batches in parts.

python train.py bdm-sd15-v5e --data.folder DIR
python -m bdm_jax.plan bdm-sd15-v5e --topology v5e:16x16
Hardware: 256 chips v5e, 12 pictures each in 3 parts. As compiled (docs/scaling.md; not run): 9.6 of 16 GB, 0.32 s a
step, 9,500 pictures/s; 1.2 days and 7,500 chip-hours for 10^9 pairs. v6e, the same settings: 0.12 s, 2,900 chip-hours.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import bdm_sd15

CONFIG = replace(
    bdm_sd15.CONFIG,
    run=Path("runs/bdm-sd15-v5e"),
    accumulate=3,
    mesh=MeshConfig(fsdp=8, strategy="zero1"),
)
