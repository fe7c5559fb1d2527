"""Textual inversion on the demo: a word of two vectors for a picture that the backbone knows by other words.

python train.py emoji-inversion         (the bundled demo model is all it needs)
Two CPU cores: eight minutes. "<stripes>" begins as a black cat and ends as the tiger; the model stays as it is,
byte for byte. What it does: docs/plugins.md.
"""

from pathlib import Path

from bdm_jax.paths import DEMO
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.inversion import InversionTask

CONFIG = TrainConfig(
    task=InversionTask(
        model=DEMO,
        token="<stripes>",
        vectors=2,
        begin="black cat",
        prompts=("{}",),
        only=("1f405",),
        timestep_bias="later",
    ),
    run=Path("runs/emoji-inversion"),
    steps=150,
    data=DataConfig(style="fluent"),
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20, weight_decay=0.0, ema_decay=0.98),
)
