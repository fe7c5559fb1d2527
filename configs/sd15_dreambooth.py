"""DreamBooth: an SD1.5 backbone that knows one subject, of three to five photographs, by a rare word.

python train.py sd15-dreambooth --data.folder photos/ \\
    --task.prompts "a photo of sks dog" --task.class-prompt "a photo of a dog" --run runs/my-dog
Out comes a pipeline folder, runs/my-dog/export, which any branch takes as --backbone. The 200 pictures of the class are
drawn first, by the untouched model, unless --task.class-images names a folder.
Hardware: one accelerator of 40 GB (the whole UNet with AdamW in fp32: 14 GB, its average 3.4 GB, activations); with
--optimizer.name adafactor 24 GB. Cost: not measured; not run yet on real weights. It should draw the subject in new
places, and other dogs as before. Settings: diffusers' train_dreambooth with prior preservation.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.dreambooth import DreamBoothTask

CONFIG = TrainConfig(
    task=DreamBoothTask(remat="blocks"),
    run=Path("runs/sd15-dreambooth"),
    steps=800,
    batch_size=1,
    data=DataConfig(folder=Path("photos")),
    optimizer=OptimizerConfig(learning_rate=5e-6, schedule="constant", warmup_steps=0, ema_decay=0.99),
)
