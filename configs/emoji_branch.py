"""The demo's branch: reads Chinese, on the frozen English backbone whose own prompt is "".

python train.py emoji-branch            (after emoji-backbone)
"""

from pathlib import Path

from bdm_jax.models.config import RobertaConfig
from bdm_jax.training.config import OptimizerConfig, TrainConfig
from bdm_jax.training.tasks import BranchTask
from configs import emoji_backbone

TEXT = RobertaConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=16,
)

CONFIG = TrainConfig(
    task=BranchTask(
        backbone=emoji_backbone.CONFIG.run / "export",
        cross_attention_dim=TEXT.hidden_size,
        text_encoder=TEXT,
    ),
    run=Path("runs/emoji-branch"),
    steps=5500,
    data=emoji_backbone.DATA,
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
