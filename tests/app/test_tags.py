"""LoRAs that prompts name: found in a folder by name, one set for a run, taken out of the text, drawn again."""

import numpy as np
import pytest

from bdm_jax.app.arguments import parse
from bdm_jax.app.metadata import describe, text_chunks
from bdm_jax.app.tags import find_loras, shared_tags, without_tags
from bdm_jax.errors import UserError
from bdm_jax.images.pictures import write_png
from bdm_jax.plugins.spec import Spec
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.text.tags import LoraTag


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of LoRAs; commands run beside them."""
    monkeypatch.chdir(tmp_path)
    for name in ("loras/ink.safetensors", "loras/styles/My Style v1.0.pt", "loras/two.safetensors", "loras/a/two.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loras/notes.txt").touch()
    return tmp_path / "loras"


def test_files_are_found_by_name(folder):
    tags = [LoraTag("ink", 0.8, 0.5), LoraTag("My Style v1.0")]
    assert find_loras(folder, tags) == [
        Spec(folder / "ink.safetensors", 0.8, 0.5),
        Spec(folder / "styles/My Style v1.0.pt", 1.0, 1.0),
    ]
    assert find_loras(None, []) == []


@pytest.mark.parametrize(
    ("where", "name", "message"),
    [
        (None, "ink", "the prompt names the LoRA 'ink': give its folder, with --lora-dir"),
        ("nowhere", "ink", "nowhere: no such folder of LoRAs"),
        ("loras", "inc", "unknown LoRA in loras 'inc': did you mean 'ink'?"),
        ("loras", "two", "the LoRA 'two' is there twice: loras/two.safetensors and loras/a/two.ckpt; rename one"),
        ("loras/a/b", "ink", "no such folder"),
    ],
)
def test_files_that_are_not_found(folder, where, name, message):
    with pytest.raises(UserError, match=message) as error:
        find_loras(where, [LoraTag(name)])
    assert "\n" not in str(error.value)


def test_one_set_for_a_run():
    same = [Request("<lora:ink:0.8>猫", english="a<lora:ink:0.8>"), Request("狗 <lora:ink:0.8>", seed=3)]
    assert shared_tags(same, Sampling()) == (LoraTag("ink", 0.8, 0.8),)
    assert [without_tags(request, Sampling()) for request in same] == [
        Request("猫", english="a"),
        Request("狗 ", seed=3),
    ]
    reference = Sampling(reference=True)
    assert shared_tags(same, reference) == () and without_tags(same[0], reference) == same[0]
    with pytest.raises(UserError, match="the prompts of one run name different LoRAs: <lora:ink:0.8:0.8> and none"):
        shared_tags([*same, Request("鸟")], Sampling())
    with pytest.raises(UserError, match="a LoRA has two strengths"):
        shared_tags([Request("<lora:ink:0.8>猫", english="<lora:ink:0.5>")], Sampling())


def test_command_line(folder):
    arguments, requests, _ = parse(["<lora:ink:0.8>猫", "--lora-dir", "loras", "--lora", "loras/two.safetensors:0.3"])
    assert requests == [Request("<lora:ink:0.8>猫")]
    assert arguments.parts.lora == ("loras/two.safetensors:0.3", "loras/ink.safetensors:0.8:0.8")
    with pytest.raises(UserError, match="with --lora-dir"):
        parse(["<lora:ink:0.8>猫"])
    with pytest.raises(UserError, match=r"'\[a\|b:0.5\]' is not understood"):  # before any model is read
        parse(["猫", "--english", "[a|b:0.5]"])
    with pytest.warns(UserWarning, match="--lora-dir has no effect: no prompt names a LoRA"):
        parse(["猫", "--lora-dir", "loras"])


def test_an_image_draws_itself_again(folder, recwarn):
    asked = ["<lora:ink:0.8:1>猫", "--lora-dir", "loras", "--steps", "9"]
    arguments, (request,), _ = parse(asked)
    values = describe(request, arguments.settings, arguments.parts.names())
    assert values["prompt"] == "<lora:ink:0.8:1>猫" and values["lora"] == "ink.safetensors:1:0.8"
    write_png(folder / "ours.png", np.zeros((8, 8, 3), np.uint8), text_chunks(values))
    again, requests, _ = parse(["--from", "loras/ours.png", "--lora-dir", "loras"])
    assert requests == [request] and again.settings == arguments.settings and again.parts == arguments.parts
    assert not [warning for warning in recwarn if "was drawn with" in str(warning.message)]
    with pytest.raises(UserError, match="the prompt names the LoRA 'ink': give its folder, with --lora-dir"):
        parse(["--from", "loras/ours.png"])
