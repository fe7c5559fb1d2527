"""The demo's English backbone: UNet and text tower, trained together; it never sees the zh_only concepts.

python train.py emoji-backbone          (after emoji-vae)
Two CPU cores: 32 minutes at 45 images/s, to a loss of 0.07 (0.48 is what it has without its text).
"""

from pathlib import Path

from bdm_jax.models.config import CLIPTextConfig, UNetConfig
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.backbone import BackboneTask

from . import emoji_vae

TEXT = CLIPTextConfig(
    vocab_size=8514,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=16,
    bos_token_id=8512,
    eos_token_id=8513,
    pad_token_id=8513,
)

# As many concepts as two CPU cores learn in about half an hour; on a GPU take all: --data.concepts None.
DATA = DataConfig(style=emoji_vae.STYLE, concepts=300)

CONFIG = TrainConfig(
    task=BackboneTask(
        unet=UNetConfig(
            in_channels=16,
            out_channels=16,
            sample_size=8,
            block_out_channels=(96, 192),
            transformer_layers=(1, 1),
            layers_per_block=1,
            num_heads=4,
            cross_attention_dim=TEXT.hidden_size,
            norm_num_groups=16,
        ),
        text_encoder=TEXT,
        timestep_bias="later",
        vae=emoji_vae.CONFIG.run / "export" / "vae",
    ),
    run=Path("runs/emoji-backbone"),
    steps=5500,
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
