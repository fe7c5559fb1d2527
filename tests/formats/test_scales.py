"""8-bit weights with their scales, as ComfyUI saves them, against torch's own arithmetic."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from bdm_jax.convert.__main__ import main
from safetensors.torch import save_file

from bdm_jax.errors import FileError
from bdm_jax.formats.files import read_safetensors, write_safetensors
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.formats.weights import read_weights
from bdm_jax.models.config import CLIPTextConfig
from bdm_jax.systems.components import load_component, size_metadata

CONFIG = CLIPTextConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
)


def quantised(tree, kind, scale, input_scale):
    """torch's tensors of a tower: matrices in 8 bits with their scales, the rest as it is; and what they stand for."""
    tensors, meant = {}, {}
    for key, array in tree_to_torch(tree).items():
        weight = torch.from_numpy(np.ascontiguousarray(array))
        if weight.ndim == 2 and "embedding" not in key:
            stem = key.removesuffix("weight")
            by = weight.abs().max() / 448
            eight = (weight / by).to(kind)
            tensors |= {key: eight, stem + scale: by.reshape(()), stem + input_scale: torch.ones(())}
            meant[key] = eight.float() * by
        else:
            tensors[key] = meant[key] = weight
    return tensors, meant


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.filterwarnings("error")
def test_scaled_weights_are_read_as_torch_multiplies_them(kind, names, drawn, rng, tmp_path):
    tree = drawn(CONFIG, rng)
    tensors, meant = quantised(tree, kind, *names)
    name = str(kind).removeprefix("torch.")
    mark = torch.frombuffer(bytearray(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    key = "text_model.encoder.layers.0.mlp.fc1.comfy_quant"
    marks = {key: mark} if names[0] == "weight_scale" else {"scaled_fp8": torch.zeros(0, dtype=kind)}
    save_file({**tensors, **marks}, tmp_path / "x.safetensors", size_metadata(CONFIG))
    config, params = load_component(tmp_path / "x.safetensors", "float32")
    read = tree_to_torch({key: np.asarray(value) for key, value in params.items()})
    assert config == CONFIG and read.keys() == meant.keys()
    for key, value in meant.items():
        np.testing.assert_array_equal(read[key], value.numpy(), err_msg=key)
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0


@pytest.mark.filterwarnings("error")
def test_weights_without_scales_keep_their_bits(drawn, rng, tmp_path):
    """Read as torch converts them; written again in 8 bits."""
    eights = {k: a.astype(ml_dtypes.float8_e4m3fn) for k, a in tree_to_torch(drawn(CONFIG, rng)).items()}
    write_safetensors(tmp_path / "x.safetensors", eights, size_metadata(CONFIG))
    _, params = load_component(tmp_path / "x.safetensors", "bfloat16")
    for key, value in tree_to_torch({key: np.asarray(value) for key, value in params.items()}).items():
        theirs = torch.from_numpy(eights[key].view(np.uint8)).view(torch.float8_e4m3fn).bfloat16()
        np.testing.assert_array_equal(value.astype(np.float32), theirs.float().numpy(), err_msg=key)
    assert main(["to-jax", str(tmp_path / "x.safetensors"), str(tmp_path / "jax.safetensors")]) == 0
    assert main(["to-torch", str(tmp_path / "jax.safetensors"), str(tmp_path / "y.safetensors")]) == 0
    back = read_safetensors(tmp_path / "y.safetensors")
    assert {k: (a.dtype, a.tobytes()) for k, a in back.items()} == {
        k: (a.dtype, a.tobytes()) for k, a in eights.items()
    }
    half = str(tmp_path / "half.safetensors")
    assert main(["to-torch", str(tmp_path / "x.safetensors"), half, "--dtype", "float16"]) == 0
    assert {array.dtype.name for array in read_safetensors(half).values()} == {"float16"}


def test_scale_for_each_row(tmp_path):
    eight = np.arange(1, 7, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn).reshape(3, 2)
    scales = np.float32([[1], [2], [4]])
    write_safetensors(tmp_path / "x.safetensors", {"a.weight": eight, "a.weight_scale": scales}, {})
    np.testing.assert_array_equal(read_weights(tmp_path / "x.safetensors").tensors["a.weight"], eight * scales)


def test_not_a_number_in_8_bits_is_counted(tmp_path, capsys):
    write_safetensors(tmp_path / "x.safetensors", {"<a>": np.uint8([[127, 1]]).view(ml_dtypes.float8_e4m3fn)}, {})
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert "<a>: 1 values are NaN or infinite" in capsys.readouterr().out


EIGHT = np.zeros((4, 2), ml_dtypes.float8_e4m3fn)
FORMAT = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.scale_weight": np.float32(1)}, "a.scale_weight is the scale of a weight that is not there"),
        (
            {"a.weight": EIGHT, "a.scale_weight": np.ones(3, np.float32)},
            r"a.scale_weight is float32 \(3,\), the",
        ),
        ({"a.weight": EIGHT, "a.scale_weight": np.int32(1)}, "expected one scale, or one for each row, of floats"),
        ({"a.weight": EIGHT.view(np.uint8), "a.scale_weight": np.float32(1)}, "the weight uint8"),
        (
            {"a.weight": EIGHT, "a.scale_weight": np.float32(1), "b.weight": EIGHT},
            "b.weight is float8_e4m3fn without a scale, which others here have",
        ),
        ({"a.weight": EIGHT.astype(np.int8)}, "quantised weights, which are not read: a.weight is int8 where floats"),
        ({"a.in_proj_weight": EIGHT.astype(bool)}, "a.in_proj_weight is bool where floats are expected"),
        ({"a.weight": EIGHT, "a.comfy_quant": FORMAT}, "a.comfy_quant is nvfp4; read are float8_e4m3fn, float8_e5m2"),
        ({"a.weight": EIGHT, "a.comfy_quant": FORMAT[:5]}, "a.comfy_quant is damaged"),
        ({"a.weight": EIGHT, "a.weight_scale_2": np.float32(1)}, "quantised by ComfyUI in 4 bits or blocks"),
        ({"a.weight.absmax": np.float32([1])}, r"quantised by bitsandbytes \(a.weight.absmax\), which are not read"),
        ({"a.weight._data": EIGHT}, "quantised by optimum-quanto"),
        ({"a.qweight": np.int32([1])}, "quantised by GPTQ or AWQ"),
    ],
)
def test_what_is_no_scale_is_named(tensors, message, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {key: np.asarray(a) for key, a in tensors.items()}, {})
    with pytest.raises(FileError, match=f"x.safetensors: .*{message}"):
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "F6_E2M3"])
def test_other_small_floats_are_refused_by_name(kind, tmp_path):
    header = json.dumps({"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(FileError, match=f"x.safetensors: a has dtype {kind}; known are .*F8_E4M3, F8_E5M2"):
        read_weights(tmp_path / "x.safetensors")


def test_what_needs_no_scale_and_is_no_weight(tmp_path):
    """Layers in half precision, another network's 8-bit weights without scales, ids."""
    tensors = {
        "model.diffusion_model.a.weight": EIGHT,
        "model.diffusion_model.a.scale_weight": np.float32(2),
        "model.diffusion_model.b.weight": np.ones((4, 2), np.float16),
        "first_stage_model.a.weight": EIGHT,
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(3)[None],
    }
    write_safetensors(tmp_path / "x.safetensors", {key: np.asarray(a) for key, a in tensors.items()}, {})
    read = read_weights(tmp_path / "x.safetensors").tensors
    assert [array.dtype.name for array in read.values()].count("float8_e4m3fn") == 1 and len(read) == 4
