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
    assert "missing: time_embedding.linear_2.bias" in out and "unknown: more.weight" in out
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


def test_plugins_are_inspected_by_what_draws_with_them(tmp_path, capsys):
    """Names of embeddings as prompts have them, LoRAs of diffusers before peft by network, keys that are not read."""

    def inspect(file):
        code = main(["inspect", str(tmp_path / file)])
        return code, " ".join(capsys.readouterr().out.split())

    vectors = torch.ones(2, 8)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "21ink"}, tmp_path / "ink.pt")
    code, out = inspect("ink.pt")
    assert code == 0 and "ink.pt: Textual Inversion (A1111): 21ink or ink 1 tensors" in out
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    names = [f"mid_block.attentions.0.attn{i}.processor.to_{x}_lora" for i in (1, 2) for x in ("q", "out")]
    factors = {
        f"{name}.{half}.weight": np.ones((2, 2), np.float32) for name in [*names, text] for half in ("up", "down")
    }
    write_safetensors(tmp_path / "old.safetensors", factors, {})
    code, out = inspect("old.safetensors")
    assert code == 0 and "LoRA (diffusers or peft), modules: 1 of text_encoder, 4 of unet 10 tensors" in out
    write_safetensors(tmp_path / "more.safetensors", factors | {"unet.more_lora": np.ones(3, np.float32)}, {})
    code, out = inspect("more.safetensors")
    assert code == 1 and "not understood: unet.more_lora" in out


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


@pytest.mark.parametrize(
    ("source", "name", "flags", "message"),
    [
        ("folder", "x.ckpt", (), "a folder is written here, choose a name without .ckpt (to-torch --layout ldm"),
        ("file", "x.safetensors", ("--layout", "diffusers"), "a folder is written here, choose a name without .saf"),
        ("folder", "x.ckpt", ("--layout", "ldm"), "what is written is safetensors, choose a name that ends in"),
        ("file", "x.bin", (), "what is written is safetensors, choose a name that ends in .safetensors"),
    ],
)
def test_the_name_says_what_is_written(source, name, flags, message, tiny_folder, ldm_file, tmp_path, capsys):
    given = tiny_folder if source == "folder" else ldm_file
    assert main(["to-torch", str(given), str(tmp_path / name), *flags]) == 2
    assert f"error: {tmp_path / name}: {message}" in " ".join(capsys.readouterr().err.split())
    assert not any(tmp_path.iterdir())


def test_two_names_for_one_weight(tiny_folder, tmp_path):
    tensors = dict(read_weights(tiny_folder / "text_encoder").tensors)
    key = "text_model.final_layer_norm.bias"
    write_safetensors(tmp_path / "x.safetensors", {**tensors, key.removeprefix("text_model."): tensors[key]}, {})
    with pytest.raises(FileError, match="under two names"):
        to_jax(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    with pytest.raises(FileError, match="under two names"):
        load_component(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "arguments", [("to-jax",), ("to-torch",), ("to-torch", "--layout", "diffusers")], ids=lambda one: " ".join(one)
)
def test_weights_that_are_not_finite_are_converted_with_a_note(arguments, tiny_folder, tmp_path, recwarn):
    """It names the first as the file has it, and counts the others; of sound weights nothing is said."""
    tensors = {key: np.array(value) for key, value in read_weights(tiny_folder / "vae").tensors.items()}
    command, *options = arguments
    end = "" if options else ".safetensors"  # a folder, or a file
    write_safetensors(tmp_path / "sound.safetensors", {f"vae.{key}": array for key, array in tensors.items()}, {})
    assert main([command, str(tmp_path / "sound.safetensors"), str(tmp_path / f"a{end}"), *options]) == 0
    assert not recwarn.list
    tensors["quant_conv.bias"][0], tensors["encoder.conv_in.weight"][0, 0, 1, 1] = np.nan, -np.inf
    write_safetensors(tmp_path / "x.safetensors", {f"vae.{key}": array for key, array in tensors.items()}, {})
    assert main([command, str(tmp_path / "x.safetensors"), str(tmp_path / f"b{end}"), *options]) == 0
    (said,) = [str(warning.message) for warning in recwarn.list]
    assert "x.safetensors: NaN or infinite values in vae." in said and ", and in 1 more: converted as they are" in said
    found = read_weights(tmp_path / f"b{end}").tensors
    assert sum(int((~np.isfinite(array)).sum()) for array in found.values()) == 2


def test_weight_too_large_for_half_leaves_nothing(tiny_folder, tmp_path):
    tensors = {key: np.array(value) for key, value in read_weights(tiny_folder / "vae").tensors.items()}
    tensors["quant_conv.bias"][0] = 1e5
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(UserError, match="quant_conv.bias has values beyond float16's range"):
        to_torch(tmp_path / "x.safetensors", tmp_path / "y.safetensors", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


REPORTS = SHARED.parent / "reports" / "files"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("inkstyle.pt", "Textual Inversion (A1111): 21charturnerv2"),
        ("legacy_ti.pt", "Textual Inversion (A1111)"),
        ("lora-comfy.safetensors", "LoRA (CompVis' names)"),
        ("lora-default_0.safetensors", "LoRA (diffusers or peft)"),
        ("lora-glora.safetensors", "LoRA (kohya)"),
        ("lora-kohya-same-weights.safetensors", "LoRA (kohya)"),
        ("lora-named-adapter.safetensors", "LoRA (diffusers or peft)"),
        ("lora-oft.safetensors", "LoRA (kohya)"),
        (SHARED / "lora/cloneofsimo/lora_disney.safetensors", "LoRA (cloneofsimo)"),
        (SHARED / "lora/cloneofsimo/lora_disney_inpainting.safetensors", "LoRA (cloneofsimo)"),
        (SHARED / "lora/cloneofsimo/analog_svd_rank4.safetensors", "LoRA (cloneofsimo)"),
        (SHARED / "textual-inversion/fastai-diffusion-nbs.learned_embeds.bin", "Textual Inversion: <birb-style>"),
        (SHARED / "taesd", "TAESD vae (original)"),
        (SHARED / "taesd/taesd_decoder.safetensors", "half of a TAESD"),
    ],
)
def test_inspect_understands_every_real_file(file, words, capsys):
    if not (REPORTS / file).exists():
        pytest.skip(f"needs {REPORTS / file}")
    assert main(["inspect", str(REPORTS / file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["contents"].startswith(words) and not report["rest"] and not report["refused"]


VECTORS = torch.arange(6.0).reshape(2, 3)
WEIGHTS = {"down": torch.ones(1, 8), "up": torch.ones(8, 1)}
OLD = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
PLUGINS = {
    "A1111": ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "ink", "step": 3}, 0, "ink"),
    "LDM": ({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})}, 0, "Textual Inversion"),
    "diffusers": ({"ink": VECTORS[0]}, 0, "Textual Inversion: ink"),
    "a bare tensor": (VECTORS, 0, "Textual Inversion"),
    "not finite": ({"<a>": VECTORS / 0}, 2, "Textual Inversion"),
    "cloneofsimo": ([WEIGHTS["up"], WEIGHTS["down"]] * 2, 0, "LoRA (cloneofsimo)"),
    "attention processors": ({f"{OLD}.{name}.weight": w for name, w in WEIGHTS.items()}, 0, "LoRA (diffusers or peft)"),
    "LoRA with more": (
        {f"{OLD}.up.weight": WEIGHTS["up"], f"{OLD}.down.weight": WEIGHTS["down"], "odd": VECTORS},
        1,
        "LoRA (diffusers or peft)",
    ),
    "IP-Adapter": ({"image_proj": {"proj.weight": VECTORS}, "ip_adapter": {"1.to_k_ip.weight": VECTORS}}, 0, "IP-"),
    "nothing known": ({"odd": torch.ones(2, 2, 2)}, 2, "unknown"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", PLUGINS)
def test_inspect_reads_plug_ins_as_drawing_does(kind, old, tmp_path, capsys):
    value, status, words = PLUGINS[kind]
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    assert main(["inspect", str(tmp_path / "x.pt"), "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert words in report["contents"]
    assert report["rest"] == (["odd"] if "odd" in str(value) else [])


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Access denied</html>", "a web page or XML"),
        (b"GGUF\3\0\0\0" + bytes(40), "a GGUF file"),
        (b"\xff\xd8\xff\xe0" + bytes(40), r"a picture \(JPEG\)"),
    ],
)
def test_what_is_no_weight_file_is_named(head, what, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(head)
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 2
    assert f"x.safetensors: not a safetensors file but {what}".replace("\\", "") in capsys.readouterr().err
