"""BDM at the paper's scale (arXiv 2309.00952): a Chinese branch on a frozen Stable Diffusion 1.5, 512 x 512.

python train.py bdm-sd15 --data.folder DIR [--task.backbone DIR --task.text-encoder DIR --task.tokenizer DIR]
With --task.start-from qihoo360/BDM1.0 (or a folder or file) it goes on from 360's branch, or any other of SD1.5.
Hardware: that of its variants, whose heads say days and cost: bdm-sd15-v5e, bdm-sd15-v5p, bdm-sd15-gpu.

The paper's: SD1.5 frozen, its prompt "" throughout; only the branch is trained; AdamW at 1e-5, batches of 3200, about a
billion pairs, 80 A800 for two months. Ours, as nothing is published: 1.25 million steps (the number in the name of a
released checkpoint; about four times through the pairs), constant rate after a warm-up, decay, clipping, average, one
caption in ten left out, bf16 compute, batches of 3072, which pods divide.
"""

from pathlib import Path

from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.branch import BranchTask

CONFIG = TrainConfig(
    task=BranchTask(
        backbone=Path("stable-diffusion-v1-5/stable-diffusion-v1-5"),
        text_encoder=Path("OFA-Sys/chinese-clip-vit-huge-patch14"),
        tokenizer=Path("OFA-Sys/chinese-clip-vit-huge-patch14"),
        style_in_caption=True,  # without effect on sets that have captions of their own
        guidance=7.5,
    ),
    run=Path("runs/bdm-sd15"),
    steps=1_250_000,
    batch_size=3072,
    compute="bfloat16",
    log_every=100,
    checkpoint_every=2000,
    sample_every=10_000,
    keep=3,
    data=DataConfig(folder=Path("data/pairs")),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=10_000, ema_decay=0.9999),
)
