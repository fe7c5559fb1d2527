"""Names and layouts there and back, bit for bit, on the state dicts that diffusers and transformers themselves have."""

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.errors import FileError
from bdm_jax.formats.detect import table_for
from bdm_jax.formats.layouts import to_jax, to_torch, tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.bert import CHINESE_TEXT
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.unet import BRANCH
from bdm_jax.formats.tables import PLAIN
from bdm_jax.models import config, functional

ENCODER = dict(block_out_channels=(16, 32), transformer_layers=(1, 0), num_heads=2, norm_num_groups=8)
CONFIGS = {
    "unet": config.UNetConfig(**ENCODER, cross_attention_dim=24),
    "branch": config.BranchConfig(**ENCODER, cross_attention_dim=40),
    "controlnet": config.ControlNetConfig(**ENCODER, cross_attention_dim=24),
    "vae": config.VAEConfig(block_out_channels=(8, 16), norm_num_groups=4),
    "clip": config.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
    "chinese": config.RobertaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    ),
}


def torch_model(name):
    values = {k: v for k, v in config.to_json(CONFIGS[name]).items() if k not in ("_class_name", "bdm_branch")}
    if name == "clip":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**values))
    if name == "chinese":
        return ChineseCLIPTextModel(transformers.ChineseCLIPTextConfig(**values), add_pooling_layer=False)
    cls = {
        "unet": diffusers.UNet2DConditionModel,
        "branch": diffusers.ControlNetModel,
        "controlnet": diffusers.ControlNetModel,
        "vae": diffusers.AutoencoderKL,
    }[name]
    return cls.from_config(values)


def state_dict(name):
    tensors = {key: value.numpy() for key, value in torch_model(name).state_dict().items()}
    return {key: value for key, value in tensors.items() if not key.endswith(("position_ids", "token_type_ids"))}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_exact(name, dtype):
    tensors = {key: value.astype(dtype) for key, value in state_dict(name).items()}
    table = table_for(config.to_json(CONFIGS[name]))
    tree = tree_from_torch(tensors, functional.abstract(CONFIGS[name]), name, table)
    back = tree_to_torch(tree)
    kept = {ours: value for key, value in tensors.items() for ours in table.to_ours(key)}
    assert back.keys() == kept.keys()
    for key, value in kept.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize(
    ("key", "shape", "ours", "our_shape"),
    [
        ("conv_in.weight", (8, 4, 3, 2), "conv_in.kernel", (3, 2, 4, 8)),
        ("ff.net.2.weight", (5, 7), "ff.net.2.kernel", (7, 5)),
        ("time_embedding.linear_1.weight", (5, 7), "time_embedding.linear_1.kernel", (7, 5)),
        ("norm1.weight", (5,), "norm1.scale", (5,)),
        ("norm1.bias", (5,), "norm1.bias", (5,)),
        ("embeddings.token_embedding.weight", (9, 4), "embeddings.token_embedding.embedding", (9, 4)),
        ("embeddings.word_embeddings.weight", (9, 4), "embeddings.word_embeddings.embedding", (9, 4)),
        ("logit_scale", (), "logit_scale", ()),
    ],
)
def test_leaf_kinds(key, shape, ours, our_shape, rng):
    array = rng.standard_normal(shape)
    name, value = to_jax(key, array, embedding="_embedding" in key and "time" not in key)
    assert (name, value.shape) == (ours, our_shape)
    back, original = to_torch(name, value)
    assert back == key and np.array_equal(original, array)


def test_wrong_keys_are_named_and_counted():
    expected = functional.abstract(CONFIGS["clip"])
    good = tree_to_torch({key: np.zeros(leaf.shape, np.float32) for key, leaf in expected.items()})
    key = "text_model.final_layer_norm.weight"
    with pytest.raises(FileError, match=r"f: .*1 missing \(text_model.final_layer_norm.weight\)"):
        tree_from_torch({k: v for k, v in good.items() if k != key}, expected, "f", CLIP_TEXT)
    with pytest.raises(FileError, match=r"1 unknown \(extra.weight\)"):
        tree_from_torch({**good, "extra.weight": np.zeros(2)}, expected, "f", CLIP_TEXT)
    with pytest.raises(FileError, match=r"1 of another shape \(text_model.final_layer_norm.weight \(3,\) instead of"):
        tree_from_torch({**good, key: np.zeros(3)}, expected, "f", CLIP_TEXT)
    with pytest.raises(FileError, match="under two names"):
        tree_from_torch({**good, key.removeprefix("text_model."): good[key]}, expected, "f", CLIP_TEXT)
    with pytest.raises(FileError, match=r"missing \(.* and \d+ more\)") as error:
        tree_from_torch({}, expected, "f", CLIP_TEXT)
    assert "\n" not in str(error.value)


def test_tables():
    assert CLIP_TEXT.to_ours("embeddings.token_embedding.weight") == ("text_model.embeddings.token_embedding.weight",)
    assert CLIP_TEXT.to_ours("text_model.final_layer_norm.bias") == ("text_model.final_layer_norm.bias",)
    assert CLIP_TEXT.to_ours("text_projection.weight") == ("text_projection.weight",)
    assert CLIP_TEXT.to_theirs("text_projection.weight") == "text_projection.weight"
    assert CLIP_TEXT.to_ours("text_model.embeddings.position_ids") == ()
    bias = "encoder.layer.0.output.dense.bias"
    assert CHINESE_TEXT.to_ours(f"text_model.{bias}") == (bias,)
    for ignored in ("pooler.dense.weight", "text_model.pooler.dense.bias", "vision_model.x", "text_projection.weight"):
        assert CHINESE_TEXT.to_ours(ignored) == ()
    assert BRANCH.to_ours("controlnet_cond_embedding.conv_in.weight") == ()
    assert BRANCH.to_ours("controlnet_down_blocks.0.weight") == ("controlnet_down_blocks.0.weight",)
    assert table_for({"_class_name": "ControlNetModel"}) is PLAIN


def test_transposes_mean_what_they_should(rng):
    """A convolution through lax in our layout equals torch's in its own."""
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 3, 3, 2), (1, 3, 8, 8)))
    _, kernel = to_jax("conv.weight", weight)
    ours = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    theirs = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(weight))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-4)
