"""bdm-sd15 on GPUs with 80 GB or more, as many as the paper had: 80, with 40 pictures each.

python train.py bdm-sd15-gpu --data.folder DIR        (on every host; docs/scaling.md says how they find each other)
Hardware: 80 GPUs. By arithmetic, not compiled or measured (2.25 TFLOP a picture; 350 TFLOP/s on an H200, 87 on an A100
or A800 is what others reach; 58 ms for the sum of the gradients over 400 Gb/s a GPU):
  H200   0.32 s a step, 10,000 pictures/s: 1.2 days and 2,200 GPU-hours for 10^9 pairs
  A800   1.1 s a step, 2,900 pictures/s: 4.0 days and 7,600 GPU-hours; 40 pictures are tight in 80 GB: --accumulate 2
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import bdm_sd15

CONFIG = replace(
    bdm_sd15.CONFIG,
    run=Path("runs/bdm-sd15-gpu"),
    batch_size=3200,  # the paper's
    accumulate=1,
    mesh=MeshConfig(),
)
