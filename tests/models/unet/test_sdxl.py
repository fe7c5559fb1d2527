"""What SDXL, Kolors and BDM-SDXL ask of the encoder beyond SD1.5, and what a conditioning's parts do."""

from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from diffusers import ControlNetModel, UNet2DConditionModel

from bdm_jax.models import functional
from bdm_jax.models.attention import biased_attention, plain_attention
from bdm_jax.models.config import (
    KOLORS_UNET,
    SDXL_UNET,
    BranchConfig,
    ControlNetConfig,
    EncoderConfig,
    UNetConfig,
    branch_config,
    from_json,
    to_json,
)

SMALL = UNetConfig(
    block_out_channels=(16, 24),
    transformer_layers=(0, 2),
    layers_per_block=1,
    num_heads=(2, 3),
    cross_attention_dim=20,
    norm_num_groups=8,
    use_linear_projection=True,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 10,
)
SIZE = (2, 6, 8)


def test_projected_text_equals_diffusers(twin, torch_params, inputs, apply, assert_parity, nhwc):
    """Kolors: a dense layer before cross-attention, with keys made beforehand and without."""
    config = replace(SMALL, encoder_hid_dim=26)
    reference = twin(config)
    params, x = torch_params(reference, config), inputs(config, SIZE)
    expected = nhwc(reference(*x.torch(), **x.added()).sample)
    assert_parity(apply(config, params, x.latents, x.t, x.cond), expected)
    cond = apply(config, params, x.cond, method="with_keys")
    assert_parity(apply(config, params, x.latents, x.t, cond), expected)


def test_rows_of_shifts_stand_for_timesteps(inputs, apply, assert_parity, seed):
    params, x = functional.init(SMALL, seed), inputs(SMALL, SIZE)

    @jax.jit
    def rows(params, latents, cond):
        net = functional.bind(SMALL, params)
        shifts = net.time_shift_rows(np.array([3, 500, 900]), cond, latents.dtype)
        assert all(shift.shape[:2] == (3, 2) for shift in shifts.values())
        return net(latents, {path: shift[1] for path, shift in shifts.items()}, cond)

    expected = apply(SMALL, params, x.latents, np.array([500, 500]), x.cond)
    assert_parity(rows(params, x.latents, x.cond), expected, 1e-5)
    one = apply(SMALL, params, x.latents, np.array([500]), x.cond)
    assert_parity(one, expected, 1e-5)


def test_one_row_of_latents_for_several_texts(inputs, apply, assert_parity, seed):
    """The pooled text is read before the states are: latents of one row meet both there."""
    params, x = functional.init(SMALL, seed), inputs(SMALL, SIZE)
    latents, t = x.latents[:1], np.array([77])
    both = np.repeat(latents, 2, axis=0)
    skips, mid = apply(SMALL, params, latents, t, x.cond, method="encode")
    expected_skips, expected_mid = apply(SMALL, params, both, np.repeat(t, 2), x.cond, method="encode")
    for ours, expected in zip((*skips, mid), (*expected_skips, expected_mid), strict=True):
        assert_parity(ours, expected, 1e-5)


@pytest.mark.parametrize("part", ["pooled", "time_ids"])
def test_an_absent_part_is_named(part, inputs, seed):
    params, x = functional.abstract(SMALL), inputs(SMALL, SIZE)
    with pytest.raises(ValueError, match=f"UNet reads the conditioning's {part}, which is absent"):
        jax.eval_shape(
            lambda params: functional.bind(SMALL, params)(x.latents, x.t, replace(x.cond, **{part: None})), params
        )


def test_a_pooled_text_of_another_width_is_named(inputs):
    x = inputs(SMALL, SIZE)
    cond = replace(x.cond, pooled=np.zeros((2, 9), np.float32))
    with pytest.raises(ValueError, match="a pooled text of 9 and 6 size ids of 8 make 57 numbers, not 58"):
        jax.eval_shape(lambda p: functional.bind(SMALL, p)(x.latents, x.t, cond), functional.abstract(SMALL))


def test_a_bridge_of_sdxl_projects_its_texts(inputs, apply, assert_parity, seed):
    """BDM-SDXL: as the same branch without projections, given texts that were projected before."""
    config = branch_config(SMALL, 30, 14)
    plain = BranchConfig(**{f.name: getattr(SMALL, f.name) for f in fields(EncoderConfig)})
    drawn = functional.init(config, seed)
    rng = np.random.default_rng(seed)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) * 0.1 + leaf for path, leaf in drawn.items()}
    x = inputs(config, SIZE)
    assert (x.tokens.shape[-1], x.pooled.shape[-1]) == (30, 14)
    kernels = [np.asarray(params.pop(f"{name}prompt_embeds_projection.kernel")) for name in ("", "pooled_")]
    projected = replace(x, tokens=x.tokens @ kernels[0], pooled=x.pooled @ kernels[1])
    expected = apply(plain, params, x.latents, x.t, projected.cond)
    names = ("prompt_embeds_projection.kernel", "pooled_prompt_embeds_projection.kernel")
    ours = apply(config, {**params, **dict(zip(names, kernels, strict=True))}, x.latents, x.t, x.cond)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_parity(mine, other, 1e-5)


def test_bias_is_paint_with_words(rng):
    """cloneofsimo's formula, one sample at a time: softmax((QK' + w max(QK') A) / sqrt(d)) V."""
    query, key, value = (rng.standard_normal((2, length, 3, 8), dtype=np.float32) for length in (12, 5, 5))
    bias = rng.random((2, 12, 5), dtype=np.float32)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    ours = biased_attention(query, key, value, bias, mask)
    for sample in range(2):
        seen = mask[sample]
        scores = np.einsum("tnk,snk->nts", query[sample], key[sample][seen])
        scores = (scores + bias[sample][:, seen] * scores.max()) / np.sqrt(8)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        expected = np.einsum("nts,snk->tnk", weights, value[sample][seen])
        np.testing.assert_allclose(ours[sample], expected, rtol=1e-5, atol=1e-5)
    painted = np.ones_like(bias)  # every token everywhere: softmax does not see it
    np.testing.assert_allclose(
        biased_attention(query, key, value, painted), plain_attention(query, key, value), rtol=1e-4, atol=1e-5
    )


def test_a_painted_token_draws_the_eye_where_it_is_painted(inputs, apply, seed):
    """Through the whole network: no paint is no change; painting a token changes the prediction, most where it is."""
    config = replace(SMALL, transformer_layers=(2, 0), addition_time_embed_dim=None,
                     projection_class_embeddings_input_dim=None)  # fmt: skip
    size = (1, 9, 12)
    params, x = functional.init(config, seed), inputs(config, size)
    bias = np.zeros((*size, x.tokens.shape[1]), np.float32)
    plain = np.asarray(apply(config, params, x.latents, x.t, x.cond))
    np.testing.assert_allclose(apply(config, params, x.latents, x.t, replace(x.cond, bias=bias)), plain, atol=1e-5)
    shares = []
    for columns in (slice(3), slice(-3, None)):  # the columns of random weights are not equally lively: both ways
        paint = np.copy(bias)
        paint[:, :, columns, 2] = 4.0
        painted = np.asarray(apply(config, params, x.latents, x.t, replace(x.cond, bias=paint)))
        change = np.abs(painted - plain).mean(axis=(0, 1, 3))
        shares.append(change[:3].mean() / change[-3:].mean())
    assert shares[0] > 2 * shares[1] > 0


@pytest.mark.parametrize("config", [SMALL, SDXL_UNET, KOLORS_UNET, replace(SMALL, encoder_hid_dim=9, num_heads=4)])
def test_config_survives_diffusers(config):
    """Written, read by diffusers' own class, written by it, and read again."""
    import torch

    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(to_json(config))
    assert from_json({"_class_name": "UNet2DConditionModel", **module.config}) == config
    shared = {f.name: getattr(config, f.name) for f in fields(EncoderConfig)}
    control = ControlNetConfig(**shared)
    with torch.device("meta"):
        module = ControlNetModel.from_config(to_json(control))
    assert from_json({"_class_name": "ControlNetModel", **module.config}) == control


def test_branch_config_survives():
    for config in (branch_config(SDXL_UNET, 1792, 1024), branch_config(SMALL, 30, 14)):
        assert from_json(to_json(config)) == config
    told = {key: value for key, value in to_json(branch_config(SDXL_UNET, 1792, 1024)).items() if "_embeds_" not in key}
    assert told["is_xl"] and from_json(told) == branch_config(SDXL_UNET, 1792, 1024)  # as 360's code has it


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transformer_layers_per_block": [1, 2, 3]}, "transformer_layers_per_block=.* not a valid value for 2 levels"),
        ({"transformer_layers_per_block": [2, [1]]}, "transformer_layers_per_block=.* not a valid value"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": None,
          "transformer_layers_per_block": [2, 3]}, "gives the middle 3; only as many as .* level with attention"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "up_block_types=.* do not mirror"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text' is not implemented"),
        ({"addition_time_embed_dim": None}, "belong together"),
        ({"projection_class_embeddings_input_dim": 48}, "leaves nothing for a pooled text"),
        ({"attention_head_dim": [2, 3, 4]}, "num_heads has 3 entries"),
        ({"attention_head_dim": [2, 7]}, "24 must be a multiple"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj' is not implemented"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type without encoder_hid_dim"),
        ({"is_xl": True}, "is_xl"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_json({**to_json(SMALL), **values})
