"""CLIP's text tower against transformers' CLIPTextModel and CLIPTextModelWithProjection."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as Config
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from bdm_jax.models import functional
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


@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("projected", [False, True])
def test_layers_and_pooled_output_equal_transformers(
    config, projected, end, randomised, torch_params, assert_parity, rng
):
    """Every layer before the final norm; the pooled output at the first end token (old configs: the largest id)."""
    end_token = config.eos_token_id if end is None else config.vocab_size - 1
    config = replace(config, projection_dim=20 if projected else None, eos_token_id=end or config.eos_token_id)
    cls = CLIPTextModelWithProjection if projected else CLIPTextModel
    reference = randomised(cls(Config.from_dict(to_json(config))))
    prefix = "" if projected else "text_model."
    params = torch_params(reference, config, prefix=prefix)
    assert ("text_projection.kernel" in params) == projected
    ids = rng.integers(3, config.vocab_size - 5, (3, 9)).astype(np.int32)
    ids[0, 6:] = ids[1, 3:] = ids[2, 8:] = end_token
    expected = reference(torch.from_numpy(ids).long(), output_hidden_states=True)
    layers = config.num_hidden_layers

    @jax.jit
    def run(params):
        net = functional.bind(config, params)
        states = {layer: net(ids, layer, final_norm=False) for layer in range(1, layers + 2)}
        normed = {layer: net(ids, layer) for layer in (1, 2)}
        return states, normed, net.outputs(ids, layer=2, final_norm=False), net.outputs(ids)

    states, normed, penultimate, last = run(params)
    for layer, found in states.items():
        assert_parity(found, expected.hidden_states[-layer])
    model = getattr(reference, "text_model", reference)
    for layer, found in normed.items():
        assert_parity(found, model.final_layer_norm(expected.hidden_states[-layer]))
    pooled = expected.text_embeds if projected else expected.pooler_output
    for output in (penultimate, last):
        assert_parity(output.pooled, pooled)
    assert_parity(penultimate.states, expected.hidden_states[-2])
    assert_parity(last.states, expected.last_hidden_state)


def test_a_layer_that_is_not_there_is_named(config):
    with pytest.raises(ValueError, match="from the last: this tower has"):
        functional.bind(config, functional.init(config, 0))(np.zeros((1, 4), np.int32), config.num_hidden_layers + 2)


def test_projected_config_survives_transformers(config):
    """transformers' configs always have a projection_dim; the architecture tells whether there is a projection."""
    projected = replace(config, projection_dim=20)
    assert from_json(Config.from_dict(to_json(projected)).to_dict()) == projected
    assert from_json({**to_json(config), "projection_dim": 768}) == config
