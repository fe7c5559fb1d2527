"""ChatGLM's tower against diffusers' ChatGLMModel."""

import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig as Config
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel

from bdm_jax.models import functional
from bdm_jax.models.config import CHATGLM3_TEXT, ChatGLMConfig, from_json, to_json

TINY = ChatGLMConfig(
    vocab_size=70,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    kv_channels=16,
    multi_query_group_num=2,
)


@pytest.fixture
def reference(randomised):
    """In fp32, every weight random: diffusers leaves them as memory has them."""
    return randomised(ChatGLMModel(Config(**to_json(TINY), seq_length=64), empty_init=False))


@pytest.mark.parametrize("lengths", [(12, 7, 1), (12, 12, 12)], ids=["padded", "full"])
def test_states_equal_diffusers(lengths, reference, torch_params, rng):
    """Of every layer, the padding's too, and the pooled text; 1e-5 of the largest: three layers in fp32."""
    params = torch_params(reference, TINY)
    longest = max(lengths)
    ids = rng.integers(3, TINY.vocab_size, (3, longest)).astype(np.int32)
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    ids *= mask
    expected = reference(
        *(torch.from_numpy(x).long() for x in (ids, positions)),
        torch.from_numpy(mask.astype(np.int64)),
        output_hidden_states=True,
    ).hidden_states

    @jax.jit
    def states(params):
        tower = functional.bind(TINY, params)
        return [tower.outputs(ids, mask, positions, layer=layer) for layer in range(1, TINY.num_hidden_layers + 2)]

    for layer, found in enumerate(states(params), 1):
        theirs = expected[-layer].permute(1, 0, 2).numpy()
        assert np.abs(found.states - theirs).max() <= 1e-5 * np.abs(theirs).max()
        assert np.abs(found.pooled - expected[-1][-1].numpy()).max() <= 1e-5 * np.abs(expected[-1].numpy()).max()


def test_layers_above_are_not_computed(seed, apply, assert_parity, rng):
    """And without mask and positions all is content."""
    params = functional.init(TINY, seed)
    ids = rng.integers(0, TINY.vocab_size, (2, 9)).astype(np.int32)
    places = np.broadcast_to(np.arange(9, dtype=np.int32), ids.shape)
    assert_parity(apply(TINY, params, ids), apply(TINY, params, ids, np.ones(ids.shape, bool), places))
    with pytest.raises(ValueError, match="layer 5 from the last: this tower has 3"):
        functional.bind(TINY, params)(ids, layer=5)


def test_config_survives_diffusers():
    assert from_json(Config(**to_json(TINY)).to_dict()) == TINY
    for key, value in {"rmsnorm": False, "multi_query_attention": False, "pre_seq_len": 8}.items():
        with pytest.raises(ValueError, match=f"{key}={value}"):
            from_json({**to_json(TINY), key: value})
    with pytest.raises(ValueError, match="multiple of multi_query_group_num"):
        from_json({**to_json(TINY), "multi_query_group_num": 4})


def test_full_size():
    """The published count has the layer that predicts words, which a reader lacks."""
    shapes = functional.abstract(CHATGLM3_TEXT)
    assert sum(leaf.size for leaf in shapes.values()) + 65024 * 4096 == 6_243_584_000
    layer = {
        path.split(".", 3)[3]: leaf.shape for path, leaf in shapes.items() if path.startswith("encoder.layers.27.")
    }
    assert layer == {
        "input_layernorm.scale": (4096,),
        "self_attention.query_key_value.kernel": (4096, 4608),
        "self_attention.query_key_value.bias": (4608,),
        "self_attention.dense.kernel": (4096, 4096),
        "post_attention_layernorm.scale": (4096,),
        "mlp.dense_h_to_4h.kernel": (4096, 27392),
        "mlp.dense_4h_to_h.kernel": (13696, 4096),
    }
