"""CLIP's text tower against transformers' CLIPTextModel."""

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as Config
from transformers import CLIPTextModel

from bdm_jax.models.config import CLIPTextConfig, from_json, to_json

CASES = {
    "quick-gelu": CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=97,
        eos_token_id=98,
        pad_token_id=98,
    ),
    "gelu": CLIPTextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=11,
        hidden_act="gelu",
        layer_norm_eps=1e-3,
        bos_token_id=48,
        eos_token_id=49,
        pad_token_id=0,
    ),
}


@pytest.fixture(params=CASES)
def config(request):
    return CASES[request.param]


def test_states_equal_transformers(config, randomised, torch_params, apply, assert_parity, rng):
    reference = randomised(CLIPTextModel(Config.from_dict(to_json(config))))
    params = torch_params(reference, config, prefix="text_model.")
    for length in (config.max_position_embeddings, 5):
        ids = rng.integers(0, config.vocab_size, (3, length)).astype(np.int32)
        ids[:, 0], ids[:, -2:] = config.bos_token_id, config.eos_token_id
        expected = reference(torch.from_numpy(ids).long()).last_hidden_state
        assert_parity(apply(config, params, ids), expected)


def test_config_survives_transformers(config):
    assert from_json(Config.from_dict(to_json(config)).to_dict()) == config
