"""A ControlNet for SD1.5, beginning as its encoder, on pictures with captions; the map is made of each picture.

python train.py sd15-controlnet --data.folder pictures/ --task.hint canny
Out comes runs/sd15-controlnet/export/controlnet, for `sample.py --control` and diffusers. --task.hint-column names a
field of the records that holds a ready map instead (depth, poses, ...).
Hardware: one accelerator of 24 GB with batch 4, more by accumulation. Cost: not measured; not run yet on real weights.
It should follow the edges after some thousand steps, at once rather than by degrees (the paper's section 3.4).
Latents of the set are kept in memory, 128 KB a picture: up to some ten thousand. Settings: diffusers' train_controlnet.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.controlnet import ControlNetTask

CONFIG = TrainConfig(
    task=ControlNetTask(remat="blocks"),
    run=Path("runs/sd15-controlnet"),
    steps=20_000,
    batch_size=32,
    accumulate=8,
    data=DataConfig(folder=Path("pictures")),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=500, ema_decay=0.999),
)
