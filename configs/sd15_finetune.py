"""Fine-tuning an SD1.5 backbone's UNet on another set or style, pictures with captions.

python train.py sd15-finetune --data.folder pictures/ --run runs/my-model
Out comes a pipeline folder, runs/my-model/export, which any branch takes as --backbone.
Hardware: one accelerator of 40 GB, batch 4 by accumulation. Cost: not measured; not run yet on real weights. It should
draw in the set's style without a word for it. Latents are kept in memory, 128 KB a picture.
Settings: diffusers' train_text_to_image, a tenth of the captions left out.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.finetune import FinetuneTask

CONFIG = TrainConfig(
    task=FinetuneTask(remat="blocks"),
    run=Path("runs/sd15-finetune"),
    steps=10_000,
    batch_size=16,
    accumulate=4,
    data=DataConfig(folder=Path("pictures")),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=500, ema_decay=0.999),
)
