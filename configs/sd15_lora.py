"""A LoRA of an SD1.5 backbone's attentions, on a folder of pictures with captions beside them (dog.jpg, dog.txt).

python train.py sd15-lora --data.folder pictures/ --run runs/my-style
Out comes runs/my-style/export/my-style.safetensors, for `sample.py --lora`, web UIs and diffusers. With --task.target
branch and Chinese captions it changes the branch; --task.networks both trains the text tower too.
Hardware: one GPU of 16 GB or one TPU core, batch 1 to 4. Cost: not measured; not run yet on real weights. It should
draw the pictures' style or subject at strength 1. Settings: diffusers' train_text_to_image_lora.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.lora import LoRATask

CONFIG = TrainConfig(
    task=LoRATask(rank=16),
    run=Path("runs/sd15-lora"),
    steps=2000,
    batch_size=1,
    data=DataConfig(folder=Path("pictures")),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=0, ema_decay=0.99),
)
