"""A small backbone that writes: fifty Chinese characters from a Chinese prompt, in the demo's latents.

python train.py hanzi
python -m bdm_jax.evaluate.writing --sheet out/writing.png
Five minutes on two idle CPU cores; docs/claims.md has the pictures.
"""

from pathlib import Path

from bdm_jax.models.config import CLIPTextConfig, UNetConfig
from bdm_jax.paths import DEMO, HANZI, TOKENIZERS
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.backbone import BackboneTask

TEXT = CLIPTextConfig(
    vocab_size=21128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    bos_token_id=101,
    eos_token_id=102,
    pad_token_id=0,
)

CONFIG = TrainConfig(
    task=BackboneTask(
        unet=UNetConfig(
            in_channels=4,
            out_channels=4,
            sample_size=8,
            block_out_channels=(64, 128, 128),
            transformer_layers=(1, 1, 1),
            layers_per_block=1,
            num_heads=4,
            cross_attention_dim=TEXT.hidden_size,
            norm_num_groups=8,
        ),
        text_encoder=TEXT,
        vae=DEMO / "vae",
        tokenizer=TOKENIZERS / "chinese",
        language="zh",
        timestep_bias="later",
        style_in_caption=True,
    ),
    run=Path("runs/hanzi"),
    steps=1000,
    batch_size=32,
    log_every=50,
    checkpoint_every=500,
    sample_every=1000,
    data=DataConfig(folder=HANZI),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50, b2=0.99, ema_decay=0.99),
)
