"""A branch for SD1.5 that reads Chinese with Kolors' text encoder, ChatGLM3-6B, in place of Chinese-CLIP.

python train.py bdm-sd15-chatglm --data.folder DIR [--task.text-encoder DIR --task.tokenizer DIR]
The states of its penultimate layer go through a trained layer, 4096 to 768, into a branch that is otherwise bdm-sd15's.
The tower is frozen, and read beforehand where its texts are few (`python -m convert text-states`). Not run.
"""

from dataclasses import replace
from pathlib import Path

from . import bdm_sd15

CONFIG = replace(
    bdm_sd15.CONFIG,
    task=replace(
        bdm_sd15.CONFIG.task,
        text_encoder=Path("Kwai-Kolors/Kolors-diffusers:text_encoder"),
        tokenizer=Path("Kwai-Kolors/Kolors-diffusers:tokenizer"),
        towers='[{"encoder": "branch_text_encoder", "layer": 2}]',
        context=768,
    ),
    run=Path("runs/bdm-sd15-chatglm"),
)
