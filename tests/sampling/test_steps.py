"""Strengths, intervals, guess mode, two guidances, clip skip, images and masks, the second pass, the reference mode:
each against the same thing spelled out with diffusers' and transformers' own networks and schedulers.
"""

import sys
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from bdm_jax.diffusion.samplers import SAMPLERS
from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.diffusion.scheduler_config import to_json
from bdm_jax.errors import UserError
from bdm_jax.images.decode import resize_to_cover
from bdm_jax.latents.autoencoder import encode
from bdm_jax.models import functional
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.denoiser import PredictionPlan, denoise
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.sampling.steps import Guidance
from bdm_jax.systems.components import Component
from bdm_jax.text.encode import tokenize
from bdm_jax.text.windows import join

TOLERANCE = 1e-4  # fp32 on both sides, of the largest latent
SIZE = (32, 48)
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)
TOP = np.repeat(np.uint8([255, 0]), [8, 56])[:, None].repeat(8, axis=1)  # a mask, white at the top
CUT_OFF = replace(REQUEST, image=np.zeros((64, 8, 3), np.uint8), mask=TOP)
STRENGTHS = (0.3, -1.0, 2.0, 0.7, 1.5)  # the tiny branch adds to four skips and the middle


def test_strength_of_the_branch_and_of_each_residual(latents, plain, assert_parity):
    ours = latents([REQUEST], branch_strength=0.6, residual_strengths=STRENGTHS)
    assert_parity(ours, plain(scale=lambda i: 0.6 * np.array(STRENGTHS)), TOLERANCE)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.3, 1.0), (1 / 3, 0.7)])
def test_start_and_end_of_the_branch(latents, plain, assert_parity, start, end):
    ours = latents([REQUEST], branch_start=start, branch_end=end)

    def gate(i):
        return 0.0 if i / 6 < start or (i + 1) / 6 > end else 1.0

    assert_parity(ours, plain(scale=gate), TOLERANCE)


def test_a_silent_branch_is_the_bare_backbone(latents):
    bare = latents([REQUEST], bare=True)
    np.testing.assert_allclose(latents([REQUEST], branch_strength=0.0), bare, atol=1e-5)
    np.testing.assert_allclose(latents([REQUEST], branch_start=0.99), bare, atol=1e-5)


def test_guess_mode(latents, plain, assert_parity):
    """The negative half has no residuals; diffusers' own guess mode scales those of the positive one."""
    assert_parity(latents([REQUEST], guess=True), plain(guess=True), TOLERANCE)
    assert_parity(latents([REQUEST], guess=True, guidance=1.0), plain(guess=True, guide=_positive), TOLERANCE)


def _positive(i, predict):
    return predict(1, 1)


def test_each_language_has_its_guidance(latents, plain, assert_parity):
    def guide(i, predict):
        neither, english, both = predict(0, 0), predict(1, 0), predict(1, 1)
        return neither + 2.0 * (english - neither) + 5.0 * (both - english)

    assert_parity(latents([REQUEST], guidance=5.0, english_guidance=2.0), plain(guide=guide), TOLERANCE)
    equal = latents([REQUEST], guidance=3.0, english_guidance=3.0)
    assert_parity(equal, latents([REQUEST], guidance=3.0), TOLERANCE)
    one_english = replace(REQUEST, english_negative=REQUEST.english)
    np.testing.assert_array_equal(latents([one_english], english_guidance=9.0), latents([one_english]))


def test_no_guidance_takes_the_positive_prompts_alone(latents, plain, assert_parity):
    ours = latents([REQUEST], guidance=1.0)
    assert_parity(ours, plain(guide=_positive), TOLERANCE)
    np.testing.assert_array_equal(
        ours, latents([replace(REQUEST, negative="猫", english_negative="cat")], guidance=1.0)
    )


def test_guidance_interval(latents, plain, assert_parity):
    def guide(i, predict):
        return plain.classifier_free(predict, 3.0) if 2 <= i < 5 else predict(1, 1)

    assert_parity(latents([REQUEST], guidance_start=2 / 6, guidance_end=0.9), plain(guide=guide), TOLERANCE)


def test_interleaved_guidance_is_rows_of_the_table(latents, plain, assert_parity, monkeypatch):
    """As SuTI's and Re-Imagen's: rows with other predictions than their neighbours, of whatever texts and weights."""
    english = Guidance(PredictionPlan.of({"backbone": (0, 1), "branch": (1, 1)}), (1 - 4.0, 4.0))
    chinese = Guidance(PredictionPlan.of({"backbone": (1, 1, 1), "branch": (0, 1, 0)}), (1 - 2.5, 2.0, 0.5))
    monkeypatch.setattr(module, "guidance_rows", lambda *_: [english, chinese, chinese, english, chinese, english])

    def guide(i, predict):
        both = predict(1, 1)
        if i in (0, 3, 5):
            return both + 3.0 * (both - predict(0, 1))
        return both + 1.0 * (both - predict(1, 0))

    assert_parity(latents([REQUEST]), plain(guide=guide), TOLERANCE)


def test_guidance_rescale(latents, plain, assert_parity):
    def guide(i, predict):
        return rescale_noise_cfg(plain.classifier_free(predict, 3.0), predict(1, 1), 0.7)

    assert_parity(latents([REQUEST], guidance_rescale=0.7), plain(guide=guide), TOLERANCE)


def test_clip_skip(tiny, latents, plain, assert_parity, tmp_path, seed):
    """Layer 2 from the end with the final norm, as web UIs have it (diffusers' clip_skip=1)."""
    config = replace(tiny.text_encoder.config, num_hidden_layers=3)
    tower = Component(config, functional.init(config, seed))
    pipeline = tiny.replace(text_encoder=tower)
    pipeline.save_pretrained(tmp_path, "float32")
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    ids = tokenize(tiny.tokenizer, [REQUEST.english_negative, REQUEST.english])[:, 0].astype(np.int64)
    hidden = theirs(torch.from_numpy(ids), output_hidden_states=True).hidden_states[-2]
    norm = getattr(theirs, "text_model", theirs).final_layer_norm
    skipped = latents([REQUEST], pipeline, clip_skip=2)
    assert_parity(skipped, plain(english=norm(hidden)), TOLERANCE)
    assert np.abs(skipped - latents([REQUEST], pipeline)).max() > 1e-3


@pytest.fixture
def picture(rng):
    return rng.integers(0, 256, (*SIZE, 3), np.uint8)


@pytest.mark.parametrize(("strength", "begin"), [(0.5, 3), (0.99, 1), (0.2, 5), (1.0, 0)])
def test_image_to_image(tiny, torch_nets, latents, plain, assert_parity, picture, strength, begin):
    clean = _clean(torch_nets, picture)
    ours = latents([replace(REQUEST, image=picture)], strength=strength)
    assert_parity(ours, plain(clean=clean, begin=begin), TOLERANCE)
    assert_parity(np.moveaxis(np.asarray(encode(tiny.vae, picture[None])), -1, 1), clean.numpy(), TOLERANCE)


def _clean(nets, picture):
    pixels = torch.from_numpy(np.moveaxis(picture, -1, 0).astype(np.float32) / 127.5 - 1)[None]
    return nets["vae"].encode(pixels).latent_dist.mean * nets["vae"].config.scaling_factor


def test_inpainting(torch_nets, latents, plain, assert_parity, picture, tiny):
    """After each step the kept part is the picture with the noise of the level reached (diffusers' own blend)."""
    mask = np.zeros(SIZE, np.uint8)
    mask[8:24, 16:40] = 255
    cells = torch.from_numpy(mask[::8, ::8] / np.float32(255))[None, None]
    clean, noise = _clean(torch_nets, picture), plain.noise(REQUEST.seed)

    def after(x, i, scheduler):
        rest = scheduler.timesteps[2:][i + 1 :]
        kept = scheduler.add_noise(clean, noise, rest[:1]) if len(rest) else clean
        return cells * x + (1 - cells) * kept

    request = replace(REQUEST, image=picture, mask=mask)
    theirs = plain(clean=clean, begin=2, after=after, cls=diffusers.DDIMScheduler, timestep_spacing="leading")
    assert_parity(latents([request], strength=0.67, sampler="ddim"), theirs, TOLERANCE)
    (drawn,) = generate(tiny, [request], Sampling(6, "ddim", strength=0.67))
    assert np.array_equal(drawn[mask == 0], picture[mask == 0])
    assert np.abs(drawn[mask > 0].astype(int) - picture[mask > 0]).mean() > 5


@pytest.fixture
def their_pipeline(torch_nets, plain, monkeypatch):
    """A function from a class of diffusers' pipelines to the latents that it draws with the bare backbone and REQUEST's
    noise, the image's latents being their mean.
    """

    def draw(cls, picture, strength, scheduler=diffusers.DPMSolverMultistepScheduler, **more):
        noise = plain.noise(REQUEST.seed)
        monkeypatch.setattr(sys.modules[cls.__module__], "randn_tensor", lambda *_, **__: noise)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
        scheduler = scheduler.from_config(to_json(DiscreteSchedule(prediction_type="v_prediction")))
        parts = {"vae": torch_nets["vae"], "unet": torch_nets["unet"], "scheduler": scheduler}
        absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        pipeline = cls(**parts, **dict.fromkeys(absent), requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        negative, positive = plain.english(REQUEST)[:, None]
        settings = {"guidance_scale": 3.0, "num_inference_steps": 6, "output_type": "latent", "strength": strength}
        texts = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        return pipeline(image=Image.fromarray(picture), **texts, **settings, **more).images.numpy()

    return draw


@pytest.mark.parametrize(("sampler", "strength"), [("ddim", 1.0), ("dpmpp-2m", 1.0), ("euler", 1.0), ("euler", 0.67)])
def test_inpainting_equals_diffusers_pipeline(latents, their_pipeline, assert_parity, picture, strength, sampler):
    """At a strength of 1 from noise alone."""
    mask = np.zeros(SIZE, np.uint8)
    mask[8:24, 16:40] = 255
    scheduler = {
        "ddim": diffusers.DDIMScheduler,
        "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
    }[sampler]
    more = {"mask_image": Image.fromarray(mask), "height": SIZE[0], "width": SIZE[1]}
    theirs = their_pipeline(diffusers.StableDiffusionInpaintPipeline, picture, strength, scheduler, **more)
    request = replace(REQUEST, image=picture, mask=mask)
    ours = latents([request], bare=True, strength=strength, sampler=f"{sampler}-leading")
    assert_parity(ours, theirs, TOLERANCE)


def test_image_to_image_of_full_strength_equals_diffusers_pipeline(latents, their_pipeline, assert_parity, picture):
    """It begins from the image with the most noise, not from noise alone."""
    theirs = their_pipeline(diffusers.StableDiffusionImg2ImgPipeline, picture, 1.0)
    request = replace(REQUEST, image=picture)
    assert_parity(latents([request], bare=True, strength=1.0, sampler="dpmpp-2m-leading"), theirs, TOLERANCE)


@pytest.mark.parametrize("mask", [None, np.full(SIZE, 255, np.uint8)])
def test_no_step_left_keeps_the_image(tiny, torch_nets, latents, assert_parity, picture, mask):
    """The original through the autoencoder. (diffusers answers with no image at all, or an error.)"""
    request = replace(REQUEST, image=picture, mask=mask)
    with pytest.warns(UserWarning, match="strength 0.15 of 6 steps leaves none to take: the image is kept"):
        ours = latents([request], strength=0.15)
    clean = _clean(torch_nets, picture)
    assert_parity(ours, clean.numpy(), TOLERANCE)
    decoded = torch_nets["vae"].decode(clean / torch_nets["vae"].config.scaling_factor).sample[0].numpy()
    expected = np.moveaxis(decoded, 0, -1).clip(-1, 1) * 127.5 + 127.5
    counts = []
    (drawn,) = generate(tiny, [request], Sampling(6, strength=0), progress=lambda *done: counts.append(done))
    assert np.abs(drawn - expected).max() <= 1 and counts == [(0, 0)]
    (enlarged,) = generate(tiny, [REQUEST], Sampling(2, size=(16, 16), hires=2, hires_strength=0))
    assert enlarged.shape == (32, 32, 3)


def test_a_mask_of_all_white_is_image_to_image(latents, picture):
    request = replace(REQUEST, image=picture)
    masked = replace(request, mask=np.full(SIZE, 255, np.uint8))
    np.testing.assert_allclose(latents([masked]), latents([request]), atol=1e-5)


def test_second_pass_draws_over_the_enlarged_first(tiny):
    first, second = Sampling(4, size=SIZE), Sampling(4, hires=1.5, hires_strength=0.6, size=SIZE)
    (small,) = generate(tiny, [REQUEST], first)
    counts = []
    (large,) = generate(tiny, [REQUEST], second, progress=lambda done, total: counts.append((done, total)))
    assert large.shape == (48, 72, 3) and counts[0] == (0, 6) and counts[-1] == (6, 6)
    over = replace(REQUEST, image=resize_to_cover(small, (48, 72)))
    (expected,) = generate(tiny, [over], Sampling(4, size=(48, 72), strength=0.6))
    np.testing.assert_array_equal(large, expected)


def test_images_of_files_and_their_sizes(tiny, tmp_path, picture):
    path, mask = tmp_path / "照片.png", tmp_path / "mask.png"
    Image.fromarray(picture[:29]).save(path)
    Image.new("L", (48, 29), 255).save(mask)
    drawn = list(generate(tiny, [replace(REQUEST, image=path, mask=mask), REQUEST], Sampling(2, strength=0.5)))
    assert [one.shape for one in drawn] == [(24, 48, 3), (32, 32, 3)]
    (sized,) = generate(tiny, [replace(REQUEST, image=str(path))], Sampling(2, size=(16, 16)))
    assert sized.shape == (16, 16, 3)


def test_masked_padding_has_no_effect(tiny, latents):
    """With the mask, no [PAD] state reaches anything: its embedding may be what it likes."""
    config, params = tiny.branch_text_encoder
    key = "embeddings.word_embeddings.embedding"
    key = next(path for path in params if path.endswith(key))
    pad = tiny.branch_tokenizer.pad
    other = tiny.replace(branch_text_encoder=Component(config, {**params, key: params[key].at[pad].multiply(-3.0)}))
    np.testing.assert_allclose(latents([REQUEST], other, masked=True), latents([REQUEST], masked=True), atol=1e-5)
    assert np.abs(latents([REQUEST], other) - latents([REQUEST])).max() > 1e-3
    trained_so = tiny.replace(masked=True)
    np.testing.assert_array_equal(latents([REQUEST], trained_so), latents([REQUEST], masked=True))


def test_masked_is_kept_with_the_model(tiny, tmp_path):
    tiny.replace(masked=True).save_pretrained(tmp_path, "float32")
    assert type(tiny).from_pretrained(tmp_path).masked and not tiny.masked


def test_reference_mode(tiny, torch_nets, latents, plain, assert_parity):
    """Two prompts of different length in one batch: one draw of noise from PyTorch's generator with the first seed,
    windows padded to the longest, weights without effect on the Chinese side, the last sigma that of timestep 0.
    """
    requests = [replace(REQUEST, prompt="(猫:1.4)"), replace(REQUEST, prompt="红" * 20, seed=9)]
    ours = latents(requests, reference=True)
    noise = torch.randn((2, 4, SIZE[0] // 8, SIZE[1] // 8), generator=torch.Generator("cpu").manual_seed(REQUEST.seed))
    tower, tokenizer = torch_nets["branch_text_encoder"], tiny.branch_tokenizer
    windows = tokenize(tokenizer, ["猫", "红" * 20, REQUEST.negative])
    assert windows.shape[1] == 2
    states = tower(torch.from_numpy(windows.reshape(-1, windows.shape[-1]).astype(np.int64))).last_hidden_state
    joined = torch.from_numpy(np.asarray(join(states.reshape(3, 2, *states.shape[1:]).numpy())).copy())
    for i in range(2):
        chinese = joined[[2, i]]

        def patched(ids, chinese=chinese):
            return type("Output", (), {"last_hidden_state": chinese})

        original, torch_nets["branch_text_encoder"] = torch_nets["branch_text_encoder"], patched
        try:
            theirs = plain(noise=noise[[i]], final_sigmas_type="sigma_min")
        finally:
            torch_nets["branch_text_encoder"] = original
        assert_parity(ours[[i]], theirs, TOLERANCE)


def test_controls_compile_nothing_anew(latents):
    latents([REQUEST], branch_strength=0.9, guidance_rescale=0.1)
    programs = denoise.count()
    latents([replace(REQUEST, negative="猫", seed=8)], branch_strength=0.5, residual_strengths=STRENGTHS)
    latents([REQUEST], guess=True, guidance=4.5, guidance_rescale=0.5)
    assert denoise.count() == programs


def test_previews_of_the_predicted_latents(tiny):
    seen = []

    def on_preview(done, predicted_x0):
        seen.append((done, predicted_x0.shape, np.isfinite(predicted_x0).all()))

    list(generate(tiny, [REQUEST] * 3, Sampling(7), batch_size=2, on_preview=on_preview, preview_every=3))
    assert seen == [(done, (count, 4, 4, 4), True) for count in (2, 1) for done in (3, 6)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(branch_strength=float("inf")), "branch strength inf is not a finite number"),
        (dict(english_guidance=float("nan")), "english guidance nan"),
        (dict(residual_strengths=(1.0, 2.0)), "2 residual strengths: the branch has 5 residuals"),
        (dict(branch_start=0.5, branch_end=0.5), "branch start 0.5 is not before branch end 0.5"),
        (dict(guidance_end=1.5), "guidance end 1.5 is outside 0 .. 1"),
        (dict(clip_skip=0), "clip skip 0 is less than 1"),
        (dict(steps="25"), "steps '25': expected a whole number"),
        (dict(steps=2.5), "steps 2.5: expected a whole number"),
        (dict(steps=True), "steps True: expected a whole number"),
        (dict(size=(32, 32.0)), r"size \(32, 32.0\): expected \(height, width\) in pixels"),
        (dict(size=32), "size 32: expected"),
        (dict(guidance="7"), "guidance '7': expected a number"),
        (dict(sampler=3), "sampler 3: expected a text"),
        (dict(bare="yes"), "bare 'yes': expected true or false"),
        (dict(masked=1.0), "masked 1.0: expected true or false"),
        (dict(residual_strengths=1.0), "residual strengths 1.0: expected a tuple"),
        (dict(batch_size=2.0), "batch size 2.0: expected a whole number"),
        (dict(batch_size="8"), "batch size '8': expected a whole number"),
        (dict(eta=0.5), "eta 0.5 has no effect: dpmpp-2m has no such setting"),
        (dict(eta=1.5, sampler="ddim"), "eta 1.5 is outside 0 .. 1"),
        (dict(timesteps=(9, 99)), "timesteps 9 99: expected falling numbers, as 999 749 499 249"),
        (dict(timesteps=(99.5, 9)), "timesteps 99.5: expected a whole number"),
        (dict(timesteps=(1000, 9)), "timestep 1000 is outside 0 .. 999"),
        (dict(timesteps=(99, 9), steps=3), "steps 3 has no effect: timesteps are 2 steps"),
        (dict(timesteps=(99, 9), sampler="pndm"), "timesteps 99 9 has no effect: pndm"),
        (dict(timesteps=(99, 9), sampler="euler-karras"), "timesteps 99 9 has no effect: euler-karras lays out"),
        (dict(timesteps=(99, 9), sigmas=(2.0, 0.0)), "timesteps and sigmas: give one"),
        (dict(sigmas=(2.0,)), "sigmas 2.0: expected falling numbers"),
        (dict(sigmas=(20.0, 2.0, 0.0)), "sigmas: 20 is above 14.6146, the most noise"),
        (dict(sigmas=(2.0, 0.0), sampler="ddim"), "sigmas 2.0 0.0 has no effect: ddim"),
        (dict(clip_skip=2), "clip skip 2 is outside 1 .. 1"),
        (dict(hires=0.5), "hires 0.5 is outside 1 .. 8"),
        (dict(bare=True, guess=True), "guess True has no effect: a bare backbone has no branch"),
        (dict(reference=True, sampler="ddim"), "sampler ddim has no effect: the reference"),
        (dict(request=replace(REQUEST, mask=np.zeros((4, 4), np.uint8))), "a mask without an image"),
        (
            dict(request=replace(REQUEST, image=np.zeros((8, 16, 3), np.uint8), mask=np.full((8, 8), 255, np.uint8))),
            "the mask has 8x8 pixels, the image 16x8",
        ),
        (dict(request=replace(REQUEST, image=np.zeros((8, 7, 3), np.uint8))), "7x8 pixels is too small"),
        (dict(request=replace(REQUEST, image="nowhere.png")), "nowhere.png: cannot be read"),
        (
            dict(request=replace(REQUEST, image=np.zeros((8, 8, 3), np.uint8), mask=np.ones((8, 8), np.uint8))),
            "the mask: nothing to repaint, its brightest value is 1 of 255",
        ),
        (dict(request=CUT_OFF, size=(8, 64)), "the mask, within the 64x8 that are drawn: nothing to repaint"),
    ],
)
def test_settings_that_cannot_be(tiny, settings, message):
    settings = dict(settings)
    request, batch_size = settings.pop("request", REQUEST), settings.pop("batch_size", 8)
    with pytest.raises(UserError, match=message):
        generate(tiny, [request], Sampling(**settings), batch_size=batch_size)


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(branch_strength=0.5), dict(branch_start=0.1), dict(branch_end=0.9), dict(residual_strengths=(1.0,) * 5)),
        *(dict(guess=True), dict(masked=False), dict(reference=True), dict(english_guidance=2.0), dict(branch_every=2)),
    ],
)
def test_settings_of_a_branch_where_there_is_none(tiny, settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"{name.replace('_', ' ')} .* has no effect: the model has no branch"):
        generate(tiny.without_bridge(), [REQUEST], Sampling(**settings))


def test_own_timesteps_and_fresh_noise(latents, plain, assert_parity):
    """Through all of sampling, and as many steps as there are timesteps."""
    spaced = tuple(int(t) for t in SAMPLERS["ddim"](DiscreteSchedule(), 6).t)
    ours = latents([REQUEST], timesteps=spaced, sampler="ddpm", steps=25)
    np.testing.assert_allclose(ours, latents([REQUEST], sampler="ddpm"), atol=1e-5)
    plainly = latents([REQUEST], sampler="ddim")
    assert_parity(plainly, plain(cls=diffusers.DDIMScheduler, timestep_spacing="leading"), TOLERANCE)
    assert np.abs(latents([REQUEST], sampler="ddim", eta=1.0) - plainly).max() > 1e-3


def test_pixels_that_are_clipped(tiny, latents):
    """As the model's schedule asks, by the samplers that clip; the others say that they do not."""
    clips = tiny.replace(schedule=replace(tiny.schedule, clip_sample=True, clip_sample_range=0.05))
    drawn = latents([REQUEST], clips, sampler="ddim")
    assert np.abs(drawn).max() < np.abs(latents([REQUEST], sampler="ddim")).max()
    with pytest.warns(UserWarning, match="dpmpp-2m does not clip samples as the model's scheduler_config.json asks"):
        generate(clips, [REQUEST], Sampling(6))
