"""EDM's schedule against the paper's algorithms in numpy, against diffusers' EDM scheduler, and by its own algebra."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from scipy import stats

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.edm import EDMSchedule
from bdm_jax.diffusion.losses import denoising
from bdm_jax.diffusion.samplers import SAMPLERS
from bdm_jax.diffusion.scheduler_config import from_json, to_json
from bdm_jax.errors import UserError

SHAPE = (3, 4, 5, 2)
MEAN, DEVIATION = 0.3, 0.25  # of the data, Gaussian: its best denoiser is known
SCHEDULE = EDMSchedule()


def denoiser(x, sigma):
    """E[x0 | x] for data of N(MEAN, DEVIATION^2) and noise of deviation sigma."""
    return (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)


def network(schedule, latents, t):
    """F as the network would have to answer: D = c_skip x + c_out F, at latents x / sqrt(sigma^2 + sd^2)."""
    sd, sigma = schedule.sigma_data, np.exp(np.float64(t) / schedule.time_scale)
    st = np.sqrt(sigma**2 + sd**2)
    x = np.asarray(latents, np.float64) * st
    f = (denoiser(x, sigma) - (sd / st) ** 2 * x) / (sigma * sd / st)
    return (f if schedule.prediction_type == "edm" else -f).astype(np.float32)


def karras_sigmas(count, least=0.002, most=80.0, rho=7.0):
    """Equation 5 of 2206.00364, and the 0 behind it."""
    i = np.arange(count) / max(count - 1, 1)
    return np.append((most ** (1 / rho) + i * (least ** (1 / rho) - most ** (1 / rho))) ** rho, 0.0)


def algorithm_1(noise, count, second_order, **span):
    """The paper's deterministic sampler, Heun's or (without the correction) Euler's, in float64."""
    sigmas = karras_sigmas(count, **span)
    x = sigmas[0] * np.asarray(noise, np.float64)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - denoiser(x, sigma)) / sigma
        ahead = x + (following - sigma) * d
        if second_order and following > 0:
            d = (d + (ahead - denoiser(ahead, following)) / following) / 2
            ahead = x + (following - sigma) * d
        x = ahead
    return x


def ours(name, schedule, noise, count):
    steps = SAMPLERS[name](schedule, count)
    state = samplers.start(noise, steps)
    for i in range(len(steps.t)):
        row = jax.tree.map(lambda column, i=i: column[i], steps)
        prediction = network(schedule, state.latents, row.t)
        state = samplers.advance(state, prediction, row, np.zeros_like(noise))
    return np.asarray(state.latents) * schedule.data_scale


@pytest.mark.parametrize("count", [1, 2, 18, 40])
@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["edm", "v_prediction"])
def test_sampling_equals_the_papers_algorithm(name, kind, count, rng):
    """1e-5 of the data's scale, and 1e-6 of a value (few steps leave much of the noise): our latents are in fp32, of
    which a unit is 6e-8 of a value; the paper's algorithm is in float64.
    """
    noise = rng.standard_normal(SHAPE, dtype=np.float32)
    expected = algorithm_1(noise, count, name == "heun")
    found = ours(name, replace(SCHEDULE, prediction_type=kind), noise, count)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-6)


def test_other_constants_and_the_networks_time(rng):
    schedule = EDMSchedule(sigma_data=1.3, sigma_min=0.01, sigma_max=30.0, rho=5.0, time_scale=0.25)
    noise = rng.standard_normal(SHAPE, dtype=np.float32)
    expected = algorithm_1(noise, 20, True, least=0.01, most=30.0, rho=5.0)
    np.testing.assert_allclose(ours("heun", schedule, noise, 20), expected, atol=1e-5)
    np.testing.assert_allclose(SAMPLERS["euler"](schedule, 9).t, 0.25 * np.log(karras_sigmas(9, 0.01, 30.0, 5.0)[:-1]))


@pytest.mark.parametrize("name", ["lms", "dpmpp-2m", "unipc", "heun-exponential", "dpmpp-2m-karras"])
def test_other_samplers_come_to_the_same_distribution(name, rng):
    """The flow of Gaussian data is linear: x at sigma goes to MEAN + (x - MEAN) times the ratio of deviations. At 160
    steps within a thousandth, which is the samplers' own error (Heun's falls to a quarter with each doubling).
    """
    noise = rng.standard_normal(SHAPE, dtype=np.float32)
    ratio = DEVIATION / np.sqrt(DEVIATION**2 + SCHEDULE.sigma_max**2)
    expected = MEAN + (SCHEDULE.sigma_max * noise - MEAN) * ratio
    np.testing.assert_allclose(ours(name, SCHEDULE, noise, 160), expected, atol=1e-3)


@pytest.mark.parametrize(("name", "count"), [("dpmpp-2m-sde", 100), ("dpmpp-sde", 60), ("euler-a", 250)])
def test_stochastic_samplers_come_to_the_distribution_too(name, count, rng):
    noise = rng.standard_normal((32, 16, 16, 4), dtype=np.float32)
    steps = SAMPLERS[name](SCHEDULE, count)
    state = samplers.start(noise, steps)
    for i in range(len(steps.t)):
        row = jax.tree.map(lambda column, i=i: column[i], steps)
        fresh = rng.standard_normal(noise.shape, dtype=np.float32)
        state = samplers.advance(state, network(SCHEDULE, state.latents, row.t), row, fresh)
    data = np.asarray(state.latents) * SCHEDULE.data_scale
    assert data.mean() == pytest.approx(MEAN, abs=0.005) and data.std() == pytest.approx(DEVIATION, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
@pytest.mark.parametrize("kind", ["edm", "v_prediction"])
def test_steps_equal_diffusers(kind, count, rng):
    """EDMEulerScheduler's latents are data plus noise, it begins with sqrt(sigma_max^2 + 1) times the noise."""
    schedule = EDMSchedule(time_scale=0.25, prediction_type=kind)
    scheduler = EDMEulerScheduler.from_config(to_json(schedule))
    scheduler.set_timesteps(count)
    noise = rng.standard_normal(SHAPE, dtype=np.float32)
    steps = SAMPLERS["euler"](schedule, count)
    np.testing.assert_allclose(steps.t, scheduler.timesteps.numpy(), rtol=1e-5, atol=1e-6)
    state, x = samplers.start(noise, steps), torch.from_numpy(noise) * schedule.sigma_max
    for i, t in enumerate(scheduler.timesteps):
        row = jax.tree.map(lambda column, i=i: column[i], steps)
        scaled = scheduler.scale_model_input(x, t)
        np.testing.assert_allclose(state.latents, scaled.numpy(), atol=1e-4)
        x = scheduler.step(torch.from_numpy(network(schedule, scaled.numpy(), float(t))), t, x).prev_sample
        state = samplers.advance(state, network(schedule, state.latents, row.t), row, np.zeros_like(noise))
    np.testing.assert_allclose(np.asarray(state.latents) * schedule.sigma_data, x.numpy(), atol=1e-4)


def test_the_mean_squared_error_is_the_papers_loss(rng):
    """lambda(sigma) |D - x0|^2 with lambda = (sigma^2 + sd^2) / (sigma sd)^2, for any F (related-systems.md, 4.1)."""
    sd, sigma = SCHEDULE.sigma_data, np.array([0.01, 0.5, 40.0])
    x0, noise, f = rng.standard_normal((3, *SHAPE), dtype=np.float32)
    t = jnp.asarray(np.log(sigma), jnp.float32)
    loss = denoising(f, SCHEDULE.target(x0 / sd, noise, t))
    sigma = sigma[:, None, None, None]
    st = np.sqrt(sigma**2 + sd**2)
    x = x0 + sigma * noise
    np.testing.assert_allclose(SCHEDULE.add_noise(x0 / sd, noise, t), x / st, rtol=1e-5, atol=1e-6)
    error = ((sd / st) ** 2 * x + sigma * sd / st * f - x0) ** 2
    np.testing.assert_allclose(loss, ((st / (sigma * sd)) ** 2 * error).mean(axis=(1, 2, 3)), rtol=1e-3)
    alpha, deviation = SCHEDULE.alpha_sigma(t)
    back = SCHEDULE.to_x0(f, x / st, alpha, deviation) * sd
    np.testing.assert_allclose(back, (sd / st) ** 2 * x + sigma * sd / st * f, rtol=1e-4, atol=1e-4)


def test_an_answer_of_zero_scales_and_no_noise_changes_nothing(rng):
    """related-systems.md, 4.3, test 3: F = 0 gives D = (sd/st)^2 x, and D -> x as sigma -> 0."""
    x, f = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    sd = SCHEDULE.sigma_data
    for sigma in (1e-4, 0.7, 80.0):
        alpha, deviation = SCHEDULE.alpha_sigma(jnp.full(SHAPE[0], np.log(sigma)))
        st = np.sqrt(sigma**2 + sd**2)
        denoised = SCHEDULE.to_x0(np.zeros_like(x), x / st, alpha, deviation) * sd
        np.testing.assert_allclose(denoised, sd**2 / st**2 * x, rtol=1e-4, atol=1e-7)
        if sigma < 1e-3:
            np.testing.assert_allclose(SCHEDULE.to_x0(f, x / st, alpha, deviation) * sd, x, atol=1e-3)


@pytest.mark.parametrize("bias", ["none", "later"])
def test_times_are_drawn_from_the_papers_distribution(bias):
    schedule = EDMSchedule(time_scale=0.25)
    keys = jax.random.split(jax.random.key(4), 20_000)
    t = np.asarray(jax.jit(jax.vmap(lambda key: schedule.draw(key, bias)))(keys))
    quantiles = stats.norm(-1.2, 1.2).cdf(t / 0.25)
    assert np.isfinite(t).all()
    assert stats.kstest(quantiles, "uniform" if bias == "none" else lambda q: q**2).pvalue > 0.01
    share = (quantiles > 0.5).mean()
    assert share == pytest.approx(0.5 if bias == "none" else 0.75, abs=0.01)


def test_edges_of_eDiff_Is_experts():
    """related-systems.md, 4.1: the slices of p(sigma) that its experts begin and end at."""
    keys = jax.random.split(jax.random.key(1), 400_000)
    sigma = np.exp(np.asarray(jax.jit(jax.vmap(SCHEDULE.draw))(keys)))
    for share, edge in ((1 / 8, 0.07574), (1 / 2, 0.30119), (7 / 8, 1.1977), (63 / 64, 3.9934), (511 / 512, 9.6096)):
        assert (sigma < edge).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(keys)))


def test_the_file_keeps_the_schedule_and_diffusers_reads_it():
    for schedule in (
        SCHEDULE,
        EDMSchedule(sigma_data=1.0, time_scale=0.25, prediction_type="v_prediction", p_mean=0.1),
    ):
        assert from_json(to_json(schedule)) == schedule
    theirs = dict(EDMEulerScheduler(sigma_max=70.0, prediction_type="epsilon").config)
    found = from_json({**theirs, "_class_name": "EDMEulerScheduler"})
    assert found == EDMSchedule(sigma_max=70.0, time_scale=0.25)  # diffusers divides ln sigma by four
    with pytest.raises(ValueError, match="sigma_schedule='exponential'"):
        from_json({**to_json(SCHEDULE), "sigma_schedule": "exponential"})


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "lcm"])
def test_samplers_of_discrete_timesteps_are_refused(name):
    with pytest.raises(UserError, match="needs discrete timesteps"):
        SAMPLERS[name](SCHEDULE, 10)
    with pytest.raises(UserError, match="the model's times are continuous"):
        SAMPLERS["euler-leading"](SCHEDULE, 10)


@pytest.mark.parametrize(
    ("values", "named"), [(dict(prediction_type="epsilon"), "prediction_type"), (dict(sigma_min=90.0), "sigma_min")]
)
def test_values_that_are_not_valid(values, named):
    with pytest.raises(ValueError, match=named):
        EDMSchedule(**values)
