"""A LoRA for Kolors of three to five photographs, whose subject gets a rare word: Kwai's recipe without its prior.

python train.py kolors-lora --data.folder photos/ --task.prompts "ktxl狗" --run runs/my-dog
Out comes runs/my-dog/export/my-dog.safetensors, for `sample.py --lora`. Rank 4 in the attention of the UNet and in
ChatGLM3's query_key_value; 1024 px. Hardware: an accelerator of 40 GB. Not run on real weights.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.lora import LoRATask

CONFIG = TrainConfig(
    task=LoRATask(
        model=Path("Kwai-Kolors/Kolors-diffusers"),
        family="kolors",
        captions="zh",
        prompts=("ktxl狗",),
        networks="both",
        rank=4,
        text_modules="query_key_value",
        remat="blocks",
    ),
    run=Path("runs/kolors-lora"),
    steps=2000,
    batch_size=1,
    data=DataConfig(folder=Path("photos")),
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_steps=100, weight_decay=1e-2),
)
