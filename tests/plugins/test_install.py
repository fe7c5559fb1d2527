"""Plug-ins on a whole system: what they change, what they leave, and that nothing is lost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bdm_jax.app.drawing import draw
from bdm_jax.app.spec import parse_embedding, parse_spec
from bdm_jax.errors import UserError
from bdm_jax.plugins.install import with_blend, with_embeddings, with_loras
from bdm_jax.plugins.inversion import Embedding, load_embeddings
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.text.tokenizer import PromptWarning

REQUEST = Request("红灯笼", english="a cat", english_negative="blurry", seed=3)


def picture(pipeline, request=REQUEST):
    return next(generate(pipeline, [request], Sampling(2, guidance=3.0)))


@pytest.fixture
def lora(tmp_path, rng, tiny):
    """A function that writes a kohya file for one attention of the UNet and one layer of the text tower."""

    def write(name):
        width, text = tiny.unet.config.block_out_channels[0], tiny.text_encoder.config.hidden_size
        modules = {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": width,
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj": text,
        }
        tensors = {}
        for module, size in modules.items():
            tensors[f"{module}.lora_down.weight"] = rng.standard_normal((2, size), np.float32)
            tensors[f"{module}.lora_up.weight"] = rng.standard_normal((size, 2), np.float32)
            tensors[f"{module}.alpha"] = np.float32(2)[None].reshape(())
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / f"{name}.safetensors"
        )
        return tmp_path / f"{name}.safetensors"

    return write


def test_loras_change_the_picture_and_leave_the_system(tiny, lora):
    one, other = lora("one"), lora("other")
    before = {name: dict(getattr(tiny, name).params) for name in ("unet", "text_encoder", "branch")}
    plain = picture(tiny)
    specs = [parse_spec(f"{one}:0.7"), parse_spec(f"{other}:0.5:0.2")]
    both = with_loras(tiny, specs)
    assert not np.array_equal(picture(both), plain)
    np.testing.assert_array_equal(picture(with_loras(tiny, specs[::-1])), picture(both))
    for name, tree in before.items():
        assert all(getattr(tiny, name).params[path] is value for path, value in tree.items())
    assert both.branch is tiny.branch or both.branch.params.keys() == tiny.branch.params.keys()


def test_a_prompt_names_its_lora(tiny, lora, tmp_path):
    merged = picture(with_loras(tiny, [parse_spec(f"{lora('one')}:0.7:0.2")]))
    how = {"english": "a cat <lora:one:0.2:0.7>", "english_negative": "blurry", "seed": 3, "steps": 2, "guidance": 3.0}
    output = draw(tiny, "红灯笼", lora_dir=tmp_path, **how)
    np.testing.assert_array_equal(np.asarray(output.images[0]), merged)
    assert output.settings[0]["english"] == how["english"]
    assert output.settings[0]["lora"] == "one.safetensors:0.7:0.2"
    with pytest.raises(UserError, match="the prompt names the LoRA 'one'"):
        draw(tiny, "红灯笼", **how)


def test_strength_0_is_without_bit_for_bit(tiny, lora):
    silent = with_loras(tiny, [parse_spec(f"{lora('one')}:0")])
    np.testing.assert_array_equal(picture(silent), picture(tiny))


def test_a_lora_for_the_branch(tiny, lora):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.kernel"
    with pytest.warns(UserWarning, match="left out"):
        turned = with_loras(tiny, [parse_spec(str(lora("one")))], target="branch")
    assert (turned.branch.params[path] != tiny.branch.params[path]).any()
    assert turned.unet.params[path] is tiny.unet.params[path]


def test_words_of_either_language(tiny, rng):
    vectors = rng.standard_normal((3, tiny.text_encoder.config.hidden_size), np.float32)
    taught = with_embeddings(tiny, [Embedding("<lamp>", vectors)])
    np.testing.assert_array_equal(picture(taught), picture(tiny))
    named = replace(REQUEST, english="a <lamp>")
    assert not np.array_equal(picture(taught, named), picture(tiny, named))
    vectors = rng.standard_normal((2, tiny.branch_text_encoder.config.hidden_size), np.float32)
    taught = with_embeddings(tiny, [Embedding("某物", vectors)], "branch")
    named = replace(REQUEST, prompt="红色的某物")
    assert not np.array_equal(picture(taught, named), picture(tiny, named))


def test_the_files_name_in_a_prompt(tiny, rng, tmp_path):
    """Equal pixels by whatever name: the file's, that inside it, ComfyUI's spelling, one of the user's own."""
    path = tmp_path / "InkStyle.pt"
    vectors = torch.from_numpy(rng.standard_normal((2, tiny.text_encoder.config.hidden_size), np.float32))
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "21ink"}, path)
    taught = with_embeddings(tiny, load_embeddings(*parse_embedding(str(path))))
    own = with_embeddings(tiny, load_embeddings(*parse_embedding(f"{path}=<mine>")))
    expected = picture(own, replace(REQUEST, english="a <mine> cat"))
    for word in ("inkstyle", "21ink", "embedding:InkStyle"):
        np.testing.assert_array_equal(picture(taught, replace(REQUEST, english=f"a {word} cat")), expected)
    unread = replace(REQUEST, english="a inkstyle cat")
    with pytest.warns(PromptWarning, match="no English prompt has the added word '<mine>'"):
        np.testing.assert_array_equal(picture(own, unread), picture(tiny, unread))


def test_added_words_cannot_be_saved_and_nothing_is_written(tiny, rng, tmp_path):
    taught = with_embeddings(tiny, [Embedding("<lamp>", np.ones((1, 16), np.float32))])
    with pytest.raises(UserError, match="added tokens <lamp> cannot be saved"):
        taught.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_blends(tiny, tiny_folder, tmp_path):
    """Of the tiny backbone and one that is twice as large in every number."""
    doubled = tiny.replace(unet=tiny.unet._replace(params={k: 2 * v for k, v in tiny.unet.params.items()}))
    doubled.save_pretrained(tmp_path, "float32")
    path = "conv_in.kernel"
    own = np.asarray(tiny.unet.params[path])
    np.testing.assert_allclose(with_blend(tiny, tmp_path, 0.25).unet.params[path], 1.25 * own, rtol=1e-6)
    added = with_blend(tiny, tmp_path, 0.5, base=tiny_folder)
    np.testing.assert_allclose(added.unet.params[path], 1.5 * own, rtol=1e-6)
    np.testing.assert_allclose(
        added.text_encoder.params["text_model.final_layer_norm.scale"],
        tiny.text_encoder.params["text_model.final_layer_norm.scale"],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(picture(with_blend(tiny, tmp_path, 0.0)), picture(tiny))


def test_blend_with_what_does_not_fit(tiny, tiny_folder):
    path = "text_model.final_layer_norm.scale"
    rest = {key: value for key, value in tiny.text_encoder.params.items() if key != path}
    width = tiny.text_encoder.config.hidden_size
    for message, params in {
        rf"{path} is in one of them only": rest,
        rf"{path} is \(3,\) in one, \({width},\) in the other": {**rest, path: np.zeros(3, np.float32)},
    }.items():
        narrow = tiny.replace(text_encoder=tiny.text_encoder._replace(params=params))
        with pytest.raises(UserError, match=rf"networks of other sizes cannot be blended \({message}") as error:
            with_blend(narrow, tiny_folder, 0.5)
        assert len(str(error.value)) < 300 + len(str(tiny_folder))
