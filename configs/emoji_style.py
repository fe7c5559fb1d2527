"""The demo's backbone fine-tuned to another art style: shaded (Noto) in place of flat (Fluent) drawings.

python train.py emoji-style             (the bundled demo model is all it needs)
Two CPU cores: a quarter of an hour. What it does, alone and with the unchanged branch: docs/plugins.md.
"""

from pathlib import Path

from bdm_jax.paths import DEMO
from bdm_jax.training.config import OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.finetune import FinetuneTask

from . import emoji_lora

CONFIG = TrainConfig(
    task=FinetuneTask(model=DEMO),
    run=Path("runs/emoji-style"),
    steps=400,
    data=emoji_lora.DATA,
    optimizer=OptimizerConfig(learning_rate=3e-4, ema_decay=0.99),
)
