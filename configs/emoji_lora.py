"""The demo's backbone in another art style, as a LoRA: shaded (Noto) in place of flat (Fluent) drawings.

python train.py emoji-lora              (the bundled demo model is all it needs)
Two CPU cores: ten minutes; 4.5 MB. What it does, alone and with the unchanged branch: docs/plugins.md.
"""

from pathlib import Path

from bdm_jax.paths import DEMO
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.lora import ATTENTION, LoRATask

# A style is in the convolutions too, of which this small UNet has more than attention.
EVERY_LAYER = rf"{ATTENTION}|ff\.net\.(0\.proj|2)|proj_(in|out)|conv[12]|conv_shortcut|conv"

DATA = DataConfig(style="noto", concepts=300)

CONFIG = TrainConfig(
    task=LoRATask(model=DEMO, rank=16, modules=EVERY_LAYER, caption_dropout=0.1),
    run=Path("runs/emoji-lora"),
    steps=250,
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.0, ema_decay=0.99),
)
