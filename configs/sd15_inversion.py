"""Textual inversion: a new word for SD1.5's text tower, of three to five photographs; the model itself stays.

python train.py sd15-inversion --data.folder photos/ \\
    --task.token "<my-dog>" --task.begin dog --task.vectors 4 --run runs/my-word
Out comes runs/my-word/export/learned_embeds.safetensors, for `sample.py --embedding`, web UIs and diffusers. With
--task.target branch it is a word of the Chinese tower: give Chinese --task.prompts.
Hardware: one GPU of 16 GB or one TPU core. Cost: not measured; not run yet on real weights. It should draw the subject
less exactly than DreamBooth does. Settings: diffusers' textual_inversion, without its scaling by the batch.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.inversion import InversionTask

CONFIG = TrainConfig(
    task=InversionTask(remat="blocks"),
    run=Path("runs/sd15-inversion"),
    steps=3000,
    batch_size=4,
    data=DataConfig(folder=Path("photos")),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule="constant", warmup_steps=0, ema_decay=0.99),
)
