"""Strengths, intervals, guess mode, two guidances, clip skip, images and masks, the second pass, the reference mode:
each against the same thing spelled out with diffusers' and transformers' own networks and schedulers.
"""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

from bdm_jax.errors import UserError
from bdm_jax.images.decode import resize_to_cover
from bdm_jax.latents.autoencoder import encode
from bdm_jax.models import functional
from bdm_jax.sampling import generate as module
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
        (dict(clip_skip=2), "clip skip 2 is outside 1 .. 1"),
        (dict(hires=0.5), "hires 0.5 is outside 1 .. 8"),
        (dict(bare=True, guess=True), "guess True has no effect: a bare backbone has no branch"),
        (dict(reference=True, sampler="ddim"), "sampler ddim has no effect: the reference"),
        (dict(request=replace(REQUEST, mask=np.zeros((4, 4), np.uint8))), "a mask without an image"),
        (
            dict(request=replace(REQUEST, image=np.zeros((8, 16, 3), np.uint8), mask=np.zeros((8, 8), np.uint8))),
            "the mask has 8x8 pixels, the image 16x8",
        ),
        (dict(request=replace(REQUEST, image=np.zeros((8, 7, 3), np.uint8))), "7x8 pixels is too small"),
        (dict(request=replace(REQUEST, image="nowhere.png")), "nowhere.png: cannot be read"),
        (dict(request=replace(REQUEST, image=np.zeros((8, 8, 3), np.uint8)), steps=3, strength=0.2), "leaves none"),
    ],
)
def test_settings_that_cannot_be(tiny, settings, message):
    request = settings.pop("request", REQUEST)
    with pytest.raises(UserError, match=message):
        generate(tiny, [request], Sampling(**settings))
