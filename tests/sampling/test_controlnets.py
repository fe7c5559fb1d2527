"""Stock ControlNets beside the branch, against diffusers' own, which reads the English text as ours does."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from bdm_jax.app.parts import load_control
from bdm_jax.app.spec import parse_control
from bdm_jax.errors import UserError
from bdm_jax.plugins.controls import Control
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import load_component

TOLERANCE = 1e-4  # fp32 on both sides, of the largest latent
SIZE = (32, 48)
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)


@pytest.fixture(scope="module")
def networks(tmp_path_factory, request):
    """Two stock ControlNets of the tiny bridge's sizes, random also where they start at zero: (folder, module)."""
    made = []
    for number in range(2):
        torch.manual_seed(request.config.option.seed + number)
        network = diffusers.ControlNetModel(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
            conditioning_embedding_out_channels=(4, 8, 8, 16),
        ).eval()
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        folder = tmp_path_factory.mktemp("controlnet")
        network.save_pretrained(folder)
        made.append((folder, network))
    return made


@pytest.fixture
def hints(rng):
    return [rng.integers(0, 256, (*SIZE, 3), np.uint8) for _ in range(2)]


def as_torch(hint):
    return torch.from_numpy(np.moveaxis(hint, -1, 0).astype(np.float32) / 255)[None]


@pytest.mark.parametrize("branch_strength", [1.0, 0.0])
@pytest.mark.parametrize("english_negative", ["blurry", "film grain"])  # another, and the same for both halves
def test_two_controlnets_and_the_branch(
    latents, plain, assert_parity, networks, hints, branch_strength, english_negative
):
    request = replace(REQUEST, english_negative=english_negative)
    (one, other), (first, second) = (load_component(folder) for folder, _ in networks), hints
    ours = latents(
        [request],
        branch_strength=branch_strength,
        controls=[Control(one, first, 0.7), Control(other, second, 1.3, start=0.3, end=0.9)],
    )

    def later(i):
        return 1.3 if i / 6 >= 0.3 and (i + 1) / 6 <= 0.9 else 0.0

    theirs = [(networks[0][1], as_torch(first), lambda i: 0.7), (networks[1][1], as_torch(second), later)]
    assert_parity(ours, plain(request, scale=lambda i: branch_strength, controls=theirs), TOLERANCE)


def test_controlnets_are_cached_too(latents, plain, assert_parity, networks, hints, deep_cached):
    """What they add to the first skips stays until the next key row, as what they add below is in the deep features."""

    def key(row):
        return row % 3 == 0

    ours = latents([REQUEST], cache_every=3, controls=[Control(load_component(networks[0][0]), hints[0], 0.7)])
    theirs = [(plain.remembering(networks[0][1], key), as_torch(hints[0]), lambda i: 0.7)]
    assert_parity(ours, plain(unet=deep_cached(key), controls=theirs), TOLERANCE)


def test_on_the_bare_backbone(latents, plain, assert_parity, networks, hints):
    ours = latents([REQUEST], bare=True, controls=[Control(load_component(networks[0][0]), hints[0])])
    theirs = [(networks[0][1], as_torch(hints[0]), lambda i: 1.0)]
    assert_parity(ours, plain(scale=lambda i: 0.0, controls=theirs), TOLERANCE)


def test_strength_0_is_without_and_the_order_does_not_matter(latents, networks, hints):
    one, other = (Control(load_component(folder), hint) for (folder, _), hint in zip(networks, hints, strict=True))
    without = latents([REQUEST])
    np.testing.assert_array_equal(latents([REQUEST], controls=[replace(one, strength=0.0)]), without)
    both = latents([REQUEST], controls=[one, other])
    np.testing.assert_allclose(latents([REQUEST], controls=[other, one]), both, atol=1e-5 * np.abs(both).max())
    assert np.abs(both - without).max() > 1e-2


def test_pictures_take_the_size_of_the_map(tiny, networks, hints):
    control = Control(load_component(networks[0][0]), hints[0])
    (picture,) = generate(tiny, [REQUEST], Sampling(2), controls=[control])
    assert picture.shape == (*SIZE, 3)
    (large,) = generate(tiny, [REQUEST], Sampling(2, hires=2.0), controls=[control])
    assert large.shape == (64, 96, 3)


def test_as_on_the_command_line(networks, hints, tmp_path):
    path = tmp_path / "map.png"
    Image.fromarray(hints[0]).save(path)
    control = load_control(f"{networks[0][0]},{path},strength=0.5,end=0.6")
    assert (control.strength, control.start, control.end, control.name) == (0.5, 0.0, 0.6, networks[0][0].name)
    np.testing.assert_array_equal(control.hint, hints[0])
    edges = load_control(f"{networks[0][0]},{path},from=canny").hint
    assert edges.shape == hints[0].shape and set(np.unique(edges)) <= {0, 255}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network", "write it as NETWORK,MAP"),
        ("network,map.png,other.png", "write it as NETWORK,MAP"),
        ("network,map.png,strenght=1", "unknown setting of a control 'strenght': did you mean 'strength'"),
        ("network,map.png,end=soon", "end=soon is not a number"),
    ],
)
def test_what_cannot_be_parsed(text, message):
    with pytest.raises(UserError, match=message):
        parse_control(text)


def test_controls_that_cannot_be(tiny, networks, hints, tmp_path):
    good = load_component(networks[0][0])
    wide = type(good)(replace(good.config, cross_attention_dim=32), good.params)
    cases = {
        "made for another base model \\(text width 32, the backbone's 16\\)": Control(wide, hints[0]),
        "a UNetConfig in place of a ControlNet": Control(tiny.unet, hints[0]),
        "its map has 48x24 pixels, the image 32x32": Control(good, hints[0][:24]),
        "strength nan": Control(good, hints[0], float("nan")),
        "start 0.5 and end 0.5": Control(good, hints[0], start=0.5, end=0.5),
    }
    for message, control in cases.items():
        with pytest.raises(UserError, match=message):
            generate(tiny, [REQUEST], Sampling(2, size=(32, 32)), controls=[control])
    Image.fromarray(hints[0]).save(tmp_path / "map.png")
    with pytest.raises(UserError, match="unknown map 'cany': did you mean 'canny'"):
        load_control(f"{networks[0][0]},{tmp_path / 'map.png'},from=cany")
