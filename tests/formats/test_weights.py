"""What a path leads to: one file, shards, a folder with variants, both halves of a TAESD."""

import numpy as np
import pytest

from bdm_jax.errors import FileError
from bdm_jax.formats.files import write_json, write_safetensors
from bdm_jax.formats.weights import read_weights


def shard(folder, parts, weight_map):
    for name, tensors in parts.items():
        write_safetensors(folder / name, tensors, {})
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def test_shards_are_read_together(tmp_path):
    a, b = np.ones(2, np.float32), np.zeros(3, np.float16)
    parts = {"1.safetensors": {"a": a}, "2.safetensors": {"b": b}}
    shard(tmp_path, parts, {"a": "1.safetensors", "b": "2.safetensors"})
    weights = read_weights(tmp_path)
    assert weights.path.name == "model.safetensors.index.json"
    assert weights.tensors.keys() == {"a", "b"} and (weights.tensors["a"] == a).all()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "b": "1.safetensors"}, "b lies in no shard"),
        ({"a": "1.safetensors", "b": "3.safetensors"}, "3.safetensors"),
        ({"a": "1.safetensors", "b": "../2.safetensors"}, "is no weight file in its folder"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "a lies in two shards"),
        ({"a": "1.safetensors", "b": "model.safetensors.index.json"}, "is no weight file in its folder"),
        ({}, "no weight_map"),
    ],
)
def test_shards_that_do_not_fit(weight_map, message, tmp_path):
    a = np.ones(2, np.float32)
    shard(tmp_path, {"1.safetensors": {"a": a}, "2.safetensors": {"a": a, "b": a}}, weight_map)
    with pytest.raises(FileError, match=message):
        read_weights(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileError, match="no weights; expected diffusion_pytorch_model.safetensors"):
        read_weights(tmp_path)
    with pytest.raises(FileError, match="nowhere: cannot be read"):
        read_weights(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], None, "diffusion_pytorch_model.fp16.safetensors"),
        (["diffusion_pytorch_model.non_ema.safetensors", "model.safetensors"], None, "model.safetensors"),
        (["jax_model.safetensors"], None, "jax_model.safetensors"),
    ],
)
def test_which_file_of_a_folder(names, variant, chosen, tmp_path):
    for name in names:
        write_safetensors(tmp_path / name, {name: np.zeros(1, np.float32)}, {})
    weights = read_weights(tmp_path, variant)
    assert weights.path.name == chosen and list(weights.tensors) == [chosen]


def test_variant_that_is_not_there(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(1, np.float32)}, {})
    with pytest.raises(FileError, match="no weights of the variant 'fp16'"):
        read_weights(tmp_path, "fp16")


def test_sharded_variant(tmp_path):
    part = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    write_safetensors(tmp_path / part, {"a": np.zeros(1, np.float16)}, {})
    write_json(tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json", {"weight_map": {"a": part}})
    assert read_weights(tmp_path).tensors["a"].dtype == np.float16


def test_both_halves_of_a_taesd(tmp_path):
    for half in ("encoder", "decoder"):
        write_safetensors(tmp_path / f"taesd_{half}.safetensors", {"1.weight": np.zeros(2, np.float32)}, {})
    assert sorted(read_weights(tmp_path).tensors) == ["taesd_decoder.1.weight", "taesd_encoder.1.weight"]


@pytest.mark.parametrize(
    ("names", "message"), [("[1]", "not a table of names"), ('{"a": 1}', "not a table"), ("{", "not a table")]
)
def test_header_of_ours_that_is_damaged(names, message, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.zeros(1)}, {"format": "jax", "bdm_jax.names": names})
    with pytest.raises(FileError, match=message):
        read_weights(tmp_path / "x.safetensors")
