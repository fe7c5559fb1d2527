"""T2I-Adapters and IP-Adapters beside the branch, against diffusers' own networks in the plain loop."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from bdm_jax.convert.__main__ import main
from ip_adapters import published
from PIL import Image
from safetensors.torch import save_file

from bdm_jax.app.arguments import Parts
from bdm_jax.app.parts import load_control, load_image_prompt
from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.layouts import tree_to_torch
from bdm_jax.formats.networks.t2i_adapter import original_t2i_adapter
from bdm_jax.formats.open import find
from bdm_jax.models.config import T2IAdapterConfig
from bdm_jax.plugins import image_prompts
from bdm_jax.plugins.controls import Control, check_sizes
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.denoiser import denoise
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import load_component

TOLERANCE = 1e-4  # fp32 on both sides, of the largest latent
SIZE = (32, 48)
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)
LIGHT = "light_adapter"
ADAPTERS = {
    "full": dict(channels=[16, 32], adapter_type="full_adapter"),
    "light": dict(channels=[16], adapter_type=LIGHT, num_res_blocks=3, in_channels=1),
}


def random(network, seed):
    """A module, random also where it starts at zero."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, request):
    """T2I-Adapters of the tiny bridge's sizes: (folder, module) by kind. A tiny light one's levels are of one width."""
    made = {}
    for kind, sizes in ADAPTERS.items():
        network = diffusers.T2IAdapter(**{"in_channels": 3, "downscale_factor": 8, "num_res_blocks": 2, **sizes})
        folder = tmp_path_factory.mktemp(kind)
        random(network, request.config.option.seed).save_pretrained(folder)
        made[kind] = folder, network
    return made


@pytest.fixture
def hint(rng):
    return rng.integers(0, 256, (*SIZE, 3), np.uint8)


def features(network, hint, factor):
    """`adapt` of the plain loop for a T2I-Adapter of strength factor(i); diffusers adds in place and takes apart."""
    made = network(torch.from_numpy(np.moveaxis(hint, -1, 0).astype(np.float32) / 255)[None])
    return lambda i, _: {"down_intrablock_additional_residuals": [factor(i) * feature for feature in made]}


# Another English negative, and the same for both halves.
HALVES = pytest.mark.parametrize(("branch_strength", "english_negative"), [(1.0, "blurry"), (0.0, "film grain")])


@HALVES
def test_t2i_adapter_and_the_branch(latents, plain, assert_parity, adapters, hint, branch_strength, english_negative):
    request, (folder, network) = replace(REQUEST, english_negative=english_negative), adapters["full"]
    control = Control(load_component(folder), hint, 0.8, end=0.6)
    ours = latents([request], branch_strength=branch_strength, controls=[control])
    adapt = features(network, hint, lambda i: 0.8 if i < int(6 * 0.6) else 0.0)  # adapter_conditioning_factor
    assert_parity(ours, plain(request, scale=lambda i: branch_strength, adapt=adapt), TOLERANCE)


def test_t2i_adapters_add_up_on_the_bare_backbone(latents, plain, assert_parity, adapters, hint):
    folder, network = adapters["full"]
    one, other = Control(load_component(folder), hint, 0.5), Control(load_component(folder), hint[::-1], 1.2)
    first, second = (features(network, c.hint.copy(), lambda i, c=c: c.strength) for c in (one, other))

    def adapt(i, text):
        (name, own), (_, others) = (*first(i, text).items(), *second(i, text).items())
        return {name: [a + b for a, b in zip(own, others, strict=True)]}

    ours = latents([REQUEST], bare=True, controls=[one, other])
    assert_parity(ours, plain(scale=lambda i: 0.0, adapt=adapt), TOLERANCE)


def test_original_files_of_t2i_adapters(adapters, hint, tmp_path, capsys):
    """In TencentARC's names, full and light: recognised, and the same network as diffusers' folder."""
    for kind, (folder, _) in adapters.items():
        component = load_component(folder)
        config, path = component.config, tmp_path / f"{kind}.safetensors"
        light = config.adapter_type == LIGHT
        table = original_t2i_adapter(len(config.channels) + light, config.num_res_blocks, light)
        tensors = tree_to_torch(component.params, table)
        assert all(key.startswith(("conv_in.", "body.")) for key in tensors)
        save_file({key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in tensors.items()}, path)
        again = load_component(path)
        assert again.config == config
        assert all(np.array_equal(again.params[key], value) for key, value in component.params.items())
        assert main(["inspect", str(path)]) == 0
        assert "SD1.x t2i_adapter (original)" in " ".join(capsys.readouterr().out.split())
        assert next(iter(find(folder))) == "t2i_adapter"


def test_grey_maps(adapters, hint, assert_parity):
    """An adapter of one channel reads a map's luminance, as PIL makes it."""
    from bdm_jax.plugins.controls import embed

    folder, network = adapters["light"]
    grey = np.asarray(Image.fromarray(hint).convert("L"), np.float32) / 255
    ours = embed(Control(load_component(folder), hint), hint)
    for one, other in zip(ours, network(torch.from_numpy(grey)[None, None]), strict=True):
        assert_parity(np.moveaxis(one, -1, 1), other.numpy())


def test_t2i_adapters_that_cannot_be(tiny, adapters, hint):
    good = load_component(adapters["full"][0])
    wide = type(good)(replace(good.config, channels=(16, 64)), good.params)
    coarse = type(good)(replace(good.config, downscale_factor=16), good.params)
    deep = type(good)(T2IAdapterConfig(2, channels=(16, 32)), good.params)
    cases = {
        r"made for another base model \(channels \(16, 64\), the backbone's \(16, 32\)\)": Control(wide, hint),
        r"made for another base model \(pixels per feature \(16, 32\), the backbone's \(8, 16\)\)": Control(
            coarse, hint
        ),
        "reads 2 channels": Control(deep, hint),
        "its map has 48x24 pixels, the image 32x32": Control(good, hint[:24]),
        "strength inf": Control(good, hint, float("inf")),
    }
    for message, control in cases.items():
        with pytest.raises(UserError, match=message):
            generate(tiny, [REQUEST], Sampling(2, size=(32, 32)), controls=[control])
    with pytest.raises(UserError, match="an image of 48x24 pixels; it needs multiples of 16"):
        check_sizes(Control(coarse, hint), [(32, 48), (24, 48)])


# ----------------------------------------------------------------------------------------------------- image prompts

SIDE = 28  # of the vision tower's pictures


@pytest.fixture(scope="module")
def vision(tmp_path_factory, request):
    """A CLIP vision tower: (folder, module)."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=7, projection_dim=12)
    network = random(transformers.CLIPVisionModelWithProjection(config), request.config.option.seed)
    folder = tmp_path_factory.mktemp("vision")
    network.save_pretrained(folder)
    return folder, network


@pytest.fixture(scope="module", params=["base", "plus"])
def image_adapter(request, tiny_folder, tmp_path_factory):
    """(file, diffusers' UNet with the adapter in it, whether it reads states)."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_folder / "unet").eval()
    tensors = published(request.param, unet, request.config.option.seed)
    path = tmp_path_factory.mktemp("ip") / "adapter.bin"
    torch.save(tensors, path)
    unet._load_ip_adapter_weights([tensors], low_cpu_mem_usage=False)
    return path, unet.eval(), request.param == "plus"


@pytest.fixture
def picture(rng):
    """Of the tower's size: what is left of its preparation is the same in both libraries."""
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def prompt_of(path, vision, picture, tmp_path, more=""):
    """An image prompt as on the command line."""
    Image.fromarray(picture).save(tmp_path / "picture.png")
    return load_image_prompt(f"{path},{vision[0]},{tmp_path / 'picture.png'}{more}")


def seen(vision, picture, states):
    """What diffusers' encode_image makes of a picture: the negative's, the positive's, (2, 1, ...)."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pixels = torch.from_numpy(np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]))
    if states:
        made = [vision[1](x, output_hidden_states=True).hidden_states[-2] for x in (torch.zeros_like(pixels), pixels)]
    else:
        positive = vision[1](pixels).image_embeds
        made = [torch.zeros_like(positive), positive]
    return torch.stack(made)


def in_diffusers(image_adapter, vision, picture, strength):
    """The plain loop's arguments for an image prompt."""
    _, unet, states = image_adapter
    embeds = seen(vision, picture, states)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [strength]
    return {"unet": unet, "adapt": lambda i, text: {"added_cond_kwargs": {"image_embeds": [embeds[[text]]]}}}


@HALVES
def test_image_prompt_and_the_branch(
    latents, plain, assert_parity, image_adapter, vision, picture, tmp_path, branch_strength, english_negative
):
    request = replace(REQUEST, english_negative=english_negative)
    prompt = prompt_of(image_adapter[0], vision, picture, tmp_path, ",strength=0.7")
    ours = latents([request], branch_strength=branch_strength, controls=[prompt])
    theirs = plain(request, scale=lambda i: branch_strength, **in_diffusers(image_adapter, vision, picture, 0.7))
    assert_parity(ours, theirs, TOLERANCE)


def test_everything_together(latents, plain, assert_parity, image_adapter, vision, adapters, hint, picture, tmp_path):
    """An image prompt, a T2I-Adapter and the branch; a batch of two, of which each is drawn as alone."""
    folder, network = adapters["full"]
    prompt = prompt_of(image_adapter[0], vision, picture, tmp_path)
    controls = [prompt, Control(load_component(folder), hint, 0.8)]
    other = replace(REQUEST, prompt="猫", seed=6)
    ours = latents([REQUEST, other], controls=controls)
    both = in_diffusers(image_adapter, vision, picture, 1.0)
    inside, beside = features(network, hint, lambda i: 0.8), both.pop("adapt")
    theirs = [plain(request, **both, adapt=lambda *at: inside(*at) | beside(*at)) for request in (REQUEST, other)]
    assert_parity(ours, np.concatenate(theirs), TOLERANCE)


def test_strength_0_is_without_and_strengths_compile_nothing(
    latents, image_adapter, vision, adapters, hint, picture, tmp_path
):
    prompt = prompt_of(image_adapter[0], vision, picture, tmp_path)
    control = Control(load_component(adapters["full"][0]), hint)
    for request in (REQUEST, replace(REQUEST, english_negative=REQUEST.english)):
        without = latents([request])
        np.testing.assert_array_equal(latents([request], controls=[replace(prompt, strength=0.0)]), without)
        off = latents([request], controls=[replace(control, strength=0.0)])  # another program: other rounding
        np.testing.assert_allclose(off, without, atol=1e-5 * np.abs(without).max())
    first = latents([REQUEST], controls=[prompt, control])
    programs = denoise.count(), image_prompts._keys.count()
    changed = [replace(prompt, strength=0.3), replace(control, strength=0.5, end=0.5)]
    assert np.abs(latents([REQUEST], controls=changed) - first).max() > 1e-3
    assert (denoise.count(), image_prompts._keys.count()) == programs
    again = latents([REQUEST], controls=[control, prompt])
    np.testing.assert_allclose(again, first, atol=1e-6 * np.abs(first).max())


def test_safetensors_are_read_as_bin(image_adapter, vision, picture, tmp_path, tiny):
    nested = torch.load(image_adapter[0])
    flat = {f"{part}.{key}": tensor.contiguous() for part, own in nested.items() for key, tensor in own.items()}
    save_file(flat, tmp_path / "flat.safetensors")
    one = image_prompts.keys(prompt_of(image_adapter[0], vision, picture, tmp_path), tiny.unet)
    other = image_prompts.keys(prompt_of(tmp_path / "flat.safetensors", vision, picture, tmp_path), tiny.unet)
    for path, pair in one.items():
        assert all(np.array_equal(a, b) for a, b in zip(pair, other[path], strict=True))


def test_vision_towers_are_recognised(vision, tmp_path, capsys):
    assert next(iter(find(vision[0]))) == "image_encoder"
    assert main(["inspect", str(vision[0])]) == 0
    assert main(["inspect", str(vision[0] / "model.safetensors")]) == 0
    assert "image_encoder (transformers)" in capsys.readouterr().out


def test_image_prompts_that_cannot_be(tiny, tiny_folder, torch_nets, vision, picture, tmp_path):
    prompt = ImagePrompt(None, load_component(vision[0]), picture, name="file.bin")

    def arrays(tensors):
        return {part: {k: t.numpy() for k, t in own.items()} for part, own in tensors.items()}

    good = arrays(published("base", torch_nets["unet"], 0))
    deep = diffusers.UNet2DConditionModel(**{**torch_nets["unet"].config, "block_out_channels": (32, 32)})
    tower = load_component(vision[0])
    narrow = type(tower)(replace(tower.config, projection_dim=8), tower.params)
    cases = {
        "another base model: its width is 24, the backbone's 16": arrays(
            published("base", torch_nets["unet"], 0, width=24)
        ),
        r"another base model: ip_adapter.1.to_k_ip.weight has the shape \(32, 16\)": arrays(published("base", deep, 0)),
        "not an IP-Adapter": {"weight": np.zeros(3)},
        "not an IP-Adapter: expected": ["weight"],
        "unknown IP-Adapter": {**good, "image_proj": {"x": np.zeros(3)}},
    }
    for message, adapter in cases.items():
        with pytest.raises(UserError, match=f"file.bin: .*{message}"):
            generate(tiny, [REQUEST], Sampling(2), controls=[replace(prompt, adapter=adapter)])
    for message, change in {
        r"another vision tower \(width 12, this one's 8\)": {"vision": narrow},
        "a UNetConfig in place of a CLIP vision tower": {"vision": tiny.unet},
        "strength nan is not": {"strength": float("nan")},
    }.items():
        with pytest.raises(UserError, match=message):
            generate(tiny, [REQUEST], Sampling(2), controls=[replace(prompt, adapter=good, **change)])
    misshaped = {**good, "image_proj": {**good["image_proj"], "proj.bias": np.zeros(3, np.float32)}}
    with pytest.raises(FileError, match=r"file.bin: image_proj: .*proj.bias \(3,\)"):
        generate(tiny, [REQUEST], Sampling(2), controls=[replace(prompt, adapter=misshaped)])


def test_as_on_the_command_line(adapters, image_adapter, vision, hint, picture, tmp_path):
    Image.fromarray(hint).save(tmp_path / "map.png")
    Image.fromarray(picture).save(tmp_path / "picture.png")
    parts = Parts(
        adapter=(f"{adapters['full'][0]},{tmp_path / 'map.png'},strength=0.8,end=0.6,from=canny",),
        image_prompt=(f"{image_adapter[0]},{vision[0]},{tmp_path / 'picture.png'},strength=0.7",),
    )
    parts.check()
    control, prompt = parts.load_controls()
    assert (control.strength, control.end, prompt.strength, prompt.name) == (0.8, 0.6, 0.7, "adapter.bin")
    assert set(np.unique(control.hint)) <= {0, 255}
    names = parts.names()
    assert ",map.png,strength=0.8,end=0.6,from=canny,map=" in names["adapter"]
    assert names["image_prompt"].startswith(f"adapter.bin,{vision[0].name},picture.png,strength=0.7,map=")
    with pytest.raises(UserError, match="holds t2i_adapter, not controlnet"):
        load_control(f"{adapters['full'][0]},{tmp_path / 'map.png'}")
    for text, message in {
        "a,b": "write it as ADAPTER,VISION,PICTURE",
        "a,b,c,end=1": "unknown setting of an image prompt 'end'",
        "a,b,c,strength=x": "strength=x is not a number",
        "a,b,c": "a: no such file or folder",
    }.items():
        with pytest.raises(UserError, match=message):
            Parts(image_prompt=(text,)).check()
