"""What the gradient of the branch's loss costs: nothing in the backbone's encoder, and with remat less memory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bdm_jax.models.config import BDM_BRANCH, CHINESE_CLIP_H_TEXT, CLIP_L_TEXT, SD15_UNET, SD15_VAE
from bdm_jax.models.functional import abstract, bind
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import TOKENIZERS
from bdm_jax.runtime.costs import flops, pretend_platform
from bdm_jax.training.objectives.branch import BranchTask
from bdm_jax.training.objectives.remat import _Remat, network
from bdm_jax.training.sets import DataConfig, Sets

BATCH = 4


@pytest.fixture(scope="module")
def made(backbone_folder, tmp_path_factory):
    """A branch's job and one batch, in a function of the task's changes."""
    sets = Sets(DataConfig(style="fluent", concepts=40), "zh")
    tower = backbone_folder.parent / "tower"

    def make(dtype=jnp.float32, **changes):
        task = BranchTask(backbone=backbone_folder, text_encoder=tower, tokenizer=TOKENIZERS / "chinese", **changes)
        job = task.start(sets, tmp_path_factory.mktemp("run"), 0, jnp.dtype(dtype))
        rows = [job.sample(job.parts[0].source[i], np.random.default_rng(0)) for i in range(BATCH)]
        batch = jax.tree.map(lambda *values: np.stack(values), *rows)
        return job, {**batch, "place": np.arange(BATCH, dtype=np.int32)}

    return make


def multiplications(function, *arguments):
    """Of all convolutions and matrix products, by the sizes in the jaxpr."""
    return flops(function, *arguments) // 2


def test_no_gradient_flows_through_the_backbone_s_encoder(made):
    """Forward and both gradients in the branch, forward and the gradient of its inputs in the decoder, forward alone in
    the backbone's encoder: 3 B + 2 D + E multiplications. With the encoder's inputs it would be E more, with the
    decoder's weights D more.
    """
    job, batch = made()
    params, frozen = job.params, job.frozen
    sizes, key = job.objective.sizes, jax.random.key(0)
    unet = sizes["unet"]
    x, t = jnp.zeros((BATCH, 8, 8, unet.in_channels)), jnp.zeros(BATCH, jnp.int32)
    text = Conditioning(jnp.zeros((BATCH, 16, unet.cross_attention_dim)))
    skips, mid = bind(unet, frozen["unet"]).encode(x, t, text)
    encoder = multiplications(lambda: bind(unet, frozen["unet"]).encode(x, t, text))
    decoder = multiplications(lambda: bind(unet, frozen["unet"]).decode(skips, mid, t, text))
    branch = multiplications(lambda: bind(sizes["branch"], params["branch"])(x, t, text))
    ids = batch["texts"]["branch"]
    tower = multiplications(lambda: bind(sizes["branch_text_encoder"], frozen["branch_text_encoder"])(ids))
    step = multiplications(jax.grad(lambda p: job.objective.loss(p, frozen, batch, key)[0]), params)
    expected = 3 * branch + 2 * decoder + encoder + tower
    print(f"step {step:,}, expected {expected:,}; encoder {encoder:,}, decoder {decoder:,}, branch {branch:,}")
    assert abs(step - expected) < 0.25 * encoder


def test_at_full_size_it_is_what_the_paper_s_sizes_give():
    """2.22 TFLOP per picture of 512 x 512 from cached latents (specs: 3 B + 2 D + E at SD1.5's sizes), traced only."""
    sizes = {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": CLIP_L_TEXT, "branch": BDM_BRANCH}
    sizes["branch_text_encoder"] = CHINESE_CLIP_H_TEXT
    objective = BranchTask(tokenizer=Path("none")).objective(sizes)
    trained, frozen = objective.shapes()
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), objective.row(512))
    assert batch["moments"].shape == (1, 64, 64, 8) and batch["texts"]["branch"].shape == (1, 52)

    def loss(params, frozen, batch):
        return objective.loss(params, frozen, batch, jax.random.key(0))[0]

    def encode(params, ids):
        return bind(CHINESE_CLIP_H_TEXT, params)(ids)

    tower = multiplications(encode, frozen["branch_text_encoder"], batch["texts"]["branch"])
    step = multiplications(jax.grad(loss), trained, frozen, batch)
    print(f"{2 * (step - tower) / 1e12:.3f} TFLOP, and {2 * tower / 1e12:.3f} in the text tower")
    assert 2 * (step - tower) == pytest.approx(2.22e12, rel=0.05)


def test_no_convolution_of_the_backbone_s_encoder_is_transposed(made):
    """In the lowered step the encoder's kernels are read once, forwards; the decoder's once more, for the gradient.

    Kernels of 1x1 are matrix products, not convolutions.
    """
    job, batch = made()
    encoder = [path for path in job.frozen["unet"] if path.startswith(("conv_in", "down_blocks", "mid_block"))]
    convolutions = {True: 0, False: 0}
    for path, value in job.frozen["unet"].items():
        convolutions[path in encoder] += value.ndim == 4 and value.shape[0] > 1
    branch = sum(value.ndim == 4 and value.shape[0] > 1 for value in job.params["branch"].values())
    gradient = jax.jit(jax.grad(lambda p: job.objective.loss(p, job.frozen, batch, jax.random.key(0))[0]))
    lowered = gradient.lower(job.params).as_text()
    found = lowered.count("stablehlo.convolution")
    # the branch's first convolution has no gradient of its input: the noisy latents are data
    assert found == convolutions[True] + 2 * convolutions[False] + 3 * branch - 1


def test_remat_keeps_less_and_computes_the_same(made):
    key, found, kept = jax.random.key(0), {}, {}
    for remat in ("none", "blocks"):
        job, batch = made(remat=remat)

        def loss(p, job=job, batch=batch):
            return job.objective.loss(p, job.frozen, batch, key)[0]

        found[remat] = jax.jit(jax.grad(loss))(job.params)["branch"]
        saved = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], job.params)
        kept[remat] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    print(kept)
    assert kept["blocks"] < 0.6 * kept["none"]
    for path, gradient in found["none"].items():
        np.testing.assert_allclose(found["blocks"][path], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max() + 1e-9)


@pytest.mark.parametrize(("config", "blocks"), [(SD15_UNET, 22 + 16), (BDM_BRANCH, 10 + 7), (SD15_VAE, 24 + 2)])
def test_remat_finds_every_resnet_and_transformer(config, blocks):
    found = []

    def look(params):
        wrapped = network(config, params, "blocks")
        found.append(sum(isinstance(module, _Remat) for _, module in nnx.iter_modules(wrapped)))

    jax.eval_shape(look, abstract(config))
    assert found == [blocks]


def test_bfloat16_reaches_every_network_and_export_keeps_fp32(made):
    """Loss near that of fp32; frozen trees are bf16, the branch that is trained starts as the fp32 copy."""
    losses = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        job, batch = made(dtype)
        params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), job.params)
        losses[dtype] = float(job.objective.loss(params, job.frozen, batch, jax.random.key(0))[0])
        types = {leaf.dtype for leaf in jax.tree.leaves(job.frozen) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert types == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(job.params)} == {jnp.dtype("float32")}
    assert losses[jnp.bfloat16] == pytest.approx(losses[jnp.float32], rel=0.05)
    with pretend_platform("gpu"):  # on a CPU, convolutions that are no products stay in fp32
        text = jax.jit(lambda p: job.objective.loss(p, job.frozen, batch, jax.random.key(0))[0]).lower(params).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all("xbf16>" in line.rpartition("->")[2] for line in convolutions)
