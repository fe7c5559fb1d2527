"""A whole bridge, tiny and random, in memory and as a folder."""

import jax
import pytest
from safetensors.torch import load_file
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.components import Component
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.models import functional
from bdm_jax.models.config import BranchConfig, CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig
from bdm_jax.paths import TOKENIZERS
from bdm_jax.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny(request):
    """A bridge of tiny networks, all of whose parameters are random (also those that start at zero)."""
    english, chinese = (Tokenizer.from_pretrained(TOKENIZERS / name) for name in ("english", "chinese"))
    encoder = dict(block_out_channels=(16, 32), attention_levels=(True, False), num_heads=2, norm_num_groups=8)
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=english.start, eos_token_id=english.end, pad_token_id=english.pad)
    configs = {
        "unet": UNetConfig(**encoder, layers_per_block=1, cross_attention_dim=16, sample_size=4),
        "vae": VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=32),
        "text_encoder": CLIPTextConfig(**text, **ids, vocab_size=english.vocab_size, max_position_embeddings=16),
        "branch": BranchConfig(**encoder, layers_per_block=1, cross_attention_dim=16),
        "branch_text_encoder": RobertaConfig(**text, vocab_size=chinese.vocab_size, max_position_embeddings=16),
    }
    seed = request.config.option.seed
    parts = {name: Component(config, noisy(functional.init(config, seed), seed)) for name, config in configs.items()}
    schedule = Schedule(prediction_type="v_prediction")
    return BridgePipeline(**parts, tokenizer=english, branch_tokenizer=chinese, schedule=schedule, guidance=3.0)


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The tiny bridge saved in fp32."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(folder, "float32")
    return folder


@pytest.fixture(scope="session")
def load_chinese_tower():
    """A function from a branch_text_encoder folder to transformers' module with exactly the folder's weights.

    from_pretrained of transformers 5.23 sets the padding token's embedding to zero, whatever the file holds.
    """

    def load(folder):
        module = ChineseCLIPTextModel.from_pretrained(folder, add_pooling_layer=False)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return module.eval()

    return load


def noisy(params, seed):
    """Every parameter with noise added, zero convolutions included."""
    keys = jax.random.split(jax.random.key(seed), len(params))
    return {
        path: value + 0.1 * jax.random.normal(key, value.shape)
        for key, (path, value) in zip(keys, sorted(params.items()), strict=True)
    }
