"""DreamBooth on the demo's backbone: one dog, Noto's, as "sks dog face"; other dogs stay Fluent's.

python train.py emoji-dreambooth        (the bundled demo model is all it needs)
Two CPU cores: ten minutes, class pictures included. What it does: docs/plugins.md.
"""

from pathlib import Path

from bdm_jax.paths import DEMO
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.dreambooth import DreamBoothTask

CONFIG = TrainConfig(
    task=DreamBoothTask(
        model=DEMO, prompts=("sks dog face",), class_prompt="dog face", class_count=48, only=("1f436",)
    ),
    run=Path("runs/emoji-dreambooth"),
    steps=150,
    batch_size=8,
    data=DataConfig(style="noto"),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=20, ema_decay=0.98),
)
