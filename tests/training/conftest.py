"""A tiny random backbone folder and a branch run on it, over real records of the bundled set."""

import sys
from pathlib import Path

import pytest

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig
from bdm_jax.models.functional import init
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component, save_component
from bdm_jax.systems.families import FAMILIES
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.config import DataConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.objectives.branch import BranchTask

sys.path.insert(0, str(Path(__file__).parent))  # for toy.py, which also runs as a program

_SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """A pipeline folder without a branch, a branch's text tower beside it: random weights, the bundled tokenizers."""
    tokenizer = Tokenizer.from_pretrained(TOKENIZERS / "english")
    configs = {
        "unet": UNetConfig(
            block_out_channels=(8, 16),
            transformer_layers=(0, 1),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=16,
            norm_num_groups=4,
            sample_size=8,
        ),
        "vae": VAEConfig(block_out_channels=(4, 4, 4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=128),
        "text_encoder": CLIPTextConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=tokenizer.length,
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.pad,
            **_SMALL_TEXT,
        ),
    }
    parts = {name: Component(config, init(config, seed)) for seed, (name, config) in enumerate(configs.items())}
    folder = tmp_path_factory.mktemp("networks") / "backbone"
    tower = RobertaConfig(max_position_embeddings=16, **_SMALL_TEXT)
    save_component(folder.parent / "tower", tower, init(tower, 3))
    schedule = DiscreteSchedule(prediction_type="v_prediction")
    BridgePipeline(FAMILIES["sd15"], {**parts, "tokenizer": tokenizer}, schedule).save_pretrained(folder)
    return folder


@pytest.fixture
def branch_run(backbone_folder):
    """A function from a run's folder to its TrainConfig: six steps, a checkpoint after every second."""

    def configure(run: Path) -> TrainConfig:
        tower = backbone_folder.parent / "tower"
        return TrainConfig(
            task=BranchTask(backbone=backbone_folder, text_encoder=tower, tokenizer=TOKENIZERS / "chinese"),
            run=run,
            steps=6,
            batch_size=4,
            log_every=1,
            checkpoint_every=2,
            sample_every=1000,
            data=DataConfig(style="fluent", concepts=40),
            optimizer=OptimizerConfig(warmup_steps=1),
        )

    return configure
