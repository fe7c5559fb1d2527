"""Systems whose schedule or default sampler is another than SD1.5's, drawn whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bdm_jax.app.metadata import restore
from bdm_jax.app.runs import describe_all
from bdm_jax.diffusion.edm import EDMSchedule
from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.errors import UserError
from bdm_jax.latents.autoencoder import encode
from bdm_jax.sampling.generate import generate, resolve
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.families import FAMILIES
from bdm_jax.text.encode import tokenize

SIZE = (32, 48)
REQUEST = Request("红灯笼", "低质量", "film grain", "blurry", seed=5)
STEPS = 5


def test_edm_draws_as_the_papers_sampler_does(tiny, torch_nets, latents, plain, assert_parity):
    """Karras et al.'s Euler sampler with guidance, around PyTorch's networks; 1e-4: fp32 on both sides."""
    schedule = EDMSchedule(sigma_max=20.0, time_scale=0.25, prediction_type="v_prediction")
    sd = schedule.sigma_data

    def states(encoder, tokenizer, texts):
        return torch_nets[encoder](torch.from_numpy(tokenize(tokenizer, texts)[:, 0].astype(np.int64)))

    english = states("text_encoder", tiny.tokenizer, ["blurry", "film grain"]).last_hidden_state
    chinese = states("branch_text_encoder", tiny.branch_tokenizer, ["低质量", "红灯笼"]).last_hidden_state
    low, high = 0.002 ** (1 / 7), 20.0 ** (1 / 7)
    sigmas = np.append((high + np.linspace(0, 1, STEPS) * (low - high)) ** 7, 0.0)
    x = plain.noise(REQUEST.seed) * sigmas[0]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        st = np.sqrt(sigma**2 + sd**2)
        both, t = torch.cat([x, x]).float() / st, torch.tensor(0.25 * np.log(sigma), dtype=torch.float32)
        down, mid = torch_nets["branch"](both, t, chinese, torch.zeros(2, 3, *SIZE), return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        negative, positive = torch_nets["unet"](both, t, english, **residuals).sample.chunk(2)
        f = -(negative + 3.0 * (positive - negative))
        denoised = (sd / st) ** 2 * x + sigma * sd / st * f
        x = x + (following - sigma) * (x - denoised) / sigma
    pipeline = tiny.replace(schedule=schedule)
    assert_parity(latents([REQUEST], pipeline, steps=STEPS, sampler="euler"), x.numpy(), 1e-4)


def test_edm_over_an_image_with_next_to_no_noise_is_the_image(tiny, latents, assert_parity, rng):
    """Data is divided by sigma_data on its way in and multiplied on its way out; sigma is a thousandth of it."""
    pipeline = tiny.replace(schedule=EDMSchedule(sigma_data=0.1, sigma_min=1e-5, sigma_max=1e-4))
    image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    kept = latents([replace(REQUEST, image=image)], pipeline, steps=2, sampler="euler", strength=0.5)
    assert_parity(np.moveaxis(kept, 1, -1), encode(tiny.vae, image[None]), 0.02)


def test_the_systems_own_sampler_is_drawn_with_and_recorded(tiny, latents, monkeypatch):
    row = replace(FAMILIES["sd15"], sampler="euler-leading")
    schedule = DiscreteSchedule(
        num_train_timesteps=1100, beta_end=0.014, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    kolors = replace(tiny, family=row, schedule=schedule)
    assert resolve(kolors, Sampling()).sampler == "euler-trailing"
    assert resolve(tiny, Sampling()) == Sampling(sampler="dpmpp-2m", guidance=3.0)
    assert resolve(kolors, Sampling(sampler="lms", guidance=2.0)) == Sampling(sampler="lms", guidance=2.0)
    assert resolve(kolors, Sampling(reference=True)).sampler == "dpmpp-2m"
    own = latents([REQUEST], kolors)
    np.testing.assert_array_equal(own, latents([REQUEST], kolors, sampler="euler-trailing"))
    assert np.abs(own - latents([REQUEST], kolors, sampler="dpmpp-2m")).max() > 1e-3
    (values,) = describe_all(kolors, [REQUEST], Sampling(), {})
    assert (values["sampler"], values["guidance"]) == ("euler-trailing", 3.0)
    assert restore(values)[1].sampler == "euler-trailing"


def test_the_references_sampler_may_be_named(tiny):
    """Images of ours say which it was, and are drawn again with what they say."""
    (drawn,) = generate(tiny, [REQUEST], Sampling(2, size=SIZE, reference=True))
    (again,) = generate(tiny, [REQUEST], Sampling(2, "dpmpp-2m", size=SIZE, reference=True))
    np.testing.assert_array_equal(again, drawn)
    with pytest.raises(UserError, match="sampler ddim has no effect: the reference"):
        generate(tiny, [REQUEST], Sampling(2, "ddim", reference=True))


def test_more_steps_than_timesteps_are_refused_by_the_schedule(tiny):
    with pytest.raises(UserError, match="steps 1101 is outside 1 .. 1100"):
        generate(tiny.replace(schedule=DiscreteSchedule(1100)), [REQUEST], Sampling(1101, "euler"))
