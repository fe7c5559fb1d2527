"""bdm-sdxl on TPU v5e, 16 GB a chip: the train state over sixteen chips, batches in parts.

python train.py bdm-sdxl-v5e --data.folder DIR
python -m bdm_jax.plan bdm-sdxl-v5e --topology v5e:16x16 --shapes
Hardware: 256 chips v5e, 8 pictures of 1024 x 1024 each in 4 parts. By shapes (not compiled, not run): 10.7 of 16 GB,
which are 6.0 for the frozen networks, 1.3 for the train state, 2.8 for weights and gradients, 0.6 for
activations; compiled on v5p the same networks took 1.6 times what shapes say.
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
