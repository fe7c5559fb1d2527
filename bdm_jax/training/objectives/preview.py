"""What most trainings show and write: images drawn by the system that the parameters make, and its folder."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.objective import Trees

MakePipeline = Callable[[Trees], BridgePipeline]


def draw_records(
    pipeline: MakePipeline, texts: Captions, params: Trees, records: list[dict], *, batch_size: int = 16
) -> list[np.ndarray]:
    """An image (H,W,3) uint8 for the name of each record, in 20 steps."""
    requests = [request(texts, record, seed) for seed, record in enumerate(records)]
    return list(generate(pipeline(params), requests, Sampling(steps=20), batch_size=batch_size))


def request(texts: Captions, record: dict, seed: int) -> Request:
    """For a record's name: to the branch in Chinese, to the backbone in English."""
    name = texts.name(record)
    return Request(name, seed=seed) if texts.language == "zh" else Request("", english=name, seed=seed)


def export_pipeline(pipeline: MakePipeline, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """A whole pipeline folder."""
    pipeline(params).save_pretrained(folder, metadata=metadata)
