"""Pictures: equal to a plain loop over the PyTorch networks, and a function of their own request only."""

from dataclasses import replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bdm_jax.errors import UserError
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.denoiser import denoise
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline

PROMPTS = ("红灯笼", "一只猫", "雪山")


def pictures(pipeline, requests, *, batch_size=8, progress=None, **settings):
    settings = Sampling(**{"steps": 3, **settings})
    return np.stack(list(generate(pipeline, requests, settings, batch_size=batch_size, progress=progress)))


def assert_same(one, other):
    """uint8 pictures whose programs may differ in rounding."""
    assert one.shape == other.shape
    difference = np.abs(one.astype(int) - other.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.fixture
def plain_torch(tiny_folder, torch_nets):
    """BDM's sampling loop, spelled out with the libraries' own networks and scheduler."""
    nets = torch_nets

    def draw(pipeline, request, sampler, steps, guidance, noise):
        cls = {"ddim": diffusers.DDIMScheduler, "dpmpp-2m": diffusers.DPMSolverMultistepScheduler}[sampler]
        scheduler = cls.from_pretrained(tiny_folder / "scheduler", **({} if sampler == "ddim" else LINSPACE))
        scheduler.set_timesteps(steps)

        def states(tower, tokenizer, texts):
            return nets[tower](torch.from_numpy(tokenizer(texts).astype(np.int64))).last_hidden_state

        english = states("text_encoder", pipeline.tokenizer, [request.english_negative, request.english])
        chinese = states("branch_text_encoder", pipeline.branch_tokenizer, [request.negative, request.prompt])
        x = torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None]
        hint = torch.zeros(2, 3, 8 * x.shape[2], 8 * x.shape[3])
        for t in scheduler.timesteps:
            both = torch.cat([x, x])
            down, mid = nets["branch"](both, t, chinese, hint, return_dict=False)
            prediction = nets["unet"](
                both, t, english, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample
            negative, positive = prediction.chunk(2)
            x = scheduler.step(negative + guidance * (positive - negative), t, x).prev_sample
        image = nets["vae"].decode(x / nets["vae"].config.scaling_factor).sample[0]
        return (image.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()

    return draw


LINSPACE = {"timestep_spacing": "linspace", "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m"])
@pytest.mark.parametrize(("english", "english_negative"), [("", ""), ("a cat", ""), ("film grain", "blurry")])
def test_picture_equals_the_plain_loop_in_pytorch(tiny, plain_torch, sampler, english, english_negative):
    request = Request("红灯笼", "低质量", english, english_negative, seed=5)
    size = (32, 48)
    ours = pictures(tiny, [request], sampler=sampler, steps=7, size=size)[0]
    noise = np.asarray(jax.random.normal(jax.random.key(5), (4, 6, 4)))
    assert_same(ours, plain_torch(tiny, request, sampler, 7, tiny.guidance, noise))


def test_picture_depends_on_its_request_only(tiny):
    requests = [Request(prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    together = pictures(tiny, requests, batch_size=2)
    np.testing.assert_array_equal(pictures(tiny, requests, batch_size=2), together)
    # in another row of a batch some processors round otherwise, as in programs of another size
    assert_same(pictures(tiny, requests[::-1], batch_size=2)[::-1], together)
    assert_same(pictures(tiny, [requests[2], requests[0]], batch_size=2), together[[2, 0]])
    for size in (1, 3):
        assert_same(pictures(tiny, requests, batch_size=size), together)
    assert len({picture.tobytes() for picture in together}) == 3


def test_long_neighbour_changes_nothing(tiny):
    short, long = Request("猫"), Request("雪夜屋檐下的红灯笼与一只狗", "低质量，模糊，变形，多余的手指")
    assert_same(pictures(tiny, [short, long, short])[[0, 2]], pictures(tiny, [short, short]))


def test_every_part_of_a_request_counts(tiny):
    base = Request("红灯笼", seed=1)
    others = dict(prompt="猫", negative="低质量", english="a cat", english_negative="blurry", seed=2)
    drawn = [
        pictures(tiny, [replace(base, **change)])[0].tobytes() for change in [{}, *({k: v} for k, v in others.items())]
    ]
    assert len(set(drawn)) == len(drawn)


def test_one_english_prompt_for_both_halves_is_exact(tiny, monkeypatch):
    """The shared encoder pass gives what two equal passes give."""
    request = Request("红灯笼", "低质量", english="film grain", english_negative="film grain", seed=3)
    shared = pictures(tiny, [request])
    monkeypatch.setattr(module.np, "array_equal", lambda *_: False)
    assert_same(pictures(tiny, [request]), shared)


def test_bare_backbone(tiny):
    bare = tiny.without_bridge()
    expected = pictures(bare, [Request("", english="a cat", english_negative="blurry")])
    for request in (
        Request("a cat", "blurry"),
        Request("红灯笼", "低质量", english="a cat", english_negative="blurry"),
    ):
        np.testing.assert_array_equal(pictures(tiny, [request], bare=True), expected)
        np.testing.assert_array_equal(pictures(bare, [request]), expected)
    assert pictures(tiny, [Request("", english="a cat", english_negative="blurry")]).tobytes() != expected.tobytes()


def test_zero_branch_is_the_backbone(tiny):
    zero = {k: jnp.zeros_like(v) if k.startswith("controlnet_") else v for k, v in tiny.branch.params.items()}
    silent = tiny.replace(branch=Component(tiny.branch.config, zero))
    request = Request("红灯笼", english="a cat", english_negative="blurry")
    assert_same(pictures(silent, [request]), pictures(tiny, [request], bare=True))


def test_only_sizes_compile_anew(tiny):
    """Prompts, seeds, guidance, steps, sampler: one program."""
    pictures(tiny, [Request("红灯笼")])
    programs = denoise.count()
    pictures(tiny, [Request("猫", "低质量", seed=9)], guidance=1.5)
    pictures(tiny, [Request("猫")], steps=11)
    pictures(tiny, [Request("猫")], sampler="ddim", steps=2)
    assert denoise.count() == programs
    pictures(tiny, [Request("猫")], size=(40, 32))
    assert denoise.count() == programs + 1


def test_progress_counts_every_step(tiny):
    seen = []
    pictures(tiny, [Request("猫")] * 3, batch_size=2, steps=7, progress=lambda *counts: seen.append(counts))
    assert seen == [(0, 14), (5, 14), (7, 14), (12, 14), (14, 14)]


def test_pictures_come_as_they_are_done(tiny):
    seen = []
    drawing = generate(
        tiny, [Request("猫")] * 2, Sampling(steps=2), batch_size=1, progress=lambda done, _: seen.append(done)
    )
    assert seen == [] and next(drawing).dtype == np.uint8 and seen == [0, 2]


def test_default_size_is_the_unets(tiny):
    assert pictures(tiny, [Request("猫")]).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(requests=[]), "no prompts"),
        (dict(sampler="dppm-2m"), "unknown sampler 'dppm-2m': did you mean 'dpmpp-2m'"),
        (dict(size=(32, 36)), "size 36x32: .* multiples of 8, .* try 32x32"),
        (dict(size=(0, 32)), "size 32x0: .* try 32x8"),
        (dict(steps=0), "steps 0 is less than 1"),
        (dict(steps=1001), "steps 1001"),
        (dict(guidance=float("nan")), "guidance nan"),
        (dict(batch_size=0), "batch size 0"),
        (dict(requests=[Request("猫", seed=2**32)]), "seed 4294967296"),
        (dict(requests=[Request("猫", seed=-2)]), "seed -2"),
    ],
)
def test_settings_that_cannot_be(tiny, settings, message):
    requests, batch_size = settings.pop("requests", [Request("猫")]), settings.pop("batch_size", 8)
    with pytest.raises(UserError, match=message):  # at once, not at the first picture
        generate(tiny, requests, Sampling(**settings), batch_size=batch_size)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_nan_is_an_error_not_a_black_picture(tiny, part):
    config, params = getattr(tiny, part)
    key = "conv_in.bias" if part == "unet" else "decoder.conv_in.bias"
    broken = tiny.replace(**{part: Component(config, {**params, key: params[key].at[0].set(jnp.nan)})})
    with pytest.raises(UserError, match="'红灯笼' came out as NaN"):
        pictures(broken, [Request("红灯笼")])


def test_half_precision_weights_draw(tiny_folder, tiny):
    half = BridgePipeline.from_pretrained(tiny_folder, dtype="bfloat16")
    drawn, full = pictures(half, [Request("红灯笼")]), pictures(tiny, [Request("红灯笼")])
    assert np.abs(drawn.astype(int) - full).mean() < 16  # bfloat16 keeps three digits
