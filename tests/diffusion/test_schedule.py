"""Noise schedule and targets against diffusers' DDPMScheduler."""

import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.edm import EDMSchedule
from bdm_jax.diffusion.samplers import SAMPLERS, system_sampler
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
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values, named):
    with pytest.raises(ValueError, match=named):
        from_json({**to_json(DiscreteSchedule()), **values})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"final_sigmas_type": "sigma_min", "solver_order": 3}, "final_sigmas_type='sigma_min', solver_order=3"),
        ({"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        ({"variance_type": "fixed_large"}, "variance_type='fixed_large'"),
    ],
)
def test_what_is_asked_of_the_sampler_is_noted(values, named):
    with pytest.warns(UserWarning, match=f"{named} of its DDIMScheduler is not taken over; choose the sampler by name"):
        assert from_json({**to_json(DiscreteSchedule()), **values}) == DiscreteSchedule()


@pytest.mark.parametrize(
    "cls",
    [
        *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
        *("EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"),
        *("UniPCMultistepScheduler", "EDMEulerScheduler"),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_usual_settings_of_diffusers_schedulers_need_no_note(cls):
    kind = getattr(diffusers, cls)
    settings = {"clip_sample": False, "skip_prk_steps": True}  # as every model of latents has them
    settings = {name: value for name, value in settings.items() if name in inspect.signature(kind).parameters}
    schedule = from_json(json.loads(kind(**settings).to_json_string()))
    assert isinstance(schedule, EDMSchedule if cls == "EDMEulerScheduler" else DiscreteSchedule)


def test_clipping_survives_diffusers():
    schedule = DiscreteSchedule(clip_sample=True, clip_sample_range=2.0, thresholding=True, sample_max_value=3.0)
    assert from_json(dict(DDIMScheduler.from_config(to_json(schedule)).config)) == schedule


def test_draws_are_those_that_training_always_made():
    """Bit for bit: a run that is resumed goes on with the same timesteps."""
    keys, schedule = jax.random.split(jax.random.key(3), 4000), DiscreteSchedule()
    plain = jax.vmap(lambda key: jax.random.randint(key, (), 0, 1000))(keys)
    np.testing.assert_array_equal(jax.vmap(schedule.draw)(keys), plain)
    later = jax.vmap(lambda key: jnp.minimum(jnp.int32(1000 * jnp.sqrt(jax.random.uniform(key))), 999))(keys)
    drawn = np.asarray(jax.vmap(lambda key: schedule.draw(key, "later"))(keys))
    np.testing.assert_array_equal(drawn, later)
    assert (drawn >= 500).mean() == pytest.approx(0.75, abs=0.03)


# ------------------------------------------------------------- Kolors: 1,100 timesteps (related-systems.md, 3.1)

KOLORS = DiscreteSchedule(num_train_timesteps=1100, beta_end=0.014)
KOLORS_FILE = {  # scheduler_config.json, as five independent copies have it
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.014,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "num_train_timesteps": 1100,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def test_kolors_noise():
    base, squared = DiscreteSchedule().alphas_cumprod, KOLORS.alphas_cumprod
    assert from_json(KOLORS_FILE) == KOLORS
    assert base[-1] == pytest.approx(4.6601e-3, rel=1e-4) and squared[-1] == pytest.approx(1.1827e-3, rel=1e-4)
    assert KOLORS.span[1] == pytest.approx(29.0612, abs=1e-4)
    assert DiscreteSchedule().span[1] == pytest.approx(14.6146, abs=1e-4)
    assert (np.diff(squared) < 0).all()
    assert np.abs(np.sqrt(squared[:1000]) - np.sqrt(base)).max() == pytest.approx(0.00313, abs=1e-5)
    naive = DiscreteSchedule(num_train_timesteps=1100).alphas_cumprod[-1], squared[-1]
    assert naive[0] > naive[1]


@pytest.mark.parametrize(
    ("count", "first", "last", "sigmas"),
    [
        (50, [1079, 1057], [23, 1], [25.2813, 21.7838, 18.8547, 0.1483, 0.0413]),
        (25, [1057, 1013], [45, 1], [21.7838]),
    ],
)
def test_kolors_steps(count, first, last, sigmas):
    steps = SAMPLERS["euler-leading"](KOLORS, count)
    assert (list(steps.t[:2]), list(steps.t[-2:])) == (first, last)
    k = steps.sigma / steps.alpha
    picked = k[[0, 1, 2, -2, -1]] if len(sigmas) == 5 else k[:1]
    np.testing.assert_allclose(picked, sigmas, atol=1e-4)
    assert (steps.initial == 1).all()  # k-diffusion's sqrt(sigma^2 + 1) = 25.3011 times alpha
    assert SAMPLERS["euler-trailing"](KOLORS, 50).t[0] == 1099  # which leading steps never visit
    assert (1 / steps.alpha[0]) == pytest.approx(np.sqrt(sigmas[0] ** 2 + 1), abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_kolors_trajectory_equals_diffusers(count, rng, assert_parity):
    """fp32 on both sides, around a nonlinear model."""
    scheduler = EulerDiscreteScheduler.from_config(KOLORS_FILE)
    scheduler.set_timesteps(count)
    noise = rng.standard_normal((2, 3, 5, 4), dtype=np.float32)
    steps = SAMPLERS[system_sampler("euler-leading", from_json(KOLORS_FILE))](KOLORS, count)
    np.testing.assert_array_equal(steps.t, scheduler.timesteps.numpy())
    state, x = samplers.start(noise, steps), torch.from_numpy(noise) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        row = jax.tree.map(lambda column, i=i: column[i], steps)
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(scaled + 0.1), t, x).prev_sample
        state = samplers.advance(state, np.tanh(np.asarray(state.latents) + np.float32(0.1)), row, noise)
    assert_parity(state.latents, x.numpy(), tolerance=1e-4)


def test_the_files_spacing_is_the_systems():
    """Of a system whose own sampler names a spacing; samplers that users name have their own."""
    trailing = from_json({**KOLORS_FILE, "timestep_spacing": "trailing"})
    assert to_json(trailing)["timestep_spacing"] == "trailing"
    assert system_sampler("euler-leading", trailing) == "euler-trailing"
    assert system_sampler("euler-leading", KOLORS) == "euler-leading"
    assert system_sampler("dpmpp-2m", trailing) == "dpmpp-2m"
    with pytest.raises(ValueError, match="timestep_spacing='sideways'"):
        from_json({**KOLORS_FILE, "timestep_spacing": "sideways"})
