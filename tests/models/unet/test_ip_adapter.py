"""IP-Adapter's projections and attention against diffusers; the names of files, as diffusers itself reads them."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection as TheirProjection
from diffusers.models.embeddings import IPAdapterPlusImageProjection

from bdm_jax.formats.layouts import to_torch, tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.ip_adapter import read_original
from bdm_jax.models import functional
from bdm_jax.models.attention import decoupled_attention
from bdm_jax.models.config import SD15_UNET, SDXL_UNET, ImageProjectionConfig, ResamplerConfig, UNetConfig, to_json
from bdm_jax.models.unet.ip_adapter import cross_attentions

BASE = ImageProjectionConfig(image_embed_dim=10, cross_attention_dim=12, num_image_text_embeds=4)
PLUS = ResamplerConfig(
    embed_dims=10, output_dims=12, hidden_dims=16, depth=2, dim_head=6, heads=3, num_queries=5, ffn_ratio=2
)
UNET = UNetConfig(
    block_out_channels=(8, 16, 24),
    transformer_layers=(0, 1, 1),
    layers_per_block=1,
    num_heads=2,
    cross_attention_dim=12,
    norm_num_groups=4,
)


def from_original(tensors, unet):
    """A file for this backbone."""
    attentions = [(layer.path, layer.channels) for layer in cross_attentions(unet)]
    return read_original(tensors, attentions, unet.cross_attention_dim)


def build(config):
    """diffusers' projection of the same sizes."""
    return (TheirProjection if isinstance(config, ImageProjectionConfig) else IPAdapterPlusImageProjection)(
        **asdict(config)
    )


@pytest.mark.parametrize(("config", "shape"), [(BASE, (3, 10)), (PLUS, (3, 9, 10))])
def test_projections_equal_diffusers(config, shape, randomised, torch_params, apply, assert_parity, rng):
    reference = randomised(build(config))
    x = rng.standard_normal(shape, np.float32)
    assert_parity(apply(config, torch_params(reference, config), x), reference(torch.from_numpy(x)).numpy())


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_decoupled_attention_equals_diffusers(scale, randomised, assert_parity, rng):
    module = Attention(query_dim=8, cross_attention_dim=12, heads=2, dim_head=4, out_bias=True)
    module.set_processor(IPAdapterAttnProcessor2_0(8, 12, num_tokens=(3,), scale=scale))
    randomised(module)
    x, text, image = (rng.standard_normal(shape, np.float32) for shape in ((2, 5, 8), (2, 7, 12), (2, 3, 12)))
    tokens = (torch.from_numpy(text), [torch.from_numpy(image)[:, None]])
    expected = module(torch.from_numpy(x), encoder_hidden_states=tokens)
    weights = {key: tensor.numpy().T for key, tensor in module.state_dict().items()}

    def project(y, name):
        return (y @ weights[f"{name}.weight"]).reshape(*y.shape[:2], 2, 4)

    ours = decoupled_attention(
        project(x, "to_q"),
        (project(text, "to_k"), project(text, "to_v")),
        [(project(image, "processor.to_k_ip.0"), scale * project(image, "processor.to_v_ip.0"))],
    )
    assert_parity(ours.reshape(2, 5, 8) @ weights["to_out.0.weight"] + weights["to_out.0.bias"], expected.numpy())


def original(config, unet, rng):
    """A file of the authors, filled at random; written from their modules, apart from the names in our code."""

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    if isinstance(config, ImageProjectionConfig):
        width = config.cross_attention_dim
        shapes = {"proj.weight": (4 * width, config.image_embed_dim), "proj.bias": (4 * width,)}
        shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    else:
        c, width, inner = config.hidden_dims, config.output_dims, config.heads * config.dim_head
        shapes = {"latents": (1, config.num_queries, c)}
        shapes |= {"proj_in.weight": (c, config.embed_dims), "proj_in.bias": (c,)}
        shapes |= {"proj_out.weight": (width, c), "proj_out.bias": (width,)}
        shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
        for i in range(config.depth):
            norms = ("0.norm1", "0.norm2", "1.0")
            shapes |= {f"layers.{i}.{norm}.{x}": (c,) for norm in norms for x in ("weight", "bias")}
            shapes |= {f"layers.{i}.0.to_q.weight": (inner, c), f"layers.{i}.0.to_kv.weight": (2 * inner, c)}
            shapes |= {f"layers.{i}.0.to_out.weight": (c, inner)}
            shapes |= {f"layers.{i}.1.1.weight": (c * config.ffn_ratio, c)}
            shapes |= {f"layers.{i}.1.3.weight": (c, c * config.ffn_ratio)}
    tensors = {f"image_proj.{key}": draw(*shape) for key, shape in shapes.items()}
    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(to_json(unet))
    sizes = [reference.get_submodule(name.removesuffix(".processor")) for name in reference.attn_processors]
    for n, module in enumerate(sizes):  # both kinds of attention, in diffusers' order
        if module.is_cross_attention:
            tensors |= {f"ip_adapter.{n}.to_{x}_ip.weight": draw(module.inner_dim, width) for x in "kv"}
    return tensors


# Heads of 64 channels, and four levels of blocks, as all published files have.
PUBLISHED = [
    ImageProjectionConfig(10, 12, 4),
    ResamplerConfig(embed_dims=10, output_dims=12, hidden_dims=16, depth=4, heads=2, num_queries=5, ffn_ratio=4),
]


@pytest.mark.parametrize("config", PUBLISHED)
def test_files_are_read_as_diffusers_reads_them(config, twin, apply, rng, assert_parity):
    tensors = original(config, UNET, rng)
    values, table, projection, layers = from_original(tensors, UNET)
    assert type(config)(**values) == config
    nested = {"image_proj": {}, "ip_adapter": {}}  # as in the authors' .bin
    for key, array in tensors.items():
        part, _, name = key.partition(".")
        nested[part][name] = array
    again = from_original(nested, UNET)
    assert (
        again.values == values and again.projection.keys() == projection.keys() and again.layers.keys() == layers.keys()
    )
    params = tree_from_torch(projection, functional.abstract(config), "image_proj", table)
    back = tree_to_torch(params, table)
    assert back.keys() == projection.keys()
    assert all(back[key].tobytes() == array.tobytes() for key, array in projection.items())
    unet = twin(UNET)
    parts = {
        part: {key.removeprefix(f"{part}."): torch.from_numpy(a) for key, a in tensors.items() if key.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    theirs = {key: tensor.numpy() for key, tensor in unet.state_dict().items() if "_ip." in key}
    assert theirs.keys() == layers.keys()
    assert all(np.array_equal(theirs[key], layers[key]) for key in theirs)
    x = rng.standard_normal((2, 10) if config == PUBLISHED[0] else (2, 7, 10), np.float32)
    loaded = unet.encoder_hid_proj.image_projection_layers[0]
    assert_parity(apply(config, params, x), loaded(torch.from_numpy(x)).numpy())


def test_full_size(rng):
    """SD1.5: the cross-attentions are 1, 3, ... 31 (SDXL: 139); the projections have diffusers' tensors."""
    for unet, count in ((SD15_UNET, 16), (SDXL_UNET, 70)):
        with torch.device("meta"):
            theirs = UNet2DConditionModel.from_config(to_json(unet))
        places = [name.removesuffix(".processor") for name in theirs.attn_processors if ".attn2." in name]
        assert [layer.path for layer in cross_attentions(unet)] == places and len(places) == count
        modules = map(theirs.get_submodule, places)
        sizes = [(layer.channels, layer.heads) for layer in cross_attentions(unet)]
        assert sizes == [(module.inner_dim, module.heads) for module in modules]
    for config in (ImageProjectionConfig(), ResamplerConfig()):
        with torch.device("meta"):
            reference = {key: tuple(tensor.shape) for key, tensor in build(config).state_dict().items()}
        ours = (to_torch(key, np.broadcast_to(0, leaf.shape)) for key, leaf in functional.abstract(config).items())
        assert {key: array.shape for key, array in ours} == reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_proj.proj.3.weight": 1, "image_proj.proj.0.weight": 1, "image_proj.proj.weight": None},
            "a full-face or",
        ),
        ({"image_proj.proj.weight": None}, "an unknown IP-Adapter"),
        ({"image_proj.norm.weight": None}, "image projection is damaged: 'norm.weight'"),
        ({"ip_adapter.1.to_k_ip.weight": None}, "not this backbone's: ip_adapter.1.to_k_ip.weight .1 in all"),
        ({"ip_adapter.99.to_k_ip.weight": 1}, "not this backbone's: ip_adapter.99.to_k_ip.weight"),
        ({"ip_adapter.1.to_k_ip.weight": 1}, "another base model: ip_adapter.1.to_k_ip.weight has the shape .1, 1.,"),
        ({"other": 1}, "not an IP-Adapter"),
    ],
)
def test_other_files_are_named(change, message, rng):
    tensors = {**original(PUBLISHED[0], UNET, rng), **change}
    with pytest.raises(ValueError, match=message):
        from_original(
            {key: np.ones((1, 1)) if isinstance(a, int) else a for key, a in tensors.items() if a is not None}, UNET
        )


def test_another_backbones_width_is_named(rng):
    wide = original(ImageProjectionConfig(10, 16, 4), UNET, rng)
    with pytest.raises(ValueError, match="its width is 16, the backbone's 12"):
        from_original(wide, UNET)
