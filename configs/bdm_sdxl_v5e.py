"""bdm-sdxl on TPU v5e, 16 GB a chip: the train state over sixteen chips, batches in parts.

python train.py bdm-sdxl-v5e --data.folder DIR
python -m bdm_jax.plan bdm-sdxl-v5e --topology v5e:16x16
Hardware: 256 chips v5e, 8 pictures of 1024 x 1024 each in 4 parts. Compiled, not run: 14.9 of 16 GB, which are 6.0 for
the frozen networks, 1.3 for the train state and 7.5 for all else; 2.4 s a step at 45% of the peak, 4.8 GB sent.
"""

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
