"""Networks in files as people have them: wrapped by trainers, in other places, with what a network does not need."""

import json

import numpy as np
import pytest
import torch
import transformers
from bdm_jax.convert.__main__ import main

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import read_safetensors, write_safetensors
from bdm_jax.formats.layouts import tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.autoencoders import ldm_vae
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.unet import ldm_unet
from bdm_jax.formats.open import find, pick_network
from bdm_jax.formats.weights import unwrapped
from bdm_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from bdm_jax.models.functional import abstract
from bdm_jax.systems.components import config_of, find_part, save_component, size_metadata
from bdm_jax.systems.folder import find_system

CLIP = CLIPTextConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu"
)
CONFIGS = {
    "unet": UNetConfig(
        block_out_channels=(8, 16), transformer_layers=(1, 0), num_heads=2, norm_num_groups=4, cross_attention_dim=16
    ),
    "vae": VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4),
    "text_encoder": CLIP,
}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
TABLES = {"unet": ldm_unet((1, 0), 2), "vae": ldm_vae(2, 1), "text_encoder": CLIP_TEXT}
METADATA = {key: value for config in CONFIGS.values() for key, value in size_metadata(config).items()}


@pytest.fixture
def trees(drawn, rng):
    """A random tree of each network."""
    return {name: drawn(config, rng) for name, config in CONFIGS.items()}


@pytest.fixture
def file(tmp_path):
    """A function that writes tensors and gives the path."""

    def write(tensors, metadata=METADATA, name="x.safetensors"):
        write_safetensors(tmp_path / name, {k: np.asarray(a) for k, a in tensors.items()}, metadata)
        return tmp_path / name

    return write


def ldm(trees, **prefixes):
    """A single file's tensors; where networks lie may be changed."""
    prefixes = PREFIXES | prefixes
    return {prefixes[n] + k: a for n, tree in trees.items() for k, a in tree_to_torch(tree, TABLES[n]).items()}


def same_tree(found, tree):
    config = config_of(found)
    read = tree_from_torch(found.tensors, abstract(config), "x", found.table, found.names, found.prefix)
    assert read.keys() == tree.keys()
    for key, array in tree.items():
        np.testing.assert_array_equal(read[key], array, err_msg=key)


@pytest.mark.parametrize("inner", ["text_model.", ""])
@pytest.mark.parametrize(
    "place",
    [
        "cond_stage_model.transformer.",
        "cond_stage_model.clip_l.transformer.",
        "text_encoders.clip_l.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoder.",
    ],
)
@pytest.mark.filterwarnings("error")
def test_text_encoder_is_found_where_programs_keep_it(place, inner, trees, file):
    tensors = ldm(trees, text_encoder=place)
    tensors = {key.replace(f"{place}text_model.", place + inner): array for key, array in tensors.items()}
    tower = place.removesuffix("transformer.")
    tensors |= {f"{tower}logit_scale": np.float32(4.6), "cond_stage_model.clip_l.text_projection": np.eye(16)}
    found = find_system(file(tensors)).networks
    for name, tree in trees.items():
        same_tree(found[name], tree)
    assert main(["inspect", str(file(tensors))]) == 0


def test_text_encoder_that_is_not_understood_is_never_dropped_in_silence(trees, file, tmp_path, capsys):
    """A BERT under CLIP's place, as Taiyi has it, and a tower in a place that nobody knows."""
    for place, key in (("cond_stage_model.bert.", "embeddings.word_embeddings.weight"), ("conditioner.x.", "a.weight")):
        tensors = {key: array for key, array in ldm(trees).items() if not key.startswith("cond_stage_model.")}
        path = file(tensors | {place + key: np.zeros((5, 4), np.float32)})
        with pytest.raises(UserError, match=rf"text encoder is of no kind that is read here: {place}{key}"):
            find_system(path)
        with pytest.warns(UserWarning, match=f"left out, being of no network that is read here: {place}{key}"):
            same_tree(pick_network(find(path), path, "vae"), trees["vae"])
        assert main(["inspect", str(path)]) == 1
        assert f"not understood: {place}{key}" in capsys.readouterr().out


def test_what_no_network_takes_is_noted_with_the_names_that_it_has(trees, file):
    extra = {f"embedding_manager.{i}.weight": np.zeros(2, np.float32) for i in range(5)}
    with pytest.warns(UserWarning, match=r"left out, .*: embedding_manager.0.weight, .*.2.weight and 2 more"):
        find_system(file(ldm(trees) | extra))


IGNORABLE = {
    "alphas_cumprod": (10,),
    "sqrt_one_minus_alphas_cumprod": (10,),
    "posterior_mean_coef1": (10,),
    "denoiser.sigmas": (10,),
    "model_ema.decay": (),
    "model_ema.diffusion_modelout2weight": (4, 4),
    "logit_scale": (),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "loss.discriminator.main.0.weight": (4, 3, 4, 4),
    "lr_scheduler.last_epoch": (),
    "optimizer.state.0.exp_avg": (3,),
    "global_step": (),
}


@pytest.mark.filterwarnings("error")
def test_what_carries_nothing_is_left_out(trees, file, capsys):
    path = file(ldm(trees) | {key: np.zeros(shape, np.float32) for key, shape in IGNORABLE.items()})
    for name, part in find_system(path).networks.items():
        same_tree(part, trees[name])
    assert main(["inspect", str(path), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["ignored"]) == {
        k for k in IGNORABLE if not k.startswith("model_ema")
    }


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.filterwarnings("error")
def test_autoencoder_with_what_it_was_trained_by(prefix, suffix, trees, tmp_path, as_torch):
    """The file of 840,000 steps: `state_dict`, with the discriminator under `loss`."""
    tensors = {prefix + key: array for key, array in tree_to_torch(trees["vae"], TABLES["vae"]).items()}
    tensors |= {"loss.logvar": np.float32(0), "loss.discriminator.main.0.weight": np.ones((4, 3, 4, 4), np.float32)}
    tensors |= {"model_ema.num_updates": np.int32(3), "loss.perceptual_loss.lin0.model.1.weight": np.ones((1, 4, 1, 1))}
    path = tmp_path / f"vae{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": as_torch(tensors), "epoch": 1, "optimizer_states": [{}]}, path)
    else:
        write_safetensors(path, {key: np.asarray(a) for key, a in tensors.items()}, size_metadata(CONFIGS["vae"]))
    part = pick_network(find(path), path, "vae")
    read = tree_from_torch(part.tensors, abstract(CONFIGS["vae"]), "x", part.table)
    for key, array in trees["vae"].items():
        np.testing.assert_array_equal(read[key], array, err_msg=key)
    assert main(["inspect", str(path)]) == 0


# Whole CLIPs.


@pytest.fixture(scope="module")
def whole():
    """transformers' own whole CLIPs, English and Chinese."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = sizes | dict(image_size=28, patch_size=14)
    english = transformers.CLIPConfig(
        text_config=sizes | dict(vocab_size=50, eos_token_id=49, hidden_act="gelu"),
        vision_config=vision | {"hidden_act": "gelu"},
        projection_dim=12,
    )
    chinese = transformers.ChineseCLIPConfig(
        text_config=sizes | dict(vocab_size=60, hidden_act="gelu"), vision_config=vision, projection_dim=12
    )
    return {"english": transformers.CLIPModel(english), "chinese": transformers.ChineseCLIPModel(chinese)}


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize(
    ("language", "name", "at"),
    [
        ("english", "text_encoder", ("text_model.", "text_projection")),
        ("english", "image_encoder", ("vision_model.", "visual_projection")),
        ("chinese", "branch_text_encoder", ("text_model.",)),
        ("chinese", "branch_text_encoder_2", ("text_model.", "text_projection")),
    ],
)
@pytest.mark.filterwarnings("error")
def test_tower_of_a_whole_clip(form, language, name, at, whole, tmp_path):
    whole[language].save_pretrained(tmp_path)
    path = tmp_path if form == "folder" else (tmp_path / "config.json").unlink() or tmp_path / "model.safetensors"
    part = find_part(path, name)
    config = config_of(part)
    assert config.hidden_size == 16 and config.projection_dim == (
        12 if any("projection" in at_ for at_ in at) else None
    )
    read = tree_from_torch(part.tensors, abstract(config), str(path), part.table)
    pooler = ("text_model.pooler.",) if language == "chinese" else ()
    tensors = {key: array.numpy() for key, array in whole[language].state_dict().items() if key.startswith(at)}
    tensors = {k: a for k, a in tensors.items() if not k.startswith(pooler) and not k.endswith("position_ids")}
    back = tree_to_torch(read)
    assert len(back) == len([key for key in tensors if not key.endswith("token_type_ids")])
    for key, array in back.items():
        theirs = key if key in tensors else f"text_model.{key}"
        np.testing.assert_array_equal(array, tensors[theirs], err_msg=key)
    assert main(["inspect", str(path)]) == 0


@pytest.mark.parametrize("form", ["linear", "matrix", "a folder whose config has none"])
@pytest.mark.filterwarnings("error")
def test_text_encoder_with_a_projection(form, trees, rng, file, tmp_path):
    tensors = tree_to_torch(trees["text_encoder"])
    matrix = rng.standard_normal((12, 16)).astype(np.float32)
    if form == "a folder whose config has none":
        save_component(tmp_path / "text_encoder", CLIP, trees["text_encoder"], "float32")
        path = tmp_path / "text_encoder/model.safetensors"
        write_safetensors(path, {**read_safetensors(path), "text_projection.weight": matrix}, {})
        path = path.parent
    else:
        key, array = ("text_projection.weight", matrix) if form == "linear" else ("text_projection", matrix.T)
        path = file({**tensors, key: np.ascontiguousarray(array), "logit_scale": np.float32(4.6)})
    part = pick_network(find(path), path, "text_encoder")
    expected = dict(trees["text_encoder"])
    if form != "a folder whose config has none":
        expected["text_projection.kernel"] = matrix.T
        assert config_of(part).projection_dim == 12
    same_tree(part, expected)
    assert main(["inspect", str(path)]) == 0


# A part of a whole model.


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("error")
def test_one_part_of_a_whole_model(name, trees, file):
    path = file(ldm(trees))
    same_tree(pick_network(find(path), path, name), trees[name])


def test_part_of_a_model_that_is_not_read(trees, file):
    """The autoencoder of an inpainting model is like any other; the model is refused by name."""
    key = "model.diffusion_model.input_blocks.0.0.weight"
    path = file({**ldm(trees), key: np.zeros((8, 9, 3, 3), np.float32)})
    same_tree(pick_network(find(path), path, "vae"), trees["vae"])
    for read in (lambda: find_system(path), lambda: pick_network(find(path), path, "unet")):
        with pytest.raises(UserError, match="UNet inpainting unet; this library has no such network"):
            read()


def test_text_encoder_of_sd2_is_refused_by_name(file):
    tensors = {f"transformer.resblocks.0.{k}": (8, 8) for k in ("attn.out_proj.weight", "mlp.c_proj.weight")}
    tensors |= {"transformer.resblocks.0.attn.in_proj_weight": (24, 8), "transformer.resblocks.0.ln_1.weight": (8,)}
    tensors |= {"transformer.resblocks.0.mlp.c_fc.weight": (32, 8), "ln_final.weight": (8,)}
    tensors |= {"token_embedding.weight": (9, 8), "positional_embedding": (7, 8)}
    path = file({f"cond_stage_model.model.{key}": np.zeros(shape, np.float32) for key, shape in tensors.items()})
    with pytest.raises(UserError, match="SD2.x CLIP text_encoder; this library has no such network"):
        find(path)


# Wrappers.


WRAPPED = {
    "DataParallel": lambda key: f"module.{key}",
    "twice": lambda key: f"module.module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled within": lambda key: key.replace("diffusion_model.", "diffusion_model._orig_mod."),
    "compiled and parallel": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}".replace("_model.", "_model._fsdp_wrapped_module."),
    "activation checkpoints": lambda key: key.replace("input_blocks.0.", "input_blocks.0._checkpoint_wrapped_module."),
    "DeepSpeed": lambda key: f"_forward_module.{key}",
    "Lightning": lambda key: f"model.{key}",
    "Lightning and parallel": lambda key: f"module.model.{key}",
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.filterwarnings("error")
def test_wrapped_whole_models(wrap, trees, file, tmp_path):
    tensors = {WRAPPED[wrap](key): array for key, array in ldm(trees).items()}
    assert tensors.keys() != ldm(trees).keys()
    path = file(tensors | {"n_averaged": np.int64(7)})
    for name, part in find_system(path).networks.items():
        same_tree(part, trees[name])
    assert main(["inspect", str(path)]) == 0
    assert main(["to-jax", str(path), str(tmp_path / "jax.safetensors")]) == 0  # and back, under the names it had
    assert main(["to-torch", str(tmp_path / "jax.safetensors"), str(tmp_path / "back.safetensors")]) == 0
    assert read_safetensors(tmp_path / "back.safetensors").keys() == read_safetensors(path).keys()


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "model.model.", "unet.", "model."])
@pytest.mark.filterwarnings("error")
def test_prefixes_of_a_bare_unet(prefix, trees, file):
    tensors = {prefix + key: array for key, array in tree_to_torch(trees["unet"], TABLES["unet"]).items()}
    path = file(tensors)
    same_tree(find(path)["unet"], trees["unet"])
    key = next(iter(tensors))
    path = file({k: a for k, a in tensors.items() if k != key} | {f"{prefix}out.2.extra": np.zeros(2)})
    part = find(path)["unet"]
    with pytest.raises(FileError, match=rf"1 unknown \({prefix}out.2.extra\)"):
        same_tree(part, trees["unet"])


def test_names_that_would_become_the_same_are_left_alone():
    assert unwrapped(["a._orig_mod.b", "a.b"]) == {"a._orig_mod.b": "a._orig_mod.b", "a.b": "a.b"}
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert unwrapped(["module.a", "n_averaged", "module.n_averaged"])["module.a"] == "module.a"
    assert unwrapped(["module."]) == {"module.": "module."}
    assert len(next(iter(unwrapped(["module." * 100_000 + "a"])))) > 600_000  # taken off ten deep at most


def test_average_of_a_wrapped_checkpoint(trees, file):
    dotless = {k.removeprefix("model.").replace(".", ""): a for k, a in ldm({"unet": trees["unet"]}).items()}
    tensors = {f"module.model_ema.{key}": array for key, array in dotless.items()}
    path = file(tensors | {"module.model_ema.decay": np.ones(1, np.float32)})
    same_tree(find(path)["unet"], trees["unet"])


def test_errors_name_keys_as_they_stand_in_the_file(trees, file):
    wrapped = {f"module.{key}": array for key, array in ldm(trees).items()}
    key = "module.first_stage_model.decoder.mid.attn_1.q.weight"
    missing = "module.cond_stage_model.transformer.text_model.final_layer_norm.weight"
    tensors = {k: a for k, a in wrapped.items() if k != missing} | {key: np.zeros((3, 8, 1, 1), np.float32)}
    found = find(file(tensors))
    with pytest.raises(FileError, match=rf"1 of another shape \({key} \(3, 8, 1, 1\) instead of \(8, 8, 1, 1\)\)"):
        same_tree(found["vae"], trees["vae"])
    with pytest.raises(FileError, match=rf"1 missing \({missing}\)"):
        same_tree(found["text_encoder"], trees["text_encoder"])
