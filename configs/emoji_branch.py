"""The demo's branch: reads Chinese, on the frozen English backbone whose own prompt is "".

python train.py emoji-branch            (after emoji-backbone and emoji-text)
Two CPU cores: 22 minutes at 55 images/s. The loss starts at 0.48, the backbone's without text, and ends at 0.12; 0.07
is what the backbone has with its own text.
"""

from pathlib import Path

from bdm_jax.training.config import OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.branch import BranchTask

from . import emoji_backbone, emoji_text

CONFIG = TrainConfig(
    task=BranchTask(
        backbone=emoji_backbone.CONFIG.run / "export",
        text_encoder=emoji_text.CONFIG.run / "export" / "branch_text_encoder",
        tokenizer=emoji_text.CONFIG.run / "export" / "branch_tokenizer",
        timestep_bias="later",
    ),
    run=Path("runs/emoji-branch"),
    steps=4500,
    data=emoji_backbone.DATA,
    optimizer=OptimizerConfig(learning_rate=1e-3, copied_factor=0.2),
)
