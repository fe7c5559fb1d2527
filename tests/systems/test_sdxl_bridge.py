"""BDM-SDXL: a Chinese branch on SDXL, against diffusers and 360's network; its folder, files and settings."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from bdm_jax.convert.conversion import to_jax, to_torch
from bdm_jax.convert.inspection import describe
from safetensors.torch import load_file
from sdxl import CHINESE, JOINT, ChineseTexts, ControlNetBDM

from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.models.functional import bind, init
from bdm_jax.models.unet.branch import REINITIALISED, init_branch_from_unet
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers
from bdm_jax.text.encode import tokenize
from bdm_jax.text.towers import Tower

SIZE = (32, 48)
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)


@pytest.fixture(scope="module")
def chinese(sdxl_bridge, sdxl_bridge_folder, load_chinese_tower):
    """Texts -> states and pooled text as transformers' towers make them."""
    towers = ChineseTexts(sdxl_bridge_folder, load_chinese_tower)
    return lambda texts: towers(torch.from_numpy(tokenize(sdxl_bridge.branch_tokenizer, texts)[:, 0].astype(np.int64)))


def read(pipeline, texts):
    reader = pipeline.readers["branch"]
    return readers.encode(reader, pipeline.parts, readers.read(reader, pipeline.parts, texts))


def test_its_text_is_both_towers_of_transformers(sdxl_bridge, chinese, assert_parity):
    cond = read(sdxl_bridge, ["红灯笼", ""])
    states, pooled = chinese(["红灯笼", ""])
    assert cond.tokens.shape == (2, 16, sum(CHINESE)) and cond.pooled.shape == (2, JOINT)
    assert_parity(cond.tokens, states.numpy())
    assert_parity(cond.pooled, pooled.numpy())


def test_draws_as_diffusers_with_360_s_branch(sdxl_bridge, sdxl_bridge_folder, sdxl, chinese, monkeypatch):
    """Four steps, each text guided in both languages. 1e-3: four steps of two networks, each with its own rounding."""
    seen, decode = [], module.decode
    monkeypatch.setattr(module, "decode", lambda vae, x, tile: seen.append(np.asarray(x)) or decode(vae, x, tile))
    list(generate(sdxl_bridge, [REQUEST], Sampling(steps=4, size=SIZE)))
    branch = ControlNetBDM.in_folder(sdxl_bridge_folder / "branch", sdxl_bridge.branch.config)
    states, pooled = chinese([REQUEST.negative, REQUEST.prompt])
    english, negative, english_pooled, negative_pooled = sdxl.encode_prompt(
        REQUEST.english, negative_prompt=REQUEST.english_negative, device="cpu"
    )
    english, english_pooled = torch.cat([negative, english]), torch.cat([negative_pooled, english_pooled])
    sizes = torch.tensor([[*SIZE, 0, 0, *SIZE]] * 2, dtype=torch.float32)
    scheduler = sdxl.scheduler.from_config(sdxl.scheduler.config)
    scheduler.set_timesteps(4)
    noise = np.asarray(jax.random.normal(jax.random.key(REQUEST.seed), (SIZE[0] // 8, SIZE[1] // 8, 4)))
    x = torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        added = {"text_embeds": english_pooled, "time_ids": sizes}
        residuals = branch(both, t, states, pooled, sizes)
        before, after = sdxl.unet(both, t, english, added_cond_kwargs=added, **residuals).sample.chunk(2)
        x = scheduler.step(before + 3.0 * (after - before), t, x).prev_sample
    found, reference = np.moveaxis(seen[0], -1, 1), x.numpy()
    difference = np.abs(found - reference).max() / np.abs(reference).max()
    print(f"relative difference {difference:.2e}")
    assert difference <= 1e-3


def test_residuals_are_360_s(sdxl_bridge, sdxl_bridge_folder, rng, nhwc, nchw, assert_parity):
    config, params = sdxl_bridge.branch
    x = rng.standard_normal((2, 4, 6, 4), dtype=np.float32)
    t, sizes = np.array([7, 901]), rng.integers(0, 64, (2, 6)).astype(np.float32)
    cond = replace(read(sdxl_bridge, ["红灯笼", "熊猫"]), time_ids=sizes)
    theirs = ControlNetBDM.in_folder(sdxl_bridge_folder / "branch", config)
    text = (torch.from_numpy(np.array(part)) for part in (cond.tokens, cond.pooled, sizes))
    expected = theirs(nchw(x), torch.from_numpy(t), *text)
    ours = jax.jit(lambda params: bind(config, params)(x, t, cond))(params)
    down, mid = expected["down_block_additional_residuals"], expected["mid_block_additional_residual"]
    for mine, other in zip((*ours.skips, ours.mid), (*down, mid), strict=True):
        assert_parity(mine, nhwc(other))


def test_a_branch_begins_as_the_encoder_of_sdxl(sdxl_bridge):
    """All of the same name is copied, also what reads sizes and pooled text; what reads the new texts is fresh."""
    config = sdxl_bridge.branch.config
    fresh, unet = init(config, 3), sdxl_bridge.unet.params
    begun = init_branch_from_unet(fresh, unet)
    copied = {path for path, value in begun.items() if value is unet.get(path)}
    assert begun.keys() == fresh.keys() and begun.keys() - copied == {*filter(REINITIALISED.search, begun)}
    assert {"add_embedding.linear_1.kernel", "conv_in.kernel"} <= copied
    assert {"prompt_embeds_projection.kernel", "pooled_prompt_embeds_projection.kernel"} <= fresh.keys() - copied


def test_saved_and_read_again(sdxl_bridge, sdxl_bridge_folder, sdxl_folder, tmp_path):
    again = BridgePipeline.from_pretrained(sdxl_bridge_folder)
    assert again.family.name == "sdxl" and list(again.parts) == list(sdxl_bridge.parts) and again.guidance == 3.0
    same(sdxl_bridge, again)
    bare = again.without_bridge()
    assert bare.branch is None and bare.branch_text_encoder_2 is None and "branch" not in bare.readers
    bare.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "branch_text_encoder_2").exists()
    # part by part onto a backbone of its own, in this library's layout and back
    to_jax(sdxl_bridge_folder, tmp_path / "jax")
    to_torch(tmp_path / "jax", tmp_path / "torch")
    parts = ("branch", "branch_text_encoder", "branch_text_encoder_2")
    for part in parts:
        names = {"branch": "diffusion_pytorch_model.safetensors"}
        before, after = (
            load_file(folder / part / names.get(part, "model.safetensors"))
            for folder in (sdxl_bridge_folder, tmp_path / "torch")
        )
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    given = {part: tmp_path / "jax" / part for part in parts}
    same(sdxl_bridge, BridgePipeline.from_pretrained(sdxl_folder, **given))


def same(one, other):
    for name, component in one.networks.items():
        assert component.config == other.networks[name].config
        for key, value in component.params.items():
            np.testing.assert_array_equal(value, other.networks[name].params[key], err_msg=f"{name} {key}")


def test_the_second_tower_of_a_whole_chinese_clip(
    sdxl_bridge, sdxl_folder, sdxl_bridge_folder, tmp_path, assert_parity
):
    """As published: both halves in one folder, whose projection is read in the second tower's place and in no other."""
    text = dict(vocab_size=sdxl_bridge.branch_tokenizer.vocab_size, intermediate_size=24, num_attention_heads=2)
    text |= dict(hidden_size=CHINESE[1], num_hidden_layers=1, max_position_embeddings=16)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=16)
    config = transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT)
    whole = transformers.ChineseCLIPModel(config).eval()
    whole.save_pretrained(tmp_path / "clip")
    sdxl_bridge.branch_tokenizer.save_pretrained(tmp_path / "clip")
    towers = {name: sdxl_bridge_folder / name for name in ("branch", "branch_text_encoder")}
    found = BridgePipeline.from_pretrained(sdxl_folder, **towers, branch_text_encoder_2=tmp_path / "clip")
    ids = torch.from_numpy(tokenize(found.branch_tokenizer, ["红灯笼"])[:, 0].astype(np.int64))
    whole.load_state_dict(load_file(tmp_path / "clip" / "model.safetensors"), strict=False)
    expected = whole.get_text_features(ids, attention_mask=torch.ones_like(ids))
    assert_parity(read(found, ["红灯笼"]).pooled, expected.pooler_output.numpy())
    towers["branch_text_encoder"] = tmp_path / "clip"
    with pytest.raises(UserError, match="text width 32 and 40"):  # without its projection
        BridgePipeline.from_pretrained(sdxl_folder, **towers, branch_text_encoder_2=tmp_path / "clip")


def test_inspected(sdxl_bridge_folder):
    report = describe(sdxl_bridge_folder)
    parts = {part["kind"]: part for part in report["parts"]}
    assert {"branch", "branch_text_encoder", "branch_text_encoder_2"} <= parts.keys()
    assert report["contents"].startswith("SDXL pipeline") and not report["rest"]
    assert not any(part[name] for part in parts.values() for name in ("missing", "unknown", "misshaped", "ignored"))


def test_the_towers_are_a_setting(sdxl_bridge, sdxl_bridge_folder, tmp_path):
    """Another order, layer and pooled text: by what the towers themselves give; kept in model_index.json."""
    first, second = (sdxl_bridge.parts[name] for name in ("branch_text_encoder", "branch_text_encoder_2"))
    ids = tokenize(sdxl_bridge.branch_tokenizer, ["红灯笼"])[:, 0]
    raw = replace(second.config, projection_dim=None)
    zeros = np.zeros((CHINESE[1], 24), np.float32)
    width = {**sdxl_bridge.branch.params, "pooled_prompt_embeds_projection.kernel": zeros}
    branch = Component(replace(sdxl_bridge.branch.config, pooled_prompt_embeds_dim=CHINESE[1]), width)
    towers = (
        Tower("branch_text_encoder_2", "branch_tokenizer", layer=2, pooled="raw"),
        Tower("branch_text_encoder", "branch_tokenizer", layer=4),
    )
    other = sdxl_bridge.replace(branch=branch, branch_towers=towers)
    other.save_pretrained(tmp_path, "float32")
    other = BridgePipeline.from_pretrained(tmp_path)
    assert other.branch_towers == towers
    cond = read(other, ["红灯笼"])

    @jax.jit
    def towers_alone(first_params, second_params):
        tower = bind(raw, second_params)
        embedded = bind(first.config, first_params)(ids, layer=4)  # three layers: the embeddings before them
        return jnp.concatenate([tower(ids, layer=2), embedded], axis=-1), tower(ids)[:, 0]

    states, pooled = towers_alone(first.params, second.params)
    np.testing.assert_allclose(cond.tokens, states, atol=1e-5)
    np.testing.assert_allclose(cond.pooled, pooled, atol=1e-5)
    kept = BridgePipeline.from_pretrained(tmp_path, backbone=sdxl_bridge_folder)
    assert kept.branch_towers == towers and kept.without_bridge().branch_towers is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"encoder": "branch_text_encoder"}, "expected a list"),
        ([], "expected a list"),
        ([{"encoder": "branch_text_encoder", "layers": 2}], "unknown .*field 'layers': did you mean 'layer'"),
        ([{"encoder": "text_encoder"}], "unknown .*text encoder of a branch 'text_encoder'"),
        ([{"encoder": "branch_text_encoder", "layer": 0}], "layer=0 of branch_text_encoder: a number from 1"),
        ([{"encoder": "branch_text_encoder", "pooled": "mean"}], "pooled='mean' of branch_text_encoder: true, false"),
        ([{"encoder": "branch_text_encoder"}] * 2, "branch_text_encoder is there twice"),
        ([{"encoder": "branch_text_encoder", "pooled": "projected"}], "branch_text_encoder has no projection"),
        ([{"encoder": "branch_text_encoder", "layer": 5}], "branch_text_encoder has 3 layers: there is no layer 5"),
        ([{"encoder": "branch_text_encoder"}], "text width 32 and 12"),
    ],
)
def test_towers_that_cannot_be_are_one_line(value, message, sdxl_bridge_folder, tmp_path):
    (folder := tmp_path / "model").mkdir()
    for part in sdxl_bridge_folder.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    write_json(
        folder / "model_index.json", {**read_json(sdxl_bridge_folder / "model_index.json"), "_bdm_branch_towers": value}
    )
    with pytest.raises(UserError, match=message) as error:
        BridgePipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_branch_of_another_family_is_one_line_that_says_what_to_do(tiny_folder, sdxl_folder, sdxl_bridge_folder):
    branch = {name: tiny_folder / name for name in ("branch", "branch_text_encoder")}
    told = "branch.*: a branch for SD1.x, but .*unet.* is SDXL: give a branch that was trained on SDXL .*--backbone"
    with pytest.raises(UserError, match=told):
        BridgePipeline.from_pretrained(sdxl_folder, **branch)
    with pytest.raises(UserError, match=told):
        BridgePipeline.from_pretrained(tiny_folder, backbone=sdxl_folder)
    names = ("branch", "branch_text_encoder", "branch_text_encoder_2")
    branch = {name: sdxl_bridge_folder / name for name in names}
    with pytest.raises(UserError, match="a branch for SDXL, but .* is SD1.x: give a branch that was trained on SD1.x"):
        BridgePipeline.from_pretrained(tiny_folder, **branch)
    with pytest.raises(UserError, match="missing: branch_text_encoder_2"):
        del branch["branch_text_encoder_2"]
        BridgePipeline.from_pretrained(sdxl_folder, **branch)


def test_index_of_another_folder_is_unchanged(tiny_folder):
    """What SD1.5's BDM writes has none of this."""
    assert "_bdm_branch_towers" not in json.loads((tiny_folder / "model_index.json").read_text())
    assert "projection_dim" not in json.loads((tiny_folder / "branch_text_encoder" / "config.json").read_text())
