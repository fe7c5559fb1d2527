"""Kolors, second phase: quality from pictures of the best grade at high resolution, with Kolors' noise schedule.

python train.py kolors-quality --data.folder DIR [--task.model Kwai-Kolors/Kolors-diffusers]
DIR holds latents of 1024 x 1024 of pictures of level 5 (docs/training.md). It goes on from kolors-concept's weights
and changes the schedule to 1,100 timesteps, whose last pictures are noisier. Not run on real weights.
"""

from dataclasses import replace
from pathlib import Path

from . import kolors_concept

CONFIG = replace(
    kolors_concept.CONFIG,
    task=replace(kolors_concept.CONFIG.task, model=Path("runs/kolors-concept/export"), fresh=False, schedule="kolors"),
    run=Path("runs/kolors-quality"),
    steps=50_000,
    optimizer=replace(kolors_concept.CONFIG.optimizer, learning_rate=2e-5, warmup_steps=1000),
)
