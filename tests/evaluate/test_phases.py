"""A change of the noise schedule in mid-training: schedules and figures; the training itself is the command's."""

import numpy as np
import pytest

from bdm_jax.errors import UserError
from bdm_jax.evaluate import phases
from bdm_jax.evaluate.phases import ARMS, TIMES, PhaseArgs, chart, losses, measure


def test_schedules():
    levels = {name: schedule.noise_levels for name, schedule in ARMS.items()}
    alpha = {name: np.sqrt(schedule.alphas_cumprod[:1000]) for name, schedule in ARMS.items()}
    # the figures of the specification, computed there from Kolors' published config
    assert levels["base"][-1] == pytest.approx(14.6146, abs=1e-4)
    assert levels["kolors"][-1] == pytest.approx(29.0612, abs=1e-4)
    gaps = {name: np.abs(alpha[name] - alpha["base"]).max() for name in ("kolors", "naive")}
    assert gaps == pytest.approx({"kolors": 0.00313, "naive": 0.0358}, abs=5e-5)
    np.testing.assert_allclose(levels["shifted"], levels["base"] * levels["kolors"][-1] / levels["base"][-1], rtol=1e-9)


def test_the_loss_is_asked_for_at_the_schedules_own_noise(monkeypatch):
    asked = []
    monkeypatch.setattr(phases, "_error", lambda params, x, noise, t, squared: asked.append((t, squared)) or 0.5)
    assert losses({}, np.zeros((3, 2, 2, 4), np.float32), ARMS["kolors"], np.array([5, 1099])) == [0.5, 0.5]
    assert [t.tolist() for t, _ in asked] == [[5] * 3, [1099] * 3]
    assert asked[1][1].shape == (3, 1, 1, 1) and asked[1][1][0, 0, 0, 0] == pytest.approx(1.1827e-3, abs=1e-7)


def test_figures(monkeypatch):
    """With losses that are numbers: of the weights (0 before, 1 after the second phase) and of the schedule."""
    number = {schedule: row for row, schedule in enumerate(ARMS.values())}

    def phase(state, latents, schedule, steps, *rest):
        return phases.State({}, None, 0.1 if steps == 7 else 0)

    def loss(params, latents, schedule, times):
        return [1 - params + number[schedule]] * len(times)

    monkeypatch.setattr(phases, "init", lambda config, seed: {})
    monkeypatch.setattr(phases, "_phase", phase)
    monkeypatch.setattr(phases, "losses", loss)
    found = measure(np.zeros((9, 2, 2, 4)), PhaseArgs(first=5, second=7, seeds=2, held_out=3))
    assert found["summary"]["base"]["jump"] == [0, 0] and found["summary"]["kolors"]["jump"] == [1, 1]
    assert found["summary"]["naive"]["adapting"] == pytest.approx([0, 0])
    assert found["summary"]["kolors"]["new_after"] == pytest.approx([1.9, 1.9])
    assert "new_after" not in found["summary"]["shifted"] and len(found["arms"]["naive"]["after"][1]) == len(TIMES)
    assert chart(found).ndim == 3
    with pytest.raises(UserError, match="only 9 pictures"):
        measure(np.zeros((9, 2, 2, 4)), PhaseArgs(held_out=9))
    with pytest.raises(UserError, match="--first 0"):
        measure(np.zeros((9, 2, 2, 4)), PhaseArgs(first=0))
