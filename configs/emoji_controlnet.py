"""A ControlNet for the demo's backbone that follows edges.

python train.py emoji-controlnet        (the bundled demo model is all it needs)
Two CPU cores: a quarter of an hour. What it does, alone and with the unchanged branch: docs/plugins.md.
"""

from pathlib import Path

from bdm_jax.paths import DEMO
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.controlnet import ControlNetTask

from . import emoji_vae

CONFIG = TrainConfig(
    task=ControlNetTask(
        model=DEMO,
        hint="canny",
        hint_widths=(16, 32, 64, 96),
        timestep_bias="later",
        caption_dropout=0.5,  # the demo draws one picture for a name: only without names is a map needed
    ),
    run=Path("runs/emoji-controlnet"),
    steps=300,
    data=DataConfig(style=emoji_vae.STYLE),
    optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.99),
)
