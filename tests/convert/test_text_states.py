"""Prompts read beforehand draw the same pictures, and stand in a text encoder's place in every system."""

import jax
import kolors
import numpy as np
import pytest
from bdm_jax.convert.__main__ import main

from bdm_jax.errors import UserError
from bdm_jax.models.config import TextStatesConfig
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline

SETTINGS = Sampling(steps=2, size=(32, 32))


def picture(pipeline, *request, **fields):
    (image,) = generate(pipeline, [Request(*request, seed=3, **fields)], SETTINGS)
    return image


def same(found, expected):
    """Up to rounding, one level of 255: texts were read in a batch of another size, with sums in another order."""
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.fixture(scope="module")
def kolors_folder(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("kolors")
    kolors.tiny(tmp_path_factory.mktemp("tokenizer"), request.config.option.seed).save_pretrained(folder)
    return folder


def test_the_same_pictures_without_the_text_encoder(kolors_folder, tmp_path, capsys):
    """Weighted too: weights are put on the states that are kept. Other prompts are refused by name."""
    command = ["text-states", str(kolors_folder), str(tmp_path / "kept"), "红灯笼", "(水墨:1.2) 山水"]
    assert main([*command, "--negative", "a photo"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "kept")]
    whole = BridgePipeline.from_pretrained(kolors_folder)
    kept = BridgePipeline.from_pretrained(kolors_folder, text_encoder=tmp_path / "kept/text_encoder")
    assert isinstance(kept.text_encoder.config, TextStatesConfig) and kept.family is whole.family
    for prompts in (("红灯笼", "a photo"), ("(水墨:1.2) 山水", ""), ("红灯笼", "")):
        same(picture(kept, *prompts), picture(whole, *prompts))
    with pytest.raises(UserError, match="text_encoder: '一只猫' is not among its 4 texts"):
        picture(kept, "一只猫", "a photo")
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "kept/text_encoder")]) == 0
    assert "any system's text_states (bdm_jax)" in " ".join(capsys.readouterr().out.split())


def test_both_languages_of_a_bridge(tiny, tiny_folder, tmp_path):
    """Each source has its own texts, long ones in several windows."""
    long = "红灯笼 " * 12
    for source, texts in (("backbone", ["film grain"]), ("branch", [long, "熊猫"])):
        name = str(tmp_path / source)
        assert main(["text-states", str(tiny_folder), name, *texts, "--negative", "", "--source", source]) == 0
    kept = BridgePipeline.from_pretrained(
        tiny_folder,
        text_encoder=tmp_path / "backbone/text_encoder",
        branch_text_encoder=tmp_path / "branch/branch_text_encoder",
    )
    for prompt in (long, "熊猫"):
        same(picture(kept, prompt, english="film grain"), picture(tiny, prompt, english="film grain"))


def test_what_cannot_be_read_beforehand(kolors_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = {
        "no prompts": [],
        "changes from step to step": ["[红:蓝:0.5]灯笼"],
        "--source branch: a Kolors system reads no such prompts": ["红灯笼", "--source", "branch"],
    }
    for message, more in cases.items():
        assert main(["text-states", str(kolors_folder), str(tmp_path / "kept"), *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "kept").exists()


def test_unknown_ids_are_not_silent(kolors_folder, tmp_path):
    """Where nobody checks them, as in a training step, they are NaN."""
    from bdm_jax.models.functional import bind

    assert main(["text-states", str(kolors_folder), str(tmp_path / "kept"), "红灯笼"]) == 0
    config, params = BridgePipeline.from_pretrained(
        kolors_folder, text_encoder=tmp_path / "kept/text_encoder"
    ).text_encoder
    ids = np.stack([params["texts"][0], params["texts"][1] + 1])
    states, pooled = jax.jit(lambda params: bind(config, params).outputs(ids))(params)
    assert np.isfinite(states[0]).all() and np.isnan(states[1]).all()
    assert np.isfinite(pooled[0]).all() and np.isnan(pooled[1]).all()
