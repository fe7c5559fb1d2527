"""Loss weights and noise against diffusers and the papers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.models.config import VAEConfig
from bdm_jax.training.objectives.backbone import BackboneTask
from bdm_jax.training.objectives.weighting import min_snr


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_diffusers(prediction_type, gamma):
    """compute_snr and the two lines of train_text_to_image.py; rtol of fp32 near alpha = 0."""
    t = np.array([0, 1, 250, 500, 999])
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    snr = compute_snr(scheduler, torch.from_numpy(t)).numpy()
    expected = np.minimum(snr, gamma)
    expected = {"epsilon": expected / snr, "v_prediction": expected / (snr + 1), "sample": expected}[prediction_type]
    np.testing.assert_allclose(
        min_snr(DiscreteSchedule(prediction_type=prediction_type), t, gamma), expected, rtol=1e-4
    )


def test_at_zero_snr_every_weight_is_finite():
    for prediction_type, expected in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        schedule = DiscreteSchedule(prediction_type=prediction_type, rescale_betas_zero_snr=True)
        assert float(min_snr(schedule, np.array([999]), 5.0)[0]) == pytest.approx(expected, abs=1e-6)


def job(task):
    return task.objective(task.sizes(lambda *_: VAEConfig(scaling_factor=0.5))).denoising


def test_noised_latents_and_v_targets_are_diffusers(rng):
    """x_t = alpha x0 + sigma noise and v = alpha noise - sigma x0 of one and the same noise."""
    made = job(BackboneTask(zero_snr=True))
    batch = {"moments": rng.standard_normal((6, 4, 4, 8)).astype(np.float32), "place": np.arange(6)}
    x, t, v = made.noised(batch, jax.random.key(5))
    noise = job(BackboneTask(prediction_type="epsilon")).noised(batch, jax.random.key(5))[2]
    whole = job(BackboneTask(prediction_type="epsilon"))
    alpha, sigma = (np.asarray(a, np.float64) for a in whole.schedule.alpha_sigma(t))
    clean = ((np.asarray(whole.noised(batch, jax.random.key(5))[0]) - sigma * noise) / alpha).astype(np.float32)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    arrays = [torch.from_numpy(np.asarray(a)) for a in (clean, noise)]
    times = torch.from_numpy(np.asarray(t)).long()
    np.testing.assert_allclose(x, scheduler.add_noise(*arrays, times), rtol=0, atol=2e-3)
    np.testing.assert_allclose(v, scheduler.get_velocity(*arrays, times), rtol=0, atol=2e-3)


def test_offset_noise_moves_whole_channels(rng):
    """What it adds is one number per sample and channel, normal with the deviation asked for; the rest is as before."""
    count = 400
    batch = {"moments": np.zeros((count, 4, 4, 8), np.float32), "place": np.arange(count)}
    plain, offset = (
        np.asarray(
            job(BackboneTask(prediction_type="epsilon", offset_noise=amount)).noised(batch, jax.random.key(1))[2]
        )
        for amount in (0.0, 0.3)
    )
    added = offset - plain
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-6)
    assert added.std() == pytest.approx(0.3, abs=5 * 0.3 / np.sqrt(2 * 4 * count))
    flat = np.stack([added[:, 0, 0].ravel(), plain.mean(axis=(1, 2)).ravel()])
    assert abs(np.corrcoef(flat)[0, 1]) < 5 / np.sqrt(4 * count)


def test_the_loss_is_the_weighted_mean(rng):
    prediction, target = rng.standard_normal((2, 5, 4, 4, 4)).astype(np.float32)
    t = np.array([3, 100, 400, 700, 990])
    task = BackboneTask(min_snr=5.0)
    errors = np.mean((prediction - target) ** 2, axis=(1, 2, 3))
    weights = np.asarray(min_snr(DiscreteSchedule(prediction_type="v_prediction"), t, 5.0))
    assert float(job(task).error(prediction, target, t)) == pytest.approx(np.mean(errors * weights), rel=1e-5)
    plain = job(replace(task, min_snr=None)).error(prediction, target, jnp.asarray(t))
    assert float(plain) == pytest.approx(np.mean(errors), rel=1e-5)
