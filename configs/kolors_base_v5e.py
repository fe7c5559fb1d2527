"""kolors-concept on TPU v5e, 16 GB a chip: UNet and ChatGLM3 over sixteen chips, batches in parts.

python train.py kolors-base-v5e --data.folder DIR
python -m bdm_jax.plan kolors-base-v5e --topology v5e:16x16 --shapes
Hardware: 256 chips v5e, 8 pictures each in 2 parts. By shapes (not compiled, not run): 6.8 of 16 GB, which are 2.6 for
the train state, 0.75 for ChatGLM3, 1.0 for weights and gradients, 1.1 gathered, 1.4 for activations;
compiled on v5p the same networks took 3.2 times what shapes say.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.config import MeshConfig

from . import kolors_concept

CONFIG = replace(
    kolors_concept.CONFIG,
    run=Path("runs/kolors-base-v5e"),
    accumulate=2,
    mesh=MeshConfig(fsdp=16),
)
