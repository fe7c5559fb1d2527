"""Kolors, first phase: concepts from pairs of all kinds at low resolution, with SDXL's noise schedule.

python train.py kolors-concept --data.folder DIR [--data.also TEXT-PICTURES] [--task.fresh False]
DIR holds latents of 512 x 512, pictures of written Chinese are a set beside (docs/training.md).
Out comes a pipeline folder, which kolors-quality goes on with. ChatGLM3 is frozen. Not run on real weights.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.finetune import FinetuneTask

CONFIG = TrainConfig(
    task=FinetuneTask(
        model=Path("Kwai-Kolors/Kolors-diffusers"),
        family="kolors",
        captions="zh",
        caption_dropout=0.1,
        remat="blocks",
        fresh=True,
        schedule="sdxl",
    ),
    run=Path("runs/kolors-concept"),
    steps=1_000_000,
    batch_size=2048,
    log_every=100,
    checkpoint_every=2000,
    sample_every=10_000,
    data=DataConfig(folder=Path("latents")),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=10_000, ema_decay=0.9999),
)
