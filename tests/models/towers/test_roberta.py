"""Chinese-CLIP's text tower against transformers' ChineseCLIPTextModel without pooler."""

import numpy as np
import pytest
import torch
from transformers import ChineseCLIPTextConfig
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.models.config import RobertaConfig, from_json, to_json

CASES = {
    "small": RobertaConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
    ),
    "smaller": RobertaConfig(
        vocab_size=31,
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        type_vocab_size=3,
        layer_norm_eps=1e-5,
    ),
}


@pytest.fixture(params=CASES)
def config(request):
    return CASES[request.param]


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_states_equal_transformers(config, masked, randomised, torch_params, apply, assert_parity, rng):
    """Unmasked is what BDM1.0 lives with: padding is attended (bdm.md 3.1)."""
    reference = randomised(
        ChineseCLIPTextModel(ChineseCLIPTextConfig.from_dict(to_json(config)), add_pooling_layer=False)
    )
    params = torch_params(reference, config)
    length = config.max_position_embeddings - 2
    ids = rng.integers(1, config.vocab_size, (3, length)).astype(np.int32)
    ids[0, 4:] = ids[1, -1] = config.pad_token_id
    mask = ids != config.pad_token_id
    expected = reference(
        torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long() if masked else None
    ).last_hidden_state
    assert_parity(apply(config, params, ids, *([mask] if masked else [])), expected)


def test_config_survives_transformers(config):
    assert from_json(ChineseCLIPTextConfig.from_dict(to_json(config)).to_dict()) == config
