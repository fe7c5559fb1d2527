"""The demo's branch: reads Chinese, on the frozen English backbone whose own prompt is "".

python train.py emoji-branch            (after emoji-backbone and emoji-text)
One H200: two minutes at 21,800 images/s, to a loss of 0.19; 0.10 is what the backbone has with its own text.
"""

from pathlib import Path

from bdm_jax.training.config import OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.branch import BranchTask

from . import emoji_backbone, emoji_text, emoji_vae

CONFIG = TrainConfig(
    task=BranchTask(
        backbone=emoji_backbone.CONFIG.run / "export",
        text_encoder=emoji_text.CONFIG.run / "export" / "branch_text_encoder",
        tokenizer=emoji_text.CONFIG.run / "export" / "branch_tokenizer",
        timestep_bias="later",
        guidance=1.5,
    ),
    run=Path("runs/emoji-branch"),
    steps=10_000,
    batch_size=256,
    data=emoji_vae.DATA,
    optimizer=OptimizerConfig(learning_rate=1.2e-3, copied_factor=0.3, warmup_steps=200, b2=0.99, ema_decay=0.9995),
)
