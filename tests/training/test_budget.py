"""Steps that fit into a time: the sum by hand from a run whose times are given, and a real run."""

import json
from types import SimpleNamespace

import pytest
import toy

from bdm_jax.errors import UserError
from bdm_jax.training import budget


@pytest.fixture
def timed(monkeypatch):
    """A training of which loading and compiling takes `before` seconds, and each of `steps` steps 2."""

    def install(before, steps):
        clock = iter((100.0, 100.0 + before + 2 * steps))
        monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: next(clock)))

        def train(config):
            config.run.mkdir()
            seconds = {"compile": before, "step": 1.5, "data": 0.5}
            lines = [json.dumps({"step": at + 1, "seconds": seconds}) for at in range(steps)]
            (config.run / "speed.jsonl").write_text("\n".join(lines) + "\n")

        monkeypatch.setattr(budget, "train", train)

    return install


def test_what_is_left_divided_by_a_step(timed, tmp_path):
    """Of 1,000 s the measurement took 30 + 10 * 2, loading and compiling will take 30 again: 920 s are 460 steps."""
    timed(before=30, steps=10)
    assert budget.steps_within(toy.config(tmp_path / "run", 50), 1000) == 460


def test_too_short_a_time(timed, tmp_path):
    timed(before=30, steps=1)
    with pytest.raises(UserError, match="run: 60 s are too short: loading, compiling and a step take 32 s here"):
        budget.steps_within(toy.config(tmp_path / "run", 50), 60)


def test_a_real_run_is_measured_and_nothing_stays(tmp_path):
    """A step of this one takes far less than a second and more than a microsecond."""
    steps = budget.steps_within(toy.config(tmp_path / "run", 1000), 60)
    assert 60 < steps < 60_000_000
    assert not list(tmp_path.iterdir())
