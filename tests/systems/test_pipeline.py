"""A saved pipeline is a folder that the community's libraries read; a damaged one is refused in one line."""

import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from transformers.models.chinese_clip.modeling_chinese_clip import ChineseCLIPTextModel

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import read_safetensors, write_safetensors
from bdm_jax.models.functional import bind
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import DEMO
from bdm_jax.systems.components import load_component, save_component
from bdm_jax.systems.pipeline import BridgePipeline

NETWORKS = ("unet", "vae", "text_encoder", "branch", "branch_text_encoder")


def test_saved_and_read_again(tiny, tiny_folder):
    again = BridgePipeline.from_pretrained(tiny_folder)
    for name in NETWORKS:
        (config, params), (config_again, params_again) = getattr(tiny, name), getattr(again, name)
        assert config_again == config
        assert list(params_again) == list(params)
        for key, value in params.items():
            np.testing.assert_array_equal(params_again[key], value, err_msg=key)
    assert again.schedule == tiny.schedule and again.guidance == tiny.guidance == 3.0
    assert again.tokenizer(["a cat"]).tolist() == tiny.tokenizer(["a cat"]).tolist()
    assert again.branch_tokenizer(["猫"]).tolist() == tiny.branch_tokenizer(["猫"]).tolist()


def test_same_pipeline_same_bytes(tiny, tiny_folder, tmp_path):
    tiny.save_pretrained(tmp_path, "float32")
    files = sorted(path.relative_to(tiny_folder) for path in tiny_folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for path in files:
        assert (tmp_path / path).read_bytes() == (tiny_folder / path).read_bytes(), path


@pytest.mark.parametrize(
    ("name", "cls", "more"),
    [
        ("unet", diffusers.UNet2DConditionModel, {}),
        ("vae", diffusers.AutoencoderKL, {}),
        ("text_encoder", transformers.CLIPTextModel, {}),
        ("branch_text_encoder", ChineseCLIPTextModel, {"add_pooling_layer": False}),
    ],
)
def test_networks_load_with_nothing_missing_or_unexpected(name, cls, more, tiny_folder):
    _, info = cls.from_pretrained(tiny_folder / name, output_loading_info=True, local_files_only=True, **more)
    assert not any(info.values()), info


def test_branch_loads_as_a_controlnet_that_lacks_the_hint_network_only(tiny_folder):
    _, info = diffusers.ControlNetModel.from_pretrained(
        tiny_folder / "branch", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert all(key.startswith("controlnet_cond_embedding.") for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]


def test_backbone_loads_as_a_stable_diffusion_pipeline(tiny_folder):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    image = theirs("a cat", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    assert theirs.scheduler.config.prediction_type == "v_prediction"


def test_diffusers_predicts_the_same_noise(tiny, tiny_folder, rng, nhwc, nchw, assert_parity):
    x, text = rng.standard_normal((2, 4, 6, 4)).astype(np.float32), rng.standard_normal((2, 16, 16)).astype(np.float32)
    t = np.array([3, 700])
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tiny_folder / "unet", local_files_only=True)
    reference = theirs(nchw(x), torch.from_numpy(t), torch.from_numpy(text)).sample
    config, params = load_component(tiny_folder / "unet")
    ours = jax.jit(lambda params: bind(config, params)(x, t, Conditioning(text)))(params)
    assert_parity(ours, nhwc(reference))


def test_what_the_libraries_save_is_read(tiny, tiny_folder, tmp_path, load_chinese_tower):
    """Folders written by the libraries themselves: sharded, in bfloat16, CLIP without its prefix."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_folder / "unet").to(torch.bfloat16)
    unet.save_pretrained(tmp_path / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    config, params = load_component(tmp_path / "unet", "bfloat16")
    assert config == tiny.unet.config
    for key, value in tiny.unet.params.items():
        np.testing.assert_array_equal(params[key], np.asarray(value).astype(ml_dtypes.bfloat16), err_msg=key)
    transformers.CLIPTextModel.from_pretrained(tiny_folder / "text_encoder").save_pretrained(tmp_path / "text_encoder")
    load_chinese_tower(tiny_folder / "branch_text_encoder").save_pretrained(tmp_path / "branch_text_encoder")
    for name in ("text_encoder", "branch_text_encoder"):
        config, params = load_component(tmp_path / name)
        assert config == getattr(tiny, name).config
        for key, value in getattr(tiny, name).params.items():
            np.testing.assert_array_equal(params[key], value, err_msg=key)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_saved_in_half(dtype, tiny, tmp_path):
    save_component(tmp_path, *tiny.text_encoder, dtype, metadata={"steps": "7"})
    _, params = load_component(tmp_path)
    for key, value in tiny.text_encoder.params.items():
        assert params[key].dtype == jnp.float32
        np.testing.assert_array_equal(params[key], value.astype(dtype).astype(jnp.float32), err_msg=key)
    _, info = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_weight_too_large_for_half_is_refused(tiny, tmp_path):
    params = {**tiny.vae.params, "quant_conv.bias": tiny.vae.params["quant_conv.bias"].at[0].set(1e5)}
    with pytest.raises(UserError, match="quant_conv.bias has values beyond float16's range"):
        save_component(tmp_path, tiny.vae.config, params)
    assert not list(tmp_path.iterdir())
    save_component(tmp_path, tiny.vae.config, params, "bfloat16")


def test_bare_backbone(tiny, tmp_path, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("branch*"))
    assert BridgePipeline.from_pretrained(tmp_path / "bare").branch is None


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change_weights(folder, change):
    path = next(folder.glob("*.safetensors"))
    write_safetensors(path, change({key: np.array(value) for key, value in read_safetensors(path).items()}), {})


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")


DAMAGE = {
    "no folder": (lambda f: shutil.rmtree(f), "model: no such model folder"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "not a whole model folder; missing: vae"),
    "half a bridge": (lambda f: shutil.rmtree(f / "branch"), "missing: branch"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "branch_tokenizer"), "missing: branch_tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "missing: scheduler"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "unet/config.json: cannot be read"),
    "config that is not JSON": (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json: not JSON"),
    "unknown network": (lambda f: change_json(f / "unet/config.json", _class_name="Flux"), "unet: .*'Flux'"),
    "setting that is not implemented": (lambda f: change_json(f / "unet/config.json", act_fn="relu"), "act_fn='relu'"),
    "unknown prediction": (
        lambda f: change_json(f / "scheduler/scheduler_config.json", prediction_type="x"),
        "scheduler_config.json: prediction_type='x'",
    ),
    "no weights": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "unet: no weights"),
    "missing weight": (
        lambda f: change_weights(f / "unet", lambda w: {k: v for k, v in w.items() if k != "conv_in.bias"}),
        r"unet/diffusion_pytorch_model.safetensors: .* 1 missing \(conv_in.bias\)",
    ),
    "extra weight": (
        lambda f: change_weights(f / "branch", lambda w: {**w, "more.weight": w["conv_in.bias"]}),
        r"branch/.*1 unknown \(more.weight\)",
    ),
    "misshaped weight": (
        lambda f: change_weights(f / "text_encoder", lambda w: {**w, "text_model.final_layer_norm.bias": np.zeros(3)}),
        r"text_encoder/model.safetensors: .*final_layer_norm.bias \(3,\) instead of \(16,\)",
    ),
    "truncated weights": (
        lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\1" * 99),
        "vae/diffusion_pytorch_model.safetensors: not a safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_named(damage, folder):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises((UserError, FileError), match=message) as error:
        BridgePipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_branch_of_another_text_width(folder):
    change_json(folder / "branch/config.json", cross_attention_dim=24)
    text = ("attn2.to_k.weight", "attn2.to_v.weight")

    def wider(w):
        return {k: np.zeros((len(v), 24), v.dtype) if k.endswith(text) else v for k, v in w.items()}

    change_weights(folder / "branch", wider)
    with pytest.raises(UserError, match="branch and branch_text_encoder do not belong together: text width 24 and 16"):
        BridgePipeline.from_pretrained(folder)


def test_network_in_the_wrong_place(tiny):
    with pytest.raises(UserError, match="branch: UNetConfig in place of BranchConfig"):
        tiny.replace(branch=tiny.unet)


def test_tokenizer_with_more_words_than_its_tower(tiny):
    with pytest.raises(UserError, match="tokenizer and text_encoder do not belong together"):
        tiny.replace(tokenizer=tiny.branch_tokenizer)


@pytest.mark.parametrize(
    ("component", "values", "message"),
    [
        ("unet", {"norm_num_groups": 0}, "norm_num_groups=0 is not a valid value"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block=1000000000 is not a valid value"),
        ("unet", {"block_out_channels": [16, "32"]}, "block_out_channels='32' is not a valid value"),
        ("vae", {"latent_channels": True}, "latent_channels=True is not a valid value"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor=nan is not a valid value"),
        ("text_encoder", {"hidden_act": "swish"}, "hidden_act='swish' is not implemented"),
        ("text_encoder", {"model_type": "clip"}, "a whole CLIP without text_config"),
        ("branch_text_encoder", {"num_hidden_layers": -1}, "num_hidden_layers=-1 is not a valid value"),
    ],
)
def test_config_that_cannot_be(folder, component, values, message):
    change_json(folder / component / "config.json", **values)
    with pytest.raises(UserError, match=message):
        BridgePipeline.from_pretrained(folder)


def test_saving_parameters_of_another_config(tiny, tmp_path):
    with pytest.raises(UserError, match="weights do not fit the config"):
        save_component(tmp_path, tiny.vae.config, tiny.unet.params)
    with pytest.raises(UserError, match="did you mean 'float16'"):
        save_component(tmp_path, *tiny.vae, "float61")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("StableDiffusion3Pipeline", "StableDiffusion3Pipeline"),
        ("FluxPipeline", "FluxPipeline"),
        ("StableDiffusionUpscalePipeline", "StableDiffusionUpscalePipeline"),
        ("AltDiffusionPipeline", "AltDiffusionPipeline"),
        (["pipeline", "MyPipeline"], r'\["pipeline", "MyPipeline"\]'),
        (3, "3"),
    ],
)
def test_folder_of_another_system_is_refused_by_name(name, shown, folder):
    change_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(UserError, match=f"model_index.json: {shown}, which this library does not have; it has"):
        BridgePipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["StableDiffusionControlNetPipeline", "StableDiffusionImg2ImgPipeline", None])
def test_folder_of_another_pipeline_of_the_same_parts_is_read(name, folder):
    change_json(folder / "model_index.json", _class_name=name)
    assert BridgePipeline.from_pretrained(folder).family.name == "sd15"


def test_folders_that_a_system_has_no_place_for_are_noted(folder, capsys):
    from bdm_jax.convert.__main__ import main

    (folder / "text_encoder_2").mkdir()  # an empty folder is no part
    assert main(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [part["kind"] for part in report["parts"]] == list(NETWORKS) and not report["rest"]
    assert "tokenizer (8514 tokens)" in report["recognised"]
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2", dirs_exist_ok=True)
    shutil.copytree(folder / "unet", folder / "prior")
    shutil.copytree(folder / "unet", folder / "safety_checker")  # which only looks at pictures
    with pytest.warns(UserWarning, match="model: no part of a SD1.x system: prior, text_encoder_2: left out"):
        BridgePipeline.from_pretrained(folder)
    assert main(["inspect", str(folder)]) == 1
    assert "not understood: prior, text_encoder_2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (None, {}, "model None: expected the path"),
        (DEMO, {"unet": 1}, "unet 1: expected the path"),
        (DEMO, {"torch_dtype": None}, "unknown option 'torch_dtype': it is called dtype here"),
        (DEMO, {"bogus": None}, "unknown part of a system 'bogus'"),
    ],
)
def test_wrong_kinds_are_one_line(model, options, said):
    with pytest.raises(UserError, match=said):
        BridgePipeline.from_pretrained(model, **options)


def test_a_part_that_is_none_is_named(tiny):
    with pytest.raises(UserError, match="unet 1: expected a Component"):
        tiny.replace(unet=1)
