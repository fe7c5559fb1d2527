"""BDM on SDXL: a Chinese branch on a frozen SDXL, 1024 x 1024, which 360 has published the code of and no weights.

python train.py bdm-sdxl --data.folder DIR [--task.backbone DIR --task.text-encoder DIR --task.text-encoder-2 DIR]
DIR holds latents of SDXL's autoencoder, made by `python -m bdm_jax.latents.precompute` (docs/training.md).
Hardware: that of its variants, whose heads say days and cost: bdm-sdxl-v5p, bdm-sdxl-v5e.

The branch has the published form: 1,254,908,416 parameters behind two projections. What it reads is not published;
ours: Chinese-CLIP's ViT-L/14 and ViT-H/14 text towers side by side (768 + 1024), their last layers, the pooled text
from ViT-H's projection. No settings of a training are published either: these are bdm-sd15's, with batches of 2048.
"""

from dataclasses import replace
from pathlib import Path

from bdm_jax.training.objectives.branch import BranchTask

from . import bdm_sd15

CONFIG = replace(
    bdm_sd15.CONFIG,
    task=BranchTask(
        backbone=Path("stabilityai/stable-diffusion-xl-base-1.0"),
        text_encoder=Path("OFA-Sys/chinese-clip-vit-large-patch14"),
        text_encoder_2=Path("OFA-Sys/chinese-clip-vit-huge-patch14"),
        tokenizer=Path("OFA-Sys/chinese-clip-vit-huge-patch14"),
        family="sdxl",
        remat="blocks",
        style_in_caption=True,  # without effect on sets that have captions of their own
        guidance=5.0,
    ),
    run=Path("runs/bdm-sdxl"),
    batch_size=2048,
)
