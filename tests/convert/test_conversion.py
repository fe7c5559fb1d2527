"""There and back bit for bit, files of every layout used directly, and nothing left behind after an error."""

import json
import shutil
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from bdm_jax.convert.__main__ import main
from bdm_jax.convert.conversion import to_jax, to_torch

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import read_header, write_safetensors
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.formats.networks.unet import ldm_unet
from bdm_jax.formats.open import contents_of, find
from bdm_jax.formats.weights import read_weights
from bdm_jax.models.config import UNetConfig
from bdm_jax.models.functional import init
from bdm_jax.systems.components import load_component, load_found, size_metadata
from bdm_jax.systems.pipeline import BridgePipeline

PARTS = ("unet", "vae", "text_encoder")


def same_files(a, b):
    """Two weight files hold the same tensors under the same names, bit for bit."""
    a, b = read_weights(a).tensors, read_weights(b).tensors
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        assert a[key].tobytes() == b[key].tobytes(), key


def same_components(a, b):
    assert a.config == b.config and a.params.keys() == b.params.keys()
    for key in a.params:
        np.testing.assert_array_equal(a.params[key], b.params[key], err_msg=key)


@pytest.fixture(scope="module")
def ldm_file(tiny_folder, tmp_path_factory):
    """The tiny backbone as a single file."""
    bare = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("branch*"))
    (path,) = to_torch(bare, bare.parent / "model.safetensors", "ldm")
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pipeline_folder_there_and_back(dtype, tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model", dtype)
    to_jax(tmp_path / "model", tmp_path / "jax")
    to_torch(tmp_path / "jax", tmp_path / "back")
    files = sorted(path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.*"))
    for name in files:
        if name.suffix == ".safetensors":
            same_files(tmp_path / "model" / name, tmp_path / "back" / name)
        else:
            assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_what_is_in_jax_is_a_transpose_and_a_rename(tiny_folder, tmp_path):
    to_jax(tiny_folder / "unet", tmp_path / "unet")
    entries, metadata = read_header(tmp_path / "unet" / "jax_model.safetensors")
    assert entries["conv_in.kernel"].shape == (3, 3, 4, 16) and entries["conv_norm_out.scale"].shape == (16,)
    assert metadata["format"] == "jax"
    same_components(load_component(tmp_path / "unet"), load_component(tiny_folder / "unet"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_single_file_there_and_back_with_all_that_is_in_it(dtype, ldm_file, tmp_path, rng):
    tensors = {key: array.astype(dtype) for key, array in read_weights(ldm_file).tensors.items()}
    tensors |= {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.arange(16)[None],
        "alphas_cumprod": rng.standard_normal(1000).astype(np.float32),
        "odd.kernel": rng.standard_normal((2, 3, 4, 5)).astype(np.float32),
    }
    metadata = read_header(ldm_file)[1]
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    to_jax(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    to_torch(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    same_files(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_single_file_to_folder_and_back(tiny_folder, ldm_file, tmp_path):
    to_torch(ldm_file, tmp_path / "folder", "diffusers")
    for part in PARTS:
        same_files(tmp_path / "folder" / part, tiny_folder / part)
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    to_torch(tmp_path / "folder", tmp_path / "again.safetensors", "ldm")
    same_files(tmp_path / "again.safetensors", ldm_file)


def test_single_file_loads_in_diffusers(tiny, tiny_folder, ldm_file):
    """diffusers' own reader of single files gets the same weights (its configs are given: it knows SD1.5's only)."""
    for part, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        theirs = cls.from_single_file(str(ldm_file), config=str(tiny_folder / part), local_files_only=True)
        ours = {key: torch.from_numpy(array.copy()) for key, array in read_weights(tiny_folder / part).tensors.items()}
        for key, value in theirs.state_dict().items():
            assert torch.equal(value, ours[key]), key


def test_single_file_in_place_of_the_backbone(tiny, tiny_folder, ldm_file):
    one = BridgePipeline.from_pretrained(tiny_folder, backbone=ldm_file, text_encoder=tiny_folder / "text_encoder")
    for part in (*PARTS, "branch", "branch_text_encoder"):
        same_components(getattr(one, part), getattr(tiny, part))
    assert one.schedule.prediction_type == "v_prediction" and one.tokenizer.length == tiny.tokenizer.length


def test_parts_of_other_origin(tiny, tiny_folder, tmp_path):
    """A torch .bin, a folder of 360's branch, a text tower with its tokenizer beside it, a half-precision variant."""
    torch.save(
        {key: torch.from_numpy(array.copy()) for key, array in read_weights(tiny_folder / "unet").tensors.items()},
        tmp_path / "diffusion_pytorch_model.bin",
    )
    shutil.copy(tiny_folder / "unet/config.json", tmp_path)
    unet = BridgePipeline.from_pretrained(tiny_folder, backbone=tmp_path).unet
    same_components(unet, tiny.unet)
    shutil.copytree(tiny_folder / "branch", tmp_path / "BDM1.0")
    config = json.loads((tmp_path / "BDM1.0/config.json").read_text())
    del config["bdm_branch"]
    (tmp_path / "BDM1.0/config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModelBDM"}))
    theirs = BridgePipeline.from_pretrained(
        tiny_folder, branch=tmp_path / "BDM1.0", branch_text_encoder=tiny_folder / "branch_text_encoder"
    )
    same_components(theirs.branch, tiny.branch)
    assert theirs.branch_tokenizer.length == tiny.branch_tokenizer.length
    tower = transformers.CLIPTextModel.from_pretrained(tiny_folder / "text_encoder").half()
    tower.save_pretrained(tmp_path / "tower", variant="fp16")
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tower", dirs_exist_ok=True)
    half = BridgePipeline.from_pretrained(tiny_folder, text_encoder=tmp_path / "tower").text_encoder
    for key, value in tiny.text_encoder.params.items():
        np.testing.assert_array_equal(half.params[key], np.asarray(value).astype(np.float16), err_msg=key)


def test_stock_controlnet_as_a_branch_loses_its_hint_network_with_a_word(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "branch/config.json").read_text())
    del config["bdm_branch"]
    model = diffusers.ControlNetModel.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the hint network in it is left out"):
        branch = BridgePipeline.from_pretrained(tiny_folder, branch=tmp_path).branch
    assert not any("cond_embedding" in key for key in branch.params)


def test_inspect_says_what_fits(tiny, tiny_folder, ldm_file, tmp_path, capsys):
    assert main(["inspect", str(ldm_file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [part["kind"] for part in report["parts"]] == list(("unet", "vae", "text_encoder"))
    assert all(part["layout"] == "ldm" and not part["missing"] for part in report["parts"])
    tensors = {key: np.array(value) for key, value in read_weights(tiny_folder / "unet").tensors.items()}
    tensors["mid_block.resnets.0.conv1.bias"][0] = np.nan
    tensors["more.weight"] = np.zeros(3, np.float32)
    del tensors["time_embedding.linear_2.bias"]
    write_safetensors(tmp_path / "x.safetensors", tensors, size_metadata(tiny.unet.config))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    out = capsys.readouterr().out
    assert "missing: time_embedding.linear_2.bias" in out and "unknown: more.scale" in out
    assert "mid_block.resnets.0.conv1.bias: 1 values are NaN or infinite" in out


def test_inspect_lets_through_what_is_allowed(tiny, tiny_folder, tmp_path):
    tensors = {key: np.array(value) for key, value in read_weights(tiny_folder / "unet").tensors.items()}
    tensors["more.weight"] = np.zeros(3, np.float32)
    write_safetensors(tmp_path / "x.safetensors", tensors, size_metadata(tiny.unet.config))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert main(["inspect", str(tmp_path / "x.safetensors"), "--allow", r"more\..*"]) == 0


def test_inspect_reads_the_config_beside_the_weights(tiny_folder):
    assert main(["inspect", str(tiny_folder / "unet")]) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_unet_mid_block.lora_down.weight": (4, 4)}, "LoRA"),
        ({"<cat>": (768,)}, "Textual Inversion"),
        ({"x": (1,)}, "unknown"),
    ],
)
def test_what_is_no_backbone_is_named(keys, message, tiny_folder, tmp_path):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {key: np.zeros(shape, np.float32) for key, shape in keys.items()}, {})
    with pytest.raises(UserError, match=f"file.safetensors: {message}.*; no network that this library reads"):
        BridgePipeline.from_pretrained(tiny_folder, backbone=path)


def test_inpainting_model_is_named(tiny_folder, tmp_path):
    tensors = {key: np.array(value) for key, value in read_weights(tiny_folder / "unet").tensors.items()}
    tensors["conv_in.weight"] = np.zeros((16, 9, 3, 3), np.float32)
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(UserError, match="UNet inpainting unet; this library has no such network"):
        find(tmp_path / "x.safetensors")
    assert contents_of(tmp_path / "x.safetensors")[1].parts[0].family == "UNet inpainting"


def test_averaged_weights_of_a_training_checkpoint(tmp_path):
    """LDM's EMA keeps names without dots: read where there is nothing else, or where asked for."""
    config = UNetConfig(block_out_channels=(8, 8, 8, 8), num_heads=2, norm_num_groups=4, cross_attention_dim=8)
    params = init(config, 0)
    names = tree_to_torch(params, ldm_unet(config.transformer_layers, config.layers_per_block))
    plain = {f"model.diffusion_model.{name}": np.ascontiguousarray(array) for name, array in names.items()}
    dotless = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in plain}
    average = {dotless[name]: 2 * array for name, array in plain.items()} | {"model_ema.decay": np.float32([0.999])}
    write_safetensors(tmp_path / "ema.safetensors", average, size_metadata(config))
    write_safetensors(tmp_path / "both.safetensors", plain | average, size_metadata(config))

    def first(name, **kind):
        component = load_found(find(tmp_path / name, **kind)["unet"])
        assert component.config == config
        return component.params["conv_in.kernel"]

    np.testing.assert_array_equal(first("both.safetensors"), params["conv_in.kernel"])
    np.testing.assert_array_equal(first("both.safetensors", variant="ema"), 2 * params["conv_in.kernel"])
    np.testing.assert_array_equal(first("ema.safetensors"), 2 * params["conv_in.kernel"])


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("lora/cloneofsimo/lora_disney.safetensors", "LoRA (cloneofsimo), Textual Inversion"),
        ("lora/cloneofsimo/analog_svd_rank4.safetensors", "LoRA (cloneofsimo)"),
        ("textual-inversion/fastai-diffusion-nbs.learned_embeds.bin", "Textual Inversion"),
        ("taesd", "TAESD vae (original)"),
    ],
)
def test_real_files_are_recognised(file, words):
    if not (SHARED / file).exists():
        pytest.skip(f"needs {SHARED / file}")
    assert contents_of(SHARED / file)[1].name == words


@pytest.mark.parametrize("command", ["to-jax", "to-torch"])
def test_bad_input_leaves_nothing(command, tiny_folder, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert main([command, str(tiny_folder), str(tmp_path / "there")]) == 2
    assert "there: is there already" in capsys.readouterr().err
    assert main([command, str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model/vae/diffusion_pytorch_model.safetensors").write_bytes(b"\1" * 99)
    assert main([command, str(tmp_path / "model"), str(tmp_path / "x")]) == 2
    assert "not a safetensors file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]


def test_two_names_for_one_weight(tiny_folder, tmp_path):
    tensors = dict(read_weights(tiny_folder / "text_encoder").tensors)
    key = "text_model.final_layer_norm.bias"
    write_safetensors(tmp_path / "x.safetensors", {**tensors, key.removeprefix("text_model."): tensors[key]}, {})
    with pytest.raises(FileError, match="under two names"):
        to_jax(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    with pytest.raises(FileError, match="under two names"):
        load_component(tmp_path / "x.safetensors")


def test_weight_too_large_for_half_leaves_nothing(tiny_folder, tmp_path):
    tensors = {key: np.array(value) for key, value in read_weights(tiny_folder / "vae").tensors.items()}
    tensors["quant_conv.bias"][0] = 1e5
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(UserError, match="quant_conv.bias has values beyond float16's range"):
        to_torch(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
