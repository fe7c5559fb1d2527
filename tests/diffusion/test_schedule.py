"""Noise schedule and targets against diffusers' DDPMScheduler."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.diffusion.scheduler_config import from_json, to_json

SCHEDULES = [
    DiscreteSchedule(),
    DiscreteSchedule(num_train_timesteps=400, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    DiscreteSchedule(prediction_type="v_prediction", steps_offset=0, set_alpha_to_one=True),
    DiscreteSchedule(prediction_type="sample"),
    DiscreteSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True),
]


@pytest.fixture(params=SCHEDULES, ids=["sd15", "linear", "v", "sample", "zero SNR"])
def schedule(request):
    return request.param


@pytest.fixture
def reference(schedule):
    return DDPMScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        rescale_betas_zero_snr=schedule.rescale_betas_zero_snr,
    )


@pytest.fixture
def sample(schedule, rng):
    """Clean latents, noise and timesteps; both ends of the schedule are among them."""
    x0, noise = rng.standard_normal((2, 5, 3, 4, 2), dtype=np.float32)
    t = rng.integers(0, schedule.num_train_timesteps, 5)
    t[:2] = 0, schedule.num_train_timesteps - 1
    return x0, noise, t


def test_alphas_equal_diffusers(schedule, reference):
    """1e-5: diffusers multiplies a thousand factors in fp32, we in fp64. Near zero SNR it subtracts them, too."""
    rtol, atol = (1e-3, 1e-7) if schedule.rescale_betas_zero_snr else (1e-5, 0)
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=rtol, atol=atol)


def test_noisy_latents_equal_diffusers(schedule, reference, sample, assert_parity):
    x0, noise, t = sample
    expected = reference.add_noise(*map(torch.from_numpy, sample))
    assert_parity(schedule.add_noise(x0, noise, t), expected, tolerance=1e-5)


def test_target_equals_diffusers(schedule, reference, sample, assert_parity):
    x0, noise, t = sample
    velocity = reference.get_velocity(*map(torch.from_numpy, sample)).numpy()
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[schedule.prediction_type]
    assert_parity(schedule.target(x0, noise, t), expected, tolerance=1e-5)


def test_the_target_leads_back_to_the_clean_latents(schedule, sample, assert_parity):
    x0, noise, t = sample
    alpha, sigma = schedule.alpha_sigma(t)
    recovered = schedule.to_x0(schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t), alpha, sigma)
    assert_parity(recovered, x0, tolerance=1e-4)  # epsilon divides by an alpha of 0.07 at the noisy end


def test_scheduler_config_survives_diffusers(schedule):
    assert from_json(dict(DDIMScheduler.from_config(to_json(schedule)).config)) == schedule


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values, named):
    with pytest.raises(ValueError, match=named):
        from_json({**to_json(DiscreteSchedule()), **values})
