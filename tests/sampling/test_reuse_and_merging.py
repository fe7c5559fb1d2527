"""Approximations that one may ask for: each against the same thing spelled out with PyTorch's networks, exact where it
is off, and less work where it is on.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bdm_jax.diffusion.samplers import SAMPLERS, SamplerState
from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.errors import UserError
from bdm_jax.models import functional
from bdm_jax.models.config import BDM_BRANCH, SD15_UNET
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.runtime.costs import flops, pretend_platform
from bdm_jax.sampling.denoiser import Networks, PredictionPlan, ResidualNetwork, StepCache, denoise
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.sampling.steps import guidance_rows, segments, step_table

TOLERANCE = 1e-4  # fp32 on both sides, of the largest latent
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)
OFF = dict(branch_every=1, cache_every=1, merge_tokens=0.0)
ON = [dict(branch_every=2), dict(cache_every=3), dict(merge_tokens=0.5)]


@pytest.mark.parametrize("every", [2, 9])
def test_the_branch_at_every_kth_step(latents, plain, kept, assert_parity, every):
    exact = plain()
    kept(lambda row: row % every == 0)
    ours = latents([REQUEST], branch_every=every)
    assert_parity(ours, plain(), TOLERANCE)
    assert np.abs(ours - exact).max() > 1e-2 * np.abs(exact).max()


def test_the_strength_is_that_of_the_step(latents, plain, kept, assert_parity):
    strengths = (0.3, -1.0, 2.0, 0.7, 1.5)
    kept(lambda row: row % 2 == 0)
    ours = latents([REQUEST], branch_every=2, branch_strength=0.6, residual_strengths=strengths)
    assert_parity(ours, plain(scale=lambda i: 0.6 * np.array(strengths)), TOLERANCE)


def test_a_branch_that_begins_to_speak_begins_anew(latents, plain, kept, assert_parity):
    kept(lambda row: row in (0, 2, 5))  # it speaks in the rows 2 to 5
    ours = latents([REQUEST], branch_every=3, branch_start=1 / 3)
    assert_parity(ours, plain(scale=lambda i: float(i >= 2)), TOLERANCE)


@pytest.mark.parametrize("every", [2, 3])
def test_deep_features_are_cached(latents, plain, deep_cached, assert_parity, every):
    exact = plain()
    ours = latents([REQUEST], cache_every=every)
    assert_parity(ours, plain(unet=deep_cached(lambda row: row % every == 0)), TOLERANCE)
    assert np.abs(ours - exact).max() > 1e-2 * np.abs(exact).max()


def test_tokens_are_merged(latents, plain, torch_nets, assert_parity, monkeypatch):
    exact = plain()
    for network in (torch_nets["unet"], torch_nets["branch"]):
        for block in (network.down_blocks[0], *getattr(network, "up_blocks", ())[-1:]):
            for transformer in block.attentions:
                merge_in(transformer.transformer_blocks[0], (4, 6), 0.5, monkeypatch)
    ours = latents([REQUEST], merge_tokens=0.5)
    assert_parity(ours, plain(), TOLERANCE)
    assert np.abs(ours - exact).max() > 1e-3 * np.abs(exact).max()


def merge_in(block, size, ratio, monkeypatch):
    """Makes self-attention of a transformer block in PyTorch see merged tokens, by the paper's words."""
    cells = [(y, x) for y in range(size[0]) for x in range(size[1])]
    staying = [i for i, (y, x) in enumerate(cells) if y % 2 == x % 2 == 0]
    others = [i for i in range(len(cells)) if i not in staying]
    attend, norm = block.attn1.forward, block.norm1.forward
    seen = []

    def attend_merged(tokens, *arguments, **options):
        (hidden,) = seen
        cosines = torch.nn.functional.cosine_similarity(hidden[0, :, None], hidden[0, None, :], dim=-1)
        best = {i: max(staying, key=lambda j: cosines[i, j]) for i in others}
        gone = sorted(others, key=lambda i: -cosines[i, best[i]])[: int(ratio * len(cells))]
        groups = {i: [i] + [g for g in gone if best[g] == i] for i in range(len(cells)) if i not in gone}
        means = torch.stack([tokens[:, members].mean(dim=1) for members in groups.values()], dim=1)
        answers, out = attend(means, *arguments, **options), torch.empty_like(tokens)
        for answer, members in zip(answers.unbind(dim=1), groups.values(), strict=True):
            out[:, members] = answer[:, None]
        return out

    monkeypatch.setattr(block.norm1, "forward", lambda x: norm(seen.__setitem__(slice(None), [x]) or x))
    monkeypatch.setattr(block.attn1, "forward", attend_merged)


def segments_of(settings, count, preview_every=5):
    settings = replace(settings, guidance=3.0)
    return segments(settings, guidance_rows(settings, count, False, True), preview_every)


GUIDED = PredictionPlan.of({"backbone": (0, 1), "branch": (0, 1)})
POSITIVE = PredictionPlan.of({"backbone": (1,), "branch": (1,)})


def test_evaluations_are_counted(latents):
    """heun asks twice in a step: with 2, the second answer is made with the first one's residuals."""
    assert np.isfinite(latents([REQUEST], sampler="heun", steps=3, branch_every=2)).all()
    found = segments_of(Sampling(branch_every=2), 5)
    assert [one.rows for one in found if one.fills_cache] == [range(0, 1), range(2, 3), range(4, 5)]


def test_segments():
    """Rows that fill the cache stand alone; where guidance ends, or the branch, what was kept does not fit."""
    found = segments_of(Sampling(cache_every=3, guidance_end=0.5, branch_end=0.8), 10)
    assert [(one.rows, one.plan, one.uses_branch, one.fills_cache) for one in found] == [
        (range(0, 1), GUIDED, True, True),
        (range(1, 3), GUIDED, True, False),
        (range(3, 4), GUIDED, True, True),
        (range(4, 5), GUIDED, True, False),
        (range(5, 6), POSITIVE, True, True),
        (range(6, 8), POSITIVE, True, False),
        (range(8, 9), POSITIVE, False, True),
        (range(9, 10), POSITIVE, False, False),
    ]
    assert {one.reuse for one in found} == {"deep"}
    silent = segments_of(Sampling(branch_every=2, branch_end=0.5), 4)
    assert [(one.uses_branch, one.reuse) for one in silent] == [(True, "branch")] * 2 + [(False, None)]


@pytest.mark.parametrize("name", OFF)
def test_off_is_exact_and_the_same_program(latents, name):
    plain = latents([REQUEST])
    programs = denoise.count()
    np.testing.assert_array_equal(latents([REQUEST], **{name: OFF[name]}), plain)
    assert denoise.count() == programs


@pytest.mark.parametrize("on", ON, ids=lambda on: next(iter(on)))
def test_only_what_is_asked_for_compiles_anew(latents, on):
    """Prompts, seeds, strengths, guidance, how often: nothing. With reuse there are two programs, else one."""
    size = (40, 32)  # that no other test takes
    programs = denoise.count()
    latents([REQUEST], size=size, **on)
    assert denoise.count() - programs == (1 if "merge_tokens" in on else 2)
    programs = denoise.count()
    other = replace(REQUEST, prompt="猫", negative="", seed=8)
    latents([other], size=size, **on, branch_strength=0.5, guidance=4.5, steps=8)
    more = {name: value if name == "merge_tokens" else value + 1 for name, value in on.items()}
    latents([REQUEST], size=size, **more)
    assert denoise.count() == programs


@pytest.mark.parametrize("on", ON, ids=lambda on: next(iter(on)))
def test_a_picture_depends_on_its_request_only(latents, on):
    requests = [REQUEST, replace(REQUEST, prompt="猫", seed=8)]
    together = latents(requests, **on)
    np.testing.assert_array_equal(latents(requests[::-1], **on)[::-1], together)
    alone = latents(requests, batch_size=1, **on)
    np.testing.assert_allclose(alone, together, atol=TOLERANCE * np.abs(together).max())


@pytest.mark.parametrize("on", ON[1:], ids=lambda on: next(iter(on)))
def test_a_bare_backbone_can_be_approximated(latents, on):
    bare = latents([REQUEST], bare=True)
    assert 1e-3 < np.abs(latents([REQUEST], bare=True, **on) - bare).max() / np.abs(bare).max() < 1


def test_work_at_full_size():
    """Of a guided step of BDM at 512 px, by its program."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    configs = {"unet": SD15_UNET, "branch": BDM_BRANCH}
    params = {name: functional.abstract(config) for name, config in configs.items()}

    def keys(name, cond):
        return jax.eval_shape(lambda p, c: functional.bind(configs[name], p).with_keys(c), params[name], cond)

    texts = {
        "unet": keys("unet", Conditioning(array(2, 77, 768))),
        "branch": keys("branch", Conditioning(array(2, 52, 1024))),
    }
    state = SamplerState(array(1, 64, 64, 4), array(3, 1, 64, 64, 4))
    branch = (ResidualNetwork("branch", BDM_BRANCH, "branch"),)
    settings, steps = Sampling(guidance=7.5), SAMPLERS["dpmpp-2m"](DiscreteSchedule(), 5)
    table = step_table(settings, steps, guidance_rows(settings, 5, False, True), GUIDED, branch, [])

    def work(earlier=None, **how):
        run = partial(denoise.__wrapped__, Networks(SD15_UNET, branch, DiscreteSchedule(), GUIDED, **how))
        seeds, count = jax.ShapeDtypeStruct((1,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
        given = params, state, seeds, table, count, texts, {}, [], array(), None, earlier
        with pretend_platform("none"):  # JAX keeps what it has traced
            left = jax.eval_shape(run, *given)[2]
        return flops(run, *given), left

    full, _ = work()
    key, residuals = work(reuse="branch")
    assert isinstance(residuals, StepCache) and key == full
    reused, _ = work(reuse="branch", earlier=residuals)
    key, deep = work(reuse="deep")
    assert deep.deep.shape == (2, 64, 64, 640) and len(deep.residuals["branch"]) == 3 and key == full
    cached, _ = work(reuse="deep", earlier=deep)
    merged = {ratio: work(merge=ratio)[0] for ratio in (0.25, 0.5)}
    shares = {name: value / full for name, value in {"branch": reused, "deep": cached, **merged}.items()}
    print(full, shares)
    assert shares["branch"] == pytest.approx(0.76, abs=0.02)
    assert shares["deep"] < 0.35
    assert shares[0.5] < shares[0.25] < 0.97


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(branch_every=0), "branch every 0 is less than 1"),
        (dict(cache_every=-2), "cache every -2 is less than 1"),
        (dict(branch_every=2, cache_every=3), "branch every 2 has no effect: cache every 3"),
        (dict(merge_tokens=0.8), "merge tokens 0.8 is outside 0 .. 0.75"),
        (dict(merge_tokens=float("nan")), "merge tokens nan is outside"),
        (dict(bare=True, branch_every=2), "branch every 2 has no effect: a bare backbone"),
        (dict(reference=True, cache_every=2), "cache every 2 has no effect: the reference"),
    ],
)
def test_settings_that_cannot_be(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        generate(tiny, [REQUEST], Sampling(**settings))


def test_merging_without_attention_is_refused(tiny):
    config = replace(tiny.unet.config, transformer_layers=(0, 1))
    other = tiny.replace(unet=tiny.unet._replace(config=config))
    with pytest.raises(UserError, match="merge tokens 0.5 has no effect: the first level has no self-attention"):
        generate(other, [REQUEST], Sampling(merge_tokens=0.5))
