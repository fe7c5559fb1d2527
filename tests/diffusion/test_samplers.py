"""Whole sampling trajectories against diffusers' schedulers, around a random linear model."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.guidance import classifier_free
from bdm_jax.diffusion.samplers import SAMPLERS, dpmpp_2m
from bdm_jax.diffusion.schedule import Schedule, to_json

COUNTS = (1, 2, 3, 5, 14, 15, 20, 30, 50)  # fewer than 15 steps end in first order; 3, 14, 15, 30 do not divide 1000
TOLERANCE = 1e-4  # fp32 on both sides, of the largest number in the trajectory


def dpm(config, **settings):
    return DPMSolverMultistepScheduler.from_config({**config, "timestep_spacing": "linspace", **settings})


CASES = {
    "ddim": (SAMPLERS["ddim"], DDIMScheduler.from_config),
    "dpmpp-2m": (SAMPLERS["dpmpp-2m"], dpm),
    "dpmpp-2m as in diffusers 0.24": (
        partial(dpmpp_2m, final_sigma_zero=False),
        partial(dpm, final_sigmas_type="sigma_min"),
    ),
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CASES)
def test_trajectory_equals_diffusers(name, prediction_type, rng):
    ours, theirs = CASES[name]
    schedule = Schedule(prediction_type=prediction_type)
    model = random_linear_model(rng)
    noise = rng.standard_normal((2, 3, 5, 4), dtype=np.float32)
    for count in COUNTS:
        reference = theirs(to_json(schedule))
        reference.set_timesteps(count)
        steps = ours(schedule, count)
        np.testing.assert_array_equal(steps.t, reference.timesteps.numpy())

        expected, x = [], torch.from_numpy(noise)
        for t in reference.timesteps:
            x = reference.step(torch.from_numpy(model(x.numpy(), int(t))), t, x).prev_sample
            expected.append(x.numpy())
        state, actual = samplers.start(noise), []
        for index in range(count):
            step = jax.tree.map(lambda column, index=index: column[index], steps)
            state = samplers.advance(state, model(np.asarray(state.latents), int(step.t)), step, schedule)
            actual.append(np.asarray(state.latents))
        expected, actual = np.stack(expected), np.stack(actual)
        assert np.isfinite(actual).all()
        difference = np.abs(actual - expected).max() / np.abs(expected).max()
        print(f"{count} steps: relative difference {difference:.1e}")
        assert difference <= TOLERANCE


@pytest.mark.parametrize("settings", [{"set_alpha_to_one": True}, {"steps_offset": 0}])
def test_ddim_follows_its_settings(settings, rng):
    schedule = Schedule(**settings)
    reference = DDIMScheduler.from_config(to_json(schedule))
    reference.set_timesteps(7)
    steps = SAMPLERS["ddim"](schedule, 7)
    np.testing.assert_array_equal(steps.t, reference.timesteps.numpy())
    x, prediction = rng.standard_normal((2, 1, 3, 5, 4), dtype=np.float32)
    last = jax.tree.map(lambda column: column[-1], steps)
    ours = samplers.advance(samplers.start(x), prediction, last, schedule).latents
    expected = reference.step(torch.from_numpy(prediction), reference.timesteps[-1], torch.from_numpy(x)).prev_sample
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_reference_timesteps_and_final_sigma():
    """bdm.md section 4: 999, 979, ... 40, 20, ending at sigma(t=0) = 0.02917, second order on the last step."""
    schedule = Schedule()
    steps = dpmpp_2m(schedule, 50, final_sigma_zero=False)
    assert list(steps.t[:3]) == [999, 979, 959] and list(steps.t[-2:]) == [40, 20]
    sigma = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    assert sigma[999] == pytest.approx(14.6147, abs=1e-4)
    assert sigma[0] == pytest.approx(0.02917, abs=5e-6)
    noise_kept = np.sqrt(1 - schedule.alphas_cumprod[0])
    assert steps.x[-1] * steps.sigma[-1] == pytest.approx(noise_kept, rel=1e-5)
    assert steps.previous[0] == 0 and steps.previous[-1] != 0


def test_a_compiled_scan_takes_the_same_steps(rng):
    """The sampler is used inside one compiled program: rows of the table are what lax.scan walks over."""
    schedule = Schedule()
    noise = rng.standard_normal((1, 4, 4, 4), dtype=np.float32)
    steps = SAMPLERS["dpmpp-2m"](schedule, 6)

    def advance(state, step):
        return samplers.advance(state, 0.5 * state.latents, step, schedule), None

    scanned, _ = jax.jit(lambda x: jax.lax.scan(advance, samplers.start(x), steps))(noise)
    state = samplers.start(noise)
    for index in range(6):
        state, _ = advance(state, jax.tree.map(lambda column, index=index: column[index], steps))
    np.testing.assert_allclose(scanned.latents, state.latents, rtol=1e-4, atol=1e-5)


def test_guidance_of_one_is_the_positive_prompt_and_more_goes_beyond_it(rng):
    negative, positive = rng.standard_normal((2, 2, 3, 3, 4), dtype=np.float32)
    np.testing.assert_allclose(classifier_free(negative, positive, 1.0), positive, atol=1e-6)
    np.testing.assert_allclose(
        classifier_free(negative, positive, 7.5), negative + 7.5 * (positive - negative), rtol=1e-5, atol=1e-5
    )


def random_linear_model(rng):
    """x -> x @ weight * gain(t) + bias: bounded, different in every channel and at every timestep."""
    weight = (0.5 * rng.standard_normal((4, 4))).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    return lambda x, t: x @ weight * np.float32(np.cos(t / 300)) + bias
