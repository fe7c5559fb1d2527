"""Which noise levels a batch is trained on."""

import jax
import numpy as np
import pytest

from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.training.objectives.objective import draw


@pytest.mark.parametrize(("bias", "cumulative"), [("none", lambda u: u), ("later", np.square)])
def test_timesteps_follow_their_distribution(bias, cumulative):
    """The share below each tenth of the range, of 20,000 draws: its standard error is at most 0.0036."""
    t = np.asarray(draw(jax.random.key(3), np.arange(20_000), lambda key: DiscreteSchedule().draw(key, bias)))
    assert t.min() >= 0 and t.max() <= 999 and t.dtype == np.int32
    shares = [np.mean(t < 100 * tenth) for tenth in range(1, 10)]
    np.testing.assert_allclose(shares, cumulative(np.arange(1, 10) / 10), atol=5 * 0.0036)
